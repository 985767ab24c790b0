"""`python -m tests.support.trainer.job` is `reward-trainer` with a reward service inside."""

from contextlib import nullcontext
from unittest import mock

from tests.trainer.conftest import FakeScorer
from trainer.cli.main import main
from trainer.rl.rewards import ServiceScorer

if __name__ == "__main__":
    with mock.patch.object(ServiceScorer, "connect", return_value=nullcontext(FakeScorer())):
        main()
