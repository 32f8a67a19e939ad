"""Diagnostics of a run: what is written when, and auto_stop, which ends phase 1."""

import json
from pathlib import Path
from typing import Any

import pytest
import run_samples
from run_samples import rows

from bupo.config import BupoConfig, Config, ConfigError, PhaseConfig, load
from bupo.rl.diagnostics import PATIENCE, stopped_helping
from bupo.rl.schedule import Schedule


def looks(log_perplexity: list[float], kl: list[float]) -> list[dict[str, Any]]:
    pairs = zip(log_perplexity, kl)
    return [{"log_perplexity": x, "kl_to_final": [9.0, y, 0.0]} for x, y in pairs]


def test_it_has_stopped_helping_when_the_final_policy_has_drifted() -> None:
    assert not stopped_helping(looks([1.0, 1.05, 1.1], [3, 2, 1]), 2, 0.11)
    text = stopped_helping(looks([1.0, 1.05, 1.12], [3, 2, 1]), 2, 0.11)
    assert text == "log perplexity of the probes has risen by 0.120 nats"
    assert stopped_helping(looks([1.0, float("nan")], [3, 2]), 2, 0.11), "nan is no permission"
    assert not stopped_helping(looks([1.0, 0.2], [3, 2]), 2, 0.11), "a fall is no harm"


def test_it_has_stopped_helping_when_the_distance_no_longer_falls() -> None:
    flat = [3.0, *[2.0] * PATIENCE]
    assert not stopped_helping(looks([1.0] * len(flat), flat), 2, 0.1)
    longer = [*flat, 2.0]
    text = stopped_helping(looks([1.0] * len(longer), longer), 2, 0.1)
    assert text == f"KL(pi^2 || pi) has made no new low for {PATIENCE} steps"
    assert not stopped_helping(looks([1.0] * 8, [3, 2, 2, 2, 2, 2, 1.9, 2]), 2, 0.1)
    worse = [1.0 + n for n in range(PATIENCE + 1)]
    assert stopped_helping(looks([1.0] * len(worse), worse), 2, 0.1), "rising from the start"


def test_a_phase_that_ends_early_moves_the_others_forward() -> None:
    config = Config(
        policy="custom",
        steps=20,
        phases=[PhaseConfig(layer=1, steps=6), PhaseConfig(layer=2, steps=4), PhaseConfig()],
    )
    schedule = Schedule(config)
    schedule.end_phase(2)
    assert [schedule.policy(s).layer for s in (1, 2, 3, 6, 7, 20)] == [1, 1, 2, 2, None, None]
    assert schedule.switches_after(2) and schedule.switches_after(6)
    assert not schedule.switches_after(10)
    schedule = Schedule(Config(bupo=BupoConfig(steps=3, layer=1), steps=6))
    schedule.end_phase(3)
    assert [schedule.policy(s).layer for s in (3, 4)] == [1, None]


