"""Variants of the Hopper kernels, built side by side and timed in turns: what a change would bring,
and, by leaving a part out, what that part costs.

Every variant is a copy of the sources with a few lines replaced; each runs bench_lm_head.py in a
process of its own, at one shape, without peers. Its figures are ratios to the bare products of its
own process. Predictions and outcomes: docs/performance.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

from rows import Row

ROOT = Path(__file__).resolve().parent.parent
SCAN, TILE = (f"csrc/cuda/sm90/{n}" for n in ("head_scan.cu", "tile_scan.cuh"))
BUILT = ("csrc", "python_tests/emulator", "CMakeLists.txt", "setup.py", "pyproject.toml")
COPIED = (*BUILT, "bench", "bupo", "recipes")
POLICY = "policy_loss fwd+bwd"
FIGURES = {
    "lm_head_logprobs fwd": "x_one_gemm",
    POLICY: "x_three_gemms",
    f"{POLICY}, live 0.25": "x_three_gemms",
}
"""What is timed, and over what"""


SECONDS = 60
"""that a process may take"""


@dataclasses.dataclass(frozen=True)
class Variant:
    kernels: str = "sm90_pingpong"
    """as in bupo.ops.set_cuda_kernels"""
    changes: tuple[tuple[str, str, str], ...] = ()
    """file, what stands there once, what takes its place"""
    right: bool = True
    """False: its numbers are wrong on purpose, only its time says something"""


COOPERATIVE = "sm90_cooperative"


def resident(mib: int) -> Variant:
    return Variant(changes=((SCAN, "kResident = 16 << 20;", f"kResident = {mib} << 20;"),))


def late(steps: int) -> Variant:
    """The second warpgroup begins when so many more steps are loaded than it needs. At its own
    pace it stays behind, and multiplies while the first one reduces."""
    begin = "typename S::Mainloop::PipelineState state;"
    wait = f"""
    if (warpgroup == 2 && unit < units.count()) {{
      auto later = state;
      later.advance(min({steps}, steps - 1));
      pipeline.consumer_wait(later);
    }}"""
    return Variant(COOPERATIVE, ((SCAN, begin, begin + wait),))


def without_epilogue(kernels: str) -> Variant:
    """The product alone; what it would make of the sums must not be known to be unused."""
    call = "scan_tile<kSchedule, kStore, kBias>("
    return Variant(kernels, ((SCAN, call, f"if (sums(0) == 1e30f) {call}"),), right=False)


def stages(count: int) -> Variant:
    old = "kStages = kPingpong ? 5 : 4;"
    return Variant(changes=((SCAN, old, f"kStages = kPingpong ? {count} : 4;"),))


STORE = "kStore && first < stored);"
VARIANTS = {
    "ping-pong": Variant(),
    "cooperative": Variant(COOPERATIVE),
    "cooperative, one step late": late(1),
    "cooperative, two steps late": late(2),
    "4 stages": stages(4),
    "8 MiB in L2": resident(8),
    "32 MiB in L2": resident(32),
    "no exponentials": Variant(
        changes=((TILE, "e = exp2_fast(d);", "e = d;"),),
        right=False,
    ),
    "no epilogue": without_epilogue("sm90_pingpong"),
    "cooperative, no epilogue": without_epilogue(COOPERATIVE),
    "E not stored": Variant(changes=((SCAN, STORE, "false);"),), right=False),
}
DEFAULT = ["ping-pong", "cooperative", "no epilogue"]


def lay_out(name: str, folder: Path) -> Path:
    """The variant's own tree."""
    tree = folder / name.replace(" ", "_")
    for item in COPIED:
        if (ROOT / item).is_dir():
            ignored = shutil.ignore_patterns("_C*.so", "__pycache__", "results")
            shutil.copytree(ROOT / item, tree / item, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / item, tree / item)
    for file, old, new in VARIANTS[name].changes:
        text = (tree / file).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{name}: expected once in {file}, came {text.count(old)} x: {old}")
        (tree / file).write_text(text.replace(old, new))
    return tree


