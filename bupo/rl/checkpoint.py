"""Everything a run needs to go on as if it had not stopped.

checkpoints/step_000010/ holds the model as save_pretrained writes it (with the tokenizer, ready
for other programs), optimizer/state.safetensors and trainer.json. Prompt order and sampling are
functions of (seed, step), so there is no random state to keep. A checkpoint is written beside its
place and renamed, so one that exists is complete; no pickle is read or written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bupo.config import RunError

_PREFIX = "step_"
OPTIMIZER = "optimizer/state.safetensors"
"""In a folder of its own: loaders, vLLM's among them, take every *.safetensors beside the model
for a part of it."""


def complete(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob(_PREFIX + "*") if (p / "trainer.json").is_file())


def save(
    run: Path, step: int, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes the state after `step` steps and removes all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{step:06d}"
    if (final / "trainer.json").is_file():
        return final
    partial = folder / f".{final.name}.{os.getpid()}"
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / OPTIMIZER).parent.mkdir()
    save_file(_flat_state(model, optimizer), partial / OPTIMIZER)
    (partial / "trainer.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    for file in partial.rglob("*"):
        _sync(file)
    os.replace(partial, final)
    _sync(folder)
    for old in complete(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def writing(run: Path, step: int) -> Iterator[None]:
    """Around save(): what a full disk does to it is told in one line, and what it has left half
    written is removed. Raises RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = run / "checkpoints"
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        earlier = ", ".join(p.name for p in complete(run)) or "none"
        first = str(error).strip().splitlines()[0]
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {folder}: {first} "
            f"({shutil.disk_usage(run).free >> 20} MiB free without it); whole ones there: "
            f"{earlier}; resume=auto goes on from the newest"
        ) from error


def load_step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))["step"])


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the moments of every parameter that had any. Layers above l have none in phase 1:
    AdamW makes them at their first gradient, as it would have in the uninterrupted run."""
    flat = load_file(checkpoint / OPTIMIZER)
    for name, parameter in model.named_parameters():
        keys = [key for key in flat if key.rpartition("/")[0] == name]
        for key in keys:
            field, value = key.rpartition("/")[2], flat.pop(key)
            value = value if field == "step" else value.to(parameter.device)
            optimizer.state[parameter][field] = value
    if flat:
        raise ValueError(f"{checkpoint}: optimizer state of unknown parameters: {sorted(flat)}")


def _flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sync(path: Path) -> None:
    """To disk, so that the rename never gets ahead of the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
