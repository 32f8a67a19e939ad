"""What the stages of training and evaluation exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from bupo.samples import Sample


def finite_or_none(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


REWARD_TOLERANCE = 1e-6
"""Rewards of a group that differ by no more have no spread: the rest is rounding noise"""


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once; the ids are what the model sees, everywhere."""

    index: int
    """Place among all prompts loaded with it"""
    source: str
    """data_source of the row, or the file's name"""
    text: str
    """After the chat template"""
    token_ids: list[int]
    answer: str
    """Ground truth handed to the reward"""
    file: int = 0
    """Place of its file in data.train"""


@dataclass(frozen=True, eq=False)
class Rollout(Sample):
    """One response to a prompt, from sampling to the update.

    Its counted tokens are those that the policy has sampled. A stage never changes a rollout: it
    returns copies, with another value or with one more stream. The streams, in the order in which
    they appear::

        engine      log-probs by the rollout engine: of the final policy at the sampling temperature
                    (hf: over all rows of its head; vllm: over the rows that it may sample)
        old         log-probs by the policy that the step trains, before its first update
        final       log-probs by the final policy, where a setting needs them of every response
        reference   log-probs by the policy that the run began with, for a KL term
        cost        beta (log pi - log pi_ref), where that is a part of the reward
        value       by the critic, of the state before each token
        return      what the critic learns
        advantage   what the update learns from
        importance  min(pi / pi_engine, cap), the factor of truncated importance sampling
        weight      of the token in the loss of its optimiser update
    """

    prompt: Prompt
    group: int
    """Responses with the same number answer the same prompt of this step"""
    finish_reason: str
    """stop or length"""
    text: str
    """The response, decoded, for the reward and for people"""
    reward: float = 0.0
    """nan: it could not be graded (a timeout, an error, or a reward that is not finite)"""
    penalty: float = 0.0
    """Subtracted from the reward before advantages are computed"""
    dropped: bool = False
    """Excluded from the loss and its denominators"""

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
        """A single response, as an engine makes it. token_ids: with the end-of-sequence token where
        one was sampled; logprobs: of each of them."""
        engine = {"engine": torch.tensor(logprobs, dtype=torch.float32)}
        mask = [False] * len(prompt.token_ids) + [True] * len(token_ids)
        ids = [*prompt.token_ids, *token_ids]
        return cls(ids, mask, prompt, group, finish_reason, text, streams=engine)

    @property
    def response_ids(self) -> list[int]:
        """The counted tokens"""
        return [self.token_ids[place] for place in self.positions]

    @property
    def ungraded(self) -> bool:
        """Whether it has no reward, so that nothing can be learnt from it."""
        return not math.isfinite(self.reward)


@dataclass(frozen=True)
class Grades:
    """What a reward says of some rollouts."""

    rewards: list[float]
    """One for each rollout, in order; nan: it could not be graded"""
    timeouts: int = 0
    """Number of responses whose grading took too long"""
    errors: int = 0
    """Number of responses whose grading failed, or gave None, nan or infinity"""
    first_failure: str = ""
    """What went wrong with the first of these"""

    def with_failures(self, other: Grades | None) -> Grades:
        """These rewards; the failures of an earlier batch are counted too."""
        if other is None:
            return self
        return replace(
            self,
            timeouts=self.timeouts + other.timeouts,
            errors=self.errors + other.errors,
            first_failure=other.first_failure or self.first_failure,
        )


class RolloutEngine(Protocol):
    """Prompts to responses. Token ids in, token ids out."""

    samples_from_nucleus: bool
    """Whether its log-probs are those of the nucleus (rollout.top_p) instead of the whole policy"""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        stop: Callable[[], bool],
        temperature: float | None = None,
    ) -> list[Rollout]:
        """`samples` responses for every prompt from the final policy, grouped by prompt.

        temperature: another one than rollout.temperature; at 0 the likeliest token is taken, and
        log-probs are those at 1. The result is a function of weights, prompts and seed. Returns
        early, with what is there, once stop() is true. Says by progress.report how far it is.
        """
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over weights by their names in the Hugging Face model."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[Tensor] | None:
        """Log-probs of each sample's counted tokens at temperature 1, by the weights that the
        engine holds; it may leave out the last one. None: it has no weights of its own."""
        ...

    def close(self) -> None:
        """Gives memory and processes back."""
        ...


class Reward(Protocol):
    """Responses to rewards."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Grades:
        """The reward of each rollout. Says by progress.report how far it is."""
        ...

    def answers(self, rollouts: Sequence[Rollout]) -> list[str | None] | None:
        """The final answers that a majority vote counts, None for a response without one; None
        instead of the list if this reward knows no final answers."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...


@dataclass(frozen=True)
class Rates:
    """How fast the parameters of each place are trained, as factors of the learning rate; 0
    freezes. A tied head is the embedding."""

    embedding: float = 1.0
    head: float = 1.0
    layers: tuple[tuple[int, float, float], ...] = ()
    """First layer, last layer, factor; the final norm lies above the last layer"""
    others: float = 1.0
    """Of layers and the final norm that no range has"""

    def factor(self, place: int | None) -> float:
        """Of the parameters at a place, as bupo.policy.parameter_layers has them."""
        if place is None:
            return self.head
        if place == 0:
            return self.embedding
        of_layer = (f for first, last, f in self.layers if first <= place <= last)
        return next(of_layer, self.others)


@dataclass(frozen=True)
class Policy:
    """Which policy a step trains, and at which rates."""

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
    """K to (estimate, standard error), None where K > samples"""
    maj: tuple[float, float] | None
    """Majority vote of all samples, None where the reward knows no final answers"""
    length: float
    """Mean response tokens"""
    truncated: float
    """Share of responses cut at max_new_tokens"""
    ungraded: float
    """Share of responses that could not be graded; they count as wrong"""

    def __str__(self) -> str:
        """One line; at most a few figures."""
        passes = "".join(f", Pass@{k} {p[0]:.3f}" for k, p in self.pass_k.items() if p is not None)
        votes = f", maj@{self.samples} {self.maj[0]:.3f}" if self.maj else ""
        lost = f", {self.ungraded:.1%} not graded" if self.ungraded else ""
        average = f"Avg@{self.samples} {self.avg:.3f} ± {self.avg_se:.3f}"
        return f"{self.dataset} {average}{passes}{votes}{lost}"

    def scalars(self) -> dict[str, float]:
        """The figures that curves are drawn of, by name."""
        n = self.samples
        found = {f"avg@{n}": self.avg, "length": self.length, "truncated": self.truncated}
        found |= {f"pass@{k}": p[0] for k, p in self.pass_k.items() if p is not None}
        found |= {f"maj@{n}": self.maj[0]} if self.maj else {}
        return {f"eval/{self.dataset}/{name}": value for name, value in found.items()}

    def row(self) -> dict[str, Any]:
        """As eval.jsonl holds it."""
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
