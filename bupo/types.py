"""The types that the stages of training and evaluation exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from bupo.samples import Sample


def finite_or_none(value: float) -> float | None:
    """Returns the value, or None if it is not finite: JSON has neither nan nor infinity."""
    return value if math.isfinite(value) else None


REWARD_TOLERANCE = 1e-6
"""Rewards of a group that differ by at most this much count as equal: the rest is rounding noise"""


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once; the model is always given exactly these ids."""

    index: int
    """Position among all prompts loaded with it"""
    source: str
    """data_source of the row, or the name of its file"""
    text: str
    """The prompt after the chat template"""
    token_ids: list[int]
    answer: str
    """Ground truth that is passed to the reward"""
    file: int = 0
    """Position of its file in data.train"""


@dataclass(frozen=True, eq=False)
class Rollout(Sample):
    """One response to a prompt, from sampling to the update.

    Its counted tokens are those that the policy has sampled. A stage never changes a rollout: it
    returns copies, with another value or with one more stream. The streams, in the order in which
    they are added:

        engine      log-probs of the final policy at the sampling temperature, by the rollout engine
                    (hf: over all rows of its head; vllm: over the rows that it may sample)
        old         log-probs of the policy that the step trains, before its first update
        final       log-probs of the final policy, if a setting needs them for every response
        reference   log-probs of the policy that the run began with, for a KL term
        cost        beta (log pi - log pi_ref), if this is a part of the reward
        value       the critic's value of the state before each token
        return      the target of the critic
        advantage   the advantage that the update uses
        importance  min(pi / pi_engine, cap), the factor of truncated importance sampling
        weight      the weight of the token in the loss of its optimiser update
    """

    prompt: Prompt
    group: int
    """Responses to the same prompt of a step have the same number"""
    finish_reason: str
    """stop or length"""
    text: str
    """The decoded response, for the reward and for people"""
    reward: float = 0.0
    """nan if it could not be graded (a timeout, an error, or a reward that is not finite)"""
    penalty: float = 0.0
    """Subtracted from the reward before advantages are computed"""
    dropped: bool = False
    """Whether it is excluded from the loss and its denominators"""

    @classmethod
    def from_response(
        cls,
        prompt: Prompt,
        group: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        finish_reason: str,
        text: str,
    ) -> Self:
        """Makes a rollout of one response of an engine. token_ids: the response, including the
        end-of-sequence token if one was sampled. logprobs: one for each of these tokens."""
        engine = {"engine": torch.tensor(logprobs, dtype=torch.float32)}
        mask = [False] * len(prompt.token_ids) + [True] * len(token_ids)
        ids = [*prompt.token_ids, *token_ids]
        return cls(ids, mask, prompt, group, finish_reason, text, streams=engine)

    @property
    def response_ids(self) -> list[int]:
        """The counted tokens."""
        return [self.token_ids[place] for place in self.positions]

    @property
    def ungraded(self) -> bool:
        """Whether it has no reward, so that nothing can be learnt from it."""
        return not math.isfinite(self.reward)


@dataclass(frozen=True)
class Grades:
    """The result of grading some rollouts."""

    rewards: list[float]
    """One for each rollout, in order; nan if it could not be graded"""
    timeouts: int = 0
    """Number of responses whose grading took too long"""
    errors: int = 0
    """Number of responses whose grading failed, or gave None, nan or infinity"""
    first_failure: str = ""
    """Description of the first of these failures"""

    def with_failures(self, other: Grades | None) -> Grades:
        """Returns these rewards, with the failures of an earlier batch included in the counts."""
        if other is None:
            return self
        return replace(
            self,
            timeouts=self.timeouts + other.timeouts,
            errors=self.errors + other.errors,
            first_failure=other.first_failure or self.first_failure,
        )


