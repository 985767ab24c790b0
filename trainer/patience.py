"""When a fold has stopped getting better: early stopping in standard errors."""

from typing import Any

import numpy as np

from trainer.intervals import Floats, Groups, standard_error


class EarlyStopping:
    """Bears `patience` evaluations without improvement and stops at the last of them; remembers the best.

    An evaluation is an improvement where the mean over prompts of its composite, less the one of the last
    improvement, exceeds `min_delta` standard errors of that paired difference, and 0. The reference is the
    last improvement and not the evaluation before, so that small steps in one direction add up. The first
    evaluation heard is the first reference: the base's own, for a policy that never beats it to stop too.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        """Raises ValueError for a patience below 1 or a min_delta below 0."""
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience {patience} must be 1 or more, and min_delta {min_delta} 0 or more")
        self.patience = patience
        self.min_delta = min_delta
        self.best: tuple[int, float] | None = None  # iterations done, composite: the highest mean heard
        self.waited = 0  # evaluations in a row without improvement
        self._reference: Floats | None = None  # (P,)

    def heed(self, done: int, by_prompt: Floats, groups: Groups = None) -> bool:
        """Whether to stop, having heard the composite (P,) of each prompt after `done` iterations.

        `groups` (P,) tells which prompts belong together. Prompts must be the same at each evaluation. Raises
        ValueError for a number that is not finite.
        """
        now = np.asarray(by_prompt, dtype=np.float64)
        if self._improves(now, groups):
            self._reference, self.waited = now.copy(), 0
        else:
            self.waited += 1
        if self.best is None or now.mean() > self.best[1]:
            self.best = (done, float(now.mean()))
        return self.waited >= self.patience

    def _improves(self, now: Floats, groups: Groups) -> bool:
        if not len(now) or not np.isfinite(now).all():
            raise ValueError("a composite is missing or not finite")
        if self._reference is None:
            return True
        gain = now - self._reference
        error = standard_error(gain, groups)
        # Of a single group no error is known, and the plain difference has to do.
        needed = self.min_delta * error if np.isfinite(error) else 0.0
        return bool(gain.mean() > needed)

    @property
    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        return {
            "best": self.best,
            "waited": self.waited,
            "reference": None if self._reference is None else self._reference.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where that state was taken."""
        best, reference = state["best"], state["reference"]
        self.best = None if best is None else (int(best[0]), float(best[1]))
        self.waited = int(state["waited"])
        self._reference = None if reference is None else np.asarray(reference, dtype=np.float64)
