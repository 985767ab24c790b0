"""Configuration of the reward service: the `service:` section of a configuration file. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, StringConstraints, model_validator

from reward_service.images import MAX_PIXELS
from reward_service.protocol import MAX_BODY_BYTES, MAX_PAIRS, MAX_PROMPT_CHARS
from reward_service.settings import DEFAULT_CONFIG, ConfigPath, Settings, load_section

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: A duration; at most twelve days, which every timer supports.
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
EvaluatorKind = Literal["aesthetic", "clip", "pickscore", "hpsv2"]


class Origin(Settings):
    """Origin of files: a folder, a Hugging Face hub repository at a revision, or a web address.

    Attributes:
        folder: a folder
        repo: a repository on the hub; needs a revision
        revision: commit, branch or tag of the repository
        url: web address without the file name; files from it need a sha256
    """

    folder: ConfigPath | None = None
    repo: str | None = None
    revision: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if sum(place is not None for place in (self.folder, self.repo, self.url)) != 1:
            raise ValueError("name exactly one of folder, repo and url")
        if self.repo is not None and self.revision is None:
            raise ValueError("a repo needs a revision: a commit, so that the weights cannot change unnoticed")
        return self

    def __str__(self) -> str:
        return str(self.folder or self.url or f"{self.repo}@{self.revision}")


class Weights(Settings):
    """One file of weights; `sha256` is required unless it is a safetensors file from a folder or the hub."""

    file: str
    sha256: Sha256 | None = None


class TowerConfig(Settings):
    """One CLIP model: its published layout, and the origin of its files.

    Attributes:
        layout: `huggingface` has config.json, weights and tokenizer files of transformers' CLIPModel,
            `open_clip` has weights with open_clip's names
        origin: origin of all files unless named otherwise
        weights: the checkpoint
        architecture: for `open_clip`: one of `open_clip.list_models()`, or None for an open_clip_config.json
            at the origin
        vocabulary: for `open_clip`: name of the BPE file, or None for open_clip's own
        tokenizer: for `huggingface`: origin of the tokenizer files, if other than that of the weights
        text_cleaning: for `huggingface`: `openai` cleans prompts as OpenAI's CLIP does
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
    """File of the aesthetic head."""

    origin: Origin
    weights: Weights


class EvaluatorConfig(Settings):
    """One evaluator.

    Attributes:
        kind: determines formula and preprocessing
        tower: name of its CLIP model
        enabled: whether it is loaded and served
        head: file of the linear head, for kind `aesthetic` only
        weight: default weight of its normalized score in the reward
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
    """Limits of one request, of one client, and of all clients together.

    A client is identified by its API key, or, without keys, by `X-Client-Id`. Pairs and bytes count from
    before a body is read until its response is sent. A client without other requests may exceed its pairs
    with one request. The last eighth of each total is reserved for clients that hold less than a sixteenth
    of it.

    Attributes:
        max_body_bytes: of one request
        max_pairs: of one request
        max_image_pixels: of one image
        max_prompt_chars: of one prompt
        max_queued_pairs: of all clients
        max_client_pairs: of one client
        max_inflight_bytes: bodies of all clients
        max_client_bytes: bodies of one client
        max_decoded_bytes: pixels of all clients' images, 3 bytes each; also limits a single request
        max_client_decoded_bytes: pixels of one client's images; also limits a single request
        max_connections: open connections
        header_timeout_s: from the start of a request until its headers are complete
        body_timeout_s: from the headers until the body is complete
        keep_alive_s: idle time until a connection is closed
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
    """Authentication by API keys.

    Attributes:
        keys: file written by `reward-service keys new`; with it, every request needs a key. Without it the
            service listens on loopback only
        allow_anonymous: without keys, listen on any address and accept requests from everybody
        open_metrics: whether /metrics needs no key
    """

    keys: ConfigPath | None = None
    allow_anonymous: bool = False
    open_metrics: bool = False


class Watch(Settings):
    """Self-checks: canary, stuck batches and circuit breakers.

    Attributes:
        canary_every_s: pause between two scorings of the canary pair
        stuck_s: timeout of a batch, after which the process exits
        breaker_pause_s: pause before a failed evaluator is tried again, doubled after each failure
        breaker_longest_pause_s: upper limit of that pause
    """

    canary_every_s: Seconds = 60.0
    stuck_s: Seconds = 300.0
    breaker_pause_s: Seconds = 5.0
    breaker_longest_pause_s: Seconds = 300.0


class Tracing(Settings):
    """OpenTelemetry tracing.

    Attributes:
        endpoint: address of an OTLP/HTTP collector, such as http://collector:4318; None for that of the
            environment variable OTEL_EXPORTER_OTLP_ENDPOINT. Without either, tracing is off
    """

    endpoint: str | None = None


class Logs(Settings):
    """Log on stderr: `json`, `text`, or `auto`, which is text on a terminal and JSON otherwise."""

    format: Literal["auto", "json", "text"] = "auto"


def _no_float16(dtype: object) -> object:
    if dtype in ("float16", "fp16", "half"):
        raise ValueError(
            "half precision is not supported: a CPU is 50 times slower with it than with float32, and a GPU "
            "is as fast with bfloat16; use float32 or bfloat16"
        )
    return dtype


class ServiceConfig(Settings):
    """All settings of the service.

    Attributes:
        towers: CLIP models by name
        evaluators: evaluators by name
        calibration: file of the calibration table
        canary: file of golden scores, written by `reward-service canary --write`; without it, later canary
            scores are compared with those at the start
        host: address to listen on
        port: port to listen on, 0 for a free one
        device: `auto`, `cpu` or `cuda`
        dtype: dtype of the trunks; heads and cosines are always float32
        acceleration: whether image passes are compiled or captured as CUDA graphs
        threads: CPU threads of torch; None for torch's default
        decode_threads: threads that decode images, each with a child process for files; as many again, with
            lower priority, for large images
        prepare_ahead: whether to preprocess the next batch's images while a batch runs; None means only if
            the device is not the CPU, which would be busy with the batch
        batch_pairs: maximum number of pairs of one forward pass
        text_cache_entries: prompts per tower whose tokens and embeddings are cached
        drain_s: time to finish accepted requests on shutdown
        limits: limits of requests and clients
        watch: self-checks
        tracing: OpenTelemetry tracing
        logs: format of the log
        auth: authentication
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
            raise ValueError("every evaluator has weight 0; give at least one a positive weight")
        return self

    @property
    def enabled(self) -> dict[str, EvaluatorConfig]:
        """Evaluators that are loaded and served."""
        return {name: evaluator for name, evaluator in self.evaluators.items() if evaluator.enabled}


def load_config(path: Path = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> ServiceConfig:
    """Read the `service:` section of a configuration file.

    Raises:
        ConfigError: the configuration is invalid; the message is one line
    """
    return load_section(ServiceConfig, path, "service", overrides)
