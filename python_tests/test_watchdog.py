"""bupo.runlog.watchdog: a stage that hangs is named, wherever it hangs."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from run_samples import arguments

from bupo.run import main
from bupo.runlog.watchdog import FILE, Watchdog


def a_stage_that_sleeps(seconds: float) -> None:
    time.sleep(seconds)


def test_a_slow_stage_is_named_with_its_stack_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = Watchdog(tmp_path, 0.5)
    with dog.stage("step 3, stage rollout"):
        pass
    with dog.stage("step 3, stage reward"):
        a_stage_that_sleeps(1.2)
    with dog.stage("step 3, stage update"):
        pass
    dog.close()
    text = (tmp_path / FILE).read_text()
    assert "stage reward began or advanced; it has made no further progress for 0.5 s:" in text
    assert "Thread 0x" in text and "in a_stage_that_sleeps" in text
    assert "rollout" not in text and "update" not in text, "what went well leaves nothing"
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        "step 3, stage reward has made no progress for 0.5 s; the stacks of all threads are in "
        f"{tmp_path / FILE}"
    ]


def test_what_goes_well_leaves_no_file(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 1.0)
    for _ in range(20):
        with dog.stage("quick"):
            pass
    with dog.stage("long, with signs of life"):
        for _ in range(14):
            time.sleep(0.1)
            dog.alive()
    time.sleep(1.2)  # between stages nothing is watched
    dog.close()
    assert not (tmp_path / FILE).exists()


def test_signs_of_life_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine gives one for every token, and the run directory may be on a network."""
    dog, restarts = Watchdog(tmp_path, 600), []
    monkeypatch.setattr(dog, "_collect", lambda begin=False: restarts.append(begin))
    with dog.stage("rollout"):
        for _ in range(10_000):
            dog.alive()
    dog.close()
    assert len(restarts) < 100, "three, and one for each second that the loop has taken"


def test_earlier_stalls_are_kept(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("of an earlier process\n")
    dog = Watchdog(tmp_path, 0.2)
    for name in ("first", "second"):
        with dog.stage(name):
            time.sleep(0.5)
    with dog.stage("third"):
        pass
    dog.close()
    text = (tmp_path / FILE).read_text()
    assert text.startswith("of an earlier process\n") and text.count("most recent call first") >= 2
    assert text.index("first began") < text.index("second began") and "third" not in text


def test_nothing_claims_a_stall_before_there_is_one(tmp_path: Path) -> None:
    """Nor does a file with such a name stand there."""
    dog = Watchdog(tmp_path, 60)
    with dog.stage("step 1, stage rollout"):
        assert not (tmp_path / FILE).exists()
    dog.close()
    assert not list(tmp_path.iterdir())


def test_stacks_of_a_process_that_was_killed_while_it_hung_are_kept(tmp_path: Path) -> None:
    """No Python could move them to their file any more; the next process does."""
    code = f"""
    from pathlib import Path
    from bupo.runlog.watchdog import Watchdog

    with Watchdog(Path({str(tmp_path)!r}), 0.3).stage("step 1, stage reward"):
        9 ** (9 ** 9)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 60
    while "most recent call" not in (
        (tmp_path / f".{FILE}").read_text() if (tmp_path / f".{FILE}").exists() else ""
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / FILE).exists()
    Watchdog(tmp_path, 60).close()
    text = (tmp_path / FILE).read_text()
    assert "stage reward began or advanced; it has made no further progress for 0.3 s:" in text
    assert "most recent call first" in text
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_zero_watches_nothing(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0)
    with dog.stage("x"):
        time.sleep(0.05)
    dog.close()
    assert not list(tmp_path.iterdir())


def test_code_that_never_lets_go_of_the_interpreter(tmp_path: Path) -> None:
    """A thread of Python's could not run here. With kill the process ends, named and shown."""
    code = f"""
    from pathlib import Path
    from bupo.runlog.watchdog import Watchdog

    def for_ever():
        return 9 ** (9 ** 9)

    dog = Watchdog(Path({str(tmp_path)!r}), 0.5, kill=True)
    with dog.stage("step 1, stage reward"):
        for_ever()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == 1
    text = (tmp_path / FILE).read_text()
    assert "stage reward" in text and "in for_ever" in text and "the process is ended if it" in text


def sleeps_once(responses: list[str], answers: list[str]) -> list[float]:
    time.sleep(0.9)
    return [float(len(r)) for r in responses]


def test_a_run_names_its_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "reward.function=test_watchdog:sleeps_once", "eval.every=0", "eval.limit=1",
        "steps=1", "bupo.steps=0", "watchdog.seconds=0.5", "eval.samples=1", "eval.pass_k=[1]",
    ]  # fmt: skip
    assert main(arguments(tmp_path / "run", *settings)) == 0
    errors = capsys.readouterr().err
    text = (tmp_path / "run" / FILE).read_text()
    for stage in ("step 1, stage reward", "step 0, stage evaluation on addition"):
        assert f"{stage} has made no progress for 0.5 s" in errors
        assert f"{stage} began" in text
    assert "in sleeps_once" in text
