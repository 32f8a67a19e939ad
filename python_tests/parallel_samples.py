"""The LM-head ops with their vocabulary divided among ranks, against one process: torchrun starts
it as `parallel_samples.py`, and a rank that finds a difference ends with an error."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

import bupo.ops as ops
from bupo import ranks

N, D, V = 13, 6, 37
OF_TOKEN = ("old_logprobs", "advantages", "token_weights")


def head(dtype: torch.dtype, rows: int = V) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(rows, D).double()
    targets = torch.arange(N) * 7 % rows
    targets[3] = -100
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": targets}


def options() -> dict[str, dict[str, Any]]:
    torch.manual_seed(1)
    some = torch.zeros(V, dtype=torch.float64)
    some[::5] = -torch.inf
    first = torch.randn(V).double()
    first[: V // 2 + 1] = -torch.inf  # all rows of a rank, and some targets
    return {
        "plain": {},
        "bias": {"bias": torch.randn(V).double(), "temperature": 0.7},
        "some rows removed": {"bias": some},
        "all rows of a rank removed": {"bias": first},
        "softcap": {"softcap": 3.0, "temperature": torch.rand(N) + 0.5, "bias": some * 0 + 1},
    }


def mine(x: torch.Tensor) -> torch.Tensor:
    """The rows of this rank; the last rank may have none."""
    chunks = x.detach().chunk(dist.get_world_size())
    rank = dist.get_rank()
    return (chunks[rank] if rank < len(chunks) else x.detach()[:0]).clone()


def leaves(given: dict[str, Any], divided: bool, dtype: torch.dtype) -> dict[str, Any]:
    found = dict(given)
    for name in ("hidden", "weight", "bias"):
        if name in given:
            x = given[name].to(dtype)
            x = mine(x) if divided and name != "hidden" else x.clone()
            found[name] = x.requires_grad_()
    return found


def gradients(given: dict[str, Any], divided: bool) -> dict[str, torch.Tensor]:
    """divided: of this rank's rows only. A head without rows has none."""
    found = {}
    for name in ("hidden", "weight", "bias"):
        if name in given:
            x = given[name]
            slope = torch.zeros_like(x) if x.grad is None and not len(x) else x.grad
            found[name] = mine(slope) if divided and name != "hidden" else slope
    return found


def assert_equal(found: Any, expected: Any, what: str, **limits: float) -> None:
    torch.testing.assert_close(
        found, expected, equal_nan=True, msg=lambda text: f"{what}: {text}", **limits
    )


