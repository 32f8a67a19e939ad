"""A training step of bupo, and of TRL's GRPOTrainer with its own fused head and with bupo.ops in
its place: seconds by stage and peak memory, on a CPU.

All train the same model on the same prompts, with the same numbers of rollouts, tokens, optimiser
updates and rollouts per micro-batch, in float32, and generate by transformers or by vLLM. Each runs
in a process of its own; the processes take turns, so that a slow moment of the machine affects all.
Protocol: bench/README.md.

    python bench/bench_train_step.py --model FOLDER         (real_models.py makes a real one)
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median

import workload
from measure import environment
from rows import Row, aligned, append, bar, print_run, rows_of_program
from tables import train_step_table
from workload import Size

HERE = Path(__file__).parent
STAGES = ("rollout", "old_logprobs", "update", "sync", "rest")
OURS, PEER = "bupo", "TRL GRPOTrainer"
WITH_OPS = f"{PEER} with bupo.ops"
BARS = (("without_rollout", 2.0), ("step", 1 / 0.6), ("peak_mib", 2.0))
"""A figure, and the least that TRL's over ours has to be."""
PHASE_1 = 0.5
"""The most that phase 1 may take of a full step, without the rollout"""
NUMBERS = {n: x for n, x in vars(Size()).items() if isinstance(x, int | float)}
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""What bupo sets, for both sides"""


@dataclasses.dataclass
class Side:
    """One program that trains, and the figures of its steps."""

    name: str
    arguments: list[str]
    path: str = ""  # of packages that this side alone imports
    layer: int | None = None  # the internal policy that it trains
    steps: list[Row] = dataclasses.field(default_factory=list)
    failed: str = ""

    def run(self, threads: int, warm_up: int) -> None:
        """Runs the program once. Its first steps are not counted."""
        variables = VLLM | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        found, self.failed = rows_of_program(
            self.arguments, path=self.path, HF_HUB_OFFLINE="1", **variables
        )
        if not self.failed and len(found) <= warm_up:
            self.failed = f"it made {len(found)} steps, of which {warm_up} are the warm-up"
        self.steps += found[warm_up:]

    def row(self) -> Row:
        """Medians over the steps."""
        row: Row = {"name": self.name, "layer": self.layer}
        if self.failed:
            return row | {"failed": self.failed}
        row |= {key: median(step[key] for step in self.steps) for key in self.steps[0]}
        row["without_rollout"] = median(step["step"] - step["rollout"] for step in self.steps)
        return row


def sides(size: Size, folder: Path, args: argparse.Namespace) -> list[Side]:
    quarter, steps = max(1, size.layers // 4), args.warm_up + args.steps

    def program(script: str, last: str) -> list[str]:
        return [str(HERE / script), str(folder), size.text(), str(steps), str(args.threads), last]

    return [
        Side(OURS, program("step_bupo.py", "0")),
        Side(PEER, program("step_trl.py", args.trl_settings), args.trl_path),
        Side(WITH_OPS, [*program("step_trl.py", args.trl_settings), "bupo.ops"], args.trl_path),
        Side(f"{OURS}, phase 1", program("step_bupo.py", str(quarter)), layer=quarter),
    ]


def add_ratios(rows: Sequence[Row]) -> None:
    """x_bupo_FIGURE is over that of the full step of bupo. On a machine that is used for other work
    as well, CPU seconds vary the least from run to run."""
    full = next(row for row in rows if row["name"] == OURS)
    for row in rows:
        if "failed" not in row and "failed" not in full:
            keys = (*(key for key, _ in BARS), "cpu_seconds")
            row |= {f"x_bupo_{key}": row[key] / full[key] for key in keys}


def bars(rows: Sequence[Row]) -> list[str]:
    peer = next(row for row in rows if row["name"] == PEER)
    lines = [
        bar(f"{key}, TRL / bupo", peer.get(f"x_bupo_{key}"), limit, least=True)
        for key, limit in BARS
    ]
    if "x_bupo_step" in peer:
        for row in rows:
            if row["name"] == WITH_OPS and "failed" not in row:
                for key in ("update", "peak_mib"):
                    lines.append(f"{key}, {WITH_OPS} / {PEER}: {row[key] / peer[key]:.2f}")
    for row in rows:
        if row["layer"]:
            name = f"without_rollout, {row['name']} / bupo"
            lines.append(bar(name, row.get("x_bupo_without_rollout"), PHASE_1))
    return lines


def check_work(rows: Sequence[Row], size: Size) -> None:
    """A side that has not trained on the number of tokens that it was asked for gets no time."""
    expected = size.rollouts * size.new_tokens
    for row in rows:
        if "failed" not in row and row["tokens"] != expected:
            row["failed"] = f"{row['tokens']:.0f} tokens, not {expected}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    for name, default in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default)
    add("--prompt_tokens", type=int, nargs=2, default=Size.prompt_tokens)
    add("--model", type=Path, help="the folder of a SmolLM2 that is measured as well")
    add("--engines", nargs="+", default=["hf", "vllm"], choices=["hf", "vllm"])
    add("--rounds", type=int, default=2, help="processes of each side")
    add("--steps", type=int, default=2, help="timed steps of a process")
    add("--warm_up", type=int, default=1, help="steps before them")
    add("--threads", type=int, default=2)
    add("--trl_path", default="", help="the folder that TRL is installed in, if apart")
    add("--trl_settings", default="{}", help="JSON: more fields of GRPOConfig")
    add("--json", type=Path, help="append a line per side")
    return parser.parse_args()


def main() -> int:
    """Exit status 1 if a side of ours failed."""
    args = parse()
    sizes = {name: getattr(args, name) for name in NUMBERS}
    size = Size(**sizes, prompt_tokens=tuple(args.prompt_tokens))
    path = [args.trl_path, *sys.path] if args.trl_path else sys.path
    trl = [found.version for found in distributions(name="trl", path=path)]
    run = environment("cpu", args.threads)
    run |= {"transformers": version("transformers"), "trl": trl[0] if trl else "none"}
    run |= {"trl_settings": args.trl_settings}
    print_run(run)
    failed = False
    for model in [None, args.model] if args.model else [None]:
        for engine in args.engines:
            with tempfile.TemporaryDirectory() as folder:
                case = dataclasses.replace(size, engine=engine)
                rows = measure(case, model, Path(folder), args)
            print(aligned(train_step_table([run | row for row in rows])))
            print("\n".join(bars(rows)), flush=True)
            append(args.json, run, rows)
            failed |= any("failed" in row for row in rows if PEER not in row["name"])
    return int(failed)


def measure(size: Size, model: Path | None, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Measures all sides on the random model, or on a real one."""
    if model is None:
        workload.write(size, folder)
    else:
        size = workload.write_real(model, size, folder)
    found = sides(size, folder, args)
    for _ in range(args.rounds):
        for side in found:
            if not side.failed:
                side.run(args.threads, args.warm_up)
    rows = [side.row() for side in found]
    check_work(rows, size)
    add_ratios(rows)
    return [dataclasses.asdict(size) | row for row in rows]


if __name__ == "__main__":
    sys.exit(main())
