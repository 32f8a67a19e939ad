"""Computes figures of a step for metrics.jsonl, for rollouts/ and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

import torch

from bupo.types import Grades, Rollout


def rollout_metrics(rollouts: Sequence[Rollout], grades: Grades) -> dict[str, float]:
    """Returns the metrics of rewards and responses."""
    rewards = [r.reward for r in rollouts if not r.ungraded] or [math.nan]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards) if len(rewards) > 1 else math.nan,
        "reward/penalty": fmean(r.penalty for r in rollouts),
        "reward/timeouts": grades.timeouts,
        "reward/errors": grades.errors,
        "reward/ungraded": fmean(r.ungraded for r in rollouts),
        "response/length": fmean(r.count for r in rollouts),
        "response/truncated": fmean(r.finish_reason == "length" for r in rollouts),
    }


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """Returns a rollout as a row of rollouts/step_*.jsonl."""
    advantages = rollout.stream("advantage")
    return {
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "reward": rollout.reward,
        "advantage": float(advantages[0]) if len(advantages) else 0.0,
        "answer": rollout.prompt.answer,
        "finish_reason": rollout.finish_reason,
        "tokens": rollout.count,
    }


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Returns, in MiB, the peak of what the trainer's torch has allocated since the last call, and
    the GPU memory in use now, including that of other libraries (such as a vLLM that sleeps)."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/gpu_peak_mib": peak / 2**20, "memory/gpu_used_mib": (total - free) / 2**20}


def time_line(rows: Sequence[dict[str, Any]]) -> str:
    """Returns one line that shows what share of the time of some steps each stage took."""
    total = sum(row["time/step"] for row in rows)
    stages = {key[5:]: 0.0 for row in rows for key in row if key.startswith("time/")}
    stages.pop("step")
    for row in rows:
        for name in stages:
            stages[name] += row.get(f"time/{name}", 0.0)
    stages["rest"] = total - sum(stages.values())
    shown = sorted(stages.items(), key=lambda item: -item[1])
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in shown if seconds >= total / 200]
    return f"{len(rows)} steps in {total:.0f} s: {', '.join(parts)}"


def bad_steps_at_end(rows: Sequence[dict[str, Any]]) -> int:
    """Returns the number of consecutive steps up to the last one that have skipped an update."""
    good = (n for n, row in enumerate(reversed(rows)) if not row.get("policy/skipped_why"))
    return next(good, len(rows))
