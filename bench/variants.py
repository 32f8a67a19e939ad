"""Variants of the Hopper kernels, built side by side and timed in turns: what a change would bring,
and, by leaving a part out, what that part costs.

Every variant is a copy of the sources with a few lines replaced. Each runs bench_lm_head.py in a
process of its own, at one shape and without peers, and its figures are ratios to the bare products
of that process. Predictions and outcomes: docs/performance.md.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from rows import ROOT, SHAPE, Row, aligned, append, rows_of_program, table

SCAN, TILE = (f"csrc/cuda/sm90/{name}" for name in ("head_scan.cu", "tile_scan.cuh"))
BUILT = ("csrc", "python_tests/emulator", "CMakeLists.txt", "setup.py", "pyproject.toml")
COPIED = (*BUILT, "bench", "bupo", "recipes")
POLICY = "policy_loss fwd+bwd"
FIGURES = {
    "lm_head_logprobs fwd": "x_one_gemm",
    POLICY: "x_three_gemms",
    f"{POLICY}, live 0.25": "x_three_gemms",
}
"""What is timed, and its ratio"""
SECONDS = 60  # a process may take this long
PINGPONG, COOPERATIVE = "sm90_pingpong", "sm90_cooperative"


@dataclasses.dataclass(frozen=True)
class Variant:
    kernels: str = PINGPONG  # as in bupo.ops.set_cuda_kernels
    changes: tuple[tuple[str, str, str], ...] = ()
    """file, what stands there once, what takes its place"""
    right: bool = True  # False: its numbers are wrong on purpose, and only its time says something


def resident(mib: int) -> Variant:
    return Variant(changes=((SCAN, "kResident = 16 << 20;", f"kResident = {mib} << 20;"),))


def without_epilogue(kernels: str) -> Variant:
    """The product alone. A comparison keeps the compiler from dropping sums that nothing uses."""
    call = "scan_tile<kSchedule, kStore, kBias>("
    return Variant(kernels, ((SCAN, call, f"if (sums(0) == 1e30f) {call}"),), right=False)


VARIANTS = {
    "ping-pong": Variant(),
    "cooperative": Variant(COOPERATIVE),
    "8 MiB in L2": resident(8),
    "32 MiB in L2": resident(32),
    "no exponentials": Variant(changes=((TILE, "e = exp2_fast(d);", "e = d;"),), right=False),
    "no epilogue": without_epilogue(PINGPONG),
    "cooperative, no epilogue": without_epilogue(COOPERATIVE),
    "E not stored": Variant(
        changes=((SCAN, "kStore && first < stored, store);", "false, store);"),), right=False
    ),
}
DEFAULT = ["ping-pong", "cooperative", "no epilogue"]


def copy_sources(name: str, folder: Path) -> Path:
    """Makes the variant's own tree and returns it."""
    tree = folder / name.replace(" ", "_")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for item in COPIED:
        if (ROOT / item).is_dir():
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
    """Returns what went wrong, or ""."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"BUPO_CUDA": "ON"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def run(tree: Path, kernels: str, shape: list[int]) -> tuple[list[Row], str]:
    """Returns the rows of one process, and what went wrong, such as a kernel that never ends."""
    command = ["bench/bench_lm_head.py", "--device", "cuda", "--json", "/dev/stdout"]
    command += [f"--{k}={n}" for k, n in zip(SHAPE, shape, strict=True)]
    return rows_of_program([*command, "--kernels", kernels, "--peers"], tree, SECONDS)


def summary(found: dict[str, list[Row]]) -> str:
    """A table with a row for each variant: medians and ranges over its processes, of the ratios of
    FIGURES."""
    cells = []
    for name, rows in found.items():
        cells.append([name])
        for what, over in FIGURES.items():
            ratios = [row[over] for row in rows if row["name"] == what and "ms" in row]
            span = f"({min(ratios):.3f}-{max(ratios):.3f})" if ratios else ""
            cells[-1].append(f"{median(ratios):.3f} {span}" if ratios else "-")
        errors = [row["error_d_weight"] for row in rows if row["name"] == POLICY and "ms" in row]
        error = f"{max(errors):.1e}" if errors else "-"
        cells[-1].append(error if VARIANTS[name].right else "any")
    return table(("variant", *FIGURES, "error dW"), cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=DEFAULT, help=f"default: {DEFAULT}")
    add("--shape", type=int, nargs=3, default=[8192, 4096, 151936], metavar=("N", "D", "V"))
    add("--turns", type=int, default=2, help="processes of each variant; default: %(default)s")
    add("--folder", type=Path, default=ROOT / "build" / "variants", help="default: %(default)s")
    add("--json", type=Path, help="append the rows of every process, with the variant's name")
    args = parser.parse_args()
    trees = {name: copy_sources(name, args.folder.resolve()) for name in args.only}
    with ThreadPoolExecutor(max_workers=4) as pool:
        built = dict(zip(trees, pool.map(build, trees.values()), strict=True))
    for name, wrong in built.items():
        print(f"{name}: {wrong or 'built'}", flush=True)
    found: dict[str, list[Row]] = {name: [] for name, wrong in built.items() if not wrong}
    for turn in range(args.turns):
        for name in found:
            rows, wrong = run(trees[name], VARIANTS[name].kernels, args.shape)
            print(f"  {name}, turn {turn + 1}: {wrong or 'done'}", flush=True)
            found[name] += rows
            append(args.json, {"variant": name}, rows)
    print(aligned(summary(found)))
    return int(any(built.values()))


if __name__ == "__main__":
    sys.exit(main())
