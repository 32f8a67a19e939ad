"""bupo in TRL: the LM-head op under its trainers, and Bottom-up Policy Optimization in its loop.

use_bupo_ops(trainer)                          any GRPO, RLOO or SFT trainer
BuPOTrainer(..., layer=6, internal_steps=30)   GRPOTrainer that first trains the policy of a layer
class Mine(BuPOMixin, RLOOTrainer): ...        the same for another trainer
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer, SFTTrainer
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
    TypeError for a trainer without a fused head; ValueError for models that are not supported: with
    a router loss, with images, or those that bupo.policy refuses.
    """
    _install(trainer, lambda: FINAL)


def _install(trainer: Any, policy: Callable[[], Policy]) -> None:
    if not trl.__version__.startswith(TESTED):
        raise RuntimeError(
            f"bupo.integrations.trl: expected TRL {TESTED}x, which is tested, got {trl.__version__}"
        )
    temperature = getattr(trainer, "temperature", 1.0)
    supervised = isinstance(trainer, SFTTrainer)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            base = model.get_base_model() if hasattr(model, "peft_config") else model
            _give_head(base, temperature, supervised, policy)


def _give_head(
    model: Any, temperature: float, supervised: bool, policy: Callable[[], Policy]
) -> None:
    """Replaces the fused head that TRL has given a model: model(..., fused_lm_head=True)."""
    if getattr(model.forward, "__name__", "") != "forward" or "forward" not in vars(model):
        raise TypeError(
            f"use_bupo_ops: trainer: expected one whose model has TRL's fused head, got a plain "
            f"{type(model).__name__}"
        )
    original = model.forward
    head_map = unembedding(model)  # measured before the model is divided or wrapped

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
        refuse(kwargs)
        layer, final_norm = policy()
        with internal_policy(self, layer, final_norm):
            hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        out, targets = scored(self, head_map, hidden, labels, shift_labels, temperature)
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
    found, hidden = torch.zeros_like(mask), hidden[:, : mask.shape[1]]
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

    In these steps, all log-probs of the loss are those of pi^layer, also those of the reference
    model, and the layers above it are neither run nor trained. Responses always come from the final
    policy. The correction for the mismatch with vLLM is off, as its ratio would hold the whole
    distance between the two policies. The step is that of the trainer's state, so a resumed run
    goes on in its phase.

    layer: 1..L. final_norm: applies the model's final norm to H^layer. schedule: in place of layer
    and internal_steps, a list of (layer or None, steps), the last of which lasts to the end; it
    must end with None. Errors: those of use_bupo_ops and bupo.policy.check_internal_policy;
    ValueError for options of TRL that a phase cannot honour.
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
        self._final_norm = final_norm
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _check_options(trainer, [steps for _, steps in self._phases])
        _install(trainer, self._policy)
        model = trainer.accelerator.unwrap_model(trainer.model)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        check_internal_policy(base, sorted({m for m, _ in self._phases if m is not None}))

    def internal_layer(self) -> int | None:
        """Returns the layer whose policy the current step trains, or None for the final policy."""
        done, trainer = 0, cast(Any, self)
        for layer, steps in self._phases:
            done += steps
            if trainer.state.global_step < done:
                return layer
        return None

    def _policy(self) -> Policy:
        layer = self.internal_layer() if hasattr(self, "state") else None
        return (layer, self._final_norm) if layer is not None else FINAL

    @property
    def vllm_importance_sampling_correction(self) -> bool:
        return self._correction and self._policy() == FINAL

    @vllm_importance_sampling_correction.setter
    def vllm_importance_sampling_correction(self, value: bool) -> None:
        self._correction = value

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
    layer: int | None, steps: int, schedule: list[tuple[int | None, int]] | None
) -> list[tuple[int | None, int]]:
    if schedule is None:
        if (layer is None) != (steps == 0):
            raise ValueError(
                "BuPOMixin: layer, internal_steps: expected both or neither, got "
                f"layer={layer} and internal_steps={steps}"
            )
        schedule = [(layer, steps)]
    elif layer is not None or steps:
        raise ValueError("BuPOMixin: schedule: expected no layer and internal_steps beside it")
    elif not schedule or schedule[-1][0] is not None:
        raise ValueError(f"BuPOMixin: schedule: expected None as its last layer, got {schedule}")
    else:
        schedule = schedule[:-1]
    if any(steps < 1 for layer, steps in schedule if layer is not None):
        raise ValueError(f"BuPOMixin: schedule: expected at least one step each, got {schedule}")
    return [(layer, steps) for layer, steps in schedule if steps]


def _check_options(trainer: Any, steps: list[int]) -> None:
    """Raises ValueError for what a phase would silently get wrong."""
    args = trainer.args
    refused = {
        "aux_loss_enabled": getattr(trainer, "aux_loss_enabled", False),
        "off_policy_mask_threshold": getattr(trainer, "off_policy_mask_threshold", None) is not None
        and args.use_vllm,
        "deepspeed": trainer.is_deepspeed_enabled,
        "fsdp": trainer.is_fsdp_enabled,
        "ddp_find_unused_parameters=False": trainer.accelerator.num_processes > 1
        and not args.ddp_find_unused_parameters,
    }
    if found := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"BuPOMixin: {', '.join(found)} cannot be combined with internal policies")
    # Responses of a phase must be used up before the next one begins: their log-probs are of it.
    window = args.steps_per_generation * getattr(trainer, "num_iterations", 1)
    updates = max(1, window // args.gradient_accumulation_steps)
    if wrong := [n for n in steps if n % updates]:
        raise ValueError(
            f"BuPOMixin: internal_steps: expected a multiple of {updates}, the optimizer steps on "
            f"the responses of one generation (steps_per_generation * num_iterations / "
            f"gradient_accumulation_steps), got {wrong[0]}"
        )
