"""Two processes never train into one directory: real processes, ended in every way."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run_samples
from run_samples import arguments, rows

from bupo import analyze, evaluate
from bupo.commands import run_lock
from bupo.config import ConfigError
from bupo.run import main

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}

CONSTANT = "optimizer.schedule=constant"


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bupo.run", *arguments(out, "steps=100000", CONSTANT, *more)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for_a_step(process: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)


def test_a_second_process_is_refused_until_the_first_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one line that names it. SIGKILL leaves the file, which then stands in nobody's way."""
    out = tmp_path / "run"
    first = start(out)
    try:
        wait_for_a_step(first, out)
        before = (out / "config.yaml").read_bytes()
        assert run_samples.run(out, "steps=100000", CONSTANT, "resume=auto") == 2
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith(
            f"bupo.run: out={out} is in use by process {first.pid} on {socket.gethostname()}; "
        )
        assert (out / "config.yaml").read_bytes() == before
        assert run_samples.run(out, "steps=100000", CONSTANT, "resume=auto") == 2, (
            "nor did that free it"
        )
    finally:
        first.kill()
        first.communicate()
    assert json.loads((out / run_lock.FILE).read_text())["pid"] == first.pid
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert run_samples.run(out, f"steps={done + 1}", CONSTANT, "resume=auto") == 0
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, done + 2))
    assert not (out / run_lock.FILE).exists()


def test_sigterm_frees_the_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(out)
    wait_for_a_step(first, out)
    first.terminate()
    first.communicate()
    assert first.returncode == 128 + signal.SIGTERM and not (out / run_lock.FILE).exists()


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_the_other_commands_hold_their_directory_too(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "task_options={layers: 2, width: 32, warm_steps: 4, eval_problems: 4}"
    settings = ["--out", str(tmp_path), "task=bupo.tasks.arithmetic", sizes]
    settings += ["rollout.max_new_tokens=12"]
    settings += ["prompts=2"] if command == "analyze" else ["eval.samples=1"]
    program: Any = {"evaluate": evaluate, "analyze": analyze}[command]
    with run_lock.locked(tmp_path):
        assert program.main(settings) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {"responses"}, "nothing was written"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file alone tells: of this host by its processes, of another not at all."""

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    file = tmp_path / run_lock.FILE
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine, theirs = socket.gethostname(), "elsewhere"
    for pid, host, free in [
        (os.getppid(), mine, False), (ended.pid, mine, True), (ended.pid, theirs, False)
    ]:  # fmt: skip
        file.write_text(json.dumps({"pid": pid, "host": host}))
        if free:
            with run_lock.locked(tmp_path):
                assert json.loads(file.read_text()) == {"pid": os.getpid(), "host": mine}
            continue
        with (
            pytest.raises(ConfigError, match=f"process {pid} on {host}; .* remove {file}"),
            run_lock.locked(tmp_path),
        ):
            pass
        file.unlink()
    file.write_text("torn")
    with run_lock.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (main, "WORLD_SIZE=2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; start"),
        (evaluate.main, "WORLD_SIZE=2: bupo.evaluate works in a single process"),
        (analyze.main, "WORLD_SIZE=2: bupo.analyze works in a single process"),
    ],
)
def test_a_part_of_torchrun_is_refused(
    program: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_model: None,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some schedulers do
    out = tmp_path / "run"
    assert program(["--out", str(out), "task=bupo.tasks.arithmetic"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1 and not out.exists()


def test_a_run_that_cannot_begin_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    out = tmp_path / "run"
    assert main(arguments(out, "bupo.layer=3")) == 2
    assert main(arguments(out, "reward.function=run_samples:nothing")) == 2
    assert not out.exists()


def test_two_first_runs_make_the_task_once(tmp_path: Path) -> None:
    """At the same moment, with an empty cache: one of them makes the model, the other waits."""
    environment = ENVIRONMENT | {"BUPO_CACHE": str(tmp_path / "cache")}
    few = ["steps=1", "bupo.steps=0", "eval.every=0", "diagnostics.every=0"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "bupo.run", *arguments(tmp_path / name, *few)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert rows(tmp_path / "a/metrics.jsonl") == rows(tmp_path / "b/metrics.jsonl")
