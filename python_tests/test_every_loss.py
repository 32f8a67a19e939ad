"""Losses of TRL, verl, Liger and their papers, written out from their formulas on logits in float64
and compared with one call of policy_loss each: value, gradients of hidden and weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sample_inputs import head
from torch import Tensor

from bupo import ops

SHAPE = (5, 12)


def arguments() -> dict[str, Tensor]:
    """Five sequences of 3 to 12 tokens, an advantage each, ratios up to e^0.7."""
    given = head("every loss", SHAPE, 16, 60, std=1.0)
    g = torch.Generator().manual_seed(4)
    logp = ops.lm_head_logprobs(**given).logprobs
    lengths = torch.tensor([12, 3, 7, 1, 9])
    noise = 0.35 * torch.randn(SHAPE, generator=g, dtype=torch.float64)
    return given | {
        "old": logp - noise - torch.tensor([0.0, 0.1, -0.2, 0.3, 0.0])[:, None],
        "ref": logp + 0.8 * torch.randn(SHAPE, generator=g, dtype=torch.float64),
        "a": torch.tensor([1.3, -0.7, 0.0, -1.1, 0.4], dtype=torch.float64)[:, None].expand(SHAPE),
        "mask": (torch.arange(12) < lengths[:, None]).double(),
        "importance": torch.rand(SHAPE, generator=g, dtype=torch.float64) + 0.5,
    }


def ratio(logp: Tensor, x: Any) -> Tensor:
    return (logp - x["old"]).exp()


def sequence_ratio(logp: Tensor, x: Any) -> Tensor:
    """[B, 1], the geometric mean over a sequence's tokens."""
    log_ratio = ((logp - x["old"]) * x["mask"]).sum(1, keepdim=True)
    return (log_ratio / x["mask"].sum(1, keepdim=True)).exp()


