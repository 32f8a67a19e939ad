"""Rewards in processes of their own, which may hang, die or start others."""

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from bupo.config import ConfigError, RewardConfig
from bupo.rewards import killable, mathematics
from bupo.rewards.choice import make_reward
from bupo.types import Grades

HANGS = ("\\boxed{9^{9^{9^9}}}", "9^{9^{9^8}}")
"""Numbers of about 10^369,693,100 digits, which sympy would like to know exactly."""


def test_a_hanging_answer_is_killed_at_the_deadline():
    reward = make_reward(RewardConfig(timeout=3, workers=2))
    before = [w.process for w in reward._workers]
    good, wrong = ("\\boxed{\\frac{2}{4}}", "0.5"), ("\\boxed{1}", "2")
    try:
        grades = reward.grade([HANGS, good, wrong, HANGS, good, wrong, good])
        assert str(grades.rewards) == "[nan, 1.0, 0.0, nan, 1.0, 0.0, 1.0]"
        assert (grades.timeouts, grades.errors) == (2, 0)
        assert grades.first_failure == f"answer {HANGS[1]!r}: timeout"
        assert any(p.poll() is not None for p in before), "a worker that hangs is ended"
        assert all(w.process.poll() is None for w in reward._workers), "and replaced"
        assert reward.grade([wrong, good]) == Grades([0.0, 1.0])
    finally:
        reward.close()
    assert all(w.process.poll() is not None for w in reward._workers)


def test_closing_while_an_answer_is_graded_starts_no_new_worker(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(killable.subprocess, "Popen", Popen)
    reward = make_reward(RewardConfig(timeout=3000, workers=1))

    def grade_two():
        with pytest.raises(CancelledError):
            reward.grade([HANGS, HANGS])

    grading = threading.Thread(target=grade_two)
    grading.start()
    deadline = time.monotonic() + 60
    while reward._workers[0].grading is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reward.close()
    grading.join()
    assert len(started) == 1 and started[0].poll() is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_start_leaves_no_worker(monkeypatch, error):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            if len(started) == 2:
                raise error
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(killable.subprocess, "Popen", Popen)
    with pytest.raises(error):
        make_reward(RewardConfig(workers=3))
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_worker_that_dies_at_work_is_replaced():
    reward = make_reward(RewardConfig(timeout=120, workers=2))

    def kill_who_hangs():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for worker in reward._workers:
                if worker.grading == HANGS[1]:
                    return worker.process.kill()
            time.sleep(0.01)

    thread = threading.Thread(target=kill_who_hangs, daemon=True)
    thread.start()
    try:
        good = ("\\boxed{0.5}", "\\frac{1}{2}")
        grades = reward.grade([good, HANGS, good, good, ("\\boxed{1}", "2"), good])
        assert str(grades.rewards) == "[1.0, nan, 1.0, 1.0, 0.0, 1.0]"
        assert (grades.timeouts, grades.errors) == (0, 1)
        assert grades.first_failure == f"answer {HANGS[1]!r}: its worker died"
        assert reward.grade([good, good]) == Grades([1.0, 1.0])
    finally:
        thread.join()
        reward.close()


def test_a_worker_that_dies_between_batches_is_replaced():
    reward = make_reward(RewardConfig(timeout=60, workers=1))
    process = reward._workers[0].process
    process.kill()
    process.wait()
    try:
        pairs = [("\\boxed{5}", "5"), ("\\boxed{6}", "5")]
        assert reward.grade(pairs) == Grades([1.0, 0.0])
    finally:
        reward.close()


def test_self_check_refuses_a_broken_installation(monkeypatch):
    started = []

    class Recorded(killable._Worker):
        def __init__(self, function):
            super().__init__(function)
            started.append(self.process)

    monkeypatch.setattr(killable, "_Worker", Recorded)
    monkeypatch.setattr(mathematics, "GOLDEN", [*mathematics.GOLDEN, ("\\boxed{1}", "2", 1.0)])
    with pytest.raises(ConfigError, match=r"self-check.*boxed\{1\}"):
        make_reward(RewardConfig(timeout=60, workers=2))
    assert len(started) == 2 and all(p.poll() is not None for p in started), "no process is left"


def test_self_check_refuses_timeouts(monkeypatch):
    monkeypatch.setattr(mathematics, "GOLDEN", [(*HANGS, 0.0)])
    with pytest.raises(ConfigError, match=r"self-check on answer .*: timeout"):
        make_reward(RewardConfig(timeout=0.5, workers=1))


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match="does not start"):
        make_reward(RewardConfig())


def test_a_function_is_called_in_processes_that_can_be_killed(custom):
    """If its module says so. What it prints disturbs nothing."""
    name = custom(
        "print('hello', flush=True)\n"
        "while responses == ['hangs']: pass\n"
        "if responses == ['exits']: __import__('os')._exit(1)\n"
        "return {'none': [None], 'two': [1, 2], 'error': answers[1:]}.get(responses[0], [2])",
        "KILLABLE = True",
    )
    reward = make_reward(RewardConfig(function=name, timeout=3, workers=2))
    try:
        grades = reward.grade([(r, "1") for r in ("hangs", "none", "two", "error", "exits", "ok")])
    finally:
        reward.close()
    assert str(grades.rewards) == "[nan, nan, nan, nan, nan, 2.0]"
    assert (grades.timeouts, grades.errors) == (1, 4)


def test_what_a_function_has_started_ends_with_it(custom, tmp_path):
    name = custom(
        "import subprocess\n"
        f"child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "child.wait()",
        "KILLABLE = True",
    )
    reward = make_reward(RewardConfig(function=name, timeout=3, workers=1))
    try:
        assert reward.grade([("", "1")]).timeouts == 1
    finally:
        reward.close()
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_what_a_process_cannot_load_is_said(custom):
    name = custom("return [1]", "KILLABLE = True\ndef load():\n    import not_there")
    message = "does not start: ModuleNotFoundError: No module named 'not_there'"
    with pytest.raises(ConfigError, match=message):
        make_reward(RewardConfig(function=name))


def test_a_killed_trainer_leaves_no_worker_behind():
    """SIGKILL of the parent while an answer hangs: the worker must not compute on for ever."""
    code = (
        "from bupo.config import RewardConfig; from bupo.rewards.choice import make_reward\n"
        "r = make_reward(RewardConfig(timeout=600, workers=1))\n"
        "print(r._workers[0].process.pid, flush=True)\n"
        "r.grade([('\\\\boxed{9^{9^{9^9}}}', '3')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / parent.stdout.readline().strip()
    assert (worker / "stat").exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while worker.exists() and (worker / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker outlived the trainer"
        time.sleep(0.05)
