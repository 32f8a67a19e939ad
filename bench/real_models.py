"""What bench_models.py trains: models of the sizes of public configurations, with random weights,
and a batch of random tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from batch import Batch
from implementations import Implementation
from torch import Tensor, nn

import bupo.ops as ops
from bupo.policy import hidden_states, internal_policy, unembedding

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


class Training:
    """One model and one batch of tokens, all of which have a gradient."""

    def __init__(self, model: nn.Module, sequences: int, length: int) -> None:
        self.model, self.head = model, unembedding(model)
        self.device = self.head.weight.device
        g = torch.Generator(self.device).manual_seed(1)
        on: dict[str, Any] = {"generator": g, "device": self.device}
        vocab, tokens = len(self.head.weight), sequences * length
        self.ids = torch.randint(vocab, (sequences, length), **on)
        advantages = torch.randn(tokens, **on)
        self.given = {
            "targets": torch.randint(vocab, (tokens,), **on),
            "advantages": advantages + advantages.sign() * 0.1,
            "token_weights": torch.full((tokens,), 1 / tokens, device=self.device),
        }
        self.noise = 0.05 * torch.randn(tokens, **on)
        self.old: dict[int | None, Tensor] = {}

    def hidden(self, layer: int | None) -> Tensor:
        with internal_policy(self.model, layer):
            return hidden_states(self.model, self.ids).flatten(0, 1)

    def old_logprobs(self, layer: int | None) -> Tensor:
        """Near those of the policy, so that ratios are near 1."""
        if layer not in self.old:
            with torch.no_grad():
                found = ops.lm_head_logprobs(
                    self.hidden(layer), self.head.weight, self.given["targets"]
                )
            self.old[layer] = found.logprobs + self.noise
        return self.old[layer]

    def step(self, layer: int | None, implementation: Implementation) -> None:
        """Gradients of the whole model, of the policy of a layer (None: the full one)."""
        old = self.old_logprobs(layer)
        hidden = self.hidden(layer)
        implementation.run(Batch(hidden, self.head.weight, old_logprobs=old, **self.given))

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        norms = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())
