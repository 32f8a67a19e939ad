"""Models with random weights, and random tokens on which bench_models.py trains them. As a program,
makes the real SmolLM2-135M-Instruct and prints its folder: `python bench/real_models.py`."""

from typing import Any

import torch
import transformers
from batch import Batch
from implementations import Implementation
from torch import Tensor, nn
from truth import evenly_spaced

import bupo.ops as ops
from bupo.commands.sources import cache_dir
from bupo.policy import decoder_stack, hidden_states, internal_policy, unembedding
from bupo.tasks import smollm2

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 = HEADS | {"num_hidden_layers": 36, "vocab_size": 151936, "rms_norm_eps": 1e-6}
LLAMA = HEADS | {"num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-4B": ("qwen3", QWEN3 | QWEN3_4B),
    "Qwen3-8B": ("qwen3", QWEN3 | QWEN3_8B),
    "Llama-3.1-8B": ("llama", LLAMA | LLAMA_8B),
}
"""The family, and the public configuration"""
SPREAD = 4.0
"""Standard deviation of the logits, as of a trained model. Random weights give a flat softmax, and
no check would miss its part of the gradient."""
ROWS = 1024  # rows of logits that are in memory at once where a policy is made
CHECKED = 2048  # entries of the vocabulary, and targets, whose gradients are compared


def random_model(
    family: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_qwen3(layers: int, width: int, vocab: int, **fields: Any) -> nn.Module:
    """A small Qwen3 in float32, with heads of width 64."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 3 * width}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    head = {"head_dim": 64, "vocab_size": vocab, "tie_word_embeddings": False}
    return random_model("qwen3", sizes | heads | head | fields)


def build(name: str, fields: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """One of MODELS to train, with `fields` over its configuration."""
    family, public = MODELS[name]
    model = random_model(family, public | fields, dtype, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Training:
    """One model and one batch of tokens, all of which have a gradient."""

    def __init__(self, model: nn.Module, sequences: int, length: int) -> None:
        self.model, self.head = model, unembedding(model)
        self.device = self.head.weight.device
        self.random = torch.Generator(self.device).manual_seed(1)
        on: dict[str, Any] = {"generator": self.random, "device": self.device}
        self.ids = torch.randint(len(self.head.weight), (sequences, length), **on)
        advantages = torch.randn(self.ids.numel(), **on)
        self.advantages = advantages + advantages.sign() * 0.1
        self.token_weights = torch.full_like(advantages, 1 / len(advantages))
        self.policies: dict[int | None, tuple[float, Tensor, Tensor]] = {}

    def hidden(self, layer: int | None) -> Tensor:
        """[N, D], not yet multiplied with the gain of the policy"""
        with internal_policy(self.model, layer):
            return hidden_states(self.model, self.ids).flatten(0, 1)

    @torch.no_grad()
    def policy(self, layer: int | None) -> tuple[float, Tensor, Tensor]:
        """Of the policy of a layer: the gain by which hidden states are multiplied so that logits
        have their SPREAD; targets that are sampled from the policy; old log-probs near its own, so
        that ratios are near 1. Made at the first use."""
        if layer in self.policies:
            return self.policies[layer]
        hidden = self.hidden(layer)
        gain = SPREAD / float(self.head.logits(hidden[:ROWS]).float().std())
        sampled = []
        for part in hidden.split(ROWS):
            probabilities = self.head.logits(part * gain).float().softmax(-1)
            sampled.append(torch.multinomial(probabilities, 1, generator=self.random))
        targets = torch.cat(sampled).squeeze(1)
        logprobs = ops.lm_head_logprobs(hidden * gain, self.head.weight, targets).logprobs
        noise = torch.randn(logprobs.shape, generator=self.random, device=self.device)
        self.policies[layer] = gain, targets, logprobs + 0.05 * noise
        return self.policies[layer]

    def step(self, layer: int | None, implementation: Implementation) -> None:
        """Leaves the model's gradients for the policy of a layer (None: the full policy)."""
        gain, targets, old_logprobs = self.policy(layer)
        given = (targets, old_logprobs, self.advantages, self.token_weights)
        implementation.run(Batch(self.hidden(layer) * gain, self.head.weight, *given))

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self, layer: int | None) -> dict[str, Tensor]:
        """Gradients that show the most of a loss: rows of the head, to which all tokens add, spread
        over the vocabulary and of some targets; and one matrix of layer 1, which dX has reached."""
        head, first = self.head.weight.grad, decoder_stack(self.model).layers[0]
        down = next(first.parameters()).grad
        assert head is not None and down is not None
        entries = evenly_spaced(min(CHECKED, len(head)), len(head), head)
        entries = torch.cat([entries, self.policy(layer)[1][:CHECKED]]).unique()
        return {"head": head[entries], "first layer": down}


if __name__ == "__main__":
    made = smollm2.folder(cache_dir())
    smollm2.build({}, made)
    print(made)
