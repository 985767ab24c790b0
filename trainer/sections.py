"""What sections of the configuration are made of, and those of an experiment."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, model_validator

from reward_service.settings import Settings
from trainer.addresses import without_password

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
