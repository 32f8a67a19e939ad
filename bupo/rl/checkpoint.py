"""Everything a run needs to go on as if it had not stopped.

checkpoints/step_000010/ holds the model as save_pretrained writes it (with the tokenizer, ready
for other programs), optimizer/state.safetensors and trainer.json. Prompt order and sampling are
functions of the seed and of the numbers in trainer.json, so there is no random state to keep. A
checkpoint is written beside its place and renamed, so one that exists is complete; checksums of its
files tell whether it is still what was written. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bupo import hub
from bupo.config import BrokenError, ConfigError, RunError, first_line
from bupo.rl.optimizer import AdamW
from bupo.runlog.run_directory import CHECKPOINT, checkpoints

CHECKSUMS = "checksums.json"
CRITIC = "critic"
"""Folder of PPO's critic"""
OPTIMIZER = "optimizer/state.safetensors"
"""In a folder of its own: loaders, vLLM's among them, take every *.safetensors beside the model
for a part of it."""


def save(
    run: Path,
    state: dict[str, int],
    model: Any,
    tokenizer: Any,
    optimizer: AdamW,
    critic: Any,
) -> Path:
    """Writes the state after state["step"] steps. state: the numbers that trainer.json holds.
    critic: one of bupo.rl.critic, or None."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{CHECKPOINT}{state['step']:06d}"
    if (final / "trainer.json").is_file():
        return final
    partial = folder / f".{final.name}.{os.getpid()}"
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    with hub.quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    (partial / OPTIMIZER).parent.mkdir()
    save_file(optimizer.flat_state(dict(model.named_parameters())), partial / OPTIMIZER)
    if critic is not None:
        critic.save(partial / CRITIC)
    (partial / "trainer.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    sums = json.dumps(_checksums(partial), indent=0) + "\n"
    (partial / CHECKSUMS).write_text(sums, encoding="utf-8")
    for file in (*partial.rglob("*"), *run.glob("*.jsonl")):  # rows are never behind a checkpoint
        _sync(file)
    os.replace(partial, final)
    _sync(folder)
    return final


def prune(run: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Removes all checkpoints but the newest `keep_last` and those of some steps."""
    for old in checkpoints(run)[:-keep_last]:
        if int(old.name.removeprefix(CHECKPOINT)) not in keep_steps:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Around what reads a checkpoint, or nothing else if there is none to read: a damaged one is a
    ConfigError that says how to do without it."""
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        settings = isinstance(error, ConfigError) and not isinstance(error, BrokenError)
        if folder is None or settings:
            raise
        raise ConfigError(
            f"the checkpoint {folder} is damaged: {first_line(error)}; remove that folder, and "
            "resume=auto goes on from the one before it, or starts again without one"
        ) from None


def load_state(checkpoint: Path) -> dict[str, int]:
    """step: how many are done; drawn: see PromptStream. Raises ConfigError, as all that reads."""
    file = checkpoint / "trainer.json"
    with reading(checkpoint):
        state: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not all(
            isinstance(state.get(key), int) for key in ("step", "drawn")
        ):
            raise ValueError(f"{file.name} does not tell step and drawn")
    return state


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
        earlier = ", ".join(p.name for p in checkpoints(run)) or "none"
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {folder}: {first_line(error)} "
            f"({shutil.disk_usage(run).free >> 20} MiB free without it); whole ones there: "
            f"{earlier}; resume=auto goes on from the newest"
        ) from error


def verify(checkpoint: Path) -> None:
    """Raises ConfigError unless each file is as it was written; a checkpoint of before there were
    checksums is taken as it is."""
    with reading(checkpoint):
        if not (checkpoint / CHECKSUMS).is_file():
            return
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        found = _checksums(checkpoint)
        for name, digest in expected.items():
            if found.get(name) != digest:
                what = "is not as it was written" if name in found else "is missing"
                raise ValueError(f"{name} {what}")


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by name, of every file but the list itself; as many at once as there are cores."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        return dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(digest, files)))


def load_step(checkpoint: Path) -> int:
    return load_state(checkpoint)["step"]


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: AdamW) -> None:
    """Restores the moments of every parameter. Some that are missing or left over are damage too: a
    checkpoint holds all of them in every phase."""
    with reading(checkpoint):
        moments = load_file(checkpoint / OPTIMIZER)
        optimizer.load_flat_state(dict(model.named_parameters()), moments)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names and values of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """To disk, so that the rename never gets ahead of the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
