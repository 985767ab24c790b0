"""Configuration of the trainer: the `trainer:` section of a YAML file, each setting with unit and range.

`load_trainer_config` reads the section into a frozen `TrainerConfig`. The sections follow in the order of
the file; the first ones belong to experiments (`crossval` and `search`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from reward_service.settings import ConfigError as ConfigError  # re-exported
from reward_service.settings import ConfigPath, Settings, load_section, with_changes

Fraction = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
Scale = Annotated[float, Field(ge=1)]  # guidance scale; 1: no guidance
Weights = dict[str, Annotated[float, Field(ge=0)]]  # by evaluator

# Which images get the same random numbers: none, those of a group, or all of a prompt in a run.
Share = Literal["image", "group", "prompt"]

Precision = Literal["float32", "bfloat16"]

# The stage whose images are scored: the decoder's (64 px with Karlo) or the final ones (256 px).
ImageStage = Literal["decoder", "super_resolution"]

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name for it

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


class Section(Settings):
    """Base of all sections. Numbers are finite: checkpoints store them as JSON, which has no infinity."""

    model_config = ConfigDict(allow_inf_nan=False)


# ------------------------------------------------------------------------------------------ database

# As SQLAlchemy parses an address: a password reaches to the last @ before the host.
_PASSWORD = re.compile(r"^(?P<before>[\w+]+://[^:/?]*):(?P<password>.*)(?=@)")
_PASSWORD_PARAMETER = re.compile(r"(?P<before>[?&])password=(?P<password>[^&]*)&?")
_OLD_SCHEMES = re.compile(r"^postgres(ql)?(?=://)")


@dataclass(frozen=True)
class DatabaseUrl:
    """Address of a database. Its string, its repr and its serialisation omit the password.

    Two addresses are equal if they are equal without their passwords.
    """

    address: str  # without the password
    # As it was written, percent signs included. None: the database's library finds one, or needs none.
    password: SecretStr | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.address

    @classmethod
    def parse(cls, text: str) -> "DatabaseUrl":
        """Split an SQLAlchemy address into the address without a password and the password."""
        address, password = _OLD_SCHEMES.sub("postgresql+psycopg", text), None
        for pattern in (_PASSWORD, _PASSWORD_PARAMETER):
            found = pattern.search(address)
            if found is not None:
                address = (address[: found.start()] + found["before"] + address[found.end() :]).rstrip("?&")
                password = SecretStr(found["password"])
        return cls(address, password)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls.parse,
            core_schema.str_schema(),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )


# --------------------------------------------------------------------------------------- experiments


class EarlyStoppingConfig(Section):
    """Early stopping: end a fold whose validation composite no longer rises, and keep its best checkpoint."""

    patience: Annotated[int, Field(ge=0)] = 0  # evaluations without improvement until the end; 0: off
    # Least improvement, in standard errors of the paired difference from the best evaluation before.
    min_delta: Annotated[float, Field(ge=0)] = 0.5


class GuardConfig(Section):
    """Reward-hacking guard: an evaluator, not trained on, that must not fall while the composite rises."""

    # Its weight in objective.weights and evaluation.weights must be 0. "rotate": each fold holds out a
    # different one of the evaluators that have a weight.
    evaluator: str | None = None
    # Probability (0 to 1) that an honest run is not stopped, over all its evaluations together.
    confidence: Proportion = 0.95
    stop: bool = True  # end the run when the guard trips; false: only report it


class CrossvalConfig(Section):
    """Cross-validation: folds trained from the base, one fit on all of them, one measurement on the test."""

    folds: Annotated[int, Field(ge=2)] = 5
    # Settings that `crossval` and `search` change from those of `train`, such as evaluation.every: 10.
    settings: dict[str, Any] = Field(default_factory=dict)
    workers: PositiveInt = 1  # folds trained at the same time, each in a process


class SpaceConfig(Section):
    """Search range of one setting: `choices`, or numbers from `low` to `high`.

    The sampled value may be multiplied (`times`) or divided (`over`) by another setting's value.
    """

    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False  # uniform in the logarithm; needs low > 0
    integer: bool = False
    times: str | None = None  # a setting: sampled × its value
    over: str | None = None  # a setting: sampled / its value

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        ends = (self.low, self.high)
        if (self.choices is None) == (ends == (None, None)) or not (self.choices is None or self.choices):
            raise ValueError("give either choices, or low and high")
        if self.choices is None and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError("low and high: both are required, and low must be below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log: low must be above 0")
        if self.integer and (self.choices or any(end is not None and end % 1 for end in ends)):
            raise ValueError("integer: low and high must be whole numbers; leave integer out with choices")
        if self.times is not None and self.over is not None:
            raise ValueError("give times or over, not both")
        return self


class SearchConfig(Section):
    """Hyperparameter search (Optuna) on the first fold's training and validation prompts."""

    trials: PositiveInt = 20  # sampled from the space; the null trial is one more
    iterations: PositiveInt | None = None  # of a trial; null: as `iterations`
    workers: PositiveInt = 1  # trials trained at the same time, each in a process
    # Keys are settings below lora, rollout, objective and update, such as objective.weights.clip.
    space: dict[str, SpaceConfig] = Field(default_factory=dict)
    sampler: Literal["random", "tpe", "qmc"] = "random"
    # Stops a trial early: if its best evaluation so far is below the median of the others' at that iteration
    # (median), or if its newest is not among the best 1/`reduction` of them (halving). Trials are evaluated
    # every `evaluation.every` iterations, and at least three times.
    pruner: Literal["none", "median", "halving"] = "median"
    warmup_trials: Annotated[int, Field(ge=0)] = 2  # median: trials that must be complete first
    warmup_iterations: Annotated[int, Field(ge=0)] = 0  # of each trial, before it may be pruned
    reduction: Annotated[int, Field(ge=2)] = 3  # halving: 1 / (share of trials that continue)
    # SQLAlchemy address such as postgresql+psycopg://me@host/database; null: SQLite in the experiment's
    # folder. A password in it is never written to a file; PGPASSWORD and ~/.pgpass work too.
    storage: DatabaseUrl | None = None
    study: str | None = None  # name of the study in the storage; null: the experiment's name
    null_trial: bool = True  # also run trial 0, which trains nothing: its gain is measurement noise


