"""Reports are complete and self-contained, whatever the files contain."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.trainer.report_samples import (
    EVALUATORS,
    HOSTILE,
    make_experiment,
    make_run,
    prompts_of,
    search_of,
)
from trainer.cli.main import app
from trainer.config import ConfigError
from trainer.report.compare import write_comparison
from trainer.report.page import choose, data_uri
from trainer.report.report import collect, write_report
from trainer.report.run_data import GainRow, gain_sentence, masked, signed
from trainer.report.trials import importance, read_search
from trainer.runtime.errors import StorageError

VOID = {"meta", "link", "img", "br", "hr", "input"}
FETCHES = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Page(HTMLParser):
    """Parsed page; records unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.alts: list[str | None] = []
        self.words: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._attributes(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def _attributes(self, tag: str, values: dict[str, str | None]) -> None:
        self.targets += [value or "" for name, value in values.items() if name in FETCHES]
        self.handlers += [name for name in values if name.startswith("on")]
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag in ("img", "svg"):
            self.alts.append(values.get("alt") or values.get("aria-label"))

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_page(page: Page) -> None:
    """Check every page: it fetches nothing, runs nothing, shows no "nan", and describes its images."""
    assert all(it.startswith(("#", "data:")) for it in page.targets)
    assert page.tags["script"] == 0
    assert not page.handlers
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert max(Counter(page.ids).values()) == 1
    assert {it[1:] for it in page.targets if it.startswith("#")} <= set(page.ids)
    assert all(page.alts)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", page.text.replace("prefix=None", ""))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experiment(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "one")


# ------------------------------------------------------------------------------------------ contents


def test_report_of_a_run_is_complete(run: Path) -> None:
    """The page of a finished run has its verdict, rows, guard, drift, curves, images and configuration."""
    page = read(write_report(run))
    check_page(page)
    gain = json.loads((run / "evaluation.json").read_text())["rows"]["composite"]
    assert f"rose by {gain['difference']:.3f}" in page.text
    assert f"{signed(gain['low'])} to {signed(gain['high'])}" in page.text
    for name in (*EVALUATORS, "diversity", "saturation", "torch 2.12.1", "af00d", "aca1", "Guard hpsv2"):
        assert name in page.text
    for kind in ("Best", "Median", "Worst", "Not selected"):
        assert kind in page.text
    assert "finished, 6 iterations" in page.text
    assert "1 group of images were dropped" in page.text
    assert "learning_rate: 0.001" in page.text
    assert page.tags["img"] == 4 * 4 * 2 * 2  # kinds, prompts, before and after, images
    assert page.tags["svg"] >= 10


def test_report_of_an_experiment_is_complete(experiment: Path) -> None:
    """Folds, search, the choice measured again, and the test's gain first."""
    page = read(write_report(experiment))
    check_page(page)
    gain = json.loads((experiment / "test.json").read_text())["rows"]["composite"]
    assert f"rose by {gain['difference']:.3f}" in page.text
    assert "12 test prompts" in page.text.split("What changed")[0]
    for word in ("fold 0", "fold 2", "no improvement in 2 evaluations", "Measured once", "4 iterations"):
        assert word in page.text
    for word in (
        "winner's curse",
        "update.learning_rate",
        "null: changes nothing",
        "out of memory",
        "fANOVA",
    ):
        assert word in page.text
    assert "final/lora" in page.text


def test_equal_files_give_equal_pages(experiment: Path, tmp_path: Path) -> None:
    """A copy's report is the same to the byte."""
    copy = tmp_path / experiment.name
    shutil.copytree(experiment, copy)
    pages = [write_report(path, tmp_path / f"{i}.html") for i, path in enumerate((experiment, copy))]
    assert len({page.read_bytes() for page in pages}) == 1


def test_prompts_are_escaped(tmp_path: Path) -> None:
    """Prompts that are markup, templates, right-to-left, emoji or very long harm nothing and are shown."""
    page = read(write_report(make_run(tmp_path / "one", prompts=prompts_of(8, HOSTILE))))
    check_page(page)
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert "49" not in HOSTILE[1]
    assert HOSTILE[2] in page.text
    assert page.source.count('dir="auto"') == sum(
        'class="prompt"' in line for line in page.source.splitlines()
    )


def test_names_in_files_are_escaped(run: Path) -> None:
    """Evaluators, sentences and settings are escaped wherever they appear, charts included."""
    evil = "<img src=x onerror=alert(1)>$x^2$"
    for name in ("evaluation.json", "scorer.json", "metrics.jsonl", "config.yaml"):
        path = run / name
        path.write_text(path.read_text().replace("aesthetic", evil))
    page = read(write_report(run))
    check_page(page)
    assert evil in page.text


def test_a_password_in_an_address_is_not_shown(tmp_path: Path) -> None:
    """A page is passed on; the search's storage is shown without its password."""
    run = make_run(tmp_path / "one")
    config = run / "config.yaml"
    address = "postgresql+psycopg://lab:s3cr@et/1@db.example:5432/optuna"
    config.write_text(config.read_text().replace("storage: null", f"storage: {address}"))
    page = read(write_report(run))
    assert "s3cr" not in page.source
    assert "et/1" not in page.source
    assert "postgresql+psycopg://lab:***@db.example:5432/optuna" in page.text
    assert masked(7) == 7


def test_large_images_are_reduced(tmp_path: Path) -> None:
    """Karlo's 256-pixel images, even of noise, stay within the page's 15 MB; small ones lose nothing."""
    rng = np.random.default_rng(0)
    of_noise = [data_uri(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(2)]
    assert max(map(len, of_noise)) * 16 * 8 < 15e6
    large = data_uri(rng.integers(0, 256, (1024, 768, 3), dtype=np.uint8))
    assert len(large) < 1.1 * max(map(len, of_noise))


# ------------------------------------------------------------------------------ unfinished, damaged


def test_unfinished_run_is_marked(tmp_path: Path) -> None:
    """Last night's crashed run gets a page with what it had reached, and no verdict it hasn't earned."""
    page = read(write_report(make_run(tmp_path / "one", finished=False, done=5)))
    check_page(page)
    assert "not finished: 5 of 6 iterations" in page.text
    assert "Not finished. The composite rose" in page.text
    assert "after 4 iterations" in page.text
    assert "Not saved yet" in page.text


def test_run_without_iterations_is_marked(tmp_path: Path) -> None:
    """A folder with a configuration alone is a run of 0 iterations."""
    run = make_run(tmp_path / "one", finished=False, done=0)
    for path in run.iterdir():
        if path.name != "config.yaml":
            path.unlink()
    page = read(write_report(run))
    check_page(page)
    assert "nothing has been compared with the base yet" in page.text


def test_missing_and_running_folds_are_in_the_table(experiment: Path, tmp_path: Path) -> None:
    """Before crossval.json is there, each fold is shown as far as it has come."""
    copy = tmp_path / "study"
    shutil.copytree(experiment, copy)
    for name in ("crossval.json", "test.json", "folds/1/finished.json", "folds/1/evaluation.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "folds" / "2")
    shutil.rmtree(copy / "final")
    page = read(write_report(copy))
    check_page(page)
    assert "unfinished: 6 of 6 iterations" in page.text
    assert "not started" in page.text
    assert "the test prompts have not been measured" in page.text


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "binary": lambda _: bytes(range(256)) * 3,
    "list": lambda _: b"[1, 2]",
    "null": lambda _: b"null",
    "nan": lambda content: re.sub(rb"-?\d+\.\d+(e-\d+)?", b"NaN", content),
    "strings": lambda content: re.sub(rb"-?\d+\.\d+(e-\d+)?", b'"x"', content),
    "lists": lambda content: content.replace(b"{", b"[").replace(b"}", b"]").replace(b":", b","),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_and_the_rest_is_shown(experiment: Path, tmp_path: Path, damage: str) -> None:
    """Whatever the damage, a page is written and names the unreadable files."""
    copy = tmp_path / "study"
    shutil.copytree(experiment, copy)
    spared = copy / "config.yaml" if damage in ("half", "nan") else None
    for path in sorted(copy.rglob("*")):
        if path.is_file() and path != spared:
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
    page = read(write_report(copy))
    check_page(page)
    assert "could not" in page.text or "not known" in page.text
    assert ("runs_dir:" in page.text) == (spared is not None or damage == "strings")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "evaluation.json", "tuned.npz", "prompts.json", "scorer.json"]
)
def test_one_damaged_file_removes_only_its_section(run: Path, name: str) -> None:
    """The other sections stay, and the page names the file."""
    path = run / name
    path.write_bytes(path.read_bytes()[:-40] + b"\xff")
    page = read(write_report(run))
    check_page(page)
    assert name in page.text
    assert "Configuration" in page.text


def test_prompts_with_non_finite_scores_are_not_shown(run: Path) -> None:
    """A prompt with a score that is not finite is not shown; the others are."""
    with np.load(run / "tuned.npz") as arrays:
        held = dict(arrays)
    held["z"][0] = np.nan
    np.savez(run / "tuned.npz", **held)
    page = read(write_report(run))
    check_page(page)
    assert "Prompt 2 " in page.text
    assert "Prompt 1 " not in page.text


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """One line names the folder, and a run inside it if there is one."""
    with pytest.raises(StorageError, match="no such folder"):
        write_report(tmp_path / "none")
    with pytest.raises(StorageError, match="not a run or experiment"):
        write_report(tmp_path)
    make_run(tmp_path / "one")
    with pytest.raises(StorageError, match=r"one inside it, such as .*one"):
        write_report(tmp_path)


# -------------------------------------------------------------------------------------------- claims


def test_headline_claims_no_more_than_the_interval() -> None:
    """Rising, falling and unclear changes have different sentences."""
    unclear = GainRow("composite", 0.0, 0.1, 0.1, -0.1, 0.3, 0.1)
    assert gain_sentence(unclear, "here", 0.95).startswith("No significant improvement")
    fell = GainRow("composite", 0.0, -0.1, -0.1, -0.3, -0.05, -0.1)
    assert "fell by 0.100" in gain_sentence(fell, "here", 0.95)
    single = GainRow("composite", 0.0, 0.1, 0.1, None, None, 0.1)
    assert "too few prompts for an interval" in gain_sentence(single, "here", 0.95)


def test_tripped_guard_comes_first(run: Path) -> None:
    """However much the composite rose, a page whose guard tripped begins with that."""
    held = json.loads((run / "evaluation.json").read_text())
    held["guard"] |= {"tripped": True, "sentence": "Guard hpsv2 falls significantly"}
    (run / "evaluation.json").write_text(json.dumps(held))
    report = collect(run)
    assert report.headline.startswith("The guard tripped")
    assert report.tone == "warning"


def test_best_median_and_worst_prompts_are_chosen_by_change() -> None:
    """By the change, none twice, the first ones whatever they gained."""
    change = np.array([0.0, 5.0, -3.0, 1.0, 2.0, 3.0, -1.0, -2.0, 4.0])
    kinds = {title: places for title, _, places in choose(change, each=3)}
    assert kinds == {
        "Best": [1, 8, 5],
        "Median": [4, 3, 0],
        "Worst": [2, 7, 6],
        "Not selected": [0, 1, 2],
    }
    assert [places for *_, places in choose(np.array([1.0, 2.0]))] == [[0, 1]]


def test_importance_finds_the_setting_that_matters() -> None:
    """The planted one comes first; with few trials a remark says that it is a hint, or nothing is shown."""
    trials = read_search(search_of(30), {}).trials
    complete = [it for it in trials if it.complete and not it.null]
    settings = tuple(complete[0].params)
    remarks: list[str] = []
    assert importance(complete, settings, {}, remarks)[0][0] == "update.learning_rate"
    assert not remarks
    assert importance(complete[:6], settings, {}, remarks)
    assert "is only a hint" in remarks[0]
    assert importance(complete[:3], settings, {}, remarks) == []


def test_search_with_odd_trials_is_shown(experiment: Path, tmp_path: Path) -> None:
    """Lists, mixed types, huge integers and settings that only some trials have make no page fail."""
    copy = tmp_path / "study"
    shutil.copytree(experiment, copy)
    held = search_of(12)
    for place, odd in enumerate([[1, 2], "x", None, True, 10**400, -1.0, {"a": 1}, 1e308]):
        held["trials"][place + 1]["params"]["odd"] = odd
    held["trials"] += ["x", None, {"number": "7"}, {"number": 40}]
    (copy / "search.json").write_text(json.dumps(held))
    page = read(write_report(copy))
    check_page(page)
    assert "odd" in page.text


# ---------------------------------------------------------------------------------------- comparison


def test_comparable_runs_are_compared(tmp_path: Path) -> None:
    """The same service and prompts: one table, the paired difference, the settings and images of both."""
    runs = [
        make_run(tmp_path / "weak", gain=0.1),
        make_run(tmp_path / "strong", gain=0.6, update={"learning_rate": 0.01}),
    ]
    page = read(write_comparison(runs, tmp_path / "compare.html"))
    check_page(page)
    assert "strong is better than weak" in page.text
    assert "update.learning_rate 0.001 0.01" in page.text
    assert "rollout" not in page.text
    assert "Best for strong against weak" in page.text
    assert "Not comparable" not in page.text


@pytest.mark.parametrize("what", ["evaluators", "prompts", "weights", "streams"])
def test_runs_measured_differently_are_shown_apart(tmp_path: Path, what: str) -> None:
    """Other evaluators, prompts, weights or streams: a notice says so, and no difference is claimed."""
    first = make_run(tmp_path / "a")
    prompts = prompts_of(12, ["another"]) if what == "prompts" else prompts_of(12)
    more = {
        "weights": {"evaluation": {"every": 2, "images_per_prompt": 2, "weights": {"clip": 1.0}}},
        "streams": {"evaluation": {"every": 2, "images_per_prompt": 2, "seed": 5}},
    }.get(what, {})
    second = make_run(tmp_path / "b", gain=0.9, prompts=prompts, **more)
    if what == "evaluators":
        (second / "scorer.json").write_text(json.dumps(dict.fromkeys(EVALUATORS, "other/table")))
    page = read(write_comparison([first, second], tmp_path / "compare.html"))
    check_page(page)
    assert "Not comparable" in page.text
    assert {"streams": "how images are generated"}.get(what, what) in page.text
    assert "is better than" not in page.text


def test_runs_with_unknown_evaluators_are_not_comparable(tmp_path: Path) -> None:
    """Two runs without scorer.json are not assumed to have used the same service."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        (run / "scorer.json").unlink()
    assert "Not comparable" in read(write_comparison(runs, tmp_path / "compare.html")).text


def test_unfinished_runs_and_experiments_can_be_compared(experiment: Path, tmp_path: Path) -> None:
    """Existing parts are shown, missing ones are named."""
    runs = [make_run(tmp_path / "half", finished=False, done=3), experiment]
    page = read(write_comparison(runs, tmp_path / "compare.html"))
    check_page(page)
    assert "not finished: 3 of 6" in page.text


def test_a_comparison_needs_two_runs(run: Path, tmp_path: Path) -> None:
    """The same run twice is not two."""
    with pytest.raises(ConfigError, match="two different runs"):
        write_comparison([run, run.parent / "." / run.name], tmp_path / "compare.html")


# ------------------------------------------------------------------------------------------- command


def test_command_prints_the_path(run: Path, tmp_path: Path) -> None:
    """`report RUN` writes into the run, `--out` elsewhere, several runs need `--compare`."""
    said = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    assert str(run / "report.html") in said.output.replace("\n", "")
    out = tmp_path / "other.html"
    CliRunner().invoke(app, ["report", str(run), "--out", str(out)], catch_exceptions=False)
    assert out.read_bytes() == (run / "report.html").read_bytes()
    with pytest.raises(ConfigError, match="--compare"):
        CliRunner().invoke(app, ["report", str(run), str(tmp_path)], catch_exceptions=False)


def test_command_needs_no_torch(run: Path) -> None:
    """The report command runs without torch."""
    code = (
        "import sys; from pathlib import Path; from trainer.cli.experiments import report_command; "
        "from rich.console import Console; "
        f"report_command([Path({str(run)!r})], None, compare=False, console=Console()); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (run / "report.html").exists()
