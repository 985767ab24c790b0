"""`python -m trainer` is `reward-trainer`."""

from trainer.cli import main

if __name__ == "__main__":
    main()
