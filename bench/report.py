"""The rows of measured cases, their table, and the bars that the project holds itself to."""

from collections.abc import Callable

from implementations import (
    FORWARD_PORTABLE,
    LOGPROBS,
    LOGPROBS_FORWARD,
    ONE,
    POLICY,
    POLICY_PORTABLE,
    SWEEP,
    SWEEP_GEMM,
    THREE,
    live_name,
)
from measure import MIB, Case
from rows import Row, aligned, bar, figure, is_wrong_peer, table


def bytes_of(case: Case) -> int:
    """Every input read once and every output written once: the fewest that could be moved."""
    tokens, width, vocab = case.batches[0].shape
    element = case.dtype.itemsize
    forward = element * (tokens + vocab) * width + 8 * tokens + 3 * 4 * tokens
    gradients = element * (tokens + vocab) * width + 3 * 4 * tokens
    return forward + (gradients if case.implementation.products == 3 else 0)


def row_of(case: Case, reference: dict[str, float]) -> Row:
    """The times of one case; reference: median milliseconds by name, of the same dtype."""
    tokens, width, vocab = case.batches[0].shape
    flop = 2 * case.implementation.products * tokens * vocab * width
    times = case.times()
    ms = times["ms"]
    row = {
        "name": case.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        **times,
        "gflops": 1e-6 * flop / ms,
        "gb_s": 1e-6 * bytes_of(case) / ms,
        "products": case.implementation.products,
        "live": case.implementation.live,
        "peer": case.peer,
    }
    floors = {"x_one_gemm": ONE, "x_three_gemms": THREE, "x_ours": POLICY}
    if SWEEP_GEMM in reference:
        floors = {"x_one_gemm": SWEEP_GEMM}
    return row | {key: ms / reference[name] for key, name in floors.items() if name in reference}


# ---- the table ---------------------------------------------------------------------------------


def column(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: figure(row, key, form, missing="-")


def name_of(row: Row) -> str:
    return f"{row['name']}, {row['dtype']}" + " GRADIENT WRONG" * is_wrong_peer(row)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "implementation": name_of,
    "ms (p20-p80)": lambda row: f"{row['ms']:.2f} ({row['ms_p20']:.2f}-{row['ms_p80']:.2f})",
    "TFLOP/s": lambda row: f"{row['gflops'] / 1e3:.3g}",
    "GB/s": column("gb_s", ".0f"),
    "x one bare GEMM": column("x_one_gemm", ".2f"),
    "x three bare GEMMs": column("x_three_gemms", ".2f"),
    "x ours": column("x_ours", ".2f"),
    "x best peer": column("x_best_peer", ".2f"),
    "peak MiB": column("peak_mib", ".0f"),
    "max error logp": column("error_logprobs", ".1e"),
    "max error H": column("error_entropy", ".1e"),
    "rel error dX": column("error_d_hidden", ".1e"),
    "rel error dW": column("error_d_weight", ".1e"),
}


def print_table(rows: list[Row]) -> None:
    timed = [row for row in rows if "failed" not in row]
    cells = [[cell(row) for cell in COLUMNS.values()] for row in timed]
    print(aligned(table(list(COLUMNS), cells)))
    for row in rows:
        if "failed" in row:
            print(f"no time: {row['name']}, {row['dtype']}: {row['failed']}")


# ---- bars --------------------------------------------------------------------------------------


def cpu_bars(rows: list[Row]) -> list[str]:
    """A line for each of which both figures are there."""
    ms = {(row["name"], row["dtype"]): row["ms"] for row in rows if "ms" in row}
    quarter = live_name(0.25)
    bars = [
        ("policy_loss float32 / three bare GEMMs", (POLICY, "float32"), (THREE, "float32"), 1.25),
        ("policy_loss bfloat16 / float32", (POLICY, "bfloat16"), (POLICY, "float32"), 1.0),
        ("policy_loss float32 / eager", (POLICY, "float32"), ("eager fwd+bwd", "float32"), 1 / 1.4),
        ("float32 live 0.25 / live 1", (quarter, "float32"), (POLICY, "float32"), 0.6),
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
