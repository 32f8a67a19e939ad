"""Forward and backward of real models in a training step: by bupo's loss, by plain torch and by
other libraries; the full policy against an internal one; and the sweep of all internal policies.

The models have the sizes of their public configurations and random weights, gradient checkpointing
on. Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import peers
import torch
import transformers
from implementations import Implementation, policy_loss
from measure import MIB, Peak, environment, milliseconds_of, reason, release
from real_models import MODELS, Training, build
from rows import GRADIENT_RIGHT, Row, gradient_is_right
from torch import Tensor, nn
from truth import relative_error

from bupo.internal import Text, entropy_flow
from bupo.policy import num_layers

OURS, ADAMW = "bupo", "bupo, with AdamW"
SWEEP, SWEEP_GEMMS = "entropy_flow", "bare GEMMs of entropy_flow"
SWEEP_ROWS = 8192
"""of one bare product of the sweep"""
LONGEST = ", longest sequence"
POLICY_PEERS = [peer.name for peer in peers.PEERS if peer.gives != "cross entropy"]
DEFAULT_PEERS = [name for name in POLICY_PEERS if name != peers.COMPILED]
"""Compiling takes longer than everything else."""


@dataclasses.dataclass
class Case:
    """Something to be timed, over and over."""

    name: str
    layer: int | None
    run: Callable[[], object]
    gradients: bool = False
    """whether it leaves those of the policy loss"""
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    figures: Row = dataclasses.field(default_factory=dict)
    failed: str = ""

    def row(self) -> Row:
        row: Row = {"name": self.name, "layer": self.layer}
        if self.failed or not self.milliseconds:
            return row | {"failed": self.failed or "no time was left"}
        times = torch.tensor(self.milliseconds)
        spread = {f"ms_p{q}": float(times.quantile(q / 100)) for q in (20, 80)}
        return row | {"ms": median(self.milliseconds)} | spread | self.figures


class Group:
    """Cases that take turns, on one model."""

    def __init__(self, training: Training, cases: list[Case]) -> None:
        self.training, self.cases = training, cases
        self.cuda = training.device.type == "cuda"
        self.truth: dict[int | None, dict[str, Tensor]] = {}

    def measure(self, rounds: int, deadline: float) -> None:
        """Every case once a round; the first round is a warm-up, in which gradients are compared
        with ours, and nothing begins after the deadline."""
        for turn in range(1 + rounds):
            for case in self.cases:
                if case.failed or time.monotonic() > deadline:
                    continue
                self.training.clear()
                try:
                    self._once(case, turn)
                except Exception as error:  # out of memory, or a peer that cannot do this
                    case.failed = reason(error)
                if case.failed:
                    print(f"  {case.name}, layer {case.layer or 'L'}: {case.failed}", flush=True)
                    self.training.clear()
                    release(self.training.device)
        self.training.clear()

    def _once(self, case: Case, turn: int) -> None:
        retries = self._retries()
        with Peak(self.training.device) as peak:
            elapsed = milliseconds_of(case.run, self.training.device)
        case.figures |= {"peak_mib": peak.mib}
        if self.cuda:
            case.figures |= {"total_mib": torch.cuda.max_memory_allocated() / MIB}
        if turn:
            case.milliseconds.append(elapsed)
            case.figures["retries"] = case.figures.get("retries", 0) + self._retries() - retries
            return
        print(f"  {case.name}, layer {case.layer or 'L'}: first {elapsed / 1e3:.1f} s", flush=True)
        if case.gradients:
            self._compare(case)

    def _retries(self) -> int:
        """Of the allocator, each of which gives memory back to the driver and waits."""
        return int(torch.cuda.memory_stats()["num_alloc_retries"]) if self.cuda else 0

    def _compare(self, case: Case) -> None:
        """With ours, which goes first; where ours has failed there is nothing to trust."""
        found = self.training.gradients(case.layer)
        if case.name == OURS:
            self.truth[case.layer] = found
        truth = self.truth.get(case.layer)
        if truth is None:
            case.failed = "ours has no gradient to compare it with"
            return
        for name, gradient in found.items():
            error = relative_error(gradient, truth[name].double())
            case.figures[f"off_{name.replace(' ', '_')}"] = error
            if not error <= GRADIENT_RIGHT:
                case.failed = f"its gradient of the {name} is {error:.1%} off ours"


def training_cases(
    training: Training, others: list[Implementation], layers: list[int | None]
) -> list[Case]:
    mine = Implementation(OURS, policy_loss, 3)

    def case(layer: int | None, implementation: Implementation) -> Case:
        name = implementation.name.removesuffix(" fwd+bwd")
        return Case(name, layer, lambda: training.step(layer, implementation), gradients=True)

    return [case(layer, x) for layer in layers for x in (mine, *others)]


def adamw_case(training: Training, layer: int | None) -> Case:
    """A whole update: the gradients by our loss, then AdamW, whose state stays. lr = 0: the work
    of an update, and the same numbers in every round."""
    fused = training.device.type == "cuda"
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.0, fused=fused)

    def update() -> None:
        training.step(layer, Implementation(OURS, policy_loss, 3))
        optimizer.step()

    return Case(ADAMW, layer, update)


def sweep_cases(training: Training, tokens: int) -> list[Case]:
    """Entropies of the layer, attention and FFN policies of every layer, raw and normed, and of
    what the modules read; and the products with the head that these are made of."""
    model, weight = training.model, training.head.weight.detach()
    ids = training.ids.flatten()[: tokens + 1].tolist()
    rows = (8 * num_layers(model) + 2) * (len(ids) - 1)

    def bare() -> None:
        x = torch.randn(SWEEP_ROWS, weight.shape[1], device=weight.device).to(weight.dtype)
        logits = torch.empty(SWEEP_ROWS, len(weight), dtype=weight.dtype, device=weight.device)
        for first in range(0, rows, SWEEP_ROWS):
            n = min(SWEEP_ROWS, rows - first)
            torch.mm(x[:n], weight.T, out=logits[:n])

    return [
        Case(SWEEP_GEMMS, None, bare, figures={"states": rows}),
        Case(SWEEP, None, lambda: entropy_flow(model, [Text(ids, 1)]), figures={"states": rows}),
    ]


def longest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of step up to most that fits, found by doubling and halving; 0: none."""
    low, high = 0, step
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + step)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_rows(
    model: nn.Module, others: list[Implementation], args: argparse.Namespace, deadline: float
) -> list[Row]:
    """The longest sequence that a card of --card_gib has memory for: weights, gradients and all
    that one forward and backward of it needs, without an optimizer."""
    rows: list[Row] = []
    for implementation in (Implementation(OURS, policy_loss, 3), *others):

        def fits(length: int, run: Implementation = implementation) -> bool:
            if time.monotonic() > deadline:
                raise TimeoutError
            training = Training(model, 1, length)
            device = training.device
            try:
                with Peak(device) as peak:
                    training.step(None, run)
                if device.type == "cuda":
                    return torch.cuda.max_memory_allocated() / 2**30 <= args.card_gib
                return peak.mib / 2**10 <= args.card_gib
            except torch.OutOfMemoryError:
                return False
            finally:
                training.clear()
                release(device)

        row: Row = {"name": implementation.name.removesuffix(" fwd+bwd") + LONGEST, "layer": None}
        try:
            row |= {"sequence": longest(fits, args.longest_step, 1 << 20), "gib": args.card_gib}
        except TimeoutError:
            row["failed"] = "no time was left"
        except Exception as error:
            row["failed"] = reason(error)
        print(f"  {row['name']}: {row.get('sequence', row.get('failed'))}", flush=True)
        rows.append(row)
    return rows


