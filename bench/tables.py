"""Makes the tables and pictures of the documents from bench/results: `python bench/tables.py`
(--check changes nothing and says what differs). A table stands between `<!-- table: NAME -->` and
`<!-- end -->`.

The programs that measure print the same tables of their own rows."""

import argparse
import re
import sys
from collections.abc import Callable

import pictures
import roofline
import scan_model
import study.plots
from rows import (
    RESULTS,
    ROOT,
    Cells,
    Row,
    add_best_peer,
    figure,
    is_wrong_peer,
    newest,
    read,
    shape_of,
    table,
)
from study.analysis import analysis_table
from study.cells import PUBLISHED
from study.table import study_table

DOCUMENTS = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("integrations", "internal_policies", "performance", "scaling", "study")
    ),
)
PRODUCTS = {"block": "block products, AVX-512", "library": "torch's BLAS"}
"""What build_info() calls the products of a CPU, in words"""


def figures(row: Row, form: str, *keys: str) -> list[str]:
    return [figure(row, key, form) for key in keys]


def cpu_table(rows: list[Row]) -> str:
    """The LM-head ops on the CPU against bare GEMMs and plain torch."""
    run = rows[0]
    titles = (None, "dtype", "x three bare GEMMs", "x `policy_loss`", "peak MiB", "rel. error dW")
    cells = [
        [
            *(row["name"], row["dtype"], *figures(row, ".2f", "x_three_gemms", "x_ours")),
            *(figure(row, "peak_mib", ".0f"), figure(row, "error_d_weight", ".1e")),
        ]
        for row in rows
    ]
    return f"{table(titles, cells, 2)}\n\n{_of_cpu(run)}"


def _of_cpu(run: Row) -> str:
    return (
        f"N={run['tokens']}, D={run['width']}, V={run['vocab']}, {run['threads']} threads of "
        f"{run['cpu']} ({PRODUCTS[run['cpu_products']['float32']]}), torch {run['torch']}, "
        f"{run['date'][:10]}; ratios of medians in one run."
    )


def divergence_table(rows: list[Row]) -> str:
    """The divergence of two heads on the CPU against bare GEMMs and plain torch."""
    ms = {row["name"]: row["ms"] for row in rows}
    titles = (None, "x four bare GEMMs", "x eager", "peak MiB", "error of D", "rel. error dW")
    cells = []
    for row in rows:
        eager = ms.get(f"eager, {row['name'].rpartition(' ')[2]}")
        cells.append(
            [
                *(row["name"], figure(row, "x_four_gemms", ".2f")),
                *(f"{row['ms'] / eager:.2f}" if eager else None, figure(row, "peak_mib", ".0f")),
                *figures(row, ".1e", "error_divergence", "error_d_weight"),
            ]
        )
    return f"{table(titles, cells)}\n\n{_of_cpu(rows[0])}"


def _machine(run: Row) -> str:
    machine = f"{run['gpu']}, driver {run['driver']}" if "gpu" in run else run["cpu"]
    return f"{machine}, torch {run['torch']}, commit {run['commit']}, {run['date'][:10]}"


def cuda_table(rows: list[Row]) -> str:
    """The LM-head ops on a GPU, at the first shape of the rows. A peer whose gradient is wrong, and
    what could not be timed, has a reason in place of figures."""
    shape = shape_of(rows[0])
    rows = [row for row in rows if shape_of(row) == shape]
    add_best_peer(rows)
    titles = "ms", "x one bare GEMM", "x three", "x best peer", "peak MiB", "rel. error dW"
    cells: list[Cells] = []
    for row in rows:
        why = row.get("missing") or row.get("failed")
        if not why and is_wrong_peer(row):
            why = f"wrong gradient, error {figure(row, 'error_d_weight', '.1e')}"
        ratios = figures(row, ".2f", "x_one_gemm", "x_three_gemms", "x_best_peer")
        measured = [figure(row, "ms", ".1f"), *ratios, figure(row, "peak_mib", ".0f")]
        measured.append(figure(row, "error_d_weight", ".1e"))
        cells.append([row["name"], *([why] if why else measured)])
    where = f"N={shape[0]}, D={shape[1]}, V={shape[2]}, {_machine(rows[0])}; medians of one run."
    return f"{table((None, *titles), cells)}\n\n{where}"


