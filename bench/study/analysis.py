"""Keeps the curves of an analysis for docs/internal_policies.md, and makes its table of them.

python -m bupo.analyze ... --out ANALYSIS
python bench/study/analysis.py ANALYSIS NAME      adds a line to bench/results/analysis_NAME.jsonl
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rows import RESULTS, Cells, Row, append, table

COLUMNS = (
    ("norm of H^l", "norm.layer", ".0f"),
    ("entropy", "entropy.layer", ".2f"),
    ("with the norm", "entropy.layer_normed", ".2f"),
    ("entropy that the FFN reads", "entropy.ffn_input", ".1f"),
    ("dH_FFN", "entropy_change.ffn", ".1f"),
    ("same token", "agreement.layer", ".1%"),
    ("with the norm", "agreement.layer_normed", ".1%"),
    ("KL", "kl.layer", ".1f"),
    ("with the norm", "kl.layer_normed", ".1f"),
)
"""Titles, curves of summary.json, and how their values are written"""


def analysis_table(rows: list[Row]) -> str:
    """Figures of every fifth layer, of the last but one, and of the last."""
    run = rows[-1]
    depth, curves = run["layers"], run["curves"]
    shown = sorted({1, *range(5, depth + 1, 5), depth - 1, depth})
    cells: list[Cells] = [
        [str(layer), *(format(curves[key][layer - 1], form) for _, key, form in COLUMNS)]
        for layer in shown
    ]
    titles = ("layer", *(title for title, _, _ in COLUMNS))
    return (
        f"{table(titles, cells)}\n\n"
        f"{run['tokens']} tokens of {run['texts']} texts, with or without the final norm. The "
        f"model's own entropy is {run['entropy']:.2f}, and ln V is {run['largest_entropy']:.2f}. "
        'The columns "same token" are the share of tokens for which the policy\'s likeliest token '
        f"is the model's; KL is to the model. {run['date'][:10]}, torch {run['torch']}."
    )


def main(folder: Path, name: str) -> None:
    from measure import environment

    (model,) = json.loads((folder / "summary.json").read_text())["models"]
    row = {key: model[key] for key in ("name", "layers", "texts", "tokens", "largest_entropy")}
    row["entropy"] = model["model"]["final_entropy"]["mean"]
    row["curves"] = {
        key: [round(value, 5) for value in model["curves"][key]["mean"]] for _, key, _ in COLUMNS
    }
    append(RESULTS / f"analysis_{name}.jsonl", environment("cpu", 2), [row])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
