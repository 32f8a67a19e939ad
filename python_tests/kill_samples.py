"""A short run as a process of its own, started from a process that has imported all it needs."""

import os
import sys
from pathlib import Path

import run_samples
import torch.utils.tensorboard  # noqa: F401  # slow to import: once, before processes are forked
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import bupo.rl.loop  # noqa: F401
from bupo.run import main

SETTINGS = [
    "steps=30", "bupo.steps=10", "rollout.prompts=2", "rollout.samples=2",
    "rollout.max_new_tokens=5", "optimizer.updates_per_step=2", "data.limit=7",
    "eval.every=0", "eval.limit=2", "checkpoint.every=1",
]  # fmt: skip


def arguments(out: Path) -> list[str]:
    return run_samples.arguments(out, *SETTINGS, "resume=auto")


def run(out: Path) -> None:
    with (out.parent / f"{out.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.exit(main(arguments(out)))
