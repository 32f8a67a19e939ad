"""bupo.report of training runs: pages say what the files say, and no file can make it fail."""

import html
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import browser as chrome
import matplotlib
import matplotlib.image
import pytest
from matplotlib.colors import to_hex
from report_samples import (
    HOSTILE,
    PICTURES,
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
from bupo.report.run_files import read_run
from bupo.report.run_plots import draw_steps


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of an ordinary run, not to be written to."""
    return report.write_report(write_run(tmp_path_factory.mktemp("runs") / "run"))


def test_page_holds_the_figures_that_lie_beside_it(page):
    assert page.name == "report.html"
    assert {file.stem for file in page.parent.glob("*.png")} == set(figures(page)) == PICTURES
    for name in PICTURES:
        png = matplotlib.image.imread(page.parent / f"{name}.png")
        assert png.shape[1] == 1500 and png[..., :3].std() > 0.02, f"{name} is blank"
    assert "could not be drawn" not in page.read_text()


def test_page_needs_no_network_and_no_script(page):
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.read_text())
    assert not re.search(r"https?://|<script|<link|@import|url\([^#]", text)
    assert all(
        src[:5] == "data:" or src[0] == "#" for src in re.findall(r'(?:src|href)="(.*?)"', text)
    )
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


@pytest.mark.parametrize(
    ("steps", "internal", "sentence"),
    [
        (
            40,
            8,
            "Mean reward 0.40 → 0.86 in 40 steps "
            "(8 on the policy of layer 3, then 32 on the final policy).",
        ),
        (3, 3, "Mean reward 0.40 → 0.86 in 3 steps (all on the policy of layer 3)."),
        (1, 0, "Mean reward 0.40 in 1 step (all on the final policy)."),
    ],
)
def test_sentence_says_what_happened(tmp_path, steps, internal, sentence):
    page = report.write_report(write_run(tmp_path / "run", steps, internal))
    assert sentence in text_of(page)
    assert set(figures(page)) == PICTURES


def test_phases_follow_the_rows_and_not_the_configuration(tmp_path):
    again = [row | {"step": row["step"] + 6} for row in rows_of_run(6, 4, 5)]
    page = report.write_report(write_run(tmp_path / "run", metrics=[*rows_of_run(6, 2), *again]))
    assert (
        "2 on the policy of layer 3, then 4 on the final policy, then 4 on the policy of layer 5"
    ) in text_of(page)


def test_evaluation_table(tmp_path):
    evals = [*evaluations(40, 8), *evaluations(40, 8, "math500")]
    evals.append(
        {"step": 20, "when": "during", "dataset": "math500", "avg": 0.5678, "avg_se": None}
    )
    text = text_of(report.write_report(write_run(tmp_path / "run", evals=evals)))
    figures = "0.360 ± 0.011 0.360 ± 0.012 0.590 ± 0.012 0.832 ± 0.012 19.400"
    assert f"arithmetic 8 phase switch 512 {figures}" in text
    assert "All 7 evaluations" in text
    assert "math500 20 during 0.568 " in text


def test_majority_votes_are_shown_where_there_are_any(tmp_path):
    rows = list(evaluations(40, 8))
    assert "maj@K" not in text_of(report.write_report(write_run(tmp_path / "a", evals=rows)))
    rows[0] |= {"maj": 0.8125, "maj_se": 0.03125}
    rows[1] |= {"maj": None, "maj_se": None}
    text = text_of(report.write_report(write_run(tmp_path / "b", evals=rows)))
    assert "maj@K" in text and "0.812 ± 0.031" in text


def test_rollouts_best_and_worst_of_the_first_step_and_the_ends_of_phases(page):
    text = text_of(page)
    for step in (1, 8, 40):
        assert f"{step} 1.000 p{step}_1= 7+5=12#12 {step}_1 12 stop" in text
        assert f"{step} 0.000 p{step}_3= 7+5=12#12 {step}_3 12 stop" in text
    assert "p8_0" not in text and "p9_1" not in text


def test_long_responses_are_shortened_in_the_middle(tmp_path):
    text = text_of(
        report.write_report(write_run(tmp_path / "run", response="start" + "x" * 100_000))
    )
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
    for page in (report.write_report(run), report.write_report(run, write_run(tmp_path / "other"))):
        source, tags = page.read_text(), Tags()
        tags.feed(source)
        assert "script" not in tags.seen and "<script" not in source
        assert source.count(html.escape(HOSTILE).replace("&#x27;", "&#39;")) >= 6 + 3 + 1
        assert "could not be drawn" not in source
        assert set(figures(page)) == PICTURES
        assert "_run $x^{$ &lt;b&gt;" in source
    assert "_run $x^{$ &lt;b&gt;" in figures(page)["length"], "named in the legend of several"


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
        assert figures(page) == {}


def test_evaluation_before_the_first_step_is_shown(tmp_path):
    run = write_run(tmp_path / "run", metrics=[], evals=[next(evaluations(40, 8))])
    page = report.write_report(run)
    assert set(figures(page)) == {"pass_at_k"}
    assert "0.390 ± 0.011" in text_of(page)


def test_lines_cut_short_change_nothing_but_a_note(page, tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts/step_000040.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'[1, 2]\n\n"step"\nnul\0\n{"step": 1e999}\n\xff{\n{"step": 41, "reward/me')
    other = report.write_report(run)
    assert figures(other) == figures(page)
    assert "unreadable" not in text_of(page)
    assert "metrics.jsonl: 6 unreadable lines left out." in text_of(other)
    assert "eval.jsonl: 6 unreadable lines left out." in text_of(other)


def test_values_that_are_no_numbers_are_left_out_and_named(tmp_path):
    rows = list(rows_of_run(40, 8))
    for row in rows[10:14]:
        row |= {"reward/mean": math.nan, "policy/ratio_max": math.inf}
        row |= {"response/length": "long", "final/entropy": None, "policy/entropy": 10**400}
    rows[12] |= {"response/length": 1e300}
    rows[-1]["reward/mean"] = -math.inf
    page = report.write_report(write_run(tmp_path / "run", metrics=rows))
    text = text_of(page)
    assert "reward/mean in 5 of 40 steps" in text
    assert "policy/ratio_max in 4 of 40 steps" in text
    assert "final/entropy in 4 of 40 steps" in text  # null is what the trainer writes for nan
    assert "layer in" not in text
    assert f"Mean reward 0.40 → {rows[-2]['reward/mean']:.2f} in 40 steps" in text
    assert set(figures(page)) == PICTURES
    for row in rows[10:14]:
        for key in ("reward/mean", "response/length", "final/entropy", "policy/entropy"):
            del row[key]
    del rows[-1]["reward/mean"]
    without = report.write_report(write_run(tmp_path / "without", metrics=rows))
    assert figures(page) == figures(without)


def test_resumed_run_counts_a_repeated_step_once_and_its_last_row(page, tmp_path):
    rows = list(rows_of_run(40, 8))
    stale = [row | {"reward/mean": 0.99, "phase": "internal", "layer": 1} for row in rows[20:30]]
    run = write_run(tmp_path / "run", metrics=rows[:20] + stale + rows[20:])
    assert report.write_report(run).read_bytes() == page.read_bytes()


def test_a_figure_that_fails_is_reported_and_the_others_remain(tmp_path, monkeypatch):
    def broken(runs):
        raise ZeroDivisionError("no answers")

    monkeypatch.setattr(report, "draw_evaluations", broken)
    page = report.write_report(write_run(tmp_path / "run"))
    assert set(figures(page)) == PICTURES - {"pass_at_k"}
    assert "pass_at_k.png could not be drawn: ZeroDivisionError('no answers')" in text_of(page)


def test_same_files_same_bytes_and_no_global_state(page, tmp_path):
    before = dict(matplotlib.rcParams)
    assert report.write_report(write_run(tmp_path / "run")).read_bytes() == page.read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_comparison_overlays_runs_under_their_names(tmp_path):
    bupo, grpo = write_run(tmp_path / "bupo"), write_run(tmp_path / "grpo", internal=0)
    page = report.write_report(bupo, grpo)
    assert page == bupo / "comparison" / "report.html"
    assert not (bupo / "report.html").exists()
    text = text_of(page)
    assert "bupo: Mean reward 0.40 → 0.86 in 40 steps (8 on the policy of layer 3" in text
    assert "grpo: Mean reward 0.40 → 0.86 in 40 steps (all on the final policy)." in text
    assert set(figures(page)) == PICTURES
    figure = draw_steps("length", [read_run(run, run.name) for run in (bupo, grpo)])
    shown = {to_hex(line.get_color()) for ax in figure.axes for line in ax.lines}
    assert shown == set(palette.SERIES[:2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bupo", "grpo"]


def test_comparison_of_directories_with_the_same_name(tmp_path):
    runs = [write_run(tmp_path / seed / "run") for seed in ("seed1", "seed2")]
    page = report.write_report(*runs, out_dir=tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert "seed1/run" in text_of(page)
    assert "seed2/run" in text_of(page)


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
    assert set(figures(page)) == PICTURES
    assert "could not be drawn" not in page.read_text()


def test_looks_of_another_depth_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    lines(run / "diagnostics.jsonl", [*looks([0, 5]), *looks([9, 12], depth=7), *looks([20, 30])])
    assert "layers" in figures(report.write_report(run))


def test_figures_are_legible_in_a_browser(tmp_path):
    name = "the Instruct model's run, " + 3 * "seed "
    evals = [row for n in range(5) for row in evaluations(40, 8, f"data set {n} " + 40 * "x")]
    run = write_run(tmp_path / f"{name}1", evals=evals)
    lines(run / "diagnostics.jsonl", looks(range(30), depth=36))
    other = write_run(tmp_path / f"{name}2", internal=20)
    with chrome.chromium(tmp_path / "profile") as driver:
        for page in (report.write_report(run), report.write_report(run, other)):
            chrome.opened(driver, page)
            assert chrome.illegible(driver) == [], page
            assert driver.get_log("browser") == []


def test_command_line(tmp_path):
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "bupo.report"]
    done = subprocess.run([*command, run], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "report.html")
    assert (run / "report.html").exists()
    done = subprocess.run([*command, tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"bupo.report: no such run directory: {tmp_path / 'absent'}\n"
    other = tmp_path / "analysis"  # has a config.yaml and a report.html of its own
    other.mkdir()
    (other / "config.yaml").touch()
    done = subprocess.run([*command, run, other], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"bupo.report: {other} holds no run: it has neither metrics.jsonl nor eval.jsonl\n"
    )
    assert [file.name for file in other.iterdir()] == ["config.yaml"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m bupo.report ")
