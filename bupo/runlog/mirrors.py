"""Sends the numbers of a run to TensorBoard and Weights & Biases as well. If one of them fails, a
message is printed once and training continues without it."""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bupo.terminal import say


class _Mirror(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run: Path, keep_until_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=keep_until_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Continues the W&B run when a run is continued: its id is kept in the run directory."""

    def __init__(self, run: Path, project: str, name: str, settings: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        file = run / "wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(run),
            id=file.read_text("utf-8"),
            resume="allow",
            config=settings,
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Mirrors:
    """The mirrors that were requested and that work."""

    def __init__(
        self,
        run: Path,
        keep_until_step: int,
        wandb: str | None,
        name: str,
        settings: dict[str, Any],
    ) -> None:
        self._open: dict[str, _Mirror] = {}
        self._start("TensorBoard", lambda: _TensorBoard(run, keep_until_step))
        if wandb is not None:
            self._start("W&B", lambda: _WandB(run, wandb, name, settings))

    def _start(self, name: str, make: Callable[[], _Mirror]) -> None:
        try:
            self._open[name] = make()
        except Exception as error:
            self._off(name, error)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Sends those of the values that are finite numbers."""
        finite = {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name, mirror in list(self._open.items()):
            try:
                mirror.scalars(step, finite)
            except Exception as error:
                self._off(name, error)

    def close(self) -> None:
        for name, mirror in list(self._open.items()):
            try:
                mirror.close()
            except Exception as error:
                self._off(name, error)

    def _off(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        say(f"{name} is off: {error}")
