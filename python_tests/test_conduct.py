"""make gpu-check without a GPU: its stages, caps, plan and wheels."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import conduct
import gpu_check
import pytest
import run_samples
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
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "[bad] why it broke" in log and log.index("[bad]") < log.index("[good] fine")
    assert found["cannot"].why == "because the tool is not installed"
    assert [v.bad for v in found.values()] == [True, False, False, True, True]

    found = conducted(tmp_path, conduct.Stage("build", 30, bad, needed=True), stages[1])
    assert found["good"].why == "because build failed" and found["good"].bad


def test_a_stage_over_its_time_is_interrupted_then_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shell ignores SIGINT for a job in the background."""
    monkeypatch.setattr(conduct, "GRACE", 1.0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = tmp_path / "pid"
    late = "import os, signal, time; signal.signal(2, signal.SIG_IGN); "
    late += f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {late!r}])
try:
    child.wait()
except KeyboardInterrupt:
    print('found so far: 3', flush=True)
    child.wait()
"""

    def slow(job: conduct.Job) -> None:
        job.check(python(parent))

    def unlucky(job: conduct.Job) -> str:
        return "ran"

    found = conducted(tmp_path, conduct.Stage("slow", 6, slow), conduct.Stage("next", 5, unlucky))
    assert found["slow"].verdict == "FAILED" and "over its" in found["slow"].why
    assert "[slow] found so far: 3" in (tmp_path / "out" / "log.txt").read_text()
    assert found["next"].verdict == "ok"
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z", "the grandchild lived on"
    found = conducted(tmp_path, conduct.Stage("next", 5, unlucky), minutes=0)
    assert found["next"].why == "because no time was left" and found["next"].bad


def test_the_plan_can_be_read_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu_check.py", "--dry_run", "--out", str(tmp_path / "out")]
    command += ["--call", "all", "--minutes", "40"]
    kept = [tmp_path / "out" / name for name in ("bench.jsonl", "models.jsonl", "log.txt")]
    kept[0].parent.mkdir()
    for file in kept:
        file.write_text("of an earlier run")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert shown.startswith("40 minutes: build 240 s, smoke 180 s, bench 150 s, test 240 s")
    for part in (
        "build_ext --inplace",
        "smoke.py sm90_pingpong",
        "BUPO_TEST_DEVICE=cuda",
        "model.compute_dtype=bfloat16",
        "memcheck",
        "bench_models.py",
        "variants.py",
        "regex:head_scan",
    ):
        assert part in shown, part
    assert "bench_lm_head.py --device cuda" in shown and "--peers" in shown
    order = [shown.index(f"[{name}] planned") for name in gpu_check.CALLS["all"]]
    assert order == sorted(order) and shown.count("planned") == 2 * 10
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

    assert caps("peers", "models", "profile")["peers"] == 400
    assert caps("build", "test", "bench")["test"] == 240
    assert caps("models", "profile")["models"] == 400
    for call, stages in gpu_check.CALLS.items():
        chosen = gpu_check.stages_of(gpu_check.parse(["--call", call]))
        if call == "all":
            continue
        assert [stage.name for stage in chosen] == stages
        left = 570 - sum(stage.minimum for stage in chosen)
        assert left > 240, "for the build, and what stages take beyond their least"


class Recorded:
    """A job whose commands answer as told: (part of the command, exit status, output)."""

    dry_run = False

    def __init__(self, folder: Path, *answers: tuple[str, int, str]) -> None:
        self.answers = answers
        self.ran: list[str] = []
        self.environment = {"PYTHONPATH": str(folder / "site"), "PATH": ""}

    def left(self) -> float:
        return 140.0

    def run(self, command: list[str], **options: Any) -> tuple[int, str]:
        self.ran.append(" ".join(command))
        for part, status, output in self.answers:
            if part in self.ran[-1]:
                return status, output
        return 0, ""

    check = conduct.Job.check


def test_a_kernel_that_hangs_or_is_wrong_is_left_out(tmp_path: Path) -> None:
    hangs = "sm90_pingpong, forward: right\nsm90_pingpong, backward: begins\nTimeout (0:00:20)!"
    wrong = "sm90_cooperative, forward: outputs are off by 3.0e-01 nats"
    bad = [("sm90_pingpong", 1, hangs), ("sm90_cooperative", 1, wrong)]
    job: Any = Recorded(tmp_path, *bad)
    with pytest.raises(conduct.Failed) as failed:
        gpu_check.smoke(job)
    assert "sm90_pingpong, backward: hangs; sm90_cooperative, forward: outputs" in str(failed.value)
    assert str(failed.value).endswith("later stages use portable")
    assert job.environment["BUPO_CUDA_KERNELS"] == "portable"
    assert (tmp_path / "kernels.txt").read_text() == "portable", "for a later call"
    environment = gpu_check.environment_of(tmp_path / "site")
    assert environment["BUPO_CUDA_KERNELS"] == "portable"

    job = Recorded(tmp_path)
    assert gpu_check.smoke(job) == "all kernels are right"
    assert job.environment["BUPO_CUDA_KERNELS"] == "sm90_pingpong"
    with pytest.raises(conduct.Failed, match="portable: exit status 134"):
        gpu_check.smoke(Recorded(tmp_path, ("smoke.py", 134, "")))  # type: ignore[arg-type]


SMOKE = """
import sys, time
sys.path.insert(0, "bench")
import smoke
smoke.SECONDS = 2
{planted}
raise SystemExit(smoke.main(["portable", "--device", "cpu"]))
"""
PLANTED = {
    "nothing": ("", 0, ""),
    "a hang": ("smoke.CALLS['backward'] = lambda *_: time.sleep(60)", 1, "backward: begins"),
    "a wrong sum": (
        "right = smoke.ops.policy_loss\n"
        "smoke.ops.policy_loss = lambda *a, **k: right(*a, **k | {'clip_low': 0.01})",
        1,
        "policy_loss: outputs are off by",
    ),
    "a crash": ("smoke.CALLS['backward'] = lambda *_: 1 / 0", 1, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_smoke_test_names_what_is_broken(name: str) -> None:
    planted, status, said = PLANTED[name]
    code = SMOKE.format(planted=planted)
    done = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout
    if name == "a hang":
        assert done.stdout.strip().endswith(said), "the last line names it"
    else:
        assert done.stdout.count("begins") == len(done.stdout.splitlines()) / 2


def test_the_loop_is_trained_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but on the CPU and smaller."""
    monkeypatch.setattr(gpu_check, "SCRATCH", tmp_path / "scratch")
    small = [x for x in run_samples.arguments(tmp_path) if not x.startswith(("out=", "steps="))]
    environment = gpu_check.environment_of(tmp_path / "scratch" / "site")
    environment["PYTHONPATH"] += f":{ROOT / 'python_tests'}"
    with (tmp_path / "log").open("w") as log:
        job = conduct.Job("train", log, time.monotonic() + 600, environment, ROOT)
        said = gpu_check.train(job, tmp_path, tuple(small))
    assert all(f"{name}: reward" in said for name in gpu_check.TRAINED)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 7)] * 3