def test_what_is_written_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, every N, where the phase switches, and at the end."""
    monkeypatch.setattr("bupo.rl.diagnostics.PROBE_TOKENS", 3)
    assert run_samples.run(tmp_path / "run", "diagnostics.every=4") == 0
    found = rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["step"] for row in found] == [0, 3, 4, 6]
    for row in found:
        assert row["anchor"] == 1 and row["layers"] == [1, 2] and row["ends_phase"] == ""
        assert len(row["entropy"]) == len(row["kl_from_anchor"]) == len(row["similarity"]) == 2
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    looked = [row["step"] for row in metrics if "diagnostics/log_perplexity" in row]
    assert looked == [3, 4, 6]
    assert metrics[2]["diagnostics/kl_to_final"] == found[1]["kl_to_final"][0]
    probes = [json.loads(x) for x in (tmp_path / "run/probes.jsonl").open()]
    assert max(len(p["response"]) for p in probes) == 3, "their beginnings"


def test_none_are_made_where_none_are_asked_for(tmp_path: Path) -> None:
    assert run_samples.run(tmp_path / "run", "diagnostics.every=0", "steps=4") == 0
    assert not (tmp_path / "run/probes.jsonl").exists()
    assert (tmp_path / "run/diagnostics.jsonl").read_text() == ""


def test_a_run_without_internal_policy_has_no_anchor(tmp_path: Path) -> None:
    assert run_samples.run(tmp_path / "run", "algorithm=grpo", "steps=2") == 0
    found = rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["anchor"] for row in found] == [None, None]
    assert found[0]["similarity"] == [] and len(found[0]["entropy"]) == 2  # type: ignore[arg-type]
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert "diagnostics/kl_to_final" not in metrics[1]


def test_looking_changes_nothing_else(tmp_path: Path) -> None:
    assert run_samples.run(tmp_path / "a", "diagnostics.every=1") == 0
    assert run_samples.run(tmp_path / "b", "diagnostics.every=0") == 0
    assert run_samples.state(tmp_path / "a") == run_samples.state(tmp_path / "b")


STOPPING = ("bupo.auto_stop=0.1", "bupo.steps=4", "diagnostics.every=0")


@pytest.fixture
def enough_after_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule has its tests above; here it is sure after step 2, by the rows as it must be."""

    def rule(rows: list[dict[str, Any]], layer: int, limit: float) -> str:
        assert (layer, limit) == (1, 0.1) and rows[0]["step"] == 0
        return "enough" if len(rows) == 3 else ""

    monkeypatch.setattr("bupo.rl.diagnostics.stopped_helping", rule)


@pytest.mark.usefixtures("enough_after_2")
def test_auto_stop_ends_phase_1_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_samples.run(tmp_path / "run", *STOPPING) == 0
    found = rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["step"] for row in found if row["ends_phase"]] == [2]
    phases = [row["phase"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert phases == ["internal"] * 2 + ["final"] * 4
    assert [row["step"] for row in found] == [0, 1, 2, 6], "phase 1 is watched at every step"
    switch = [r["step"] for r in rows(tmp_path / "run/eval.jsonl") if r["when"] == "phase_switch"]
    assert switch == [2]
    shown = capsys.readouterr().err
    assert "step 2: phase 1 ends here, enough (auto_stop)" in shown
    assert "6 steps in " in shown and "diagnostics" in shown.partition("6 steps in ")[2]


def test_auto_stop_never_goes_beyond_bupo_steps(tmp_path: Path) -> None:
    assert run_samples.run(tmp_path / "run", "bupo.auto_stop=100", "bupo.steps=2") == 0
    phases = [row["phase"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert phases == ["internal"] * 2 + ["final"] * 4
    found = rows(tmp_path / "run" / "diagnostics.jsonl")
    assert [row["step"] for row in found] == [0, 1, 2, 4, 6] and not any(
        row["ends_phase"] for row in found
    )


@pytest.mark.usefixtures("enough_after_2")
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_with_auto_stop_is_resumed_exactly(tmp_path: Path, at: int) -> None:
    """Stopped in phase 1, at its end, and after it."""
    options = (*STOPPING, "checkpoint.every=1")
    assert run_samples.run(tmp_path / "whole", *options) == 0
    assert run_samples.run(tmp_path / "cut", *options, stop=at + 1) == 143
    assert run_samples.run(tmp_path / "cut", *options, "resume=auto") == 0
    run_samples.assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_auto_stop_without_its_first_look_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("bupo.auto_stop=100", "bupo.steps=5")
    assert run_samples.run(tmp_path / "run", *options, stop=3) == 143
    file = tmp_path / "run" / "diagnostics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    assert run_samples.run(tmp_path / "run", *options, "resume=auto") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bupo.auto_stop" in error and "does not begin with step 0" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bupo.auto_stop=0", "bupo.auto_stop must be above 0 or null"),
        ("diagnostics.every=-1", "diagnostics.every must be at least 0"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [override])
    with pytest.raises(ConfigError, match=r"bupo\.auto_stop needs policy=bupo"):
        load(None, ["algorithm=grpo", "bupo.auto_stop=0.1"])
