"""bupo in transformers: the LM-head op under a causal language model's own loss.

use_bupo_loss(model)
Trainer(model, ...).train()
"""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from bupo import ops
from bupo.policy import Unembedding, unembedding

AnyModel = TypeVar("AnyModel")
IGNORED = -100
LEFT_OUT = (
    *("output_router_logits", "pixel_values", "output_hidden_states", "output_attentions"),
    "logits_to_keep",
)
"""Arguments of a model that the fused loss would leave out"""


@dataclass
class LossOutput(ModelOutput):
    """What a model returns with labels: the loss alone."""

    loss: Any = None

    @property
    def logits(self) -> Tensor:
        raise AttributeError(
            "use_bupo_loss: with labels, a model computes no logits; call it without labels"
        )


def use_bupo_loss(model: AnyModel) -> AnyModel:
    """Makes model(input_ids, labels=...) compute its loss with bupo.ops and without logits, and
    returns the model. Without labels, the model behaves as before.

    The loss is that of transformers:

        loss = -sum_t log p(label_t) / n

    with n = num_items_in_batch if given, else the number of labels that are not -100. Labels are
    shifted by one; `shift_labels` are used as they are. The loss of a small batch is compared with
    the model's own first. Works with PEFT adapters that do not wrap the head, torch.compile, DDP
    and FSDP2. Call it before the model is wrapped by any of them. Errors: those of
    bupo.policy.unembedding; ValueError for a model that is wrapped already or has another loss, and
    for calls with labels and one of LEFT_OUT.
    """
    each: Any = model
    if hasattr(each, "peft_config"):
        raise ValueError(
            "use_bupo_loss: model: expected one without adapters; call it before get_peft_model"
        )
    if getattr(getattr(each, "config", None), "is_encoder_decoder", False):
        raise ValueError("use_bupo_loss: model: expected a decoder-only model")
    head_map = unembedding(each)
    given = each.forward if "forward" in vars(each) else None  # by accelerate, for example
    names = list(inspect.signature(type(each).forward).parameters)[1:]

    @functools.wraps(type(each).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args)) | kwargs
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and shifted is None:
            return given(**kwargs) if given is not None else type(self).forward(self, **kwargs)
        refuse("use_bupo_loss", self, kwargs)
        for name in ("labels", "shift_labels", "logits_to_keep"):
            kwargs.pop(name, None)
        items = kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(**kwargs | {"use_cache": False}).last_hidden_state
        out, targets = scored(self, head_map, hidden, labels, shifted)
        count = (targets != IGNORED).sum() if items is None else items
        if isinstance(count, Tensor):
            count = count.to(out.logprobs.device)
        return LossOutput(loss=-out.logprobs.sum() / count)

    bound = types.MethodType(forward, each)
    _check_same_loss(each, bound)
    each.forward = bound
    return model


@torch.no_grad()
def _check_same_loss(model: Any, fused: Any) -> None:
    """Raises ValueError if the fused loss is not the model's own, on a small batch."""
    device, training = model.get_output_embeddings().weight.device, model.training
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 8), generator=seeded)
    labels = ids.masked_fill(torch.rand(2, 8, generator=seeded) < 0.3, IGNORED)
    batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
    model.eval()
    try:
        own, mine = (float(run(**batch).loss) for run in (model, fused))
    finally:
        model.train(training)
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not abs(own - mine) <= (0.05 if half else 1e-4) * max(1.0, abs(own)):
        raise ValueError(
            f"use_bupo_loss: model of family {model.config.model_type!r}: not supported: its own "
            f"loss of a small batch is {own:.6g}, and that of its head alone {mine:.6g}"
        )


def refuse(op: str, model: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for what the fused loss of a call would leave out."""
    found = [name for name in LEFT_OUT if _is_set(kwargs.get(name))]
    config = model.config.get_text_config()
    if (
        getattr(config, "output_router_logits", False)
        and kwargs.get("output_router_logits") is None
    ):
        found.append("config.output_router_logits")
    if kwargs.get("return_dict") is False:
        found.append("return_dict=False")
    if kwargs.get("ignore_index", IGNORED) != IGNORED:
        found.append("ignore_index")
    if found:
        raise ValueError(
            f"{op}: with labels, expected a text-only model without router loss, hidden states or "
            f"logits in its output, got {', '.join(found)}"
        )


def _is_set(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return value is not None and value is not False and value != 0


def scored(
    model: Any,
    head_map: Unembedding,
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    temperature: float = 1.0,
    float32: bool = False,
) -> tuple[ops.LogProbs, Tensor]:
    """Returns log-probs and entropies of labels, and the labels [B, T - 1], or [B, T] if already
    shifted, from hidden states [B, T, D]. float32: computes in float32, also under autocast."""
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):  # an adapter there would be left out
        raise ValueError(
            "bupo.integrations: expected a plain Linear head, got one of "
            f"{type(head).__module__}; leave it out of target_modules and modules_to_save"
        )
    device = head.weight.device
    weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
    if float32:
        hidden, weight, bias = (
            hidden.float(),
            weight.float(),
            bias if bias is None else bias.float(),
        )
    targets = shift_labels.to(device).contiguous()
    plain = torch.autocast(device.type, enabled=False) if float32 else nullcontext()
    with plain:
        out = ops.lm_head_logprobs(
            hidden.to(device),
            weight,
            targets,
            bias=bias,
            temperature=head_map.temperature * temperature,
            softcap=head_map.softcap,
        )
    return out, targets


def whole(parameter: Tensor) -> Tensor:
    """Returns all rows of a parameter that FSDP2 has divided."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
