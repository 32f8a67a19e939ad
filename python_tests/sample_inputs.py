"""What the tests of the LM-head ops share: samples, the float64 truth, the three-way comparison.

``sample_inputs(op)`` feeds values, gradients, opcheck and the layout tests. ``check_three_way``
runs the op, plain torch in the same dtype (bupo.ops.reference) and the truth (the reference in
float64, on the same rounded inputs).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from on_device import DEVICE, OnDevice
from torch import Tensor
from torch.overrides import TorchFunctionMode

import bupo.ops as ops

EMULATED = os.environ.get("BUPO_EMULATED")
"""The library with the CUDA sources compiled for the host (test_cuda_emulated.py sets it): the same
tests then run that code in place of the CPU operators."""
if EMULATED:
    torch.ops.load_library(EMULATED)
    library = ctypes.CDLL(EMULATED)
    ops.set_workspace_bytes(int(os.environ["BUPO_WORKSPACE"]))
    library.emulator_capability(int(os.environ["BUPO_CAPABILITY"]))

if EMULATED:
    HOPPER = os.environ["BUPO_CAPABILITY"] == "90"
else:
    HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
BFLOAT16_ROUNDINGS = 2 if HOPPER else 1
"""Of an entry of dz: the Hopper path rounds its exponential, and then dz or x times its scale."""

if "BUPO_TEST_DEVICE" in os.environ:
    OnDevice(DEVICE).__enter__()  # until the process ends: samples are made at import

OPS = ("lm_head_logprobs", "policy_loss")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
if EMULATED or DEVICE == "cuda":
    DTYPES = (torch.float32, torch.bfloat16)
THREE_WAY_DTYPES = (*DTYPES, torch.float16) if DEVICE == "cuda" else DTYPES
"""float16 has no room for the hand-made numbers of single tests, but for most samples"""
DIFFERENTIABLE = ("hidden", "weight", "bias")

# Our error may be twice plain torch's. Where plain torch is exact by luck (one product, a sum of
# one term, a tie) that alone would demand an exact result, so a floor is added: this many ulps of
# the absolute sum that the result is rounded from. Four: two of exp (csrc/cpu/vector_math.h), one
# of the term, one of the result. No order of operations avoids them.
FLOOR_ULPS = 4.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-token tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of an op: keyword arguments, floating ones in float64 until ``to`` rounds them."""

    name: str
    op: str
    arguments: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Sample:
        """hidden, weight, bias in ``dtype``; per-token tensors in the accumulator's type."""
        per_token = accumulator(dtype)

        def cast(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.to(dtype if name in DIFFERENTIABLE else per_token)

        cast_arguments = {name: cast(name, x) for name, x in self.arguments.items()}
        return dataclasses.replace(self, arguments=cast_arguments)

    def but(self, **changes: Any) -> Sample:
        """The same call with other arguments."""
        return dataclasses.replace(self, arguments=self.arguments | changes)

    def call(self, module: Any = ops, **changes: Any) -> Any:
        """The op of ``bupo.ops`` or of another module, e.g. ``bupo.ops.reference``."""
        return getattr(module, self.op)(**self.arguments | changes)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh differentiable copies of hidden, weight and (where given) bias."""
        given = {k: self.arguments.get(k) for k in DIFFERENTIABLE}
        return {k: x.detach().clone().requires_grad_() for k, x in given.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one call, its gradients under the names "d hidden", "d weight", "d bias"."""

    results: dict[str, Tensor]
    logits: Tensor | None = None
    """[N, V], what F.linear returned (reference only)"""
    d_logits: Tensor | None = None
    """[N, V], gradient of the objective in them"""
    token_loss: Tensor | None = None
    """[N], policy_loss before the weights (reference only)"""


class _KeepLogits(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func is F.linear:
            self.logits = out
        return out


def objective(result: Any) -> Tensor:
    """The scalar to differentiate: the loss, or a fixed combination of the outputs."""
    if isinstance(result, ops.PolicyLoss):
        return result.loss
    index = torch.arange(
        result.logprobs.numel(), device=result.logprobs.device, dtype=torch.float64
    )
    index = index.reshape(result.logprobs.shape)
    upstream = [torch.cos((k + 0.7) * (index + 1)) for k in range(3)]
    return sum((g.to(x.dtype) * x).sum() for g, x in zip(upstream, result, strict=True))


def evaluate(module: Any, sample: Sample) -> Evaluation:
    """Outputs, metrics and gradients of one call."""
    leaves = sample.leaves()
    weights = sample.arguments.get("token_weights")
    extra = {}
    if weights is not None and module is not ops:
        extra = {"token_weights": weights.detach().clone().requires_grad_()}
    with _KeepLogits() as mode:
        result = sample.call(module, **leaves, **extra)
    logits = getattr(mode, "logits", None)
    inputs = [*leaves.values(), *extra.values(), *([] if logits is None else [logits])]
    grads = list(torch.autograd.grad(objective(result), inputs))
    results = {k: x for k, x in result._asdict().items() if isinstance(x, Tensor)}
    results |= getattr(result, "metrics", {})
    results |= {f"d {name}": grads.pop(0) for name in leaves}
    results = {name: x.detach() for name, x in results.items()}
    token_loss = grads.pop(0) if extra else None
    logits = logits if logits is None else logits.detach()
    return Evaluation(results, logits, grads[0] if grads else None, token_loss)


def _magnitudes(truth: Evaluation, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """Per result, the absolute sum of the terms that it is rounded from.

    For a gradient these are products of dz; a logit z is known to its own ulp at best, which moves
    dz by z ulps of the accumulator. In float64 the truth rounds like the op, so its roundings count
    as well, and in rows of every size.
    """
    a = sample.arguments
    width, vocab = a["weight"].shape[1], a["weight"].shape[0]
    rows, shape = a["hidden"].reshape(-1, width), a["targets"].shape
    temperature = torch.as_tensor(a.get("temperature", 1.0), dtype=torch.float64).expand(shape)
    z = truth.logits.reshape(-1, vocab)
    z = z.masked_fill(~z.isfinite(), 0).abs().clamp(max=a.get("softcap", math.inf)).amax(-1)
    z = z / temperature.reshape(-1)
    dz = truth.d_logits.abs().reshape(-1, vocab)
    found = {name: z.reshape(shape) for name in ("logprobs", "entropy", "logsumexp")}
    gradients = {
        "d hidden": (dz @ a["weight"].abs()).reshape(a["hidden"].shape),
        "d weight": dz.T @ rows.abs(),
        "d bias": dz.sum(0),
    }
    highest = z.max() if len(z) else z.sum()
    if sample.op == "policy_loss":
        keep = a["token_weights"] != 0
        terms = (a["token_weights"] * truth.token_loss).where(keep, 0).abs().sum()
        found = dict.fromkeys(truth.results, 1 + highest) | found
        found["loss"] = terms + (dz.sum(-1) * z).sum()
        found["token_losses"] = (1 + truth.results["token_losses"].abs()) * (1 + highest)
    ulps = torch.finfo(accumulator(dtype)).eps / torch.finfo(dtype).eps
    found |= {name: (1 + highest * ulps) * x for name, x in gradients.items()}
    if dtype == torch.float64:
        found = {name: 2 * x.amax() if x.numel() else x for name, x in found.items()}
    return found


def check_three_way(sample: Sample, dtype: torch.dtype) -> None:
    """Every result of the op is as near the truth as plain torch in ``dtype`` (see the next)."""
    rounded = sample.to(dtype)
    for name, x in rounded.arguments.items():
        if isinstance(x, Tensor) and bool((x.isinf() & sample.arguments[name].isfinite()).any()):
            pytest.skip(f"{dtype} does not hold the values of {name}")
    truth = evaluate(ops.reference, rounded.to(torch.float64))
    plain = evaluate(ops.reference, rounded)
    ours = evaluate(ops, rounded)
    assert ours.results.keys() == truth.results.keys()
    magnitudes = _magnitudes(truth, rounded.to(torch.float64), dtype)
    for name, result in ours.results.items():
        label = f"{sample.op}[{sample.name}, {dtype}] {name}"
        assert_near_truth(label, result, plain.results[name], truth.results[name], magnitudes[name])


def assert_near_truth(
    label: str, ours: Tensor, plain: Tensor, truth: Tensor, magnitude: Tensor
) -> None:
    """Largest error of ours <= 2 * largest error of plain torch + FLOOR_ULPS * eps.

    Errors are in units of ``magnitude``; for a matrix the largest of the row, so that rows of small
    numbers (most of dW) count as much as rows of large ones, but the median row's at least. nan and
    infinities must be in the same places as in the truth. The message shows the worst element.
    """
    assert ours.shape == truth.shape and ours.dtype == plain.dtype, (label, ours.shape, ours.dtype)
    if ours.numel() == 0:
        return
    unit = magnitude.expand(truth.shape)
    if truth.dim() > 1:
        unit = unit.amax(-1, keepdim=True).clamp(min=unit.amax(-1).median()).expand(truth.shape)

    def error_of(x: Tensor) -> Tensor:
        x, y = x.double(), truth.double()
        same = x.eq(y) | (x.isnan() & y.isnan())
        error = torch.where(same, 0, ((x - y) / unit).abs())
        return error.nan_to_num(math.inf, math.inf)

    error, peer_error = error_of(ours), error_of(plain)
    allowed = 2 * float(peer_error.max()) + FLOOR_ULPS * torch.finfo(ours.dtype).eps
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), truth.shape))
    assert error[index] < math.inf and error[index] <= allowed, (
        f"{label}: worst at {list(index)}: ours {ours[index]:.9g}, plain torch {plain[index]:.9g}, "
        f"truth {truth[index]:.9g}. In units of {unit[index]:.3g}: error {error[index]:.3g} is "
        f"over {allowed:.3g}, twice plain torch's largest {peer_error.max():.3g} plus the floor"
    )


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()))


