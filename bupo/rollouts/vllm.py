"""The engine that generates responses with vLLM, in this process, with its own copy of weights."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bupo import progress
from bupo.config import ConfigError, RolloutConfig, RunError, first_line
from bupo.rollouts.engine import Decoder, seed_of
from bupo.samples import Sample
from bupo.terminal import library_output
from bupo.types import Prompt, Rollout

_PARTS = {"weights", "kv_cache"}
"""What vLLM holds in GPU memory, by the names that wake_up() knows"""

TESTED = "0.32"
"""The version of vLLM that the tests run"""

SAMPLED_ROWS = "bupo_sampled_rows"
"""Key of vLLM's additional_config: the number of rows of the head that have a token"""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so no weights are sent
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads
    "VLLM_LOGGING_LEVEL": "INFO",  # written to the log file
    "VLLM_NO_USAGE_STATS": "1",
}


def _imported() -> Any:
    """Imports and returns vLLM. Raises ConfigError if it is missing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with library_output(None):
            import vllm
    except ImportError as error:
        package = "vllm" if torch.cuda.is_available() else "vllm-cpu (bupo[vllm])"
        raise ConfigError(f"rollout.engine=vllm needs the package {package}: {error}") from None
    return vllm


def check_version(version: str) -> None:
    """Warns of a version of vLLM that was not tested: engine calls of bupo may have changed."""
    if not version.startswith(f"{TESTED}."):
        warnings.warn(
            f"rollout.engine=vllm: bupo was tested with vLLM {TESTED}, not with {version}; if the "
            "engine fails or sync/logprob_gap is large, install the tested version",
            stacklevel=3,
        )


def check_options(config: RolloutConfig) -> None:
    """Raises ConfigError for an option in rollout.vllm that vLLM does not have, naming the most
    similar one."""
    if not config.vllm:
        return
    with library_output(None):
        known = [f.name for f in dataclasses.fields(_imported().EngineArgs)]
    for key in config.vllm:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"rollout.vllm: vLLM has no argument {key!r}{hint}")


def _refuse_experts(model: str) -> None:
    """Raises ConfigError for a mixture of experts, into which vllm-cpu cannot load new weights: its
    kernel packs the experts once, and weights loaded later stay unpacked. With 0.32.0, log-probs
    were right at the start and 0.07 nats off after every update."""
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    if any((getattr(shape, name, None) or 0) > 1 for name in names):
        raise ConfigError(
            f"rollout.engine=vllm on a CPU cannot load new weights into a mixture of experts "
            f"({shape.model_type}); use rollout.engine=hf, or a GPU"
        )


def _reason(error: Exception) -> str:
    """Returns one line about an error; for one of pydantic, its first entry."""
    details: Any = getattr(error, "errors", None)
    if not callable(details):
        return first_line(error)
    first = details()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


class VllmEngine:
    """A vLLM engine on the devices of this process: the CPU (vllm-cpu) or its GPUs (vllm).

    Prefix caching is on, and the cache is dropped whenever weights change.
    """

    samples_from_nucleus = True

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        config: RolloutConfig,
        max_prompt_tokens: int,
        dtype: str,
        seed: int,
        log: Path | None = None,
    ) -> None:
        """model: folder or hub name of the weights that the engine starts with. log: the file for
        vLLM's output; with None the output is dropped."""
        self._gpu, self._log = torch.cuda.is_available(), log
        vllm = _imported()
        check_version(vllm.__version__)
        check_options(config)
        from transformers import AutoConfig, GenerationConfig

        with library_output(log):  # vLLM imports its parts on first use
            self._parameters, self._config = vllm.SamplingParams, config
        try:
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # no generation_config.json
            eos = AutoConfig.from_pretrained(model).get_text_config(decoder=True).eos_token_id
        self._decoder = Decoder(tokenizer, eos)
        if not self._gpu:
            _refuse_experts(model)
        options = config.vllm_options(self._gpu)
        self._sleeps = bool(options.get("enable_sleep_mode"))
        rows = AutoConfig.from_pretrained(model).get_text_config(decoder=True).vocab_size
        padding: dict[str, Any] = {}
        if rows > self._decoder.vocab:
            padding = {
                "logits_processors": ["bupo.rollouts.vllm_padding:PaddingMask"],
                "additional_config": {SAMPLED_ROWS: self._decoder.vocab},
            }
        try:
            with library_output(log):
                self._llm: Any = vllm.LLM(
                    model=model,
                    runner="generate",  # set, as vLLM would guess it from the architecture
                    dtype=dtype,
                    seed=seed % 2**31,
                    max_model_len=max_prompt_tokens + config.max_new_tokens,
                    logprobs_mode="processed_logprobs",  # after the temperature
                    generation_config="vllm",  # a model's own defaults would change the policy
                    **{"max_num_seqs": config.batch_size} | padding | options,
                )
                # The first call compiles kernels and fails on what this device cannot do.
                warm_up = vllm.SamplingParams(max_tokens=1, detokenize=False)
                self._llm.generate({"prompt_token_ids": [0, 1]}, warm_up, use_tqdm=False)
        except (ValueError, RuntimeError) as error:  # an unknown device or family
            given = f" with rollout.vllm={config.vllm}" if config.vllm else ""
            where = f"; its output is in {log}" if log else ""
            raise ConfigError(
                f"rollout.engine=vllm cannot serve {model}{given}: {_reason(error)}{where}"
            ) from None
        parallel = self._llm.llm_engine.vllm_config.parallel_config
        self._in_process = parallel.distributed_executor_backend == "uni"
        self._asleep: set[str] = set()
        self._sleep()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
    ) -> list[Rollout]:
        self._wake("weights", "kv_cache")
        temperature = self._config.temperature if temperature is None else temperature
        wanted = [(group, p, k) for group, p in enumerate(prompts) for k in range(samples)]
        parameters = [
            self._parameters(
                temperature=temperature,
                top_p=self._config.top_p if temperature else 1.0,
                max_tokens=self._config.max_new_tokens,
                seed=seed_of(seed, group, k) if self._config.deterministic else None,
                stop_token_ids=self._decoder.eos,
                logprobs=0,  # only that of the sampled token
                detokenize=False,
            )
            for group, _, k in wanted
        ]
        outputs = self._run([prompt.token_ids for _, prompt, _ in wanted], parameters, stop)
        rollouts: list[Rollout] = []
        for (group, prompt, _), output in zip(wanted, outputs):
            if output is not None:
                made = output.outputs[0]
                tokens = list(made.token_ids)
                logprobs = [place[t].logprob for t, place in zip(tokens, made.logprobs)]
                rollouts.append(self._decoder.rollout(group, prompt, tokens, logprobs))
        self._sleep()
        return rollouts

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._wake("weights")  # the cache would only take memory
        weights: Iterable[tuple[str, Tensor]] = iter(tensors)
        if not self._in_process:  # an iterator cannot be sent to other processes
            weights = [(name, tensor.cpu()) for name, tensor in weights]
        with self._calling("loading weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.reset_prefix_cache()

    def score(self, samples: Sequence[Sample]) -> list[Tensor]:
        self._wake("weights", "kv_cache")
        # vLLM has to generate one token, so the last token of a full context is left out.
        limit = self._llm.model_config.max_model_len - 1
        parameters = [self._parameters(max_tokens=1, prompt_logprobs=0, detokenize=False)]
        requests = [sample.token_ids[:limit] for sample in samples]
        outputs = self._run(requests, parameters * len(samples))
        self._sleep()
        return [
            torch.tensor(
                [
                    output.prompt_logprobs[position][sample.token_ids[position]].logprob
                    for position in sample.positions
                    if position < limit
                ]
            )
            for sample, output in zip(samples, outputs)
        ]

    def close(self) -> None:
        with library_output(self._log), contextlib.suppress(Exception):  # the process is ending
            self._llm.llm_engine.engine_core.shutdown()

    def _run(
        self,
        prompts: Sequence[list[int]],
        parameters: Sequence[Any],
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """The output of each request, None for those that stop() has left unfinished. vLLM gets all
        of them at once and batches them as sequences end; between its steps stop() is asked."""
        engine, outputs = self._llm.llm_engine, [None] * len(prompts)
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        with self._calling("generating"):
            ids = self._llm.enqueue(requests, list(parameters), use_tqdm=False)
            # Inside, a request has a suffix behind the number that its output has.
            places = {name.partition("-")[0]: place for place, name in enumerate(ids)}
            done = 0
            while engine.has_unfinished_requests():
                if stop():
                    engine.abort_request(ids, internal=True)
                    break
                for output in engine.step():
                    if output.finished:
                        outputs[places[output.request_id]] = output
                        done += 1
                progress.report(done / len(prompts))
        return outputs

    @contextmanager
    def _calling(self, doing: str) -> Iterator[None]:
        """Inside, vLLM's output goes to the log, and any exception becomes a RunError of one line
        whose traceback is in the log."""
        try:
            with library_output(self._log):
                try:
                    yield
                except Exception:
                    traceback.print_exc()
                    raise
        except Exception as error:  # each kernel raises its own kinds
            where = f"; the traceback is in {self._log}" if self._log else ""
            raise RunError(
                f"rollout.engine=vllm failed while {doing}: {_reason(error)}{where}"
            ) from error

    def _sleep(self) -> None:
        """Frees GPU memory for the trainer: moves the weights to the host and drops the cache."""
        if self._sleeps and not self._asleep:
            with self._calling("going to sleep"):
                self._llm.sleep(level=1)
            self._asleep = set(_PARTS)

    def _wake(self, *parts: str) -> None:
        """Takes back the GPU memory of these parts."""
        if tags := [part for part in parts if part in self._asleep]:
            with self._calling("waking up"):
                self._llm.wake_up(tags=tags)
            self._asleep -= set(tags)
