"""What the stages exchange. A leaf: imports nothing of the project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


@dataclass
class RewardReport:
    """Counts beside the rewards."""

    timeouts: int = 0
    errors: int = 0


@dataclass(frozen=True)
class Rates:
    """How fast the parameters below and above a layer are trained, as factors of the learning
    rate; 0 freezes. The head is neither below nor above, unless it is the embedding."""

    boundary: int | None = None
    """Layers 1..boundary and the embeddings are below, the others and the final norm above; None:
    the factors are not used"""
    below: float = 1.0
    above: float = 1.0

    def factor(self, place: int | None) -> float:
        """Of the parameters at a place, as bupo.policy.parameter_layers has them."""
        if self.boundary is None or place is None:
            return 1.0
        return self.below if place <= self.boundary else self.above


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
    length: float
    """Mean response tokens"""
    truncated: float
    """Share of responses cut at max_new_tokens"""

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
        }
        for k, estimate in self.pass_k.items():
            row[f"pass@{k}"], row[f"pass@{k}_se"] = estimate or (None, None)
        return row
