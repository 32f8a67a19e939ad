"""Both LM-head ops when they are called wrongly, and what can be set for all calls."""

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from on_device import DEVICE
from ops_samples import RecordBupo, each_op, small
from sample_inputs import (
    OPS,
    Sample,
    objective,
    sample,
)
from torch import Tensor

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "target below 0": (
        ValueError,
        r"targets.flatten\(\)\[1\].*\[0, 150\).*-7",
        {"targets": [3, -7]},
    ),
    "target at V": (
        ValueError,
        r"targets.flatten\(\)\[0\].*\[0, 150\).*150",
        {"targets": [150, 3]},
    ),
    "float targets": (TypeError, "targets.*int64.*float32", {"targets": [1.0, 2.0]}),
    "targets of another shape": (ValueError, r"targets.*\[2\].*\[3\]", {"targets": [1, 2, 3]}),
    "weight of another width": (ValueError, "hidden.*D = 23", {"weight": torch.ones(150, 23)}),
    "weight of three dimensions": (ValueError, "weight", {"weight": torch.ones(2, 150, 24)}),
    "no vocabulary": (ValueError, "weight", {"weight": torch.ones(0, 24)}),
    "no width": (ValueError, "hidden", {"weight": torch.ones(9, 0), "hidden": torch.ones(2, 0)}),
    "weight is a list": (TypeError, "weight", {"weight": [[1.0]]}),
    "hidden is a number": (TypeError, "hidden", {"hidden": 1.0}),
    "bias of another length": (ValueError, r"bias.*\[150\].*149", {"bias": torch.ones(149)}),
    "bias is a list": ((TypeError, ValueError), "bias", {"bias": [0.0] * 150}),
    "temperature 0": (ValueError, "temperature.*positive", {"temperature": 0.0}),
    "temperature nan": (ValueError, "temperature.*positive", {"temperature": math.nan}),
    "temperature tensor 0": (ValueError, "temperature", {"temperature": torch.tensor([1.0, 0.0])}),
    "temperature of another shape": (ValueError, "temperature", {"temperature": torch.ones(3)}),
    "temperature with gradient": (
        ValueError,
        "temperature.*not differentiable",
        {"temperature": torch.ones(2, requires_grad=True)},
    ),
    "temperature is text": (TypeError, "temperature", {"temperature": "1"}),
    "softcap 0": (ValueError, "softcap", {"softcap": 0.0}),
    "softcap below 0": (ValueError, "softcap", {"softcap": -1.0}),
    "softcap is text": (TypeError, "softcap", {"softcap": "30"}),
    "float16": (
        TypeError,
        "float32, float64 or bfloat16.*float16",
        {"hidden": torch.ones(2, 24).half(), "weight": torch.ones(150, 24).half()},
    ),
    "float32 hidden, bfloat16 weight": (
        TypeError,
        "float32.*bfloat16",
        {"weight": torch.ones(150, 24).bfloat16()},
    ),
    "float64 hidden, float32 weight": (
        TypeError,
        "float64",
        {"hidden": torch.ones(2, 24).double()},
    ),
    "integer hidden": (TypeError, "hidden", {"hidden": torch.ones(2, 24).long()}),
    "another device": (
        ValueError,
        f"weight.*{DEVICE}.*meta",
        {"weight": torch.ones(150, 24).to("meta")},
    ),
}


