"""Small runs of the real program, for the tests of the loop: seconds each, nothing replaced."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from bupo.run import main
from bupo.tasks import arithmetic

calls = 0
stop_at = 0


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Rewards that vary within a group even for a bad model; asks for a stop at call `stop_at`."""
    global calls
    calls += 1
    if calls == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return [
        len(set(r)) / 10 + r0 for r, r0 in zip(responses, arithmetic.reward(responses, answers))
    ]


def often_flat(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Like reward, but the same for all responses to about half of the prompts."""
    values = reward(responses, answers)
    return [0.5 if int(answer) % 2 else value for value, answer in zip(values, answers)]


def arguments(out: Path, *overrides: str) -> list[str]:
    """Six steps, the first three on layer 1 of 2."""
    return [
        f"out={out}",
        "reward.function=run_samples:reward",
        "task_options={layers: 2, width: 32, warm_steps: 4, eval_problems: 4}",
        "steps=6",
        "bupo.steps=3",
        "bupo.layer=1",
        "rollout.prompts=4",
        "data.limit=6",  # so that epochs end within steps 2 and 5 and after steps 3 and 6
        "rollout.samples=4",
        "rollout.max_new_tokens=12",
        "optimizer.lr=1e-3",
        "optimizer.weight_decay=0.1",
        "eval.samples=2",
        "eval.pass_k=[1,2]",
        "eval.every=2",
        "checkpoint.every=2",
        "diagnostics.every=2",
        *overrides,
    ]


def run(out: Path, *overrides: str, stop: int = 0) -> int:
    """Runs in this process; with `stop`, SIGTERM comes while that batch of rewards is computed."""
    global calls, stop_at
    calls, stop_at = 0, stop
    return main(arguments(out, *overrides))


def rows(file: Path) -> list[dict[str, object]]:
    """Lines of a JSON lines file without what may differ between equal runs: times and memory."""
    volatile = ("time/", "tokens_per_second", "memory/", "ranks/")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(volatile)} for line in lines]


def state(out: Path) -> dict[str, object]:
    """Header and bytes of each file of tensors of the newest checkpoint."""
    newest, found = sorted((out / "checkpoints").iterdir())[-1], {}
    for file in sorted(newest.rglob("*.safetensors")):
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])  # the order of its metadata is random
        found[str(file.relative_to(newest))] = header, content[end:]
    return found


def assert_same_run(a: Path, b: Path) -> None:
    """Parameter for parameter, metric for metric, token for token."""
    assert rows(a / "metrics.jsonl") == rows(b / "metrics.jsonl")
    assert rows(a / "eval.jsonl") == rows(b / "eval.jsonl")
    assert rows(a / "diagnostics.jsonl") == rows(b / "diagnostics.jsonl")
    assert state(a) == state(b)
    names = sorted(p.name for p in (a / "rollouts").iterdir())
    assert names == sorted(p.name for p in (b / "rollouts").iterdir())
    for name in names:
        assert (a / "rollouts" / name).read_bytes() == (b / "rollouts" / name).read_bytes(), name
