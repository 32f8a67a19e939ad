"""What only a machine with an NVIDIA GPU can check, in one run: `make gpu-check ARGS=...`.

build     the extension with its CUDA ops, in place, by this interpreter
test      the tests of the CPU operators on the GPU, and those that need one
sanitize  compute-sanitizer's memcheck and racecheck over small calls of every op
bench     bench_lm_head.py --device cuda against every peer that can be imported
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
import shutil
import sys
from pathlib import Path

from conduct import Command, Failed, Job, NotRun, Stage, Verdict, conduct, failed, print_summary

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
GPU_TESTS = ["python_tests/test_gpu.py", "python_tests/test_gpu_sizes.py"]

# Wheels by what they are for; versions of the peers are those that peers.py was written for.
WHEELS = {
    "the build": ["pybind11", "setuptools>=77", "cmake>=3.25", "ninja"],
    "the tests": [
        *("pytest", "pytest-timeout", "pluggy", "iniconfig", "packaging", "pygments"),
        *("hypothesis", "sortedcontainers"),
    ],
    "peers (all optional; the kernels alone, without what their trainers need)": [
        *("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1", "trl==1.16.0", "verl==0.9.1"),
    ],
    "liger's Hopper kernels (optional, 100 MB)": [
        *("nvidia-cutlass-dsl>=4.6", "nvidia-cutlass-dsl-libs-base>=4.6"),
        *("nvidia-cutlass-dsl-libs-cu13>=4.6", "apache-tvm-ffi"),
    ],
}
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
NEEDED = {"torch": "", "setuptools": "", "pybind11": ""}
NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")


def wheel_commands() -> list[str]:
    platforms = " ".join(f"--platform manylinux_{p}_x86_64" for p in PLATFORMS)
    fixed = f"--no-deps --only-binary=:all: --python-version 3.12 --implementation cp {platforms}"
    lines = []
    for purpose, names in WHEELS.items():
        quoted = " ".join(f"'{n}'" if set("<>=") & set(n) else n for n in names)
        lines += [
            f"# {purpose}",
            f"python3 -m pip download {fixed} --platform manylinux2014_x86_64 -d wheels {quoted}",
        ]
    return lines


def install_wheels(wheels: Path, site: Path) -> Command:
    """Into a private folder: nothing that is installed changes."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        raise Failed(f"--wheels {wheels}: no wheel in it; --list-wheels says how to get them")
    pip = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    return [*pip, "--upgrade", "--target", str(site), *found]


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
        job.check(install_wheels(wheels, site))
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
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10"]
    output = job.check([PYTHON, "-m", "pytest", *options, *GPU_TESTS])
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines else ""


TOOLS = {
    "memcheck": [],
    # Of our own kernels alone: a library's may be written so that a race does no harm.
    "racecheck": ["--kernel-regex", "kns=bupo"],
}


def sanitize(job: Job, out: Path) -> str:
    program = shutil.which("compute-sanitizer", path=job.environment["PATH"])
    if program is None and not job.dry_run:
        raise NotRun("compute-sanitizer is not installed")
    planted = str(out.resolve() / "planted")
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
                f"status {status}, {' '.join(output.split())[-200:]}"
            )
        # Without torch's pool each tensor is an allocation, and its end is an end.
        job.check([*command, *exercise], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        done.append(tool)
    return f"{' and '.join(done)}: no error"


def bench(job: Job, out: Path, arguments: list[str]) -> str:
    results = out.resolve() / "bench.jsonl"
    results.unlink(missing_ok=True)
    command = [PYTHON, "bench/bench_lm_head.py", "--device", "cuda", "--json", str(results)]
    job.check([*command, "--minutes", f"{0.9 * job.left() / 60:.2f}", *arguments])
    if job.dry_run:
        return ""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    missing = [row["name"] for row in rows if "missing" in row]
    dropped = [row for row in rows if row["name"] == "shape"]
    return f"{results}; peers missing: {', '.join(missing) or 'none'}" + (
        f"; {len(dropped)} shapes left out for time" if dropped else ""
    )


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
    out, site = args.out, args.out.resolve() / "site"
    every = [
        Stage("build", 240, functools.partial(build, wheels=args.wheels, site=site), needed=True),
        Stage("test", 200, test),
        Stage("sanitize", 100, functools.partial(sanitize, out=out)),
        Stage("bench", 3600, functools.partial(bench, out=out, arguments=args.bench), reserve=45),
        Stage("profile", 90, profile),
    ]
    return [stage for stage in every if stage.name in args.stages]


def write_summary(verdicts: list[Verdict], out: Path, environment: dict[str, str]) -> None:
    """JSON lines like those of the benchmark: where and when, then one object per stage."""
    code = "import json, measure; print(json.dumps(measure.environment('cuda', 1)))"
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
    names = ["build", "test", "sanitize", "bench", "profile"]
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
        print("\n".join(wheel_commands()))
        return 0
    environment = environment_of(args.out.resolve() / "site")
    verdicts = conduct(
        stages_of(args), args.out, args.minutes, ROOT, environment, dry_run=args.dry_run
    )
    if not args.dry_run:
        write_summary(verdicts, args.out, environment)
    print_summary(verdicts)
    return int(any(failed(verdict) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
