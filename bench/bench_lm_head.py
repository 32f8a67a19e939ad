"""Time, memory and error of the LM-head ops, beside bare GEMMs, plain torch and other libraries.

Every implementation runs once per round, in one process, so that a slow moment of the machine
falls on all of them. How to read the table: bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

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
    on_the_other_path,
    ours,
)
from measure import (
    MIB,
    Case,
    ceilings,
    environment,
    errors_of,
    memory_of,
    reason,
    time_rounds,
)
from report import cuda_bars, print_cpu_bars, print_table, row_of
from rows import Row, add_best_peer
from truth import Truth

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

CPU_SHAPE = (2048, 1024, 32768)
# Of a GPU, the most important first: what does not fit into --minutes is left out from the end.
# The last is the layer sweep, 36 layers x 3 policies x 2048 tokens, forward only.
SWEEP_SHAPE = (36 * 3 * 2048, 4096, 151936)
GPU_SHAPES = (
    (8192, 4096, 151936),
    (8192, 2560, 151936),
    (8192, 4096, 128256),
    (32768, 4096, 151936),
    SWEEP_SHAPE,
    (32768, 2560, 151936),
    (32768, 4096, 128256),
)
BUDGET = 4 << 30
"""what bupo.ops takes by default on a GPU with 16 GiB free"""
SWEEP_TOKENS = 100_000
"""from so many tokens on, a shape is a sweep"""

Shape = tuple[int, int, int]


def input_sets(shape: Shape, dtype: torch.dtype, device: str) -> list[Batch]:
    """One on the CPU. On a GPU at least two, and four times its L2 in all, 8 at most."""
    count = 1
    if device == "cuda" and shape[0] < SWEEP_TOKENS:
        one_set = (shape[0] + shape[2]) * shape[1] * dtype.itemsize
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(8, max(2, -(-4 * l2 // one_set)))
    return [Batch.make(*shape, dtype, device, seed) for seed in range(count)]


def cases(sets: list[Batch], dtype: torch.dtype, device: str) -> list[Case]:
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
    mine = ours((1.0, 0.5, 0.25) if device == "cuda" else (1.0, 0.25))
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        mine += on_the_other_path()
    for implementation in mine:
        batches = sets
        if implementation.live != 1:
            batches = [batch.live(implementation.live) for batch in sets]
        found.append(Case(implementation, dtype, batches))
    return found


def fits(peer: Implementation, dtype: torch.dtype, device: str) -> bool:
    """Plain torch in bfloat16 takes minutes on a CPU."""
    return device == "cuda" or dtype == torch.float32 or not peer.name.startswith(peers.EAGER)


def measure(found: list[Case], rounds: int, checked: tuple[Batch, Truth] | None) -> list[Row]:
    """One row of the table per case; errors on the batch whose truth is known."""
    cuda = found[0].device.type == "cuda"
    time_rounds(found, rounds, warm_up=2 if cuda else 1)
    timed = {c.name: c.quantile(0.5) for c in found if not c.failed}
    rows = []
    for case in found:
        row: Row = {"name": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
        if not case.failed:
            row = row_of(case, timed)
            try:
                row |= memory_of(case)
                outside = peers.RESERVED.get(
                    case.name.removesuffix(" fwd+bwd").removesuffix(" fwd")
                )
                if outside:
                    row |= {k: row[k] + outside for k in ("peak_mib", "extra_mib")}
                if checked and case.name not in (ONE, THREE):
                    row |= errors_of(case, *checked)
            except Exception as error:
                case.failed = reason(error)
        if case.failed:
            case.release()
            row = {"name": case.name, "dtype": row["dtype"], "failed": case.failed}
            row["peer"] = case.implementation.peer
        rows.append(row)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    add("--tokens", type=int, help="N, rows of hidden; cpu: 2048, cuda: the protocol's shapes")
    add("--width", type=int, default=1024, help="D, hidden size")
    add("--vocab", type=int, default=32768, help="V, rows of weight")
    add("--threads", type=int, default=2, help="torch threads")
    add("--rounds", type=int, default=5, help="timed rounds after the warm-up")
    add("--error_tokens", type=int, help="rows compared with float64; cpu: 256, cuda: all")
    add("--entries", type=int, help="rows of dW compared with float64; cpu: all, cuda: 512")
    add("--minutes", type=float, default=60.0, help="shapes that would take longer are left out")
    add(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="dtypes of hidden and weight; cpu: float32 bfloat16, cuda: bfloat16",
    )
    add(
        "--peers",
        nargs="*",
        choices=[peer.name for peer in peers.PEERS],
        help="cpu: those of torch, cuda: all",
    )
    add("--kernels", choices=CUDA_KERNELS, help="bupo.ops.set_cuda_kernels; as it is set already")
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
        args.peers = [p.name for p in peers.PEERS if cuda or p.name in CPU_PEERS]
    args.shapes = [(args.tokens or CPU_SHAPE[0], args.width, args.vocab)]
    if cuda and args.tokens is None:
        args.shapes = list(GPU_SHAPES)
    return args


CPU_PEERS = (peers.EAGER, peers.CROSS_ENTROPY)


@dataclasses.dataclass
class Session:
    """One run of the program: what it was asked for, where, and its JSON lines."""

    args: argparse.Namespace
    run: dict[str, Any]
    others: list[Implementation]
    missing: dict[str, str]

    def write(self, shape: Shape, rows: list[Row]) -> None:
        file = self.args.json
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            where = self.run | dict(zip(("tokens", "width", "vocab"), shape))
            with file.open("a") as out:
                out.writelines(json.dumps(where | row) + "\n" for row in rows)

    def bench(self, shape: Shape) -> list[Row]:
        """Ours first, then each peer beside the floor and ours; rows are written as they are made,
        so that a peer that hangs, or the end of the time, loses none that was there."""
        args = self.args
        everything = args.device == "cuda"
        error_tokens = min(args.error_tokens or (shape[0] if everything else 256), shape[0])
        entries = args.entries or (512 if everything else shape[2])
        rows: list[Row] = []

        def add(more: list[Row]) -> None:
            self.write(shape, more)
            rows.extend(more)

        for name in args.dtypes:
            torch.compiler.reset()  # a compiled peer is compiled for one shape, not for any
            dtype = getattr(torch, name)
            sets = input_sets(shape, dtype, args.device)
            mine, checked = cases(sets, dtype, args.device), None
            if shape[0] < SWEEP_TOKENS:
                batch = sets[0] if error_tokens == shape[0] else sets[0].first(error_tokens)
                checked = (batch, Truth.of(batch, 256, entries))
            add(measure(mine, args.rounds, checked))
            beside = [
                case for case in mine if case.name in (THREE, ONE, POLICY) and not case.failed
            ]
            for peer in self.others if checked else []:
                if fits(peer, dtype, args.device):
                    for case in beside:
                        case.milliseconds.clear()
                    found = [*beside, Case(peer, dtype, sets)]
                    add(measure(found, args.rounds, checked)[len(beside) :])
            del mine, beside, sets, checked
            gc.collect()
            if everything:
                torch.cuda.empty_cache()
        add_best_peer(rows)
        return rows

    def all_shapes(self) -> bool:
        """Whether ours all have figures, at every shape that there was time for."""
        began, flops_a_second, good = time.monotonic(), 0.0, True
        for shape in self.args.shapes:
            tokens, width, vocab = shape
            size = float(tokens * width * vocab) * (0.1 if tokens >= SWEEP_TOKENS else 1)
            left = 60 * self.args.minutes - (time.monotonic() - began)
            if flops_a_second and size / flops_a_second > left:
                why = f"left out: about {size / flops_a_second:.0f} s, {left:.0f} s are left"
                print(f"\nN={tokens}, D={width}, V={vocab}: {why}")
                self.write(shape, [{"name": "shape", "failed": why}])
                continue
            start = time.monotonic()
            if self.args.device == "cuda":
                print(f"\nN={tokens}, D={width}, V={vocab}", flush=True)
            rows = self.bench(shape)
            print_table(rows, self.args.device)
            if self.args.device == "cpu" and shape == CPU_SHAPE:
                print_cpu_bars(rows)
            elif self.args.device == "cuda":
                print(*cuda_bars(rows, shape, BUDGET / MIB), sep="\n")
            flops_a_second = max(flops_a_second, size / (time.monotonic() - start))
            good &= not any("failed" in r and not r.get("peer") for r in rows)
        absent = [{"name": n, "missing": why, "peer": True} for n, why in self.missing.items()]
        if self.args.device == "cuda":
            self.write(self.args.shapes[0], absent)
        for row in absent:
            print(f"missing: {row['name']}: {row['missing']}")
        return good


def main() -> int:
    """Exit status 1 if an implementation of ours failed."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.kernels:
        ops.set_cuda_kernels(args.kernels)
    run = environment(args.device, args.threads) | ceilings(args.device, args.dtypes[0])
    others, missing = peers.load(args.peers, args.device)
    shown = run
    if args.device == "cpu":
        shown = run | dict(zip(("tokens", "width", "vocab"), args.shapes[0]))
    print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    return int(not Session(args, run, others, missing).all_shapes())


if __name__ == "__main__":
    sys.exit(main())
