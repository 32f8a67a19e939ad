"""Time and memory of lm_head_divergence, beside four bare GEMMs, plain torch and Liger's fused JSD.

The teacher is another hidden state of each token, under the same head, without a gradient. Values
and gradients are compared with float64 on the first tokens.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from batch import Batch
from implementations import Gemms, Implementation, Outputs
from measure import Case, environment, memory_of, reason, time_rounds
from rows import Row, aligned, append, bar, print_run
from tables import divergence_table
from truth import relative_error

import bupo.ops as ops
from bupo.ops.divergence import KINDS

Run = Callable[[Batch, str], torch.Tensor]
"""Maps a batch and a kind to divergences, and leaves gradients"""
FOUR, EAGER, LIGER = "four bare GEMMs", "eager", "liger fused linear JSD"


def teacher_of(batch: Batch) -> torch.Tensor:
    return batch.hidden.detach().roll(1, 0)


def ours(batch: Batch, kind: str) -> torch.Tensor:
    head = batch.weight.detach()
    teacher = teacher_of(batch)
    found = ops.lm_head_divergence(
        batch.hidden, batch.weight, teacher, head, batch.token_weights, kind=kind
    )
    found.loss.backward()
    return found.divergence


def eager(batch: Batch, kind: str) -> torch.Tensor:
    """What a trainer writes; the loss is weighted as ours is. In float64 it is the truth."""
    dtype = torch.promote_types(batch.hidden.dtype, torch.float32)
    q = F.linear(batch.hidden, batch.weight).to(dtype).log_softmax(-1)
    with torch.no_grad():
        p = F.linear(teacher_of(batch), batch.weight).to(dtype).log_softmax(-1)
    if kind == "jsd":
        m = torch.logsumexp(torch.stack([p, q]), 0) - math.log(2)
        parts = [F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (p, q)]
        divergence = (parts[0] + parts[1]) / 2
    else:
        pair = (q, p) if kind == "forward_kl" else (p, q)
        divergence = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    (batch.token_weights * divergence).sum().backward()
    return divergence.detach()


def liger(batch: Batch, kind: str) -> torch.Tensor:
    """Liger weights all tokens alike, as these batches do."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # type: ignore[import-not-found]

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
    head = batch.weight.detach()
    loss = LigerFusedLinearJSD(beta)(batch.hidden, batch.weight, teacher_of(batch), head)
    loss.backward()
    return loss.detach()[None]


def cases_of(batch: Batch, dtype: torch.dtype, with_eager: bool) -> list[Case]:
    floor = Gemms(batch)

    def four(batch: Batch) -> Outputs:
        floor.one(batch)
        return floor.three(batch)

    def case(name: str, run: Run, kind: str, peer: bool) -> Case:
        def once(batch: Batch) -> Outputs:
            return {"divergence": run(batch, kind)}

        return Case(Implementation(f"{name}, {kind}", once, 4, peer=peer), dtype, [batch])

    found = [Case(Implementation(FOUR, four, 4), dtype, [batch])]
    found += [case("lm_head_divergence", ours, kind, False) for kind in KINDS]
    peers = {EAGER: eager} if with_eager else {}
    if batch.hidden.is_cuda:
        peers[LIGER] = liger
    return found + [case(name, run, kind, True) for name, run in peers.items() for kind in KINDS]


def errors_of(case: Case, batch: Batch, kind: str) -> Row:
    """Relative errors (Frobenius) of dX and dW, and the largest of a token's divergence."""
    exact = batch.of_double()
    truth = eager(exact, kind)
    batch.clear_gradients()
    got = case.implementation.run(batch)["divergence"]
    found = {
        "error_d_hidden": relative_error(batch.hidden.grad, exact.hidden.grad),
        "error_d_weight": relative_error(batch.weight.grad, exact.weight.grad),
    }
    batch.clear_gradients()
    if got.shape == truth.shape:
        found["error_divergence"] = float(
            ((got.double() - truth) / truth.abs().clamp(1e-6)).abs().max()
        )
    return found


def measure(batch: Batch, dtype: torch.dtype, args: argparse.Namespace) -> list[Row]:
    cases = cases_of(batch, dtype, args.device == "cuda" or dtype == torch.float32)
    memory: dict[str, Row] = {}
    for case in cases:  # before time_rounds(), which leaves memory with the process
        try:
            memory[case.label] = memory_of(case)
        except Exception as error:
            case.failed = reason(error)
            case.release()
    time_rounds(cases, args.rounds, warm_up=2 if args.device == "cuda" else 1)
    floor = cases[0].times()["ms"]
    few = batch.first(args.error_tokens)
    rows = []
    for case in cases:
        row: Row = {
            "name": case.label,
            "dtype": str(dtype).removeprefix("torch."),
            "peer": case.peer,
        }
        if not case.failed:
            try:
                row |= case.times() | memory[case.label]
                row["x_four_gemms"] = row["ms"] / floor
                if case.label != FOUR:
                    row |= errors_of(case, few, case.label.rpartition(" ")[2])
            except Exception as error:
                case.failed = reason(error)
        rows.append(row | ({"failed": case.failed} if case.failed else {}))
    return rows


def bars(rows: list[Row]) -> list[str]:
    named = {row["name"]: row for row in rows if "ms" in row}
    lines = []
    for kind in KINDS:
        mine, plain = (named.get(f"{x}, {kind}", {}) for x in ("lm_head_divergence", EAGER))
        lines.append(bar(f"{kind} / four bare GEMMs", mine.get("x_four_gemms"), 1.25))
        if plain:
            lines.append(bar(f"{kind} / eager", mine["ms"] / plain["ms"], 1 / 1.5))
            lines.append(bar(f"{kind} memory / eager", mine["peak_mib"] / plain["peak_mib"], 1 / 8))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=2048, help="N")
    parser.add_argument("--width", type=int, default=1024, help="D, of both sides")
    parser.add_argument("--vocab", type=int, default=32768, help="V")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after the warm-up")
    parser.add_argument("--error_tokens", type=int, default=64, help="compared with float64")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="of hidden and weight")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = environment(args.device, args.threads) | {
        "tokens": args.tokens,
        "width": args.width,
        "vocab": args.vocab,
    }
    print_run(run)
    for name in args.dtypes:
        dtype = getattr(torch, name)
        batch = Batch.make(args.tokens, args.width, args.vocab, dtype, args.device)
        rows = measure(batch, dtype, args)
        append(args.json, run, rows)
        print(aligned(divergence_table([run | row for row in rows if "ms" in row])))
        print(*(f"{row['name']}: {row['failed']}" for row in rows if "failed" in row), sep="\n")
        print(*bars(rows), sep="\n")


if __name__ == "__main__":
    main()
