"""Time, memory and error of the LM-head ops on the CPU, beside bare GEMMs and plain torch.

Every implementation runs once per round, in one process, so that a slow moment of the machine
falls on all of them. How to read the table: bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bupo.ops as ops

NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}
THREE = "three bare GEMMs"
POLICY, POLICY_QUARTER = "policy_loss fwd+bwd", "policy_loss fwd+bwd, live 0.25"
LOGPROBS, LOGPROBS_FORWARD = "lm_head_logprobs fwd+bwd", "lm_head_logprobs fwd"
EAGER, CROSS_ENTROPY = "eager fwd+bwd", "F.linear_cross_entropy fwd+bwd"


@dataclasses.dataclass
class Batch:
    """Inputs with realistic logits: standard deviation 4, two thirds of the targets confident."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor

    @staticmethod
    def make(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Batch:
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(vocab, width, generator=g) * (4 / width**0.5)
        targets = torch.randint(vocab, (tokens,), generator=g)
        hidden = torch.randn(tokens, width, generator=g)
        planted = torch.rand(tokens, 1, generator=g) < 2 / 3
        hidden += planted * weight[targets] * (20 / 16)  # target logit near 20, the highest by far
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprobs = ops.lm_head_logprobs(hidden, weight, targets).logprobs
        advantages = torch.randn(tokens, generator=g)
        return Batch(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            logprobs + 0.05 * torch.randn(tokens, generator=g),
            advantages + advantages.sign() * 0.1,  # none is 0
            torch.full((tokens,), 1 / tokens),
        )

    def first(self, tokens: int) -> Batch:
        """The first rows, with gradients of their own."""
        rows = [getattr(self, f.name) for f in dataclasses.fields(self)]
        rows = [x if x is self.weight else x[:tokens] for x in rows]
        copies = [x.detach().clone() for x in rows]
        return Batch(copies[0].requires_grad_(), copies[1].requires_grad_(), *copies[2:])

    def quarter(self) -> Batch:
        """Advantage 0 for three tokens of four: they have no gradient."""
        live = torch.arange(len(self.targets)) % 4 == 0
        return dataclasses.replace(self, advantages=self.advantages * live)

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets

    def policy(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


# ---- implementations ---------------------------------------------------------------------------


def policy_loss(batch: Batch) -> Tensor:
    result = ops.policy_loss(**batch.policy(), **NO_CLIP)
    result.loss.backward()
    return result.logprobs


def logprobs(batch: Batch) -> Tensor:
    result = ops.lm_head_logprobs(*batch.head())
    ratio = (result.logprobs - batch.old_logprobs).exp()
    (-(batch.token_weights * ratio * batch.advantages).sum()).backward()
    return result.logprobs.detach()


def logprobs_forward(batch: Batch) -> Tensor:
    with torch.no_grad():
        return ops.lm_head_logprobs(*batch.head()).logprobs


def eager(batch: Batch) -> Tensor:
    """What a training loop does: log_softmax, gather, entropy for the log, clipped ratio."""
    logp = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, batch.targets[:, None]).squeeze(-1)
    ratio = (chosen - batch.old_logprobs).exp()
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0, 1e9) * batch.advantages)
    loss = -(batch.token_weights * gain).sum()
    loss.backward()
    entropy.detach()
    return chosen.detach()


def cross_entropy(batch: Batch) -> None:
    options = torch.nn.LinearCrossEntropyOptions()
    F.linear_cross_entropy(*batch.head(), options=options).backward()


def gemms(batch: Batch) -> Callable[[], None]:
    """X W^T, dZ W, dZ^T X into memory that is there already."""
    x, w = batch.hidden.detach(), batch.weight.detach()
    z = torch.randn(len(x), len(w)).to(x.dtype)
    out, dx, dw = torch.empty_like(z), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.T, out=out)
        torch.mm(z, w, out=dx)
        torch.mm(z.T, x, out=dw)

    return run


