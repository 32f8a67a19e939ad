"""python -m bupo.evaluate: the real program on the built-in task."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bupo.commands.scoring import print_table
from bupo.evaluate import main
from bupo.report import write_pass_at_k
from bupo.rollouts.hf import HFEngine
from bupo.runlog import run_directory as metrics
from bupo.types import EvalResult

SIZES = "task_options={layers: 2, width: 32, warm_steps: 4, eval_problems: 40}"
SETTINGS = [
    "task=bupo.tasks.arithmetic",
    "reward.function=bupo.tasks.arithmetic:reward",
    SIZES,
    "rollout.max_new_tokens=12",
    "rollout.batch_size=16",
    "eval.samples=4",
    "eval.pass_k=[1,4,8]",
]


def arguments(out: Path, *more: str) -> list[str]:
    return ["--out", str(out), *SETTINGS, *more]


def files(out: Path) -> dict[str, str]:
    return {name: (out / name).read_text() for name in ("eval.jsonl", "responses/addition.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "whole"
    assert main(arguments(out)) == 0
    return out


def test_figures_are_those_of_the_responses(whole: Path) -> None:
    rows = [json.loads(x) for x in files(whole)["responses/addition.jsonl"].splitlines()]
    (result,) = [json.loads(x) for x in files(whole)["eval.jsonl"].splitlines()]
    assert len(rows) == result["n"] == 40
    assert all(len(row["responses"]) == 4 for row in rows)
    shares = [sum(r > 0.5 for r in row["rewards"]) / 4 for row in rows]
    assert result["avg"] == pytest.approx(sum(shares) / 40)
    assert result["pass@4"] == pytest.approx(sum(share > 0 for share in shares) / 40)
    assert result["pass@8"] is None, "undefined with 4 samples"
    assert result["length"] == pytest.approx(sum(sum(row["tokens"]) for row in rows) / 160)
    assert (whole / "pass_at_k.png").stat().st_size > 5000


def test_table_and_picture_of_any_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are a stranger's, and a single problem has no standard error."""
    nan = float("nan")
    results = [
        EvalResult(
            "a [/b]\x1b[2J", 1, 4, 0.5, nan, {1: (0.5, nan), 8: None}, None, 12.4, 0.25, 0.0
        ),
        EvalResult("second", 20, 4, 0.5, 0.1, {1: (0.5, 0.1), 8: None}, (0.75, 0.1), 9.6, 0.0, 0.5),
    ]
    print_table(results)
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in shown] == [
        ["data set", "problems", "n", "Avg@n", "Pass@1", "Pass@8", "maj@n", "tokens", "truncated",
         "not graded"],
        ["a [/b]\\x1b[2J", "1", "4", "0.500 ± -", "0.500 ± -", "-", "-", "12", "25.0%", "0.0%"],
        ["second", "20", "4", "0.500 ± 0.100", "0.500 ± 0.100", "-", "0.750 ± 0.100", "10", "0.0%",
         "50.0%"],
    ]  # fmt: skip
    write_pass_at_k([result.row() for result in results], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    undefined = results[1].row() | {"pass@1": None}
    write_pass_at_k([undefined], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_majority_and_answers(whole: Path) -> None:
    rows = [json.loads(x) for x in files(whole)["responses/addition.jsonl"].splitlines()]
    (result,) = [json.loads(x) for x in files(whole)["eval.jsonl"].splitlines()]
    for row in rows:
        cut = [r.rpartition("#")[2] if "#" in r else None for r in row["responses"]]
        assert row["answers"] == cut
    assert 0 <= result["maj"] <= result["pass@4"] and result["maj_se"] >= 0


def test_greedy_and_several_data_sets(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likeliest tokens: another seed gives the same, sampling does not."""
    (made,) = Path(os.environ["BUPO_CACHE"]).glob("arithmetic-qwen3-2-32-4-*-40-0-*")
    lines = (made / "eval.jsonl").read_text().splitlines()
    sets = []
    for name, part in (("first", lines[:6]), ("second", lines[6:10])):
        rows = [json.loads(line) | {"data_source": name} for line in part]
        sets.append(str(tmp_path / f"{name}.jsonl"))
        Path(sets[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        f"model.path={made / 'model'}", f"eval.files=[{','.join(sets)}]",
        "reward.function=bupo.tasks.arithmetic:reward", "rollout.max_new_tokens=12",
        "eval.samples=1",
    ]  # fmt: skip

    def responses(out: str, *more: str) -> list[str]:
        assert main(["--out", str(tmp_path / out), *command, *more]) == 0
        found = [(tmp_path / out / f"responses/{s}.jsonl").read_text() for s in ("first", "second")]
        return [json.loads(line)["responses"][0] for text in found for line in text.splitlines()]

    greedy = responses("a", "eval.temperature=0")
    assert len(greedy) == 10
    assert greedy == responses("b", "eval.temperature=0", "seed=7")
    assert responses("c") != responses("d", "seed=7")
    shown = capsys.readouterr()
    assert "1 for each problem, greedy, at most 12" in shown.err
    assert "first 6, second 4" in shown.err
    assert "first" in shown.out and "second" in shown.out and "maj@n" in shown.out
    datasets = [json.loads(x)["dataset"] for x in (tmp_path / "a/eval.jsonl").open()]
    assert datasets == ["first", "second"]
    responses("e", "eval.samples_by_source={second: 3}", "eval.pass_k=[1,3]")
    first, second = [json.loads(x) for x in (tmp_path / "e/eval.jsonl").open()]
    assert (first["k_samples"], second["k_samples"]) == (1, 3)
    assert first["pass@3"] is None and second["pass@3"] is not None
    assert "1 or 3 for each problem" in capsys.readouterr().err
    command[-1] = "eval.samples_by_source={third: 3}"
    assert main(["--out", str(tmp_path / "f"), *command]) == 2
    assert "names third, but eval.files have the data sources first, second" in (
        capsys.readouterr().err
    )


def test_a_killed_evaluation_is_continued_exactly(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    command = [sys.executable, "-m", "bupo.evaluate", *arguments(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    responses = out / "responses/addition.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if responses.exists() and len(responses.read_bytes().splitlines()) >= 8:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert responses.exists() and not (out / "eval.jsonl").exists()
    with responses.open("a") as file:
        file.write('{"prompt": "cut')  # and a line cut by the kill
    assert main(arguments(out)) == 0
    assert files(out) == files(whole)


def test_done_work_is_not_done_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(whole)
    monkeypatch.setattr(HFEngine, "generate", lambda *args: pytest.fail("made again"))
    training = ("optimizer.lr=1", "bupo.layer=2", "loss.clip_high=0.28", "wandb=mine")
    assert main(arguments(whole, *training)) == 0, "what no evaluation reads may differ"
    assert files(whole) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eval.samples=8", "holds an evaluation with different settings (eval.samples: 4 -> 8)"),
        ("model.path=/nowhere", "model.path=/nowhere: folder not found"),
        ("eval.temperature=0", "makes all samples equal: set eval.samples=1, got 4"),
        ("eval.sample=8", "unknown key eval.sample; did you mean eval.samples?"),
    ],
)
def test_mistakes_give_one_line_and_leave_results_alone(
    change: str, message: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(whole)
    target = whole if "samples" in change else whole.parent / "other"
    assert main(arguments(target, change)) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1, errors
    assert files(whole) == before


def test_a_full_disk_is_one_line_and_costs_no_problem(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, writes = metrics.append_rows, 0

    def full(file: Path, rows: list[dict[str, object]]) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            original(file, rows[:1])
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        original(file, rows)

    monkeypatch.setattr(metrics, "append_rows", full)
    out = tmp_path / "parts"
    assert main(arguments(out)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("bupo.evaluate: [Errno 28] No space left") and "is kept" in last
    monkeypatch.undo()
    assert main(arguments(out)) == 0
    assert files(out) == files(whole)


def test_nothing_to_evaluate_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "x"), "model.path=somewhere/model"]) == 2
    assert "eval.files is empty" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(tmp_path / "x"), "--dry_run"]) == 0
    assert "addition 40" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