def cuda_shapes_table(rows: list[Row]) -> str:
    """The same at every shape."""
    shapes = dict.fromkeys(shape_of(row) for row in rows)
    return "\n\n".join(cuda_table([r for r in rows if shape_of(r) == shape]) for shape in shapes)


def models_table(rows: list[Row]) -> str:
    """Whole models in a training step on a GPU."""
    run = rows[0]
    titles = "ms", "x bupo", "x full policy", "x bare GEMMs", "peak MiB", "total MiB"
    cells = []
    for row in rows:
        found = [figure(row, "ms", ".0f"), *figures(row, ".2f", "x_bupo", "x_full", "x_gemms")]
        found += figures(row, ".0f", "peak_mib", "total_mib")
        if "failed" in row:
            found = [row["failed"]]
        elif "sequence" in row:
            found = [f"{row['sequence']:,} tokens, {row['gib']:g} GiB"]
        policy = f"layer {row['layer']}" if row["layer"] else ""
        cells.append([f"{row['model']}: {row['name']}", policy, *found])
    return (
        f"{table((None, 'policy', *titles), cells, 2)}\n\n"
        f"{run['tokens']} tokens in sequences of {run['length']}, bfloat16, gradient "
        f"checkpointing, {_machine(run)}, transformers {run['transformers']}; medians."
    )


