"""The report of finished or running runs.

    python -m bupo.rl.report RUN_DIR                     one run; writes into RUN_DIR
    python -m bupo.rl.report RUN_DIR RUN_DIR2 [--out D]  overlaid; into D (RUN_DIR/comparison)

A pure function of metrics.jsonl, eval.jsonl, diagnostics.jsonl, config.yaml and
rollouts/step_*.jsonl: same files, same bytes.
"""

import argparse
from pathlib import Path

from bupo.rl.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description="Report of a training run, or several overlaid.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="where to write the page and its plots")
    args = parser.parse_args()
    try:
        print(write_report(*args.run_dirs, out_dir=args.out))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
