"""Models by the three commands: what is wrong with a model is one line, before training."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rl_samples import tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from bupo import analyze, evaluate, run
from bupo.commands.models import check_place, load_model, read_model
from bupo.config import Config, ConfigError
from bupo.tasks import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 12  # bytes of the longest prompt, a token each
COMMANDS = pytest.mark.parametrize("command", ["run", "evaluate", "analyze"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random model with a head of its own."""
    options = {"layers": 2, "width": 32, "tied": False}
    files = tiny.prepare(options, tmp_path)
    tiny.build(options, files.model)
    return files.model


def change(model: Path, **settings: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_weights(model: Path, act: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    act(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def start(command: str, model: Path, *more: str) -> int:
    """With prompts of up to LONGEST tokens and one response token each."""
    data = model.parent / "data.jsonl"
    rows = [{"prompt": "x" * n, "answer": "1"} for n in range(LONGEST - 3, LONGEST + 1)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={model}", "rollout.max_new_tokens=4", *more]
    out = ["--out", str(model.parent / "out")]
    if command == "analyze":
        return analyze.main([*out, "--data", str(data), *settings])
    settings += ["reward.function=bupo.tasks.arithmetic:reward", f"eval.files=[{data}]"]
    if command == "evaluate":
        return evaluate.main([*out, *settings, "eval.samples=1"])
    settings += ["task=null", f"data.train=[{data}]", "rollout.prompts=4", "bupo.layer=1"]
    settings += ["steps=1", "bupo.steps=0", "rollout.samples=2", "diagnostics.every=0"]
    return run.main([*out, *settings])


def last_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Of what went wrong; all before it is the plan."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"bupo.{command}: "), lines
    assert not any("REPORT" in line or "Traceback" in line for line in lines), lines
    return lines[-1]


@COMMANDS
def test_missing_weights_are_not_made_up(
    command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert start(command, model) == 2
    line = last_line(capsys, command)
    assert "model.layers.1.mlp.up_proj.weight is missing" in line and str(model) in line
    assert not (model.parent / "out/metrics.jsonl").exists()


def test_many_missing_weights_are_counted(model: Path) -> None:
    change_weights(model, lambda weights: [weights.pop(n) for n in list(weights) if ".1." in n])
    with pytest.raises(ConfigError, match=r"missing, .* is missing and 8 more; get intact files"):
        load_model(Config(), str(model))


def test_weights_of_another_shape(model: Path) -> None:
    change_weights(model, lambda w: w.update({"model.norm.weight": torch.ones(7)}))
    message = r"model\.norm\.weight is \[7\] in the files, \[32\] in config\.json"
    with pytest.raises(ConfigError, match=message):
        load_model(Config(), str(model))


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    options = {"layers": 2, "width": 32}
    files = tiny.prepare(options, tmp_path)
    tiny.build(options, files.model)
    assert "lm_head.weight" not in load_file(files.model / "model.safetensors")
    loaded = load_model(Config(), str(files.model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "model.layers.0.mlp.up_proj.weight: 1 of 3072 values are not finite"),
        (3e38, "cannot be trained: check_internal_policy: model of family 'qwen3', layer"),
    ],
)
def test_weights_that_are_no_numbers(
    value: float, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value

    change_weights(model, spoil)
    assert start("run", model) == 2
    assert message in last_line(capsys, "run")


def test_a_cut_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert start("run", model) == 2
    assert "cannot be loaded: Error while deserializing header" in last_line(capsys, "run")


@COMMANDS
def test_prompt_and_response_fit_the_context(
    command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, max_position_embeddings=LONGEST + 4)
    assert start(command, model, "--dry_run") == 0
    change(model, max_position_embeddings=LONGEST + 3)
    capsys.readouterr()
    assert start(command, model, "--dry_run") == 2
    message = "a prompt of 12 tokens and rollout.max_new_tokens=4 exceed the 15 positions of"
    assert message in last_line(capsys, command)


@COMMANDS
def test_tokenizer_of_another_model(
    command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    highest = tiny_tokenizer(model.parent / "other").convert_tokens_to_ids("x")
    change(model, vocab_size=highest + 1, pad_token_id=0)
    assert start(command, model, "--dry_run") == 0
    change(model, vocab_size=highest)
    capsys.readouterr()
    assert start(command, model, "--dry_run") == 2
    assert f"its tokenizer has 259 tokens, but its model only {highest}" in last_line(
        capsys, command
    )


def test_a_configuration_that_describes_no_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, vocab_size=200, pad_token_id=250)
    assert start("run", model, "--dry_run") == 2
    assert "cannot be built from its config.json: Padding_idx must" in last_line(capsys, "run")


def test_measured_texts_have_embeddings_too(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, vocab_size=8)
    assert start("analyze", model, "responses=none", "--dry_run") == 2
    assert "its tokenizer has 259 tokens, but its model only 8" in last_line(capsys, "analyze")


@pytest.mark.parametrize(
    "kind",
    [
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=300),
        T5Config(d_model=32, num_layers=2, num_heads=2, vocab_size=300),
    ],
    ids=["bert", "t5"],
)
@COMMANDS
def test_what_is_no_causal_lm(
    kind: Any, command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind.save_pretrained(model)
    assert start(command, model, "--dry_run") == 2
    assert f"not a causal LM: models of family {kind.model_type} " in last_line(capsys, command)


@pytest.mark.parametrize("name", ["runs/x/checkpoints/y", "./x", "/nowhere/x", "a b/c", "~/m"])
def test_what_is_no_hub_name_is_a_missing_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.path={name}: folder not found$"):
        check_place("model.path", name)
    for allowed in ("gpt2", "Qwen/Qwen3-4B", "runs/mine"):
        check_place("model.path", allowed)


def test_without_a_network_one_line_tells_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")  # its warnings are a line a retry

    def unreachable(name: str) -> None:
        assert logger.isEnabledFor(logging.ERROR) and not logger.isEnabledFor(logging.WARNING)
        raise OSError(f"We couldn't connect to 'https://huggingface.co' for {name}.\nAnd more.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    message = "no such folder, and reading it .* hub failed: .* set HF_HUB_OFFLINE=1$"
    with pytest.raises(ConfigError, match=message):
        read_model(Config(), "runs/mine")
    assert logger.isEnabledFor(logging.WARNING)


def test_a_folder_without_a_model_is_no_question_of_the_network(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()
    with pytest.raises(ConfigError) as error:
        read_model(Config(), str(model))
    assert "HF_HUB_OFFLINE" not in str(error.value)