WRONG_POLICY: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "one advantage": (ValueError, r"advantages.*\[2\].*\[1\]", {"advantages": torch.ones(1)}),
    "old_logprobs is a list": (TypeError, "old_logprobs", {"old_logprobs": [0.0, 0.0]}),
    "complex weights": (TypeError, "token_weights", {"token_weights": torch.ones(2) * 1j}),
    "loss_type": (ValueError, "loss_type.*ppo, cispo.*'grpo'", {"loss_type": "grpo"}),
    "kl_estimator": (ValueError, "kl_estimator.*k1, k2, k3", {"kl_estimator": "k4"}),
    "no reference": (ValueError, "ref_logprobs.*kl_coef", {"kl_coef": 0.1}),
    "reinforce with old_logprobs": (
        ValueError,
        "old_logprobs must be None.*reinforce.*float32 tensor",
        {"loss_type": "reinforce"},
    ),
    "no advantages": (TypeError, "advantages must be a float tensor.*None", {"advantages": None}),
    "kl_coef None": (TypeError, "kl_coef must be a number, got NoneType", {"kl_coef": None}),
    "a long list": (
        TypeError,
        r"advantages must be a float tensor, got list \[0, 0, 0, .{,80}$",
        {"advantages": [0] * 10**5},
    ),
    "an option of another loss": (
        ValueError,
        "clip_high belongs to loss_type 'ppo', got 5.0 for 'cispo' takes loss_options ratio_min",
        {"loss_type": "cispo", "clip_high": 5.0, "old_logprobs": None},
    ),
    "loss_options": (
        ValueError,
        "loss_options has an unknown name 'ratio'; 'cispo' takes loss_options ratio_min, ratio_max",
        {"loss_type": "cispo", "loss_options": {"ratio": 5.0}},
    ),
    "loss_options of ppo": (ValueError, "no loss_options", {"loss_options": {"clip_low": 0.1}}),
    "loss_options are text": (TypeError, "loss_options must be a mapping", {"loss_options": "a"}),
    "beta": (
        ValueError,
        "beta must be positive",
        {"loss_type": "dro", "loss_options": {"beta": 0}},
    ),
    "ratio_level": (ValueError, "ratio_level.*token, sequence.*'seq'", {"ratio_level": "seq"}),
    "ratio_level of the loss": (
        ValueError,
        "ratio_level must be one of token for loss_type 'dro', got 'sequence'",
        {"loss_type": "dro", "ratio_level": "sequence"},
    ),
    "which sequences": (
        ValueError,
        r"sequence_ids are needed for ratio_level 'sequence' unless.*targets \[2\]",
        {"ratio_level": "sequence"},
    ),
    "sequences of tokens": (
        ValueError,
        "sequence_ids play no part with ratio_level 'token'",
        {"sequence_ids": torch.zeros(2, dtype=torch.long)},
    ),
    "sequence_ids are floats": (
        TypeError,
        "sequence_ids must be an int64 tensor, got float32",
        {"ratio_level": "sequence", "sequence_ids": torch.zeros(2)},
    ),
    "one sequence id": (
        ValueError,
        r"sequence_ids must have the shape of targets \[2\]",
        {"ratio_level": "sequence", "sequence_ids": torch.zeros(1, dtype=torch.long)},
    ),
    "max_kl": (ValueError, "max_kl must be at least 0 or None, got -1", {"max_kl": -1}),
    "kl_times_ratio": (TypeError, "kl_times_ratio must be a bool", {"kl_times_ratio": 1.0}),
    "clip_low": (ValueError, "clip_low.*-0.1", {"clip_low": -0.1}),
    "clip_high": (ValueError, "clip_high.*nan", {"clip_high": math.nan}),
    "clip_high is text": (TypeError, "clip_high", {"clip_high": "0.2"}),
    "dual_clip": (ValueError, "dual_clip.*0.5", {"dual_clip": 0.5}),
    "entropy_coef": (ValueError, "entropy_coef", {"entropy_coef": math.inf}),
}


@pytest.mark.parametrize(
    "name", ["old_logprobs", "advantages", "token_weights", "ref_logprobs", "importance_weights"]
)
def test_what_is_not_differentiable_is_refused(name: str) -> None:
    """Rather than trained by nothing, as a learned baseline in the advantages would be."""
    call = sample("policy_loss", "every term").to(torch.float32)
    learned = call.arguments[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"policy_loss: {name} is not differentiable, pass {name}"):
        call.call(**{name: learned})
    with torch.no_grad():
        call.call(**{name: learned})


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, torch.tensor, lambda x: torch.tensor(x).bfloat16()]
)
def test_numbers_may_be_of_numpy_and_torch(kind: Any) -> None:
    call = sample("policy_loss", "every term").to(torch.float32)
    numbers = dict(temperature=0.75, softcap=5.0, clip_low=0.25, kl_coef=0.5, entropy_coef=0.125)
    given = {name: kind(x) for name, x in numbers.items()}
    assert torch.equal(call.call(**given).loss, call.call(**numbers).loss)


