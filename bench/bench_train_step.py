"""A training step of bupo and of TRL's GRPOTrainer: seconds by stage and peak memory, on a CPU.

Both train the same random model on the same prompts, with as many rollouts, tokens, optimiser
updates and rollouts a micro-batch, in float32, and generate by transformers. Each runs in a process
of its own; the processes take turns, so that a slow moment of the machine falls on all of them.
Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median
from typing import Any

import workload
from measure import environment
from rows import Row
from workload import Size

HERE = Path(__file__).parent
STAGES = ("rollout", "old_logprobs", "update", "sync", "rest")
OURS, PEER = "bupo", "TRL GRPOTrainer"
BARS = (("without_rollout", 1.5), ("step", 1.0), ("peak_mib", 1.0))
"""Of a figure: TRL's over ours, at least"""


@dataclasses.dataclass
class Side:
    """One program that trains, and the figures of its steps."""

    name: str
    command: list[str]
    path: str = ""
    """put in front of PYTHONPATH"""
    layer: int | None = None
    """the internal policy that it trains"""
    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)
    failed: str = ""

    def run(self, threads: int, warm_up: int) -> None:
        """Once; its first steps are not counted."""
        path = [p for p in (self.path, str(HERE.parent), os.environ.get("PYTHONPATH", "")) if p]
        variables = {
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, *self.command],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        lines = [x for x in done.stdout.splitlines() if x.startswith('{"step": ')]
        if done.returncode != 0 or len(lines) <= warm_up:
            errors = [x for x in done.stderr.splitlines() if x.strip()]
            self.failed = errors[-1][:200] if errors else f"exit status {done.returncode}"
            return
        self.steps += [json.loads(line) for line in lines[warm_up:]]

    def row(self) -> Row:
        """Medians over the steps."""
        row: Row = {"name": self.name, "layer": self.layer}
        if self.failed:
            return row | {"failed": self.failed}
        row |= {key: median(step[key] for step in self.steps) for key in self.steps[0]}
        row["without_rollout"] = median(s["step"] - s["rollout"] for s in self.steps)
        row["step_range"] = [f(s["step"] for s in self.steps) for f in (min, max)]
        return row


def sides(size: Size, folder: Path, args: argparse.Namespace) -> list[Side]:
    quarter, steps = max(1, size.layers // 4), args.warm_up + args.steps

    def command(script: str, last: str) -> list[str]:
        shared = (str(folder), size.text(), str(steps), str(args.threads))
        return [str(HERE / script), *shared, last]

    return [
        Side(OURS, command("step_bupo.py", "0")),
        Side(PEER, command("step_trl.py", args.trl_settings), args.trl_path),
        Side(f"{OURS}, phase 1", command("step_bupo.py", str(quarter)), layer=quarter),
    ]


def add_ratios(rows: Sequence[Row]) -> None:
    """x_bupo_FIGURE: over that of the full step of bupo. CPU seconds differ less than the others
    from run to run on a machine that others use as well."""
    full = next(row for row in rows if row["name"] == OURS)
    if "failed" in full:
        return
    for row in rows:
        if "failed" not in row:
            keys = (*(key for key, _ in BARS), "cpu_seconds")
            row |= {f"x_bupo_{key}": row[key] / full[key] for key in keys}


def print_table(rows: Sequence[Row]) -> None:
    def line(name: str, cells: Iterable[str]) -> None:
        print(f"| {name:<16} | " + " | ".join(f"{cell:>12}" for cell in cells) + " |")

    line("seconds", (*STAGES, "step", "but rollout", "CPU seconds", "peak MiB"))
    for row in rows:
        if "failed" in row:
            continue
        keys = (*STAGES, "step", "without_rollout", "cpu_seconds")
        line(row["name"], (*(f"{row[key]:.2f}" for key in keys), f"{row['peak_mib']:.0f}"))
    for row in rows:
        if "failed" in row:
            print(f"no time: {row['name']}: {row['failed']}")


def bars(rows: Sequence[Row]) -> list[str]:
    peer = next(row for row in rows if row["name"] == PEER)
    if "failed" in peer or "x_bupo_step" not in peer:
        return []
    found = []
    for key, limit in BARS:
        value = peer[f"x_bupo_{key}"]
        verdict = "met" if value >= limit else "NOT MET"
        found.append(f"{verdict:>7}: {key}, TRL / bupo = {value:.2f}, bar >= {limit:g}")
    return found


def check_work(rows: Sequence[Row], size: Size) -> None:
    """That both have sampled and trained on as many tokens as they were asked for."""
    for row in rows:
        if "failed" not in row and row["tokens"] != size.rollouts * size.new_tokens:
            row["failed"] = f"{row['tokens']:.0f} tokens, not {size.rollouts * size.new_tokens}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Size):
        if isinstance(field.default, int | float):
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    low, high = Size.prompt_tokens
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=[low, high])
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl_path", default="", help="folder that TRL is installed in, if apart")
    parser.add_argument("--trl_settings", default="{}", help="JSON: more fields of GRPOConfig")
    parser.add_argument("--json", type=Path, help="append a line per side")
    return parser.parse_args()


def versions(trl_path: str) -> dict[str, str]:
    """Of transformers, and of TRL if it is installed."""
    path = [trl_path, *sys.path] if trl_path else sys.path
    trl = [found.version for found in distributions(name="trl", path=path)]
    return {"transformers": version("transformers"), "trl": trl[0] if trl else "none"}


def main() -> int:
    """Exit status 1 if a side of ours failed."""
    args = parse()
    sizes = {field.name: getattr(args, field.name) for field in dataclasses.fields(Size)}
    size = Size(**sizes | {"prompt_tokens": tuple(args.prompt_tokens)})
    run: dict[str, Any] = environment("cpu", args.threads) | versions(args.trl_path)
    run |= dataclasses.asdict(size) | {"trl_settings": args.trl_settings}
    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(size, folder)
        found = sides(size, folder, args)
        for _ in range(args.rounds):
            for side in found:
                if not side.failed:
                    side.run(args.threads, args.warm_up)
    rows = [side.row() for side in found]
    check_work(rows, size)
    add_ratios(rows)
    print_table(rows)
    print("\n".join(bars(rows)))
    if args.json:
        with args.json.open("a") as out:
            out.writelines(json.dumps(run | row) + "\n" for row in rows)
    return int(any("failed" in row for row in rows if row["name"] != PEER))


if __name__ == "__main__":
    sys.exit(main())
