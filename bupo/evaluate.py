"""`python -m bupo.evaluate`: Avg@n and Pass@K of a model. bupo/commands/scoring.py does it."""

import sys

from bupo.commands.scoring import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
