"""Saves and loads everything that a run needs to continue as if it had not stopped.

checkpoints/step_000010/ holds the model as save_pretrained writes it (with the tokenizer, so that
other programs can load it), the optimizer's state and trainer.json. Prompt order and sampling are
functions of the seed and of the numbers in trainer.json, so no random state is saved. A checkpoint
is written to a hidden folder and then renamed, so any that exists is complete; checksums show
whether its files have changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bupo import hub, ranks
from bupo.config import BrokenError, ConfigError, RunError, first_line
from bupo.rl import sharding, state_files
from bupo.rl.optimizer import AdamW
from bupo.runlog.run_directory import CHECKPOINT, checkpoints

CHECKSUMS = "checksums.json"
CRITIC = "critic"
"""Folder of PPO's critic"""
OPTIMIZER = "optimizer"
"""Folder of the optimizer's state. It is apart because loaders such as vLLM's read every
*.safetensors file next to the model as a part of the model"""


class Writer:
    """Writes the checkpoints of a run. All ranks call each method."""

    def __init__(self, run: Path, in_background: bool) -> None:
        """in_background: save() only copies the state, and a thread writes it."""
        self._run, self._group = run, ranks.new_group() if in_background else None
        self._thread = ThreadPoolExecutor(1) if in_background else None
        self._writing: Future[None] | None = None

    def save(
        self,
        state: dict[str, int],
        model: Any,
        tokenizer: Any,
        optimizer: AdamW,
        critic: Any,
        keep_last: int,
        keep_steps: Collection[int],
    ) -> None:
        """Writes the state after state["step"] steps, unless that has been done, and removes older
        checkpoints except for the newest `keep_last` and those of the steps `keep_steps`.

        state: the numbers for trainer.json. critic: a bupo.rl.critic.Critic, or None. Raises
        RunError if this checkpoint, or one before it in the background, cannot be written.
        """
        self.finish()
        final = self._run / "checkpoints" / f"{CHECKPOINT}{state['step']:06d}"
        if ranks.from_first((final / "trainer.json").is_file):
            if ranks.is_first():
                prune(self._run, keep_last, keep_steps)
            return
        later = self._thread is not None
        weights = sharding.whole_state(model, copy=later)
        parts = {OPTIMIZER: optimizer.divided_state()}
        if critic is not None:
            parts[CRITIC] = critic.divided_state()
        if later:
            parts = {name: ranks.copied_to_host(tensors) for name, tensors in parts.items()}

        def write() -> None:
            with writing(self._run, state["step"]):
                _write(self._run, final, state, model, tokenizer, weights, parts)
            if ranks.is_first():
                prune(self._run, keep_last, keep_steps)

        if self._thread is None:
            write()
        else:
            self._writing = self._thread.submit(_by_way_of, self._group, write)

    def finish(self) -> None:
        """Waits until everything is written. Raises RunError if it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> str:
        """Waits for the thread. Returns why it could not write, unless finish() has raised that."""
        if self._thread is not None:
            self._thread.shutdown()
        error = None if self._writing is None else self._writing.exception()
        return "" if error is None else first_line(error)


def _by_way_of(group: Any, write: Callable[[], None]) -> None:
    with ranks.by_way_of(group):
        write()


def _write(
    run: Path,
    final: Path,
    state: Mapping[str, int],
    model: Any,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Writes a checkpoint. parts: tensors of which each rank writes its rows, by folder."""
    partial = final.with_name(f".{final.name}.{ranks.from_first(os.getpid)}")

    def write_model() -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        with hub.quiet():
            model.save_pretrained(partial, state_dict=dict(weights))
            tokenizer.save_pretrained(partial)
        _state_dtype(partial / "config.json", weights)
        (partial / "trainer.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    ranks.from_first(write_model)
    for name, tensors in parts.items():
        state_files.write(partial / name, tensors)

    def sums_of_mine() -> dict[str, str]:
        mine = [x for x in _files(partial) if state_files.writer_of(x) == ranks.rank()]
        return _checksums(partial, mine)

    sums = {name: x for part in ranks.from_all(sums_of_mine) for name, x in part.items()}

    def complete() -> None:
        text = json.dumps(sums, indent=0, sort_keys=True) + "\n"
        (partial / CHECKSUMS).write_text(text, encoding="utf-8")
        for file in (*partial.rglob("*"), *run.glob("*.jsonl")):  # rows reach the disk first
            _sync(file)
        os.replace(partial, final)
        _sync(final.parent)

    ranks.from_first(complete)


def _state_dtype(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes the data type of the weights into a model's configuration. transformers takes that of
    the model, which may be another one for a moment while the weights are written."""
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        kinds = {x.dtype for x in weights.values() if x.is_floating_point()}
        if "dtype" in config and len(kinds) == 1:
            config["dtype"] = str(kinds.pop()).removeprefix("torch.")
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        for leftover in folder.glob(".*") if ranks.is_first() else ():
            shutil.rmtree(leftover, ignore_errors=True)
        earlier = ", ".join(p.name for p in checkpoints(run)) or "none"
        raise RunError(
            f"the checkpoint of step {step} cannot be written to {folder}: {first_line(error)} "
            f"({shutil.disk_usage(run).free >> 20} MiB free without it); complete ones there: "
            f"{earlier}; resume=auto continues from the newest"
        ) from error


def verify(checkpoint: Path) -> None:
    """Raises ConfigError unless each file still matches its checksum, of which each rank computes
    its share. A checkpoint from a version without checksums is accepted."""
    with reading(checkpoint):
        if not ranks.from_first((checkpoint / CHECKSUMS).is_file):
            return
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        names = list(expected)
        mine = [checkpoint / name for name in ranks.share(names)]
        parts = ranks.gathered(_checksums(checkpoint, [x for x in mine if x.is_file()]))
        found = {name: x for part in parts for name, x in part.items()}
        for name, digest in expected.items():
            if found.get(name) != digest:
                what = "has changed since it was written" if name in found else "is missing"
                raise ValueError(f"{name} {what}")


def _files(folder: Path) -> list[Path]:
    """Returns all files but the list of checksums, in order."""
    return sorted(x for x in folder.rglob("*") if x.is_file() and x.name != CHECKSUMS)


def _checksums(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """Returns the SHA-256 of each file by its name in the folder, computed in parallel."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip((x.relative_to(folder).as_posix() for x in files), pool.map(digest, files)))


def load_step(checkpoint: Path) -> int:
    return load_state(checkpoint)["step"]


def load_optimizer(checkpoint: Path, optimizer: AdamW) -> None:
    """Restores the moments of every parameter. Missing or surplus moments also count as damage,
    because a checkpoint holds the moments of all parameters in every phase."""
    with reading(checkpoint):
        state_files.read(checkpoint / OPTIMIZER, optimizer.divided_state())
        optimizer.follow_parameters()


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
