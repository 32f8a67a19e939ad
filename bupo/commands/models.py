"""Reads a model's configuration, tokenizer and weights, and reports in one line what is wrong.

torch and transformers are imported inside the functions, so that mistakes in a configuration are
reported within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo import hub
from bupo.config import BrokenError, Config, ConfigError, first_line, readable


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that are known before its weights are loaded."""

    source: str
    """Folder or hub name"""
    tokenizer: Any
    layers: int
    positions: int | None
    """Length of the longest text, if the model has a limit"""
    vocabulary: int | None
    """Number of rows of the embedding, if the configuration states it"""
    tied: bool
    """Whether the head is the embedding"""

    def check(self, prompts: Sequence[Any], new_tokens: int) -> None:
        """Raises ConfigError unless the model can take every prompt and `new_tokens` more."""
        longest = max(len(p.token_ids) for p in prompts)
        if self.positions is not None and longest + new_tokens > self.positions:
            raise ConfigError(
                f"a prompt of {longest} tokens and rollout.max_new_tokens={new_tokens} exceed the "
                f"{self.positions} positions of {self.source}; lower rollout.max_new_tokens, or "
                "data.max_prompt_tokens with data.overlong=drop"
            )
        self.check_tokens(max(max(p.token_ids) for p in prompts))

    def check_tokens(self, highest: int) -> None:
        """Raises ConfigError if the highest token id has no embedding."""
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise ConfigError(
                f"{self.source}: its tokenizer has {len(self.tokenizer)} tokens, but its model "
                f"only {self.vocabulary} (token {highest} occurs in the data), so they do not "
                "belong together; take both from the same place"
            )


def check_place(key: str, model: str) -> None:
    """Raises ConfigError if `model` is neither a folder nor a valid name on the hub."""
    with readable(f"{key}={model}"):
        there = Path(model).is_dir()
    if not there and not hub.is_name(model):
        raise ConfigError(f"{key}={model}: folder not found")


def read_model(config: Config, model: str) -> ModelFacts:
    """Reads the tokenizer and the sizes, and checks the settings that depend on the model. Raises
    ConfigError."""
    from transformers import AutoConfig, AutoTokenizer

    from bupo.runlog.display import Display

    try:
        with hub.quiet(), Display().waiting(f"reading the configuration of {model}"):
            model_config = AutoConfig.from_pretrained(hub.base_of(model) or model)
            tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # each family raises its own kinds
        raise ConfigError(f"model.path={model} cannot be read: {_reason(model, error)}") from None
    _check_causal(model, model_config)
    text_config = model_config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and config.rollout.max_new_tokens >= positions:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} does not fit in the model's "
            f"context of {positions} tokens"
        )
    vocabulary = getattr(text_config, "vocab_size", None)
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    layers = text_config.num_hidden_layers
    return ModelFacts(model, tokenizer, layers, positions, vocabulary, tied)


def _check_causal(model: str, model_config: Any) -> None:
    """Raises ConfigError for a model that attends to later tokens. This needs a check because
    transformers also builds a causal LM from a BERT."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(model_config)
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model_config, "is_decoder", True)
    encoder = getattr(model_config, "is_encoder_decoder", False)
    if masked or encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"model.path={model} is not a causal LM: models of family {model_config.model_type} "
            "cannot be sampled from left to right; choose a decoder-only model"
        )


def load_model(config: Config, source: str) -> Any:
    """Loads the causal LM of a folder or hub name, onto the GPU if there is one. A model that ranks
    are to divide stays on the host, as it may be too large for a GPU. Raises ConfigError or
    BrokenError if files are damaged or do not hold the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    from bupo import ranks
    from bupo.finite import first_bad

    try:
        with hub.quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, config.model.parameter_dtype),
                attn_implementation=config.model.attn_implementation,
                ignore_mismatched_sizes=True,  # reported in `found`
                output_loading_info=True,
            )
    except (ValueError, ImportError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{source} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # each file format raises its own kinds
        raise BrokenError(f"{source} cannot be loaded: {_reason(source, error)}") from None
    model, found = loaded
    # transformers leaves weights that it does not find at their random initial values.
    wrong = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    for name, theirs, ours in sorted(found["mismatched_keys"]):
        shapes = f"{list(theirs)} in the files, {list(ours)} in config.json"
        wrong.insert(0, f"{name} is {shapes}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BrokenError(
            f"{source} cannot be loaded: its weights do not match its config.json: "
            f"{', '.join(wrong[:3])}{more}; get intact files"
        )
    if bad := first_bad(model.named_parameters()):
        raise BrokenError(f"{source} cannot be used: {bad}; get intact files")
    divided = config.model.parts(ranks.world()) > 1
    return model.to("cuda" if torch.cuda.is_available() and not divided else "cpu")


def silence_noise(model: Any) -> None:
    """Sets dropout and the jitter of routers to 0 in a model that is to be trained."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)


def check_deterministic(model: Any) -> None:
    """Raises ValueError if two passes of the model in its current mode over the same tokens differ.
    The ratio of new to old probabilities would then be noise, and the policy that is trained would
    not be the one that samples."""
    import torch

    seeded = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows // 2, (2, 8), generator=seeded).to(model.device)
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
    off, limit = (first - second).abs().max(), 8 * torch.finfo(first.dtype).eps * first.abs().max()
    if off > limit:  # nan is left to the next check, which names it
        raise ValueError(
            f"two passes over the same tokens in training mode differ by {off:.1e} in their "
            "logits: something in the model is random (dropout, router noise); set it to 0 in its "
            "config.json"
        )


def _reason(model: str, error: Exception) -> str:
    if Path(model).is_dir():
        return first_line(error)
    return f"no such folder, and reading it from the Hugging Face hub failed: {hub.reason(error)}"