def head(
    name: str, shape: tuple[int, ...], width: int, vocab: int, std: float = 4.0
) -> dict[str, Tensor]:
    """hidden, weight and targets whose logits have this standard deviation.

    A third of the targets are the likeliest entry. Values are exact in bfloat16, so that every
    dtype computes the same function.
    """
    g = _generator(name)
    hidden = torch.randn(*shape, width, dtype=torch.float64, generator=g).bfloat16().double()
    weight = torch.randn(vocab, width, dtype=torch.float64, generator=g) * (std / width**0.5)
    weight = weight.bfloat16().double()
    targets = torch.randint(vocab, shape, generator=g)
    planted = torch.rand(shape, generator=g) < 1 / 3
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.where(planted, (hidden @ weight.T).argmax(-1), targets),
    }


def with_constant(arguments: dict[str, Any], offset: float) -> dict[str, Any]:
    """The same logits plus ``offset``, from one more hidden direction that is constant."""
    hidden, weight = (F.pad(arguments[name], (0, 8)) for name in ("hidden", "weight"))
    hidden[..., -1], weight[..., -1] = 1, offset
    return arguments | {"hidden": hidden, "weight": weight}


def exact_logits(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """hidden and weight whose product is exactly ``logits`` [N, V], in any dtype that holds them.

    hidden is the identity, so the gradient of weight is dz.T; zeros fill both up to a width that
    Hopper's path serves.
    """
    hidden, weight = torch.eye(len(logits), dtype=torch.float64), logits.double().T.contiguous()
    padding = (0, -len(logits) % 8)
    return {
        "hidden": F.pad(hidden, padding),
        "weight": F.pad(weight, padding),
        "targets": targets,
    }


def _shapes() -> dict[str, dict[str, Any]]:
    return {
        "7x8x7": head("7x8x7", (7,), 8, 7),
        "one entry": head("one entry", (7,), 8, 1),
        "one token, no dimension": head("no dimension", (), 64, 513),
        "one token": head("one token", (1,), 64, 513),
        "no token": head("no token", (0,), 8, 7),
        "batch of none": head("batch of none", (3, 0), 8, 7),
        "batch 3x43": head("batch", (3, 43), 136, 513),
        "127 rows, odd width": head("odd", (127,), 3, 130),
        "width 1": head("width 1", (41,), 1, 33),
        "width 1000": head("width 1000", (9,), 1000, 70),
        "1030 rows": head("1030 rows", (1030,), 8, 97),
        "two buffers": head("two buffers", (2200,), 8, 33),
        "vocabulary 32003": head("vocabulary 32003", (16,), 8, 32003),
    }


def _numbers() -> dict[str, dict[str, Any]]:
    base = head("numbers", (33,), 24, 150)
    g = _generator("numbers")
    minus_inf = torch.zeros(150, dtype=torch.float64)
    minus_inf[::3] = -math.inf
    allowed = base | {"targets": base["targets"] // 3 * 3 + 1, "bias": minus_inf}
    tiles = head("tiles", (30,), 24, 1600)
    blocks = torch.zeros(1600, dtype=torch.float64)
    blocks[:512] = blocks[1024:1536] = -math.inf
    tiles |= {"targets": 512 + tiles["targets"] % 512, "bias": blocks}
    alone = head("alone", (9,), 24, 513)
    alone |= {"targets": torch.full((9,), 512)}
    apart = torch.randint(-3, 4, (6, 1100), generator=g).double()
    apart[:3] += (torch.arange(1100) // 512 - 1) * 8192.0
    apart[3:] -= (torch.arange(1100) // 512 - 1) * 8192.0
    steps = torch.randint(-9, 10, (12, 40), generator=g) * 8192.0
    far = torch.randint(-3, 4, (12, 40), generator=g).double()
    far[:, 5] = -208.0  # e^-208 is 0 in float32
    return {
        "logits near -200": with_constant(base, -200.0),
        "offset 1e4": with_constant(base, 10048.0),
        "offset 1e4 by bias": base | {"bias": torch.full((150,), 9984.0, dtype=torch.float64)},
        "beyond float16": with_constant(base, 70144.0),
        "steps beyond float16": exact_logits(steps, torch.arange(12)),
        "tiles far apart": exact_logits(apart, torch.tensor([1, 600, 1090] * 2)),
        "unlikely targets": exact_logits(far, torch.full((12,), 5)),
        "masked vocabulary": allowed,
        "masked tiles": tiles,
        "target alone in its tile": alone,
        "masked vocabulary, softcap": allowed | {"softcap": 8.0},
    }


def _options() -> dict[str, dict[str, Any]]:
    base = head("options", (2, 25), 24, 150)
    g = _generator("options")
    temperature = torch.rand(2, 25, dtype=torch.float64, generator=g) + 0.5
    bias = {"bias": torch.randn(150, dtype=torch.float64, generator=g).bfloat16().double()}
    return {
        "bias": base | bias,
        "temperature": base | {"temperature": 0.7},
        "temperature per token": base | {"temperature": temperature},
        "temperature per sequence": base | {"temperature": temperature[:, :1]},
        "softcap": base | {"softcap": 5.0},
        "everything": base | bias | {"temperature": temperature, "softcap": 5.0},
    }


def with_policy(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds old log-probs (ratios well inside, at 1, and well past the clip range), A and weights.

    No ratio is near an edge: there the choice of branch would hang on the last bit. Edges have
    tests of their own with exact ratios.
    """
    g = _generator(name)
    with torch.no_grad():
        logprobs = ops.reference.lm_head_logprobs(**arguments).logprobs
    shape = arguments["targets"].shape

    def pick(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[
            torch.randint(len(values), shape, generator=g)
        ]

    log_ratio = pick(-0.6, -0.1, 0.0, 0.07, 0.6)
    token_weights = torch.rand(shape, dtype=torch.float64, generator=g) + 0.25
    return arguments | {
        "old_logprobs": logprobs - log_ratio,
        "advantages": pick(-1.5, -0.4, 0.0, 0.5, 1.25),
        "token_weights": token_weights * pick(0, 1, 1, 1, 1) / max(logprobs.numel(), 1),
    }


def _settings() -> dict[str, dict[str, Any]]:
    base = with_policy("settings", head("settings", (2, 45), 24, 150))
    g = _generator("settings")
    logprobs = ops.reference.lm_head_logprobs(
        base["hidden"], base["weight"], base["targets"]
    ).logprobs
    shape = logprobs.shape
    ref = logprobs + 0.5 * torch.randn(shape, dtype=torch.float64, generator=g)
    importance = {"importance_weights": torch.rand(shape, dtype=torch.float64, generator=g) * 2}
    bias = {"bias": torch.randn(150, dtype=torch.float64, generator=g).bfloat16().double()}
    kl = {"ref_logprobs": ref, "kl_coef": 0.3}
    head_options = bias | {"temperature": 0.7, "softcap": 5.0}
    cispo = {"loss_type": "cispo", "loss_options": {"ratio_max": 1.2}}
    choices: dict[str, dict[str, Any]] = {
        "clip higher": {"clip_low": 0.2, "clip_high": 0.28},
        "dual clip": {"dual_clip": 1.5},
        "bounded ratio": {"max_log_ratio": 0.0937},
        "bounded ratio, dual clip": {"max_log_ratio": 0.3, "dual_clip": 1.1},
        "bounded ratio, cispo": cispo | {"max_log_ratio": 0.0937},
        "cispo": cispo,
        "cispo, two bounds": cispo | {"loss_options": {"ratio_min": 0.8, "ratio_max": 1.2}},
        "k1": kl | {"kl_estimator": "k1"},
        "k2": kl | {"kl_estimator": "k2"},
        "k3": kl | {"kl_estimator": "k3"},
        "entropy bonus": {"entropy_coef": 0.1},
        "entropy penalty": {"entropy_coef": -0.1},
        "importance weights": importance,
        "every term": kl | importance | {"dual_clip": 1.5, "entropy_coef": 0.1},
        "every term, cispo": kl | importance | cispo | {"entropy_coef": 0.1},
        "on-policy": {"old_logprobs": None},
        "on-policy, cispo": cispo | {"old_logprobs": None},
        "on-policy, every term": kl | importance | {"old_logprobs": None, "entropy_coef": 0.1},
        "reinforce": {"old_logprobs": None, "loss_type": "reinforce"},
        "reinforce, every term": kl
        | importance
        | {"old_logprobs": None, "loss_type": "reinforce", "entropy_coef": 0.1},
        "every head option": head_options | kl | {"entropy_coef": 0.1},
        "|KL|": kl | {"kl_estimator": "abs"},
        "k3+, bounded": kl | {"kl_estimator": "k3+", "max_kl": 0.2},
        "KL times ratio": kl | {"kl_times_ratio": True, "max_log_ratio": 0.3},
        "entropy weights": {
            "entropy_coef": 0.1,
            "entropy_weights": importance["importance_weights"],
        },
    }
    losses = ("sapo", "dppo_tv", "dppo_kl", "dro", "gmpo", "vespo")
    choices |= {name: {"loss_type": name} for name in losses}
    choices["dro"]["old_logprobs"] = base["old_logprobs"] - 0.01  # no gradient that is just 0
    choices |= {f"every term, {name}": kl | importance | {"loss_type": name} for name in losses}
    packed = torch.tensor([0] * 3 + [2] * 40 + [3] * 7 + [9] * 40).reshape(shape)
    every = kl | importance | {"entropy_coef": 0.1, "kl_times_ratio": True}
    for level in ("sequence", "sequence_token", "sequence_sum"):
        of_rows = {"ratio_level": level, "clip_low": 3e-3, "clip_high": 4e-3}
        choices[level] = of_rows
        choices[f"{level}, packed"] = of_rows | {"sequence_ids": packed}
        choices[f"{level}, every term"] = of_rows | every | {"dual_clip": 1.5}
        choices[f"{level}, cispo"] = cispo | {"ratio_level": level, "sequence_ids": packed}
    return {name: base | options for name, options in choices.items()}


@functools.cache
def sample_inputs(op: str) -> list[Sample]:
    """Calls of ``op`` that cover shapes, hard numbers and options."""
    common = _shapes() | _numbers() | _options()
    if op == "policy_loss":
        found = {name: with_policy(name, arguments) for name, arguments in common.items()}
        found |= _settings()
    else:
        found = dict(common)
        some = common["bias"]["targets"].clone()
        some[:, ::3] = -100
        found["ignored tokens"] = common["bias"] | {"targets": some}
        found["another ignore_index"] = common["7x8x7"] | {"ignore_index": 3}
        found["every token ignored"] = common["bias"] | {"targets": torch.full_like(some, -100)}
    return [Sample(name, op, arguments) for name, arguments in found.items()]


def sample(op: str, name: str) -> Sample:
    """One of ``sample_inputs``."""
    return next(s for s in sample_inputs(op) if s.name == name)


@st.composite
def fuzzed_head(draw: st.DrawFn) -> dict[str, Any]:
    """The LM head's arguments at any small shape, with any options."""
    tokens = draw(st.integers(0, 70))
    shape = draw(st.sampled_from([(tokens,), (2, tokens // 2), (1, tokens, 1)]))
    vocab = draw(st.integers(1, 40) | st.sampled_from([511, 512, 513, 1030]))
    std = draw(st.sampled_from([0.5, 4.0, 12.0]))
    arguments = head(str(draw(st.integers(0, 99))), shape, draw(st.integers(1, 70)), vocab, std)
    if draw(st.booleans()):
        bias = torch.linspace(-2, 2, vocab, dtype=torch.float64).bfloat16().double()
        if draw(st.booleans()):
            bias[::4] = -math.inf
            arguments["targets"] = arguments["targets"].clamp(max=max(vocab - 2, 0)) // 4 * 4 + 1
            arguments["targets"].clamp_(max=vocab - 1)
        arguments["bias"] = bias
    if draw(st.booleans()):
        arguments["softcap"] = draw(st.sampled_from([3.0, 30.0]))
    temperature = draw(st.sampled_from([None, 0.6, "per token"]))
    if temperature == "per token":
        count = max(1, math.prod(shape))
        temperature = torch.linspace(0.5, 2, count).double()[: math.prod(shape)].reshape(shape)
    return arguments if temperature is None else arguments | {"temperature": temperature}


@st.composite
def fuzzed_policy(draw: st.DrawFn) -> dict[str, Any]:
    """policy_loss's arguments at any small shape, with any options."""
    arguments = with_policy(str(draw(st.integers(0, 99))), draw(fuzzed_head()))
    like = arguments["old_logprobs"]
    options: dict[str, Any] = {
        "loss_type": draw(st.sampled_from(["ppo", "cispo"])),
        "dual_clip": draw(st.sampled_from([None, 1.5])),
        "clip_high": draw(st.sampled_from([0.2, 0.28])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.05])),
        "max_log_ratio": draw(st.sampled_from([None, 0.0937])),
    }
    if options["loss_type"] == "cispo":
        options["loss_options"] = {"ratio_max": 1 + options.pop("clip_high")}
        del options["dual_clip"]
    if draw(st.booleans()):
        options["importance_weights"] = torch.linspace(0, 2, like.numel()).double().view_as(like)
    if draw(st.booleans()):
        options |= {
            "ref_logprobs": like + 0.25,
            "kl_coef": 0.1,
            "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        }
    return arguments | options
