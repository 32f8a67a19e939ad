"""How a CUDA call is cut into chunks (csrc/cuda/choose.h): plain arithmetic."""

import ctypes
from collections.abc import Callable

import pytest
from emulation import TILE_COLUMNS

Plan = Callable[..., dict[str, int]]
GIB = 1 << 30
SHAPES = [(n, d, v) for n in (1, 127, 8192, 65537) for d in (64, 4096) for v in (1, 7, 151936)]


@pytest.mark.parametrize("path", TILE_COLUMNS)
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("budget", [1, 1 << 26, GIB, 64 * GIB])
def test_a_plan_covers_the_call_within_its_budget(
    plan: Plan,
    path: str,
    element: int,
    budget: int,
) -> None:
    for tokens, width, vocab in SHAPES:
        for gradients in (True, False):
            options = {"element": element, "path": path}
            options |= {"gradients": gradients, "weight_gradient": gradients}
            p = plan(tokens, width, vocab, budget=budget, **options)
            assert p["chunk"] % 128 == 0 and p["chunk"] > 0
            assert p["chunk"] < tokens + 128, "no memory for rows that are not there"
            smallest = plan(tokens, width, vocab, budget=1, **options)
            one_chunk = gradients and element == 2 and tokens <= p["chunk"]
            accumulator = 4 * width * vocab if one_chunk else 0  # is spared, and may be used
            assert p["bytes"] <= max(budget, smallest["bytes"]) + accumulator
            assert p["accumulate"] == (gradients and element == 2 and tokens > p["chunk"])


def chunks(p: dict[str, int], tokens: int) -> list[int]:
    return [min(p["chunk"], tokens - first) for first in range(0, tokens, p["chunk"])]


@pytest.mark.parametrize("path", TILE_COLUMNS)
@pytest.mark.parametrize(
    ("tokens", "width", "most"), [(8192, 2560, 2), (8192, 4096, 2), (32768, 4096, 4)]
)
def test_the_default_budget_at_full_size(
    plan: Plan,
    path: str,
    tokens: int,
    width: int,
    most: int,
) -> None:
    """Few chunks, of equal size: each further one reads and writes dW in fp32 once more."""
    if path == "portable":
        most = 2 * most  # it has its fp32 products beside
    rows = chunks(plan(tokens, width, 151936, path=path), tokens)
    assert len(rows) <= most
    assert max(rows) - min(rows) < 128 * len(rows)


def test_a_smaller_card_has_more_chunks(plan: Plan) -> None:
    assert len(chunks(plan(8192, 4096, 151936, budget=GIB // 4), 8192)) > 4


def test_statistics_alone_take_little_memory_on_hopper(plan: Plan) -> None:
    """All layers and modules of a 4B model over 2048 tokens: one walk over the vocabulary."""
    p = plan(36 * 3 * 2048, 2560, 151936, gradients=False, weight_gradient=False)
    assert p["chunk"] == 36 * 3 * 2048 and p["bytes"] < 4 * GIB


def test_float16_always_adds_up_in_float32(plan: Plan) -> None:
    """Its rows are scaled to fit float16, and dW is scaled back from fp32."""
    assert plan(100, 64, 1000, half=True)["accumulate"]


def test_float32_adds_up_in_place(plan: Plan) -> None:
    p = plan(65537, 4096, 151936, element=4)
    assert p["chunk"] < 65537 and not p["accumulate"]


def test_the_default_budget_follows_the_memory_that_is_free(plan_library: ctypes.CDLL) -> None:
    plan_library.bupo_budget.restype = ctypes.c_int64
    mib = 1 << 20
    for free, budget in ((80 * GIB, 4096), (15 * GIB, 2048), (3 * GIB, 512), (GIB // 2, 256)):
        assert plan_library.bupo_budget(ctypes.c_int64(free)) == budget * mib
