"""Reads and writes training state as safetensors files, by torch.distributed.checkpoint.

Each rank writes its rows of the tensors, and no rank needs all of them. What some ranks have
written is read by any number of ranks. No pickle is read or written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bupo import ranks

FILE = 1 << 28
"""Bytes of a file, about. The writer makes a whole file in memory, which stops all other threads"""


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors that are divided among the ranks or equal on all of them."""
    files, size = {}, 0
    for name in sorted(tensors):
        files[name] = 1 + size // (FILE * ranks.world())
        size += tensors[name].numel() * tensors[name].element_size()
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with _alone_or_together():
        dcp.save(
            {name: x.contiguous() for name, x in tensors.items()},
            storage_writer=writer,
            process_group=ranks.group(),
            no_dist=ranks.world() == 1,
        )


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the values of the tensors by those of the files. Raises ValueError if the files hold
    other names or shapes."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    sizes = {
        name: list(x.size) for name, x in found.items() if isinstance(x, TensorStorageMetadata)
    }
    if wrong := sorted(sizes.keys() ^ tensors.keys()):
        raise ValueError(f"{folder.name}: values are missing or belong to no parameter: {wrong}")
    for name, tensor in tensors.items():
        if (was := sizes[name]) != (now := list(tensor.shape)):
            raise ValueError(f"{folder.name}: {name} has shape {was}, but its parameter {now}")
    with _alone_or_together():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=ranks.world() == 1)


def writer_of(file: Path) -> int:
    """Returns the rank that has written a file; rank 0 writes those of the model."""
    shard = re.match(r"shard-(\d+)-", file.name)
    return int(shard[1]) - 1 if shard else 0


@contextmanager
def _alone_or_together() -> Iterator[None]:
    """Without torch's warning about a single process. What a rank has raised becomes visible."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        raise cause from None
