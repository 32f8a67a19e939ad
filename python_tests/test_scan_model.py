"""The model of the Hopper kernels cuts calls into the chunks of the sources."""

from collections.abc import Callable
from math import ceil

import pytest
from scan_model import COOPERATIVE, PINGPONG, SHAPES, Design, chunks


@pytest.mark.parametrize("design", [COOPERATIVE, PINGPONG], ids=["cooperative", "pingpong"])
def test_it_counts_the_chunks_of_the_sources(
    plan: Callable[..., dict[str, int]], design: Design
) -> None:
    path = "pingpong" if design is PINGPONG else "cooperative"
    for tokens, width, vocab in SHAPES:
        cut = ceil(tokens / plan(tokens, width, vocab, path=path)["chunk"])
        assert chunks(design, tokens, width, vocab) == cut
