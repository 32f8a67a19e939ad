"""bupo in TRL: the LM-head op under its trainers, and Bottom-up Policy Optimization in its loop.

use_bupo_ops(trainer)                          any GRPO, RLOO or SFT trainer
BuPOTrainer(..., layer=6, internal_steps=30)   GRPOTrainer that first trains the policy of a layer
class Mine(BuPOMixin, RLOOTrainer): ...        the same for another trainer
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from bupo.integrations.transformers import refuse, scored, whole
from bupo.policy import check_internal_policy, internal_policy, unembedding

TESTED = "1.16."
"""Versions of TRL whose trainers are known to call the fused head as this module expects"""
ROWS = 512
"""Hidden states whose logits are computed at once to find the likeliest token"""
Policy = tuple[int | None, bool]
"""A layer, or None for the final policy, and whether the final norm is applied to it"""
FINAL: Policy = (None, False)


def use_bupo_ops(trainer: Any) -> None:
    """Makes a trainer compute log-probs and entropies with bupo.ops, in place of TRL's own fused
    head. Loss, metrics and all options of the trainer stay as they are.

    Call it before train(). Errors: RuntimeError for a version of TRL that has not been tested;
    TypeError for another trainer; ValueError for DeepSpeed, and for models that are not supported:
    with a router loss, with images, or those that bupo.policy refuses.
    """
    _install("use_bupo_ops", trainer, lambda: FINAL)


def _install(op: str, trainer: Any, policy: Callable[[], Policy]) -> None:
    if not trl.__version__.startswith(TESTED):
        raise RuntimeError(f"{op}: expected TRL {TESTED}x, which is tested, got {trl.__version__}")
    if not isinstance(trainer, GRPOTrainer | RLOOTrainer | SFTTrainer):
        raise TypeError(
            f"{op}: trainer: expected a GRPOTrainer, RLOOTrainer or SFTTrainer, got "
            f"{type(trainer).__name__}"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(f"{op}: a router loss is not supported: set router_aux_loss_coef=0.0")
    if trainer.is_deepspeed_enabled:
        raise ValueError(f"{op}: DeepSpeed is not supported")
    supervised = isinstance(trainer, SFTTrainer)
    options = {
        "temperature": 1.0 if supervised else cast(Any, trainer).temperature,
        "float32": getattr(trainer.args, "cast_lm_head_to_fp32", False),
    }
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            _give_head(op, _base(model), options, supervised, policy)


def _base(model: Any) -> Any:
    """Returns the model within DDP, torch.compile or PEFT."""
    for name in ("module", "_orig_mod"):
        model = getattr(model, name) if name in getattr(model, "_modules", {}) else model
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _give_head(
    op: str,
    model: Any,
    options: dict[str, Any],
    supervised: bool,
    policy: Callable[[], Policy],
) -> None:
    """Replaces the fused head that TRL has given a model: model(..., fused_lm_head=True)."""
    if "forward" not in vars(model):
        raise TypeError(
            f"{op}: trainer: expected one whose model has TRL's fused head, got a plain "
            f"{type(model).__name__}"
        )
    original = model.forward
    head_map = unembedding(model)  # measured before the model is divided

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        if not fused_lm_head:
            return original(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
        refuse(op, self, kwargs)
        layer, final_norm = policy()
        with internal_policy(self, layer, final_norm):
            hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        out, targets = scored(self, head_map, hidden, labels, shift_labels, **options)
        mask, head = targets != -100, self.get_output_embeddings()
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-out.logprobs.sum() / count,
            log_probs=out.logprobs,
            entropy=out.entropy,
            is_top1=_is_likeliest(hidden, head, targets) if supervised else None,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def _is_likeliest(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Returns whether each target is its policy's likeliest token, which takes one more product
    with the head. Neither softcap nor temperature changes that."""
    mask, weight = targets != -100, whole(head.weight)
    bias = None if head.bias is None else whole(head.bias)
    found, hidden = torch.zeros_like(mask), hidden[:, : mask.shape[1]].to(mask.device)
    chosen = [
        nn.functional.linear(rows.to(weight.dtype), weight, bias).argmax(-1)
        for rows in hidden[mask].split(ROWS)
    ]
    if chosen:
        found[mask] = torch.cat(chosen) == targets[mask]
    return found


