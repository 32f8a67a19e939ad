"""AdamW with one learning rate per place in the model, and with state from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from bupo import ranks
from bupo.config import Config, OptimizerConfig

Place = int | None
"""A value of bupo.policy.parameter_layers"""


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW with one parameter group for each place.

    Every parameter has zero state from the start, as AdamW would create it at the first gradient. A
    checkpoint therefore holds the state of all parameters in every phase, and missing state is an
    error rather than a sign that a parameter was never updated.

    The groups hold the parameters themselves or, for a parameter in bfloat16 or with
    optimizer.place=host, a float32 copy of it where the state is. An update then moves the copy,
    and the parameter is the copy, rounded. While the host updates one place, the gradients of the
    next are on their way to it. Of parameters that are divided among ranks, each rank updates its
    rows.
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
        self._named = dict(parameters)
        self._of = {p: _copy_of(p, settings.place == "host") for p in parameters.values()}
        super().__init__(
            [
                {"params": [self._of[p] for p in some], "place": place, "trained": some}
                for place, some in members.items()
            ],
            {"lr": lr, "betas": settings.betas, "weight_decay": settings.weight_decay},
        )
        for kept in self._of.values():
            self.state[kept] = {
                "step": torch.tensor(0.0, device=kept.device),
                "exp_avg": torch.zeros_like(kept, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(kept, requires_grad=False),
            }

    def set_rates(self, lr: float, factor: Callable[[Place], float]) -> None:
        """Sets the learning rate of each place to lr times its factor. Factor 0 freezes a place:
        its parameters require no gradient, so neither momentum nor weight decay moves them."""
        for group in self.param_groups:
            rate = factor(group["place"])
            group["lr"] = lr * rate
            for parameter in group["trained"]:
                parameter.requires_grad_(rate != 0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        groups = self.param_groups
        following = [self._sent(p) for p in groups[0]["trained"]]
        for group, after in zip(groups, [*groups[1:], {"trained": []}]):
            gradients, following = following, [self._sent(p) for p in after["trained"]]
            moved = [(p, g) for p, g in zip(group["trained"], gradients) if g is not None]
            if not moved:
                continue
            for _, gradient in moved:
                if gradient.arrived is not None:
                    gradient.arrived.synchronize()
            kept = [self._of[p] for p, _ in moved]
            states = [self.state[each] for each in kept]
            adamw(
                kept,
                [gradient.values.to(each.dtype) for (_, gradient), each in zip(moved, kept)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )
            # The fused kernel does not count as a change, by which casts of the head are renewed.
            torch.autograd.graph.increment_version(kept)
            for (parameter, _), each in zip(moved, kept):
                if self._is_copy(parameter):
                    ranks.local(parameter).copy_(each, non_blocking=True)

    def _is_copy(self, parameter: nn.Parameter) -> bool:
        return self._of[parameter].data_ptr() != ranks.local(parameter).data_ptr()

    def _sent(self, parameter: nn.Parameter) -> _Sent | None:
        """Returns the gradient where the state is, perhaps still on its way there."""
        if parameter.grad is None:
            return None
        gradient, kept = ranks.local(parameter.grad), self._of[parameter]
        if gradient.device == kept.device:
            return _Sent(gradient, None)
        host = torch.empty_like(gradient, device=kept.device, pin_memory=True)
        host.copy_(gradient, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Sent(host, arrived)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes the gradients of the model's parameters; a step skips a parameter without one."""
        for parameter in self._of:
            parameter.grad = None

    def flat_state(self) -> dict[str, Tensor]:
        """Returns the state of all parameters, with keys of the form name/field. The field
        `float32` is the copy of a parameter that is less exact. Of a divided parameter, this is the
        state of the rows that this rank holds."""
        fields = {name: dict(self.state[self._of[p]]) for name, p in self._named.items()}
        for name, p in self._named.items():
            if self._of[p].dtype != p.dtype:
                fields[name]["float32"] = self._of[p].detach()
        return {
            f"{name}/{field}": value
            for name, state in fields.items()
            for field, value in state.items()
        }

    def divided_state(self) -> dict[str, Tensor]:
        """Returns flat_state() as tensors of all rows, which share the memory of this rank's."""
        return {
            key: ranks.like(rows, self._named[key.rpartition("/")[0]])
            for key, rows in self.flat_state().items()
        }

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Renews the copies that are no part of the state, after parameters have been read."""
        for parameter, kept in self._of.items():
            if kept.dtype == parameter.dtype:
                kept.copy_(ranks.local(parameter))


class _Sent(NamedTuple):
    """A gradient where the state is."""

    values: Tensor
    arrived: torch.cuda.Event | None


def _copy_of(parameter: nn.Parameter, on_host: bool) -> Tensor:
    """Returns the tensor that AdamW updates: the parameter or a copy in float32."""
    device = torch.device("cpu") if on_host else parameter.device
    rows = ranks.local(parameter.detach())
    if parameter.dtype.itemsize >= 4 and parameter.device == device:
        return parameter if ranks.local(parameter) is parameter else rows
    copy = rows.to(device, _exact(parameter.dtype), copy=True)
    return copy.pin_memory() if device != parameter.device else copy


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Returns float32, or the type itself if that is more exact."""
    return torch.promote_types(dtype, torch.float32)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scales the gradients to a norm of at most `limit`, and returns the norm before that. If this
    is not finite, the gradients stay as they are: scaling would spread nan and hide its source."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return _clip_rows(gradients, limit)
    # In float32 at least: get_total_norm would round the norm of each gradient to its own type.
    norms = [torch.linalg.vector_norm(g, dtype=_exact(g.dtype)) for g in gradients]
    norm = nn.utils.get_total_norm(norms)
    if math.isfinite(float(norm)):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def _clip_rows(gradients: Sequence[Tensor], limit: float) -> float:
    """Does the same to gradients that are divided among the ranks."""
    rows = [ranks.local(gradient) for gradient in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=_exact(g.dtype)).double() for g in rows]
    squares = torch.stack(norms).square().sum()
    ranks.add_up([squares])
    norm = math.sqrt(float(squares) / ranks.copies(gradients[0]))
    if math.isfinite(norm) and norm > limit:
        for gradient in rows:
            gradient.mul_(limit / (norm + 1e-6))
    return norm


def learning_rate(config: Config, step: int, peak: float) -> float:
    """Returns the rate of step 1, 2, ...; it depends on the step alone, also in a resumed run."""
    settings, steps = config.optimizer, config.steps
    if step <= settings.warmup_steps:
        return peak * step / settings.warmup_steps
    if settings.schedule == "constant":
        return peak
    return peak * (steps - step + 1) / (steps - settings.warmup_steps)
