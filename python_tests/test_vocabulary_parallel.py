"""The LM-head ops with group=: see parallel_samples.py."""

from pathlib import Path

import pytest
from test_ranks import finish, started


@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_ranks_equal_one_process(world: int) -> None:
    """37 tokens on 2, 3 and 4 ranks, and 5 tokens, of which the fourth rank has none."""
    finish(started(world, str(Path(__file__).with_name("parallel_samples.py"))))
