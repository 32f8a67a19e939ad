"""bupo in transformers: the LM-head op under a causal language model's own loss.

use_bupo_loss(model)
Trainer(model, ...).train()
"""

from __future__ import annotations

import functools
import types
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from bupo import ops
from bupo.policy import Unembedding, unembedding

AnyModel = TypeVar("AnyModel")
IGNORED = -100


def use_bupo_loss(model: AnyModel) -> AnyModel:
    """Makes model(input_ids, labels=...) compute its loss with bupo.ops and without logits, and
    returns the model. Without labels, the model does what it did.

    The loss is that of transformers::

        loss = -sum_t log p(label_t) / n        n: num_items_in_batch, else the labels that count

    with labels shifted by one (or `shift_labels`, as they are) and -100 ignored. The output has no
    logits, so a Trainer needs prediction_loss_only=True or no compute_metrics. Works with adapters
    of PEFT that leave the head alone, torch.compile, DDP and FSDP2; call it before the model is
    wrapped. Errors: those of bupo.policy.unembedding; ValueError for labels together with images or
    a router loss.
    """
    each: Any = model
    original, head_map = each.forward, unembedding(each)

    @functools.wraps(type(each).forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return original(*args, **kwargs)
        refuse(kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k != "logits_to_keep"}
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        out, targets = scored(self, head_map, hidden, labels, shift_labels)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, Tensor):
            count = count.to(out.logprobs.device)
        loss: Any = -out.logprobs.sum() / count
        return CausalLMOutputWithPast(loss=loss)

    each.forward = types.MethodType(forward, each)
    return model


def refuse(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments of a model that the fused loss would leave out."""
    for name in ("output_router_logits", "pixel_values"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"bupo.integrations: expected a model of text without a router loss, got {name}"
            )


def scored(
    model: Any,
    head_map: Unembedding,
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    temperature: float = 1.0,
) -> tuple[ops.LogProbs, Tensor]:
    """Returns log-probs and entropies of labels, and the labels [B, T - 1], or [B, T] if they are
    shifted already, from hidden states [B, T, D]."""
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    head, targets = model.get_output_embeddings(), shift_labels.to(hidden.device).contiguous()
    if not isinstance(head, nn.Linear):  # an adapter there would be left out
        raise ValueError(
            "bupo.integrations: expected a plain Linear head, got one of "
            f"{type(head).__module__}; leave it out of target_modules"
        )
    out = ops.lm_head_logprobs(
        hidden,
        whole(head.weight),
        targets,
        bias=None if head.bias is None else whole(head.bias),
        temperature=head_map.temperature * temperature,
        softcap=head_map.softcap,
    )
    return out, targets


def whole(parameter: Tensor) -> Tensor:
    """Returns all rows of a parameter that FSDP2 has divided."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
