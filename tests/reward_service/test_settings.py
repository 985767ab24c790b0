"""Configuration files: one file, known keys only, every error one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from reward_service.config import load_config
from reward_service.settings import ConfigError, ConfigPath, Settings, load_section

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Inner(Settings):
    rate: float = 0.1
    folder: ConfigPath | None = None
    name: str = ""


class Outer(Settings):
    inner: Inner = Inner()
    count: int
    many: dict[str, Inner] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def load(path: Path, *overrides: str) -> Outer:
    return load_section(Outer, path, "service", overrides)


def test_only_the_named_section_is_read(tmp_path: Path) -> None:
    """Each program reads its own section; 1e-3 is a number."""
    path = write(tmp_path, "service: {count: 3, inner: {rate: 1e-3}}\ntrainer: {whatever: [1, 2]}")
    assert load(path) == Outer(count=3, inner=Inner(rate=0.001))


def test_overrides_take_precedence(tmp_path: Path) -> None:
    """Nested keys, numbers, and keys that the file does not have."""
    path = write(tmp_path, "service: {count: 3}")
    loaded = load(path, "count=4", "inner.rate=2e-2", "many.a.rate=5")
    assert (loaded.count, loaded.inner.rate, loaded.many["a"].rate) == (4, 0.02, 5.0)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of the working directory; absolute paths stay."""
    monkeypatch.chdir("/")
    path = write(tmp_path, "service: {count: 3, inner: {folder: ../x}}")
    assert load(path).inner.folder == (tmp_path / "../x").resolve()
    assert load(path, "inner.folder=/abs").inner.folder == Path("/abs")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("service: {count: 3}\nservise: {}", [], "unknown key 'servise' at the top; did you mean 'service'?"),
        ("trainer: {}", [], "section 'service' is missing"),
        ("service: 3", [], "must be a mapping, not int"),
        ("- 1", [], "expected the sections"),
        ("service: {count: [}", [], "not valid YAML"),
        ("service: {count: 2024-99-99}", [], "(found '2024-99-99')"),
        ("service: {count: !!timestamp x}", [], "not valid YAML"),
        ("service: " + "[" * 5000, [], "not valid YAML"),
        ("service: {count: 3}", ["count=2024-99-99"], "(found '2024-99-99')"),
        ("service: {count: 3}", ["count=[1"], "the value is not valid YAML"),
        ("service: {count: 3, cuont: 1}", [], "service.cuont: unknown key; did you mean 'count'?"),
        ("service: {count: 3, inner: {rat: 1}}", [], "service.inner.rat: unknown key; did you mean 'rate'?"),
        (
            "service: {count: 3, many: {a: {x: 1}}}",
            [],
            "service.many.a.x: unknown key; known keys: folder, name, rate",
        ),
        ("service: {}", [], "service.count: required, but missing"),
        ("service: {count: three}", [], "(found 'three')"),
        ("service: {count: 3}", ["count"], "write it as key.subkey=value"),
        ("service: {count: 3}", ["count.x=1"], "'count' is a value, not a mapping"),
        ("service: {count: 3}", ["nothing=1"], "service.nothing: unknown key"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, text: str, overrides: list[str], words: str) -> None:
    """They name the file or the override, the key, the problem and the remedy."""
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), *overrides)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "config.yaml" in message or overrides


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    """The message names the option for another file."""
    with pytest.raises(ConfigError, match=r"no such configuration file; name one with --config"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", ["miniature", "karlo"])
def test_shipped_configurations_are_valid(name: str) -> None:
    """The configuration of the real checkpoints has the same keys as the miniature's."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert set(config.enabled) == {"aesthetic", "clip", "pickscore", "hpsv2"}
    assert config.evaluators["aesthetic"].tower == config.evaluators["clip"].tower


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("towers.clip.origin={}", "exactly one of folder, repo and url"),
        ("towers.clip.origin={repo: a/b}", "needs a revision"),
        ("towers.clip.architecture=ViT-L-14", "belong to layout open_clip"),
        ("evaluators.clip.tower=none", "evaluator clip names tower 'none'"),
        ("evaluators.clip.head={origin: {folder: x}, weights: {file: y}}", "no other kind has one"),
        ("evaluators.clip.weight=-1", "greater than or equal to 0"),
        ("towers.clip.weights.sha256=abc", "sha256"),
        ("dtype=float16", "service.dtype: half precision .* use float32 or bfloat16"),
        (
            "evaluators={clip: {kind: clip, tower: clip, enabled: false}}",
            "no evaluator is enabled; set enabled: true for at least one",
        ),
    ],
)
def test_contradictions_are_refused(override: str, words: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "miniature.yaml", [override])


@pytest.mark.parametrize("name", ["drain_s", "watch.canary_every_s", "limits.keep_alive_s"])
@pytest.mark.parametrize("value", [".inf", ".nan", "0", "-1", "1e9"])
def test_durations_are_finite_and_positive(name: str, value: str) -> None:
    """No infinity, which would end in a traceback or in a check that never runs."""
    with pytest.raises(ConfigError, match=name):
        load_config(overrides=[f"{name}={value}"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("inner.folder=/a b #c.json", Path("/a b #c.json")),
        ("inner.folder=/a: {b}", Path("/a: {b}")),
        ("inner.folder=~", Path.home()),
        ("inner.folder=/2024", Path("/2024")),
        ("inner.folder=/it's", Path("/it's")),
        ('inner.folder="/a #b"', Path("/a #b")),
        ("inner.name='a", "'a"),
        ("inner.folder=null", None),
        ("inner.name=1e3", "1e3"),
        ("inner.name=007", "007"),
        ("inner.name=a #b", "a #b"),
        ("inner.name='a'", "a"),
        ("inner.name=::", "::"),
        ("count=010", 10),
    ],
)
def test_paths_and_texts_of_overrides_are_taken_as_they_are(
    tmp_path: Path, override: str, value: object
) -> None:
    """YAML reads numbers and lists only; null is none where that is allowed."""
    loaded = load(write(tmp_path, "service: {count: 3}"), override)
    key = override.partition("=")[0].rpartition(".")[2]
    assert getattr(loaded if key == "count" else loaded.inner, key) == value


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("service:\n  count: 3\n  count: 4", [], "line 3: the key 'count' is there twice, first in line 2"),
        ("service: {count: 3}", ["inner={rate: 1, rate: 2}"], "the key 'rate' is there twice"),
        ("service: {count: 1:30}", [], "(found '1:30')"),
        ("service: {count: 3}", ["count=1:30"], "(found '1:30')"),
        ("service: {count: 3, inner: {name: 123}}", [], "(found 123); put it in quotes"),
        ("service: {count: 3, inner: {folder: 2024}}", [], "(found 2024); put it in quotes"),
        ("service: {count: 3}", ["inner.folder="], "the value is empty; write null for none"),
        ("service: {count: 3}", ["inner.folder=~nobody-here/a"], "~nobody-here has no home folder here"),
        ("service: &a {count: 3, <<: {rate: 1}}", [], "merge keys (<<) are not part of YAML 1.2"),
    ],
)
def test_values_are_not_read_as_something_else(
    tmp_path: Path, text: str, overrides: list[str], words: str
) -> None:
    """Values that YAML 1.1 takes in silence are refused in one line."""
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), *overrides)
    assert words in str(caught.value)


def test_a_relative_link_stays_a_link(tmp_path: Path) -> None:
    """A mounted secret is a link that is set to another file when the secret changes."""
    (tmp_path / "old.txt").touch()
    (tmp_path / "link.txt").symlink_to("old.txt")
    loaded = load(write(tmp_path, "service: {count: 3, inner: {folder: link.txt}}"))
    assert loaded.inner.folder == tmp_path.resolve() / "link.txt"
