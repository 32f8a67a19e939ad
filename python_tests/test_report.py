"""bupo.report: the page and its plots say what the files say, and no file can make it fail."""

import ast
import base64
import html
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from bupo import report

PICTURES = {"reward", "pass_at_k", "entropy", "ratio", "length", "time"}
INTERNAL = np.array([0xD9, 0x77, 0x06]) / 255
AMBER_BAND = 0.91 + 0.09 * INTERNAL  # its phase is shaded: 9 % over white
AXES_PIXELS = (0.82 - 0.1) * 7 * 150
HOSTILE = "<script>alert('x')</script> & </td> $\\frac{$ {{ 7*7 }}"


def rows_of_run(steps, internal, layer=3):
    """Metrics of a run that trains layer 3, then the final policy; reward 0.40 first, 0.86 last."""
    rng = np.random.default_rng(0)
    for step in range(1, steps + 1):
        inside = step <= internal
        stages = {"rollout": 0.4, "reward": 0.01, "old_logprobs": 0.1, "update": 0.3, "sync": 0.02}
        noise = 0.02 * rng.standard_normal() if 1 < step < steps else 0.0
        entropy = 0.3 - 0.2 * step / steps
        yield {
            "step": step,
            "phase": "internal" if inside else "final",
            "layer": layer if inside else None,
            "reward/mean": 0.40 + 0.46 * (step - 1) / max(1, steps - 1) + noise,
            "response/length": 20 + rng.random(),
            "response/truncated": 0.05 * rng.random(),
            "policy/entropy": 2.0 if inside else entropy,
            "final/entropy": entropy,
            "policy/clip_fraction": 0.05 * rng.random(),
            "policy/ratio_max": 1.3 + rng.random(),
            "policy/approx_kl": 0.002 * rng.random(),
            "sync/logprob_gap": 2e-6,
            **{f"time/{stage}": seconds for stage, seconds in stages.items()},
            "time/step": sum(stages.values()) + 0.05,
            "tokens_per_second": 8000.0 + 100 * rng.random(),
        }


def evaluations(steps, internal, dataset="arithmetic"):
    for step, when, avg in (
        (0, "before", 0.39),
        (internal, "phase_switch", 0.36),
        (steps, "after", 0.85),
    ):
        if step or when == "before":
            passes = {f"pass@{k}": 1 - (1 - avg) ** math.sqrt(k) for k in (1, 4, 16)}
            errors = {f"{key}_se": 0.0123 for key in passes}
            common = {"step": step, "when": when, "dataset": dataset, "n": 512, "k_samples": 16}
            yield {**common, "avg": avg, "avg_se": 0.011, **passes, **errors, "length": 19.4}


def write_run(run_dir, steps=40, internal=8, metrics=None, evals=None, response="7+5=12#12"):
    """A run directory as training leaves it; metrics and evals replace the ordinary rows."""
    (run_dir / "rollouts").mkdir(parents=True)
    metrics = list(rows_of_run(steps, internal)) if metrics is None else metrics
    evals = list(evaluations(steps, internal)) if evals is None else evals
    lines(run_dir / "metrics.jsonl", metrics)
    lines(run_dir / "eval.jsonl", evals)
    for step in {1, internal + 1, steps} if metrics else ():
        rollouts = [
            {
                "prompt": f"p{step}_{i}=",
                "response": f"{response} {step}_{i}",
                "reward": float(i == 1),
            }
            | {"advantage": 0.1, "answer": "12", "finish_reason": "stop"}
            for i in range(4)
        ]
        lines(run_dir / "rollouts" / f"step_{step:06d}.jsonl", rollouts)
    (run_dir / "config.yaml").write_text("lr: 1.0e-4\nlayer: 3\n")
    return run_dir


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures(page):
    """Every embedded image as name: PNG bytes."""
    found = re.findall(
        r'<img id="(\w+)"[^>]* src="data:image/png;base64,([^"]+)"', page.read_text()
    )
    return {name: base64.b64decode(data, validate=True) for name, data in found}


def pixels(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3]


