"""Saves and loads everything that a run needs to continue as if it had not stopped.

checkpoints/step_000010/ holds the model as save_pretrained writes it (with the tokenizer, so that
other programs can load it), optimizer/state.safetensors and trainer.json. Prompt order and sampling
are functions of the seed and of the numbers in trainer.json, so no random state is saved. A
checkpoint is written to a hidden folder and then renamed, so any that exists is complete; checksums
show whether its files have changed since. No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bupo import hub, ranks
from bupo.config import BrokenError, ConfigError, RunError, first_line
from bupo.rl import sharding
from bupo.rl.optimizer import AdamW
from bupo.runlog.run_directory import CHECKPOINT, checkpoints

CHECKSUMS = "checksums.json"
CRITIC = "critic"
"""Folder of PPO's critic"""
OPTIMIZER = "optimizer/state.safetensors"
"""In a separate folder, because loaders such as vLLM's read every *.safetensors file next to the
model as a part of the model."""


def save(
    run: Path,
    state: dict[str, int],
    model: Any,
    tokenizer: Any,
    optimizer: AdamW,
    critic: Any,
) -> Path:
    """Writes the state after state["step"] steps and returns its folder. state: the numbers for
    trainer.json. critic: a bupo.rl.critic.Critic, or None."""
    final = run / "checkpoints" / f"{CHECKPOINT}{state['step']:06d}"
    if ranks.from_first((final / "trainer.json").is_file):
        return final
    weights, moments = sharding.whole_state(model), optimizer.whole_state()
    of_critic = None if critic is None else critic.whole_state()

    def write() -> None:
        folder, partial = final.parent, final.with_name(f".{final.name}.{os.getpid()}")
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        with hub.quiet():
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
        (partial / OPTIMIZER).parent.mkdir()
        save_file(contiguous(moments), partial / OPTIMIZER)
        if of_critic is not None:
            (partial / CRITIC).mkdir()
            for name, tensors in of_critic.items():
                save_file(contiguous(tensors), partial / CRITIC / name)
        (partial / "trainer.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
        sums = json.dumps(_checksums(partial), indent=0) + "\n"
        (partial / CHECKSUMS).write_text(sums, encoding="utf-8")
        for file in (*partial.rglob("*"), *run.glob("*.jsonl")):  # rows reach the disk first
            _sync(file)
        os.replace(partial, final)
        _sync(folder)

    ranks.from_first(write)
    return final


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as safetensors can write them."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def prune(run: Path, keep_last: int, keep_steps: Collection[int]) -> None:
    """Removes all checkpoints except the newest `keep_last` and those of the steps `keep_steps`."""
    for old in checkpoints(run)[:-keep_last]:
        if int(old.name.removeprefix(CHECKPOINT)) not in keep_steps:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Wraps code that reads the checkpoint `folder` (None: it reads no checkpoint). An error caused
    by a damaged checkpoint becomes a ConfigError that says how to continue without it."""
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        settings = isinstance(error, ConfigError) and not isinstance(error, BrokenError)
        if folder is None or settings:
            raise
        raise ConfigError(
            f"the checkpoint {folder} is damaged: {first_line(error)}; remove that folder, and "
            "resume=auto continues from the one before it, or starts again if there is none"
        ) from None


def load_state(checkpoint: Path) -> dict[str, int]:
    """Returns the numbers in trainer.json. step: how many steps are done. drawn: how many prompts
    were drawn beyond rollout.prompts per step. Raises ConfigError if the checkpoint is damaged."""
    file = checkpoint / "trainer.json"
    with reading(checkpoint):
        state: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not all(
            isinstance(state.get(key), int) for key in ("step", "drawn")
        ):
            raise ValueError(f"{file.name} does not state step and drawn")
    return state


@contextmanager
def writing(run: Path, step: int) -> Iterator[None]:
    """Wraps save(). If writing fails, for example on a full disk, removes the partial checkpoint
    and raises RunError with a message of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = run / "checkpoints"
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        earlier = ", ".join(p.name for p in checkpoints(run)) or "none"
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {folder}: {first_line(error)} "
            f"({shutil.disk_usage(run).free >> 20} MiB free without it); complete ones there: "
            f"{earlier}; resume=auto continues from the newest"
        ) from error


def verify(checkpoint: Path) -> None:
    """Raises ConfigError unless each file still matches its checksum. A checkpoint from a version
    without checksums is accepted."""
    with reading(checkpoint):
        if not (checkpoint / CHECKSUMS).is_file():
            return
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        found = _checksums(checkpoint)
        for name, digest in expected.items():
            if found.get(name) != digest:
                what = "has changed since it was written" if name in found else "is missing"
                raise ValueError(f"{name} {what}")


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file by name, without the list itself, computed in parallel."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        return dict(zip((p.relative_to(folder).as_posix() for p in files), pool.map(digest, files)))


def load_step(checkpoint: Path) -> int:
    return load_state(checkpoint)["step"]


def load_optimizer(checkpoint: Path, optimizer: AdamW) -> None:
    """Restores the moments of every parameter. Missing or surplus moments also count as damage,
    because a checkpoint holds the moments of all parameters in every phase."""
    with reading(checkpoint):
        optimizer.load_flat_state(load_file(checkpoint / OPTIMIZER))


def fingerprint(model: nn.Module) -> str:
    """Returns the SHA-256 of the names and values of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flushes a path to disk, so that the rename never takes effect before the data is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
