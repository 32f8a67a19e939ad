"""The ops of this package as the benchmarks run them, and bare matrix products as the floor.

Peers are in peers.py. An implementation takes a batch, leaves gradients in .grad if it has three
products, and returns its per-token results, whose errors are measured.
"""

import dataclasses
from collections.abc import Callable

import torch
from batch import Batch
from torch import Tensor

import bupo.ops as ops

ONE, THREE = "one bare GEMM", "three bare GEMMs"
POLICY = "policy_loss fwd+bwd"
SEQUENCE_RATIO = f"{POLICY}, sequence ratio"
LOGPROBS, LOGPROBS_FORWARD = "lm_head_logprobs fwd+bwd", "lm_head_logprobs fwd"
POLICY_PORTABLE, FORWARD_PORTABLE = f"{POLICY}, portable", f"{LOGPROBS_FORWARD}, portable"
SWEEP, SWEEP_GEMM = "lm_head_logprobs fwd, layer sweep", "one bare GEMM, layer sweep"
SWEEP_ROWS = 8192
"""Rows of one bare product of a sweep on a GPU, which has to write its logits somewhere."""

Outputs = dict[str, Tensor]  # logprobs and entropy, as far as an implementation gives them


@dataclasses.dataclass(frozen=True)
class Implementation:
    name: str
    run: Callable[[Batch], Outputs]
    products: int
    """matrix products of 2NDV flop that its mathematics needs (recomputation not counted)"""
    live: float = 1.0  # share of the tokens that have a gradient
    peer: bool = False
    loss: str = "policy"
    """whose gradient it leaves: the "policy" loss, with a "sequence ratio", or plain "cross
    entropy" over N"""

    @property
    def short_name(self) -> str:
        return self.name.removesuffix(" fwd+bwd").removesuffix(" fwd")


def live_name(share: float) -> str:
    return POLICY if share == 1 else f"{POLICY}, live {share:g}"


def ratio_loss(batch: Batch, logprobs: Tensor) -> Tensor:
    """The policy loss in torch on top of per-token log-probs, without clipping."""
    ratio = (logprobs - batch.old_logprobs).exp()
    return -(batch.token_weights * ratio * batch.advantages).sum()


def policy_loss(batch: Batch) -> Outputs:
    result = ops.policy_loss(**batch.policy(), clip_low=1.0, clip_high=1e9)
    result.loss.backward()
    return {"logprobs": result.logprobs, "entropy": result.entropy}


def sequence_ratio(batch: Batch) -> Outputs:
    """GSPO's loss on sequences of SEQUENCE tokens."""
    result = ops.policy_loss(
        **batch.policy(),
        clip_low=1.0,
        clip_high=1e9,
        ratio_level="sequence",
        sequence_ids=batch.sequence_ids(),
    )
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
    """The same by the kernels that serve every GPU but Hopper."""

    def run_portable(batch: Batch) -> Outputs:
        chosen = ops.build_info()["cuda_kernels"]
        ops.set_cuda_kernels("portable")
        try:
            return run(batch)
        finally:
            ops.set_cuda_kernels(chosen)

    return run_portable


def ours(cuda: bool) -> list[Implementation]:
    """The ops of this package: policy_loss with all tokens live and with shares of them, and on
    Hopper also by the kernels of every other GPU."""
    shares = (1.0, 0.5, 0.25) if cuda else (1.0, 0.25)
    found = [Implementation(live_name(share), policy_loss, 3, live=share) for share in shares]
    found.append(Implementation(SEQUENCE_RATIO, sequence_ratio, 3, loss="sequence ratio"))
    found.append(Implementation(LOGPROBS_FORWARD, logprobs_forward, 1))
    found.append(Implementation(LOGPROBS, logprobs, 3))
    if cuda and torch.cuda.get_device_capability() == (9, 0):
        found.append(Implementation(POLICY_PORTABLE, portable(policy_loss), 3))
        found.append(Implementation(FORWARD_PORTABLE, portable(logprobs_forward), 1))
    return found


class Gemms:
    """X W^T, dZ W and dZ^T X into existing memory; dZ is what the first product wrote."""

    def __init__(self, batch: Batch) -> None:
        x, w = batch.hidden.detach(), batch.weight.detach()
        self.z = torch.empty(len(x), len(w), dtype=x.dtype, device=x.device)
        self.dx, self.dw = torch.empty_like(x), torch.empty_like(w)

    def one(self, batch: Batch) -> Outputs:
        torch.mm(batch.hidden.detach(), batch.weight.detach().T, out=self.z)
        return {}

    def three(self, batch: Batch) -> Outputs:
        self.one(batch)
        torch.mm(self.z, batch.weight.detach(), out=self.dx)
        torch.mm(self.z.T, batch.hidden.detach(), out=self.dw)
        return {}


def entropy_flow_rows(layers: int, tokens: int) -> int:
    """States that a sweep of all internal policies multiplies the head with: in each layer three
    policies, raw and with the final norm, and two inputs; the embedding and the model itself."""
    return (8 * layers + 2) * tokens


def bare_head_products(weight: Tensor, rows: int, rows_at_once: int) -> Outputs:
    """The product of the head [V, D] and random states [rows, D], in parts."""
    x = torch.randn(rows_at_once, weight.shape[1], device=weight.device).to(weight.dtype)
    logits = torch.empty(rows_at_once, len(weight), dtype=weight.dtype, device=weight.device)
    for first in range(0, rows, rows_at_once):
        count = min(rows_at_once, rows - first)
        torch.mm(x[:count], weight.T, out=logits[:count])
    return {}
