"""The figures of training runs show what the files say."""

import math

import numpy as np
import pytest
from report_samples import (
    PICTURES,
    curves,
    drawn,
    evaluations,
    figures,
    lines,
    looks,
    rows_of_run,
    text_of,
    write_run,
)

from bupo import report
from bupo.report import palette
from bupo.report.layer_maps import draw_layers
from bupo.report.run_files import read_run
from bupo.report.run_plots import draw_evaluations, draw_steps, draw_time


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("reward", ["reward/mean"]),
        ("entropy", ["policy/entropy"]),
        ("length", ["response/length", "response/truncated"]),
    ],
)
def test_each_metric_is_drawn_by_phase(tmp_path, name, keys):
    """Orange in the internal phase, which is shaded; blue after the line at the switch."""
    rows = list(rows_of_run(40, 8))
    axes = drawn(draw_steps, name, [read_run(write_run(tmp_path / "run"), "run")])
    for ax, key in zip(axes, keys, strict=True):
        values = [row[key] for row in rows]
        assert (palette.ORANGE, list(range(1, 9)), values[:8]) in curves(ax)
        assert (palette.BLUE, list(range(9, 41)), values[8:]) in curves(ax)
        assert (palette.GREY, [8.5, 8.5], [0, 1]) in curves(ax)
        (band,) = ax.patches
        assert (band.get_x(), band.get_width()) == (0.5, 8.0)


def test_entropy_of_the_final_policy_on_the_same_tokens(tmp_path):
    (ax,) = drawn(draw_steps, "entropy", [read_run(write_run(tmp_path / "run"), "run")])
    (line,) = [
        x
        for x in ax.lines
        if x.get_label() == "final policy, same tokens" and x.get_xdata()[0] == 1
    ]
    assert line.get_linestyle() == "--" and max(line.get_ydata()) < 0.3


def test_evaluations_and_their_errors_are_drawn(tmp_path):
    rows = [*evaluations(40, 8), *evaluations(40, 8, "math500")]
    run = read_run(write_run(tmp_path / "run", evals=rows), "run")
    (ax,) = drawn(draw_steps, "reward", [run])
    assert len(ax.containers) == 2
    points, _, (bars,) = ax.containers[0]
    assert list(points.get_ydata()) == [0.39, 0.36, 0.85]
    assert bars.get_segments()[0] == pytest.approx(np.array([[0, 0.379], [0, 0.401]]))
    panels = drawn(draw_evaluations, [run])
    assert [ax.get_title("left") for ax in panels] == ["arithmetic", "math500"]
    labels = [c.get_label() for c in panels[1].containers]
    assert labels == ["before, step 0", "phase switch, step 8", "latest, step 40"]
    points, _, (bars,) = panels[0].containers[2]
    assert list(points.get_xdata()) == [1, 4, 16]
    assert points.get_ydata() == pytest.approx([0.85, 1 - 0.15**2, 1 - 0.15**4])
    assert np.ptp(bars.get_segments()[0][:, 1]) == pytest.approx(2 * 0.0123)


def test_what_was_never_recorded_is_not_drawn(tmp_path):
    rows = [row | {"reward/mean": math.nan} for row in rows_of_run(40, 8)]
    page = report.write_report(write_run(tmp_path / "run", metrics=rows))
    assert set(figures(page)) == PICTURES - {"reward"}
    assert "40 steps (8 on the policy of layer 3" in text_of(page)
    bare = [{"step": row["step"], "reward/mean": 0.5} for row in rows_of_run(40, 8)]
    page = report.write_report(write_run(tmp_path / "bare", metrics=bare))
    assert set(figures(page)) == {"reward", "pass_at_k"}
    assert "could not be drawn" not in page.read_text()


def test_two_thousand_steps_are_drawn(tmp_path):
    evals = [row | {"step": step} for step in range(0, 2001, 50) for row in evaluations(40, 8)]
    page = report.write_report(write_run(tmp_path / "run", 2000, 200, evals=evals))
    assert set(figures(page)) == PICTURES
    assert page.stat().st_size < 3_000_000


def test_time_of_stages_and_ranks(tmp_path):
    """Stages are stacked up to the time of a step; of several ranks, the slowest is named."""
    times = {"time/rollout": 2.0, "time/update": 1.5, "time/step": 4.0}
    ranks = {"tokens_per_second": 1234.0, "rollout_max": 2.0, "rollout_min": 1.0}
    rows = [
        row | times | {f"ranks/{key}": x for key, x in ranks.items()} | {"ranks/slowest": n % 3 > 0}
        for n, row in enumerate(rows_of_run(9, 3))
    ]
    page = report.write_report(write_run(tmp_path / "run", metrics=rows))
    said = "Generation takes 2 s on the slowest rank and 1 s on the fastest; in 67% of the steps"
    assert "A rank processes 1,234 response tokens a second." in text_of(page)
    assert f"{said} rank 1 is the slowest." in text_of(page)
    assert "time" in figures(page)
    (ax,) = drawn(draw_time, [read_run(tmp_path / "run", "run")])
    tops = {patch.get_label(): set(patch.get_data().values) for patch in ax.patches}
    assert tops == {"rollout": {2.0}, "update": {3.5}, "rest": {4.0}}
    below = {patch.get_label(): set(patch.get_data().baseline) for patch in ax.patches}
    assert below == {"rollout": {0.0}, "update": {2.0}, "rest": {3.5}}


def test_layer_maps_show_the_change_of_each_layer(tmp_path):
    run = write_run(tmp_path / "run")
    lines(run / "diagnostics.jsonl", looks([0, 8, 20, 40]))
    assert set(figures(report.write_report(run))) == PICTURES | {"layers"}
    axes = drawn(draw_layers, read_run(run, "run"))
    maps = {ax.get_title("left"): ax.images[0] for ax in axes if ax.get_title("left") and ax.images}
    rising = maps.pop("KL(πᵐ ‖ π), nats")
    assert rising.get_array()[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert not rising.get_array()[1:].any() and rising.get_clim() == (-1, 1)
    assert len(maps) == 3 and not any(image.get_array().any() for image in maps.values())
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["0", "8", "20", "40"]
