"""make gpu-check without a GPU: its stages, caps, plan and wheels."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import conduct
import gpu_check
import pytest
import torch
import wheels

ROOT = Path(__file__).parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def conducted(tmp_path: Path, *stages: conduct.Stage, minutes: float = 1.0) -> dict[str, Any]:
    verdicts = conduct.conduct(list(stages), tmp_path / "out", minutes, tmp_path, {})
    assert [v.stage for v in verdicts] == [s.name for s in stages]
    return {v.stage: v for v in verdicts}


def test_a_failed_stage_stops_only_what_needs_it(tmp_path: Path) -> None:
    def good(job: conduct.Job) -> str:
        return job.check(python("print('fine')")).strip()

    def bad(job: conduct.Job) -> None:
        job.check(python("print('why it broke'); raise SystemExit(3)"))

    def cannot(job: conduct.Job) -> None:
        raise conduct.NotRun("the tool is not installed")

    def broken(job: conduct.Job) -> None:
        raise KeyError("oops")

    def absent(job: conduct.Job) -> None:
        job.check(["no-such-program-anywhere"])

    stages = [conduct.Stage(f.__name__, 30, f) for f in (bad, good, cannot, broken, absent)]
    found = conducted(tmp_path, *stages)
    assert [v.verdict for v in found.values()] == ["FAILED", "ok", "not run", "FAILED", "FAILED"]
    assert found["good"].why == "fine"
    assert "exit status 3" in found["bad"].why and "KeyError" in found["broken"].why
    assert "why it broke" in Path(found["bad"].log).read_text()
    assert found["cannot"].why == "because the tool is not installed"
    assert [conduct.failed(v) for v in found.values()] == [True, False, False, True, True]

    found = conducted(tmp_path, conduct.Stage("build", 30, bad, needed=True), stages[1])
    assert found["good"].why == "because build failed" and conduct.failed(found["good"])


def test_a_stage_over_its_time_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    late = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"

    def slow(job: conduct.Job) -> None:
        job.check(python(parent))

    def unlucky(job: conduct.Job) -> str:
        return "ran"

    began = time.monotonic()
    found = conducted(tmp_path, conduct.Stage("slow", 1.5, slow), conduct.Stage("next", 5, unlucky))
    assert time.monotonic() - began < 3.5
    assert found["slow"].verdict == "FAILED" and "over its" in found["slow"].why
    assert found["next"].verdict == "ok"
    time.sleep(max(0, began + 5 - time.monotonic()))
    assert not mark.exists(), "the grandchild lived on"
    found = conducted(tmp_path, conduct.Stage("next", 5, unlucky), minutes=0)
    assert found["next"].why == "because no time was left" and conduct.failed(found["next"])


def test_the_plan_can_be_read_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu_check.py", "--dry_run", "--out", str(tmp_path / "out")]
    kept = [tmp_path / "out" / name for name in ("bench.jsonl", "models.jsonl", "bench.log")]
    kept[0].parent.mkdir()
    for file in kept:
        file.write_text("of an earlier run")
    done = subprocess.run(
        [*command, "--bench", "--rounds", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("build_ext --inplace", "BUPO_TEST_DEVICE=cuda", "memcheck", "racecheck"):
        assert part in done.stdout, part
    assert "bench_lm_head.py --device cuda" in done.stdout and "--rounds 3" in done.stdout
    assert "bench_models.py" in done.stdout and "--clock-control none" in done.stdout
    assert done.stdout.count("planned") == 2 * 6
    assert [file.read_text() for file in kept] == ["of an earlier run"] * 3
    assert not (tmp_path / "out" / "summary.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: gpu-check can say more")
def test_without_a_gpu_nothing_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "build", "bench"]) == 1
    shown = capsys.readouterr().out
    assert "no torch that sees a GPU" in shown and "because build failed" in shown
    rows = [json.loads(x) for x in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["FAILED", "not run"]
    assert all(row["date"] and row["commit"] and row["torch"] for row in rows)


def test_stages_leave_time_for_those_that_were_chosen(tmp_path: Path) -> None:
    """Of 9.5 minutes; and models are handed the last benchmark, wherever its results went."""

    def caps(*stages: str) -> dict[str, int]:
        options = ["--dry_run", "--out", str(tmp_path), "--stages", *stages]
        command = [sys.executable, "bench/gpu_check.py", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return {name: int(s) for name, s in re.findall(r"\[(\w+)\] at most (\d+) s", done.stdout)}

    assert caps("bench", "models", "profile")["bench"] == 570 - 145
    assert caps("build", "test", "bench")["test"] == 240
    assert caps("bench")["bench"] == 570 and caps("models", "profile")["models"] == 525
    left = 570 - sum(stage.minimum for stage in gpu_check.stages_of(gpu_check.parse([])))
    assert left > 150, "for the build, and what stages take beyond their least"


def test_models_meet_the_fastest_peer_of_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    class Recorded:
        dry_run = False

        def left(self) -> float:
            return 140.0

        def check(self, command: list[str], **environment: str) -> None:
            ran.append((command, environment))

    monkeypatch.setattr(gpu_check, "LAST_BENCH", tmp_path / "bench.jsonl")
    gpu_check.models(Recorded(), tmp_path / "a")  # type: ignore[arg-type]
    (tmp_path / "bench.jsonl").touch()
    gpu_check.models(Recorded(), tmp_path / "b")  # type: ignore[arg-type]
    (first, environment), (second, _) = ran
    assert first[-4:] == ["--peers", "eager", "--minutes", "2.00"]
    assert second[-4:-2] == ["--fastest", str(tmp_path / "bench.jsonl")]
    assert str(tmp_path / "b" / "models.jsonl") in second and environment


def test_a_bench_that_fails_leaves_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Job:
        dry_run, fails = False, False

        def left(self) -> float:
            return 100.0

        def check(self, command: list[str]) -> None:
            if self.fails:
                raise conduct.Failed("exit status 1")
            (tmp_path / "bench.jsonl").write_text('{"name": "x"}\n')

    job = Job()
    monkeypatch.setattr(gpu_check, "LAST_BENCH", tmp_path / "last.jsonl")
    gpu_check.bench(job, tmp_path, [])  # type: ignore[arg-type]
    assert gpu_check.LAST_BENCH.read_text() == '{"name": "x"}\n'
    job.fails = True
    with pytest.raises(conduct.Failed):
        gpu_check.bench(job, tmp_path, [])  # type: ignore[arg-type]
    assert not gpu_check.LAST_BENCH.exists()


def test_wheels_are_named_and_installed_apart(tmp_path: Path) -> None:
    text = "\n".join(wheels.download_commands())
    assert "--python-version 3.12" in text and "manylinux_2_28_x86_64" in text
    for name in ("pybind11", "hypothesis", "liger-kernel==0.8.5", "trl==1.16.0", "verl==0.9.1"):
        assert name in text, name
    with pytest.raises(conduct.Failed, match="no wheel in it"):
        wheels.install_command(tmp_path, tmp_path / "site")
    (tmp_path / "x-1-py3-none-any.whl").touch()
    command = wheels.install_command(tmp_path, tmp_path / "site")
    assert {"--no-index", "--no-deps", str(tmp_path / "site")} <= set(command)
    assert command[-1] == str(tmp_path / "x-1-py3-none-any.whl")