def clipped(r: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(r * a, r.clamp(1 - low, 1 + high) * a)


def two_sided(logp: Tensor, x: Any, delta: float) -> Tensor:
    """TRL's INTELLECT-2 clipping: the ratio itself is at most delta."""
    r = ratio(logp, x)
    return -torch.min(r.clamp(max=delta) * x["a"], r.clamp(0.8, 1.2) * x["a"])


def sapo(logp: Tensor, x: Any) -> Tensor:
    heat = 1 + 0.05 * (x["a"] <= 0).double()
    return -4 / heat * torch.sigmoid(heat * (ratio(logp, x) - 1)) * x["a"]


def cispo(logp: Tensor, x: Any, low: float, high: float) -> Tensor:
    return -ratio(logp, x).clamp(low, high).detach() * x["a"] * logp


def gspo_token(logp: Tensor, x: Any) -> Tensor:
    s = sequence_ratio(logp, x).detach() * (logp - logp.detach()).exp()
    return clipped(s, x["a"], 0.1, 0.1)


def rloo(logp: Tensor, x: Any) -> Tensor:
    """The ratio of whole responses."""
    r = ((logp - x["old"]) * x["mask"]).sum(1, keepdim=True).exp()
    return clipped(r, x["a"], 0.2, 0.2)


def dppo(logp: Tensor, x: Any, of_kl: bool) -> Tensor:
    p, q = logp.exp(), x["old"].exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    if of_kl:
        valid = torch.where(x["a"] > 0, (kl <= 0.01) | (p <= q), (kl <= 0.01) | (p >= q))
    else:
        valid = torch.where(x["a"] > 0, p - q <= 0.02, p - q >= -0.02)
    assert not valid.all()
    return -ratio(logp, x).clamp(max=1.5).detach() * x["a"] * logp * valid.detach()


def gmpo(logp: Tensor, x: Any) -> Tensor:
    """Geometric-mean policy optimisation: clipped per token, in log space."""
    sign, log_ratio = x["a"].sign(), logp - x["old"]
    part = sign * torch.min(sign * log_ratio, sign * log_ratio.clamp(-0.3, 0.2))
    mean = (part * x["mask"]).sum(1, keepdim=True) / x["mask"].sum(1, keepdim=True)
    return -mean.exp() * x["a"]


def vespo(logp: Tensor, x: Any) -> Tensor:
    w = (((logp - x["old"]) * x["mask"]).sum(1, keepdim=True)).exp().detach()
    k, rate = 2 + (x["a"] < 0).double(), 3 - (x["a"] < 0).double()
    return -(rate.exp() * w**k * (-rate * w).exp()) * x["a"] * logp


def dro(logp: Tensor, x: Any) -> Tensor:
    return -(logp * x["a"] - 0.5 * 0.3 * (logp - x["old"]) ** 2)


def with_kl(estimate: Callable[[Tensor], Tensor], of_ratio: bool = False) -> Any:
    def loss(logp: Tensor, x: Any) -> Tensor:
        kl = estimate(logp - x["ref"]) * (ratio(logp, x) if of_ratio else 1)
        return clipped(ratio(logp, x), x["a"], 0.2, 0.2) + 0.3 * kl

    return loss


def k3(gap: Tensor) -> Tensor:
    return (-gap).exp() + gap - 1


def straight_through(gap: Tensor) -> Tensor:
    return gap**2 / 2 - (gap**2 / 2).detach() + k3(gap).detach()


def of_verl(gap: Tensor) -> Tensor:
    """k3 with bounds of its exponent and its value, here tighter ones."""
    return k3(gap.clamp(-20, 20)).clamp(-0.3, 0.3)


def on_policy(logp: Tensor, x: Any) -> Tensor:
    return clipped((logp - logp.detach()).exp(), x["a"], 0.2, 0.2)


Case = tuple[Callable[[Tensor, Any], Tensor], str, dict[str, Any]]
KL = {"kl_coef": 0.3, "reference": True}
EVERY: dict[str, Case] = {
    "TRL grpo": (
        lambda logp, x: clipped(ratio(logp, x), x["a"], 0.2, 0.28),
        "seq_mean_token_mean",
        {"clip_high": 0.28},
    ),
    "TRL grpo, on-policy": (on_policy, "token_mean", {"on_policy": True}),
    "TRL delta above the range": (
        lambda *y: two_sided(*y, 1.3),
        "token_mean",
        {"dual_clip": 1.3},
    ),
    "TRL delta within the range": (
        lambda *y: two_sided(*y, 1.1),
        "token_mean",
        {"clip_high": 0.1, "dual_clip": 1.2},
    ),
    "TRL cispo, epsilon_high=1.5": (
        lambda *y: cispo(*y, 0, 1.5),
        "token_mean",
        {"loss_type": "cispo", "loss_options": {"ratio_max": 1.5}},
    ),
    "verl cispo": (
        lambda *y: cispo(*y, 0.9, 1.1),
        "token_mean",
        {"loss_type": "cispo", "loss_options": {"ratio_min": 0.9, "ratio_max": 1.1}},
    ),
    "TRL and verl sapo": (sapo, "seq_mean_token_mean", {"loss_type": "sapo"}),
    "GSPO": (
        lambda logp, x: clipped(sequence_ratio(logp, x), x["a"], 0.1, 0.1),
        "seq_mean_token_mean",
        {"ratio_level": "sequence", "clip_low": 0.1, "clip_high": 0.1},
    ),
    "GSPO-token, verl gspo": (
        gspo_token,
        "seq_mean_token_mean",
        {"ratio_level": "sequence_token", "clip_low": 0.1, "clip_high": 0.1},
    ),
    "TRL luspo": (
        lambda logp, x: clipped(sequence_ratio(logp, x), x["a"], 0.2, 0.2),
        "seq_mean_token_sum",
        {"ratio_level": "sequence"},
    ),
    "TRL rloo": (rloo, "seq_mean_token_mean", {"ratio_level": "sequence_sum"}),
    "verl dppo_tv": (
        lambda *y: dppo(*y, of_kl=False),
        "token_mean",
        {
            "loss_type": "dppo_tv",
            "loss_options": {"divergence_low": 0.02, "divergence_high": 0.02, "ratio_max": 1.5},
        },
    ),
    "verl dppo_kl": (
        lambda *y: dppo(*y, of_kl=True),
        "token_mean",
        {
            "loss_type": "dppo_kl",
            "loss_options": {"divergence_low": 0.01, "divergence_high": 0.01, "ratio_max": 1.5},
        },
    ),
    "verl geo_mean": (
        gmpo,
        "seq_mean_token_mean",
        {"loss_type": "gmpo", "loss_options": {"log_clip_low": 0.3, "log_clip_high": 0.2}},
    ),
    "TRL vespo": (vespo, "token_mean", {"loss_type": "vespo"}),
    "verl dro": (dro, "token_mean", {"loss_type": "dro", "loss_options": {"beta": 0.3}}),
    "verl gpg": (
        lambda logp, x: -x["a"] * logp,
        "token_mean",
        {"loss_type": "reinforce", "on_policy": True},
    ),
    "k3 times ratio, TRL use_bias_correction_kl": (
        with_kl(k3, of_ratio=True),
        "token_mean",
        KL | {"kl_times_ratio": True},
    ),
    "verl abs": (with_kl(torch.abs), "token_mean", KL | {"kl_estimator": "abs"}),
    "verl k3+": (with_kl(straight_through), "token_mean", KL | {"kl_estimator": "k3+"}),
    "verl low_var_kl with its bounds": (with_kl(of_verl), "token_mean", KL | {"max_kl": 0.3}),
    "TRL dapo with importance sampling": (
        lambda logp, x: clipped(ratio(logp, x), x["a"], 0.2, 0.2) * x["importance"],
        "token_mean",
        {"importance": True},
    ),
}


@pytest.mark.parametrize("name", EVERY)
def test_one_call_is_the_published_formula(name: str) -> None:
    formula, reduction, options = EVERY[name]
    x, options = arguments(), dict(options)
    weights = ops.token_weights(x["mask"], reduction).double()
    leaves = [x[k].clone().requires_grad_() for k in ("hidden", "weight")]
    logits = leaves[0] @ leaves[1].T
    logp = logits.log_softmax(-1).gather(-1, x["targets"][..., None])[..., 0]
    truth = (formula(logp, x) * weights).sum()
    if options.pop("reference", False):
        options["ref_logprobs"] = x["ref"]
    if options.pop("importance", False):
        options["importance_weights"] = x["importance"]
    old = None if options.pop("on_policy", False) else x["old"]
    given = [x[k].clone().requires_grad_() for k in ("hidden", "weight")]
    found = ops.policy_loss(*given, x["targets"], old, x["a"].contiguous(), weights, **options)
    torch.testing.assert_close(found.loss, truth, rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, given), torch.autograd.grad(truth, leaves), strict=True
    ):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((found.token_losses * weights).sum(), found.loss)
