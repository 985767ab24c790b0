"""The `trainer:` section of a configuration file: every number a run depends on, with unit and range.

Addresses of databases, without their passwords: configurations are written to files and into messages.

A password is parted from its address as soon as that is read, and is known to this process only.

What sections of the configuration are made of, and those of an experiment.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from reward_service.settings import ConfigError, ConfigPath, Settings, changed, load_section

# As SQLAlchemy reads an address: a password reaches to the last @ before the host.
_PASSWORD = re.compile(r"^(?P<before>[\w+]+://[^:/?]*):(?P<password>.*)(?=@)")
_QUERY = re.compile(r"(?P<before>[?&])password=(?P<password>[^&]*)&?")
_OLD_SCHEMES = re.compile(r"^postgres(ql)?(?=://)")

_passwords: dict[str, str] = {}


def without_password(address: str) -> str:
    """The address without its password, which `password_of` tells from now on."""
    address = _OLD_SCHEMES.sub("postgresql+psycopg", address)
    for pattern in (_PASSWORD, _QUERY):
        found = pattern.search(address)
        if found is not None:
            address = (address[: found.start()] + found["before"] + address[found.end() :]).rstrip("?&")
            _passwords[address] = found["password"]
    return address


def password_of(address: str) -> str | None:
    """As it was written, percent signs included; None where there was none."""
    return _passwords.get(address)


Fraction = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, lt=1)]
Weights = dict[str, Annotated[float, Field(ge=0)]]  # of evaluators


class Section(Settings):
    """Base of what is below. Numbers are finite: checkpoints keep them as JSON, which knows no other."""

    model_config = ConfigDict(allow_inf_nan=False)


class EarlyStoppingConfig(Section):
    """Ends a fold whose validation composite rises no more, and takes its best checkpoint for its result."""

    patience: Annotated[int, Field(ge=0)] = 0  # evaluations without improvement that are borne; 0: off
    # What counts as improvement: standard errors of the paired difference from the best evaluation before.
    min_delta: Annotated[float, Field(ge=0)] = 0.5


class GuardConfig(Section):
    """An evaluator that is not trained on: where it falls while the composite rises, rewards are hacked."""

    # Its weight in objective.weights and evaluation.weights must be 0. rotate: each fold holds out another
    # one of those that have a weight.
    evaluator: str | None = None
    confidence: Proportion = 0.95  # that an honest run is not stopped, over all its evaluations together
    stop: bool = True  # end the run when it trips; false: only say so


class CrossvalConfig(Section):
    """Folds, each trained from the base; then one fit on all of them, and one look at the test prompts."""

    folds: Annotated[int, Field(ge=2)] = 5
    # What `crossval` and `search` set differently from `train`, such as evaluation.every: 10.
    settings: dict[str, Any] = Field(default_factory=dict)
    workers: PositiveInt = 1  # folds that are trained side by side, each a process


class SpaceConfig(Section):
    """Values of one setting that a search draws from: `choices`, or numbers from `low` to `high`.

    What is drawn may be taken `times` another setting, or be divided by it (`over`).
    """

    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False  # evenly in the logarithm
    integer: bool = False
    times: str | None = None  # a setting: the value is what is drawn, times that setting's value
    over: str | None = None  # a setting: the value is what is drawn, divided by that setting's value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        ends = (self.low, self.high)
        if (self.choices is None) == (ends == (None, None)) or not (self.choices is None or self.choices):
            raise ValueError("give either choices, or low and high")
        if self.choices is None and (self.low is None or self.high is None or not self.low < self.high):
            raise ValueError("low and high: both are needed, and low must be below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log: low must be above 0")
        if self.integer and (self.choices or any(end is not None and end % 1 for end in ends)):
            raise ValueError("integer: low and high must be whole numbers; choices are what they are")
        if self.times is not None and self.over is not None:
            raise ValueError("give times or over, not both")
        return self


class SearchConfig(Section):
    """Search (Optuna) over settings, on the first fold's training and validation prompts."""

    trials: PositiveInt = 20  # drawn from the space; the null trial comes on top
    iterations: PositiveInt | None = None  # of a trial; null: as `iterations`
    workers: PositiveInt = 1  # trials that are trained side by side, each a process
    # Keys are settings below lora, rollout, objective and update, such as objective.weights.clip.
    space: dict[str, SpaceConfig] = Field(default_factory=dict)
    sampler: Literal["random", "tpe", "qmc"] = "random"
    # Ends a trial whose best evaluation so far is worse than the others' at that iteration (median), or whose
    # newest is not among the best `reduction`-th of theirs (halving). Evaluations: evaluation.every, at least
    # three in a trial.
    pruner: Literal["none", "median", "halving"] = "median"
    warmup_trials: Annotated[int, Field(ge=0)] = 2  # median: trials that must be complete first
    warmup_iterations: Annotated[int, Field(ge=0)] = 0  # of each trial, in which it is not pruned
    reduction: Annotated[int, Field(ge=2)] = 3  # halving: one in so many goes on
    # An SQLAlchemy address such as postgresql+psycopg://me@host/database; null: SQLite in the experiment's
    # folder. A password in it is used and written nowhere; PGPASSWORD and ~/.pgpass are heeded too.
    storage: Annotated[str, AfterValidator(without_password)] | None = None
    study: str | None = None  # its name in the storage; null: the experiment's
    null_trial: bool = True  # also try what does nothing, as number 0: what the procedure sees in no change


