"""Which trials are not worth finishing, by what they and the others have reported."""

from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial

from trainer.sections import SearchConfig


def make_pruner(config: SearchConfig) -> BasePruner:
    """The configured one. The null trial reports nothing, and is one more complete trial to wait for."""
    if config.pruner == "none":
        return NopPruner()
    if config.pruner == "halving":
        return Halving(config.reduction)
    return MedianPruner(config.warmup_trials + config.null_trial)


class Halving(BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) as a function of the reports.

    At evaluations 1, r, r², ... a trial goes on if it is among the best r-th of those that came as far;
    while they are fewer than r, if it is the best of them. Optuna's own keeps marks in the trial: a kill
    between a mark and a checkpoint would let a trial go on that was to end.
    """

    def __init__(self, reduction: int) -> None:
        self._reduction = reduction

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to end after its last report."""
        step = trial.last_step
        if step is None or not _is_power(len(trial.intermediate_values), self._reduction):
            return False
        others = study.get_trials(deepcopy=False)
        values = [it.intermediate_values[step] for it in others if step in it.intermediate_values]
        promoted = max(1, len(values) // self._reduction)
        return trial.intermediate_values[step] < sorted(values)[-promoted]


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
