"""`python -m llavakd` is `llava-kd`."""

from llavakd.cli import main

if __name__ == "__main__":
    main()