__all__ = ["ConfigError", "ModelSource", "TrainerConfig", "load_trainer_config"]

# Who gets the same random numbers: no other image, the images of a group, or all images of a prompt in a run.
Share = Literal["image", "group", "prompt"]

Precision = Literal["float32", "bfloat16"]

# After which stage images are looked at: the decoder's own (64 px with Karlo) or the final ones (256 px).
ImageStage = Literal["decoder", "super_resolution"]

Scale = Annotated[float, Field(ge=1)]  # guidance scale; 1 means no guidance

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name for it

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


class ModelSource(Section):
    """Where a model comes from: a folder, or a hub repository at a revision."""

    path: ConfigPath | None = None
    repo: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path, or repo (and revision)")
        return self


class ServiceConfig(Section):
    """How to reach the scoring service."""

    url: str = "http://127.0.0.1:8000"
    api_key_file: ConfigPath | None = None  # one line: the bearer key
    client_id: str = "trainer"
    timeout_s: PositiveFloat = 120.0  # of one request
    retry_budget_s: Annotated[float, Field(ge=0)] = (
        60.0  # spent on repeating one request that may succeed later
    )
    # Ask for scores that are the same to the bit whoever else is being scored, or was before: a run on the
    # CPU is then the same whatever befalls the service. Each image is a forward pass of its own.
    deterministic: bool = False
    ready_timeout_s: PositiveFloat = 10.0  # how long the service may take to answer before training starts


class PromptsConfig(Section):
    """Files of prompts: text (one a line), .csv or .jsonl (prompt, and where there are any user and cluster).

    A prompt, its near-duplicates and the other prompts of its user are one group. Groups are never parted.
    """

    train: ConfigPath
    validation: ConfigPath | None = None  # null: `validation_share` of the training prompts' groups
    test: ConfigPath | None = None  # of an experiment; null: `test_share` of the groups
    train_limit: PositiveInt | None = None  # use the first so many
    validation_limit: PositiveInt | None = None
    test_limit: PositiveInt | None = None
    validation_share: Proportion = 0.2
    test_share: Proportion = 0.2
    # Prompts are near-duplicates from this similarity on: Jaccard's, of their words and pairs of words.
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.77


class SamplingConfig(Section):
    """How an image is drawn, in training and in evaluation alike."""

    prior_steps: Annotated[int, Field(ge=2)] = 25
    prior_guidance: Scale = 4.0
    decoder_steps: Annotated[int, Field(ge=4)] = 25
    decoder_guidance: Scale = 8.0
    super_res_steps: Annotated[int, Field(ge=2)] = 7
    micro_batch: PositiveInt = 8  # images in one forward pass of the decoder (twice that with guidance)


