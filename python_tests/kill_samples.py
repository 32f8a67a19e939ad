"""A short run as a process of its own, or as one of several ranks, started from a process that has
imported all it needs."""

import os
import sys
from pathlib import Path
from typing import Any

import run_samples
import torch
import torch.utils.tensorboard  # slow to import: once, before processes are forked
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import bupo.rl.diagnostics
import bupo.rl.loop
from bupo.run import main

SETTINGS = [
    "steps=30", "bupo.steps=10", "rollout.prompts=2", "rollout.samples=2",
    "rollout.max_new_tokens=5", "optimizer.updates_per_step=2", "data.limit=7",
    "eval.every=0", "eval.limit=2", "checkpoint.every=1", "bupo.auto_stop=0.1",
]  # fmt: skip


def enough(rows: list[dict[str, Any]], layer: int, limit: float) -> str:
    """In place of auto_stop's rule: phase 1 ends with step 6."""
    return "enough" if len(rows) == 7 else ""


def arguments(out: Path, in_background: bool) -> list[str]:
    background = f"checkpoint.in_background={in_background}"
    return run_samples.arguments(out, *SETTINGS, "resume=auto", background)


def run(out: Path, rank: int, world: int, port: int) -> None:
    bupo.rl.diagnostics.stopped_helping = enough
    if world > 1:  # as torchrun starts it
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(n) for name, n in (numbers | {"MASTER_PORT": port}).items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        torch.set_num_threads(1)
    with (out.parent / f"{out.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.exit(main(arguments(out, in_background=world > 1)))
