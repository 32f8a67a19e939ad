"""The phases of a run: which policy each step trains, and at which learning rates.

J_BuPO (arXiv 2512.19673) has two phases: pi^l for s_inter steps, then pi.
"""

from __future__ import annotations

import math

from bupo.config import Config, ConfigError, PhaseConfig
from bupo.types import Policy, Rates


def _phases(config: Config) -> list[tuple[str, PhaseConfig]]:
    """Returns the phases of a configuration, each with the key under which its layer is set."""
    layer, steps = config.bupo.layer, config.bupo.steps
    if config.policy == "custom":
        return [(f"phases[{n}]", phase) for n, phase in enumerate(config.phases)]
    internal = config.policy == "internal" or (config.policy == "bupo" and steps)
    if internal and layer is None:
        raise ConfigError(
            "bupo.layer is not set: name the layer whose policy phase 1 trains (counted from 1; "
            "the paper: 6 for Qwen3, the last but one for Llamas), or measure it with "
            "bupo.auto_layer=0.1"
        )
    if config.policy == "internal":
        return [("bupo", PhaseConfig(layer=layer))]
    final = ("", PhaseConfig())
    if config.policy == "bupo" and steps:
        return [("bupo", PhaseConfig(layer=layer, steps=steps)), final]
    return [final]


def _rates(phase: PhaseConfig) -> Rates:
    others = phase.lr.get("others", 1.0)
    return Rates(
        embedding=phase.lr.get("embedding", others),
        head=phase.lr.get("head", others),
        layers=tuple(phase.lr_of_layers().values()),
        others=others,
    )


def _named(part: str) -> str:
    return part if part.isalpha() else f"layer{'s' * ('-' in part)} {part}"


class Schedule:
    """The phases of a run, which follow one another over its steps."""

    def __init__(self, config: Config) -> None:
        self._phases = _phases(config)
        self._may_stop = config.bupo.auto_stop is not None
        self._policies: list[Policy] = []
        self._last: list[int] = []
        for _, phase in self._phases:
            first = self._last[-1] if self._last else 0
            self._last.append(config.steps if phase.steps is None else first + phase.steps)
            norm = phase.layer is not None and config.bupo.final_norm
            self._policies.append(Policy(phase.layer, norm, _rates(phase)))

    def policy(self, step: int) -> Policy:
        """Returns the policy of step 1, 2, ..."""
        return next(p for p, last in zip(self._policies, self._last) if step <= last)

    def begins_with(self, step: int) -> bool:
        """Whether a step is the first one of its phase."""
        return step == 1 or step - 1 in self.switches()

    def switches(self) -> list[int]:
        """Returns the last step of each phase except the last phase."""
        return self._last[:-1]

    def switches_after(self, step: int) -> bool:
        """Whether another phase begins after a step."""
        return step in self.switches()

    def end_phase(self, step: int) -> None:
        """Ends the phase of a step with this step. The next phases begin earlier by the steps
        saved; all but the last one keep their lengths."""
        phase = next(n for n, last in enumerate(self._last) if step <= last)
        gained = self._last[phase] - step
        self._last[phase:-1] = [last - gained for last in self._last[phase:-1]]

    def layers(self) -> list[int]:
        """Returns the layers of the internal policies of the run, lowest first."""
        return sorted({p.layer for p in self._policies if p.layer is not None})

    def check(
        self,
        depth: int,
        model: str,
        tied: bool = False,
        lora: bool = False,
        several: bool = False,
    ) -> None:
        """Raises ConfigError for settings that do not fit a model of `depth` layers, whose head may
        be tied to the embedding, and for a phase that would train nothing. lora: whether adapters
        in the layers are trained, and nothing else. several: whether there are several ranks, which
        cannot train the head alone: FSDP adds up its gradient when that of the layers is there."""
        for (key, phase), policy in zip(self._phases, self._policies):
            if phase.layer is not None and phase.layer > depth:
                raise ConfigError(
                    f"{key}.layer={phase.layer} is out of range: {model} has layers 1..{depth}"
                )
            for name, (first, last, _) in phase.lr_of_layers().items():
                if max(first, last if last < math.inf else 0) > depth:
                    raise ConfigError(
                        f"{key}.lr.{name} is out of range: {model} has layers 1..{depth}"
                    )
            if tied and "head" in phase.lr:
                raise ConfigError(
                    f"{key}.lr.head: the head of {model} is its embedding; set {key}.lr.embedding"
                )
            for part in ("embedding", "head"):
                if lora and part in phase.lr:
                    raise ConfigError(
                        f"{key}.lr.{part}: lora.rank trains adapters in the layers and nothing else"
                    )
            places: list[int | None] = [*range((policy.layer or depth + 1) + 1)]
            places = places[1:] if lora else [*places, *([] if tied or several else [None])]
            if not any(policy.rates.factor(place) for place in places):
                of = "the final policy" if policy.layer is None else f"pi^{policy.layer}"
                but = " but the head, which several ranks cannot train alone" if several else ""
                raise ConfigError(f"{key}.lr freezes all of {of}{but}")

    def describe(self, depth: int) -> str:
        """Returns the phases in words, for the terminal."""
        parts: list[str] = []
        for (_, phase), policy, last in zip(self._phases, self._policies, self._last):
            changed = [f"{_named(key)} x{factor:g}" for key, factor in phase.lr.items()]
            where = f" (learning rate of {', '.join(changed)})" if changed else ""
            if len(self._policies) == 1:
                whose = "the final policy" if policy.layer is None else f"layer {policy.layer}"
                of = "" if policy.layer is None else f" of {depth}"
                return f"{whose}{of} for {last} steps{where}"
            if policy.layer is None:
                parts.append(f"the final policy{where} to step {last}")
            elif not parts:
                fewer = " (fewer if bupo.auto_stop ends them early)" if self._may_stop else ""
                parts.append(f"steps 1-{last}{fewer} train layer {policy.layer} of {depth}{where}")
            else:
                parts.append(f"layer {policy.layer}{where} to step {last}")
        return ", then ".join(parts)
