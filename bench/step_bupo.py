"""Some training steps of bupo, for bench_train_step.py: `python bench/step_bupo.py FOLDER SIZE
STEPS THREADS LAYER`. Prints a JSON object a step. The run is that of `python -m bupo.run`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from resident import PeakMemory
from workload import Size

from bupo import run as program
from bupo.rl import loop
from bupo.runlog.run_directory import read_rows

STAGES = ("rollout", "old_logprobs", "update", "sync")


def overrides(folder: Path, size: Size, steps: int, layer: int | None) -> list[str]:
    """The run's configuration, over the defaults."""
    return [
        f"model.path={folder}",
        f"data.train=[{folder / 'prompts.jsonl'}]",
        f"steps={steps}",
        "advantage=grpo",
        *([f"bupo.layer={layer}", "algorithm=internal"] if layer else ["algorithm=grpo"]),
        f"rollout.prompts={size.prompts}",
        f"rollout.samples={size.samples}",
        f"rollout.max_new_tokens={size.new_tokens}",
        "reward.function=workload:reward",
        "loss.aggregation=seq_mean",
        f"optimizer.lr={size.lr}",
        "optimizer.weight_decay=0",
        f"optimizer.updates_per_step={size.updates}",
        f"optimizer.micro_batch_tokens={size.micro_tokens}",
        "diagnostics.every=0",  # TRL has none
    ]


def main(folder: Path, size: Size, steps: int, threads: int, layer: int | None) -> None:
    torch.set_num_threads(threads)
    memory = PeakMemory()
    load, step_of = program._model_to_train, loop.Run._step

    def loaded(*args: Any) -> Any:
        model = load(*args)
        memory.start()
        return model

    def step(self: loop.Run, number: int) -> None:
        memory.reset()
        began, cpu = time.perf_counter(), time.process_time()
        step_of(self, number)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        row = read_rows(self.out / "metrics.jsonl")[-1]
        stages = {name: row[f"time/{name}"] for name in STAGES}
        found = {
            "step": seconds,
            "cpu_seconds": cpu,
            **stages,
            "rest": seconds - sum(stages.values()),
            "peak_mib": memory.peak(),
            "tokens": row["response/length"] * size.rollouts,
            "grad_norm": row["policy/grad_norm"],
        }
        print(json.dumps(found), flush=True)

    program._model_to_train, loop.Run._step = loaded, step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as out:
        config = Path(out) / "config.yaml"
        config.write_text("name: bench\n")
        arguments = ["--config", str(config), "--out", f"{out}/run"]
        status = program.main([*arguments, *overrides(folder, size, steps, layer)])
    sys.exit(status)


if __name__ == "__main__":
    folder, size, steps, threads, layer = sys.argv[1:]
    main(Path(folder), Size.read(size), int(steps), int(threads), int(layer) or None)
