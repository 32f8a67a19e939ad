"""What ranks exchange. torchrun starts it; a rank that finds a difference ends with an error."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bupo import ranks
from bupo.config import RunError
from bupo.rl import checkpoint, state_files


def check_sums(rank: int) -> None:
    """Of tensors that are sent together and alone, not all contiguous, and of two types."""
    ranks._MESSAGE = 10
    sizes: list[Any] = [(3,), (2, 2), (4, 5), (1,), (), (11,), (2, 3)]
    given = [torch.full(size, float(n + rank)) for n, size in enumerate(sizes)]
    given[1] = given[1].T
    given[3] = given[3].double()
    ranks.add_up(given)
    for n, (tensor, size) in enumerate(zip(given, sizes)):
        assert torch.equal(tensor, torch.full(size, 2.0 * n + 1, dtype=tensor.dtype)), n


def check_errors(rank: int) -> None:
    def only_on_1() -> int:
        if rank == 1:
            raise OSError("no space left")
        return 7

    with pytest.raises(OSError, match="no space left"):
        ranks.from_all(only_on_1)
    assert ranks.from_all(lambda: rank) == [0, 1]


def check_writing(rank: int, folder: Path) -> None:
    """The reason of one rank is that of all, in the foreground and in the background; nothing half
    written stays."""
    original = checkpoint._checksums

    def broken(*given: Any) -> dict[str, str]:
        if rank == 1:
            raise OSError("input/output error")
        return original(*given)

    checkpoint._checksums = broken
    parts = {"optimizer": {"a": torch.ones(3)}}
    for other in (None, ranks.new_group()):
        final = folder / "checkpoints/step_000001"
        why = pytest.raises(RunError, match=r"step 1 .*input/output error")
        with ranks.by_way_of(other), why, checkpoint.writing(folder, 1):
            checkpoint._write(folder, final, {"step": 1}, Nothing(), Nothing(), {}, parts)
        ranks.gathered(None)
        assert not list(final.parent.iterdir())


def check_files(rank: int, folder: Path) -> None:
    """Copies of a tensor are written once."""
    state_files.write(folder / "x", {"a": torch.ones(3), "b": torch.ones(2)})
    files = sorted((folder / "x").iterdir())
    assert {state_files.writer_of(file) for file in files} <= {0, 1}
    read = {"a": torch.zeros(3), "b": torch.zeros(2)}
    state_files.read(folder / "x", read)
    assert all(bool(x.all()) for x in read.values())


class Nothing:
    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir(exist_ok=True)


if __name__ == "__main__":
    with ranks.joined(minutes=1):
        place = Path(ranks.from_first(tempfile.mkdtemp))
        check_sums(ranks.rank())
        check_errors(ranks.rank())
        check_writing(ranks.rank(), place)
        check_files(ranks.rank(), place)