@dataclasses.dataclass
class Case:
    name: str
    dtype: torch.dtype
    products: int
    """matrix products of 2NDV flop that its mathematics needs (recomputation not counted)"""
    batch: Batch
    implementation: Callable[[Batch], Any] | None = None
    """leaves gradients in .grad and returns log-probs; None for the bare GEMMs"""
    bare: Callable[[], None] | None = None
    milliseconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.batch.hidden), *self.batch.weight.shape

    def run(self) -> None:
        if self.bare:
            self.bare()
        elif self.implementation:
            self.implementation(self.batch)

    def clear_gradients(self) -> None:
        self.batch.hidden.grad = self.batch.weight.grad = None

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.milliseconds).quantile(q))


def cases(tokens: int, width: int, vocab: int, dtypes: list[torch.dtype]) -> list[Case]:
    found = []
    for dtype in dtypes:
        batch = Batch.make(tokens, width, vocab, dtype)
        implementations = [
            (POLICY, 3, policy_loss, batch),
            (POLICY_QUARTER, 3, policy_loss, batch.quarter()),
            (LOGPROBS_FORWARD, 1, logprobs_forward, batch),
            (LOGPROBS, 3, logprobs, batch),
        ]
        if dtype == torch.float32:
            implementations.append((EAGER, 3, eager, batch))
        if hasattr(F, "linear_cross_entropy"):
            implementations.append((CROSS_ENTROPY, 3, cross_entropy, batch))
        found.append(Case(THREE, dtype, 3, batch, bare=gemms(batch)))
        found += [Case(name, dtype, products, b, f) for name, products, f, b in implementations]
    return found


# ---- measurements ------------------------------------------------------------------------------


def time_rounds(found: list[Case], rounds: int) -> None:
    for round_number in range(rounds + 1):  # the first is a warm-up
        for case in found:
            case.clear_gradients()
            start = time.perf_counter()
            case.run()
            elapsed = 1e3 * (time.perf_counter() - start)
            if round_number:
                case.milliseconds.append(elapsed)
            case.clear_gradients()


