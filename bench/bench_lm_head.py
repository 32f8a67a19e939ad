"""Time, memory and error of the LM-head ops, beside bare GEMMs, plain torch and other libraries.

Every implementation runs once per round, in one process, so that a slow moment of the machine
falls on all of them. How to read the table: bench/README.md.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import peers
import torch
from batch import Batch
from implementations import (
    ONE,
    POLICY,
    SWEEP,
    SWEEP_GEMM,
    SWEEP_ROWS,
    THREE,
    Gemms,
    Implementation,
    logprobs_forward,
    ours,
)
from measure import MIB, Case, ceilings, environment, errors_of, memory_of, reason, time_rounds
from report import cpu_bars, cuda_bars, print_table, row_of
from rows import Row, add_best_peer, append, show
from truth import Truth

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

Shape = tuple[int, int, int]
"""N, D, V"""
CPU_SHAPE = (2048, 1024, 32768)
SWEEP_SHAPE = (36 * 3 * 2048, 4096, 151936)
"""36 layers x 3 policies x 2048 tokens, forward only"""
GPU_SHAPES = (
    (8192, 4096, 151936),
    (8192, 2560, 151936),
    (8192, 4096, 128256),
    (32768, 4096, 151936),
    SWEEP_SHAPE,
    (32768, 2560, 151936),
    (32768, 4096, 128256),
)
"""The most important first: what does not fit into --minutes is left out from the end."""
CPU_PEERS = (peers.EAGER, peers.CROSS_ENTROPY)
BUDGET = 4 << 30
"""The workspace that bupo.ops takes by default on a GPU with 16 GiB free."""
SWEEP_TOKENS = 100_000
"""A shape with this many tokens or more is a sweep."""


def input_sets(shape: Shape, dtype: torch.dtype, device: str) -> list[Batch]:
    """One on the CPU. On a GPU at least two, and four times its L2 in all, 8 at most."""
    count = 1
    if device == "cuda" and shape[0] < SWEEP_TOKENS:
        one_set = (shape[0] + shape[2]) * shape[1] * dtype.itemsize
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(8, max(2, -(-4 * l2 // one_set)))
    return [Batch.make(*shape, dtype, device, seed) for seed in range(count)]


def cases_of(sets: list[Batch], dtype: torch.dtype, device: str) -> list[Case]:
    """The floor first, then ours."""
    if len(sets[0].hidden) >= SWEEP_TOKENS:
        floor = Gemms(sets[0], SWEEP_ROWS)
        return [
            Case(Implementation(SWEEP_GEMM, floor.one, 1), dtype, sets),
            Case(Implementation(SWEEP, logprobs_forward, 1), dtype, sets),
        ]
    floor = Gemms(sets[0])
    found = [Case(Implementation(THREE, floor.three, 3), dtype, sets)]
    if device == "cuda":
        found.append(Case(Implementation(ONE, floor.one, 1), dtype, sets))
    for implementation in ours(cuda=device == "cuda"):
        share = implementation.live
        batches = sets if share == 1 else [batch.live(share) for batch in sets]
        found.append(Case(implementation, dtype, batches))
    return found


def measure(found: list[Case], rounds: int, checked: tuple[Batch, Truth] | None) -> list[Row]:
    """One row of the table per case; errors on the batch whose truth is known."""
    time_rounds(found, rounds, warm_up=2 if found[0].device.type == "cuda" else 1)
    timed = {case.label: case.times()["ms"] for case in found if not case.failed}
    rows = []
    for case in found:
        row: Row = {"name": case.label, "dtype": str(case.dtype).removeprefix("torch.")}
        if not case.failed:
            try:
                measured = row_of(case, timed) | memory_of(case)
                outside = peers.RESERVED.get(case.implementation.short_name, 0.0)
                if outside:
                    measured |= {k: measured[k] + outside for k in ("peak_mib", "extra_mib")}
                if checked and case.label not in (ONE, THREE):
                    measured |= errors_of(case, *checked)
                rows.append(measured)
            except Exception as error:
                case.failed = reason(error)
        if case.failed:
            case.release()
            rows.append(row | {"failed": case.failed, "peer": case.peer})
    return rows


def bench(
    shape: Shape, args: argparse.Namespace, run: Row, others: list[Implementation]
) -> list[Row]:
    """Ours first, then each peer beside the floor and ours. Rows are written as they are made, so
    that a peer that hangs, or the end of the time, loses none of those before it."""
    cuda = args.device == "cuda"
    error_tokens = min(args.error_tokens or (shape[0] if cuda else 256), shape[0])
    entries = args.entries or (512 if cuda else shape[2])
    where = run | dict(zip(("tokens", "width", "vocab"), shape))
    rows: list[Row] = []

    def add(more: list[Row]) -> None:
        append(args.json, where, more)
        rows.extend(more)

    for name in args.dtypes:
        torch.compiler.reset()  # a compiled peer is compiled for one shape, not for any
        dtype = getattr(torch, name)
        sets = input_sets(shape, dtype, args.device)
        mine, checked = cases_of(sets, dtype, args.device), None
        if shape[0] < SWEEP_TOKENS:
            batch = sets[0] if error_tokens == shape[0] else sets[0].first(error_tokens)
            checked = (batch, Truth.of(batch, 256, entries))
        add(measure(mine, args.rounds, checked))
        beside = [case for case in mine if case.label in (THREE, ONE, POLICY) and not case.failed]
        for peer in others if checked else []:
            if not cuda and dtype != torch.float32 and peer.name.startswith(peers.EAGER):
                continue  # it would take minutes
            for case in beside:
                case.milliseconds.clear()
            add(measure([*beside, Case(peer, dtype, sets)], args.rounds, checked)[len(beside) :])
        del mine, beside, sets, checked
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    add_best_peer(rows)
    return rows


def bench_shapes(args: argparse.Namespace, run: Row, others: list[Implementation]) -> bool:
    """Whether ours all have figures, at every shape that there was time for."""
    began, products_a_second, good = time.monotonic(), 0.0, True
    for shape in args.shapes:
        tokens, width, vocab = shape
        size = float(tokens * width * vocab) * (0.1 if tokens >= SWEEP_TOKENS else 1)
        left = 60 * args.minutes - (time.monotonic() - began)
        print(f"\nN={tokens}, D={width}, V={vocab}", flush=True)
        if products_a_second and size / products_a_second > left:
            why = f"left out: about {size / products_a_second:.0f} s, {left:.0f} s are left"
            print(why)
            where = run | dict(zip(("tokens", "width", "vocab"), shape))
            append(args.json, where, [{"name": "shape", "failed": why}])
            continue
        start = time.monotonic()
        rows = bench(shape, args, run, others)
        print_table(rows)
        if args.device == "cuda":
            print(*cuda_bars(rows, shape, BUDGET / MIB), sep="\n")
        elif shape == CPU_SHAPE:
            print(*cpu_bars(rows), sep="\n")
        products_a_second = max(products_a_second, size / (time.monotonic() - start))
        good &= not any("failed" in row and not row["peer"] for row in rows)
    return good


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    names = [peer.name for peer in peers.PEERS]
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    add("--tokens", type=int, help="N, rows of hidden; cpu: 2048, cuda: the protocol's shapes")
    add("--width", type=int, default=1024, help="D, hidden size")
    add("--vocab", type=int, default=32768, help="V, rows of weight")
    add("--threads", type=int, default=2, help="torch threads")
    add("--rounds", type=int, default=5, help="timed rounds after the warm-up")
    add("--error_tokens", type=int, help="rows compared with float64; cpu: 256, cuda: all")
    add("--entries", type=int, help="rows of dW compared with float64; cpu: all, cuda: 512")
    add("--minutes", type=float, default=60.0, help="shapes that would take longer are left out")
    dtypes = ("float32", "bfloat16", "float16")
    default = "of hidden and weight; cpu: float32 bfloat16, cuda: bfloat16"
    add("--dtypes", nargs="+", choices=dtypes, help=default)
    add("--peers", nargs="*", choices=names, help="cpu: those of torch, cuda: all")
    add("--kernels", choices=CUDA_KERNELS, help="bupo.ops.set_cuda_kernels; unset: as it is")
    add("--json", type=Path, metavar="FILE", help="append one JSON line per implementation")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.dtypes is None:
        args.dtypes = ["bfloat16"] if cuda else ["float32", "bfloat16"]
    if not cuda and "float16" in args.dtypes:
        parser.error("--dtypes float16: on a GPU only")
    if args.peers is None:
        args.peers = names if cuda else list(CPU_PEERS)
    args.shapes = [(args.tokens or CPU_SHAPE[0], args.width, args.vocab)]
    if cuda and args.tokens is None:
        args.shapes = list(GPU_SHAPES)
    return args


def main() -> int:
    """Exit status 1 if an implementation of ours failed."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.kernels:
        ops.set_cuda_kernels(args.kernels)
    run = environment(args.device, args.threads) | ceilings(args.device, args.dtypes[0])
    others, missing = peers.load(args.peers, args.device)
    show(run)
    good = bench_shapes(args, run, others)
    absent = [{"name": name, "missing": why, "peer": True} for name, why in missing.items()]
    if args.device == "cuda":
        append(args.json, run | dict(zip(("tokens", "width", "vocab"), args.shapes[0])), absent)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
