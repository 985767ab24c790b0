"""`reward-service calibrate`, from images to a table that the service uses."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from miniature import world
from miniature.evaluate import as_uint8
from reward_service.cli.main import main
from reward_service.config import load_config
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair
from reward_service.images import decode
from reward_service.scoring.calibration import load_calibration
from reward_service.scoring.service import ScoringService
from reward_service.settings import DEFAULT_CONFIG

PROMPTS, EACH = 10, 4
FAST = ("--set", "threads=1", "--resamples", "200")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 40 images of the miniature's world with captions; sharper ones are preferred."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = torch.Generator().manual_seed(0)
    scenes = world.sample_scenes(PROMPTS, world.Part.HELD_OUT, rng)
    captions = world.describe(scenes, rng).text
    rows, preferences = [], []
    for k in range(EACH):
        blur, fade, noise = world.sample_quality(PROMPTS, rng)
        varied = scenes.replace(blur_px=0.5 * k + 0 * blur, fade=fade, noise=noise)
        for p, image in enumerate(as_uint8(world.draw(varied, rng))):
            Image.fromarray(image).save(folder / f"{p}-{k}.png")
            rows.append((f"{p}-{k}.png", captions[p]))
            # One preference in four is reversed, so that a finite scale exists.
            sides = (f"{p}-0.png", f"{p}-{k}.png") if p % 4 else (f"{p}-{k}.png", f"{p}-0.png")
            preferences += [(captions[p], *sides)] if k else []
    write(folder / "prompts.csv", ("image", "prompt"), rows)
    write(folder / "pairs.csv", ("prompt", "preferred", "rejected"), preferences)
    for half, part in (("one", rows[::2]), ("other", rows[1::2])):
        write(folder / f"{half}.csv", ("image", "prompt"), part)
    return folder


def write(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def engine() -> RewardEngine:
    """The miniature's engine, not the random one of the other tests."""
    return build_engine(load_config(DEFAULT_CONFIG, ["threads=1"]))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in ("calibrate", *arguments)])
        shown = capfd.readouterr()
        return int(exited.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def table(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration table of the whole data set, scored deterministically."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    listed = ("--images", dataset, "--prompts", dataset / "prompts.csv", "--pairs", dataset / "pairs.csv")
    with pytest.raises(SystemExit) as exited:
        main([str(a) for a in ("calibrate", *listed, "--output", path, "--deterministic", *FAST)])
    assert not exited.value.code
    return path


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def test_the_table_has_the_statistics_of_the_images(table: Path) -> None:
    """The table has counts, provenance, intervals, fingerprints, correlations and preferences."""
    found = read(table)
    assert found["provisional"] is False
    assert "40 images of 10 prompts" in found["provenance"]
    assert list(found["evaluators"]) == ["aesthetic", "clip", "pickscore", "hpsv2"]
    for name, row in found["evaluators"].items():
        assert row["std"] == row["std_within_prompt"] < row["std_total"]
        assert row["mean_interval"][0] < row["mean"] < row["mean_interval"][1]
        assert row["std_within_prompt_interval"][0] < row["std"] < row["std_within_prompt_interval"][1]
        assert len(row["fingerprint"]) == 16
        assert row["preference"]["pairs"] == 30
        for matrix in found["correlation"].values():
            assert matrix[name][name] == 1.0
            assert all(-1 <= value <= 1 for value in matrix[name].values())
    assert found["evaluators"]["aesthetic"]["preference"]["scale"] > 0
    assert any("10 prompts; 200 or more" in line for line in found["warnings"])


def test_scores_are_those_of_the_engine(table: Path, dataset: Path, engine: RewardEngine) -> None:
    """The score file has the engine's raw scores, and the table their mean."""
    lines = [json.loads(line) for line in Path(f"{table}.scores.jsonl").read_text("utf-8").splitlines()]
    rows = {row["image"]: row for row in lines[1:]}
    assert len(rows) == PROMPTS * EACH
    for name in ("3-2.png", "9-0.png"):
        pixels = decode((dataset / name).read_bytes()).rgb
        expected = engine.score([Pair(rows[name]["prompt"], pixels)], deterministic=True)[0]
        assert rows[name]["raw"] == expected.raw
    values = [row["raw"]["clip"] for row in rows.values()]
    assert read(table)["evaluators"]["clip"]["mean"] == pytest.approx(sum(values) / len(values))


def test_the_service_uses_the_table(table: Path, engine: RewardEngine) -> None:
    """Its scales are provisional, with one warning, for another variant of an evaluator only."""
    config = load_config(DEFAULT_CONFIG, [f"calibration={table}", "threads=1"])
    assert load_in_service(config, engine) == (dict.fromkeys(engine.evaluators, False), [])
    content = read(table)
    content["evaluators"]["clip"]["fingerprint"] = "0" * 16
    other = table.with_name("other.json")
    other.write_text(json.dumps(content))
    provisional, warnings = load_in_service(config.model_copy(update={"calibration": other}), engine)
    assert provisional == {"aesthetic": False, "clip": True, "pickscore": False, "hpsv2": False}
    assert len(warnings) == 1
    assert "the scale of clip was measured with other weights" in warnings[0]


def load_in_service(config: Any, engine: RewardEngine) -> tuple[dict[str, bool], list[str]]:
    warnings: list[str] = []
    service = ScoringService(config, build=lambda _: engine, on_warning=warnings.append)
    service.start()
    deadline = time.monotonic() + 60
    while service.health.status == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    described = service.describe().evaluators
    service.close()
    return {name: it.provisional for name, it in described.items()}, warnings


def test_merged_score_files_give_the_same_table(run: Run, dataset: Path, table: Path, tmp_path: Path) -> None:
    """Two halves scored separately and merged in any order, without the images, give the same table."""
    for half in ("one", "other"):
        listed = ("--images", dataset, "--prompts", dataset / f"{half}.csv")
        output = ("--output", tmp_path / f"{half}.json", "--scores", tmp_path / f"{half}.jsonl")
        code, _, err = run(*listed, *output, "--deterministic", *FAST)
        assert code == 0, err
    for order in (("one", "other"), ("other", "one")):
        scores = [part for half in order for part in ("--scores", tmp_path / f"{half}.jsonl")]
        merged = tmp_path / f"{order[0]}-first.json"
        assert run(*scores, "--pairs", dataset / "pairs.csv", "--output", merged, *FAST)[0] == 0
        assert without_date(merged) == without_date(table)


def test_a_log_has_whole_lines(
    run: Run, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No carriage returns of a progress bar, no numbers cut to a width, and an option that a shell takes."""
    monkeypatch.setenv("COLUMNS", "40")
    (folder := tmp_path / "a b #c").mkdir()
    output = folder / "table.json"
    code, out, err = run("--images", dataset, "--prompts", dataset / "one.csv", "--output", output, *FAST)
    assert code == 0, err
    assert "\r" not in err
    assert "images scored, 0 were there" in err
    assert "…" not in out
    for row in read(output)["evaluators"].values():
        assert f"{row['mean']:.4f} [" in out
    option = shlex.split(out.splitlines()[-1].partition("serve with --set ")[2])
    assert option == [f"calibration={output}"]
    assert load_config(DEFAULT_CONFIG, option).calibration == output


def without_date(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read(path).items() if key != "provenance"}


@pytest.mark.slow
def test_a_killed_run_is_continued(run: Run, dataset: Path, table: Path, tmp_path: Path) -> None:
    """Scored images are not scored again, and the table equals that of an uninterrupted run."""
    output = tmp_path / "table.json"
    scores = Path(f"{output}.scores.jsonl")
    listed = ["--images", dataset, "--prompts", dataset / "prompts.csv", "--pairs", dataset / "pairs.csv"]
    arguments = [*listed, "--output", output, "--deterministic", *FAST, "--set", "batch_pairs=1"]
    command = [sys.executable, "-m", "reward_service", "calibrate", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not scores.exists() or scores.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    old = scores.read_bytes()
    with scores.open("ab") as file:
        file.write(b'{"image": "9-3.p')
    code, _, err = run(*arguments)
    assert code == 0, err
    assert without_date(output) == without_date(table)
    after = scores.read_bytes()
    assert after.startswith(old[: old.rindex(b"\n") + 1])
    assert set(Counter(json.loads(line)["image"] for line in after.splitlines()[1:]).values()) == {1}


def test_a_changed_image_is_scored_again(run: Run, dataset: Path, tmp_path: Path) -> None:
    """An image with new content is scored again; one that only changed its group is not."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("0-0.png", "0-1.png", "1-0.png", "1-1.png"):
        (images / name).write_bytes((dataset / name).read_bytes())
    listing = tmp_path / "list.csv"
    rows = [(f"{p}-{k}.png", f"prompt {p}", p) for p in range(2) for k in range(2)]
    write(listing, ("image", "prompt", "prompt_id"), rows)
    arguments = ("--images", images, "--prompts", listing, "--output", tmp_path / "t.json", "--force", *FAST)
    assert run(*arguments)[0] == 0
    (images / "0-1.png").write_bytes((dataset / "5-3.png").read_bytes())
    os.utime(images / "0-1.png", ns=(1, 1))
    write(listing, ("image", "prompt", "prompt_id"), [(*row[:2], 7) for row in rows])
    assert run(*arguments)[0] == 0
    found = [
        json.loads(line) for line in Path(f"{tmp_path / 't.json'}.scores.jsonl").read_text().splitlines()
    ]
    assert found[2]["image"] == "0-1.png"
    latest = {row["image"]: row for row in found[1:]}
    assert latest["0-1.png"]["raw"] != found[2]["raw"]
    assert latest["1-0.png"]["raw"] == found[3]["raw"]
    assert {row["prompt_id"] for row in latest.values()} == {"7"}
    assert read(tmp_path / "t.json")["prompts"] == 1


def test_pairs_alone_can_be_calibrated_from(run: Run, dataset: Path, tmp_path: Path) -> None:
    """Without --prompts the images of --pairs determine the scales; with it they are only compared."""
    pairs = ("--images", dataset, "--pairs", dataset / "pairs.csv")
    alone, beside = tmp_path / "alone.json", tmp_path / "beside.json"
    assert run(*pairs, "--output", alone, "--std", "total", "--evaluators", "clip,hpsv2", *FAST)[0] == 0
    found = read(alone)
    assert (found["pictures"], list(found["evaluators"])) == (40, ["clip", "hpsv2"])
    assert found["evaluators"]["clip"]["std"] == found["evaluators"]["clip"]["std_total"]
    small = tmp_path / "small.csv"
    rows = list(csv.reader((dataset / "prompts.csv").read_text("utf-8").splitlines()))[1:]
    write(small, ("image", "prompt"), [row for row in rows if row[0][0] in "01"])
    assert run(*pairs, "--prompts", small, "--output", beside, *FAST)[0] == 0
    assert read(beside)["pictures"] == 8
    assert read(beside)["evaluators"]["clip"]["preference"]["pairs"] == 30
    merged = tmp_path / "merged.json"
    scores = ("--scores", f"{beside}.scores.jsonl", "--pairs", dataset / "pairs.csv")
    assert run(*scores, "--output", merged, *FAST)[0] == 0
    assert without_date(merged) == without_date(beside)


MISTAKES = {
    "no input": ((), "--images with --prompts"),
    "no folder": (("--prompts", "{dataset}/prompts.csv"), "folder with --images"),
    "no prompts": (("--images", "{dataset}"), "give --prompts or --pairs"),
    "no such list": (("--images", "{dataset}", "--prompts", "/none.csv"), "/none.csv: cannot be read"),
    "no such folder": (("--images", "/none", "--prompts", "{dataset}/prompts.csv"), "no such folder"),
    "missing images": (("--images", "{tmp}", "--prompts", "{dataset}/prompts.csv"), "40 of 40 images"),
    "no such scores": (("--scores", "/none.jsonl"), "/none.jsonl: cannot be read"),
    "not scores": (("--scores", "{dataset}/prompts.csv"), "not a score file"),
    "evaluator": (
        ("--images", "{dataset}", "--prompts", "{dataset}/prompts.csv", "--evaluators", "beauty"),
        "choose from aesthetic, clip",
    ),
    "single images": (("--images", "{dataset}", "--prompts", "{tmp}/single.csv"), "two images"),
    "one image": (("--images", "{dataset}", "--prompts", "{tmp}/same.csv"), "the deviation is 0"),
    "no image": (("--images", "{tmp}", "--prompts", "{tmp}/text.csv"), "line 3: {tmp}/text.png: the bytes"),
    "few resamples": (("--resamples", "3"), "--resamples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_user_errors_are_one_line_and_exit_code_2(name: str, run: Run, dataset: Path, tmp_path: Path) -> None:
    """Errors are one line on stderr, and no table is written."""
    write(tmp_path / "single.csv", ("image", "prompt"), [("0-0.png", "x"), ("0-1.png", "y")])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "good.png").write_bytes((dataset / "0-0.png").read_bytes())
    write(tmp_path / "text.csv", ("image", "prompt"), [("good.png", "x"), ("text.png", "x")])
    for copy in "ab":
        (tmp_path / f"{copy}.png").write_bytes((dataset / "0-0.png").read_bytes())
    paths = [str(tmp_path / f"{copy}.png") for copy in "ab"]
    write(tmp_path / "same.csv", ("image", "prompt"), [(path, "x") for path in paths])
    arguments, message = MISTAKES[name]
    places = {"dataset": dataset, "tmp": tmp_path}
    filled = [part.format(**places) for part in arguments]
    code, out, err = run("--output", tmp_path / "table.json", "--set", "threads=1", *filled)
    assert (code, out) == (2, "")
    assert message.format(**places) in err
    assert sum(line.startswith("reward-service: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "table.json").exists()


def test_a_table_is_overwritten_only_with_force(run: Run, table: Path) -> None:
    """Without --force the table is unchanged; with it, no temporary file is left."""
    old = table.read_bytes()
    old_names = {path.name for path in table.parent.iterdir()}
    scores = ("--scores", f"{table}.scores.jsonl", "--output", table, *FAST)
    code, _, err = run(*scores)
    assert (code, table.read_bytes()) == (2, old)
    assert "add --force" in err
    copy = table.with_name("copy.json")
    copy.write_bytes(old)
    assert run(*scores[:3], copy, "--force", *FAST)[0] == 0
    assert load_calibration(copy, ["clip"]).evaluators["clip"].std > 0
    assert "preference" not in read(copy)["evaluators"]["clip"]
    assert {path.name for path in table.parent.iterdir()} == old_names | {"copy.json"}


def test_single_images_and_outliers_cause_warnings(
    run: Run, dataset: Path, table: Path, tmp_path: Path
) -> None:
    """Warnings name prompts that add nothing to σ, and evaluators whose robust σ differs."""
    lines = Path(f"{table}.scores.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    rows[0]["raw"]["clip"] += 5.0
    rows.append(rows[1] | {"image": "alone.png", "prompt": "a lonely prompt"})
    scores = tmp_path / "scores.jsonl"
    scores.write_text("\n".join([lines[0], *map(json.dumps, rows)]) + "\n")
    code, _, err = run("--scores", scores, "--output", tmp_path / "t.json", *FAST)
    assert code == 0, err
    assert "warning: 1 prompts have one image" in err
    assert "'a lonely prompt'" in err
    assert "warning: clip: robust within-prompt σ" in err
    assert "warning: aesthetic: robust" not in err
