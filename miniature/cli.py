"""`python -m miniature`: build the models, calibrate the evaluators on the generator, measure both."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from miniature import evaluate as measures
from miniature.build import Build, write_evaluators, write_generator, write_probe, write_prompts
from reward_service.config import load_config
from reward_service.engine.types import ModelError
from reward_service.settings import DEFAULT_CONFIG, ConfigError, one_line
from trainer.config import load_trainer_config

HOME = Path(__file__).parent
MODELS = HOME / "models"
PROBE = Path("probe") / "model.safetensors"

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Config = Annotated[Path, typer.Option("--config", help="Configuration of the models.")]


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder that the models are written to.")] = MODELS,
    work: Annotated[Path, typer.Option(help="Folder for finished stages; a build resumes from them.")] = Path(
        "runs/miniature-build"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    effort: Annotated[
        float, typer.Option(min=0.0, help="Scale of the training; 0.01 for a quick check.")
    ] = 1.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
) -> None:
    """Train every model of the miniature from a seed. Takes about an hour of CPU time at effort 1."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)  # before an hour of training
    work.mkdir(parents=True, exist_ok=True)
    stages = Build(work, seed, effort)
    write_evaluators(stages, out)
    write_generator(stages, out)
    write_probe(stages, out)
    write_prompts(out.parent / "prompts", seed)
    print(f"models: {out}\nnext: python -m miniature calibrate, then python -m miniature evaluate")


@app.command()
def calibrate(
    config: Config = DEFAULT_CONFIG,
    out: Annotated[Path, typer.Option(help="Table to write.")] = MODELS / "calibration.json",
) -> None:
    """Write the evaluators' scales: mean and deviation of the base generator's scores."""
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"{out}: cannot be written; name a file in an existing folder with --out")
    table = measures.calibrate(load_config(config), load_trainer_config(config))
    content = {
        "provisional": True,
        "provenance": "miniature: base generator on its training prompts; std is over all images",
        "evaluators": table,
    }
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"calibration: {out}")


@app.command()
def evaluate(
    config: Config = DEFAULT_CONFIG,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the held-out scenes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the evaluators and the generator on held-out scenes."""
    found = measures.measure(load_config(config), load_trainer_config(config), MODELS / PROBE, seed)
    if as_json:
        print(json.dumps(_plain(found), indent=2))
        return
    console = Console()
    for table in _tables(found):
        console.print(table)


def _plain(found: measures.Quality) -> dict[str, object]:
    return {
        "retrieval": {name: {"top1": r.top1, "top5": r.top5} for name, r in found.retrieval.items()},
        "preference_accuracy": found.preference,
        "aesthetic_correlation": found.aesthetic,
        "score_correlation": {f"{a}/{b}": r for (a, b), r in found.correlation.items()},
        "probe_accuracy": found.probe,
        "generated": found.generated,
    }


def _tables(found: measures.Quality) -> list[Table]:
    evaluators = Table(title="Evaluators on held-out scenes")
    for column in ("evaluator", "measure", "value"):
        evaluators.add_column(column, justify="right" if column == "value" else "left")
    evaluators.add_row("aesthetic", "correlation with the stated target", f"{found.aesthetic:.3f}")
    for name, hits in found.retrieval.items():
        evaluators.add_row(
            name, f"caption retrieval among {measures.RETRIEVAL_SCENES}, top-1", f"{hits.top1:.1%}"
        )
        evaluators.add_row(
            name, f"caption retrieval among {measures.RETRIEVAL_SCENES}, top-5", f"{hits.top5:.1%}"
        )
    for name, accuracy in found.preference.items():
        evaluators.add_row(name, "preference-pair accuracy", f"{accuracy:.1%}")
    together = Table(title="Correlation of the scores, on generated images of held-out prompts")
    for column in ("evaluator", "evaluator", "r"):
        together.add_column(column, justify="right" if column == "r" else "left")
    for (a, b), r in found.correlation.items():
        together.add_row(a, b, f"{r:+.3f}")
    generated = Table(title="Base generator on held-out prompts, read by the probe (an independent CNN)")
    for column in ("attribute", "shown as requested", "accuracy of the probe"):
        generated.add_column(column, justify="left" if column == "attribute" else "right")
    for name, share in found.generated.items():
        own = f"{found.probe[name]:.1%}" if name in found.probe else "(mean of 0 to 1)"
        generated.add_row(name, f"{share:.1%}", own)
    return [evaluators, together, generated]


def main() -> None:
    """Run the command line; a user error is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        _exit_with_error(error.format_message())
    except (ConfigError, ModelError) as error:
        _exit_with_error(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with_error(f"{error.filename}: {error.strerror}; name another path")


def _exit_with_error(message: str) -> None:
    print(f"miniature: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
