"""`python -m reward_service`: the same as the command `reward-service`."""

from reward_service.cli import main

if __name__ == "__main__":
    main()