@pytest.mark.parametrize("change", [{"temperature": 1e-39}, {"softcap": 1e300}])
def test_numbers_that_float32_cannot_divide_by(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}.* must be positive and finite"):
        small("lm_head_logprobs").to(torch.float32).call(**change)


@pytest.mark.parametrize("index", [1.5, "x", True, None])
def test_ignore_index_must_be_an_integer(index: Any) -> None:
    with pytest.raises(
        TypeError, match=r"bupo\.ops\.lm_head_logprobs: ignore_index must be an int"
    ):
        small("lm_head_logprobs").call(ignore_index=index)


@pytest.mark.parametrize(
    ("op", "case"),
    [(op, name) for op in OPS for name in WRONG] + [(OPS[1], n) for n in WRONG_POLICY],
)
def test_errors_name_the_op_and_the_argument(op: str, case: str) -> None:
    kind, message, changes = (WRONG | WRONG_POLICY)[case]
    arguments: dict[str, Any] = {
        "hidden": torch.ones(2, 24),
        "weight": torch.ones(150, 24),
        "targets": torch.tensor([1, 2]),
    }
    if op == "policy_loss":
        names = ("old_logprobs", "advantages", "token_weights")
        arguments |= {name: torch.ones(2) for name in names}
    if isinstance(changes.get("targets"), list):
        changes = {"targets": torch.tensor(changes["targets"])}
    with pytest.raises(kind, match=rf"bupo\.ops\.{op}: .*{message}"):
        getattr(ops, op)(**arguments | changes)


def full_call(op: str) -> Sample:
    """Every tensor argument given."""
    temperature = torch.full((2, 45), 0.7, dtype=torch.float64)
    call = sample("policy_loss", "every head option").but(temperature=temperature)
    if op == "policy_loss":
        importance = torch.ones(2, 45, dtype=torch.float64)
        return call.but(importance_weights=importance).to(torch.float32)
    names = ("hidden", "weight", "targets", "bias", "temperature")
    arguments = {name: call.arguments[name] for name in names}
    return Sample("full", op, arguments).to(torch.float32)


@each_op
def test_operators_refuse_tensors_that_do_not_fit(op: str) -> None:
    """Called directly, past the Python checks: an error, never a read beyond the end."""
    call = full_call(op)
    # torch's stable interface keeps the type of an error up to 2.14.
    kind = RuntimeError if torch.__version__ >= "2.15" else ValueError
    with RecordBupo() as record:
        objective(call.call(**call.leaves())).backward()
    count = 0
    for func, args in record.calls:
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        func(*args)
        for i, x in enumerate(args):
            if not isinstance(x, Tensor):
                continue
            other = x.int() if x.dtype == torch.int64 else x.double()
            shorter, strided = x[:-1], torch.stack([x, x], -1)[..., 0]
            if not x.numel():  # what the CPU keeps for its backward
                shorter = strided = x.new_zeros(1)
            for wrong in (shorter, x[..., None], other, strided):
                with pytest.raises(kind, match=rf"bupo\.ops\.{op}"):
                    func(*args[:i], wrong, *args[i + 1 :])
                count += 1
    assert count == 4 * (10 if op == "policy_loss" else 5 + 9)


@each_op
def test_autocast_to_float16_is_refused(op: str) -> None:
    call = small(op)
    with (
        torch.autocast(DEVICE, torch.float16),
        pytest.raises(TypeError, match=r"bfloat16.*float16"),
    ):
        call.call()


