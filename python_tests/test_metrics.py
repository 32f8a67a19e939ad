"""bupo.runlog: files that a kill can cut, a mirror that may break, lines for two terminals."""

import json
import math
import sys
import types

import pytest
import torch.utils.tensorboard
from fake_clock import Clock

from bupo.runlog import monitor
from bupo.runlog import recorder as metrics
from bupo.runlog.monitor import Stopwatch
from bupo.runlog.recorder import Recorder
from bupo.runlog.run_directory import read_rows
from bupo.runlog.step_metrics import time_line
from bupo.types import EvalResult


def strict_lines(file):
    """Rows of valid JSON, which knows no NaN."""

    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]


def row_of(step, **more):
    return {"step": step, "layer": None, "reward/mean": 0.5, "policy/entropy": 1.25} | more


def test_rows_of_a_missing_or_empty_file(tmp_path):
    assert read_rows(tmp_path / "gone.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_rows(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_cut_last_line_is_left_out(tmp_path, cut):
    file = tmp_path / "rows.jsonl"
    whole = '{"step": 1, "x": 0.5}\n{"step": 2, "x": 0.25}\n'
    file.write_text(whole[:-1])
    assert [r["step"] for r in read_rows(file)] == [1, 2], "only the newline is missing"
    file.write_text(whole[: -1 - cut])
    assert read_rows(file) == [{"step": 1, "x": 0.5}]


def test_recorder_continues_after_the_step_it_is_told(tmp_path):
    for name in ("metrics.jsonl", "eval.jsonl"):
        text = "".join(json.dumps({"step": n, "of": name}) + "\n" for n in (0, 1, 2, 3, 4))
        (tmp_path / name).write_text(text + '{"step": 5, "o')
    recorder = Recorder(tmp_path, keep_until_step=2)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert strict_lines(tmp_path / name) == [{"step": n, "of": name} for n in (0, 1, 2)]
    recorder.step(row_of(3))
    recorder.step(row_of(4))
    recorder.close()
    rows = strict_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and "of" not in rows[3]
    assert read_rows(tmp_path / "metrics.jsonl") == rows


def test_a_new_run_starts_with_empty_files(tmp_path):
    Recorder(tmp_path, keep_until_step=0).close()
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(tmp_path / "eval.jsonl") == []


def test_every_row_is_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path, keep_until_step=0)
    recorder.step(row_of(1))
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1, "before close()"
    recorder.close()


def test_what_is_not_finite_becomes_null(tmp_path):
    recorder = Recorder(tmp_path, keep_until_step=0)
    recorder.step(row_of(1, **{"policy/loss": math.nan, "a/b": math.inf, "c/d": -math.inf}))
    passes = {1: (0.5, math.nan), 4: None}
    result = EvalResult("set", 1, 2, 0.5, math.nan, passes, None, 7.0, 0.25, 0.5)
    recorder.evaluation(1, "before", result)
    recorder.close()
    (row,) = strict_lines(tmp_path / "metrics.jsonl")
    assert row == row_of(1, **{"policy/loss": None, "a/b": None, "c/d": None})
    (row,) = strict_lines(tmp_path / "eval.jsonl")
    assert row == {
        "step": 1,
        "when": "before",
        "dataset": "set",
        "n": 1,
        "k_samples": 2,
        "avg": 0.5,
        "avg_se": None,
        "length": 7.0,
        "truncated": 0.25,
        "ungraded": 0.5,
        "maj": None,
        "maj_se": None,
        "pass@1": 0.5,
        "pass@1_se": None,
        "pass@4": None,
        "pass@4_se": None,
    }


def test_rollouts_of_a_step(tmp_path):
    recorder = Recorder(tmp_path, keep_until_step=0)
    rows = [{"response": "é\u2028✓\n", "reward": 1.0}, {"response": "", "reward": math.nan}]
    recorder.rollouts(7, rows)
    rows[1]["reward"] = None
    recorder.rollouts(7, rows)  # a step made again replaces its file
    recorder.close()
    text = (tmp_path / "rollouts" / "step_000007.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == rows


def test_rows_are_split_at_newlines_only(tmp_path):
    # U+2028 and U+0085 stand unescaped in rollouts/*.jsonl.
    recorder = Recorder(tmp_path, keep_until_step=0)
    rows = [{"response": f"a{c}b"} for c in ("\u2028", "\u2029", "\x85")]
    recorder.rollouts(1, rows)
    recorder.close()
    assert read_rows(tmp_path / "rollouts" / "step_000001.jsonl") == rows


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path, keep_until_step=0)
    recorder.step(row_of(1, **{"policy/loss": math.nan, "time/step": 2.0}))
    recorder.step(row_of(2, **{"policy/loss": 0.75}))
    passes = {4: (0.75, 0.1), 16: None}
    result = EvalResult("set", 1, 8, 0.25, 0.1, passes, (0.5, 0.1), 7.0, 0.0, 0.0)
    recorder.evaluation(2, "after", result)
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def points(tag):
        return [(e.step, e.value) for e in events.Scalars(tag)]

    assert points("reward/mean") == [(1, 0.5), (2, 0.5)]
    assert points("policy/loss") == [(2, 0.75)]
    assert points("eval/set/avg@8") == [(2, 0.25)]
    assert points("eval/set/pass@4") == [(2, 0.75)] and points("eval/set/maj@8") == [(2, 0.5)]
    assert "eval/set/pass@16" not in events.Tags()["scalars"]


