"""`python -m bupo.analyze`: internal policies of a model. bupo/commands/analysing.py does it."""

import sys

from bupo.commands.analysing import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
