"""What only a machine with an NVIDIA GPU can check: `make gpu-check ARGS="--call first"`.

The stages, which bench/README.md lists, fit into three calls of less than ten minutes: --call first
(the default), second and third; --call all --minutes 40 runs all of them. Each stage is useful
alone. Works without a network: `--list-wheels` prints the commands that fill a folder, on another
machine, with what this one lacks, and `--wheels FOLDER` uses it. Changes no setting of the GPU.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import sys
from pathlib import Path

from conduct import Failed, Job, NotRun, Stage, Verdict, conduct, print_summary
from rows import ROOT, append, read
from wheels import download_commands, install_command

PYTHON = sys.executable
SCRATCH = ROOT / "build" / "gpu-check-scratch"
"""Beside the results and not among them, because whoever fetches those wants few files."""
LAST_BENCH = SCRATCH / "bench.jsonl"
"""A copy for the next call, because the results may be fetched and deleted in between."""
OPERATOR_TESTS = [f"test_{name}.py" for name in ("lm_head", "policy_loss", "divergence")]
OPERATOR_TESTS += [f"test_ops_{name}.py" for name in ("tensors", "autograd", "errors")]
GPU_TESTS = ["test_gpu.py", "test_gpu_sizes.py"]
NEEDED_BY_TESTS = ("pytest", "pytest_timeout", "hypothesis")
HINT = "(--list-wheels, --wheels; or `make setup`)"
KERNELS = "BUPO_CUDA_KERNELS"  # the environment variable from which bupo.ops takes its default
CALLS = {
    "first": ["build", "smoke", "bench", "test", "train"],
    "second": ["build", "peers", "models"],
    "third": ["build", "variants", "sanitize", "profile"],
}
CALLS["all"] = list(dict.fromkeys(name for call in CALLS.values() for name in call))


def missing_modules(job: Job, modules: tuple[str, ...]) -> list[str]:
    """Those of these modules that the interpreter does not find."""
    code = "import importlib.util as u, sys; "
    code += "print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"
    return job.check([PYTHON, "-c", code, *modules]).split()


def path_of_program(job: Job, name: str) -> str | None:
    """The path of a program, or in a dry run its name."""
    return name if job.dry_run else shutil.which(name, path=job.environment["PATH"])


def new_file(job: Job, file: Path) -> Path:
    """A file of results, without older ones that could be taken for those of this call."""
    if not job.dry_run:
        file.unlink(missing_ok=True)
    return file.resolve()


# ---- stages ------------------------------------------------------------------------------------


def build(job: Job, wheels: Path | None, site: Path) -> None:
    """Names what is missing first, with the wheel to bring."""
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
    lacking += [name for name in ("nvcc", "cmake", "ninja") if not path_of_program(job, name)]
    if lacking:
        raise Failed(f"missing: {', '.join(lacking)} {HINT}")
    code = "import torch, sys; print(torch.__version__, torch.version.cuda); "
    code += "sys.exit(not torch.cuda.is_available())"
    status, output = job.run([PYTHON, "-c", code])
    if status:
        raise Failed(f"no torch that sees a GPU: {output.strip().splitlines()[-1:]}")
    job.check([PYTHON, "setup.py", "-q", "build_ext", "--inplace"], BUPO_CUDA="ON")
    code = "import bupo.ops as o; i = o.build_info(); print(i); assert 'cuda' in i['devices']"
    job.check([PYTHON, "-c", code])


def smoke(job: Job) -> str:
    """Later stages use the first kernels that are right, and so do later calls, which read their
    name from a file."""
    right, wrong = [], []
    for kernels in ("sm90_pingpong", "sm90_cooperative", "portable"):
        status, output = job.run([PYTHON, "bench/smoke.py", kernels], seconds=job.left() / 2)
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
    site = Path(job.environment["PYTHONPATH"].split(os.pathsep)[0])
    site.with_name("kernels.txt").write_text(right[0])
    if wrong:
        raise Failed(f"{'; '.join(wrong)}; later stages use {right[0]}")
    return "all kernels are right"


def bench(job: Job, out: Path, peers: bool = False) -> str:
    """With peers, the rows are added to those without."""
    results = out.resolve() / "bench.jsonl"
    if not peers:
        new_file(job, results)
        new_file(job, LAST_BENCH)
    command = [PYTHON, "bench/bench_lm_head.py", "--device", "cuda", "--json", str(results)]
    command += ["--minutes", f"{0.9 * job.left() / 60:.2f}", *([] if peers else ["--peers"])]
    try:
        job.check(command)
    finally:  # what was written before a failure counts
        if results.exists() and not job.dry_run:
            shutil.copy(results, LAST_BENCH)
    if job.dry_run:
        return ""
    rows = read(results)
    missing = ", ".join(row["name"] for row in rows if "missing" in row) or "none"
    dropped = sum(row["name"] == "shape" for row in rows)
    return f"{results}; peers missing: {missing}; shapes left out for time: {dropped}"


def test(job: Job) -> str:
    lacking = missing_modules(job, NEEDED_BY_TESTS)
    if lacking:
        raise Failed(f"missing: {', '.join(lacking)} {HINT}")
    pytest = [PYTHON, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--timeout=100", "-o", "faulthandler_timeout=60", "--durations=5"]
    workers = [] if missing_modules(job, ("xdist",)) else ["-n", "8", "--dist", "worksteal"]
    found, good = [], True
    for what, files, options, at_least, environment in (
        ("GPU only", GPU_TESTS, ["-m", "gpu"], 30, {}),
        ("on the GPU", OPERATOR_TESTS, workers, 300, {"BUPO_TEST_DEVICE": "cuda"}),
    ):
        files = [f"python_tests/{name}" for name in files]
        status, output = job.run([*pytest, *options, *files], **environment)
        passed = re.search(r"(\d+) passed", output)
        last = ([x for x in output.splitlines() if x.strip()] or [""])[-1].strip("= ")
        enough = job.dry_run or (passed is not None and int(passed[1]) >= at_least)
        good &= status == 0 and enough
        short = "" if enough else f", expected at least {at_least} to pass"
        found.append(f"{what}: {last}{short}")
    if not good:
        raise Failed("; ".join(found))
    return "; ".join(found)


TRAINED = {
    "float32": ("model.compute_dtype=float32",),
    "bfloat16": ("model.compute_dtype=bfloat16",),
    "bfloat16, AdamW on the host": (
        *("model.compute_dtype=bfloat16", "model.parameter_dtype=bfloat16"),
        "optimizer.place=host",
    ),
}
"""The settings of the runs of the train stage, by name"""


def train(job: Job, out: Path, settings: tuple[str, ...] = ()) -> str:
    """Writes the metrics, with peak memory on a GPU, to train.jsonl."""
    said, results = [], new_file(job, out / "train.jsonl")
    for number, (name, own) in enumerate(TRAINED.items()):
        run = SCRATCH / f"train-{number}"
        shutil.rmtree(run, ignore_errors=True)
        command = [PYTHON, "-m", "bupo.run", "--out", str(run), *own]
        command += ["rollout.engine=hf", "bupo.steps=2", "eval.every=0"]
        # Any other schedule depends on `steps`, which the second run extends.
        command += ["optimizer.schedule=constant", *settings]
        job.check([*command, "steps=4"])
        job.check([*command, "steps=6", "resume=auto"])
        if job.dry_run:
            continue
        steps = read(run / "metrics.jsonl")
        append(results, {"run": name}, steps)
        if [step["step"] for step in steps] != list(range(1, 7)):
            raise Failed(f"{name}: steps {[step['step'] for step in steps]}, expected 1 to 6")
        if len({step["phase"] for step in steps}) != 2:
            raise Failed(f"{name}: not both phases")
        peak = max(step.get("memory/gpu_peak_mib", 0.0) for step in steps)
        reward = steps[-1]["reward/mean"]
        said.append(f"{name}: reward {reward:.3f}, peak {peak:.0f} MiB of the GPU")
    return "; ".join(said)


def models(job: Job, out: Path) -> str:
    results = new_file(job, out / "models.jsonl")
    command = [PYTHON, "bench/bench_models.py", "--json", str(results)]
    command += ["--fastest", str(LAST_BENCH)] if LAST_BENCH.exists() else ["--peers", "eager"]
    minutes = f"{(job.left() - 20) / 60:.2f}"  # what has begun must also end
    # Cases of very different sizes share the memory: without this, some would wait for the driver.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    job.check([*command, "--minutes", minutes], **environment)
    return str(results)


def variants(job: Job, out: Path) -> str:
    results = str(new_file(job, out / "variants.jsonl"))
    folder = str(SCRATCH / "variants")
    job.check([PYTHON, "bench/variants.py", "--folder", folder, "--json", results])
    return results


def sanitize(job: Job) -> str:
    sanitizer = path_of_program(job, "compute-sanitizer")
    if sanitizer is None:
        raise NotRun("compute-sanitizer is not installed")
    planted = str(SCRATCH / "planted")
    job.check(["nvcc", "-arch=native", "-o", planted, "bench/planted.cu"])
    # API errors are not reported, because torch probes for symbols; our own calls are checked.
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99"]
    command += ["--print-limit", "20", "--report-api-errors", "no"]
    status, output = job.run([*command, planted])
    if status != 99 and not job.dry_run:
        said = " ".join(output.split())[-200:]
        raise NotRun(f"it does not report a planted error here: exit status {status}, {said}")
    # Without torch's pool each tensor is an allocation of its own, so a write past its end shows.
    exercise = [PYTHON, "bench/exercise.py", "small"]
    job.check([*command, *exercise], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return "memcheck: no error"


def profile(job: Job) -> str:
    job.check([PYTHON, "bench/exercise.py", "table"])
    ncu = path_of_program(job, "ncu")
    if ncu is None:
        return "torch.profiler only: ncu is not installed"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--kernel-name", "regex:head_scan", "--launch-count", "2"]
    for section in ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats"):
        command += ["--section", section]
    status, output = job.run([*command, PYTHON, "bench/exercise.py", "large"])
    if status or "No kernels were profiled" in output:
        return f"torch.profiler only: ncu gave exit status {status}, see the log"
    return "torch.profiler and ncu"


# ---- the run -----------------------------------------------------------------------------------


def environment_of(site: Path) -> dict[str, str]:
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    paths = [str(site / "bin"), str(Path(PYTHON).parent), os.environ.get("PATH", ""), f"{cuda}/bin"]
    modules = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    chosen = site.with_name("kernels.txt")
    kernels = {KERNELS: chosen.read_text()} if chosen.exists() else {}
    settings = {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join(filter(None, modules)),
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | kernels | settings


def stages_of(args: argparse.Namespace) -> list[Stage]:
    out, part = args.out, functools.partial
    every = [
        Stage("build", 240, part(build, wheels=args.wheels, site=SCRATCH / "site"), needed=True),
        Stage("smoke", 180, smoke, minimum=40),
        Stage("bench", 150, part(bench, out=out), minimum=50),
        Stage("test", 240, test, minimum=60),
        Stage("train", 150, part(train, out=out), minimum=50),
        Stage("peers", 400, part(bench, out=out, peers=True), minimum=150),
        Stage("models", 400, part(models, out=out), minimum=100),
        Stage("variants", 400, part(variants, out=out), minimum=120),
        Stage("sanitize", 150, sanitize, minimum=40),
        Stage("profile", 90, profile, minimum=30),
    ]
    return [stage for stage in every if stage.name in args.stages]


def write_summary(verdicts: list[Verdict], out: Path, environment: dict[str, str]) -> None:
    """Adds a JSON line per stage, with where and when it ran as in those of the benchmark."""
    code = (
        "import json, measure, torch; device = 'cuda' if torch.cuda.is_available() else 'cpu'; "
        "print(json.dumps(measure.environment(device, 1)))"
    )
    with (out / "log.txt").open("a") as log:
        job = Job("environment", log, float("inf"), environment, ROOT / "bench")
        status, output = job.run([PYTHON, "-c", code], seconds=60)
    run = {} if status else json.loads(output.splitlines()[-1])
    append(out / "summary.jsonl", run, map(dataclasses.asdict, verdicts))


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
    add("--dry_run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(arguments)
    args.stages = args.stages or CALLS[args.call]
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.list_wheels:
        print(download_commands())
        return 0
    SCRATCH.mkdir(parents=True, exist_ok=True)
    environment = environment_of(SCRATCH / "site")
    verdicts = conduct(
        stages_of(args), args.out, args.minutes, ROOT, environment, dry_run=args.dry_run
    )
    if not args.dry_run:
        write_summary(verdicts, args.out, environment)
    print_summary(verdicts)
    return int(any(verdict.bad for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
