"""``python -m qgnn``: the command line, as ``torchrun -m qgnn`` starts it."""

from .cli import main

if __name__ == "__main__":
    main()
