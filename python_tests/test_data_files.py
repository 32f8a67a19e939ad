"""bupo.data.data_files: the places that rows come from."""

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rl_samples import verl_row, write_parquet

from bupo.config import ConfigError
from bupo.data import data_files

ROWS = [verl_row(f"{n}+{n}?", str(2 * n)) for n in range(5)]


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=2)


def test_a_saved_dataset(tmp_path):
    saved(tmp_path / "mine", ROWS)
    assert data_files.read(str(tmp_path / "mine")) == ROWS
    assert data_files.stem(str(tmp_path / "mine")) == "mine"
    with pytest.raises(ConfigError, match=r"holds a single split, so .*mine:test does not exist"):
        data_files.read(f"{tmp_path}/mine:test")


def test_splits_of_a_saved_dataset(tmp_path):
    splits = {"train": ROWS[:3], "test": ROWS[3:]}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"dev": made["test"]}).save_to_disk(tmp_path / "one")
    assert data_files.read(f"{tmp_path}/two") == ROWS[:3]
    assert data_files.read(f"{tmp_path}/two:test") == ROWS[3:]
    assert data_files.read(f"{tmp_path}/one") == ROWS[3:], "the only one there is"
    with pytest.raises(ConfigError, match="has the splits train, test, not dev"):
        data_files.read(f"{tmp_path}/two:dev")


def test_a_saved_dataset_needs_a_package(tmp_path, monkeypatch):
    saved(tmp_path / "mine", ROWS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"was saved by Hugging Face datasets; .* install"):
        data_files.check(f"{tmp_path}/mine:train")


def test_a_folder_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", ROWS[2:4])
    write_jsonl(tmp_path / "test/part.jsonl", ROWS[4:])
    assert data_files.read(str(tmp_path)) == ROWS[:4], "the train split, in order"
    assert data_files.read(f"{tmp_path}:test") == ROWS[4:]
    assert data_files.read(str(tmp_path / "test")) == ROWS[4:], "no split: all of it"
    with pytest.raises(ConfigError, match=r"no \.parquet or \.jsonl files of split dev"):
        data_files.read(f"{tmp_path}:dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.parquet or \.jsonl files and no saved dataset"):
        data_files.read(str(tmp_path / "empty"))


def test_a_name_with_a_colon_is_a_file_if_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a:b.jsonl"), ROWS[:1])
    assert data_files.read("a:b.jsonl") == ROWS[:1]
    with pytest.raises(ConfigError, match="a file has no splits"):
        write_jsonl(Path("c.jsonl"), ROWS[:1])
        data_files.read("c.jsonl:train")


@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00002.arrow"])
def test_a_torn_saved_dataset_is_named(tmp_path, name):
    saved(tmp_path / "torn", ROWS)
    (tmp_path / "torn" / name).write_text("{")
    with pytest.raises(ConfigError, match="torn is not a saved dataset: "):
        data_files.read(str(tmp_path / "torn"))


@pytest.fixture
def hub(monkeypatch):
    """Stands for the package datasets and the hub behind it."""

    def load_dataset(name, configuration, split):
        if name == "some/set" and split in ("train", "dev"):
            return [{"prompt": split, "answer": configuration or "1"}]
        raise ConnectionError("no such set\nand a long story")

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_set_of_the_hub(hub):
    data_files.check("some/set")
    assert data_files.read("some/set") == [{"prompt": "train", "answer": "1"}]
    assert data_files.read("some/set:dev") == [{"prompt": "dev", "answer": "1"}]
    assert data_files.read("some/set:main/dev") == [{"prompt": "dev", "answer": "main"}]
    assert data_files.stem("some/set:main/dev") == "set"
    with pytest.raises(
        ConfigError, match=r"some/set:test cannot be read from the hub: no such set$"
    ):
        data_files.read("some/set:test")


def test_the_hub_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "data file not found: some/set:dev; .* install the package datasets$"
    with pytest.raises(ConfigError, match=message):
        data_files.check("some/set:dev")


@pytest.mark.parametrize("name", ["nowhere/file.parquet", "/nowhere/x", "nowhere", "a/b/c"])
def test_what_is_no_hub_name_is_a_missing_file(hub, name):
    with pytest.raises(ConfigError, match=f"^data file not found: {name}; put it there"):
        data_files.check(name)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (b'{"prompt": ', "Expecting value at character 11"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_line_is_counted_from_the_beginning(tmp_path, broken, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "\xe2\x80\xa8"}\n\n{"prompt": "y"}\n' + broken + b"\n{}\n")
    with pytest.raises(ConfigError, match=f"a.jsonl is not JSON lines: line 4: {reason}"):
        data_files.read(str(file))


def test_columns_that_are_there_twice(tmp_path):
    columns = [pa.array(["q"]), pa.array(["a"]), pa.array([1]), pa.array([2])]
    for name in ("prompt", "note"):
        table = pa.table(columns, names=["prompt", "answer", name, name])
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert data_files.read(str(tmp_path / "note.parquet")) == [{"prompt": "q", "answer": "a"}]
    with pytest.raises(ConfigError, match=r"prompt\.parquet has more than one column prompt; keep"):
        data_files.read(str(tmp_path / "prompt.parquet"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, name):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", name)

    (tmp_path / name).touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read: Permission denied$"):
        data_files.read(str(tmp_path / name))


def test_a_name_that_the_system_refuses():
    with pytest.raises(ConfigError, match=r"x\.jsonl cannot be read: File name too long$"):
        data_files.check("x" * 300 + ".jsonl")


def test_without_a_network_the_error_tells_what_to_do(hub, monkeypatch):
    logger = logging.getLogger("huggingface_hub.utils._http")

    def load_dataset(name, configuration, split):
        assert not logger.isEnabledFor(logging.WARNING)
        raise ConnectionError("Couldn't reach the hub: cannot connect")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"cannot connect; .* set HF_HUB_OFFLINE=1$"):
        data_files.read("some/set")