def test_tensorboard_that_cannot_start(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    recorder = Recorder(tmp_path, keep_until_step=0)
    recorder.step(row_of(1))
    recorder.close()
    assert "TensorBoard is off" in capsys.readouterr().err
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("breaks", ["__init__", "add_scalar", "close"])
def test_tensorboard_that_breaks_does_not_stop_training(tmp_path, monkeypatch, capsys, breaks):
    calls = []

    def fail(*args, **kw):
        calls.append(breaks)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, breaks, fail)
    recorder = Recorder(tmp_path, keep_until_step=0)
    for step in (1, 2, 3):
        recorder.step(row_of(step))
    recorder.close()
    assert calls == [breaks], "tried once, then left alone"
    assert "TensorBoard is off: No space left on device" in capsys.readouterr().err
    assert [r["step"] for r in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


class FakeWandB(types.ModuleType):
    """The three calls that are made of W&B; `breaks` is the one that fails."""

    def __init__(self, breaks=None):
        super().__init__("wandb")
        self.started, self.logged, self.breaks = [], [], breaks

    def _call(self, name):
        if name == self.breaks:
            raise RuntimeError(f"no network in {name}")

    def init(self, **settings):
        self._call("init")
        self.started.append(settings)
        return self

    def log(self, values, step):
        self._call("log")
        self.logged.append((step, values))

    def finish(self):
        self._call("finish")
        self.logged.append("finished")


def test_wandb_gets_the_numbers_and_the_same_run_again(tmp_path, monkeypatch):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        recorder = Recorder(tmp_path, 0, "project", "name", {"optimizer.lr": 1e-6})
        recorder.step(row_of(1, **{"policy/loss": math.nan, "time/step": 2.0}))
        recorder.close()
    first, second = wandb.started
    assert first["config"] == {"optimizer.lr": 1e-6}
    assert first == second, "a run that is continued is the same run there"
    assert (first["project"], first["name"], first["resume"]) == ("project", "name", "allow")
    values = {"reward/mean": 0.5, "policy/entropy": 1.25, "time/step": 2.0}
    assert wandb.logged[:2] == [(1, values), "finished"]
    Recorder(tmp_path / "..", 0).close()
    assert len(wandb.started) == 2, "only where it is asked for"


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_wandb_that_breaks_does_not_stop_training(tmp_path, monkeypatch, capsys, breaks):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(breaks))
    recorder = Recorder(tmp_path, 0, "project", "name")
    for step in (1, 2):
        recorder.step(row_of(step))
    recorder.close()
    assert capsys.readouterr().err.count(f"W&B is off: no network in {breaks}") == 1
    assert [r["step"] for r in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list((tmp_path / "tensorboard").iterdir()), "the other one goes on"


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


def test_stopwatch_adds_up(clock):
    watch = Stopwatch()
    for seconds in (1, 2):
        with watch.stage("rollout"):
            clock.now += seconds
    with pytest.raises(KeyError), watch.stage("update"):
        clock.now += 4
        raise KeyError
    clock.now += 8
    assert watch.seconds == {"rollout": 3.0, "update": 4.0}
    assert watch.total() == 15.0


def test_where_the_time_went_in_one_line():
    rows = [
        {"step": 1, "time/step": 6.0, "time/rollout": 3.0, "time/sync": 0.001},
        {"step": 2, "time/step": 4.0, "time/rollout": 1.0, "time/update": 2.0},
    ]
    assert time_line(rows) == "2 steps in 10 s: rollout 40%, rest 40%, update 20%"


def test_json_is_strict_at_any_depth(tmp_path):
    row = {"a": [1.5, math.nan, [-math.inf]], "b": {"c": (math.inf, "NaN")}, "d": None, "e": True}
    want = {"a": [1.5, None, [None]], "b": {"c": [None, "NaN"]}, "d": None, "e": True}
    metrics.append_rows(tmp_path / "rows.jsonl", [row])
    recorder = metrics.Recorder(tmp_path, 0)
    recorder.step({"step": 1} | row)
    recorder.diagnostics({"step": 1} | row)
    recorder.rollouts(1, [row])
    recorder.close()
    for name in ("rows", "metrics", "diagnostics", "rollouts/step_000001"):
        (line,) = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        found = json.loads(line, parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
        assert {k: v for k, v in found.items() if k != "step"} == want


def test_rows_of_an_older_run_become_strict(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": [NaN, 2]}\n')
    metrics.Recorder(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "x": [null, 2]}\n'
