"""bupo.runlog.display: what a log and a terminal show of a run."""

import io
import re
import threading
import time
import types

import pytest
from fake_clock import Clock

from bupo import progress, terminal
from bupo.runlog import display
from bupo.runlog.display import Display
from bupo.terminal import TERMINAL, library_output


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """All that was ever shown, without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())


def until(true):
    """Waits for what a thread of the display does soon."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def row_of(step, layer=None):
    row = {"step": step, "layer": layer, "reward/mean": 0.5, "policy/entropy": 1.25}
    return row | {"tokens_per_second": 12345.6}


def test_steps_in_a_log_are_whole_lines(clock):
    stream = io.StringIO()
    shown_by = Display(steps=20, stream=stream)
    for step in range(1, 21):
        clock.now += 2
        shown_by.step(row_of(step, layer=3 if step <= 5 else None))
    text = stream.getvalue()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert lines[0] == (
        "step 1/20 | pi^3 policy | reward 0.500 | entropy 1.25 | 12,346 tokens/s | ETA 0:38"
    )
    steps = [line.split("|")[0].strip() for line in lines]
    assert steps == [f"step {n}/20" for n in (1, 4, 7, 10, 13, 16, 19, 20)], "about every 5 s"
    assert "| final policy |" in lines[-1] and lines[-1].endswith("ETA 0:00")


def test_a_resumed_run_counts_its_own_steps(clock):
    stream = io.StringIO()
    shown_by = Display(steps=20, first=10, stream=stream)
    clock.now += 30
    shown_by.step(row_of(11))
    assert stream.getvalue().rstrip().endswith("ETA 4:30")  # 9 steps of 30 s


def test_a_terminal_shows_steps_and_what_is_under_way():
    stream = Terminal()
    shown_by = Display(steps=3, stream=stream)
    try:
        shown_by.say("said [not markup] first")
        for step in (1, 2):
            shown_by.step(row_of(step))
            with shown_by.waiting(f"step {step + 1}, rollout"):
                progress.report(0.5)
                until(lambda step=step: f"step {step + 1}, rollout" in stream.shown())
            shown_by.say(f"said after step {step}")
    finally:
        shown_by.end()
    text = stream.shown()
    for expected in (
        "said [not markup] first",
        "said after step 2",
        "step 2, rollout",
        "step 1/3 |",
    ):
        assert expected in text, text
    assert "ETA 0:00" in text, "the time that remains"
    last = text.rstrip("\n").split("\n")[-1]
    assert last.strip() == "step 2/3 | final policy | reward 0.500 | entropy 1.25 | 12,346 tokens/s"


def test_any_part_of_a_run_can_speak_while_a_display_is_live():
    """Its line stays above what is drawn; printed directly, the next refresh would erase it."""
    stream = Terminal()
    shown_by = Display(steps=3, stream=stream)
    shown_by.step(row_of(1))
    with shown_by.waiting("step 2, rollout"):
        begin = len(stream.getvalue())
        terminal.say("stopping: saving a checkpoint first")
        until(lambda: "step 2, rollout" in stream.getvalue()[begin:])
        drawn = stream.getvalue()[begin:]
        assert drawn.index("stopping") < drawn.index("step 1/3") < drawn.index("step 2, rollout")
    shown_by.end()
    assert terminal.TERMINAL.above is None


def test_a_terminal_shows_the_same_time_as_a_log(clock):
    """Also for steps of minutes, and the time elapsed while nothing is known of the rest."""
    stream = Terminal()
    shown_by = Display(steps=11, stream=stream)
    with shown_by.waiting("loading"):
        clock.now += 65
        until(lambda: "1:05" in stream.shown())
    clock.now += 35
    shown_by.step(row_of(1))
    until(lambda: "ETA 16:40" in stream.shown())
    shown_by.end()


def test_a_terminal_is_left_as_it_was():
    """Cursor, threads: also where the work fails, and where nothing was shown."""
    before, stream = threading.active_count(), Terminal()
    with pytest.raises(KeyError), Display(stream=stream).waiting("loading"):
        raise KeyError
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    until(lambda: threading.active_count() <= before)  # rich does not wait for the one that it ends
    stream = Terminal()
    Display(stream=stream).end()
    assert stream.getvalue() == ""


def test_a_wait_says_how_long(clock):
    """Or how long it has been, while no fraction is known; the ETA runs between two reports."""
    wait = display.Wait("evaluation")
    clock.now += 65
    assert wait.line() == "evaluation | 1:05"
    wait.done(0.5)
    assert wait.line() == "evaluation: 50% | ETA 1:05"
    clock.now += 20
    assert wait.line() == "evaluation: 50% | ETA 0:45"
    clock.now += 60
    assert wait.line() == "evaluation: 50% | ETA 0:00"
    wait.done(0.75)
    assert wait.line() == "evaluation: 75% | ETA 0:48"


def test_what_takes_long_is_told_in_a_log(monkeypatch):
    """After five seconds, then ever more rarely; what is over sooner leaves no trace."""

    class Event:
        """Five, ten and twenty seconds pass in none."""

        def __init__(self):
            self.pauses = []

        def wait(self, pause):
            self.pauses.append(pause)
            return len(self.pauses) > 3 or quick

        def set(self):
            events.append(self)

    events, quick = [], False
    fake = types.SimpleNamespace(Event=Event, Thread=threading.Thread)
    monkeypatch.setattr(display, "threading", fake)
    stream = io.StringIO()
    with Display(stream=stream).waiting("loading MODEL"):
        until(lambda: stream.getvalue().count("\n") >= 3)
    assert events[0].pauses == [5, 10, 20, 40]
    assert stream.getvalue() == "loading MODEL | 0:00\n" * 3
    quick, stream = True, io.StringIO()
    with Display(stream=stream).waiting("rollout"):
        progress.report(0.5)
    assert stream.getvalue() == ""


def test_a_stream_is_not_closed_while_a_live_display_writes_to_it():
    """Its thread would freeze, or fail, at a stream that has just been closed."""
    began, ended = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text):
            began.set()
            ended.wait(0.2)  # nobody sets it: the other thread has this time to be wrong
            ended.set()
            return len(text)

    with library_output(None):
        TERMINAL.aside = Slow()
        thread = threading.Thread(target=TERMINAL.write, args=("a line",))
        thread.start()
        assert began.wait(60)
    assert ended.is_set()
    thread.join()
