"""What the stages exchange. A leaf: imports nothing of the project."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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


@dataclass
class Rollout:
    """One response, as token ids; text is decoded for the reward only."""

    prompt: Prompt
    group: int
    """Responses with the same number answer the same prompt of this step"""
    token_ids: list[int]
    """With the end-of-sequence token when one was sampled"""
    logprobs: list[float]
    """Of the engine: the final policy at the sampling temperature; hf: over all rows of its head,
    vllm: over the rows that it may sample"""
    finish_reason: str
    """stop or length"""
    text: str
    reward: float = 0.0
    """nan: it could not be graded (a timeout, an error, or a reward that is not finite)"""
    penalty: float = 0.0
    """Taken from the reward where advantages are made of it"""
    dropped: bool = False
    """Has no part in the loss and its denominators"""
    ref_logprobs: Tensor | None = None
    """Of the reference under the policy that the step trains, for the KL term"""
    advantages: Tensor | None = None
    """Per token"""
    values: Tensor | None = None
    """By the critic, of the state before each token"""
    returns: Tensor | None = None
    """Per token, what the critic learns"""

    @property
    def ungraded(self) -> bool:
        """It has no reward, so nothing can be learnt from it."""
        return not math.isfinite(self.reward)


@dataclass
class RewardReport:
    """Counts beside the rewards."""

    timeouts: int = 0
    errors: int = 0
    """Responses whose grading failed, or gave None, nan or infinity"""
    first: str = field(default="", compare=False)
    """What went wrong with the first of them"""

    def count(self, kind: str, what: str) -> None:
        """Counts one more failure; kind is `timeouts` or `errors`."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.first = self.first or what

    def add(self, other: RewardReport) -> None:
        """Adds the counts of another batch."""
        self.timeouts += other.timeouts
        self.errors += other.errors
        self.first = self.first or other.first


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
