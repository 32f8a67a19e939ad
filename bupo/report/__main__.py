"""Writes the report of one or several runs, finished or still running.

python -m bupo.report RUN_DIR                     one run; writes into RUN_DIR
python -m bupo.report RUN_DIR RUN_DIR2 [--out D]  overlaid; writes into D (RUN_DIR/comparison)
"""

import argparse
import sys
from pathlib import Path

from bupo.report import write_report

FILES = ("metrics.jsonl", "eval.jsonl")


def main() -> int:
    """Writes the report. Returns the exit status: 0 when done, 2 for a folder that has no run or
    cannot be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m bupo.report",
        description="Writes the report of a training run, or of several overlaid.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="where to write the page and its figures")
    args = parser.parse_args()
    try:
        for run in args.run_dirs:
            if run.is_dir() and not any((run / name).is_file() for name in FILES):
                raise FileNotFoundError(f"{run} holds no run: it has neither {' nor '.join(FILES)}")
        print(write_report(*args.run_dirs, out_dir=args.out))
    except OSError as error:
        print(f"bupo.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
