"""Reads rows of data from parquet and JSON lines files, folders, and sets of the Hugging Face hub.

A name may end in `:SPLIT` or, on the hub, in `:CONFIGURATION/SPLIT`. A folder either was saved by
`datasets` (save_to_disk) or contains parquet or JSON lines files; a split then consists of the
files whose name or folder begins with the name of the split. Single files are read without
`datasets`, because its loader copies them to a cache, requires one type per column, and does not
name the line that is wrong.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bupo import hub
from bupo.config import ConfigError, first_line, readable

Rows = list[dict[str, Any]]
_OURS = {"prompt", "answer", "reward_model", "data_source"}
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def check(name: str) -> None:
    """Raises ConfigError unless rows can be read from this name; does not look at their content."""
    with readable(name):
        place, _ = _split(name)
        saved = _is_saved(Path(place))
        if Path(place).exists() and not saved:
            return
    if saved:
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                f"{name} was saved by Hugging Face datasets; to read it, install the package "
                "datasets, or save it as parquet (to_parquet)"
            )
        return
    if not hub.is_name(place, owner=True) or Path(place).suffix in _READERS:
        raise ConfigError(
            f"data file not found: {name}; put it there, or leave it out of data.train or "
            "eval.files (the recipes read the folder BUPO_DATA, or data/ if it is not set)"
        )
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"data file not found: {name}; to read it from the Hugging Face hub, install the "
            "package datasets"
        )


def stem(name: str) -> str:
    """Returns the data source of rows without data_source."""
    place, _ = _split(name)
    return Path(place).stem if Path(place).suffix in _READERS else Path(place).name


def read(name: str) -> Rows:
    """Returns all rows of a file, folder or hub name. Raises ConfigError with one line of text."""
    check(name)
    with readable(name):
        return _read(name)


def _read(name: str) -> Rows:
    place, split = _split(name)
    path = Path(place)
    if not path.exists():
        return _from_hub(place, split or "train")
    if path.is_dir():
        return _from_folder(path, split)
    if split is not None:
        raise ConfigError(f"{name}: a file has no splits")
    return _reader(path)(path)


def _split(name: str) -> tuple[str, str | None]:
    if Path(name).exists():
        return name, None
    place, colon, split = name.rpartition(":")
    return (place, split) if colon else (name, None)


def _parquet(file: Path) -> Rows:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
    except ValueError as error:  # pyarrow's errors derive from it
        raise ConfigError(f"{file} is not a parquet file: {first_line(error)}") from None
    names = table.column_names
    twice = {name for name in names if names.count(name) > 1}
    if ours := sorted(twice & _OURS):
        raise ConfigError(f"{file} has more than one column {ours[0]}; keep one of them")
    # bupo does not read the other columns that appear twice, so they are left out.
    rows: Rows = table.select([n for n, x in enumerate(names) if x not in twice]).to_pylist()
    return rows


def _json_lines(file: Path) -> Rows:
    rows: Rows = []
    for n, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            if text := line.decode("utf-8").strip():
                rows.append(json.loads(text))
        except json.JSONDecodeError as error:
            reason = f"line {n}: {error.msg} at character {error.pos + 1}"
            raise ConfigError(f"{file} is not JSON lines: {reason}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not JSON lines: line {n}: {error}") from None
    return rows


_READERS: dict[str, Callable[[Path], Rows]] = {".parquet": _parquet, ".jsonl": _json_lines}


def _reader(file: Path) -> Callable[[Path], Rows]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise ConfigError(f"data file must end in .parquet or .jsonl, got {file}")
    return reader


def _is_saved(folder: Path) -> bool:
    """Whether Hugging Face datasets has saved one or several splits in this folder."""
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def _from_folder(folder: Path, split: str | None) -> Rows:
    if _is_saved(folder):
        return _saved(folder, split)
    files = sorted(f for f in folder.rglob("*") if f.suffix in _READERS and f.is_file())
    chosen = split or "train"
    of_split = [f for f in files if any(p.startswith(chosen) for p in f.relative_to(folder).parts)]
    if split is None and not of_split:
        of_split = files
    if not of_split:
        what = f"of split {split} " if split else ""
        raise ConfigError(f"{folder} has no .parquet or .jsonl files {what}and no saved dataset")
    return [row for file in of_split for row in _reader(file)(file)]


def _saved(folder: Path, split: str | None) -> Rows:
    """Returns the rows of one split that Hugging Face datasets has saved."""
    import datasets

    try:
        with hub.quiet():
            saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # many types: a damaged list, a damaged file, another format
        raise ConfigError(f"{folder} is not a saved dataset: {first_line(error)}") from None
    if not isinstance(saved, dict):
        if split is not None:
            raise ConfigError(f"{folder} holds a single split, so {folder}:{split} does not exist")
        return list(saved.to_list())
    chosen = split or (next(iter(saved)) if len(saved) == 1 else "train")
    if chosen not in saved:
        raise ConfigError(f"{folder} has the splits {', '.join(saved)}, not {chosen}")
    return list(saved[chosen].to_list())


def _from_hub(name: str, split: str) -> Rows:
    import datasets

    configuration, _, part = split.rpartition("/")
    try:
        with hub.quiet():
            rows = datasets.load_dataset(name, configuration or None, split=part)
            return [dict(row) for row in rows]
    except Exception as error:  # many types: no network, no such data set, no such split
        reason = hub.reason(error)
        raise ConfigError(f"{name}:{split} cannot be read from the hub: {reason}") from None
