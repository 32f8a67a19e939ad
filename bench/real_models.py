"""What bench_models.py trains: models of the sizes of public configurations, with random weights,
and a batch of random tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from batch import Batch
from implementations import Implementation
from torch import Tensor, nn
from truth import spread

import bupo.ops as ops
from bupo.policy import decoder_stack, hidden_states, internal_policy, unembedding

QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
QWEN3 |= {"head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # (family, public configuration)
    "Qwen3-4B": (
        "qwen3",
        QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": (
        "qwen3",
        QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
            **{"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256},
            **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        },
    ),
}


def build(name: str, fields: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    family, public = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **public | fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


SPREAD = 4.0
"""standard deviation of the logits, as of a trained model: random weights give a flat softmax, and
no check would miss its part of the gradient"""
ROWS = 1024
"""of logits that are in memory at once where a policy is made"""

CHECKED = 2048
"""entries of the vocabulary whose gradients are compared, and targets"""


@dataclasses.dataclass
class Policy:
    """A policy of the model, and tokens sampled from it."""

    gain: float
    """what hidden states are multiplied with, so that logits have their SPREAD"""
    targets: Tensor
    old_logprobs: Tensor
    """near its own, so that ratios are near 1"""


class Training:
    """One model and one batch of tokens, all of which have a gradient."""

    def __init__(self, model: nn.Module, sequences: int, length: int) -> None:
        self.model, self.head = model, unembedding(model)
        self.device = self.head.weight.device
        self.random = torch.Generator(self.device).manual_seed(1)
        on: dict[str, Any] = {"generator": self.random, "device": self.device}
        self.ids = torch.randint(len(self.head.weight), (sequences, length), **on)
        advantages = torch.randn(self.ids.numel(), **on)
        self.given = {
            "advantages": advantages + advantages.sign() * 0.1,
            "token_weights": torch.full_like(advantages, 1 / len(advantages)),
        }
        self.policies: dict[int | None, Policy] = {}

    def hidden(self, layer: int | None) -> Tensor:
        """[N, D], before its gain"""
        with internal_policy(self.model, layer):
            return hidden_states(self.model, self.ids).flatten(0, 1)

    def policy(self, layer: int | None) -> Policy:
        """Made at its first use."""
        if layer not in self.policies:
            with torch.no_grad():
                self.policies[layer] = self._sample(self.hidden(layer))
        return self.policies[layer]

    def _sample(self, hidden: Tensor) -> Policy:
        gain = SPREAD / float(self.head.logits(hidden[:ROWS]).float().std())
        targets = [
            torch.multinomial(
                self.head.logits(part * gain).float().softmax(-1), 1, generator=self.random
            )
            for part in hidden.split(ROWS)
        ]
        chosen = torch.cat(targets).squeeze(1)
        logprobs = ops.lm_head_logprobs(hidden * gain, self.head.weight, chosen).logprobs
        noise = torch.randn(logprobs.shape, generator=self.random, device=self.device)
        return Policy(gain, chosen, logprobs + 0.05 * noise)

    def step(self, layer: int | None, implementation: Implementation) -> None:
        """Gradients of the whole model, of the policy of a layer (None: the full one)."""
        policy = self.policy(layer)
        hidden = self.hidden(layer) * policy.gain
        tokens = {"targets": policy.targets, "old_logprobs": policy.old_logprobs}
        implementation.run(Batch(hidden, self.head.weight, **tokens, **self.given))

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self, layer: int | None) -> dict[str, Tensor]:
        """What shows most of a loss: of the head, to which all tokens add, rows spread over the
        vocabulary and some of targets; and of layer 1 one matrix, to which dX has come down."""
        head, first = self.head.weight.grad, decoder_stack(self.model).layers[0]
        down = next(first.parameters()).grad
        assert head is not None and down is not None
        entries = spread(min(CHECKED, len(head)), len(head), head)
        entries = torch.cat([entries, self.policy(layer).targets[:CHECKED]]).unique()
        return {"head": head[entries], "first layer": down}
