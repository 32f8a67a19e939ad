"""Writes the tables of the documents from bench/results: `python bench/tables.py` (--check only
compares). A table stands between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import scan_model
from rows import add_best_peer, gradient_is_right

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/performance.md")
RESULTS = ROOT / "bench" / "results"


def newest(name: str) -> list[dict[str, Any]]:
    """The rows of the last run in a results file; none without the file."""
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def not_measured(name: str) -> str:
    """In place of a table whose results are not there."""
    return f"Not measured yet: there is no bench/results/{name}.jsonl."


PRODUCTS = {"block": "block products, AVX-512", "library": "torch's BLAS"}
"""In words, what build_info() calls the products of a CPU"""


def cpu_table(name: str = "cpu") -> str:
    """The LM-head ops on the CPU against bare GEMMs and plain torch."""
    rows = newest(name)
    run = rows[0]
    lines = [
        "| | dtype | x three bare GEMMs | x `policy_loss` | peak MiB | rel. error dW |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        error = row.get("error_d_weight")
        lines.append(
            f"| {row['name']} | {row['dtype']} | {row['x_three_gemms']:.2f} | {row['x_ours']:.2f} "
            f"| {row['peak_mib']:.0f} | {'' if error is None else f'{error:.1e}'} |"
        )
    where = (
        f"N={run['tokens']}, D={run['width']}, V={run['vocab']}, {run['threads']} threads of "
        f"{run['cpu']} ({PRODUCTS[run['cpu_products']['float32']]}), torch {run['torch']}, "
        f"{run['date'][:10]}; ratios of medians in one run"
    )
    return "\n".join([*lines, "", f"{where}."])


def pictures() -> str:
    """What roofline.py has drawn."""
    names = sorted(file.name for file in (ROOT / "docs").glob("roofline_*.png"))
    links = [f"![rates against bandwidth and peak]({name})" for name in names]
    return "\n\n".join(links) or "No picture yet: no run has measured its machine's ceilings."


def shape_of(row: dict[str, Any]) -> tuple[int, ...]:
    """N, D, V"""
    return tuple(row[k] for k in ("tokens", "width", "vocab"))


def cuda_table() -> str:
    """The same on a GPU, at the first shape of the protocol."""
    rows = newest("cuda")
    return _cuda_shape(rows, shape_of(rows[0])) if rows else not_measured("cuda")


def cuda_shapes_table() -> str:
    """At all of them."""
    rows = newest("cuda")
    shapes = dict.fromkeys(shape_of(row) for row in rows)
    return "\n\n".join(_cuda_shape(rows, s) for s in shapes) or not_measured("cuda")


def _cuda_shape(rows: list[dict[str, Any]], shape: tuple[int, ...]) -> str:
    """Peers whose gradient is wrong, and what could not be timed, with the reason in place of
    figures."""
    rows = [row for row in rows if shape_of(row) == shape]
    add_best_peer(rows)
    run = rows[0]
    lines = [
        "| | ms | x one bare GEMM | x three | x best peer | peak MiB | rel. error dW |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        why = row.get("missing") or row.get("failed")
        if not why and row.get("peer") and row["products"] == 3 and not gradient_is_right(row):
            why = f"wrong gradient, error {figure(row, 'error_d_weight', '.1e')}"
        if why:
            lines.append(f"| {row['name']} | {why} | | | | | |")
            continue
        cells = [figure(row, "ms", ".1f")]
        cells += [figure(row, k, ".2f") for k in ("x_one_gemm", "x_three_gemms", "x_best_peer")]
        cells += [figure(row, "peak_mib", ".0f"), figure(row, "error_d_weight", ".1e")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    where = f"N={shape[0]}, D={shape[1]}, V={shape[2]}, {_gpu(run)}; medians of one run"
    return "\n".join([*lines, "", f"{where}."])


def figure(row: dict[str, Any], key: str, form: str) -> str:
    return "" if row.get(key) is None else f"{row[key]:{form}}"


def _gpu(run: dict[str, Any]) -> str:
    return (
        f"{run['gpu']}, driver {run['driver']}, torch {run['torch']}, commit {run['commit']}, "
        f"{run['date'][:10]}"
    )


def models_table() -> str:
    """Whole models in a training step on a GPU."""
    rows = newest("models_cuda")
    if not rows:
        return not_measured("models_cuda")
    run = rows[0]
    lines = [
        "| | policy | ms | x bupo | x full policy | x bare GEMMs | peak MiB | total MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = f"{row['model']}: {row['name']} | " + (f"layer {row['layer']}" * bool(row["layer"]))
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | | | | |")
            continue
        if "sequence" in row:
            lines.append(f"| {name} | {row['sequence']:,} tokens, {row['gib']:g} GiB | | | | | |")
            continue
        cells = [figure(row, "ms", ".0f")]
        cells += [figure(row, k, ".2f") for k in ("x_bupo", "x_full", "x_gemms")]
        cells += [figure(row, k, ".0f") for k in ("peak_mib", "total_mib")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    where = (
        f"{run['tokens']} tokens in sequences of {run['length']}, bfloat16, gradient "
        f"checkpointing, {_gpu(run)}, transformers {run['transformers']}; medians"
    )
    return "\n".join([*lines, "", f"{where}."])


def train_step_table() -> str:
    """A training step of bupo and of TRL on the CPU."""
    rows = newest("train_step_cpu")
    run = rows[0]
    totals = ("step", "without_rollout", "cpu_seconds")
    lines = [
        "| seconds | rollout | old log-probs | update | rest | step | all but rollout "
        "| CPU seconds | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | | | | | | |")
            continue
        named = row["name"] + (f", layer {row['layer']}" if row["layer"] else "")
        cells = [f"{row[key]:.2f}" for key in ("rollout", "old_logprobs", "update", "rest")]
        cells += [f"{row[key]:.2f}" for key in totals]
        lines.append(f"| {named} | {' | '.join(cells)} | {row['peak_mib']:.0f} |")
    for row in rows[1:]:
        if "failed" not in row:
            cells = [f"{row[f'x_bupo_{key}']:.2f}" for key in totals]
            memory = f"{row['x_bupo_peak_mib']:.2f}"
            lines.append(f"| {row['name']} / bupo | | | | | {' | '.join(cells)} | {memory} |")
    where = (
        f"{run['layers']} layers of width {run['width']}, vocabulary {run['vocab']}; "
        f"{run['prompts']} prompts of {run['prompt_tokens'][0]} to {run['prompt_tokens'][1]} "
        f"tokens x {run['samples']} rollouts of {run['new_tokens']} tokens, {run['updates']} "
        f"updates, {run['micro_rollouts']} rollouts a micro-batch; float32, {run['threads']} "
        f"threads of {run['cpu']}; torch {run['torch']}, transformers {run['transformers']}, TRL "
        f"{run['trl']}, {run['date'][:10]}; medians"
    )
    return "\n".join([*lines, "", f"{where}."])


def internal_table() -> str:
    """The entropies of all internal policies of a model on the CPU."""
    rows = newest("internal_cpu")
    run = rows[0]
    lines = [
        "| | seconds | x bare GEMMs | x `entropy_flow` | peak MiB | x `entropy_flow` |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        peaks = f"{row['peak_mib']:.0f} | {row['x_ours_peak_mib']:.2f}"
        lines.append(
            f"| {row['name']} | {row['seconds']:.0f} | {row['x_gemms']:.2f} | {row['x_ours']:.2f} "
            f"| {peaks} |"
        )
    gap = next(row["gap_to_hooks"] for row in rows if row["gap_to_hooks"] is not None)
    where = (
        f"{run['layers']} layers of width {run['width']}, vocabulary {run['vocab']}, "
        f"{run['texts']} texts of {run['length']} tokens; float32, {run['threads']} threads of "
        f"{run['cpu']}, torch {run['torch']}, {run['date'][:10]}; the mean entropies of both ways "
        f"differ by {gap:.0e} nats at most"
    )
    return "\n".join([*lines, "", f"{where}."])


TABLES = {
    "cpu": cpu_table,
    "cpu_avx2": lambda: cpu_table("cpu_avx2"),
    "cuda": cuda_table,
    "cuda_shapes": cuda_shapes_table,
    "models": models_table,
    "rooflines": pictures,
    "train_step": train_step_table,
    "internal": internal_table,
    "predictions": scan_model.table,
}


def filled(text: str) -> str:
    """A document with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Exit status 1 if --check finds a table that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(filled(text), encoding="utf-8")
    print("\n".join(f"{name}: tables {'differ' if check else 'written'}" for name in stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
