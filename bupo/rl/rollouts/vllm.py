"""Responses by vLLM, in this process, with weights of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bupo.config import ConfigError, RolloutConfig, first_line
from bupo.rl.rollouts.engine import Decoder, seed_of
from bupo.rl.types import Prompt, Rollout

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: weights are handed over, not sent
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are these threads
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def _imported() -> Any:
    """The package. Raises ConfigError where it is missing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own imports
            import vllm
    except ImportError as error:
        package = "vllm" if torch.cuda.is_available() else "vllm-cpu (bupo[vllm])"
        raise ConfigError(f"rollout.engine=vllm needs the package {package}: {error}") from None
    return vllm


def check_options(config: RolloutConfig) -> None:
    """Raises ConfigError for an option of rollout.vllm that vLLM has not, naming the nearest."""
    if not config.vllm:
        return
    known = [f.name for f in dataclasses.fields(_imported().EngineArgs)]
    for key in config.vllm:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"rollout.vllm: vLLM has no argument {key!r}{hint}")


def _reason(error: Exception) -> str:
    """One line; of pydantic's several, the first that says something."""
    details: Any = getattr(error, "errors", None)
    if not callable(details):
        return first_line(error)
    first = details()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


class VllmEngine:
    """One engine on the devices of this process: the CPU (vllm-cpu) or its GPUs (vllm).

    Prefix caching is on and the cache is dropped whenever weights change.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        config: RolloutConfig,
        max_prompt_tokens: int,
        dtype: str,
        seed: int,
    ) -> None:
        """model: folder or hub name whose weights the engine starts with."""
        self._gpu = torch.cuda.is_available()
        vllm = _imported()
        check_options(config)
        from transformers import AutoConfig, GenerationConfig

        self._parameters, self._config = vllm.SamplingParams, config
        try:
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # no generation_config.json
            eos = AutoConfig.from_pretrained(model).get_text_config(decoder=True).eos_token_id
        self._decoder = Decoder(tokenizer, eos)
        options = config.vllm_options(self._gpu)
        self._sleeps = bool(options.get("enable_sleep_mode"))
        try:
            self._llm: Any = vllm.LLM(
                model=model,
                runner="generate",  # said, not guessed from the name of an architecture
                dtype=dtype,
                seed=seed % 2**31,
                max_model_len=max_prompt_tokens + config.max_new_tokens,
                max_num_seqs=config.batch_size,
                logprobs_mode="processed_logprobs",  # with the temperature
                generation_config="vllm",  # a model's own defaults would bend the policy
                **options,
            )
            # Compiles and fills what the first call needs, and meets what this device cannot do.
            self._run([[0, 1]], [vllm.SamplingParams(max_tokens=1, detokenize=False)])
        except (ValueError, RuntimeError) as error:  # a device or a family that it does not know
            given = f" with rollout.vllm={config.vllm}" if config.vllm else ""
            raise ConfigError(
                f"rollout.engine=vllm cannot serve {model}{given}: {_reason(error)}"
            ) from None
        parallel = self._llm.llm_engine.vllm_config.parallel_config
        self._in_process = parallel.distributed_executor_backend == "uni"
        rows = self._llm.model_config.get_vocab_size()
        self._allowed = list(range(self._decoder.vocab)) if rows > self._decoder.vocab else None
        self._asleep = False

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
    ) -> list[Rollout]:
        self._wake()
        temperature = self._config.temperature if temperature is None else temperature
        wanted = [(group, p, k) for group, p in enumerate(prompts) for k in range(samples)]
        rollouts: list[Rollout] = []
        size = self._config.batch_size
        for start in range(0, len(wanted), size):
            if stop():
                break
            batch = wanted[start : start + size]
            parameters = [
                self._parameters(
                    temperature=temperature,
                    top_p=self._config.top_p if temperature else 1.0,
                    max_tokens=self._config.max_new_tokens,
                    seed=seed_of(seed, group, k),
                    stop_token_ids=self._decoder.eos,
                    allowed_token_ids=self._allowed,
                    logprobs=0,  # of the sampled token
                    detokenize=False,
                )
                for group, _, k in batch
            ]
            outputs = self._run([p.token_ids for _, p, _ in batch], parameters)
            for (group, prompt, _), output in zip(batch, outputs):
                made = output.outputs[0]
                tokens = list(made.token_ids)
                logprobs = [place[t].logprob for t, place in zip(tokens, made.logprobs)]
                rollouts.append(self._decoder.rollout(group, prompt, tokens, logprobs))
        self._sleep()
        return rollouts

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._wake()
        weights: Iterable[tuple[str, Tensor]] = iter(tensors)
        if not self._in_process:  # to other processes: an iterator cannot go there
            weights = [(name, tensor.cpu()) for name, tensor in weights]
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.reset_prefix_cache()

    def score(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        self._wake()
        sequences = [[*r.prompt.token_ids, *r.token_ids] for r in rollouts]
        # One token has to be generated, so the last one of a full context is left out.
        limit = self._llm.model_config.max_model_len - 1
        parameters = [self._parameters(max_tokens=1, prompt_logprobs=0, detokenize=False)]
        outputs = self._run([s[:limit] for s in sequences], parameters * len(sequences))
        scores = []
        for rollout, output in zip(rollouts, outputs):
            first = len(rollout.prompt.token_ids)
            places = output.prompt_logprobs[first:]
            pairs = zip(rollout.token_ids, places)
            scores.append(torch.tensor([place[token].logprob for token, place in pairs]))
        return scores

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the process is ending
            self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: list[list[int]], parameters: list[Any]) -> list[Any]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs: list[Any] = self._llm.generate(requests, parameters, use_tqdm=False)
        return outputs

    def _sleep(self) -> None:
        """Lends the GPU's memory to the update: weights go to the host, the cache is dropped."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
