"""Rows of results, JSON objects on lines of their own: how to read, write, judge and show them.
Needs the standard library only."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SHAPE = ("tokens", "width", "vocab")  # the keys of N, D and V in a row
Row = dict[str, Any]
GRADIENT_RIGHT = 5e-2
"""Largest relative Frobenius error of dX and dW in a right gradient. Rounding to bfloat16 gives
2e-3, bfloat16 logits give 1.5e-2 because they move the ratio too, and bfloat16 sums over chunks
give more. A softmax whose numbers do not belong to its logsumexp gives 0.2."""


# ---- files and processes -----------------------------------------------------------------------


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def newest(file: Path) -> list[Row]:
    """The rows of the last run of each case in a file, the case of the last run at the end; none
    without the file. A case is a model and an engine, where rows name them."""
    rows = read(file) if file.exists() else []
    last: dict[tuple[str | None, ...], str] = {}
    for row in sorted(rows, key=lambda row: str(row["date"])):
        last[_case(row)] = row["date"]
    named = {case: date for case, date in last.items() if any(case)} or last
    return [row for row in rows if named.get(_case(row)) == row["date"]]


def _case(row: Row) -> tuple[str | None, ...]:
    return row.get("model"), row.get("engine")


def append(file: Path | None, run: Row, rows: Iterable[Row]) -> None:
    """Adds a line for each row, together with what holds for the whole run; no file: none."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.writelines(json.dumps(run | row) + "\n" for row in rows)


def rows_of_program(
    arguments: Sequence[str],
    folder: Path = ROOT,
    seconds: float | None = None,
    path: str = "",
    **environment: str,
) -> tuple[list[Row], str]:
    """Runs Python in a process of its own, with `path` and `folder` on its path. Returns the JSON
    objects that it printed on lines of their own, and what went wrong, or ""."""
    paths = filter(None, (path, str(folder), os.environ.get("PYTHONPATH", "")))
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return [], f"over {seconds:g} s"
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode == 0:
        return rows, ""
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return rows, errors[-1][:200] if errors else f"exit status {done.returncode}"


# ---- judgements --------------------------------------------------------------------------------


def shape_of(row: Row) -> tuple[int, ...]:
    """N, D, V"""
    return tuple(row[key] for key in SHAPE)


def gradient_is_right(row: Row) -> bool:
    errors = (row.get("error_d_hidden"), row.get("error_d_weight"))
    return all(e is not None and e <= GRADIENT_RIGHT for e in errors)  # nan is not <=


def is_wrong_peer(row: Row) -> bool:
    """Whether it is a peer whose gradient is wrong."""
    return bool(row.get("peer")) and row["products"] == 3 and not gradient_is_right(row)


def add_best_peer(rows: list[Row]) -> None:
    """Adds x_best_peer: time over that of the fastest right peer with as many products."""
    for products in (1, 3):
        same = [row for row in rows if row.get("products") == products]
        peers = [row for row in same if row["peer"] and not is_wrong_peer(row)]
        if peers:
            best = min(peers, key=lambda row: row["ms"])
            for row in same:
                row |= {"x_best_peer": row["ms"] / best["ms"], "best_peer": best["name"]}


def bar(
    title: str, value: float | None, limit: float, form: str = ".2f", least: bool = False
) -> str:
    """A line that says whether a figure is at most its limit (with `least`: at least)."""
    if value is None:
        return f"NO FIGURE: {title}"
    verdict = "met" if (value >= limit if least else value <= limit) else "NOT MET"
    return f"{verdict:>7}: {title} = {value:{form}}, bar {'>=' if least else '<='} {limit:g}"


# ---- text --------------------------------------------------------------------------------------


def print_run(run: Row) -> None:
    """Prints what holds for the whole run."""
    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)


def figure(row: Row, key: str, form: str, missing: str = "") -> str:
    return missing if row.get(key) is None else f"{row[key]:{form}}"


Cells = Sequence[str | None]  # None and "" are both empty; they differ in the number of blanks


def table(titles: Cells, rows: Iterable[Cells], text_columns: int = 1) -> str:
    """A table in Markdown, whose first columns are text and all others numbers. A row may have
    fewer cells than there are titles."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(titles) - text_columns)
    filled = [[*row, *[None] * (len(titles) - len(row))] for row in rows]
    return "\n".join([_line(titles), rule, *map(_line, filled)])


def _line(cells: Cells) -> str:
    texts = [" " if cell is None else f" {cell.replace('|', '/')} " for cell in cells]
    return f"|{'|'.join(texts)}|"


def aligned(text: str) -> str:
    """The same with the columns of its table padded, for a terminal."""
    lines = text.splitlines()
    cells = [[x.strip() for x in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [rule.endswith(":") for rule in cells[1]] if cells else []
    padded = iter(
        _line([f"{x:{'>' if right else '<'}{w}}" for x, w, right in zip(row, widths, numbers)])
        for row in cells
    )
    return "\n".join(next(padded) if line[:1] == "|" else line for line in lines)
