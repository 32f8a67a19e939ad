"""AdamW with one learning rate per place in the model, and with state from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bupo.config import Config, OptimizerConfig

Place = int | None
"""A value of bupo.policy.parameter_layers"""


class AdamW(torch.optim.AdamW):
    """AdamW with one parameter group for each place.

    Every parameter has zero state from the start, as AdamW would create it at the first gradient. A
    checkpoint therefore holds the state of all parameters in every phase, and missing state is an
    error rather than a sign that a parameter was never updated.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, Place],
        settings: OptimizerConfig,
        lr: float,
    ) -> None:
        members: dict[Place, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            members.setdefault(places.get(name), []).append(parameter)
        super().__init__(
            [{"params": some, "place": place} for place, some in members.items()],
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for parameter in parameters.values():
            self.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def set_rates(self, lr: float, factor: Callable[[Place], float]) -> None:
        """Sets the learning rate of each place to lr times its factor. Factor 0 freezes a place:
        its parameters require no gradient, so neither momentum nor weight decay moves them."""
        for group in self.param_groups:
            rate = factor(group["place"])
            group["lr"] = lr * rate
            for parameter in group["params"]:
                parameter.requires_grad_(rate != 0)

    def flat_state(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Returns the state of named parameters, with keys of the form name/field."""
        return {
            f"{name}/{field}": value.contiguous()
            for name, parameter in parameters.items()
            for field, value in self.state[parameter].items()
        }

    def load_flat_state(
        self, parameters: Mapping[str, nn.Parameter], flat: Mapping[str, Tensor]
    ) -> None:
        """Restores a flat_state(). Raises ValueError if it does not match the parameters."""
        expected = self.flat_state(parameters)
        if wrong := sorted(expected.keys() ^ flat.keys()):
            raise ValueError(f"optimizer state is missing or belongs to no parameter: {wrong}")
        shapes = {key: list(old.shape) for key, old in expected.items()}
        if wrong := [key for key, shape in shapes.items() if list(flat[key].shape) != shape]:
            was, now = list(flat[wrong[0]].shape), shapes[wrong[0]]
            raise ValueError(f"optimizer state {wrong[0]} has shape {was}, but its parameter {now}")
        for key, old in expected.items():
            name, _, field = key.rpartition("/")
            self.state[parameters[name]][field] = flat[key].to(old.device)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scales the gradients to a norm of at most `limit`, and returns the norm before that. If this
    is not finite, the gradients stay as they are: scaling would spread nan and hide its source."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(float(norm)):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def learning_rate(config: Config, step: int, peak: float) -> float:
    """Returns the rate of step 1, 2, ...; it depends on the step alone, also in a resumed run."""
    settings, steps = config.optimizer, config.steps
    if step <= settings.warmup_steps:
        return peak * step / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    return peak * (steps - step + 1) / (steps - settings.warmup_steps)
