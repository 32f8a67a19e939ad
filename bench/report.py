"""Rows of results from measured cases, their table, and the bars that the project holds itself to.

A bar compares figures of one run and one shape. "Right" is a gradient within GRADIENT_RIGHT of
float64: a peer is compared with only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
from rows import Row, gradient_is_right


def bytes_of(case: Case) -> int:
    """Every input read once, every output written once: the least that could be moved."""
    tokens, width, vocab = case.batches[0].shape
    element = case.dtype.itemsize
    forward = element * (tokens + vocab) * width + 8 * tokens + 3 * 4 * tokens
    gradients = element * (tokens + vocab) * width + 3 * 4 * tokens
    return forward + (gradients if case.implementation.products == 3 else 0)


def row_of(case: Case, reference: dict[str, float]) -> Row:
    """The times of one case; reference: median milliseconds by name, of the same dtype."""
    ms = case.quantile(0.5)
    tokens, width, vocab = case.batches[0].shape
    flop = 2 * case.implementation.products * tokens * vocab * width
    row = {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ms": ms,
        "ms_p20": case.quantile(0.2),
        "ms_p80": case.quantile(0.8),
        "gflops": 1e-6 * flop / ms,
        "gb_s": 1e-6 * bytes_of(case) / ms,
        "products": case.implementation.products,
        "live": case.implementation.live,
        "peer": case.implementation.peer,
    }
    floors = {"x_one_gemm": ONE, "x_three_gemms": THREE, "x_ours": POLICY}
    if SWEEP_GEMM in reference:
        floors = {"x_one_gemm": SWEEP_GEMM}
    return row | {key: ms / reference[name] for key, name in floors.items() if name in reference}


# ---- tables ------------------------------------------------------------------------------------


def _figure(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else f"{row[key]:{form}}"


def _time(form: str) -> Callable[[Row], str]:
    return lambda r: f"{r['ms']:{form}} ({r['ms_p20']:{form}}-{r['ms_p80']:{form}})"


def _name(row: Row) -> str:
    wrong = row.get("peer") and row["products"] == 3 and not gradient_is_right(row)
    return f"{row['name']}, {row['dtype']}" + (" GRADIENT WRONG" if wrong else "")


_ERRORS = [
    ("max error logp", ">14", _figure("error_logprobs", ".1e")),
    ("rel error dX", ">12", _figure("error_d_hidden", ".1e")),
    ("rel error dW", ">12", _figure("error_d_weight", ".1e")),
]
COLUMNS = {
    "cpu": [
        ("implementation", "<42", _name),
        ("ms (p20-p80)", ">20", _time(".0f")),
        ("GFLOP/s", ">8", _figure("gflops", ".0f")),
        ("x three bare GEMMs", ">18", _figure("x_three_gemms", ".2f")),
        ("x ours", ">7", _figure("x_ours", ".2f")),
        ("peak MiB", ">8", _figure("peak_mib", ".0f")),
        *_ERRORS,
    ],
    "cuda": [
        ("implementation", "<48", _name),
        ("ms (p20-p80)", ">24", _time(".2f")),
        ("TFLOP/s", ">8", lambda r: f"{r['gflops'] / 1e3:.0f}"),
        ("GB/s", ">6", _figure("gb_s", ".0f")),
        ("x one bare GEMM", ">15", _figure("x_one_gemm", ".2f")),
        ("x three bare GEMMs", ">18", _figure("x_three_gemms", ".2f")),
        ("x best peer", ">11", _figure("x_best_peer", ".2f")),
        ("peak MiB", ">8", _figure("peak_mib", ".0f")),
        _ERRORS[0],
        ("max error H", ">11", _figure("error_entropy", ".1e")),
        *_ERRORS[1:],
    ],
}


def print_table(rows: list[Row], device: str) -> None:
    def line(cells: Iterable[str]) -> None:
        print("| " + " | ".join(cells) + " |")

    columns = COLUMNS[device]
    line(f"{title:{width}}" for title, width, _ in columns)
    widths = [width for _, width, _ in columns]
    line("-" * (int(w[1:]) - 1) + (":" if w[0] == ">" else "-") for w in widths)
    for row in rows:
        if "failed" not in row:
            line(f"{cell(row):{width}}" for _, width, cell in columns)
    for row in rows:
        if "failed" in row:
            print(f"no time: {row['name']}, {row['dtype']}: {row['failed']}")


# ---- bars --------------------------------------------------------------------------------------


def print_cpu_bars(rows: list[Row]) -> None:
    ms = {(row["name"], row["dtype"]): row["ms"] for row in rows if "ms" in row}
    quarter = live_name(0.25)
    bars = [
        ("policy_loss float32 / three bare GEMMs", (POLICY, "float32"), (THREE, "float32"), 1.25),
        ("policy_loss bfloat16 / float32", (POLICY, "bfloat16"), (POLICY, "float32"), 1.0),
        ("policy_loss float32 / eager", (POLICY, "float32"), ("eager fwd+bwd", "float32"), 1 / 1.4),
        ("float32 live 0.25 / live 1", (quarter, "float32"), (POLICY, "float32"), 0.6),
        ("bfloat16 live 0.25 / live 1", (quarter, "bfloat16"), (POLICY, "bfloat16"), 0.6),
    ]
    for title, ours, other, bar in bars:
        if ours in ms and other in ms:
            print(_verdict(title, ms[ours] / ms[other], bar))


def _verdict(title: str, value: float, bar: float, form: str = ".2f") -> str:
    return f"{'met' if value <= bar else 'NOT MET':>7}: {title} = {value:{form}}, bar <= {bar:g}"


def cuda_bars(rows: list[Row], shape: tuple[int, int, int], budget_mib: float) -> list[str]:
    """Those of one shape, one line each, with the figure; a figure that is missing says so."""
    named = {row["name"]: row for row in rows if "ms" in row}
    lines = []

    def bar(title: str, name: str, key: str, limit: float, form: str = ".2f") -> None:
        value = named.get(name, {}).get(key)
        if value is None:
            lines.append(f"NO FIGURE: {title}")
        else:
            lines.append(_verdict(title, value, limit, form))

    if SWEEP in named:
        bar("layer sweep / one bare GEMM", SWEEP, "x_one_gemm", 1.10)
        return lines
    _, width, vocab = shape
    bar("lm_head_logprobs fwd / one bare GEMM", LOGPROBS_FORWARD, "x_one_gemm", 1.03)
    bar("policy_loss / three bare GEMMs", POLICY, "x_three_gemms", 1.05 if width >= 4096 else 1.08)
    bar("lm_head_logprobs / three bare GEMMs", LOGPROBS, "x_three_gemms", 1.08)
    if POLICY_PORTABLE in named:  # on Hopper; elsewhere the bars above are missed by design
        bar("lm_head_logprobs fwd, portable / one GEMM", FORWARD_PORTABLE, "x_one_gemm", 1.35)
        bar("policy_loss, portable / three GEMMs", POLICY_PORTABLE, "x_three_gemms", 1.25)
    bar("policy_loss live 0.25 / live 1", live_name(0.25), "x_ours", 0.55)
    best = named.get(POLICY, {}).get("best_peer", "no peer is right")
    bar(f"policy_loss / fastest right peer ({best})", POLICY, "x_best_peer", 1 / 1.25)
    # One chunk may take the budget and the place of an fp32 dW (bupo.ops.set_workspace_bytes).
    bar(
        f"extra MiB of {POLICY}",
        POLICY,
        "extra_mib",
        budget_mib + 4 * width * vocab / MIB + 64,
        ".0f",
    )
    bar(f"extra MiB of {LOGPROBS_FORWARD}", LOGPROBS_FORWARD, "extra_mib", budget_mib + 64, ".0f")
    for name in (POLICY, live_name(0.25)):
        bar(f"relative error of dX, {name}", name, "error_d_hidden", 3e-3, ".1e")
        bar(f"relative error of dW, {name}", name, "error_d_weight", 3e-3, ".1e")
    for key, title in (("error_logprobs", "log p"), ("error_entropy", "entropy")):
        value = named.get(POLICY, {}).get(key)
        if value is not None:
            lines.append(f" figure: largest error of {title}, {POLICY} = {value:.1e}")
    return lines
