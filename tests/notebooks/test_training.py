"""Notebook, executed from the first to the last cell on the miniature with a short experiment."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "training.ipynb"
SHORT = (
    "iterations=2",
    "evaluation.every=1",
    "evaluation.every_limit=4",
    "evaluation.images_per_prompt=2",
    "evaluation.resamples=200",
    "prompts.train_limit=12",
    "prompts.validation_limit=6",
    "prompts.test_limit=6",
    "rollout.prompts_per_iteration=2",
    "rollout.images_per_prompt=4",
    "search.trials=1",
    "search.iterations=2",
    "crossval.folds=2",
    "threads=1",
)
SPACE = "search.space={update.learning_rate: {low: 1.0e-4, high: 1.0e-3}}"


@pytest.mark.slow
def test_notebook_runs_from_first_to_last_cell(tmp_path: Path) -> None:
    """It trains, searches, cross-validates, shows images and leaves a report and a LoRA."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nSETTINGS = {[*SHORT, SPACE]!r}\nRUNS = {str(tmp_path / 'runs')!r}\n"
    NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    experiment = tmp_path / "runs" / "experiment"
    assert "<html" in (experiment / "report.html").read_text()
    assert list((experiment / "final" / "lora").glob("*.safetensors"))


def test_notebook_is_committed_without_outputs() -> None:
    """Outputs of an earlier run would be out of date and enlarge every diff."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
