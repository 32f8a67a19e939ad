"""Times, peak memory and errors of implementations, on the CPU or a GPU."""

import abc
import datetime
import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from batch import Batch
from implementations import Implementation
from rows import ROOT, Row
from truth import Truth, policy_slope, relative_error

import bupo.ops as ops

MIB = 2**20
SLOW, ENOUGH = 4, 3
"""A peer that takes SLOW times as long as the first case is timed ENOUGH times and no more."""


# ---- time --------------------------------------------------------------------------------------


class Timed(abc.ABC):
    """Something that time_rounds() runs again and again."""

    def __init__(self, label: str, device: torch.device, peer: bool = False) -> None:
        self.label, self.device, self.peer = label, device, peer
        self.milliseconds: list[float] = []
        self.failed = ""  # why it has no time

    @abc.abstractmethod
    def run_once(self, turn: int) -> float:
        """Runs once and returns the milliseconds; turn 0 is the first warm-up."""

    def release(self) -> None:
        """Gives back the memory that a failed run left."""
        release(self.device)

    def times(self) -> Row:
        times = torch.tensor(self.milliseconds)
        quantiles = (("ms", 0.5), ("ms_p20", 0.2), ("ms_p80", 0.8))
        return {key: float(times.quantile(q)) for key, q in quantiles}


class Case(Timed):
    """An implementation on the input sets of one shape. The sets are used in turn, because together
    they are larger than the L2 cache of a GPU."""

    def __init__(
        self, implementation: Implementation, dtype: torch.dtype, batches: list[Batch]
    ) -> None:
        super().__init__(implementation.name, batches[0].hidden.device, implementation.peer)
        self.implementation, self.dtype, self.batches = implementation, dtype, batches

    def run_once(self, turn: int) -> float:
        batch = self.batches[turn % len(self.batches)]
        batch.clear_gradients()
        elapsed = milliseconds_of(lambda: self.implementation.run(batch), self.device)
        batch.clear_gradients()
        return elapsed

    def release(self) -> None:
        for batch in self.batches:
            batch.clear_gradients()
        release(self.device)


def time_rounds(
    cases: Sequence[Timed], rounds: int, warm_up: int = 1, deadline: float = float("inf")
) -> None:
    """Runs all cases once per round, so that a slow moment of the machine affects all of them. No
    run begins after the deadline, which is of time.monotonic()."""
    for turn in range(warm_up + rounds):
        for case in cases:
            known = case.milliseconds[-1] if len(case.milliseconds) >= ENOUGH else 0.0
            floor = cases[0].milliseconds[-1:] or [math.inf]
            slow = case.peer and known and known > SLOW * floor[0]
            if case.failed or slow or time.monotonic() > deadline:
                continue
            try:
                elapsed = case.run_once(turn)
                if turn == 0 and elapsed > 1e3:
                    print(f"  {case.label}: first call {elapsed / 1e3:.1f} s", flush=True)
                if turn >= warm_up:
                    case.milliseconds.append(elapsed)
            except Exception as error:  # out of memory, or a peer that does not support this shape
                case.failed = reason(error)
            if case.failed:
                case.release()


def milliseconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The time of one call, by CUDA events on a GPU and by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def reason(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def release(device: torch.device) -> None:
    """Frees cached memory. Not to be called within `except`, where the error holds its tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # raises again where the GPU itself is lost, and that ends the run


# ---- memory ------------------------------------------------------------------------------------


class ResidentMemory:
    """Peak resident memory of this process, from /proc: Linux only."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._before = self._status("VmRSS")
        self.reset()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def peak_mib(self) -> float:
        """The highest since reset() above what was resident at start()."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Peak:
    """`with Peak(device) as peak`: afterwards peak.mib is the highest memory within, less that
    before: torch's allocations on a GPU, resident memory elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.mib = device.type == "cuda", 0.0

    def __enter__(self) -> "Peak":
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._resident = ResidentMemory()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self._before) / MIB
        else:
            self.mib = self._resident.peak_mib()


def memory_of(case: Case) -> dict[str, float]:
    """peak_mib of one call, gradients included. On a GPU, where allocations can be counted, also
    extra_mib, which is without the gradients that it leaves."""
    batch = case.batches[0]
    batch.clear_gradients()
    with Peak(case.device) as peak:
        case.implementation.run(batch)
    found = {"peak_mib": peak.mib}
    if case.device.type == "cuda":
        left = [g for g in (batch.hidden.grad, batch.weight.grad) if g is not None]
        found["extra_mib"] = peak.mib - sum(g.nbytes for g in left) / MIB
    batch.clear_gradients()
    return found


# ---- errors ------------------------------------------------------------------------------------


def errors_of(case: Case, batch: Batch, truth: Truth) -> dict[str, float]:
    """Against float64: largest error of log p and entropy, relative errors of dX and dW."""
    implementation = case.implementation
    if implementation.live != 1:
        batch = batch.live(implementation.live)
    batch.clear_gradients()
    got = implementation.run(batch)
    found = {}
    for name, exact in (("logprobs", truth.logprobs), ("entropy", truth.entropy)):
        if name in got:
            found[f"error_{name}"] = float((got[name].double() - exact).abs().max())
    if batch.hidden.grad is not None and batch.weight.grad is not None:
        slope = policy_slope(batch, truth.logprobs, implementation.loss == "sequence ratio")
        if implementation.loss == "cross entropy":
            slope = torch.full_like(slope, -1 / len(slope))
        d_hidden, d_weight = truth.gradients(batch, slope)
        found["error_d_hidden"] = relative_error(batch.hidden.grad[truth.rows], d_hidden)
        found["error_d_weight"] = relative_error(batch.weight.grad[truth.entries], d_weight)
    batch.clear_gradients()
    return found


# ---- the machine -------------------------------------------------------------------------------


def ceilings(device: str, dtype: str) -> Row:
    """What the roofline is made of: GB/s of a copy in memory, read and written bytes counted, and
    TFLOP/s of a square product of random numbers."""
    cuda = device == "cuda"
    source = torch.rand(1 << (29 if cuda else 26), device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), source.device)
    copy = 2e-9 * source.nbytes / seconds
    size = 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _median_seconds(lambda: torch.mm(a, b, out=out), source.device)
    return {"copy_gb_s": copy, "gemm_tflops": {dtype: 2e-12 * size**3 / seconds}}


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = [milliseconds_of(run, device) for _ in range(7)]
    return sorted(times[2:])[2] / 1e3  # after two to warm up


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def environment(device: str, threads: int) -> dict[str, Any]:
    """Where a figure comes from. Where the tree has no history, the commit is $BUPO_COMMIT."""
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    changes = "+changes" if commit and _output_of("git", "status", "--porcelain") else ""
    run = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + changes or os.environ.get("BUPO_COMMIT", "unknown"),
        "torch": torch.__version__,
    }
    build = ops.build_info()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return run | {
            "gpu": properties.name,
            "gpu_mib": properties.total_memory // MIB,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver.splitlines()[0] if driver else "unknown",
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "build": {k: v for k, v in build.items() if not k.startswith("cpu_")},
        }
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return run | {
        "cpu": models[0] if models else platform.processor(),
        "cpu_products": build["cpu_products"],
        "vector_bits": build["cpu_vectors"],
        "threads": threads,
    }
