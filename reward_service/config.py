"""The `service:` section of a configuration file. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, StringConstraints, model_validator

from reward_service.images import MAX_PIXELS
from reward_service.protocol import MAX_BODY_BYTES, MAX_PAIRS, MAX_PROMPT_CHARS
from reward_service.settings import DEFAULT_CONFIG, ConfigPath, Settings, load_section

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Of a pause or a patience; at most twelve days, which a timer takes anywhere.
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
EvaluatorKind = Literal["aesthetic", "clip", "pickscore", "hpsv2"]


class Origin(Settings):
    """Where files come from: a folder, a hub repository at a revision, or a web address.

    `url` is the folder part of an address; files from it need a sha256.
    """

    folder: ConfigPath | None = None
    repo: str | None = None
    revision: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(place is not None for place in (self.folder, self.repo, self.url)) != 1:
            raise ValueError("name exactly one of folder, repo and url")
        if self.repo is not None and self.revision is None:
            raise ValueError("a repo needs a revision: a commit, so that the weights cannot change unnoticed")
        return self

    def __str__(self) -> str:
        return str(self.folder or self.url or f"{self.repo}@{self.revision}")


class Weights(Settings):
    """One file of weights; `sha256` is compulsory for anything but safetensors from a folder or hub."""

    file: str
    sha256: Sha256 | None = None


class TowerConfig(Settings):
    """One CLIP model: the published layout it comes in, and where.

    `huggingface`: config.json, weights and tokenizer files of transformers' CLIPModel.
    `open_clip`: weights with open_clip's names; `architecture` is a name that open_clip knows, or null
    for an open_clip_config.json beside the weights; `vocabulary` is the BPE file's name, or null for
    open_clip's own.
    """

    layout: Literal["huggingface", "open_clip"]
    origin: Origin
    weights: Weights
    architecture: str | None = None
    vocabulary: str | None = None
    tokenizer: Origin | None = None
    text_cleaning: Literal["none", "openai"] = "none"

    @model_validator(mode="after")
    def _fits_layout(self) -> Self:
        if self.layout == "huggingface" and (self.architecture or self.vocabulary):
            raise ValueError("architecture and vocabulary belong to layout open_clip")
        if self.layout == "open_clip" and (self.tokenizer or self.text_cleaning != "none"):
            raise ValueError("tokenizer and text_cleaning belong to layout huggingface")
        return self


class HeadConfig(Settings):
    """The aesthetic head's file."""

    origin: Origin
    weights: Weights


class EvaluatorConfig(Settings):
    """One evaluator: its kind fixes formula and preprocessing, `tower` names the model it looks through.

    One that is not `enabled` is neither loaded nor served.
    """

    kind: EvaluatorKind
    tower: str
    enabled: bool = True
    head: HeadConfig | None = None
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        if (self.head is not None) != (self.kind == "aesthetic"):
            raise ValueError("an evaluator of kind aesthetic needs a head, and no other kind has one")
        return self


class Limits(Settings):
    """What a request, a client and all of them together may cost.

    A client is a key, or, without keys, an `X-Client-Id`. Pairs and bytes count from before a body is read
    until its answer; `decoded` are the pixels of the images, 3 bytes each, and no request may exceed
    them. With nothing else under way, a client may exceed its pairs with one request. The last eighth of
    each sum is kept for clients who hold less than a sixteenth of it.
    """

    max_body_bytes: PositiveInt = MAX_BODY_BYTES
    max_pairs: Annotated[int, Field(ge=1, le=MAX_PAIRS)] = MAX_PAIRS
    max_image_pixels: PositiveInt = MAX_PIXELS
    max_prompt_chars: Annotated[int, Field(ge=1, le=MAX_PROMPT_CHARS)] = MAX_PROMPT_CHARS
    max_queued_pairs: PositiveInt = 4096
    max_client_pairs: PositiveInt = 2048
    max_inflight_bytes: PositiveInt = 8 * MAX_BODY_BYTES
    max_client_bytes: PositiveInt = 4 * MAX_BODY_BYTES
    max_decoded_bytes: PositiveInt = 2 * 2**30
    max_client_decoded_bytes: PositiveInt = 2**30
    max_connections: PositiveInt = 4096
    header_timeout_s: Seconds = 15.0
    body_timeout_s: Seconds = 60.0
    keep_alive_s: Seconds = 75.0


