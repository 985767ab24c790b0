"""Entry point of `python -m reward_service`, which equals the command `reward-service`."""

from reward_service.cli import main

if __name__ == "__main__":
    main()
