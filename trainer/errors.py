"""What can go wrong for a user of the learner. Every message is one line with the cause and the remedy.

ConfigError (reward_service.settings)   the configuration, a path or an argument
RunError                                a run cannot go on
├── RolloutError                            too few scores come back
├── EvaluationError                         the comparison cannot be finished
└── DemoError                               the demo's own service does not start
"""


class RunError(Exception):
    """A run cannot go on."""


class RolloutError(RunError):
    """Too few scores come back."""


class EvaluationError(RunError):
    """The comparison with the base cannot be finished."""


class DemoError(RunError):
    """The demo's own scoring service does not start."""