# ------------------------------------------------------------------------------------ models, service


class ModelSource(Section):
    """Location of a model: a folder, or a hub repository at a revision."""

    path: ConfigPath | None = None
    repo: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path, or repo (and revision)")
        return self


class ServiceConfig(Section):
    """Connection to the reward service."""

    url: str = "http://127.0.0.1:8000"
    api_key_file: ConfigPath | None = None  # a file of one line: the bearer key
    client_id: str = "trainer"
    timeout_s: PositiveFloat = 120.0  # of one request
    retry_budget_s: Annotated[float, Field(ge=0)] = 60.0  # total time for retries of one request
    # Request scores that are bitwise independent of other requests: a run on the CPU is then reproducible
    # whatever else the service scores. Costs one forward pass for each image.
    deterministic: bool = False
    ready_timeout_s: PositiveFloat = 10.0  # wait for the service to be ready before training starts


class PromptsConfig(Section):
    """Prompt files: text (one prompt a line), .csv or .jsonl (prompt, and optionally user and cluster).

    A prompt, its near-duplicates and the other prompts of its user or cluster are one group. A split never
    divides a group.
    """

    train: ConfigPath
    validation: ConfigPath | None = None  # null: `validation_share` of the training prompts' groups
    test: ConfigPath | None = None  # for experiments; null: `test_share` of the groups
    train_limit: PositiveInt | None = None  # prompts: use only the first so many
    validation_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    validation_share: Proportion = 0.2  # share of groups, 0 to 1
    test_share: Proportion = 0.2
    # Similarity from which two prompts are near-duplicates: Jaccard's, of words and pairs of words, 0 to 1.
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.77


# --------------------------------------------------------------------------------- sampling, training


class SamplingConfig(Section):
    """Sampling of an image, the same in training and in evaluation."""

    prior_steps: Annotated[int, Field(ge=2)] = 25  # denoising steps
    prior_guidance: Scale = 4.0
    decoder_steps: Annotated[int, Field(ge=4)] = 25
    decoder_guidance: Scale = 8.0
    super_res_steps: Annotated[int, Field(ge=2)] = 7
    micro_batch: PositiveInt = 8  # images in one forward pass of the decoder (twice that with guidance)


