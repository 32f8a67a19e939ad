"""What the benchmark runs: the ops of this package, and bare matrix products as the floor.

Others' are in peers.py. An implementation takes a batch, leaves gradients in .grad (those with
three products) and returns its per-token results, for the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from batch import Batch
from torch import Tensor

import bupo.ops as ops

NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}
ONE, THREE = "one bare GEMM", "three bare GEMMs"
POLICY = "policy_loss fwd+bwd"
LOGPROBS, LOGPROBS_FORWARD = "lm_head_logprobs fwd+bwd", "lm_head_logprobs fwd"
SWEEP, SWEEP_GEMM = "lm_head_logprobs fwd, layer sweep", "one bare GEMM, layer sweep"
SWEEP_ROWS = 8192
"""of the bare product, which has to write its logits somewhere"""
POLICY_PORTABLE, FORWARD_PORTABLE = f"{POLICY}, portable", f"{LOGPROBS_FORWARD}, portable"

Outputs = dict[str, Tensor]
"""logprobs and entropy, as far as an implementation gives them"""


@dataclasses.dataclass(frozen=True)
class Implementation:
    name: str
    run: Callable[[Batch], Outputs]
    products: int
    """matrix products of 2NDV flop that its mathematics needs (recomputation not counted)"""
    live: float = 1.0
    """share of the tokens that have a gradient"""
    peer: bool = False
    loss: str = "policy"
    """whose gradient it leaves: the "policy" loss, or plain "cross entropy" over N"""


def live_name(share: float) -> str:
    return POLICY if share == 1 else f"{POLICY}, live {share:g}"


def ratio_loss(batch: Batch, logprobs: Tensor) -> Tensor:
    """The policy loss in torch on top of per-token log-probs, nothing clipped."""
    ratio = (logprobs - batch.old_logprobs).exp()
    return -(batch.token_weights * ratio * batch.advantages).sum()


def policy_loss(batch: Batch) -> Outputs:
    result = ops.policy_loss(**batch.policy(), **NO_CLIP)
    result.loss.backward()
    return {"logprobs": result.logprobs, "entropy": result.entropy}


def logprobs(batch: Batch) -> Outputs:
    result = ops.lm_head_logprobs(*batch.head())
    ratio_loss(batch, result.logprobs).backward()
    return {"logprobs": result.logprobs.detach(), "entropy": result.entropy.detach()}


def logprobs_forward(batch: Batch) -> Outputs:
    with torch.no_grad():
        result = ops.lm_head_logprobs(*batch.head())
    return {"logprobs": result.logprobs, "entropy": result.entropy}


def portable(run: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
    """The same on the path that serves every other GPU."""

    def on_portable(batch: Batch) -> Outputs:
        chosen = ops.build_info()["cuda_kernels"]
        ops.set_cuda_kernels("portable")
        try:
            return run(batch)
        finally:
            ops.set_cuda_kernels(chosen)

    return on_portable


class Gemms:
    """X W^T, dZ W, dZ^T X into memory that is there already; dZ is what the first one wrote."""

    def __init__(self, batch: Batch, rows: int | None = None) -> None:
        x, w = batch.hidden.detach(), batch.weight.detach()
        rows = rows or len(x)
        self.z = torch.empty(rows, len(w), dtype=x.dtype, device=x.device)
        self.dx, self.dw = torch.empty_like(x[:rows]), torch.empty_like(w)

    def three(self, batch: Batch) -> Outputs:
        x, w = batch.hidden.detach(), batch.weight.detach()
        torch.mm(x, w.T, out=self.z)
        torch.mm(self.z, w, out=self.dx)
        torch.mm(self.z.T, x, out=self.dw)
        return {}

    def one(self, batch: Batch) -> Outputs:
        w = batch.weight.detach()
        for x in batch.hidden.detach().split(len(self.z)):
            torch.mm(x, w.T, out=self.z[: len(x)])
        return {}


def on_the_other_path() -> list[Implementation]:
    """On Hopper, what serves every other GPU."""
    return [
        Implementation(POLICY_PORTABLE, portable(policy_loss), 3),
        Implementation(FORWARD_PORTABLE, portable(logprobs_forward), 1),
    ]


def ours(shares: tuple[float, ...]) -> list[Implementation]:
    """The ops of this package; policy_loss once for each share of live tokens."""
    found = [Implementation(live_name(s), policy_loss, 3, live=s) for s in shares]
    return [
        *found,
        Implementation(LOGPROBS_FORWARD, logprobs_forward, 1),
        Implementation(LOGPROBS, logprobs, 3),
    ]