class LoraSettings(Section):
    """The adapter. `targets` are names of the decoder's modules, or endings of them."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 8.0  # the adapter's output is scaled by alpha / rank
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = (
        0.9  # 0: what is evaluated and shipped is the last update
    )


class Sharing(Section):
    """Common random numbers: with whom the random numbers that the policy does not decide on are shared.

    What a group shares cannot make one of its images better than another, so it is no noise in the advantage.
    """

    prior: Share = "group"  # the image embedding; "prompt" draws it once in a run
    decoder_start: Share = "group"  # the initial noise and that of denoising step 0
    super_res: Share = "group"


class RolloutConfig(Section):
    """What one iteration collects."""

    prompts_per_iteration: PositiveInt = 8
    images_per_prompt: Annotated[int, Field(ge=2)] = 8
    share: Sharing = Sharing()
    # Before training, draw a few groups with and without sharing and write to sharing.json what share of the
    # within-prompt variance it removes; `reward-trainer variance` does the same at any time.
    measure_sharing: bool = False
    # What is rewarded. "decoder" leaves super-resolution out of training, more than half of Karlo's work;
    # `reward-trainer stages` says how far scores before and after it order images alike.
    reward_stage: ImageStage = "super_resolution"
    in_flight: PositiveInt = 2  # micro-batches that may wait for their scores while the next is drawn
    # Images. The last micro-batch is cut in halves, the last of them as small as this: then little is left
    # to score when all are drawn. null: it is not cut.
    smallest_batch: PositiveInt | None = None
    score_attempts: PositiveInt = 2  # times a micro-batch is sent before its groups are dropped
    max_dropped: Fraction = 0.05  # share of groups that may be lost before the run stops


class ObjectiveConfig(Section):
    """Advantages and the trust region."""

    weights: Weights  # per evaluator; what is not named is not trained on
    advantage_clip: PositiveFloat = 5.0
    deviation_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of the pooled within-group variance
    trust_region: Literal["kl", "clip"] = "kl"
    max_nats: PositiveFloat = (
        0.5  # kl: largest KL of a transition; clip: largest |log ratio|, nats per transition
    )
    # Loss per nat of KL(policy || base) per transition. Above 0, each replay costs a forward pass more.
    kl_to_base: Annotated[float, Field(ge=0)] = 0.0
    # frozen: ratio and KL use the sampling policy's sigma, so that shrinking the noise cannot win.
    variance: Literal["frozen", "learned"] = "frozen"

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("weights: at least one evaluator needs a weight above 0")
        return self


class UpdateConfig(Section):
    """The optimizer's part of an iteration."""

    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, over `iterations`
    learning_rate_floor: Fraction = 0.0  # what the schedule falls to, as a share of learning_rate
    # AdamW's: an update shrinks the LoRA by learning_rate × weight_decay
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    steps_per_image: PositiveInt = (
        2  # denoising steps of each image that are trained, stratified over the range
    )
    train_steps: tuple[int, int] | None = (
        None  # first and last denoising step; null: all that are worth training
    )
    micro_batch: PositiveInt = 32  # transitions in one backward pass
    accumulate: PositiveInt = 1  # micro-batches in one optimizer step
    max_grad_norm: PositiveFloat = 1.0
    guidance_gradient: Literal["both", "conditional"] = "both"  # branches that carry gradient
    # Keep few of the decoder's activations and compute the others again: less memory, a third more time.
    gradient_checkpointing: bool = False
    # Take the old means from a replay in the update's own batches, as half precision needs: otherwise
    # rounding, which differs from batch to batch, passes for a change of the policy. null: where the decoder
    # is bfloat16.
    recompute_old: bool | None = None


class MemoryConfig(Section):
    """What lies on the device."""

    # idle: text encoder, prior and super-resolution wait in the CPU's memory while the update runs.
    offload: Literal["none", "idle"] = "none"


