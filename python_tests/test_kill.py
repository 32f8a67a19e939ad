"""SIGKILL at any moment: the run always goes on, and nothing of it is lost or there twice."""

import json
import multiprocessing
import os
import random
import shutil
import socket
import time
from multiprocessing.process import BaseProcess
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("world", [1, 2])
def test_killed_twenty_times(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other time while a checkpoint is being written, else at a random moment. Two
    ranks write checkpoints in the background; a random one is killed, and the other one ends."""
    # The server that processes are forked from has to find the module that it imports first.
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_samples"])
    rng = random.Random(0)
    out, whole = tmp_path / "killed", tmp_path / "whole"

    def start(where: Path) -> list[BaseProcess]:
        port = free_port()
        ranks = [
            context.Process(target=kill_samples.run, args=(where, rank, world, port))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        return [*ranks]

    def finish(where: Path) -> None:
        for process in start(where):
            process.join()
            assert process.exitcode == 0, where.with_suffix(".log").read_text()

    finish(whole)

    killed = torn = 0
    highest = 0
    while killed < KILLS:
        ranks, before = start(out), saving(out)
        deadline = time.monotonic() + (20 if killed % 2 else rng.uniform(0, 1.8 * world))
        while ranks[0].is_alive() and time.monotonic() < deadline:
            if killed % 2 and set(saving(out)) - set(before):
                time.sleep(rng.choice([0, 0, 0.005, 0.02]))  # a save takes from 10 ms on
                break
            time.sleep(0.0005)
        rng.choice(ranks).kill()
        for process in ranks:
            process.join(60)
        ends = {process.exitcode for process in ranks}
        assert ends <= {0, -9, 1}, (ends, (tmp_path / "killed.log").read_text())
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
    finish(out)
    print(f"{torn} of {killed} kills left a checkpoint half written")
    assert torn >= 3, f"only {torn} of {killed} kills hit a checkpoint being written"
    phases = [json.loads(line)["phase"] for line in (out / "metrics.jsonl").open()]
    assert phases == ["internal"] * 6 + ["final"] * 24, "auto_stop has ended phase 1, once"
    assert_same_run(whole, out)
    assert not saving(out), "what was torn is cleared away"