def peak_mib(case: Case) -> float:
    """Highest resident memory during one call, less that before it; gradients included."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    case.clear_gradients()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    case.run()
    peak = resident("VmHWM") - before
    case.clear_gradients()
    return peak


def errors(case: Case, tokens: int) -> dict[str, float]:
    """Against float64 on the first rows: largest error of log p, relative errors of dX and dW."""
    if case.implementation is None:
        return {}
    batch = case.batch.first(tokens)
    got = case.implementation(batch)
    x, w = batch.hidden.detach().double(), batch.weight.detach().double()
    logp = (x @ w.T).log_softmax(-1)
    chosen = logp.gather(-1, batch.targets[:, None]).squeeze(-1)
    found = {}
    if got is not None:
        found["error_logprobs"] = float((got - chosen).abs().max())
    if batch.hidden.grad is not None and batch.weight.grad is not None:
        if case.name == CROSS_ENTROPY:
            slope = torch.full_like(chosen, -1 / tokens)
        else:
            slope = -batch.token_weights * batch.advantages * (chosen - batch.old_logprobs).exp()
        dz = -logp.exp_().mul_(slope[:, None])
        dz.scatter_add_(1, batch.targets[:, None], slope[:, None])
        for name, grad, truth in (
            ("error_d_hidden", batch.hidden.grad, dz @ w),
            ("error_d_weight", batch.weight.grad, dz.T @ x),
        ):
            found[name] = float((grad.double() - truth).norm() / truth.norm())
    return found


def environment(threads: int) -> dict[str, Any]:
    def git(*command: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if git("status", "--porcelain") else ""),
        "torch": torch.__version__,
        "cpu": models[0] if models else platform.processor(),
        "products": ops.build_info()["cpu_products"],
        "threads": threads,
    }


# ---- report ------------------------------------------------------------------------------------


def measure(found: list[Case], rounds: int, error_tokens: int) -> list[dict[str, Any]]:
    """One row of the table per case."""
    time_rounds(found, rounds)
    reference = {(c.name, c.dtype): c.quantile(0.5) for c in found}
    rows = []
    for case in found:
        ms = case.quantile(0.5)
        tokens, vocab, width = case.shape
        rows.append(
            {
                "name": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "ms": ms,
                "ms_p20": case.quantile(0.2),
                "ms_p80": case.quantile(0.8),
                "gflops": 2e-6 * case.products * tokens * vocab * width / ms,
                "x_three_gemms": ms / reference[THREE, case.dtype],
                "x_ours": ms / reference[POLICY, case.dtype],
                "peak_mib": peak_mib(case),
            }
            | errors(case, error_tokens)
        )
    return rows


COLUMNS = (
    ("implementation", "<42", lambda r: f"{r['name']}, {r['dtype']}"),
    ("ms (p20-p80)", ">20", lambda r: f"{r['ms']:.0f} ({r['ms_p20']:.0f}-{r['ms_p80']:.0f})"),
    ("GFLOP/s", ">8", lambda r: f"{r['gflops']:.0f}"),
    ("x three bare GEMMs", ">18", lambda r: f"{r['x_three_gemms']:.2f}"),
    ("x ours", ">7", lambda r: f"{r['x_ours']:.2f}"),
    ("peak MiB", ">8", lambda r: f"{r['peak_mib']:.0f}"),
    ("max error logp", ">14", lambda r: scientific(r.get("error_logprobs"))),
    ("rel error dX", ">12", lambda r: scientific(r.get("error_d_hidden"))),
    ("rel error dW", ">12", lambda r: scientific(r.get("error_d_weight"))),
)


def scientific(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"


def print_table(rows: list[dict[str, Any]]) -> None:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    print(line([f"{title:{width}}" for title, width, _ in COLUMNS]))
    widths = [width for _, width, _ in COLUMNS]
    print(line(["-" * (int(w[1:]) - 1) + (":" if w[0] == ">" else "-") for w in widths]))
    for row in rows:
        print(line([f"{cell(row):{width}}" for _, width, cell in COLUMNS]))


def print_bars(rows: list[dict[str, Any]], shape: tuple[int, int, int]) -> None:
    """What the project holds itself to at the default shape, each with its figure."""
    if shape != (2048, 1024, 32768):
        return
    ms = {(row["name"], row["dtype"]): row["ms"] for row in rows}
    bars = [
        ("policy_loss float32 / three bare GEMMs", (POLICY, "float32"), (THREE, "float32"), 1.25),
        ("policy_loss bfloat16 / float32", (POLICY, "bfloat16"), (POLICY, "float32"), 1.0),
        ("policy_loss float32 / eager", (POLICY, "float32"), (EAGER, "float32"), 1 / 1.4),
        ("float32 live 0.25 / live 1", (POLICY_QUARTER, "float32"), (POLICY, "float32"), 0.6),
        ("bfloat16 live 0.25 / live 1", (POLICY_QUARTER, "bfloat16"), (POLICY, "bfloat16"), 0.6),
    ]
    for title, ours, other, bar in bars:
        if ours in ms and other in ms:
            ratio = ms[ours] / ms[other]
            verdict = "met" if ratio <= bar else "NOT MET"
            print(f"{verdict:>7}: {title} = {ratio:.2f}, bar <= {bar:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=2048, help="N, rows of hidden")
    add("--width", type=int, default=1024, help="D, hidden size")
    add("--vocab", type=int, default=32768, help="V, rows of weight")
    add("--threads", type=int, default=2, help="torch threads")
    add("--rounds", type=int, default=5, help="timed rounds after one warm-up")
    add("--error_tokens", type=int, default=256, help="rows compared with float64")
    add(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "bfloat16"],
        help="dtypes of hidden and weight",
    )
    add("--json", type=Path, metavar="FILE", help="append one JSON line per implementation")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    run = environment(args.threads) | {k: getattr(args, k) for k in ("tokens", "width", "vocab")}
    print(", ".join(f"{key} {value}" for key, value in run.items()))
    found = cases(args.tokens, args.width, args.vocab, dtypes)
    rows = measure(found, args.rounds, min(args.error_tokens, args.tokens))
    print_table(rows)
    print_bars(rows, (args.tokens, args.width, args.vocab))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a") as file:
            file.writelines(json.dumps(run | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