def train_step_table(rows: list[Row]) -> str:
    """Training steps of bupo and of TRL on the CPU, a table for each model and engine."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row["model"], row["engine"]), []).append(row)
    return "\n\n".join(map(_train_step_table, tables.values()))


def _train_step_table(rows: list[Row]) -> str:
    run, totals = rows[0], ("step", "without_rollout", "cpu_seconds")
    stages = {"rollout": "rollout", "old log-probs": "old_logprobs", "update": "update"}
    if run["engine"] != "hf":
        stages["new weights"] = "sync"
    stages["rest"] = "rest"
    cells: list[Cells] = []
    for row in rows:
        seconds = figures(row, ".2f", *stages.values(), *totals)
        named = row["name"] + (f", layer {row['layer']}" if row["layer"] else "")
        measured = [named, *seconds, figure(row, "peak_mib", ".0f")]
        cells.append([row["name"], row["failed"]] if "failed" in row else measured)
    for row in rows[1:]:
        if "x_bupo_step" in row:
            ratios = figures(row, ".2f", *(f"x_bupo_{key}" for key in (*totals, "peak_mib")))
            cells.append([f"{row['name']} / bupo", *[None] * len(stages), *ratios])
    titles = ["seconds", *stages, "step", "all but rollout", "CPU seconds", "peak MiB"]
    spared = "; TRL hands no new weights to vLLM" if run["engine"] == "vllm" else ""
    return (
        f"{table(titles, cells)}\n\n"
        f"{run['model']}, rollouts by {run['engine']}: {run['layers']} layers of width "
        f"{run['width']}, vocabulary {run['vocab']}; "
        f"{run['prompts']} prompts of {run['prompt_tokens'][0]} to {run['prompt_tokens'][1]} "
        f"tokens x {run['samples']} rollouts of {run['new_tokens']} tokens, {run['updates']} "
        f"updates, {run['micro_rollouts']} rollouts a micro-batch; float32, {run['threads']} "
        f"threads of {run['cpu']}; torch {run['torch']}, transformers {run['transformers']}, TRL "
        f"{run['trl']}, {run['date'][:10]}; medians{spared}."
    )


def internal_table(rows: list[Row]) -> str:
    """The entropies of all internal policies of a model on the CPU."""
    run = rows[0]
    titles = "seconds", "x bare GEMMs", "x `entropy_flow`", "peak MiB", "x `entropy_flow`"
    cells = [
        [
            *(
                row["name"],
                figure(row, "seconds", ".0f"),
                *figures(row, ".2f", "x_gemms", "x_ours"),
            ),
            *(figure(row, "peak_mib", ".0f"), figure(row, "x_ours_peak_mib", ".2f")),
        ]
        for row in rows
    ]
    gap = next(row["gap_to_hooks"] for row in rows if row["gap_to_hooks"] is not None)
    return (
        f"{table((None, *titles), cells)}\n\n"
        f"{run['layers']} layers of width {run['width']}, vocabulary {run['vocab']}, "
        f"{run['texts']} texts of {run['length']} tokens; float32, {run['threads']} threads of "
        f"{run['cpu']}, torch {run['torch']}, {run['date'][:10]}; the mean entropies of both ways "
        f"differ by {gap:.0e} nats at most."
    )


def rollouts_table(rows: list[Row]) -> str:
    """Rollouts by vLLM on the CPU, a table for each model that was measured."""
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        run = mine[0]
        gaps = {row["head"]: row["logprob_gap"] for row in mine if "head" in row}
        mine = [row for row in mine if "head" not in row]
        cells: list[Cells] = [
            [row["name"], *figures(row, ".0f", "tokens_per_second"), *figures(row, ".2f", "x_bare")]
            for row in mine
        ]
        tables.append(
            f"{table((None, 'tokens/s', 'x `LLM.generate`'), cells)}\n\n"
            f"{model}: {run['prompts']} prompts of {run['prompt_tokens'][0]} to "
            f"{run['prompt_tokens'][1]} tokens, at most {run['new_tokens']} new tokens each, "
            f"{run['batch_size']} at a time; float32, {run['threads']} threads of {run['cpu']}, "
            f"torch {run['torch']}, {run['date'][:10]}; medians."
        )
        if gaps:
            tables[-1] += (
                " In bfloat16, vLLM's log-probs of these responses differ from those of training "
                f"by {gaps['bfloat16']:.4f} nats on average, and with the head's logits in "
                f"float32, as bupo sets it on a GPU, by {gaps['float32']:.4f}."
            )
    return "\n\n".join(tables)


def ranks_time_table(rows: list[Row]) -> str:
    """Seconds of a step in one process and in several ranks on the CPU."""
    run, rows = rows[0], [row for row in rows if "ranks" in row]
    stages = {"rollout": "rollout", "old log-probs": "old_logprobs", "updates": "update"}
    stages["step"] = "step"
    cells: list[Cells] = [
        [_ranks(row), *figures(row, ".2f", *stages.values(), "x_one_update")] for row in rows
    ]
    return (
        f"{table(['seconds', *stages, 'updates / those of 1 rank'], cells)}\n\n"
        f"{run['layers']} layers of width {run['width']}, vocabulary {run['vocab']}; "
        f"{run['prompts']} prompts of {run['prompt_tokens'][0]} to {run['prompt_tokens'][1]} "
        f"tokens x {run['samples']} rollouts of {run['new_tokens']} tokens, {run['updates']} "
        f"updates; float32; all ranks together have {run['threads']} threads of {run['cpu']}; "
        f"torch {run['torch']}, {run['date'][:10]}; medians."
    )


def _ranks(row: Row) -> str:
    if row["ranks"] == 1:
        return "1 rank"
    with_ = "a copy of the model" if row.get("parts") == 1 else "its part of the model (FSDP)"
    return f"{row['ranks']} ranks, each with {with_}"


def ranks_memory_table(rows: list[Row]) -> str:
    """GiB of an update on each rank, as the plan computes them."""
    rows = [row for row in rows if "planned" in row]
    worlds = [key.removeprefix("host_") for key in rows[0] if key.startswith("host_")]
    cells: list[Cells] = [
        [row["planned"], *(f"{row[f'device_{n}']:.0f} / {row[f'host_{n}']:.0f}" for n in worlds)]
        for row in rows
    ]
    return table(["model", *(f"{n} GPU" + "s" * (n != "1") for n in worlds)], cells)


def head_traffic_table() -> str:
    """GB that a rank moves for the head of Qwen3-8B in float32, in an update of a million tokens.
    If the head is gathered, that is all its rows and their gradients; else, for each token of the
    ranks that divide it, the hidden state in bfloat16 and its gradient in float32."""
    rows, width, tokens, machine = 151_936, 4096, 10**6, 8
    gathered, divided = 2 * 4 * rows * width / 1e9, (2 + 4) * width * tokens / 1e9
    cells: list[Cells] = [
        [f"{gpus}", f"{gathered:.1f}", f"{divided:.1f}", f"{divided * machine / gpus:.1f}"]
        for gpus in (8, 64, 1024)
    ]
    ways = ["gathered head", "divided among all GPUs", "divided within each machine of 8"]
    return table(["GPUs", *ways], cells)


COMPUTED = {"predictions": scan_model.predictions, "head_traffic": head_traffic_table}
"""Tables that need no results"""
MEASURED: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "cpu": ("cpu", cpu_table),
    "cpu_avx2": ("cpu_avx2", cpu_table),
    "divergence": ("divergence_cpu", divergence_table),
    "cuda": ("cuda", cuda_table),
    "cuda_shapes": ("cuda", cuda_shapes_table),
    "models": ("models_cuda", models_table),
    "train_step": ("train_step_cpu", train_step_table),
    "trl_ops": ("trl_ops_cpu", train_step_table),
    "internal": ("internal_cpu", internal_table),
    "rollouts": ("rollouts_cpu", rollouts_table),
    "ranks_time": ("ranks_cpu", ranks_time_table),
    "ranks_memory": ("ranks_cpu", ranks_memory_table),
    "analysis_smollm2": ("analysis_smollm2", analysis_table),
    **{f"study_{name}": (f"study_{name}", study_table) for name in PUBLISHED},
}
"""By the name of a table: the file of its results, and what makes it of their rows"""


def study_rows(edition: str) -> list[Row]:
    """Each row is of a run of its own."""
    file = RESULTS / f"study_{edition}.jsonl"
    return read(file) if file.exists() else []


def table_named(name: str) -> str:
    """A table of the documents, or a sentence that says which results are missing."""
    if name == "rooflines":
        pictures = sorted(file.name for file in (ROOT / "docs").glob("roofline_*.png"))
        links = [f"![rates against bandwidth and peak]({picture})" for picture in pictures]
        return "\n\n".join(links) or "No picture yet: no run has measured its machine's ceilings."
    if name in COMPUTED:
        return COMPUTED[name]()
    results, make = MEASURED[name]
    file = RESULTS / f"{results}.jsonl"
    edition = name.removeprefix("study_")
    rows = study_rows(edition) if edition in PUBLISHED else newest(file)
    return make(rows) if rows else f"Not measured yet: there is no bench/results/{results}.jsonl."


def with_new_tables(text: str) -> str:
    """The text of a document with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table_named(match[2])}\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    """Exit status 1 if --check finds a table or picture that differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    # Before the tables, which link them.
    drawn = roofline.update_pictures(check)
    for name in PUBLISHED:
        drawn += pictures.update(f"study_{name}.png", study_rows(name), study.plots.draw, check)
    stale = [f"docs/{name}" for name in drawn]
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        if with_new_tables(text) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(with_new_tables(text), encoding="utf-8")
    print("\n".join(f"{name}: {'differs' if check else 'written'}" for name in stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
