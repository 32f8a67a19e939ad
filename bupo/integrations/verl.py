"""bupo in verl: Bottom-up Policy Optimization and the LM-head op in verl's FSDP2 actor.

Installing bupo beside verl is enough: verl loads verl_plugin.py. Options, on the command line of
verl's trainer:

    +actor_rollout_ref.model.override_config.bupo_layer=6
    +actor_rollout_ref.model.override_config.bupo_steps=30           training steps
    +actor_rollout_ref.model.override_config.bupo_final_norm=True    default: False
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=bupo

An actor with none of them is verl's own.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import verl
from torch import Tensor
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from bupo.integrations.transformers import refuse, scored
from bupo.policy import check_internal_policy, internal_policy, unembedding

TESTED = "0.9."
"""Versions of verl whose engine is known to work as this module expects"""
PREFIX = "bupo_"
OPTIONS = {"layer": int, "steps": int, "final_norm": bool}
CORRECTION = "rollout_is_weights"
"""What verl's correction of the mismatch with the rollouts adds to a batch of the actor"""


def register() -> None:
    """Puts BuPOEngine in the place of FSDPEngineWithLMHead, wherever verl has registered that."""
    for backends in EngineRegistry._engines["language_model"].values():
        for device, engine in backends.items():
            if engine is FSDPEngineWithLMHead:
                backends[device] = BuPOEngine


class BuPOEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine, whose actor trains pi^layer in its first training steps: log-probs of old and
    new policy, entropies and gradients are those of pi^layer, and the layers above it are not run.
    Responses come from the final policy. The training step is that of the learning rate's schedule,
    which verl saves and resumes.

    Errors: RuntimeError for a version of verl that has not been tested; ValueError for a wrong
    option, another strategy than fsdp2, a reference model in a run that has an internal policy,
    corrections of the mismatch with the rollouts in phase 1, and what bupo.policy refuses.
    """

    _bupo: types.SimpleNamespace | None = None
    """The options of BuPO, for an actor that has them"""

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        self._bupo = _options(model_config.override_config)
        self._bupo_head = bool(
            model_config.use_fused_kernels
            and (model_config.fused_kernel_options or {}).get("impl_backend") == "bupo"
        )
        if self._bupo or self._bupo_head:
            _check(engine_config, self._bupo is not None)
        super().__init__(model_config, engine_config, *args, **kwargs)

    def _build_module(self) -> Any:
        model = self._causal_lm = super()._build_module()  # before adapters and FSDP2
        if self._bupo and not next(model.parameters()).is_meta:  # only the first rank has weights
            attention = model.config._attn_implementation
            model.set_attn_implementation("eager")  # the weights are still on the CPU
            check_internal_policy(model, self._bupo.layer)
            model.set_attn_implementation(attention)
        return model

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        if self._bupo_head:
            model = self._causal_lm
            unembedding(model)  # measured by the model's own forward, on all ranks
            model.forward = types.MethodType(_fused_forward(type(model)), model)

    def internal_layer(self) -> int | None:
        """Returns the layer whose policy is trained now, or None for the final policy."""
        if self._bupo is None or self.lr_scheduler.last_epoch >= self._bupo.steps:
            return None
        layer: int = self._bupo.layer
        return layer

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        layer = self.internal_layer()
        if layer is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        assert self._bupo
        if micro_batch.get(CORRECTION, None) is not None:
            raise ValueError(
                f"bupo: {CORRECTION}: expected none in phase 1, where the ratio would measure the "
                "gap between the layer's policy and the final one: set "
                "algorithm.rollout_correction.rollout_is=null"
            )
        with internal_policy(self._causal_lm, layer, self._bupo.final_norm):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        output["metrics"]["bupo/layer"] = layer
        return loss, output


def _options(given: Any) -> types.SimpleNamespace | None:
    found = {
        k.removeprefix(PREFIX): v for k, v in dict(given or {}).items() if k.startswith(PREFIX)
    }
    if not found:
        return None
    names = ", ".join(PREFIX + name for name in OPTIONS)
    for name, value in found.items():
        if name not in OPTIONS:
            raise ValueError(f"bupo: override_config: expected {names}, got {PREFIX}{name}")
        if type(value) is not OPTIONS[name]:
            raise ValueError(
                f"bupo: override_config.{PREFIX}{name}: expected {OPTIONS[name].__name__}, got "
                f"{value!r}"
            )
    options = types.SimpleNamespace(**{"layer": 0, "steps": 0, "final_norm": False} | found)
    if options.layer < 1 or options.steps < 1:
        raise ValueError(
            f"bupo: override_config: expected a layer and at least one step, got "
            f"bupo_layer={options.layer} and bupo_steps={options.steps}"
        )
    return options


def _check(engine: Any, internal: bool) -> None:
    version = verl.__version__
    if not version.startswith(TESTED):
        raise RuntimeError(f"bupo: expected verl {TESTED}x, which is tested, got {version}")
    if engine.strategy != "fsdp2":
        raise ValueError(f"bupo: actor.strategy: expected fsdp2, got {engine.strategy}")
    if internal and engine.forward_only:
        raise ValueError(
            "bupo: an internal policy has no reference model in verl: set "
            "actor_rollout_ref.actor.use_kl_loss=False and algorithm.use_kl_in_reward=False"
        )


def _fused_forward(family: type) -> Any:
    """The forward of verl's fused kernels, by bupo.ops."""

    @functools.wraps(family.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        *args: Any,
        temperature: float = 1.0,
        shift_labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputForPPO:
        refuse("bupo in verl", self, kwargs)
        if shift_labels is None:
            shift_labels = torch.roll(kwargs["input_ids"], shifts=-1, dims=-1)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        found, _ = scored(self, unembedding(self), hidden, None, shift_labels, temperature)
        return CausalLMOutputForPPO(log_probs=found.logprobs, entropy=found.entropy)

    return forward
