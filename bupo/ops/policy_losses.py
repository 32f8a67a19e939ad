"""The losses of policy_loss by name: their options, defaults and checks.

The formulas are in csrc/policy_math.h and, in torch, in reference.py; docs/ops.md has the table
with sources and other projects' names. A new loss takes a line here, a case there, and a row in
docs/ops.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bupo.ops import operands

OP = "bupo.ops.policy_loss"

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
"""In the order of RatioLevel in csrc/policy_math.h, as all names here"""
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
_LARGEST = sys.float_info.max


class _Kind(NamedTuple):
    """One loss type."""

    number: int
    """in LossType"""
    options: dict[str, float]
    """the default of each option, in the order of PolicySettings::options"""
    levels: tuple[str, ...] = ("token",)
    """possible ratio levels, the default first"""


_PPO = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": math.inf}
_KINDS = {
    "ppo": _Kind(0, _PPO, RATIO_LEVELS),
    "cispo": _Kind(1, {"ratio_min": 0.0, "ratio_max": 5.0}, RATIO_LEVELS),
    "reinforce": _Kind(1, {}),  # cispo with the ratio 1
    "sapo": _Kind(2, {"temperature_positive": 1.0, "temperature_negative": 1.05}, RATIO_LEVELS),
    "dppo_tv": _Kind(3, {"divergence_low": 0.2, "divergence_high": 0.2, "ratio_max": 20.0}),
    "dppo_kl": _Kind(4, {"divergence_low": 0.05, "divergence_high": 0.05, "ratio_max": 20.0}),
    "dro": _Kind(5, {"beta": 1.0}),
    "gmpo": _Kind(6, {"log_clip_low": 0.4, "log_clip_high": 0.4}, ("sequence", "sequence_sum")),
    "vespo": _Kind(
        7,
        {"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0},
        ("sequence_sum", "sequence"),
    ),
}
LOSS_TYPES = tuple(_KINDS)
_POSITIVE = ("temperature_positive", "temperature_negative", "beta")


class Settings(NamedTuple):
    """What policy_loss does with log-probs, checked."""

    loss_type: str
    options: dict[str, float]
    ratio_level: str
    max_log_ratio: float
    kl_coef: float
    kl_estimator: str
    kl_straight_through: bool
    kl_times_ratio: bool
    max_kl: float
    entropy_coef: float

    def numbers(self) -> list[float]:
        """Returns PolicySettings of csrc/policy_math.h, in the order of its fields."""
        options = [*self.options.values()]
        if self.loss_type == "reinforce":
            options = [0.0, math.inf]
        return [
            float(_KINDS[self.loss_type].number),
            float(RATIO_LEVELS.index(self.ratio_level)),
            *options,
            *[0.0] * (4 - len(options)),
            self.max_log_ratio,
            self.kl_coef,
            float(KL_ESTIMATORS.index(self.kl_estimator)),
            float(self.kl_straight_through),
            float(self.kl_times_ratio),
            self.max_kl,
            self.entropy_coef,
        ]


def settings(
    *,
    loss_type: str = "ppo",
    loss_options: Mapping[str, float] | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_level: str | None = None,
    max_log_ratio: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_times_ratio: bool = False,
    max_kl: float | None = None,
    entropy_coef: float = 0.0,
) -> Settings:
    """Checks the settings of policy_loss. Raises TypeError and ValueError, naming the argument."""
    if loss_type not in _KINDS:
        raise ValueError(
            f"{OP}: loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}; "
            "docs/ops.md lists the names that other projects use"
        )
    kind = _KINDS[loss_type]
    if not isinstance(kl_times_ratio, bool):
        raise TypeError(
            f"{OP}: kl_times_ratio must be a bool, got {operands.describe(kl_times_ratio)}"
        )
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    estimator = kl_estimator.removesuffix("+") if isinstance(kl_estimator, str) else kl_estimator
    names = (*KL_ESTIMATORS, "k1+", "k3+", "abs+")
    _one_of("kl_estimator", kl_estimator, names)
    level = kind.levels[0] if ratio_level is None else ratio_level
    if level not in kind.levels:
        raise ValueError(
            f"{OP}: ratio_level must be one of {', '.join(kind.levels)} for loss_type "
            f"{loss_type!r}, got {ratio_level!r}"
        )
    return Settings(
        loss_type,
        _options(loss_type, loss_options, {k: x for k, x in clips.items() if x is not None}),
        level,
        _limit("max_log_ratio", max_log_ratio),
        _number("kl_coef", kl_coef, -_LARGEST, "finite", _LARGEST),
        estimator,
        kl_estimator.endswith("+"),
        kl_times_ratio,
        _limit("max_kl", max_kl),
        _number("entropy_coef", entropy_coef, -_LARGEST, "finite", _LARGEST),
    )


def _options(
    loss_type: str, given: Mapping[str, float] | None, clips: dict[str, float]
) -> dict[str, float]:
    defaults = _KINDS[loss_type].options
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"{OP}: loss_options must be a mapping from names to numbers, got "
            f"{operands.describe(given)}"
        )
    takes = f"{loss_type!r} takes " + (
        "clip_low, clip_high and dual_clip, and no loss_options"
        if loss_type == "ppo"
        else f"loss_options {', '.join(defaults) or 'none'}"
    )
    if clips and loss_type != "ppo":
        name = next(iter(clips))
        raise ValueError(f"{OP}: {name} belongs to loss_type 'ppo', got {clips[name]} for {takes}")
    if wrong := [name for name in given or {} if name not in defaults or loss_type == "ppo"]:
        raise ValueError(f"{OP}: loss_options has an unknown name {wrong[0]!r}; {takes}")
    return {name: _option(name, x) for name, x in (defaults | dict(given or {}) | clips).items()}


def _option(name: str, x: float) -> float:
    if name == "dual_clip":
        return _number(name, x, 1, "at least 1 or None")
    if name in _POSITIVE:
        return _number(name, x, sys.float_info.min, "positive and finite", _LARGEST)
    return _number(name, x, 0, "at least 0 (inf: no bound)")


def _limit(name: str, x: float | None) -> float:
    return math.inf if x is None else _number(name, x, 0, "at least 0 or None")


def _number(name: str, x: float, low: float, why: str, high: float = math.inf) -> float:
    x = operands.number(OP, name, x)
    if not (low <= x <= high):
        raise ValueError(f"{OP}: {name} must be {why}, got {x}")
    return x


def _one_of(name: str, x: str, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise ValueError(f"{OP}: {name} must be one of {', '.join(choices)}, got {x!r}")


def sequence_ids_of(level: str, sequence_ids: Tensor | None, targets: Tensor) -> Tensor | None:
    """Returns the sequence of each token, int64 [N] and ascending, or None at the level of tokens.
    By default, each row of targets [..., T] is a sequence. Raises TypeError and ValueError."""
    if level == "token":
        if sequence_ids is not None:
            raise ValueError(
                f"{OP}: sequence_ids play no part with ratio_level 'token', pass None or another "
                f"ratio_level, got {operands.describe(sequence_ids)}"
            )
        return None
    if sequence_ids is None:
        if targets.dim() < 2:
            raise ValueError(
                f"{OP}: sequence_ids are needed for ratio_level {level!r} unless targets have a "
                f"row for each sequence, got None and targets {list(targets.shape)}"
            )
        rows = targets[..., 0].numel() if targets.shape[-1] else 0
        ids = torch.arange(rows, device=targets.device)
        return ids.repeat_interleave(targets.shape[-1])
    if not isinstance(sequence_ids, Tensor) or sequence_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{OP}: sequence_ids must be an int64 tensor, got {operands.describe(sequence_ids)}"
        )
    if sequence_ids.shape != targets.shape or sequence_ids.device != targets.device:
        raise ValueError(
            f"{OP}: sequence_ids must have the shape of targets {list(targets.shape)} and be on "
            f"{targets.device}, got {operands.describe(sequence_ids)}"
        )
    return sequence_ids.reshape(-1).long().contiguous()