def add_ratios(rows: list[Row]) -> None:
    """x_bupo: over ours for the same policy. x_full: over the same loss for the full policy.
    x_gemms: of the sweep."""
    times = {(row["name"], row["layer"]): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        name, layer = row["name"], row["layer"]
        if "ms" not in row:
            continue
        floors = {"x_bupo": (OURS, layer), "x_full": (name, None)}
        if name in (SWEEP, SWEEP_GEMMS):
            floors = {"x_gemms": (SWEEP_GEMMS, None)}
        row |= {key: row["ms"] / times[floor] for key, floor in floors.items() if floor in times}


def bars(rows: list[Row]) -> list[str]:
    """Those of Qwen3-4B."""

    def bar(name: str, internal: bool, key: str, limit: float, what: str) -> str:
        found = [
            r[key] for r in rows if r["name"] == name and bool(r["layer"]) == internal and key in r
        ]
        if not found:
            return f"NO FIGURE: {what}"
        verdict = "met" if found[0] <= limit else "NOT MET"
        return f"{verdict:>7}: {what} = {found[0]:.2f}, bar <= {limit:g}"

    return [
        bar(OURS, True, "x_full", 0.45, "phase 1 / full step"),
        bar(ADAMW, True, "x_full", 0.45, "phase 1 / full step, with AdamW"),
        bar(SWEEP, False, "x_gemms", 1.15, "entropy_flow / its bare GEMMs"),
    ]


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
        if "sequence" in row:
            print(f"{row['name']} with {row['gib']:g} GiB: {row['sequence']:,} tokens")
        if "failed" in row:
            print(f"no time: {row['name']}, layer {row['layer'] or 'all'}: {row['failed']}")


def bench(
    name: str, args: argparse.Namespace, others: list[Implementation], deadline: float
) -> Iterator[list[Row]]:
    """The rows of one model, group after group: what was measured is not lost with what follows."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build(name, args.fields, dtype, args.device)
    sequences = max(1, args.tokens // args.length)
    training = Training(model, sequences, min(args.length, args.tokens))
    internal = min(args.layer, num_layers(model))

    def groups() -> Iterator[list[Case]]:  # one is gone, with its optimizer, before the next comes
        yield training_cases(training, others, [None, internal])
        if name == next(iter(MODELS)):
            yield sweep_cases(training, args.sweep_tokens)
        yield [adamw_case(training, None)]
        yield [adamw_case(training, internal)]

    for cases in groups():
        group = Group(training, cases)
        group.measure(args.rounds, deadline)
        yield [case.row() for case in cases]
        del cases, group
        release(training.device)
    if name == next(iter(MODELS)) and args.card_gib:
        yield longest_rows(model, others, args, deadline)


def fastest_peer(file: Path) -> str:
    """Of a run of bench_lm_head.py, at its first shape: with a right gradient of the same loss."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    shape = [rows[0][k] for k in ("tokens", "width", "vocab")] if rows else []
    fit = {}
    for row in rows:
        name = row["name"].removesuffix(" fwd+bwd")
        same = [row[k] for k in ("tokens", "width", "vocab")] == shape and "ms" in row
        if same and name in DEFAULT_PEERS and row["products"] == 3 and gradient_is_right(row):
            fit[name] = row["ms"]
    return min(fit, key=lambda name: fit[name]) if fit else peers.EAGER


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
    add("--card_gib", type=float, default=78, help="for the longest sequence; 0: leave it out")
    add("--longest_step", type=int, default=4096, help="to which it is found")
    add("--rounds", type=int, default=3, help="timed rounds after the warm-up")
    add("--peers", nargs="*", default=DEFAULT_PEERS, choices=POLICY_PEERS, metavar="NAME")
    add("--fastest", type=Path, metavar="FILE", help="eager and the fastest right peer of this run")
    add("--minutes", type=float, default=60.0, help="nothing begins after them")
    add("--fields", type=json.loads, default={}, help="JSON: over the models' configurations")
    add("--json", type=Path, metavar="FILE", help="append a line per case")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return args


def main() -> int:
    """Exit status 1 if a case of ours failed."""
    args = parse()
    deadline = time.monotonic() + 60 * args.minutes
    run = environment(args.device, torch.get_num_threads())
    run["transformers"] = transformers.__version__
    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    if args.fastest:
        args.peers = list(dict.fromkeys((peers.EAGER, fastest_peer(args.fastest))))
    found, missing = peers.load(args.peers, args.device)
    others = [x for x in found if x.products == 3 and x.loss == "policy"]
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    good = True
    for name in args.models:
        print(f"\n{name}, {args.tokens} tokens", flush=True)
        where = run | {"model": name, "tokens": args.tokens, "length": args.length}
        rows: list[Row] = []
        for group in bench(name, args, others, deadline):
            rows += group
            add_ratios(rows)
            if args.json:
                with args.json.open("a") as out:
                    out.writelines(json.dumps(where | row) + "\n" for row in group)
        print_rows(rows)
        if name == next(iter(MODELS)) and not args.fields:
            print("\n".join(bars(rows)))
        good &= not any("failed" in row for row in rows if row["name"] in (OURS, SWEEP))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
