"""The engine that generates responses with vLLM servers: processes on this machine or on others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bupo import progress, ranks
from bupo.config import RolloutConfig, RunError, first_line
from bupo.rollouts.engine import numbered, seed_of
from bupo.rollouts.vllm_options import (
    SCORING,
    arguments,
    check_options,
    decoder_of,
    imported,
    sampling,
)
from bupo.rollouts.vllm_serving import LocalServer, Server, check_server
from bupo.samples import Sample
from bupo.types import Prompt, Rollout

POLL = 0.5
"""Seconds between looks at the stop request while responses are generated"""


class VllmServerEngine:
    """Generates with one vLLM server or several, each of which holds a copy of the weights. Several
    ranks share the servers: each asks for its responses, and rank 0 sends the weights.

    A server batches requests as they arrive, and a batch of another size rounds differently. So the
    same seed gives the same random numbers, but a run is repeated exactly only up to rounding.
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
        """model: folder or hub name of the weights with which a server begins that this engine
        starts. log: the file for the output of that server. load() has to be called before anything
        is generated, because a server may hold any weights."""
        imported(config.engine)
        check_options(config)
        self._config, self._decoder = config, decoder_of(model, tokenizer)
        vocab, gpu = self._decoder.vocab, torch.cuda.is_available()
        given = arguments(model, vocab, config, max_prompt_tokens, dtype, seed, gpu)
        self._dtype, self._limit = getattr(torch, dtype), int(given["max_model_len"])
        self._senders: list[Any] = []
        self._servers = [Server(url) for url in config.servers] or [LocalServer(given, log)]
        try:
            ranks.from_first(lambda: self._connect(given))
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def _connect(self, given: dict[str, Any]) -> None:
        from bupo.rollouts.vllm_transfer import Sender

        backends = [check_server(server, given) for server in self._servers]
        with self._one_line("connecting"):
            for server, backend in zip(self._servers, backends):
                self._senders.append(Sender(server, backend, self._dtype))

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[Rollout]:
        wanted = [(group, p, k) for group, p in numbered(prompts, groups) for k in range(samples)]
        eos = self._decoder.eos
        answers = self._ask(
            [
                {
                    "token_ids": prompt.token_ids,
                    "sampling_params": sampling(
                        self._config, eos, seed_of(seed, group, k), temperature
                    ),
                }
                for group, prompt, k in wanted
            ],
            [group for group, _, _ in wanted],
            stop,
        )
        rollouts: list[Rollout] = []
        for (group, prompt, _), answer in zip(wanted, answers):
            if answer is not None:
                made = answer["choices"][0]
                logprobs = [place["logprob"] for place in made["logprobs"]["content"]]
                rollouts.append(self._decoder.rollout(group, prompt, made["token_ids"], logprobs))
        return rollouts

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        weights = []  # all of them, as a transfer begins with their names and shapes
        for name, tensor in tensors:  # which all ranks gather
            if ranks.is_first():
                # What several GPUs divide may be too large for one, so the host holds it.
                alone = ranks.world() == 1
                weights.append((name, tensor if alone else tensor.to("cpu", self._dtype)))

        def send() -> list[str | None]:
            with self._one_line("loading weights"):
                for sender in self._senders:
                    sender.send(weights)
            return [server.weights for server in self._servers]

        for server, version in zip(self._servers, ranks.from_first(send)):
            server.weights = version

    def score(self, samples: Sequence[Sample]) -> list[Tensor]:
        # One token is generated, so the last token of a full context is left out.
        limit = self._limit - 1
        answers = self._ask(
            [{"token_ids": s.token_ids[:limit], "sampling_params": SCORING} for s in samples],
            range(len(samples)),
        )
        return [
            torch.tensor(
                [
                    answer["prompt_logprobs"][place][str(sample.token_ids[place])]["logprob"]
                    for place in sample.positions
                    if place < limit
                ]
            )
            for sample, answer in zip(samples, answers)
        ]

    def close(self) -> None:
        for sender in self._senders:
            with contextlib.suppress(Exception):  # the server may be gone
                sender.close()
        for server in self._servers:
            server.close()

    def _ask(
        self,
        bodies: Sequence[dict[str, Any]],
        groups: Sequence[int],
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Any]:
        """The answer to each request, None for those that stop() has left unfinished. groups: the
        server depends on the group, so that each prompt is read by one server."""
        return asyncio.run(self._answers(bodies, groups, stop))

    async def _answers(
        self, bodies: Sequence[dict[str, Any]], groups: Sequence[int], stop: Callable[[], bool]
    ) -> list[Any]:
        answers: list[Any] = [None] * len(bodies)
        async with Server.session(at_once=2 * self._config.batch_size) as session:
            places = {
                asyncio.create_task(self._answer(session, group, body)): place
                for place, (group, body) in enumerate(zip(groups, bodies))
            }
            pending = set(places)
            try:
                while pending:
                    done, pending = await asyncio.wait(
                        pending, timeout=POLL, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done:
                        answers[places[task]] = task.result()
                        progress.report(1 - len(pending) / len(bodies))
                    if stop():
                        break
            finally:  # a closed connection makes the server drop its request
                for task in pending:
                    task.cancel()
                await asyncio.gather(*places, return_exceptions=True)
        return answers

    async def _answer(self, session: Any, group: int, body: dict[str, Any]) -> Any:
        server = self._servers[group % len(self._servers)]
        answer = await server.ask(session, "inference/v1/generate", body)
        server.check(answer)
        return answer

    @contextmanager
    def _one_line(self, doing: str) -> Iterator[None]:
        """Inside, an exception becomes a RunError of one line."""
        try:
            yield
        except RunError as error:
            way = "" if "resume" in str(error) else "; start it again, then resume the run"
            raise RunError(f"{error}{way}") from None
        except Exception as error:  # of gloo or NCCL
            raise RunError(
                f"rollout.engine=vllm_server failed while {doing}: {first_line(error)}; start the "
                "servers again, then resume the run"
            ) from error
