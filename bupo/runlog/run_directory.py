"""Files of a run directory: JSON lines that a kill may cut, texts replaced whole, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bupo import ranks
from bupo.types import finite_or_none

CHECKPOINT = "step_"
"""Prefix of a checkpoint's folder: the one of step 10 is checkpoints/step_000010"""


def checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob(CHECKPOINT + "*") if (p / "trainer.json").is_file())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSON lines file, up to a last line that a kill may have cut short."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def shared_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows that rank 0 reads, on all ranks."""
    return ranks.from_first(lambda: read_rows(file))


def json_lines(rows: Sequence[dict[str, Any]], ascii_only: bool = True) -> str:
    """Returns strict JSON, one line per row, with null for every number that is not finite."""
    dumped = (json.dumps(_plain(r), ensure_ascii=ascii_only, allow_nan=False) for r in rows)
    return "".join(line + "\n" for line in dumped)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return finite_or_none(value) if isinstance(value, float) else value


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Appends rows to a JSON lines file and hands them to the operating system at once. Only rank 0
    writes."""
    if not ranks.is_first():
        return
    with file.open("a", encoding="utf-8") as out:
        out.write(json_lines(rows))


def replace_text(file: Path, text: str) -> None:
    """Replaces a file's content as a whole: after a kill or a full disk, the old one remains. Only
    rank 0 writes."""
    if not ranks.is_first():
        return
    partial = file.with_name(f".{file.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
