"""The files that an analysis writes: texts.jsonl, tables, summary.json, figures and report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bupo.commands.analysis_texts import Measured
from bupo.config import AnalysisConfig
from bupo.internal import Analysis, tables
from bupo.report import write_analysis_report
from bupo.runlog.run_directory import json_lines, replace_text

OWN_TOKENS = (
    "The two models have different tokenizers: each was measured on its own tokens of the same "
    "texts. Compare figures by layer with that in mind; entropies have different upper bounds."
)


def write_texts(out: Path, texts: Sequence[Measured]) -> None:
    """Writes texts.jsonl, one line per text. Its columns prompt and response can be reanalysed."""
    rows = [
        {
            "text": n,
            "where": m.where,
            "prompt": m.prompt,
            "response": m.response,
            "start": m.text.positions[0],
            "token_ids": m.text.token_ids,
        }
        for n, m in enumerate(texts)
    ]
    replace_text(out / "texts.jsonl", json_lines(rows, ascii_only=False))


def write_results(
    out: Path,
    config: AnalysisConfig,
    found: Sequence[Analysis],
    how: str,
    own_tokens: bool,
    facts: Sequence[str] = (),
) -> None:
    """Writes tables, summary, figures and report of the models measured so far. Every file except
    the figures is replaced atomically. facts: sentences for the report on what was analysed."""
    notes = [OWN_TOKENS] if own_tokens else []
    notes += [note for each in found for note in each.notes()]
    _write_table(
        out / "tokens.parquet",
        tables.TOKENS,
        (b for each in found for b in tables.token_rows(each)),
    )
    _write_table(
        out / "top_tokens.parquet",
        tables.TOP_TOKENS,
        (b for each in found for b in tables.top_rows(each)),
    )
    summary = {
        "responses": how,
        "same_tokens": not own_tokens,
        "temperature": config.temperature,
        "models": [each.summary() for each in found],
    }
    replace_text(
        out / "summary.json", json.dumps(_plain(summary), indent=1, allow_nan=False) + "\n"
    )
    write_analysis_report(out, found, facts, notes)


def _write_table(file: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Writes one row group per text, so that the whole table is never in memory."""
    partial = file.with_name(f".{file.name}")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
    partial.replace(file)


def _plain(value: Any) -> Any:
    """Rounds floats to seven digits for JSON, and replaces those that are not finite by null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