class LoraSettings(Section):
    """LoRA adapter. `targets` are names of the decoder's modules, or endings of names."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0  # the adapter's output is scaled by alpha / rank
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    # Decay of the weights' moving average, which is evaluated and saved; 0: the last update itself.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Sharing(Section):
    """Common random numbers: which images share the random numbers that the policy does not decide on.

    What a group shares cannot make one of its images better than another, so it adds no noise to advantages.
    """

    prior: Share = "group"  # the image embedding; "prompt": sampled once in a run
    decoder_start: Share = "group"  # the initial noise, and the noise of denoising step 0
    super_res: Share = "group"


class RolloutConfig(Section):
    """Rollout: the trajectories and scores that one iteration collects."""

    prompts_per_iteration: PositiveInt = 8
    images_per_prompt: Annotated[int, Field(ge=2)] = 8  # the size of a group
    share: Sharing = Sharing()
    # Before training, generate a few groups with and without sharing and write to sharing.json the share of
    # the within-prompt variance that sharing removes; `reward-trainer variance` does the same at any time.
    measure_sharing: bool = False
    # Stage whose images are rewarded. "decoder" leaves super-resolution, more than half of Karlo's work, out
    # of training; `reward-trainer stages` measures how similarly scores before and after it rank images.
    reward_stage: ImageStage = "super_resolution"
    in_flight: PositiveInt = 2  # micro-batches that may wait for scores while the next is generated
    # Images. The last micro-batch is halved repeatedly down to this size, so that little is left to score
    # when all are generated. null: not halved.
    smallest_batch: PositiveInt | None = None
    score_attempts: PositiveInt = 2  # requests for a micro-batch before its groups are dropped
    max_dropped: Fraction = 0.05  # share of groups that may be dropped before the run stops


class ObjectiveConfig(Section):
    """Advantages and the trust region."""

    weights: Weights  # by evaluator; evaluators that are not named are not trained on
    advantage_clip: PositiveFloat = 5.0  # standard deviations
    deviation_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of the pooled within-group variance
    trust_region: Literal["kl", "clip"] = "kl"
    # Nats per transition. kl: largest KL; clip: largest |log ratio|.
    max_nats: PositiveFloat = 0.5
    # Loss per nat of KL(policy || base) per transition. Above 0, each replay costs one more forward pass.
    kl_to_base: Annotated[float, Field(ge=0)] = 0.0
    # frozen: ratio and KL use the sampling policy's sigma, so that less noise alone brings no gain.
    variance: Literal["frozen", "learned"] = "frozen"

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("weights: at least one evaluator needs a weight above 0")
        return self


class UpdateConfig(Section):
    """Update of the policy from one iteration's trajectories."""

    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, over `iterations`
    learning_rate_floor: Fraction = 0.0  # end of the schedule, as a share of learning_rate
    # AdamW's: an update shrinks the LoRA by learning_rate × weight_decay
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    steps_per_image: PositiveInt = 2  # denoising steps trained per image, stratified over the range
    # First and last denoising step that is trained; null: `trainer.rl.diffusion.trainable_steps`.
    train_steps: tuple[int, int] | None = None
    micro_batch: PositiveInt = 32  # transitions in one backward pass
    accumulate: PositiveInt = 1  # micro-batches in one optimizer step
    max_grad_norm: PositiveFloat = 1.0
    guidance_gradient: Literal["both", "conditional"] = "both"  # branches that carry gradient
    # Keep few of the decoder's activations and recompute the others: less memory, a third more time.
    gradient_checkpointing: bool = False
    # Recompute the old means in the update's own batches, as half precision needs: rounding differs from
    # batch to batch and would look like a change of the policy. null: if the decoder is bfloat16.
    recompute_old: bool | None = None


class MemoryConfig(Section):
    """Use of the device's memory."""

    # idle: text encoder, prior and super-resolution move to the CPU's memory during the update.
    offload: Literal["none", "idle"] = "none"


class EvaluationConfig(Section):
    """Evaluation: paired comparison of tuned and base policy on the validation prompts."""

    every: Annotated[int, Field(ge=0)] = 0  # iterations between evaluations; 0: only before and after
    every_limit: PositiveInt | None = None  # prompts of evaluations during training: the first so many
    # Stage whose images are measured: by default what users will see, whatever `rollout.reward_stage` is.
    stage: ImageStage = "super_resolution"
    images_per_prompt: PositiveInt = 4
    micro_batch: PositiveInt = 32  # images
    in_flight: PositiveInt = 2  # micro-batches that may wait for scores while the next is generated
    score_attempts: PositiveInt = 2  # requests for a micro-batch before the evaluation fails
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of the intervals
    resamples: PositiveInt = 5000  # of the bootstrap
    seed: int = 20_000  # of the images: independent of the training seed
    # Composite that is reported, and that early stopping and search use; null: as objective.weights.
    weights: Weights | None = None
    grid_prompts: PositiveInt = 8
    grid_images: PositiveInt = 4


class LoggingConfig(Section):
    """Trackers that record each iteration, in addition to metrics.jsonl."""

    tensorboard: bool = True  # events in <run>/tensorboard
    wandb: bool = False  # Weights & Biases; needs its package: pip install wandb
    wandb_project: str = "karlo-reward-lab"
    wandb_mode: Literal["online", "offline"] = "online"  # offline: kept in <run>/wandb for `wandb sync`