def check_log_probs(given: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    """The sum of all three results, each with a weight of its own, is differentiated."""
    scale = torch.rand(3, N, dtype=torch.float64)

    def run(op: Any, inputs: dict[str, Any], **group: Any) -> Any:
        out = op(**inputs, **group)
        finite = [torch.where(x.isfinite(), x, 0).double() for x in out]
        sum((a * b).sum() for a, b in zip(finite, scale)).backward()  # type: ignore[union-attr]
        return [x.detach() for x in out]

    exact, whole, parts = (
        leaves(given, divided, kind)
        for divided, kind in ((False, torch.float64), (False, dtype), (True, dtype))
    )
    truth = run(ops.reference.lm_head_logprobs, exact)
    plain = run(ops.reference.lm_head_logprobs, whole)
    found = run(ops.lm_head_logprobs, parts, group=dist.group.WORLD)
    for other in ranks.gathered(found):
        assert_equal(other, found, f"{name}: equal on all ranks", rtol=0, atol=0)
    assert_near(found, plain, truth, name)
    slopes = gradients(parts, False), gradients(whole, True), gradients(exact, True)
    assert_near(*(list(each.values()) for each in slopes), name)


def assert_near(found: list[Any], plain: list[Any], truth: list[Any], name: str) -> None:
    """At most twice as far from float64 as plain torch in one process, or near it."""
    for a, b, exact in zip(found, plain, truth, strict=True):
        if a.dtype == torch.float64:
            assert_equal(a, exact, name, rtol=1e-12, atol=1e-12)
            continue
        a, b, exact = (x.double() for x in (a, b, exact))
        assert torch.equal(a.isfinite(), exact.isfinite()), name
        keep = exact.isfinite()
        off, allowed = (a - exact)[keep].abs(), (b - exact)[keep].abs()
        if off.numel():
            limit = 2 * float(allowed.max()) + 4e-7 * float(exact[keep].abs().max())
            assert float(off.max()) <= limit, (name, float(off.max()), limit)


def check_a_confident_token() -> None:
    """The little that the other ranks add keeps all its digits, and so does its gradient."""
    logits = torch.zeros(4, 1)
    logits[0] = 20
    given = {"hidden": torch.ones(1, 1), "weight": logits}
    targets = torch.zeros(1, dtype=torch.long)
    parts, exact = leaves(given, True, torch.float32), leaves(given, False, torch.float64)
    found = ops.lm_head_logprobs(**parts, targets=targets, group=dist.group.WORLD)
    truth = ops.reference.lm_head_logprobs(**exact, targets=targets)
    found.logprobs.sum().backward()
    truth.logprobs.sum().backward()
    ours = [*found, *gradients(parts, False).values()]
    expected = [*truth, *gradients(exact, True).values()]
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_equal(a.double(), b, f"a confident token, {number}", rtol=1e-6, atol=0)


LOSSES: dict[str, dict[str, Any]] = {
    "ppo": {"clip_high": 0.1},
    "dual": {"dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.01, "max_log_ratio": 1.0},
    "cispo": {"loss_type": "cispo", "kl_coef": 0.1, "kl_estimator": "k2"},
    "sequences": {"ratio_level": "sequence", "sequence_ids": torch.arange(N) // 3},
}


def check_policy_loss(given: dict[str, Any], extra: dict[str, Any], name: str) -> None:
    of_token = {
        "old_logprobs": -4 * torch.rand(N),
        "advantages": torch.randn(N),
        "token_weights": torch.rand(N) * (given["targets"] >= 0),
    }
    if extra.get("kl_coef"):
        of_token["ref_logprobs"] = -4 * torch.rand(N)
    whole, parts = (leaves(given, divided, torch.float64) for divided in (False, True))
    one = ops.policy_loss(**whole, **of_token, **extra)
    all_ = ops.policy_loss(**parts, **of_token, **extra, group=dist.group.WORLD)
    one.loss.backward()
    all_.loss.backward()
    one.metrics.pop("live_fraction"), all_.metrics.pop("live_fraction")
    assert_equal(all_, one, name, rtol=1e-10, atol=1e-10)
    assert_equal(gradients(parts, False), gradients(whole, True), name, rtol=1e-10, atol=1e-10)


def check_errors() -> None:
    given = leaves(head(torch.float64), True, torch.float64)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup .* 'x'"):
        ops.lm_head_logprobs(**given, group="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"policy_loss: group must be a torch"):
        ops.policy_loss(**given, **dict.fromkeys(OF_TOKEN, torch.ones(N)), group=3)  # type: ignore[arg-type]
    given["targets"][2] = V
    with pytest.raises(ValueError, match=rf"targets must be in \[0, {V}\) or ignore_index .* {V}"):
        ops.lm_head_logprobs(**given, group=dist.group.WORLD)


if __name__ == "__main__":
    with ranks.joined(minutes=1):
        for name, extra in options().items():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                check_log_probs(head(dtype) | extra, f"{name}, {dtype}", dtype)
        check_log_probs(head(torch.float64, rows=5), "a rank without rows", torch.float64)
        broken = head(torch.float64)
        broken["hidden"][4] = torch.nan
        check_log_probs(broken, "a row with nan", torch.float64)
        for name, extra in LOSSES.items():
            for where, of_head in options().items():
                if "removed" not in where:
                    check_policy_loss(head(torch.float64) | of_head, extra, f"{name}, {where}")
        check_a_confident_token()
        check_errors()
