"""Forward and backward of real models in a training step: by bupo's loss, by plain torch and by
other libraries; the full policy against an internal one; and the sweep of all internal policies.

The models have the sizes of their public configurations, random weights and gradient checkpointing.
Protocol: bench/README.md.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peers
import torch
import transformers
from implementations import (
    SWEEP_ROWS,
    Implementation,
    bare_head_products,
    entropy_flow_rows,
    policy_loss,
)
from measure import MIB, Peak, Timed, environment, milliseconds_of, reason, release, time_rounds
from real_models import MODELS, Training, build
from rows import (
    GRADIENT_RIGHT,
    Row,
    aligned,
    append,
    bar,
    gradient_is_right,
    print_run,
    read,
    shape_of,
)
from tables import models_table
from torch import Tensor, nn
from truth import relative_error

from bupo.internal import Sample, entropy_flow
from bupo.policy import num_layers

OURS, ADAMW = "bupo", "bupo, with AdamW"
SWEEP, SWEEP_GEMMS = "entropy_flow", "bare GEMMs of entropy_flow"
NO_TIME = "no time was left"
POLICY_PEERS = [peer.name for peer in peers.PEERS if peer.gives != "cross entropy"]
DEFAULT_PEERS = [name for name in POLICY_PEERS if name != peers.COMPILED]
"""Compiling takes longer than everything else."""


class ModelCase(Timed):
    """Something that a model does again and again. If it leaves the gradient of the policy loss,
    this is compared with `truth`, which the first case of a layer, ours, fills."""

    def __init__(
        self,
        training: Training,
        name: str,
        layer: int | None,
        run: Callable[[], object],
        truth: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(f"{name}, layer {layer or 'all'}", training.device)
        self.training, self.name, self.layer, self.run = training, name, layer, run
        self.truth = truth
        self.figures: Row = {}

    def run_once(self, turn: int) -> float:
        self.training.clear()
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_stats()["num_alloc_retries"] if cuda else 0
        with Peak(self.device) as peak:
            elapsed = milliseconds_of(self.run, self.device)
        self.figures["peak_mib"] = peak.mib
        if cuda:
            retries = torch.cuda.memory_stats()["num_alloc_retries"] - before
            self.figures["total_mib"] = torch.cuda.max_memory_allocated() / MIB
            self.figures["retries"] = self.figures.get("retries", 0) + retries * (turn > 0)
        if turn == 0 and self.truth is not None:
            self._compare(self.truth)
        self.training.clear()
        return elapsed

    def _compare(self, truth: dict[str, Tensor]) -> None:
        found = self.training.gradients(self.layer)
        if self.name == OURS:
            truth |= found
        if not truth:
            self.failed = "ours has no gradient to compare it with"
        for name, exact in truth.items():
            error = relative_error(found[name], exact.double())
            self.figures[f"off_{name.replace(' ', '_')}"] = error
            if not error <= GRADIENT_RIGHT:
                self.failed = f"its gradient of the {name} is {error:.1%} off ours"

    def release(self) -> None:
        self.training.clear()
        super().release()

    def row(self) -> Row:
        row: Row = {"name": self.name, "layer": self.layer}
        if self.failed or not self.milliseconds:
            return row | {"failed": self.failed or NO_TIME}
        return row | self.times() | self.figures


def ours() -> Implementation:
    return Implementation(OURS, policy_loss, 3)


def loss_cases(
    training: Training, others: Sequence[Implementation], layers: Sequence[int | None]
) -> list[ModelCase]:
    cases = []
    for layer in layers:
        truth: dict[str, Tensor] = {}
        for loss in (ours(), *others):
            run = functools.partial(training.step, layer, loss)
            cases.append(ModelCase(training, loss.short_name, layer, run, truth))
    return cases


def adamw_case(training: Training, layer: int | None) -> ModelCase:
    """A whole update: the gradients by our loss, then AdamW, whose state stays. A learning rate of
    0 takes the work of an update and keeps the numbers the same in every round."""
    fused = training.device.type == "cuda"
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.0, fused=fused)

    def update() -> None:
        training.step(layer, ours())
        optimizer.step()

    return ModelCase(training, ADAMW, layer, update)


def sweep_cases(training: Training, tokens: int) -> list[ModelCase]:
    """Entropies of the layer, attention and FFN policies of every layer, raw and with the final
    norm, and of what the modules read; and the products with the head that these are made of."""
    model, weight = training.model, training.head.weight.detach()
    ids = training.ids.flatten()[: tokens + 1].tolist()
    rows = entropy_flow_rows(num_layers(model), len(ids) - 1)
    runs: dict[str, Callable[[], object]] = {
        SWEEP_GEMMS: lambda: bare_head_products(weight, rows, SWEEP_ROWS),
        SWEEP: lambda: entropy_flow(model, [Sample.of(ids[:1], ids[1:])]),
    }
    return [ModelCase(training, name, None, run) for name, run in runs.items()]


def longest_that_fits(fits: Callable[[int], bool], step: int, most: int) -> int:
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
    for implementation in (ours(), *others):

        def fits(length: int, run: Implementation = implementation) -> bool:
            if time.monotonic() > deadline:
                raise TimeoutError(NO_TIME)
            training = Training(model, 1, length)
            cuda = training.device.type == "cuda"
            try:
                with Peak(training.device) as peak:
                    training.step(None, run)
                most = torch.cuda.max_memory_allocated() / MIB if cuda else peak.mib
                return most / 2**10 <= args.card_gib
            except torch.OutOfMemoryError:
                return False
            finally:
                training.clear()
                release(training.device)

        row: Row = {"name": f"{implementation.short_name}, longest sequence", "layer": None}
        try:
            row |= {
                "sequence": longest_that_fits(fits, args.longest_step, 1 << 20),
                "gib": args.card_gib,
            }
        except Exception as error:
            row["failed"] = reason(error)
        print(f"  {row['name']}: {row.get('sequence', row.get('failed'))}", flush=True)
        rows.append(row)
    return rows


def add_ratios(rows: list[Row]) -> None:
    """x_bupo is over ours for the same policy, x_full over the same loss for the full policy, and
    x_gemms is the sweep over its bare products."""
    times = {(row["name"], row["layer"]): row["ms"] for row in rows if "ms" in row}
    for row in rows:
        floors = {"x_bupo": (OURS, row["layer"]), "x_full": (row["name"], None)}
        if row["name"] in (SWEEP, SWEEP_GEMMS):
            floors = {"x_gemms": (SWEEP_GEMMS, None)}
        if "ms" in row:
            known = {key: times[floor] for key, floor in floors.items() if floor in times}
            row |= {key: row["ms"] / floor for key, floor in known.items()}


def bars(rows: list[Row]) -> list[str]:
    """The bars that hold for Qwen3-4B."""
    internal = {row["name"]: row for row in rows if row["layer"]}
    sweep = {row["name"]: row for row in rows if row["name"] == SWEEP}
    return [
        bar(title, found.get(name, {}).get(key), limit)
        for title, found, name, key, limit in (
            ("phase 1 / full step", internal, OURS, "x_full", 0.45),
            ("phase 1 / full step, with AdamW", internal, ADAMW, "x_full", 0.45),
            ("entropy_flow / its bare GEMMs", sweep, SWEEP, "x_gemms", 1.15),
        )
    ]


def bench(
    name: str, args: argparse.Namespace, others: list[Implementation], deadline: float
) -> Iterator[list[Row]]:
    """Yields the rows of one model in groups, so that a failure does not lose earlier ones."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build(name, args.fields, dtype, args.device)
    sequences = max(1, args.tokens // args.length)
    training = Training(model, sequences, min(args.length, args.tokens))
    internal = min(args.layer, num_layers(model))

    def groups() -> Iterator[list[ModelCase]]:  # each is gone, optimizer and all, before the next
        yield loss_cases(training, others, [None, internal])
        if name == next(iter(MODELS)):
            yield sweep_cases(training, args.sweep_tokens)
        yield [adamw_case(training, None)]
        yield [adamw_case(training, internal)]

    for cases in groups():
        time_rounds(cases, args.rounds, deadline=deadline)
        yield [case.row() for case in cases]
        del cases
        release(training.device)
    if name == next(iter(MODELS)) and args.card_gib:
        yield longest_rows(model, others, args, deadline)


def fastest_peer(file: Path) -> str:
    """The fastest peer with a right gradient of the same loss, at the first shape of a run of
    bench_lm_head.py."""
    rows = read(file)
    times = {}
    for row in rows:
        name = row["name"].removesuffix(" fwd+bwd")
        fit = name in DEFAULT_PEERS and "ms" in row and row["products"] == 3
        if fit and shape_of(row) == shape_of(rows[0]) and gradient_is_right(row):
            times[name] = row["ms"]
    return min(times, key=lambda name: times[name]) if times else peers.EAGER


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=["cpu", "cuda"], help="where to run")
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    add("--tokens", type=int, default=16384, help="tokens of a step")
    add("--length", type=int, default=2048, help="tokens of a sequence")
    add("--layer", type=int, default=6, help="the internal policy of phase 1")
    add("--sweep_tokens", type=int, default=2048, help="of the sweep of all internal policies")
    add("--card_gib", type=float, default=78, help="for the longest sequence; 0: leave it out")
    add("--longest_step", type=int, default=4096, help="to which the longest sequence is found")
    add("--rounds", type=int, default=3, help="timed rounds after the warm-up")
    add("--peers", nargs="*", default=DEFAULT_PEERS, choices=POLICY_PEERS, metavar="NAME")
    add("--fastest", type=Path, metavar="FILE", help="eager and the fastest right peer of this run")
    add("--minutes", type=float, default=60.0, help="after this time nothing begins")
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
    print_run(run)
    if args.fastest:
        args.peers = list(dict.fromkeys((peers.EAGER, fastest_peer(args.fastest))))
    found, missing = peers.load(args.peers, args.device)
    others = [each for each in found if each.products == 3]
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
            append(args.json, where, group)
        print(aligned(models_table([where | row for row in rows])))
        if name == next(iter(MODELS)) and not args.fields:
            print("\n".join(bars(rows)))
        good &= not any("failed" in row for row in rows if row["name"] in (OURS, SWEEP))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
