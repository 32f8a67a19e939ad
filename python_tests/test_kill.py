"""SIGKILL at any moment: the run always goes on, and nothing of it is lost or there twice."""

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import kill_samples
import pytest
from run_samples import assert_same_run

from bupo.rl import checkpoint
from bupo.runlog import run_directory

KILLS, STEPS = 20, 30


def metric_steps(out: Path) -> list[int]:
    """Of whole lines; the last one may be cut."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def saving(out: Path) -> list[str]:
    """Names of checkpoints that are being written."""
    return [p.name for p in (out / "checkpoints").glob(".step_*")]


def test_killed_twenty_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other time while a checkpoint is being written, else at a random moment."""
    # The server that processes are forked from has to find the module that it imports first.
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_samples"])
    rng = random.Random(0)
    out, whole = tmp_path / "killed", tmp_path / "whole"

    def start(where: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=kill_samples.run, args=(where,))
        process.start()
        return process

    process = start(whole)
    process.join()
    assert process.exitcode == 0, (tmp_path / "whole.log").read_text()

    killed = torn = 0
    highest = 0
    while killed < KILLS:
        process = start(out)
        before, deadline = (
            saving(out),
            time.monotonic() + (20 if killed % 2 else rng.uniform(0, 1.8)),
        )
        while process.is_alive() and time.monotonic() < deadline:
            if killed % 2 and set(saving(out)) - set(before):
                time.sleep(rng.choice([0, 0, 0.005, 0.02]))  # a save takes from 10 ms on
                break
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), (tmp_path / "killed.log").read_text()
        killed += 1
        torn += bool(saving(out))
        steps = metric_steps(out)
        assert steps == list(range(1, len(steps) + 1)), "no step is missing or there twice"
        points = [checkpoint.load_step(p) for p in run_directory.checkpoints(out)]
        assert max(points, default=0) <= len(steps), "no checkpoint is ahead of the metrics"
        assert max(points, default=0) >= highest, "no whole checkpoint is lost"
        highest = max(points, default=0)
        if highest >= STEPS - 2:  # through too early on a fast machine: once more from the start
            shutil.rmtree(out)
            highest = 0
    process = start(out)
    process.join()
    assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
    print(f"{torn} of {killed} kills left a checkpoint half written")
    assert torn >= 3, f"only {torn} of {killed} kills hit a checkpoint being written"
    phases = [json.loads(line)["phase"] for line in (out / "metrics.jsonl").open()]
    assert phases == ["internal"] * 6 + ["final"] * 24, "auto_stop has ended phase 1, once"
    assert_same_run(whole, out)
    assert not saving(out), "what was torn is cleared away"