class EvaluationConfig(Section):
    """The paired comparison with the base on the validation prompts."""

    every: Annotated[int, Field(ge=0)] = 0  # iterations between evaluations in training; 0: before and after
    every_limit: PositiveInt | None = None  # validation prompts of those in between: the first so many
    # What is measured: by default what a user will see, whatever `rollout.reward_stage` is.
    stage: ImageStage = "super_resolution"
    images_per_prompt: PositiveInt = 4
    micro_batch: PositiveInt = 32
    in_flight: PositiveInt = 2  # micro-batches that may wait for their scores while the next is drawn
    score_attempts: PositiveInt = 2  # times a micro-batch is sent before the evaluation fails
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: PositiveInt = 5000
    seed: int = 20_000  # of the images: fixed, whatever the training seed
    # The composite that is reported, stopped and searched by; null: as objective.weights.
    weights: Weights | None = None
    grid_prompts: PositiveInt = 8
    grid_images: PositiveInt = 4


class LoggingConfig(Section):
    """Who hears of every iteration beside metrics.jsonl."""

    tensorboard: bool = True  # events in <run>/tensorboard
    wandb: bool = False  # Weights & Biases; needs its package: pip install wandb
    wandb_project: str = "karlo-reward-lab"
    wandb_mode: Literal["online", "offline"] = "online"  # offline: kept in <run>/wandb for `wandb sync`


class CheckpointsConfig(Section):
    """What a killed run goes on from."""

    every: PositiveInt = 1  # iterations between two checkpoints; a kill loses at most as many
    keep: PositiveInt = 3  # the newest so many stay, and the best


class ProcessesConfig(Section):
    """Several processes in one job, as `accelerate launch` and torchrun start them."""

    # How long a process waits for the others before it gives up. One that died is noticed at once; this is
    # for one that hangs, and must exceed the time by which one may be slower than another in an iteration.
    timeout_s: PositiveFloat = 1800.0


class AblationConfig(Section):
    """Switches that take the learning out, to show that the gain goes with it."""

    shuffle_rewards: bool = False  # permute the scores over all images of an iteration: the null experiment


class TrainerConfig(Section):
    """One run of `reward-trainer train`."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    runs_dir: ConfigPath
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: PositiveInt = 40
    device: str = "cpu"
    threads: PositiveInt | None = None  # of torch on the CPU; null leaves torch's choice
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
        """Of the decoder."""
        return self.decoder_precision or self.precision

    @property
    def reward_evaluators(self) -> Weights:
        """Weights of the composite that is reported."""
        return self.evaluation.weights or self.objective.weights

    @model_validator(mode="after")
    def _guard_is_not_trained_on(self) -> Self:
        name = self.guard.evaluator
        for section, weights in (
            ("objective", self.objective.weights),
            ("evaluation", self.reward_evaluators),
        ):
            if name is not None and weights.get(name, 0) > 0:
                raise ValueError(
                    f"guard.evaluator: {name} has a weight in {section}.weights, and a guard must not be "
                    f"trained on; set {section}.weights.{name}=0 or name another guard"
                )
        if self.early_stopping.patience and not self.evaluation.every:
            raise ValueError(
                "early_stopping.patience: needs evaluations on the way; set evaluation.every to the "
                "iterations between two"
            )
        return self

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        span = self.update.train_steps
        if span is not None and not 0 <= span[0] <= span[1] <= self.sampling.decoder_steps - 2:
            raise ValueError(
                f"update.train_steps: {list(span)} is no range within 0..{self.sampling.decoder_steps - 2} "
                "(the last denoising step is deterministic)"
            )
        return self


def load_trainer_config(path: Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """The `trainer:` section of `path`, with overrides; paths come out absolute. Raises ConfigError."""
    return load_section(TrainerConfig, path, "trainer", overrides)


def load_experiment_config(path: Path, overrides: Sequence[str] = ()) -> TrainerConfig:
    """The same for an experiment: what `crossval.settings` says holds where no override says otherwise."""
    return load_section(TrainerConfig, path, "trainer", overrides, presets="crossval.settings")


def with_values(config: TrainerConfig, values: Mapping[str, Any], where: str = "") -> TrainerConfig:
    """The configuration with some settings by their dotted keys, checked. Raises ConfigError."""
    return changed(config, "trainer", values, where)


def given(seed: int | None, set_: list[str] | None, overrides: list[str] | None) -> list[str]:
    """The overrides that a command line asks for."""
    return [*(set_ or []), *(overrides or []), *([] if seed is None else [f"seed={seed}"])]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
