"""Which policy each step trains (arXiv 2512.19673, J_BuPO): pi^l for s_inter steps, then pi."""

from __future__ import annotations

from bupo.config import Config
from bupo.rl.types import Policy


class Schedule:
    """BuPO's two phases; with algorithm=grpo the first has no steps."""

    def __init__(self, config: Config) -> None:
        self.internal_steps = config.internal_steps
        self._internal = Policy(config.bupo.layer, config.bupo.final_norm)
        self._final = Policy(None)

    def policy(self, step: int) -> Policy:
        """Of step 1, 2, ..."""
        return self._internal if step <= self.internal_steps else self._final

    def switches_after(self, step: int) -> bool:
        """Whether step is the last one of phase 1."""
        return 0 < step == self.internal_steps