def test_the_build_names_the_wheels_that_it_lacks(tmp_path: Path) -> None:
    lacking = "nvidia-cutlass==4.2.0.0 pybind11\n"
    job: Any = Recorded(tmp_path, ("cutlass_library", 0, lacking), ("nvcc", 1, ""))
    with pytest.raises(conduct.Failed, match=r"missing: nvidia-cutlass==4.2.0.0, pybind11, nvcc"):
        gpu_check.build(job, None, tmp_path / "site")
    assert len(job.ran) == 1, "before anything else"


def test_models_meet_the_fastest_peer_of_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: Any = Recorded(tmp_path)
    monkeypatch.setattr(gpu_check, "LAST_BENCH", tmp_path / "bench.jsonl")
    gpu_check.models(job, tmp_path / "a")
    (tmp_path / "bench.jsonl").touch()
    gpu_check.models(job, tmp_path / "b")
    first, second = job.ran
    assert first.endswith("--peers eager --minutes 2.00")
    assert f"--fastest {tmp_path / 'bench.jsonl'}" in second
    assert str(tmp_path / "b" / "models.jsonl") in second


def test_a_bench_that_fails_leaves_no_older_one_but_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Job(Recorded):
        writes = '{"name": "x"}\n'

        def run(self, command: list[str], **options: Any) -> tuple[int, str]:
            if self.writes:
                (tmp_path / "bench.jsonl").write_text(self.writes)
            return super().run(command, **options)

    monkeypatch.setattr(gpu_check, "LAST_BENCH", tmp_path / "last.jsonl")
    job: Any = Job(tmp_path)
    gpu_check.bench(job, tmp_path)
    assert gpu_check.LAST_BENCH.read_text() == '{"name": "x"}\n'
    job.answers = (("bench_lm_head", 1, ""),)
    with pytest.raises(conduct.Failed):
        gpu_check.bench(job, tmp_path)
    assert gpu_check.LAST_BENCH.exists(), "rows that were written before the failure"
    job.writes = ""
    with pytest.raises(conduct.Failed):
        gpu_check.bench(job, tmp_path)
    assert not gpu_check.LAST_BENCH.exists()


def test_wheels_are_named_and_installed_apart(tmp_path: Path) -> None:
    text = wheels.download_commands()
    assert "--python-version 3.12" in text and "manylinux_2_28_x86_64" in text
    for name in (
        "pybind11",
        "nvidia-cutlass",
        "math-verify",
        "hypothesis",
        "liger-kernel==0.8.5",
        "trl==1.16.0",
        "verl==0.9.1",
    ):
        assert name in text, name
    with pytest.raises(conduct.Failed, match="no wheel in it"):
        wheels.install_command(tmp_path, tmp_path / "site")
    (tmp_path / "x-1-py3-none-any.whl").touch()
    command = wheels.install_command(tmp_path, tmp_path / "site")
    assert {"--no-index", "--no-deps", str(tmp_path / "site")} <= set(command)
    assert command[-1] == str(tmp_path / "x-1-py3-none-any.whl")
