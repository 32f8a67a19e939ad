"""Peak memory of the LM-head ops on the CPU against plain torch, measured in a fresh process.

A figure is the highest resident memory during a call minus the resident memory just before it:
gradients included, inputs not. `python test_ops_memory.py` prints all of them in MiB.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bupo.ops as ops

TOKENS, WIDTH, VOCAB = 2048, 256, 32768
MIB = 2**20
LOGITS = TOKENS * VOCAB * 4 / MIB
D_WEIGHT = VOCAB * WIDTH * 4 / MIB
D_HIDDEN = TOKENS * WIDTH * 4 / MIB


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the highest since the last reset), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(call: Callable[[], object]) -> float:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM")
    del result
    return peak - before


def inputs(tokens: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, WIDTH, generator=g) * (4 / WIDTH**0.5)).to(dtype)
    return {
        "hidden": torch.randn(tokens, WIDTH, generator=g).to(dtype).requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": torch.randint(vocab, (tokens,), generator=g),
        "old_logprobs": -12 + torch.randn(tokens, generator=g),
        "advantages": torch.randn(tokens, generator=g),
        "token_weights": torch.full((tokens,), 1 / tokens),
    }


def policy(**a: Tensor) -> None:
    ops.policy_loss(**a, clip_low=0.99, clip_high=1e9).loss.backward()


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> None:
    result = ops.lm_head_logprobs(hidden, weight, targets)
    (result.logprobs + result.entropy).sum().backward()


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> ops.LogProbs:
    with torch.no_grad():
        return ops.lm_head_logprobs(hidden, weight, targets)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, **a: Tensor) -> None:
    """What a training loop does: log_softmax, gather, entropy for the log, clipped ratio."""
    logp = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    ratio = (logp.gather(-1, targets[:, None]).squeeze(-1) - a["old_logprobs"]).exp()
    gain = torch.minimum(ratio * a["advantages"], ratio.clamp(0.01, 1e9) * a["advantages"])
    loss = -(a["token_weights"] * gain).sum()
    loss.backward()
    entropy.detach()


def measure() -> dict[str, float]:
    for call in (policy, logprobs, forward, eager):  # loads libraries, starts threads
        call(**inputs(64, 600, torch.float32))
    policy(**inputs(64, 600, torch.bfloat16))
    peaks = {}
    for name, call, tokens, dtype in (
        ("policy", policy, TOKENS, torch.float32),
        ("policy, half the tokens", policy, TOKENS // 2, torch.float32),
        ("policy, bfloat16", policy, TOKENS, torch.bfloat16),
        ("logprobs", logprobs, TOKENS, torch.float32),
        ("logprobs, half the tokens", logprobs, TOKENS // 2, torch.float32),
        ("forward", forward, TOKENS, torch.float32),
        ("eager", eager, TOKENS, torch.float32),
    ):
        a = inputs(tokens, VOCAB, dtype)
        peaks[name] = peak_of(lambda call=call, a=a: call(**a))
        if name in ("policy", "logprobs"):
            a["weight"].requires_grad_(False)
            peaks[f"{name}, frozen weight"] = peak_of(lambda call=call, a=a: call(**a))
    return peaks


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["policy", "policy, bfloat16", "logprobs"])
def test_under_an_eighth_of_eager(name: str, peaks: dict[str, float]) -> None:
    assert peaks["eager"] > 3 * LOGITS, peaks  # the measure sees what it should
    assert peaks[name] < peaks["eager"] / 8, peaks


@pytest.mark.parametrize("name", ["policy", "logprobs"])
def test_memory_does_not_grow_with_tokens(name: str, peaks: dict[str, float]) -> None:
    """But for the gradient of hidden itself; 4 MiB for noise."""
    assert peaks[name] - peaks[f"{name}, half the tokens"] < D_HIDDEN / 2 + 4, peaks


@pytest.mark.parametrize("name", ["policy", "logprobs"])
def test_a_frozen_weight_needs_no_gradient_memory(name: str, peaks: dict[str, float]) -> None:
    assert peaks[name] - peaks[f"{name}, frozen weight"] > 0.8 * D_WEIGHT, peaks


def test_forward_needs_no_block_of_logits(peaks: dict[str, float]) -> None:
    assert peaks["forward"] < LOGITS / 16, peaks


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(measure()))