def test_excluded_targets_may_be_out_of_range() -> None:
    call = small("lm_head_logprobs")
    targets = call.arguments["targets"].clone()
    targets[0, :5] = -(10**12)
    got = call.call(targets=targets, ignore_index=-(10**12))
    assert not got.logprobs[0, :5].any()
    assert torch.equal(got.logprobs[1], call.call().logprobs[1])


def test_workspace_budget() -> None:
    before = ops.build_info()["workspace_bytes"]
    for size in (2**28, None):
        ops.set_workspace_bytes(size)
        assert ops.build_info()["workspace_bytes"] == (size or 0)
    ops.set_workspace_bytes(before or None)
    for wrong, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="set_workspace_bytes: size must be"):
            ops.set_workspace_bytes(wrong)


def test_choice_of_kernels() -> None:
    assert ops.build_info()["cuda_kernels"] == "auto"
    for name in (*CUDA_KERNELS[1:], "auto"):
        ops.set_cuda_kernels(name)
        assert ops.build_info()["cuda_kernels"] == name
    with pytest.raises(ValueError, match=r"set_cuda_kernels: name must be one of auto.*got 'sm80'"):
        ops.set_cuda_kernels("sm80")


@pytest.mark.parametrize("op", OPS)
def test_gradients_end_the_graph(op: str) -> None:
    """What torch.autograd.grad returns holds on to nothing."""
    call = small(op)
    leaves = call.leaves()
    result = call.call(**leaves)
    total = result.loss if op == "policy_loss" else result.logprobs.sum()
    for gradient in torch.autograd.grad(total, list(leaves.values())):
        assert not gradient.requires_grad and gradient.grad_fn is None


@pytest.mark.parametrize("op", OPS)
def test_out_of_memory_is_torch_s_own_error(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The extension can only say it in words."""

    def fail(*_: object) -> None:
        raise RuntimeError("bupo.ops: out of memory for a tensor of shape [5], type Byte: none")

    call = small(op)
    monkeypatch.setattr(torch.ops.bupo, op, fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory .* of shape .5., type Byte"):
        call.call()


def test_build_info() -> None:
    info = ops.build_info()
    assert {"version", "cuda", "archs", "torch_target", "devices", "cpu_products"} <= info.keys()
    assert "cpu" in info["devices"]
    assert info["cuda"] in ("OFF", "CHECK", "ON")
    forced = os.environ.get("BUPO_CPU_PRODUCTS") == "library"
    assert info["cpu_products"].keys() == {"float32", "bfloat16"}
    assert set(info["cpu_products"].values()) <= ({"library"} if forced else {"library", "block"})
    assert info["cpu_vectors"] in (128, 256, 512)
    assert info["cpu_vectors"] <= int(os.environ.get("BUPO_CPU_VECTORS", 512))


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("lm_head_logprobs", name) for name in ("hidden", "weight", "bias")),
        *(("policy_loss", name) for name in ("hidden", "weight", "bias", "advantages")),
    ],
)
def test_forward_mode_is_refused_not_zero(op: str, name: str) -> None:
    """torch would answer 0 without a word; the reference has the derivative."""
    arguments = dict(sample(op, "bias").arguments)
    primal = arguments.pop(name)

    def first(module: Any, x: Tensor) -> Tensor:
        return getattr(module, op)(**arguments | {name: x})[0].sum()

    tangent = torch.linspace(0, 1, primal.numel(), dtype=primal.dtype).view_as(primal)
    with pytest.raises(NotImplementedError, match=f"bupo.ops.{op}: {name} has a forward-mode"):
        torch.func.jvp(lambda x: first(ops, x), (primal,), (tangent,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="which is not supported: use reverse"),
    ):
        first(ops, torch.autograd.forward_ad.make_dual(primal, tangent))
    if op == "lm_head_logprobs":
        _, derivative = torch.func.jvp(lambda x: first(ops.reference, x), (primal,), (tangent,))
        assert derivative.abs() > 1e-6
