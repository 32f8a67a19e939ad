"""What only a machine with an NVIDIA GPU can check: `make gpu-check ARGS="--call first"`.

build     the extension with its CUDA ops, in place, by this interpreter
smoke     every kernel once on a small call; one that hangs or is wrong is left out afterwards
bench     bench_lm_head.py --device cuda, ours beside bare products
test      the tests of the CPU operators on the GPU, and those that need one
train     python -m bupo.run on the GPU: both phases, float32 and bfloat16, resume, peak memory
peers     the benchmark again, against every peer that can be imported
models    bench_models.py: whole models, against plain torch and the fastest peer
variants  variants.py: what changes to the Hopper kernels would bring
sanitize  compute-sanitizer's memcheck over small calls in bfloat16
profile   the kernels of one large call: torch.profiler, and Nsight Compute of the scan

Three calls of less than ten minutes: --call first (build to train, the default), second (peers,
models), third (variants, sanitize, profile); --call all --minutes 40 is one. Each stage is useful
alone. Works without a network: `--list-wheels` prints the commands that fill a folder, on another
machine, with what this one lacks, and `--wheels FOLDER` uses it. Changes no setting of the GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

from conduct import Failed, Job, NotRun, Stage, Verdict, conduct, failed, print_summary
from wheels import download_commands, install_command

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SCRATCH = ROOT / "build" / "gpu-check-scratch"
"""beside the results, not among them: who fetches those wants few files"""
LAST_BENCH = SCRATCH / "bench.jsonl"
"""stays where the results are fetched and gone before the next run, which may be of other stages"""
OPERATOR_TESTS = ["test_ops_tensors.py", "test_policy_loss.py", "test_lm_head.py"]
GPU_TESTS = ["test_gpu.py", "test_gpu_sizes.py"]

NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")
KERNELS = "BUPO_CUDA_KERNELS"
"""the environment variable that bupo.ops takes its default from"""


def absent(job: Job, modules: tuple[str, ...]) -> list[str]:
    """Those of these modules that the interpreter does not find."""
    code = (
        "import importlib.util as u, sys; "
        "print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    )
    return job.check([PYTHON, "-c", code, *modules]).split()


# ---- stages ------------------------------------------------------------------------------------


def build(job: Job, wheels: Path | None, site: Path) -> None:
    """First of all what is missing is named, with the wheel to bring."""
    if wheels:
        shutil.rmtree(site, ignore_errors=True)
        job.check(install_command(wheels, site))
    code = (
        "import os, setuptools, sys; from importlib.util import find_spec as f; "
        "old = int(setuptools.__version__.split('.')[0]) < 77; "
        "sys.path.append(os.path.join(sys.prefix, 'cutlass')); "  # where make setup puts it
        "no_cutlass = not (f('cutlass_library') or os.environ.get('BUPO_CUTLASS')); "
        "print('setuptools>=77' * old, 'nvidia-cutlass==4.2.0.0' * no_cutlass, "
        "'pybind11' * (f('pybind11') is None))"
    )
    status, output = job.run([PYTHON, "-c", code])
    lacking = output.split() if status == 0 else ["setuptools>=77"]
    path = job.environment["PATH"]
    lacking += [x for x in ("nvcc", "cmake", "ninja") if not shutil.which(x, path=path)]
    if lacking and not job.dry_run:
        raise Failed(f"missing: {', '.join(lacking)} (--list-wheels, --wheels; or `make setup`)")
    code = "import torch, sys; print(torch.__version__, torch.version.cuda); "
    code += "sys.exit(not torch.cuda.is_available())"
    status, output = job.run([PYTHON, "-c", code])
    if status:
        raise Failed(f"no torch that sees a GPU: {output.strip().splitlines()[-1:]}")
    job.check([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], BUPO_CUDA="ON")
    code = "import bupo.ops as o; i = o.build_info(); print(i); assert 'cuda' in i['devices']"
    job.check([PYTHON, "-c", code])


def smoke(job: Job) -> str:
    """Later stages use the first of these that is right."""
    right, wrong = [], []
    for kernels in ("sm90_pingpong", "sm90_cooperative", "portable"):
        command = [PYTHON, "bench/smoke.py", kernels]
        status, output = job.run(command, seconds=job.left() / 2)
        if status == 0:
            right.append(kernels)
            continue
        calls = [line for line in output.splitlines() if line.startswith(kernels)]
        bad = [line for line in calls if not line.endswith((": begins", ": right"))]
        hangs = [line.replace("begins", "hangs") for line in calls[-1:] if line.endswith("begins")]
        wrong += bad + hangs or [f"{kernels}: exit status {status}"]
    if job.dry_run:
        return ""
    if not right:
        raise Failed("; ".join(wrong))
    job.environment[KERNELS] = right[0]
    remembered(job).write_text(right[0])
    if wrong:
        raise Failed(f"{'; '.join(wrong)}; later stages use {right[0]}")
    return "all kernels are right"


def remembered(job: Job) -> Path:
    """Which kernels a later call is to use."""
    return Path(job.environment["PYTHONPATH"].split(os.pathsep)[0]).parent / "kernels.txt"


def test(job: Job) -> str:
    lacking = absent(job, NEEDED_BY_TESTS)
    if lacking:
        raise Failed(f"missing: {', '.join(lacking)} (--list-wheels, --wheels; or `make setup`)")
    pytest = [PYTHON, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--timeout=100", "-o", "faulthandler_timeout=60", "--durations=5"]
    workers = [] if absent(job, ("xdist",)) else ["-n", "8", "--dist", "worksteal"]
    found = []
    for what, files, options, at_least, environment in (
        ("GPU only", GPU_TESTS, ["-m", "gpu"], 30, {}),
        ("on the GPU", OPERATOR_TESTS, workers, 300, {"BUPO_TEST_DEVICE": "cuda"}),
    ):
        files = [f"python_tests/{name}" for name in files]
        status, output = job.run([*pytest, *options, *files], **environment)
        passed = re.search(r"(\d+) passed", output)
        last = ([x for x in output.splitlines() if x.strip()] or [""])[-1].strip("= ")
        if not job.dry_run and not status and (not passed or int(passed[1]) < at_least):
            status, last = 1, f"only {last}, expected at least {at_least} to pass"
        found.append((status, f"{what}: {last}"))
    if any(status for status, _ in found):
        raise Failed("; ".join(text for _, text in found))
    return "; ".join(text for _, text in found)


def train(job: Job, out: Path, settings: tuple[str, ...] = ()) -> str:
    """Its metrics, with peak memory on a GPU, go to train.jsonl."""
    said, rows = [], []
    for dtype in ("float32", "bfloat16"):
        run = SCRATCH / f"train-{dtype}"
        shutil.rmtree(run, ignore_errors=True)
        command = [PYTHON, "-m", "bupo.run", "--out", str(run), f"model.compute_dtype={dtype}"]
        command += ["rollout.engine=hf", "bupo.steps=2", "eval.every=0"]
        # Constant: else the learning rate depends on `steps`, which the second run extends.
        command += ["optimizer.schedule=constant", *settings]
        job.check([*command, "steps=4"])
        job.check([*command, "steps=6", "resume=auto"])
        if job.dry_run:
            continue
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows += [{"compute_dtype": dtype} | step for step in steps]
        if [step["step"] for step in steps] != list(range(1, 7)):
            raise Failed(f"{dtype}: steps {[step['step'] for step in steps]}, expected 1 to 6")
        if len({step["phase"] for step in steps}) != 2:
            raise Failed(f"{dtype}: not both phases")
        peak = max(step.get("memory/gpu_peak_mib", 0.0) for step in steps)
        said.append(
            f"{dtype}: reward {steps[-1]['reward/mean']:.3f}, peak {peak:.0f} MiB of the GPU"
        )
    if rows:
        (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "; ".join(said)


def sanitize(job: Job) -> str:
    program = shutil.which("compute-sanitizer", path=job.environment["PATH"])
    if program is None and not job.dry_run:
        raise NotRun("compute-sanitizer is not installed")
    planted = str(SCRATCH / "planted")
    job.check(["nvcc", "-arch=native", "-o", planted, "bench/planted.cu"])
    # API errors are not reported: torch probes for symbols; our own calls are checked.
    command = [program or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99"]
    command += ["--print-limit", "20", "--report-api-errors", "no"]
    status, output = job.run([*command, planted, "write"])
    if status != 99 and not job.dry_run:
        raise NotRun(
            "compute-sanitizer does not report a planted error here: exit "
            f"status {status}, {' '.join(output.split())[-200:]}"
        )
    # Without torch's pool each tensor is an allocation, and its end is an end.
    exercise = [PYTHON, "bench/exercise.py", "--bfloat16"]
    job.check([*command, *exercise], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "memcheck: no error"


def start_anew(job: Job, *results: Path) -> None:
    """A stage that fails leaves no older results that could be taken for its own."""
    for file in () if job.dry_run else results:
        file.unlink(missing_ok=True)


def bench(job: Job, out: Path, arguments: list[str], peers: bool = False) -> str:
    results = out.resolve() / "bench.jsonl"
    if not peers:
        start_anew(job, results, LAST_BENCH)
    command = [PYTHON, "bench/bench_lm_head.py", "--device", "cuda", "--json", str(results)]
    command += ["--minutes", f"{0.9 * job.left() / 60:.2f}", *arguments]
    try:
        job.check([*command, *([] if peers else ["--peers"])])
    finally:  # what was written before the end counts
        if results.exists() and not job.dry_run:
            shutil.copy(results, LAST_BENCH)
    if job.dry_run:
        return ""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    missing = [row["name"] for row in rows if "missing" in row]
    dropped = [row for row in rows if row["name"] == "shape"]
    return f"{results}; peers missing: {', '.join(missing) or 'none'}" + (
        f"; {len(dropped)} shapes left out for time" if dropped else ""
    )


def models(job: Job, out: Path) -> str:
    results = out.resolve() / "models.jsonl"
    start_anew(job, results)
    command = [PYTHON, "bench/bench_models.py", "--json", str(results)]
    command += ["--fastest", str(LAST_BENCH)] if LAST_BENCH.exists() else ["--peers", "eager"]
    minutes = f"{(job.left() - 20) / 60:.2f}"  # what has begun must also end
    # Cases of very different sizes share the memory: without this, some would wait for the driver.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    job.check([*command, "--minutes", minutes], **environment)
    return "" if job.dry_run else str(results)


def variants(job: Job, out: Path) -> str:
    results = out.resolve() / "variants.jsonl"
    folder = str(SCRATCH / "variants")
    job.check([PYTHON, "bench/variants.py", "--folder", folder, "--json", str(results)])
    return "" if job.dry_run else str(results)


PROFILED = ["--shape", "2048", "4096", "151936"]
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")


def profile(job: Job) -> str:
    exercise = [PYTHON, "bench/exercise.py", *PROFILED]
    job.check([*exercise, "--table"])
    program = shutil.which("ncu", path=job.environment["PATH"])
    if program is None and not job.dry_run:
        return "torch.profiler only: ncu is not installed"
    ncu = [program or "ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += ["--kernel-name", "regex:head_scan", "--launch-count", "2"]
    for section in SECTIONS:
        ncu += ["--section", section]
    status, output = job.run([*ncu, *exercise])
    if status or "No kernels were profiled" in output:
        return f"torch.profiler only: ncu gave exit status {status}, see the log"
    return "torch.profiler and ncu"


# ---- the run -----------------------------------------------------------------------------------


def environment_of(site: Path) -> dict[str, str]:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    paths = [str(site / "bin"), str(Path(PYTHON).parent), os.environ.get("PATH", ""), f"{cuda}/bin"]
    modules = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    chosen = site.parent / "kernels.txt"
    kernels = {KERNELS: chosen.read_text()} if chosen.exists() else {}
    return (
        os.environ
        | kernels
        | {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            "PYTHONUNBUFFERED": "1",
        }
    )


def stages_of(args: argparse.Namespace) -> list[Stage]:
    out, part = args.out, functools.partial
    every = [
        Stage("build", 240, part(build, wheels=args.wheels, site=SCRATCH / "site"), needed=True),
        Stage("smoke", 180, smoke, minimum=40),
        Stage("bench", 150, part(bench, out=out, arguments=args.bench), minimum=50),
        Stage("test", 240, test, minimum=60),
        Stage("train", 150, part(train, out=out), minimum=50),
        Stage("peers", 400, part(bench, out=out, arguments=args.bench, peers=True), minimum=150),
        Stage("models", 400, part(models, out=out), minimum=100),
        Stage("variants", 400, part(variants, out=out), minimum=120),
        Stage("sanitize", 150, sanitize, minimum=40),
        Stage("profile", 90, profile, minimum=30),
    ]
    return [stage for stage in every if stage.name in args.stages]


CALLS = {
    "first": ["build", "smoke", "bench", "test", "train"],
    "second": ["build", "peers", "models"],
    "third": ["build", "variants", "sanitize", "profile"],
}
CALLS["all"] = list(dict.fromkeys(name for call in CALLS.values() for name in call))


def write_summary(verdicts: list[Verdict], out: Path, environment: dict[str, str]) -> None:
    """JSON lines like those of the benchmark: where and when, then one object per stage."""
    code = (
        "import json, measure, torch; device = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "print(json.dumps(measure.environment(device, 1)))"
    )
    with (out / "log.txt").open("a") as log:
        job = Job("environment", log, float("inf"), environment, ROOT / "bench")
        status, output = job.run([PYTHON, "-c", code], seconds=60)
    run = {} if status else json.loads(output.splitlines()[-1])
    with (out / "summary.jsonl").open("a") as file:
        for verdict in verdicts:
            file.write(json.dumps(run | dataclasses.asdict(verdict)) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--call", choices=CALLS, default="first", help="a choice of stages; default: %(default)s")
    add("--stages", nargs="+", choices=CALLS["all"], help="instead of those of --call")
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="default: %(default)s")
    add("--minutes", type=float, default=9.5, help="for all stages; default: %(default)s")
    add("--wheels", type=Path, metavar="FOLDER", help="install its wheels for this run alone")
    add("--list-wheels", action="store_true", help="print how to fill FOLDER, and end")
    add("--bench", nargs=argparse.REMAINDER, default=[], help="what follows goes to the benchmark")
    add("--dry_run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(arguments)
    args.stages = args.stages or CALLS[args.call]
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.list_wheels:
        print("\n".join(download_commands()))
        return 0
    SCRATCH.mkdir(parents=True, exist_ok=True)
    environment = environment_of(SCRATCH / "site")
    verdicts = conduct(
        stages_of(args), args.out, args.minutes, ROOT, environment, dry_run=args.dry_run
    )
    if not args.dry_run:
        write_summary(verdicts, args.out, environment)
    print_summary(verdicts)
    return int(any(failed(verdict) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
