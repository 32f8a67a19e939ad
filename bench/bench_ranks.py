"""What several ranks cost on a CPU, against one process with the same cores; and the memory of a
rank on GPUs, as the plan computes it. Protocol: bench/README.md.

    python bench/bench_ranks.py --json bench/results/ranks_cpu.jsonl
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import step_bupo
import torch
import transformers
import workload
from measure import environment
from real_models import HEADS, LLAMA, MODELS, QWEN3
from rows import ROOT, Row, append, bar, print_run
from workload import Size

from bupo import config
from bupo.commands import sizes
from bupo.runlog.run_directory import read_rows

STAGES = ("rollout", "old_logprobs", "update", "step")
BAR = 1.15
"""The most that the updates of two ranks may take of those of one process"""
LARGE = HEADS | {"num_attention_heads": 64, "tie_word_embeddings": False}
PLANNED = {name: MODELS[name] for name in ("Qwen3-4B", "Qwen3-8B")} | {
    "Qwen3-32B": (
        "qwen3",
        QWEN3 | LARGE | {"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25600},
    ),
    "Llama-3.3-70B": (
        "llama",
        LLAMA | LARGE | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672},
    ),
}
PLAN = (
    *("model.compute_dtype=bfloat16", "model.gradient_checkpointing=true", "algorithm=grpo"),
    *("rollout.engine=vllm", "rollout.max_new_tokens=8192", "rollout.prompts=128"),
    "optimizer.micro_batch_tokens=16384",
)
PROMPT = 1024  # tokens
WORLDS = (1, 8, 64)


def seconds(
    size: Size, folder: Path, world: int, parts: int, threads: int, steps: int
) -> list[Row]:
    """The seconds of each stage, step by step, without the first one."""
    (folder / "config.yaml").write_text("name: bench\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    program = [*(launcher if world > 1 else []), "-m", "bupo.run"]
    with tempfile.TemporaryDirectory() as out:
        settings = step_bupo.overrides(folder, size, steps + 1, None)
        settings = [*settings, f"model.shard_ranks={parts}"]
        given = ["--config", str(folder / "config.yaml"), "--out", f"{out}/run", *settings]
        variables = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "bench")}
        done = subprocess.run(
            [sys.executable, *program, *given],
            env=os.environ | variables | {"OMP_WAIT_POLICY": "PASSIVE"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        found = read_rows(Path(out) / "run/metrics.jsonl")[1:]
    return [{stage: row[f"time/{stage}"] for stage in STAGES} for row in found]


def time_rows(args: argparse.Namespace, size: Size) -> list[Row]:
    """One process with all threads, and as many ranks as threads, with a copy of the model each and
    with their part of it, in turns."""
    several = args.threads
    cases = ((1, 1, several), (several, 1, 1), (several, several, 1))
    found: dict[tuple[int, int], list[Row]] = {(world, parts): [] for world, parts, _ in cases}
    with tempfile.TemporaryDirectory() as folder:
        workload.write(size, Path(folder))
        for _ in range(args.rounds):
            for world, parts, threads in cases:
                taken = seconds(size, Path(folder), world, parts, threads, args.steps)
                found[world, parts] += taken
    rows: list[Row] = [
        {"ranks": world, "parts": parts}
        | {stage: median(x[stage] for x in steps) for stage in STAGES}
        for (world, parts), steps in found.items()
    ]
    for row in rows:
        row |= {f"x_one_{stage}": row[stage] / rows[0][stage] for stage in STAGES}
    return rows


def memory_rows() -> list[Row]:
    """GiB of an update on the device of a rank, by the place of the optimizer and the ranks."""
    rows: list[Row] = []
    for name, (family, fields) in PLANNED.items():
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoConfig.for_model(family, **fields).save_pretrained(folder)
            row: Row = {"planned": name}
            for place in ("device", "host"):
                given = [
                    *PLAN,
                    f"optimizer.place={place}",
                    f"model.path={folder}",
                    "data.train=[x]",
                ]
                loaded = config.load(None, given)
                for world in WORLDS:
                    found = sizes.measure(loaded, folder, PROMPT, gpu=True, world=world)
                    row[f"{place}_{world}"] = sum(found.memory.values()) / 2**30
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    for name in ("layers", "width", "vocab", "samples", "new_tokens"):
        add(f"--{name}", type=int, default=getattr(Size, name))
    add("--threads", type=int, default=2, help="of one process; the number of ranks")
    add("--rounds", type=int, default=2, help="runs of each side")
    add("--steps", type=int, default=6, help="timed steps of a run, after one that is not")
    add("--json", type=Path, help="append a line per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(
        layers=args.layers,
        width=args.width,
        vocab=args.vocab,
        samples=args.samples,
        new_tokens=args.new_tokens,
    )
    run = environment("cpu", args.threads) | dataclasses.asdict(size)
    run["prompt_tokens"] = list(size.prompt_tokens)
    del run["model"], run["engine"]
    print_run(run)
    rows = time_rows(args, size)
    for row in rows:
        print(", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(bar("x_one_update of ranks with copies", rows[1]["x_one_update"], BAR), flush=True)
    rows += memory_rows()
    append(args.json, run, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
