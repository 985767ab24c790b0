"""`reward-trainer` with a fake scorer in the process, run as `python -m tests.support.trainer.job`."""

from contextlib import nullcontext
from unittest import mock

from tests.trainer.conftest import FakeScorer
from trainer.cli.main import main
from trainer.rl.rewards import ServiceScorer

if __name__ == "__main__":
    with mock.patch.object(ServiceScorer, "connect", return_value=nullcontext(FakeScorer())):
        main()
