"""Which policy each step trains, and at which rates: the phases of a run.

J_BuPO (arXiv 2512.19673) is two of them: pi^l for s_inter steps, then pi.
"""

from __future__ import annotations

from bupo.config import Config, ConfigError, PhaseConfig
from bupo.rl.types import Policy, Rates


def _phases(config: Config) -> list[tuple[str, PhaseConfig]]:
    """The phases of a configuration, each with the key that its layer comes from."""
    layer, steps = config.bupo.layer, config.bupo.steps
    if config.algorithm == "custom":
        return [(f"phases[{n}]", phase) for n, phase in enumerate(config.phases)]
    if config.algorithm == "internal":
        return [("bupo", PhaseConfig(layer=layer))]
    final = ("", PhaseConfig())
    if config.algorithm == "bupo" and steps:
        return [("bupo", PhaseConfig(layer=layer, steps=steps)), final]
    return [final]


class Schedule:
    """Phases, one after the other, over the steps of a run."""

    def __init__(self, config: Config) -> None:
        self._phases = _phases(config)
        self._may_stop = config.bupo.auto_stop is not None
        self._policies: list[Policy] = []
        self._last: list[int] = []
        for _, phase in self._phases:
            first = self._last[-1] if self._last else 0
            self._last.append(config.steps if phase.steps is None else first + phase.steps)
            norm = phase.layer is not None and config.bupo.final_norm
            rates = Rates(phase.boundary, phase.lr_below, phase.lr_above)
            self._policies.append(Policy(phase.layer, norm, rates))

    def policy(self, step: int) -> Policy:
        """Of step 1, 2, ..."""
        return next(p for p, last in zip(self._policies, self._last) if step <= last)

    def switches_after(self, step: int) -> bool:
        """Whether another phase begins after a step."""
        return step in self._last[:-1]

    def end_phase(self, step: int) -> None:
        """The phase of a step ends with it; the next one begins that much earlier and, the last
        one aside, is as long as it was."""
        phase = next(n for n, last in enumerate(self._last) if step <= last)
        gained = self._last[phase] - step
        self._last[phase:-1] = [last - gained for last in self._last[phase:-1]]

    def layers(self) -> list[int]:
        """The internal policies of the run, lowest first."""
        return sorted({p.layer for p in self._policies if p.layer is not None})

    def check(self, depth: int, model: str) -> None:
        """Raises ConfigError for a layer that a model of this many layers has not."""
        for key, phase in self._phases:
            for name in ("layer", "boundary"):
                value = getattr(phase, name)
                if value is not None and value > depth:
                    raise ConfigError(
                        f"{key}.{name}={value} is out of range: {model} has layers 1..{depth}"
                    )

    def describe(self, depth: int) -> str:
        """In words, for people."""
        parts: list[str] = []
        for policy, last in zip(self._policies, self._last):
            rates, where = policy.rates, ""
            if rates.boundary is not None:
                sides = (("to", rates.below), ("above", rates.above))
                changed = [f"{side} layer {rates.boundary} x{f:g}" for side, f in sides if f != 1]
                where = f" ({', '.join(changed)})" if changed else ""
            if len(self._policies) == 1:
                whose = "the final policy" if policy.layer is None else f"layer {policy.layer}"
                of = "" if policy.layer is None else f" of {depth}"
                return f"{whose}{of} for {last} steps{where}"
            if policy.layer is None:
                parts.append(f"the final policy{where} to step {last}")
            elif not parts:
                fewer = " (fewer where bupo.auto_stop says so)" if self._may_stop else ""
                parts.append(f"steps 1-{last}{fewer} train layer {policy.layer} of {depth}{where}")
            else:
                parts.append(f"layer {policy.layer}{where} to step {last}")
        return ", then ".join(parts)
