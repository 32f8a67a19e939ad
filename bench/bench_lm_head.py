"""Time, memory and error of the LM-head ops, beside bare GEMMs, plain torch and other libraries.

Every implementation runs once per round, in one process, so that a slow moment of the machine
affects all of them. How to read the table: bench/README.md.
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
    FORWARD_PORTABLE,
    LOGPROBS,
    LOGPROBS_FORWARD,
    ONE,
    POLICY,
    POLICY_PORTABLE,
    SEQUENCE_RATIO,
    SWEEP,
    SWEEP_GEMM,
    SWEEP_ROWS,
    THREE,
    Gemms,
    Implementation,
    bare_head_products,
    live_name,
    logprobs_forward,
    ours,
)
from measure import MIB, Case, ceilings, environment, errors_of, memory_of, reason, time_rounds
from rows import (
    SHAPE,
    Row,
    add_best_peer,
    aligned,
    append,
    bar,
    figure,
    is_wrong_peer,
    print_run,
    table,
)
from truth import Truth

import bupo.ops as ops
from bupo.ops.registration import CUDA_KERNELS

Shape = tuple[int, int, int]  # N, D, V
CPU_SHAPE = (2048, 1024, 32768)
SWEEP_SHAPE = (36 * 3 * 2048, 4096, 151936)  # 36 layers x 3 policies x 2048 tokens, forward only
GPU_SHAPES = (
    (8192, 4096, 151936),
    (8192, 2560, 151936),
    (8192, 4096, 128256),
    (32768, 4096, 151936),
    SWEEP_SHAPE,
    (32768, 2560, 151936),
    (32768, 4096, 128256),
)
"""The most important first: those for which --minutes leaves no time are dropped from the end."""
CPU_PEERS = (peers.EAGER, peers.CROSS_ENTROPY)
BUDGET = 4 << 30  # the workspace that bupo.ops takes by default on a GPU with 16 GiB free
SWEEP_TOKENS = 100_000  # A shape with this many tokens or more is a sweep


def input_sets(shape: Shape, dtype: torch.dtype, device: str) -> list[Batch]:
    """One on the CPU; on a GPU two to eight, together at least four times its L2 cache."""
    count = 1
    if device == "cuda" and shape[0] < SWEEP_TOKENS:
        one_set = (shape[0] + shape[2]) * shape[1] * dtype.itemsize
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        count = min(8, max(2, -(-4 * l2 // one_set)))
    return [Batch.make(*shape, dtype, device, seed) for seed in range(count)]


def cases_of(sets: list[Batch], dtype: torch.dtype, device: str) -> list[Case]:
    """The floor first, then ours."""
    tokens = len(sets[0].hidden)
    if tokens >= SWEEP_TOKENS:
        weight = sets[0].weight.detach()
        bare = Implementation(
            SWEEP_GEMM, lambda _: bare_head_products(weight, tokens, SWEEP_ROWS), 1
        )
        sweep = Implementation(SWEEP, logprobs_forward, 1)
        return [Case(bare, dtype, sets), Case(sweep, dtype, sets)]
    floor = Gemms(sets[0])
    found = [Case(Implementation(THREE, floor.three, 3), dtype, sets)]
    if device == "cuda":
        found.append(Case(Implementation(ONE, floor.one, 1), dtype, sets))
    for implementation in ours(cuda=device == "cuda"):
        share = implementation.live
        batches = sets if share == 1 else [batch.live(share) for batch in sets]
        found.append(Case(implementation, dtype, batches))
    return found


def row_of(case: Case, reference: dict[str, float]) -> Row:
    """The times of one case; reference: median milliseconds by name, of the same dtype. Bytes count
    every input read once and every output written once: the fewest that could be moved."""
    tokens, width, vocab = case.batches[0].shape
    products = case.implementation.products
    flop = 2 * products * tokens * vocab * width
    matrices = case.dtype.itemsize * (tokens + vocab) * width
    moved = matrices + 8 * tokens + 3 * 4 * tokens
    if products == 3:
        moved += matrices + 3 * 4 * tokens
    times = case.times()
    ms = times["ms"]
    row = {
        "name": case.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        **times,
        "gflops": 1e-6 * flop / ms,
        "gb_s": 1e-6 * moved / ms,
        "products": products,
        "live": case.implementation.live,
        "peer": case.peer,
    }
    floors = {"x_one_gemm": ONE, "x_three_gemms": THREE, "x_ours": POLICY}
    if SWEEP_GEMM in reference:
        floors = {"x_one_gemm": SWEEP_GEMM}
    return row | {key: ms / reference[name] for key, name in floors.items() if name in reference}


def measure(found: list[Case], rounds: int, checked: tuple[Batch, Truth] | None) -> list[Row]:
    """Returns one row of the table per case, with errors on the batch whose truth is known."""
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


# ---- the table ---------------------------------------------------------------------------------


COLUMNS = {
    "GFLOP/s": ("gflops", ".0f"),
    "GB/s": ("gb_s", ".0f"),
    "x one bare GEMM": ("x_one_gemm", ".2f"),
    "x three bare GEMMs": ("x_three_gemms", ".2f"),
    "x ours": ("x_ours", ".2f"),
    "x best peer": ("x_best_peer", ".2f"),
    "peak MiB": ("peak_mib", ".0f"),
    "max error logp": ("error_logprobs", ".1e"),
    "max error H": ("error_entropy", ".1e"),
    "rel error dX": ("error_d_hidden", ".1e"),
    "rel error dW": ("error_d_weight", ".1e"),
}
"""By title: a figure of a row, and its format"""


def print_table(rows: list[Row]) -> None:
    cells = []
    for row in rows:
        if "failed" in row:
            print(f"no time: {row['name']}, {row['dtype']}: {row['failed']}")
            continue
        name = f"{row['name']}, {row['dtype']}" + " GRADIENT WRONG" * is_wrong_peer(row)
        median = f"{row['ms']:.2f} ({row['ms_p20']:.2f}-{row['ms_p80']:.2f})"
        figures = [figure(row, key, form, missing="-") for key, form in COLUMNS.values()]
        cells.append([name, median, *figures])
    print(aligned(table(("implementation", "ms (p20-p80)", *COLUMNS), cells)))


# ---- bars --------------------------------------------------------------------------------------


def cpu_bars(rows: list[Row]) -> list[str]:
    """A line for each bar both of whose figures are there."""
    ms = {(row["name"], row["dtype"]): row["ms"] for row in rows if "ms" in row}
    quarter, token = live_name(0.25), (POLICY, "float32")
    bars = [
        ("policy_loss float32 / three bare GEMMs", (POLICY, "float32"), (THREE, "float32"), 1.25),
        ("policy_loss bfloat16 / float32", (POLICY, "bfloat16"), (POLICY, "float32"), 1.0),
        ("policy_loss float32 / eager", (POLICY, "float32"), ("eager fwd+bwd", "float32"), 1 / 1.4),
        ("float32 live 0.25 / live 1", (quarter, "float32"), (POLICY, "float32"), 0.6),
        ("float32 sequence ratio / token ratio", (SEQUENCE_RATIO, "float32"), token, 1.15),
        ("bfloat16 live 0.25 / live 1", (quarter, "bfloat16"), (POLICY, "bfloat16"), 0.6),
    ]
    return [
        bar(title, ms[ours] / ms[other], limit)
        for title, ours, other, limit in bars
        if ours in ms and other in ms
    ]


def cuda_bars(rows: list[Row], shape: tuple[int, int, int], budget_mib: float) -> list[str]:
    """The bars of one shape, a line each. A peer is compared with only if its gradient is right."""
    named = {row["name"]: row for row in rows if "ms" in row}

    def of(title: str, name: str, key: str, limit: float, form: str = ".2f") -> str:
        return bar(title, named.get(name, {}).get(key), limit, form)

    if SWEEP in named:
        return [of("layer sweep / one bare GEMM", SWEEP, "x_one_gemm", 1.10)]
    _, width, vocab = shape
    three = 1.05 if width >= 4096 else 1.08
    lines = [
        of("lm_head_logprobs fwd / one bare GEMM", LOGPROBS_FORWARD, "x_one_gemm", 1.03),
        of("policy_loss / three bare GEMMs", POLICY, "x_three_gemms", three),
        of("lm_head_logprobs / three bare GEMMs", LOGPROBS, "x_three_gemms", 1.08),
    ]
    if POLICY_PORTABLE in named:  # on Hopper; elsewhere the bars above are missed by design
        lines += [
            of("lm_head_logprobs fwd, portable / one GEMM", FORWARD_PORTABLE, "x_one_gemm", 1.35),
            of("policy_loss, portable / three GEMMs", POLICY_PORTABLE, "x_three_gemms", 1.25),
        ]
    best = named.get(POLICY, {}).get("best_peer", "no peer is right")
    # One chunk may take the budget and the place of an fp32 dW (bupo.ops.set_workspace_bytes).
    policy_mib, forward_mib = budget_mib + 4 * width * vocab / MIB + 64, budget_mib + 64
    lines += [
        of("policy_loss live 0.25 / live 1", live_name(0.25), "x_ours", 0.55),
        of(f"policy_loss / fastest right peer ({best})", POLICY, "x_best_peer", 1 / 1.25),
        of(f"extra MiB of {POLICY}", POLICY, "extra_mib", policy_mib, ".0f"),
        of(f"extra MiB of {LOGPROBS_FORWARD}", LOGPROBS_FORWARD, "extra_mib", forward_mib, ".0f"),
    ]
    for name in (POLICY, live_name(0.25)):
        lines.append(of(f"relative error of dX, {name}", name, "error_d_hidden", 3e-3, ".1e"))
        lines.append(of(f"relative error of dW, {name}", name, "error_d_weight", 3e-3, ".1e"))
    return lines


# ---- the program ------------------------------------------------------------------------------


def bench(
    shape: Shape, args: argparse.Namespace, run: Row, others: list[Implementation]
) -> list[Row]:
    """Measures ours first, then each peer beside the floor and ours. Rows are written as they are
    made, so that none is lost if a later peer hangs or the time ends."""
    cuda = args.device == "cuda"
    error_tokens = min(args.error_tokens or (shape[0] if cuda else 256), shape[0])
    entries = args.entries or (512 if cuda else shape[2])
    where = run | dict(zip(SHAPE, shape))
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
                continue  # this would take minutes
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
    """Returns whether all of ours have figures, at every shape that there was time for."""
    began, products_a_second, good = time.monotonic(), 0.0, True
    for shape in args.shapes:
        tokens, width, vocab = shape
        size = float(tokens * width * vocab) * (0.1 if tokens >= SWEEP_TOKENS else 1)
        left = 60 * args.minutes - (time.monotonic() - began)
        print(f"\nN={tokens}, D={width}, V={vocab}", flush=True)
        if products_a_second and size / products_a_second > left:
            why = f"left out: about {size / products_a_second:.0f} s, {left:.0f} s are left"
            print(why)
            where = run | dict(zip(SHAPE, shape))
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
    print_run(run)
    good = bench_shapes(args, run, others)
    absent = [{"name": name, "missing": why, "peer": True} for name, why in missing.items()]
    if args.device == "cuda":
        append(args.json, run | dict(zip(SHAPE, args.shapes[0])), absent)
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
