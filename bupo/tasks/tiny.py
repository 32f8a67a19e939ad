"""Tiny randomly initialised models of real families, for trying a configuration end to end on real
data without a download. The program loads them exactly as it loads a trained model.

They have a byte-level tokenizer and the ChatML template. The weights are random, so the reward
stays near zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bupo.tasks import TaskFiles, save_model
from bupo.tasks.small_models import checked, family_config

DEFAULTS = {"family": "qwen3", "layers": 4, "width": 64, "tied": True, "seed": 0}
"""task_options. family: qwen3 or llama. tied: use one matrix for embedding and unembedding."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PADDED_ROWS = 16
"""Rows of the head beyond the tokenizer, as in Qwen's heads. They must never be sampled."""


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes tokenizer and model configuration to a folder named after the options. The data are
    those of data.train."""
    settings = checked(options, DEFAULTS)
    folder = cache / ("tiny-" + "-".join(str(settings[key]) for key in DEFAULTS))
    if not (folder / "config.json").exists():
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        _config(settings, tokenizer).save_pretrained(folder)
    return TaskFiles(folder, None, None)


def _config(settings: dict[str, Any], tokenizer: Any) -> Any:
    rows, ends = len(tokenizer) + PADDED_ROWS, (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return family_config(settings, rows, settings["tied"], 4096, *ends)


def build(options: dict[str, Any], folder: Path) -> None:
    """Writes random weights, unless there are weights already."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(checked(options, DEFAULTS)["seed"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    save_model(model, folder)