class RolloutEngine(Protocol):
    """Generates responses to prompts. Both are passed as token ids."""

    samples_from_nucleus: bool
    """Whether its log-probs are those of the nucleus (rollout.top_p) and not of the whole policy"""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
        groups: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Returns `samples` responses of the final policy to every prompt, grouped by prompt.

        groups: the number of each prompt, on which the seeds depend; None: 0, 1, ...
        temperature: replaces rollout.temperature; at 0 the likeliest token is taken, and log-probs
        are those at temperature 1. The result depends only on weights, prompts and seed. Once
        stop() is true, returns early with the responses that it has. Calls progress.report.
        """
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces weights, which are given by their names in the Hugging Face model."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[Tensor] | None:
        """Returns the log-probs of each sample's counted tokens at temperature 1, by the weights
        that the engine holds, perhaps without the last one. Returns None if it shares the trainer's
        weights."""
        ...

    def close(self) -> None:
        """Releases memory and processes."""
        ...


class Reward(Protocol):
    """Assigns rewards to responses."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        """Returns the reward of each rollout. Calls progress.report."""
        ...

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        """Returns the final answers that a majority vote counts, with None for a response without
        one. Returns None instead of the list if this reward does not extract final answers."""
        ...

    def close(self) -> None:
        """Ends everything that it has started."""
        ...


@dataclass(frozen=True)
class Rates:
    """The learning rates of the places in the model, as factors of the base rate; 0 freezes a
    place. A tied head uses the factor of the embedding."""

    embedding: float = 1.0
    head: float = 1.0
    layers: tuple[tuple[int, float, float], ...] = ()
    """First layer, last layer, factor; the final norm lies above the last layer"""
    others: float = 1.0
    """Factor of the layers and the final norm that no range includes"""

    def factor(self, place: int | None) -> float:
        """Returns the factor of the parameters at a place of bupo.policy.parameter_layers."""
        if place is None:
            return self.head
        if place == 0:
            return self.embedding
        of_layer = (f for first, last, f in self.layers if first <= place <= last)
        return next(of_layer, self.others)


@dataclass(frozen=True)
class Policy:
    """The policy that a step trains, and its learning rates."""

    layer: int | None
    """1..L, or None for the final policy"""
    final_norm: bool = False
    rates: Rates = Rates()

    @property
    def phase(self) -> str:
        return "final" if self.layer is None else "internal"


@dataclass
class EvalResult:
    """Avg@n and Pass@K of one data set."""

    dataset: str
    problems: int
    samples: int
    avg: float
    avg_se: float
    pass_k: dict[int, tuple[float, float] | None]
    """K to (estimate, standard error), or to None if K > samples"""
    maj: tuple[float, float] | None
    """Majority vote of all samples; None if the reward does not extract final answers"""
    length: float
    """Mean number of response tokens"""
    truncated: float
    """Share of responses cut at max_new_tokens"""
    ungraded: float
    """Share of responses that could not be graded; they count as wrong"""

    def __str__(self) -> str:
        """Returns one line with the main figures."""
        passes = "".join(f", Pass@{k} {p[0]:.3f}" for k, p in self.pass_k.items() if p is not None)
        votes = f", maj@{self.samples} {self.maj[0]:.3f}" if self.maj else ""
        lost = f", {self.ungraded:.1%} not graded" if self.ungraded else ""
        average = f"Avg@{self.samples} {self.avg:.3f} ± {self.avg_se:.3f}"
        return f"{self.dataset} {average}{passes}{votes}{lost}"

    def scalars(self) -> dict[str, float]:
        """Returns the figures that are plotted as curves, by name."""
        n = self.samples
        found = {f"avg@{n}": self.avg, "length": self.length, "truncated": self.truncated}
        found |= {f"pass@{k}": p[0] for k, p in self.pass_k.items() if p is not None}
        found |= {f"maj@{n}": self.maj[0]} if self.maj else {}
        return {f"eval/{self.dataset}/{name}": value for name, value in found.items()}

    def row(self) -> dict[str, Any]:
        """Returns the result as a row of eval.jsonl."""
        row: dict[str, Any] = {
            "dataset": self.dataset,
            "n": self.problems,
            "k_samples": self.samples,
            "avg": self.avg,
            "avg_se": self.avg_se,
            "length": self.length,
            "truncated": self.truncated,
            "ungraded": self.ungraded,
        }
        row["maj"], row["maj_se"] = self.maj or (None, None)
        for k, estimate in self.pass_k.items():
            row[f"pass@{k}"], row[f"pass@{k}_se"] = estimate or (None, None)
        return row
