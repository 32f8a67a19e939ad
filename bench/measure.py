"""Times, peak memory and errors of implementations, on the CPU or a GPU."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batch import Batch
from implementations import Implementation
from resident import PeakMemory
from truth import Truth, policy_slope, relative_error

import bupo.ops as ops

MIB = 2**20
SLOW, ENOUGH = 4, 3
"""A peer that takes SLOW times the floor, the first case, is timed ENOUGH times and no more."""


@dataclasses.dataclass
class Case:
    """One implementation on the input sets of one shape, and what was measured."""

    implementation: Implementation
    dtype: torch.dtype
    batches: list[Batch]
    """used in turn: together they are larger than the GPU's L2 cache"""
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    failed: str = ""

    @property
    def name(self) -> str:
        return self.implementation.name

    @property
    def device(self) -> torch.device:
        return self.batches[0].hidden.device

    def batch(self, turn: int) -> Batch:
        return self.batches[turn % len(self.batches)]

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.milliseconds).quantile(q))

    def milliseconds_of(self, turn: int) -> float:
        """Of one call, from no gradients to none."""
        batch = self.batch(turn)
        batch.clear_gradients()
        elapsed = milliseconds_of(lambda: self.implementation.run(batch), self.device)
        batch.clear_gradients()
        return elapsed

    def release(self) -> None:
        """After a failure."""
        for batch in self.batches:
            batch.clear_gradients()
        release(self.device)


def milliseconds_of(run: Callable[[], object], device: torch.device) -> float:
    """One call, by CUDA events or by the clock."""
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


class Peak:
    """`with Peak(device) as peak`: afterwards peak.mib is the highest memory within, less that
    before: torch's allocations on a GPU, resident memory elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.mib, self._resident = device.type == "cuda", 0.0, PeakMemory()

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._resident.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self._before) / MIB
        else:
            self.mib = self._resident.peak()


def time_rounds(cases: list[Case], rounds: int, warm_up: int = 1) -> None:
    """All cases once a round, so that a slow moment of the machine falls on all of them."""
    for turn in range(warm_up + rounds):
        for case in cases:
            if case.failed or _slow_peer(case, cases[0]):
                continue
            try:
                elapsed = case.milliseconds_of(turn)
                if turn == 0 and case.device.type == "cuda":
                    print(f"  {case.name}: first call {elapsed / 1e3:.1f} s", flush=True)
                if turn >= warm_up:
                    case.milliseconds.append(elapsed)
            except Exception as error:  # out of memory, or a peer that cannot do this shape
                case.failed = reason(error)
            if case.failed:
                case.release()


def _slow_peer(case: Case, floor: Case) -> bool:
    known = len(case.milliseconds) >= ENOUGH and case.implementation.peer
    return known and case.milliseconds[-1] > SLOW * floor.milliseconds[-1]


def reason(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def release(device: torch.device) -> None:
    """Gives back what a failed call left. Not within `except`: the error holds its tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # raises again where the GPU itself is lost, and that ends the run


def memory_of(case: Case) -> dict[str, float]:
    """peak_mib: of one call, gradients included; extra_mib: without the gradients it leaves (GPU
    only, where allocations can be counted)."""
    batch = case.batch(0)
    batch.clear_gradients()
    with Peak(case.device) as peak:
        case.implementation.run(batch)
    found = {"peak_mib": peak.mib}
    if case.device.type == "cuda":
        left = [g for g in (batch.hidden.grad, batch.weight.grad) if g is not None]
        found["extra_mib"] = found["peak_mib"] - sum(g.nbytes for g in left) / MIB
    batch.clear_gradients()
    return found


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
        slope = policy_slope(batch, truth.logprobs)
        if implementation.loss == "cross entropy":
            slope = torch.full_like(slope, -1 / len(slope))
        d_hidden, d_weight = truth.gradients(batch, slope)
        found["error_d_hidden"] = relative_error(batch.hidden.grad[truth.rows], d_hidden)
        found["error_d_weight"] = relative_error(batch.weight.grad[truth.entries], d_weight)
    batch.clear_gradients()
    return found


# ---- the machine -------------------------------------------------------------------------------


def ceilings(device: str, dtype: str) -> dict[str, Any]:
    """What the roofline is made of: GB/s of a copy in memory, read and written bytes counted, and
    TFLOP/s of a square product of random numbers. Medians."""
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


# ---- where a figure comes from -----------------------------------------------------------------


def _output_of(*command: str) -> str:
    here = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def commit() -> str:
    """$BUPO_COMMIT where the tree came without its history."""
    found = _output_of("git", "rev-parse", "--short", "HEAD")
    if not found:
        return os.environ.get("BUPO_COMMIT", "unknown")
    return found + ("+changes" if _output_of("git", "status", "--porcelain") else "")


def environment(device: str, threads: int) -> dict[str, Any]:
    run = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
    }
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
            "build": {k: v for k, v in ops.build_info().items() if not k.startswith("cpu_")},
        }
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return run | {
        "cpu": models[0] if models else platform.processor(),
        "cpu_products": ops.build_info()["cpu_products"],
        "vector_bits": ops.build_info()["cpu_vectors"],
        "threads": threads,
    }
