"""`python -m bupo.run`: train a model. bupo/commands/training.py does it."""

import sys

from bupo.commands.training import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