class BuPOMixin:
    """Makes a trainer of TRL train pi^layer for its first `internal_steps` optimizer steps, and the
    final policy from then on: `class Mine(BuPOMixin, RLOOTrainer)`.

    In these steps, all log-probs in the loss, including those of the reference model, are those of
    pi^layer; the layers above it are neither run nor trained. Responses always come from the final
    policy. The correction for the mismatch with vLLM is off, because its ratio would measure the
    whole gap between the two policies. The step is that of the trainer's state, so a resumed run
    continues in its phase.

    layer: 1..L. final_norm: applies the model's final norm to H^layer. schedule: in place of layer
    and internal_steps, a list of (layer or None, steps), the last of which lasts to the end; it
    must end with None. Errors: those of use_bupo_ops and bupo.policy.check_internal_policy;
    TypeError for an SFTTrainer; ValueError for options of TRL that a phase cannot honour.
    """

    def __init__(
        self,
        *args: Any,
        layer: int | None = None,
        internal_steps: int = 0,
        final_norm: bool = False,
        schedule: list[tuple[int | None, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        self._phases = _checked_phases(layer, internal_steps, schedule)
        self._final_norm, self._ready = final_norm, False
        if not isinstance(self, GRPOTrainer | RLOOTrainer):
            raise TypeError(
                f"BuPOMixin: expected a GRPOTrainer or RLOOTrainer, got {type(self).__name__}"
            )
        super().__init__(*args, **kwargs)
        _check_options(self, [steps for _, steps in self._phases])
        _install("BuPOMixin", self, self._policy)
        layers = sorted({m for m, _ in self._phases if m is not None})
        check_internal_policy(_base(cast(Any, self).model), layers)
        self._ready = True

    def internal_layer(self) -> int | None:
        """Returns the layer whose policy the current step trains, or None for the final policy."""
        done, trainer = 0, cast(Any, self)
        for layer, steps in self._phases:
            done += steps
            if trainer.state.global_step < done:
                return layer
        return None

    def _policy(self) -> Policy:
        layer = self.internal_layer() if self._ready else None
        return (layer, self._final_norm) if layer is not None else FINAL

    @property
    def vllm_importance_sampling_correction(self) -> bool:
        return self._correction and self._policy() == FINAL

    @vllm_importance_sampling_correction.setter
    def vllm_importance_sampling_correction(self, value: bool) -> None:
        self._correction = value

    def _prepare_inputs(self, batch: Any) -> Any:
        """Drops responses that are left of an earlier phase, as after a resume within a generation:
        their log-probs are those of another policy."""
        trainer, layer = cast(Any, self), self.internal_layer()
        if trainer.model.training:
            if self._buffered_for != layer:
                trainer._buffered_inputs = None
            self._buffered_for = layer
        return super()._prepare_inputs(batch)  # type: ignore[misc]

    _buffered_for: int | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Remembers the layer, as the step has been counted when it is logged."""
        self._trained = self.internal_layer()
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the layer in training (0: the final policy) to what the trainer logs."""
        if "loss" in logs:
            logs["bupo/layer"] = self._trained or 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class BuPOTrainer(BuPOMixin, GRPOTrainer):
    """GRPOTrainer with BuPOMixin."""


def _checked_phases(
    layer: int | None, internal_steps: int, schedule: list[tuple[int | None, int]] | None
) -> list[tuple[int | None, int]]:
    if schedule is None:
        if layer is None or internal_steps < 1:
            raise ValueError(
                "BuPOMixin: layer, internal_steps: expected a layer and at least one step, or a "
                f"schedule, got layer={layer} and internal_steps={internal_steps}"
            )
        return [(layer, internal_steps)]
    if layer is not None or internal_steps:
        raise ValueError("BuPOMixin: schedule: expected no layer and internal_steps beside it")
    if not schedule or schedule[-1][0] is not None:
        raise ValueError(f"BuPOMixin: schedule: expected None as its last layer, got {schedule}")
    if any(steps < 1 for _, steps in schedule[:-1]):
        raise ValueError(f"BuPOMixin: schedule: expected at least one step each, got {schedule}")
    return schedule[:-1]


def _check_options(trainer: Any, steps: list[int]) -> None:
    """Raises ValueError for what a phase would silently get wrong."""
    args = trainer.args
    of_vllm = args.use_vllm or getattr(trainer, "rollout_func", None) is not None
    refused = {
        "off_policy_mask_threshold with vLLM or rollout_func": of_vllm
        and getattr(trainer, "off_policy_mask_threshold", None) is not None,
        "FSDP": trainer.is_fsdp_enabled,
        "DDP without ddp_find_unused_parameters=True": trainer.accelerator.num_processes > 1
        and not args.ddp_find_unused_parameters,
    }
    if found := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"BuPOMixin: {', '.join(found)} cannot be combined with internal policies")
    # All responses generated in a phase must be used before the next phase begins, because their
    # log-probs belong to that phase's policy.
    window = args.steps_per_generation * getattr(trainer, "num_iterations", 1)
    updates = window // math.gcd(window, args.gradient_accumulation_steps)
    if wrong := [n for n in steps if n % updates]:
        raise ValueError(
            f"BuPOMixin: internal_steps: expected a multiple of {updates}, the optimizer steps on "
            "the responses of one generation (by steps_per_generation, num_iterations and "
            f"gradient_accumulation_steps), got {wrong[0]}"
        )
