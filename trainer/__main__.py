"""Entry point of the command `reward-trainer` and of `python -m trainer`."""

from reward_service.runtime.signals import exit_on_signals


def main() -> None:
    """Run the command line; a signal may come while it is imported."""
    exit_on_signals()
    from trainer.cli import main as run

    run()


if __name__ == "__main__":
    main()
