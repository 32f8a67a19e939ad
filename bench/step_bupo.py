"""Some training steps of bupo, for bench_train_step.py: `python bench/step_bupo.py FOLDER SIZE
STEPS THREADS LAYER`. Prints a JSON object per step. It runs what `python -m bupo.run` runs."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from workload import Size, StepMeter

from bupo.commands import training as program
from bupo.rl import loop
from bupo.runlog.run_directory import read_rows

STAGES = ("rollout", "old_logprobs", "update", "sync")


def overrides(folder: Path, size: Size, steps: int, layer: int | None) -> list[str]:
    """The settings of the run that differ from the defaults."""
    return [
        f"model.path={folder}",
        f"data.train=[{folder / 'prompts.jsonl'}]",
        f"steps={steps}",
        "advantage=grpo",
        *([f"bupo.layer={layer}", "algorithm=internal"] if layer else ["algorithm=grpo"]),
        f"rollout.prompts={size.prompts}",
        f"rollout.samples={size.samples}",
        f"rollout.max_new_tokens={size.new_tokens}",
        f"rollout.engine={size.engine}",
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
    load, step_of = program._model_to_train, loop.Run._step
    meters = []

    def loaded(*args: Any) -> Any:
        model = load(*args)
        meters.append(StepMeter())
        return model

    def step(self: loop.Run, number: int) -> None:
        meters[0].begin()
        step_of(self, number)
        meters[0].end()
        row = read_rows(self.out / "metrics.jsonl")[-1]
        stages = {name: row[f"time/{name}"] for name in STAGES}
        tokens = row["response/length"] * size.rollouts
        meters[0].report(stages, tokens, row["policy/grad_norm"])

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
