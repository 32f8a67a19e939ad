"""Runs some cases one after the other, on the ranks that torchrun has started or in one process:
`python rank_cases.py FOLDER CASE ... KEY=VALUE ...`"""

import sys
from pathlib import Path

import run_samples

from bupo import ranks

CASES = {
    "bupo": ["algorithm=bupo"],
    "ppo": ["algorithm=ppo"],
    "reinforce_pp": [
        "algorithm=reinforce_pp", "loss.kl_coef=0.01", "loss.kl_estimator=k1_reward",
    ],
    "gspo": ["loss.type=gspo", "loss.kl_coef=0.01", "loss.kl_estimator=k3"],
    "dynamic": ["reward.function=run_samples:often_flat", "rollout.refills=2"],
    "one_update": ["optimizer.updates_per_step=1", "loss.type=cispo"],
    "adapters": ["lora.rank=4"],
    "checkpointing": ["model.gradient_checkpointing=true", "bupo.auto_stop=1.0"],
    "bfloat16": ["model.parameter_dtype=bfloat16", "model.compute_dtype=bfloat16"],
}  # fmt: skip


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    settings = [one for one in given if "=" in one]
    with ranks.joined(minutes=5):
        for name in given[: len(given) - len(settings)]:
            if status := run_samples.run(Path(folder) / name, *CASES[name], *settings):
                sys.exit(status)
