"""The model of the Hopper kernels: it cuts calls as the sources do, and predicts what is asked."""

from collections.abc import Callable
from math import ceil

import pytest
from scan_model import COOPERATIVE, PINGPONG, SHAPES, Design, chunks, forward, policy_loss


@pytest.mark.parametrize("design", [COOPERATIVE, PINGPONG], ids=["cooperative", "pingpong"])
def test_it_counts_the_chunks_of_the_sources(
    plan: Callable[..., dict[str, int]], design: Design
) -> None:
    path = "pingpong" if design is PINGPONG else "cooperative"
    for tokens, width, vocab in SHAPES:
        cut = ceil(tokens / plan(tokens, width, vocab, path=path)["chunk"])
        assert chunks(design, tokens, width, vocab) == cut


@pytest.mark.parametrize(
    ("shape", "bar"),
    [((8192, 4096, 151936), 1.03), ((8192, 2560, 151936), 1.06), ((256, 4096, 151936), 1.25)],
)
def test_the_default_kernel_is_predicted_to_meet_the_bars(
    shape: tuple[int, int, int], bar: float
) -> None:
    assert policy_loss(PINGPONG, *shape) <= bar
    assert policy_loss(COOPERATIVE, *shape) <= bar


def test_forward_and_a_quarter_of_live_tokens() -> None:
    assert forward(PINGPONG, 8192, 4096, 151936) <= 1.02
    assert policy_loss(PINGPONG, 8192, 2560, 151936, live=0.25) <= 0.57