class Auth(Settings):
    """Who may ask.

    `keys`: the file that `reward-service keys new` writes; with one, a request needs a key, wherever the
    service listens. Without one it listens on loopback only, unless `allow_anonymous`, which lets
    everybody in who can reach it. `open_metrics`: /metrics needs no key.
    """

    keys: ConfigPath | None = None
    allow_anonymous: bool = False
    open_metrics: bool = False


class Watch(Settings):
    """When the service doubts itself.

    `canary_every_s`: pause between two scorings of the canary pair. `stuck_s`: a batch that takes longer
    hangs, and the process ends. `breaker_failures`: different pairs in a row that an evaluator fails on
    before it is taken out of service. `breaker_pause_s`: until it is tried again, doubled each time it
    fails, up to `breaker_longest_pause_s`.
    """

    canary_every_s: Seconds = 60.0
    stuck_s: Seconds = 300.0
    breaker_failures: PositiveInt = 5
    breaker_pause_s: Seconds = 5.0
    breaker_longest_pause_s: Seconds = 300.0


class Tracing(Settings):
    """Where OpenTelemetry spans go: an OTLP/HTTP collector's address, such as http://collector:4318.

    None is the environment's OTEL_EXPORTER_OTLP_ENDPOINT; without either nothing is traced.
    """

    endpoint: str | None = None


class Logs(Settings):
    """The log on stderr: `json`, `text`, or `auto`, which is text on a terminal and JSON elsewhere."""

    format: Literal["auto", "json", "text"] = "auto"


def _no_float16(dtype: object) -> object:
    if dtype in ("float16", "fp16", "half"):
        raise ValueError(
            "half precision is not offered: a CPU is 50 times slower in it than in float32, a GPU as "
            "fast in bfloat16; use float32 or bfloat16"
        )
    return dtype


class ServiceConfig(Settings):
    """Everything the service can be told. `dtype` is the trunks'; heads and cosines are always float32.

    `canary` is a file of golden scores that `reward-service canary --write` makes; without one the
    scores of the start are what later ones are held against. `prepare_ahead`: whether the next batch's
    images are resized and cropped while one runs; None: where the device is not the CPU that would do it.
    """

    towers: Annotated[dict[str, TowerConfig], Field(min_length=1)]
    evaluators: Annotated[dict[str, EvaluatorConfig], Field(min_length=1)]
    calibration: ConfigPath
    canary: ConfigPath | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    device: str = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], BeforeValidator(_no_float16)] = "auto"
    acceleration: Literal["none", "compile", "graphs"] = "none"
    threads: PositiveInt | None = None
    decode_threads: PositiveInt = 2
    prepare_ahead: bool | None = None
    batch_pairs: PositiveInt = 64
    text_cache_entries: Annotated[int, Field(ge=0)] = 4096
    drain_s: Seconds = 20.0
    limits: Limits = Limits()
    watch: Watch = Watch()
    tracing: Tracing = Tracing()
    logs: Logs = Logs()
    auth: Auth = Auth()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, evaluator in self.evaluators.items():
            if evaluator.tower not in self.towers:
                raise ValueError(f"evaluator {name} names tower {evaluator.tower!r}, which is not configured")
        if not self.enabled:
            raise ValueError("no evaluator is enabled; set enabled: true for at least one")
        if not any(evaluator.weight for evaluator in self.enabled.values()):
            raise ValueError("every evaluator weighs 0; give at least one a weight")
        return self

    @property
    def enabled(self) -> dict[str, EvaluatorConfig]:
        """The evaluators that are loaded and served."""
        return {name: evaluator for name, evaluator in self.evaluators.items() if evaluator.enabled}


def load_config(path: Path = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> ServiceConfig:
    """Read the `service:` section of a configuration file.

    Raises:
        ConfigError: whatever is wrong, in one line
    """
    return load_section(ServiceConfig, path, "service", overrides)
