"""`python -m miniature build` and `python -m miniature evaluate`."""

from miniature.cli import main

if __name__ == "__main__":
    main()
