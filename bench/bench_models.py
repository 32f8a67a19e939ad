"""Forward and backward of real models in a training step: by bupo's loss, by plain torch and by
other libraries; the full policy against an internal one; and the sweep of all internal policies.

The models have the sizes of their public configurations and random weights, gradient checkpointing
on. Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import peers
import torch
import transformers
from batch import Batch
from implementations import Gemms, Implementation, policy_loss
from measure import MIB, environment, milliseconds_of, peak_mib_of, reason
from real_models import MODELS, Training, build
from rows import Row

from bupo.internal import Text, entropy_flow
from bupo.policy import num_layers

OURS, ADAMW = "bupo", "bupo, with AdamW"
SWEEP, SWEEP_GEMMS = "entropy_flow", "bare GEMMs of entropy_flow"
PEERS = [
    peer.name
    for peer in peers.PEERS
    if peer.gives != "cross entropy" and peer.name != peers.COMPILED  # compiles longer than it runs
]
SAME = 0.05
"""Share by which the norm of a right gradient may differ from that of ours: bfloat16 everywhere"""


@dataclasses.dataclass
class Case:
    """Something to be timed, over and over."""

    name: str
    layer: int | None
    run: Callable[[], object]
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    figures: Row = dataclasses.field(default_factory=dict)
    failed: str = ""

    def row(self) -> Row:
        row: Row = {"name": self.name, "layer": self.layer}
        if self.failed:
            return row | {"failed": self.failed}
        times = torch.tensor(self.milliseconds)
        spread = {f"ms_p{q}": float(times.quantile(q / 100)) for q in (20, 80)}
        return row | {"ms": median(self.milliseconds)} | spread | self.figures


def training_cases(
    training: Training, others: list[Implementation], layers: list[int | None]
) -> list[Case]:
    mine = Implementation(OURS, policy_loss, 3)

    def case(layer: int | None, implementation: Implementation) -> Case:
        name = implementation.name.removesuffix(" fwd+bwd")
        return Case(name, layer, lambda: training.step(layer, implementation))

    return [case(layer, x) for layer in layers for x in (mine, *others)]


def measure(cases: list[Case], training: Training, rounds: int, adamw: bool = False) -> None:
    """Every case once a round; the first round is a warm-up, and there memory is measured."""
    cuda = training.device.type == "cuda"
    for turn in range(1 + rounds):
        for case in cases:
            if case.failed:
                continue
            training.clear()
            try:
                if turn:
                    case.milliseconds.append(milliseconds_of(case.run, training.device))
                else:
                    case.figures["peak_mib"] = peak_mib_of(case.run, training.device)
                    if not adamw:
                        case.figures["gradient_norm"] = training.gradient_norm()
                    if cuda:
                        case.figures["total_mib"] = torch.cuda.max_memory_allocated() / MIB
                    print(f"  {case.name}, layer {case.layer or 'L'}: runs", flush=True)
            except Exception as error:  # out of memory, or a peer that cannot do this
                case.failed = reason(error)
            if case.failed:
                print(f"  {case.name}, layer {case.layer or 'L'}: {case.failed}", flush=True)
                training.clear()
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
    training.clear()


def adamw_cases(training: Training, layers: list[int | None]) -> list[Case]:
    """A whole update: the gradients by our loss, then AdamW, whose state stays. lr = 0: the work
    of an update, and the same numbers in every round."""
    fused = training.device.type == "cuda"
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.0, fused=fused)

    def case(layer: int | None) -> Case:
        def update() -> None:
            training.step(layer, Implementation(OURS, policy_loss, 3))
            optimizer.step()

        return Case(ADAMW, layer, update)

    return [case(layer) for layer in layers]


def sweep_cases(training: Training, tokens: int) -> list[Case]:
    """Entropies of the layer, attention and FFN policies of every layer, raw and normed, and of
    what the modules read; and the products with the head that these are made of."""
    model, width = training.model, training.head.weight.shape[1]
    ids = training.ids.flatten()[: tokens + 1].tolist()
    rows = (8 * num_layers(model) + 2) * (len(ids) - 1)
    x = torch.randn(8192, width, device=training.device).to(training.head.weight.dtype)
    given = {k: v[: len(x)] for k, v in training.given.items()}
    batch = Batch(x, training.head.weight, old_logprobs=training.noise[: len(x)], **given)
    floor = Gemms(batch)

    def bare() -> None:
        for first in range(0, rows, len(x)):
            n = min(len(x), rows - first)
            torch.mm(x[:n], training.head.weight.detach().T, out=floor.z[:n])

    return [
        Case(SWEEP_GEMMS, None, bare, figures={"states": rows}),
        Case(SWEEP, None, lambda: entropy_flow(model, [Text(ids, 1)]), figures={"states": rows}),
    ]


def add_ratios(rows: list[Row]) -> None:
    """x_bupo: over ours for the same policy. x_full: over the same loss for the full policy.
    x_gemms: of the sweep. A loss with another gradient than ours says so in `failed`."""
    times = {(row["name"], row["layer"]): row["ms"] for row in rows if "ms" in row}
    norms = {
        row["layer"]: row["gradient_norm"] for row in rows if row["name"] == OURS and "ms" in row
    }
    for row in rows:
        name, layer = row["name"], row["layer"]
        if "ms" not in row:
            continue
        if name in (SWEEP, SWEEP_GEMMS):
            row["x_gemms"] = row["ms"] / times.get((SWEEP_GEMMS, None), float("nan"))
            continue
        if "gradient_norm" in row and layer in norms:
            off = row["gradient_norm"] / norms[layer] - 1
            if not abs(off) <= SAME:
                row["failed"] = f"its gradient's norm is {off:+.1%} off"
        if (OURS, layer) in times:
            row["x_bupo"] = row["ms"] / times[OURS, layer]
        if (name, None) in times:
            row["x_full"] = row["ms"] / times[name, None]


def bars(rows: list[Row]) -> list[str]:
    """Those of Qwen3-4B."""
    found = []

    def bar(what: str, value: float, limit: float) -> None:
        verdict = "met" if value <= limit else "NOT MET"
        found.append(f"{verdict:>7}: {what} = {value:.2f}, bar <= {limit:g}")

    for row in rows:
        if "ms" in row and row["layer"] and row["name"] in (OURS, ADAMW) and "x_full" in row:
            bar(f"{row['name']}: layer {row['layer']} / full step", row["x_full"], 0.45)
        if "ms" in row and row["name"] == SWEEP:
            bar("entropy_flow / its bare GEMMs", row["x_gemms"], 1.15)
    return found


def print_rows(rows: list[Row]) -> None:
    def cell(row: Row, key: str, form: str) -> str:
        return "-" if row.get(key) is None else f"{row[key]:{form}}"

    print(f"| {'':28} | layer |      ms | x bupo | x full | peak MiB | total MiB |")
    print(f"| {'-' * 28} | ----: | ------: | -----: | -----: | -------: | --------: |")
    for row in rows:
        if "ms" in row:
            cells = [f"{row['layer'] or 'all':>5}", cell(row, "ms", "7.0f")]
            cells += [f"{cell(row, key, '.2f'):>6}" for key in ("x_bupo", "x_full")]
            cells += [f"{cell(row, 'peak_mib', '.0f'):>8}", f"{cell(row, 'total_mib', '.0f'):>9}"]
            print(f"| {row['name']:28} | {' | '.join(cells)} |")
    for row in rows:
        if "failed" in row:
            print(f"not compared: {row['name']}, layer {row['layer'] or 'all'}: {row['failed']}")


def bench(name: str, args: argparse.Namespace, others: list[Implementation]) -> list[Row]:
    """All rows of one model."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build(name, args.fields, dtype, args.device)
    sequences = max(1, args.tokens // args.length)
    training = Training(model, sequences, min(args.length, args.tokens))
    layers = [None, min(args.layer, num_layers(model))]

    def groups() -> Iterator[tuple[list[Case], bool]]:
        yield training_cases(training, others, layers), False
        if name == next(iter(MODELS)):
            yield sweep_cases(training, args.sweep_tokens), True
        yield adamw_cases(training, layers), True

    rows: list[Row] = []
    for cases, no_gradient in groups():
        measure(cases, training, args.rounds, no_gradient)
        rows += [case.row() for case in cases]
    add_ratios(rows)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    add("--tokens", type=int, default=16384, help="of a step")
    add("--length", type=int, default=2048, help="of a sequence")
    add("--layer", type=int, default=6, help="the internal policy of phase 1")
    add("--sweep_tokens", type=int, default=2048, help="of the sweep of all internal policies")
    add("--rounds", type=int, default=3, help="timed rounds after the warm-up")
    add("--peers", nargs="*", default=PEERS, help="that give log-probs or the loss")
    add("--minutes", type=float, default=60.0, help="models that would take longer are left out")
    add("--fields", type=json.loads, default={}, help="JSON: over the models' configurations")
    add("--json", type=Path, metavar="FILE", help="append a line per case")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return args


def main() -> int:
    """Exit status 1 if a case of ours failed."""
    args = parse()
    run = environment(args.device, torch.get_num_threads())
    run["transformers"] = transformers.__version__
    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    found, missing = peers.load(args.peers, args.device)
    others = [x for x in found if x.products == 3 and x.loss == "policy"]
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    began, longest, good = time.monotonic(), 0.0, True
    for name in args.models:
        start = time.monotonic()
        left = 60 * args.minutes - (start - began)
        if longest > left:
            why = f"left out: about {longest:.0f} s, {left:.0f} s are left"
            rows: list[Row] = [{"name": "model", "layer": None, "failed": why}]
        else:
            print(f"\n{name}, {args.tokens} tokens", flush=True)
            rows = bench(name, args, others)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        print_rows(rows)
        if name == next(iter(MODELS)) and not args.fields:
            print("\n".join(bars(rows)))
        if args.json:
            with args.json.open("a") as out:
                where = run | {"model": name, "tokens": args.tokens, "length": args.length}
                out.writelines(json.dumps(where | row) + "\n" for row in rows)
        good &= not any("failed" in row for row in rows if row["name"] in (OURS, SWEEP))
        longest = max(longest, time.monotonic() - start)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
