"""What only a machine with an NVIDIA GPU can check, in one run: `make gpu-check ARGS=...`.

build     the extension with its CUDA ops, in place, by this interpreter
test      the tests of the CPU operators on the GPU, and those that need one
sanitize  compute-sanitizer's memcheck and racecheck over small calls of every op
bench     bench_lm_head.py --device cuda against every peer that can be imported
models    bench_models.py: whole models, against plain torch and the fastest peer of the bench
profile   the kernels of one large call: Nsight Compute if it works, and torch.profiler

Works without a network: `--list-wheels` prints the commands that fill a folder, on another
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


def absent(job: Job, modules: tuple[str, ...]) -> list[str]:
    """Those of these modules that the interpreter does not find."""
    code = (
        "import importlib.util as u, sys; "
        "print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    )
    return job.check([PYTHON, "-c", code, *modules]).split()


# ---- stages ------------------------------------------------------------------------------------


def build(job: Job, wheels: Path | None, site: Path) -> None:
    if wheels:
        shutil.rmtree(site, ignore_errors=True)
        job.check(install_command(wheels, site))
    code = "import torch, sys; print(torch.__version__, torch.version.cuda); "
    code += "sys.exit(not torch.cuda.is_available())"
    status, output = job.run([PYTHON, "-c", code])
    if status:
        raise Failed(f"no torch that sees a GPU: {output.strip().splitlines()[-1:]}")
    lacking = absent(job, ("setuptools", "pybind11"))
    path = job.environment["PATH"]
    lacking += [x for x in ("nvcc", "cmake", "ninja") if not shutil.which(x, path=path)]
    if lacking and not job.dry_run:
        raise Failed(f"missing: {', '.join(lacking)} (--list-wheels, --wheels; or `make setup`)")
    job.check([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], BUPO_CUDA="ON")
    code = "import bupo.ops as o; i = o.build_info(); print(i); assert 'cuda' in i['devices']"
    job.check([PYTHON, "-c", code])


def test(job: Job) -> str:
    lacking = absent(job, NEEDED_BY_TESTS)
    if lacking:
        raise Failed(f"missing: {', '.join(lacking)} (--list-wheels, --wheels; or `make setup`)")
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    found = []
    for what, files, options, at_least, environment in (
        ("on the GPU", OPERATOR_TESTS, [], 300, {"BUPO_TEST_DEVICE": "cuda"}),
        ("GPU only", GPU_TESTS, ["-m", "gpu"], 30, {}),
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


TOOLS = {
    "memcheck": [],
    # Of our own kernels alone: a library's may be written so that a race does no harm.
    "racecheck": ["--kernel-regex", "kns=bupo"],
}


def sanitize(job: Job) -> str:
    program = shutil.which("compute-sanitizer", path=job.environment["PATH"])
    if program is None and not job.dry_run:
        raise NotRun("compute-sanitizer is not installed")
    planted = str(SCRATCH / "planted")
    job.check(["nvcc", "-arch=native", "-o", planted, "bench/planted.cu"])
    exercise = [PYTHON, "bench/exercise.py"]
    done = []
    for tool, options in TOOLS.items():
        # API errors are not reported: torch probes for symbols; our own calls are checked.
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        command += ["--print-limit", "20", "--report-api-errors", "no", *options]
        status, output = job.run([*command, planted, "race" if tool == "racecheck" else "write"])
        if status != 99 and not job.dry_run:
            raise NotRun(
                f"compute-sanitizer --tool {tool} does not report a planted error here: exit "
                f"status {status}, {' '.join(output.split())[-200:]}; no error by: {done or '-'}"
            )
        # Without torch's pool each tensor is an allocation, and its end is an end.
        job.check([*command, *exercise], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        done.append(tool)
    return f"{' and '.join(done)}: no error"


def start_anew(job: Job, *results: Path) -> None:
    """A stage that fails leaves no older results that could be taken for its own."""
    for file in () if job.dry_run else results:
        file.unlink(missing_ok=True)


def bench(job: Job, out: Path, arguments: list[str]) -> str:
    results = out.resolve() / "bench.jsonl"
    start_anew(job, results, LAST_BENCH)
    command = [PYTHON, "bench/bench_lm_head.py", "--device", "cuda", "--json", str(results)]
    job.check([*command, "--minutes", f"{0.9 * job.left() / 60:.2f}", *arguments])
    if job.dry_run:
        return ""
    shutil.copy(results, LAST_BENCH)
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


PROFILED = ["--shape", "2048", "4096", "151936"]
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")


def profile(job: Job) -> str:
    exercise = [PYTHON, "bench/exercise.py", *PROFILED]
    job.check([*exercise, "--table"])
    program = shutil.which("ncu", path=job.environment["PATH"])
    if program is None and not job.dry_run:
        return "torch.profiler only: ncu is not installed"
    ncu = [program or "ncu", "--clock-control", "none", "--profile-from-start", "off"]
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
    return os.environ | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "PYTHONUNBUFFERED": "1",
    }


def stages_of(args: argparse.Namespace) -> list[Stage]:
    out, site = args.out, SCRATCH / "site"
    every = [
        Stage("build", 240, functools.partial(build, wheels=args.wheels, site=site), needed=True),
        Stage("test", 240, test, minimum=60),
        Stage("sanitize", 120, sanitize, minimum=40),
        Stage("bench", 3600, functools.partial(bench, out=out, arguments=args.bench), minimum=150),
        Stage("models", 3600, functools.partial(models, out=out), minimum=100),
        Stage("profile", 90, profile, minimum=45),
    ]
    return [stage for stage in every if stage.name in args.stages]


def write_summary(verdicts: list[Verdict], out: Path, environment: dict[str, str]) -> None:
    """JSON lines like those of the benchmark: where and when, then one object per stage."""
    code = (
        "import json, measure, torch; device = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "print(json.dumps(measure.environment(device, 1)))"
    )
    with (out / "environment.log").open("w") as log:
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
    names = ["build", "test", "sanitize", "bench", "models", "profile"]
    add = parser.add_argument
    add("--stages", nargs="+", choices=names, default=names, help="default: all")
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", help="default: %(default)s")
    add("--minutes", type=float, default=9.5, help="for all stages; default: %(default)s")
    add("--wheels", type=Path, metavar="FOLDER", help="install its wheels for this run alone")
    add("--list-wheels", action="store_true", help="print how to fill FOLDER, and end")
    add("--bench", nargs=argparse.REMAINDER, default=[], help="what follows goes to the benchmark")
    add("--dry_run", action="store_true", help="print the commands, run none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.list_wheels:
        print("\n".join(download_commands()))
        return 0
    environment = environment_of(SCRATCH / "site")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    verdicts = conduct(
        stages_of(args), args.out, args.minutes, ROOT, environment, dry_run=args.dry_run
    )
    if not args.dry_run:
        write_summary(verdicts, args.out, environment)
    print_summary(verdicts)
    return int(any(failed(verdict) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
