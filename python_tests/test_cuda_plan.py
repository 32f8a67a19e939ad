"""How a CUDA call is cut into chunks and blocks (csrc/cuda/choose.h): plain arithmetic."""

import pytest

from bupo import _C

GIB = 1 << 30


def plan(tokens: int, width: int, vocab: int, **options: int) -> dict:
    settings = {"element": 2, "gradients": True, "weight_gradient": True, "half": False}
    settings |= {"budget": GIB} | options
    return _C.cuda_plan(tokens, width, vocab, **settings)


SHAPES = [(n, d, v) for n in (1, 127, 8192, 65537) for d in (64, 4096) for v in (1, 7, 151936)]


@pytest.mark.parametrize(("tokens", "width", "vocab"), SHAPES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("budget", [1, 1 << 26, GIB, 64 * GIB])
def test_a_plan_covers_the_call_within_its_budget(
    tokens: int, width: int, vocab: int, gradients: bool, element: int, budget: int
) -> None:
    p = plan(tokens, width, vocab, gradients=gradients, element=element, budget=budget)
    assert p["block"] % 128 == 0 and p["block"] > 0
    assert p["chunk"] % 128 == 0 and p["chunk"] >= p["block"]
    assert p["stride"] >= vocab and p["stride"] % 8 == 0
    assert p["chunk"] < tokens + 128, "no memory for rows that are not there"
    smallest = plan(tokens, width, vocab, gradients=gradients, element=element, budget=1)
    assert p["bytes"] <= max(budget, smallest["bytes"])
    assert bool(p["slice"]) == (gradients and tokens > p["chunk"])


def test_the_default_budget_at_full_size() -> None:
    """8192 tokens of Qwen3-8B's head: chunks of thousands of rows, dW added up in fp32."""
    p = plan(8192, 4096, 151936)
    assert 2000 <= p["chunk"] <= 4096
    assert p["accumulate"] and p["bytes"] <= GIB
    assert plan(8192, 4096, 151936, budget=8 * GIB)["chunk"] == 8192
    assert not plan(8192, 4096, 151936, budget=8 * GIB)["accumulate"], "one chunk: dW directly"
    assert not plan(8192, 4096, 151936, weight_gradient=False)["slice"]


def test_float16_always_adds_up_in_float32() -> None:
    """Its rows are scaled to fit float16, and dW is scaled back from fp32."""
    assert plan(100, 64, 1000, half=True)["accumulate"]


def test_float32_adds_up_in_place() -> None:
    p = plan(65537, 4096, 151936, element=4)
    assert p["slice"] and not p["accumulate"]


def test_forward_alone_holds_one_block() -> None:
    p = plan(65537, 4096, 151936, gradients=False)
    assert p["chunk"] == p["block"] <= GIB // (4 * 151936)
