"""How a CUDA call is cut into chunks and blocks (csrc/cuda/choose.h): plain arithmetic."""

import pytest

from bupo import _C

GIB = 1 << 30


def plan(tokens: int, width: int, vocab: int, **options: int) -> dict:
    settings = {"element": 2, "gradients": True, "weight_gradient": True, "half": False}
    settings |= {"budget": GIB, "sm90": False, "placed": True} | options
    return _C.cuda_plan(tokens, width, vocab, **settings)


SHAPES = [(n, d, v) for n in (1, 127, 8192, 65537) for d in (64, 4096) for v in (1, 7, 151936)]


@pytest.mark.parametrize(("tokens", "width", "vocab"), SHAPES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("budget", [1, 1 << 26, GIB, 64 * GIB])
@pytest.mark.parametrize("sm90", [False, True])
def test_a_plan_covers_the_call_within_its_budget(
    tokens: int, width: int, vocab: int, gradients: bool, element: int, budget: int, sm90: bool
) -> None:
    options = {"gradients": gradients, "element": element, "sm90": sm90}
    p = plan(tokens, width, vocab, budget=budget, **options)
    assert p["block"] % 128 == 0 and p["block"] > 0
    assert p["chunk"] % 128 == 0 and p["chunk"] >= p["block"]
    assert p["stride"] >= vocab and p["stride"] % 8 == 0
    assert p["chunk"] < tokens + 128, "no memory for rows that are not there"
    smallest = plan(tokens, width, vocab, budget=1, **options)
    one_chunk = gradients and element == 2 and tokens <= p["chunk"]
    accumulator = 4 * width * vocab if one_chunk else 0  # is spared, and may be used
    assert p["bytes"] <= max(budget + accumulator, smallest["bytes"] + accumulator)
    assert bool(p["slice"]) == (gradients and tokens > p["chunk"])


@pytest.mark.parametrize(("sm90", "rows"), [(False, 2000), (True, 2800)])
def test_the_default_budget_at_full_size(sm90: bool, rows: int) -> None:
    """Qwen3-8B's head: chunks of thousands of rows, dW added up in fp32; but thousands
    of tokens are one chunk, since the memory of that accumulator is enough for them."""
    p = plan(32768, 4096, 151936, sm90=sm90)
    assert rows <= p["chunk"] <= 4096
    assert p["accumulate"] and p["bytes"] <= GIB
    tokens = 8192 if sm90 else 6144  # the portable path has its fp32 products beside
    one = plan(tokens, 4096, 151936, sm90=sm90)
    assert one["chunk"] == tokens and not one["accumulate"] and not one["slice"]
    assert one["bytes"] <= GIB + 4 * 4096 * 151936
    assert plan(32768, 4096, 151936, sm90=sm90, budget=16 * GIB)["chunk"] == 32768
    assert not plan(32768, 4096, 151936, sm90=sm90, weight_gradient=False)["slice"]


def test_statistics_alone_take_little_memory_on_hopper() -> None:
    """All layers and modules of a 4B model over 2048 tokens: one walk over the vocabulary."""
    options = {"gradients": False, "weight_gradient": False, "placed": False}
    p = plan(36 * 3 * 2048, 2560, 151936, sm90=True, **options)
    assert p["chunk"] == 36 * 3 * 2048 and p["bytes"] < GIB // 2


def test_float16_always_adds_up_in_float32() -> None:
    """Its rows are scaled to fit float16, and dW is scaled back from fp32."""
    assert plan(100, 64, 1000, half=True)["accumulate"]


def test_float32_adds_up_in_place() -> None:
    p = plan(65537, 4096, 151936, element=4)
    assert p["slice"] and not p["accumulate"]


def test_forward_alone_holds_one_block() -> None:
    p = plan(65537, 4096, 151936, gradients=False)
    assert p["chunk"] == p["block"] <= GIB // (4 * 151936)
