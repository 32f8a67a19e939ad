"""bupo.auto_layer: the layer of phase 1, measured on the model that a run begins with."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_samples import assert_same_run, rows, run
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ["steps=3", "bupo.steps=2", "bupo.auto_layer=0.1", "eval.every=0", "data.limit=40"]


@pytest.fixture
def loud_top(tmp_path: Path) -> Iterator[None]:
    """The task's model with an FFN in layer 2 that writes fifty times as much, so with far less
    entropy than what it reads: the FFN of layer 1 is the last to explore."""
    assert run(tmp_path / "first", "steps=1", "bupo.steps=0") == 0  # makes the model
    cache = Path(os.environ["BUPO_CACHE"])
    (file,) = cache.glob("arithmetic-qwen3-2-32-4-*-4-0-*/model/model.safetensors")
    before, weights = file.read_bytes(), load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"] *= 5000
    weights["model.layers.0.mlp.down_proj.weight"] *= 0.01  # nearly uniform
    try:
        save_file(weights, file, {"format": "pt"})
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.usefixtures("loud_top")
def test_the_layer_is_measured_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "whole", *SETTINGS, "bupo.layer=2") == 0
    record = json.loads((tmp_path / "whole/auto_layer.json").read_text())
    assert record["layer"] == 1 and (record["low"], record["high"]) == (1, 1)
    assert record["curve"][0] > 0 > record["curve"][1] and record["responses"] == 40
    assert [row["layer"] for row in rows(tmp_path / "whole/metrics.jsonl")] == [1, 1, None]
    assert "auto_layer: layer 1 of 2" in capsys.readouterr().err
    stopped = tmp_path / "stopped"
    assert run(stopped, *SETTINGS, "bupo.layer=2", stop=3) == 128 + signal.SIGTERM
    (stopped / "auto_layer.json").write_text(json.dumps(record))  # as it was: nothing else is read
    assert run(stopped, *SETTINGS, "bupo.layer=2", "resume=auto") == 0
    assert_same_run(tmp_path / "whole", stopped)
    lost = tmp_path / "lost"
    assert run(lost, *SETTINGS, "bupo.layer=2", stop=3) == 128 + signal.SIGTERM
    (lost / "auto_layer.json").unlink()
    assert run(lost, *SETTINGS, "bupo.layer=2", "resume=auto") == 1
    assert "auto_layer.json, which records" in capsys.readouterr().err


def test_no_clear_boundary_stops_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task's own model: both FFNs raise the entropy."""
    assert run(tmp_path / "run", *SETTINGS) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bupo.auto_layer: no clear boundary in 40 responses (the FFN of the last layer" in last
    assert "set bupo.layer, bupo.auto_layer=null" in last
    assert json.loads((tmp_path / "run/auto_layer.failed.json").read_text())["layer"] is None
    assert not (tmp_path / "run/auto_layer.json").exists()


def test_it_is_for_bupo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", *SETTINGS, "algorithm=grpo") == 2
    assert "bupo.auto_layer needs policy=bupo" in capsys.readouterr().err
