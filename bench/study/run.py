"""Runs the cells of an edition of the study, each with each of its seeds, several at once. A run
whose result is there is not made again, and one that was stopped is continued.

    python bench/study/run.py arithmetic --jobs 2
    python bench/tables.py                            writes the tables of docs/study.md
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from measure import environment
from rows import RESULTS, ROOT, Row, append, read
from study.cells import EDITIONS
from study.table import last

from bupo.runlog.run_directory import read_rows

CURVES = ("reward/mean", "policy/entropy", "final/entropy", "response/length", "time/step")
"""The figures of each step that are kept"""
EVALUATION = ("step", "when", "dataset", "n", "avg", "avg_se", "length")
"""Those of each evaluation, beside Pass@k"""


def results_of(edition: str) -> Path:
    return RESULTS / f"study_{edition}.jsonl"


def result(out: Path) -> Row:
    """What is kept of a run."""
    steps = read_rows(out / "metrics.jsonl")
    evals = [
        {k: v for k, v in row.items() if k in EVALUATION or re.fullmatch(r"pass@\d+", k)}
        for row in read_rows(out / "eval.jsonl")
    ]
    curves = {key: [round(row[key], 5) for row in steps] for key in CURVES}
    return {"evals": evals, "curves": curves}


def command(edition: str, cell: str, seed: int, out: Path) -> list[str]:
    """The arguments of Python that make a run or continue it."""
    plan = EDITIONS[edition]
    settings = [text.replace("{seed}", str(seed)) for text in (*plan.common, *plan.cells[cell])]
    recipe = str(ROOT / "recipes" / plan.recipe)
    program = ["-m", "bupo.run", "--config", recipe, f"out={out}", "resume=auto"]
    return [*program, *settings]


def run(edition: str, cell: str, seed: int, folder: Path, threads: int) -> Row:
    """Makes one run. Raises SystemExit with the end of its output if it fails."""
    out = folder / f"{re.sub('[^A-Za-z0-9+-]+', '_', cell)}_seed_{seed}"
    done = subprocess.run(
        [sys.executable, *command(edition, cell, seed, out)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{cell}, seed {seed}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"edition": edition, "cell": cell, "seed": seed, **result(out)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("edition", choices=list(EDITIONS))
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=1, help="of each run")
    add("--out", type=Path, default=ROOT / "runs/study", help="the folder of the runs")
    add("--results", type=Path, help="default: bench/results/study_EDITION.jsonl")
    args = parser.parse_args()
    plan, file = EDITIONS[args.edition], args.results or results_of(args.edition)
    there = {(row["cell"], row["seed"]) for row in (read(file) if file.exists() else [])}
    # All cells of a seed before the next seed, so that what there is can be compared.
    wanted = [(cell, seed) for seed in plan.seeds for cell in plan.cells]
    missing = [pair for pair in wanted if pair not in there]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done", flush=True)
    machine = environment("cpu", args.threads)

    def one(pair: tuple[str, int]) -> Any:
        row = run(args.edition, *pair, args.out / args.edition, args.threads)
        append(file, machine, [row])
        print(f"{pair[0]}, seed {pair[1]}: Avg {last(row):.3f}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