class CheckpointsConfig(Section):
    """Checkpoints, from which a killed run resumes."""

    every: PositiveInt = 1  # iterations between two checkpoints; a kill loses at most as many
    keep: PositiveInt = 3  # newest checkpoints that are kept, besides the best


class ProcessesConfig(Section):
    """Several processes in one job, as `accelerate launch` and torchrun start them."""

    # Wait for the other processes before the job fails. A process that died is noticed at once; this is for
    # one that hangs, and must exceed the difference in speed of two processes in an iteration.
    timeout_s: PositiveFloat = 1800.0


class AblationConfig(Section):
    """Ablations that remove the training signal, to show that the gain disappears with it."""

    shuffle_rewards: bool = False  # permute the scores over all images of an iteration: the null experiment


class TrainerConfig(Section):
    """Configuration of one run of `reward-trainer train`."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    runs_dir: ConfigPath
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: PositiveInt = 40
    device: str = "cpu"
    threads: PositiveInt | None = None  # of torch on the CPU; null: torch's default
    # Of Karlo's networks. The LoRA, the scheduler's arithmetic, trajectories and log-probabilities are always
    # float32. bfloat16 makes the ratio noisy from the second optimizer step of an iteration on.
    precision: Precision = "float32"
    decoder_precision: Precision | None = None  # of the policy alone; null: as `precision`
    compile: bool = False  # torch.compile the decoder: slow to start, faster after
    memory: MemoryConfig = MemoryConfig()
    service: ServiceConfig = ServiceConfig()
    karlo: ModelSource
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraSettings = LoraSettings()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    guard: GuardConfig = GuardConfig()
    crossval: CrossvalConfig = CrossvalConfig()
    search: SearchConfig = SearchConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    processes: ProcessesConfig = ProcessesConfig()
    ablation: AblationConfig = AblationConfig()

    @property
    def policy_precision(self) -> Precision:
        """Precision of the decoder."""
        return self.decoder_precision or self.precision

    @property
    def composite_weights(self) -> Weights:
        """Weights of the composite that evaluations report."""
        return self.evaluation.weights or self.objective.weights

    @model_validator(mode="after")
    def _check_guard_and_patience(self) -> Self:
        name = self.guard.evaluator
        for section, weights in (
            ("objective", self.objective.weights),
            ("evaluation", self.composite_weights),
        ):
            if name is not None and weights.get(name, 0) > 0:
                raise ValueError(
                    f"guard.evaluator: {name} has a weight in {section}.weights, and a guard must not be "
                    f"trained on; set {section}.weights.{name}=0 or name another guard"
                )
        if self.early_stopping.patience and not self.evaluation.every:
            raise ValueError(
                "early_stopping.patience: needs evaluations during training; set evaluation.every to the "
                "number of iterations between two"
            )
        return self

    @model_validator(mode="after")
    def _check_train_steps(self) -> Self:
        span = self.update.train_steps
        if span is not None and not 0 <= span[0] <= span[1] <= self.sampling.decoder_steps - 2:
            raise ValueError(
                f"update.train_steps: {list(span)} is not a range within "
                f"0..{self.sampling.decoder_steps - 2} (the last denoising step is deterministic)"
            )
        return self


# ------------------------------------------------------------------------------------------- loading


def load_trainer_config(path: Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """Load the `trainer:` section of a file.

    Args:
        path: YAML file; relative paths in it start at its folder and come out absolute.
        overrides: `key.subkey=value` strings.

    Raises:
        ConfigError: The file or an override is invalid.
    """
    return load_section(TrainerConfig, path, "trainer", overrides)


def load_experiment_config(path: Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """Load the `trainer:` section for an experiment: `crossval.settings` apply unless overridden.

    Raises:
        ConfigError: The file or an override is invalid.
    """
    return load_section(TrainerConfig, path, "trainer", overrides, presets="crossval.settings")


def with_values(config: TrainerConfig, values: Mapping[str, Any], where: str = "") -> TrainerConfig:
    """Return the configuration with some settings, by their dotted keys, replaced and validated.

    Raises:
        ConfigError: A value is invalid; the message begins with `where`.
    """
    result = with_changes(config, "trainer", values, where)
    before, after = config.search.storage, result.search.storage
    if before != after or (after is not None and after.password is not None):
        return result
    # `changed` serialises the settings, and serialised addresses have no passwords.
    return result.model_copy(update={"search": result.search.model_copy(update={"storage": before})})


def command_overrides(seed: int | None, set_: list[str] | None, overrides: list[str] | None) -> list[str]:
    """Return the overrides of a command line: `--set`, the trailing arguments, and `--seed`."""
    return [*(set_ or []), *(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