def build(tree: Path) -> str:
    """What went wrong, or nothing."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"BUPO_CUDA": "ON"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def run(tree: Path, kernels: str, shape: list[int], rounds: int) -> tuple[list[Row], str]:
    """The rows of one process, and what went wrong: a kernel that waits for ever, say."""
    file = tree / "rows.jsonl"
    file.unlink(missing_ok=True)
    command = [sys.executable, "bench/bench_lm_head.py", "--device", "cuda", "--json", str(file)]
    command += [f"--{k}={n}" for k, n in zip(("tokens", "width", "vocab"), shape, strict=True)]
    command += [f"--rounds={rounds}", "--kernels", kernels, "--peers"]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return [], f"over {SECONDS} s"
    if not file.exists():
        return [], (done.stdout + done.stderr).strip()[-300:] or f"exit status {done.returncode}"
    return [json.loads(line) for line in file.read_text().splitlines()], ""


def summary(found: dict[str, list[Row]]) -> list[Row]:
    """A row for each variant: medians over its processes, of the ratios of FIGURES."""
    rows = []
    for name, measured in found.items():
        timed = [r for r in measured if "ms" in r]
        row: Row = {"name": name, "right": VARIANTS[name].right}
        for figure, ratio in FIGURES.items():
            values = [r[ratio] for r in timed if r["name"] == figure]
            row[figure] = median(values) if values else None
            row[f"{figure}, range"] = [min(values), max(values)] if values else None
        errors = [r["error_d_weight"] for r in timed if r["name"] == POLICY]
        rows.append(row | {"error_d_weight": max(errors, default=None)})
    return rows


def print_rows(rows: list[Row]) -> None:
    print(f"| {'':28} | " + " | ".join(f"{figure:>30}" for figure in FIGURES) + " | error dW |")
    for row in rows:
        cells = []
        for figure in FIGURES:
            low, high = row[f"{figure}, range"] or (None, None)
            text = "-" if low is None else f"{row[figure]:.3f} ({low:.3f}-{high:.3f})"
            cells.append(f"{text:>30}")
        error = row["error_d_weight"]
        cells.append("     any" if not row["right"] else "-" if error is None else f"{error:8.1e}")
        print(f"| {row['name']:28} | " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=DEFAULT, help=f"default: {DEFAULT}")
    add("--shape", type=int, nargs=3, default=[8192, 4096, 151936], metavar=("N", "D", "V"))
    add("--turns", type=int, default=2, help="processes of each variant; default: %(default)s")
    add("--rounds", type=int, default=5, help="of a process; default: %(default)s")
    add("--jobs", type=int, default=4, help="builds at a time; default: %(default)s")
    add("--folder", type=Path, default=ROOT / "build" / "variants")
    add("--build_only", action="store_true")
    add("--json", type=Path, help="append the rows of every process, with the variant's name")
    args = parser.parse_args()
    trees = {name: lay_out(name, args.folder.resolve()) for name in args.only}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        built = dict(zip(trees, pool.map(build, trees.values()), strict=True))
    for name, wrong in built.items():
        print(f"{name}: {wrong or 'built'}", flush=True)
    found: dict[str, list[Row]] = {name: [] for name, wrong in built.items() if not wrong}
    for turn in range(0 if args.build_only else args.turns):
        for name in found:
            rows, wrong = run(trees[name], VARIANTS[name].kernels, args.shape, args.rounds)
            print(f"  {name}, turn {turn + 1}: {wrong or 'done'}", flush=True)
            found[name] += rows
            if args.json:
                with args.json.open("a") as out:
                    out.writelines(json.dumps({"variant": name} | row) + "\n" for row in rows)
    if not args.build_only:
        print_rows(summary(found))
    return int(any(built.values()))


if __name__ == "__main__":
    sys.exit(main())