def band_width(png):
    """Widest run of pixels of a row that have the colour of the internal phase's band."""
    inside = np.abs(pixels(png) - AMBER_BAND).max(axis=-1) < 0.01
    return inside.sum(axis=1).max()


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page.read_text()))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Internal steps (of 40): the page of that run. Not to be written to."""
    root = tmp_path_factory.mktemp("runs")
    return {n: report.write_report(write_run(root / str(n), 40, n)) for n in (0, 8, 20)}


def looks(steps, depth=4, **changes):
    """Rows of diagnostics.jsonl of a run on layer 2: KL of layer 1 rises by 1, all else stays."""
    for n, step in enumerate(steps):
        row = {"step": step, "anchor": 2, "layers": list(range(1, depth + 1)), "ends_phase": ""}
        row |= {k: [float(m) for m in range(depth)] for k in ("entropy", "similarity")}
        row |= {"kl_to_final": [1.0 + n / (len(steps) - 1), *[1.0] * (depth - 1)]}
        yield row | {"kl_from_anchor": [0.5] * depth, "log_perplexity": 0.2, **changes}


def test_layer_maps_show_the_change_of_each_layer(tmp_path):
    run = write_run(tmp_path / "run")
    lines(run / "diagnostics.jsonl", looks([0, 8, 20, 40]))
    page = report.write_report(run)
    assert set(pictures(page)) == PICTURES | {"layers"}
    png = pixels(pictures(page)["layers"])
    red = (png[..., 0] > 0.35) & (png[..., 1] < 0.05) & (png[..., 2] < 0.2)
    rows, columns = np.nonzero(red[:, : int(0.89 * png.shape[1])])  # without the colour bars
    assert len(rows), "the rise is at the end of the scale"
    assert columns.min() > 0.65 * png.shape[1], "at the last look"
    assert np.ptp(rows) < 0.08 * png.shape[0], "in one layer of one map"
    assert pictures(page) == pictures(report.write_report(run)), "same files, same bytes"
    two = report.write_report(run, write_run(tmp_path / "other"))
    assert "layers" in pictures(two), "one of the runs has looked"


@pytest.mark.parametrize(
    "rows",
    [
        [*looks([0, 1])][:1],
        [{"step": 0}, {"step": 1}],
        [*looks([0, 1], entropy=None, kl_to_final="x", kl_from_anchor=[], similarity=[math.nan])],
        [{"step": n, "entropy": [None, "a"], "anchor": "<b>"} for n in range(3)],
    ],
)
def test_looks_that_show_nothing_make_no_picture(tmp_path, rows):
    run = write_run(tmp_path / "run")
    lines(run / "diagnostics.jsonl", rows)
    page = report.write_report(run)
    assert set(pictures(page)) == PICTURES
    assert "could not be drawn" not in page.read_text()


def test_looks_of_another_depth_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    lines(run / "diagnostics.jsonl", [*looks([0, 5]), *looks([9, 12], depth=7), *looks([20, 30])])
    assert "layers" in pictures(report.write_report(run))


def test_page_embeds_the_pngs_that_lie_beside_it(tmp_path):
    page = report.write_report(write_run(tmp_path / "run"))
    assert page == tmp_path / "run" / "report.html"
    embedded = pictures(page)
    assert set(embedded) == PICTURES
    for name, png in embedded.items():
        assert png == (tmp_path / "run" / f"{name}.png").read_bytes()
        height, width, _ = pixels(png).shape
        assert (width, 600 < height < 800) == (1050, True), f"{name}: {width} x {height}"
        assert pixels(png).std() > 0.02, f"{name} is blank"
    assert "could not be drawn" not in page.read_text()


def test_page_needs_no_network_and_no_script(pages):
    text = pages[8].read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert all(src.startswith("data:") for src in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("steps", "internal", "sentence"),
    [
        (
            40,
            8,
            "Mean reward 0.40 → 0.86 in 40 steps "
            "(8 on the policy of layer 3, then 32 on the final policy).",
        ),
        (40, 0, "Mean reward 0.40 → 0.86 in 40 steps (all on the final policy)."),
        (3, 3, "Mean reward 0.40 → 0.86 in 3 steps (all on the policy of layer 3)."),
        (1, 0, "Mean reward 0.40 in 1 step (all on the final policy)."),
    ],
)
def test_sentence_says_what_happened(tmp_path, steps, internal, sentence):
    page = report.write_report(write_run(tmp_path / "run", steps, internal))
    assert sentence in text_of(page)
    assert set(pictures(page)) == PICTURES


def test_phases_follow_the_rows_and_not_the_configuration(tmp_path):
    rows = list(rows_of_run(6, 2)) + [
        row | {"step": row["step"] + 6} for row in rows_of_run(6, 4, 5)
    ]
    text = text_of(report.write_report(write_run(tmp_path / "run", metrics=rows)))
    wanted = (
        "2 on the policy of layer 3, then 4 on the final policy, then 4 on the policy of layer 5"
    )
    assert wanted in text


@pytest.mark.parametrize("name", ["entropy", "ratio", "length"])
@pytest.mark.parametrize("internal", [0, 8, 20])
def test_internal_phase_is_shaded_from_first_to_last_step(pages, name, internal):
    expected = AXES_PIXELS * internal / 40
    found = band_width(pictures(pages[internal])[name])
    assert abs(found - expected) <= 6, f"{internal} of 40 steps: {found}, not {expected} pixels"


@pytest.mark.parametrize("name", ["entropy", "ratio", "length"])
@pytest.mark.parametrize("internal", [8, 20])
def test_a_line_stands_between_the_last_internal_and_the_first_final_step(pages, name, internal):
    column = round(0.1 * 7 * 150 + AXES_PIXELS * internal / 40)  # x axis: from 0.5 to 40.5
    near = pixels(pictures(pages[internal])[name])[:, column - 4 : column + 4]
    dark = (near.max(axis=-1) < 0.75).any(axis=1).sum()
    beside = pixels(pictures(pages[internal])[name])[:, column - 24 : column - 16]
    assert dark > 100 + (beside.max(axis=-1) < 0.75).any(axis=1).sum()


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_every_picture_marks_the_phase_switch(pages, name):
    def amber(internal):
        difference = pixels(pictures(pages[internal])[name]) - INTERNAL
        return (np.abs(difference).max(axis=-1) < 0.02).sum()

    assert amber(8) > 100
    assert amber(0) == 0


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("reward/mean", {"reward"}),
        ("policy/entropy", {"entropy"}),
        ("final/entropy", {"entropy"}),
        ("policy/clip_fraction", {"ratio"}),
        ("policy/ratio_max", {"ratio"}),
        ("policy/approx_kl", {"ratio"}),
        ("response/length", {"length"}),
        ("response/truncated", {"length"}),
        ("time/update", {"time"}),
        ("tokens_per_second", {"time"}),
    ],
)
def test_each_metric_is_drawn_in_its_picture(pages, tmp_path, key, changed):
    rows = list(rows_of_run(40, 8))
    rows[4][key] *= 3
    plain = pictures(pages[8])
    other = pictures(report.write_report(write_run(tmp_path / "8", metrics=rows)))
    assert {name for name in PICTURES if plain[name] != other[name]} == changed


def test_missing_metrics_are_skipped(tmp_path):
    bare = [{"step": row["step"], "reward/mean": 0.5} for row in rows_of_run(40, 8)]
    page = report.write_report(write_run(tmp_path / "run", metrics=bare))
    assert set(pictures(page)) == {"reward", "pass_at_k"}
    assert "could not be drawn" not in page.read_text()
    gone = {"policy/entropy", "policy/ratio_max", "time/rollout", "phase"}
    rows = [{k: v for k, v in row.items() if k not in gone} for row in rows_of_run(40, 8)]
    page = report.write_report(write_run(tmp_path / "run2", metrics=rows))
    assert set(pictures(page)) == PICTURES - {"entropy"}
    assert "could not be drawn" not in page.read_text()


@pytest.mark.parametrize("key", ["avg", "avg_se", "pass@4", "pass@4_se"])
def test_evaluations_and_their_errors_are_drawn(pages, tmp_path, key):
    rows = list(evaluations(40, 8))
    rows[1][key] += 0.1
    plain = pictures(pages[8])
    other = pictures(report.write_report(write_run(tmp_path / "8", evals=rows)))
    changed = {name for name in PICTURES if plain[name] != other[name]}
    assert changed == {"reward" if key.startswith("avg") else "pass_at_k"}


def test_evaluation_table(tmp_path):
    evals = [*evaluations(40, 8), *evaluations(40, 8, "math500")]
    evals.append(
        {"step": 20, "when": "during", "dataset": "math500", "avg": 0.5678, "avg_se": None}
    )
    text = " ".join(text_of(report.write_report(write_run(tmp_path / "run", evals=evals))).split())
    row = (
        "arithmetic 8 phase switch 512 0.360 ± 0.011 0.360 ± 0.012 0.590 ± 0.012 0.832 ± 0.012 19.4"
    )
    assert row in text
    assert "All 7 evaluations" in text
    assert "math500 20 during 0.568 " in text


def test_rollouts_best_and_worst_of_first_switch_and_last_step(pages):
    text = " ".join(text_of(pages[8]).split())
    for step, where in ((1, "first step"), (9, "after the switch"), (40, "last step")):
        assert f"{step}, {where} 1 p{step}_1= 7+5=12#12 {step}_1 12 stop" in text
        assert f"{step}, {where} 0 p{step}_3= 7+5=12#12 {step}_3 12 stop" in text
    assert "p9_0" not in text


def test_long_responses_are_shortened_in_the_middle(tmp_path):
    run = write_run(tmp_path / "run", response="start" + "x" * 100_000)
    text = text_of(report.write_report(run))
    assert "startxxx" in text
    assert "xxx 40_1" in text
    assert text.count("x") < 10_000
    assert re.search(r"\[… 99\d{3} characters …\]", text)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    evals = list(evaluations(40, 8, HOSTILE))
    run = write_run(tmp_path / "_run $x^{$ <b>", response=HOSTILE, evals=evals)
    (run / "config.yaml").write_text(HOSTILE)
    page = report.write_report(run)
    source, tags = page.read_text(), Tags()
    tags.feed(source)
    assert "script" not in tags.seen
    assert "<script" not in source
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &lt;/td&gt;" in source
    assert source.count(html.escape(HOSTILE, quote=False).replace("'", "&#39;")) >= 6 + 3 + 1
    assert "could not be drawn" not in source
    assert set(pictures(page)) == PICTURES
    both = report.write_report(run, write_run(tmp_path / "other"))
    assert "could not be drawn" not in both.read_text()
    assert set(pictures(both)) == PICTURES


def test_empty_run_says_so(tmp_path):
    for name, files in {
        "nothing": [],
        "empty": ["metrics.jsonl", "eval.jsonl", "config.yaml"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        page = report.write_report(tmp_path / name)
        assert "No training step has been recorded yet." in text_of(page)
        assert pictures(page) == {}


def test_majority_votes_are_shown_where_there_are_any(tmp_path):
    rows = list(evaluations(40, 8))
    assert "maj@K" not in text_of(report.write_report(write_run(tmp_path / "a", evals=rows)))
    rows[0] |= {"maj": 0.8125, "maj_se": 0.03125}
    rows[1] |= {"maj": None, "maj_se": None}
    text = text_of(report.write_report(write_run(tmp_path / "b", evals=rows)))
    assert "maj@K" in text and "0.812 ± 0.031" in text


def test_evaluation_before_the_first_step_is_shown(tmp_path):
    run = write_run(tmp_path / "run", metrics=[], evals=[next(evaluations(40, 8))])
    page = report.write_report(run)
    assert set(pictures(page)) == {"pass_at_k"}
    assert "0.390 ± 0.011" in text_of(page)


def test_lines_cut_short_change_nothing_but_a_note(pages, tmp_path):
    run = write_run(tmp_path / "8")
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts/step_000040.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'[1, 2]\n\n"step"\nnul\0\n{"step": 1e999}\n\xff{\n{"step": 41, "reward/me')
    (run / "rollouts" / "step_last.jsonl").touch()
    page = report.write_report(run)
    assert pictures(page) == pictures(pages[8])
    assert "unreadable" not in text_of(pages[8])
    assert "metrics.jsonl: 6 unreadable lines left out." in text_of(page)
    assert "eval.jsonl: 6 unreadable lines left out." in text_of(page)


def test_values_that_are_no_numbers_are_left_out_and_named(tmp_path):
    rows = list(rows_of_run(40, 8))
    for row in rows[10:14]:
        row |= {"reward/mean": math.nan, "policy/ratio_max": math.inf, "policy/approx_kl": None}
        row |= {"response/length": "long", "time/step": [1], "policy/entropy": 10**400}
    rows[12] |= {"response/length": 1e300, "time/rollout": math.inf}
    rows[-1]["reward/mean"] = -math.inf
    page = report.write_report(write_run(tmp_path / "run", metrics=rows))
    text = text_of(page)
    assert "reward/mean in 5 of 40 steps" in text
    assert "policy/ratio_max in 4 of 40 steps" in text
    assert "policy/approx_kl in 4 of 40 steps" in text  # null is what the trainer writes for nan
    assert "layer in" not in text
    assert f"Mean reward 0.40 → {rows[-2]['reward/mean']:.2f} in 40 steps" in text
    assert "could not be drawn" not in text
    assert set(pictures(page)) == PICTURES
    changed = {"reward/mean", "policy/ratio_max", "policy/approx_kl", "response/length"}
    changed |= {"time/step", "policy/entropy"}
    for row in rows[10:14]:
        for key in changed:
            del row[key]
    del rows[12]["time/rollout"], rows[-1]["reward/mean"]
    without = report.write_report(write_run(tmp_path / "without", metrics=rows))
    assert pictures(page) == pictures(without)


def test_a_metric_that_is_never_a_number_is_not_drawn(tmp_path):
    rows = [row | {"reward/mean": math.nan} for row in rows_of_run(40, 8)]
    page = report.write_report(write_run(tmp_path / "run", metrics=rows))
    assert set(pictures(page)) == PICTURES - {"reward"}
    assert "40 steps (8 on the policy of layer 3" in text_of(page)


def test_resumed_run_counts_a_repeated_step_once_and_its_last_row(pages, tmp_path):
    rows = list(rows_of_run(40, 8))
    stale = [row | {"reward/mean": 0.99, "phase": "internal", "layer": 1} for row in rows[20:30]]
    run = write_run(tmp_path / "8", metrics=rows[:20] + stale + rows[20:])
    assert report.write_report(run).read_bytes() == pages[8].read_bytes()


def test_a_plot_that_fails_is_reported_and_the_others_remain(tmp_path, monkeypatch):
    def broken(runs):
        raise ZeroDivisionError("no answers")

    monkeypatch.setattr(report.plots, "_pass_at_k", broken)
    page = report.write_report(write_run(tmp_path / "run"))
    assert set(pictures(page)) == PICTURES - {"pass_at_k"}
    assert "pass_at_k.png could not be drawn: ZeroDivisionError('no answers')" in text_of(page)


def test_same_files_same_bytes_and_no_global_state(pages, tmp_path):
    before = dict(matplotlib.rcParams)
    run = write_run(tmp_path / "8")
    assert report.write_report(run).read_bytes() == pages[8].read_bytes()
    assert dict(matplotlib.rcParams) == before
    tree = ast.walk(ast.parse(Path(report.__file__).read_text()))
    modules = {a.name for n in tree if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert not modules & {"torch", "pyplot", "matplotlib.pyplot"}


def test_two_thousand_steps_are_drawn(tmp_path):
    evals = [row | {"step": step} for step in range(0, 2001, 50) for row in evaluations(40, 8)]
    run = write_run(tmp_path / "run", 2000, 200, evals=evals)
    page = report.write_report(run)
    assert set(pictures(page)) == PICTURES


def test_slow_first_step_does_not_flatten_the_others(tmp_path):
    rows = list(rows_of_run(40, 8))
    slow = [
        row | {"time/rollout": 60.0, "time/step": 60.5} if row["step"] == 1 else row for row in rows
    ]
    teal = np.array([0x0D, 0x94, 0x88]) / 255  # rollout

    def teal_height(name, metrics):
        png = pictures(report.write_report(write_run(tmp_path / name, metrics=metrics)))["time"]
        near = np.abs(pixels(png) - teal).max(axis=-1) < 0.02
        return np.median(near[:, 400:800].sum(axis=0))

    assert teal_height("slow", slow) > 0.6 * teal_height("even", rows) > 60


def test_comparison_overlays_runs_under_their_names(pages, tmp_path):
    bupo, grpo = write_run(tmp_path / "bupo"), write_run(tmp_path / "grpo", internal=0)
    page = report.write_report(bupo, grpo)
    assert page == bupo / "comparison" / "report.html"
    assert not (bupo / "report.html").exists()
    text = " ".join(text_of(page).split())
    assert "bupo Mean reward 0.40 → 0.86 in 40 steps (8 on the policy of layer 3" in text
    assert "grpo Mean reward 0.40 → 0.86 in 40 steps (all on the final policy)." in text
    both, alone = pictures(page), pictures(pages[8])
    assert set(both) == PICTURES
    assert all(both[name] != alone[name] for name in PICTURES)
    for color in report.plots.COLORS[:2]:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels(both["length"]) - rgb).max(axis=-1) < 0.02).sum() > 500


def test_comparison_of_directories_with_the_same_name(tmp_path):
    runs = [write_run(tmp_path / seed / "run") for seed in ("seed1", "seed2")]
    page = report.write_report(*runs, out_dir=tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "seed1/run" in text_of(page)
    assert "seed2/run" in text_of(page)


def test_command_line(tmp_path):
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "bupo.report"]
    done = subprocess.run([*command, run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "report.html")
    assert (run / "report.html").exists()
    done = subprocess.run([*command, tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"bupo.report: no such run directory: {tmp_path / 'absent'}\n"
    (tmp_path / "empty").mkdir()
    done = subprocess.run([*command, run, tmp_path / "empty"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"bupo.report: {tmp_path / 'empty'} holds no run: ")
    assert len(done.stderr.splitlines()) == 1 and not list((tmp_path / "empty").iterdir())
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m bupo.report ")
