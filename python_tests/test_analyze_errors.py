"""python -m bupo.analyze: mistakes, broken models and Ctrl-C end with a line that says why."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from analyze_samples import chats_file, one_line, tiny_model, tokens_of
from transformers import AutoModelForCausalLM

from bupo import internal
from bupo.analyze import main
from bupo.internal import IdentityError, analysis


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chats_file(tmp_path_factory.mktemp("data"))


def test_nothing_given_tells_how_to_try_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--out", str(tmp_path / "x")]) == 2
    assert "to try it without either: task=bupo.tasks.arithmetic" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("top_q=3", "unknown key top_q; did you mean top_k?"),
        ("top_k=0", "top_k must be at least 1, got 0"),
        ("responses=made", "responses must be one of auto, generate, column, none, got 'made'"),
        ("response=said", "row 0 of {data} has no text in column said (found: prompt, reward"),
        ("max_tokens=1", "max_tokens must be at least 2 or null, got 1"),
        ("compare=/nowhere", "/nowhere: folder not found"),
        ("data.max_prompt_tokens=5", "4 of 4 prompts exceed data.max_prompt_tokens=5"),
        ("tolerance=1", "tolerance must be at least 0 and below 1, got 1"),
        ("data.chat_template=none.jinja", "data.chat_template=none.jinja: file not found"),
        ("max_tokens=20", "no text has a token to measure"),
    ],
)
def test_mistakes_give_one_line(
    change: str,
    message: str,
    model: str,
    chats: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["--model", model, "--data", chats, "responses=column", change]
    assert main(["--out", str(out), *command]) == 2
    line = one_line(capsys)
    assert line.startswith("bupo.analyze: ") and message.format(data=chats) in line, line
    assert not out.exists()


def test_data_that_is_not_there(
    model: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data, message in (
        ([], "no data: --data FILE"),
        (["--data", "gone.txt"], "data file not found: gone.txt"),
        (["--data", str(tmp_path / "empty.txt")], "no texts in"),
        (["--data", str(tmp_path / "empty.txt"), "--data", chats], "cannot be mixed"),
    ):
        (tmp_path / "empty.txt").write_text(" \n")
        assert main(["--model", model, "--out", str(tmp_path / "out"), *data]) == 2
        assert message in one_line(capsys)


def test_a_text_beyond_the_models_positions(
    model: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("x" * 4097)
    command = ["--model", model, "--data", str(file), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    said = one_line(capsys)
    assert "line 1 of" in said and "has 4097 tokens, but the model has only 4096 positions" in said
    assert "max_tokens=N" in said
    command = ["--model", model, "--data", chats, "responses=generate", "rollout.max_new_tokens="]
    command[-1] += "4090"
    assert main(["--out", str(tmp_path / "out"), *command]) == 2
    assert "exceed the 4096 positions" in one_line(capsys)


def test_a_text_beyond_the_positions_of_the_compared_model(
    model: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known before the first model is loaded."""
    other, out = tiny_model(tmp_path, layers=1), tmp_path / "out"
    settings = json.loads((Path(other) / "config.json").read_text())
    settings["max_position_embeddings"] = 30
    (Path(other) / "config.json").write_text(json.dumps(settings))
    command = ["--model", model, "--data", chats, f"compare={other}", "--out", str(out)]
    assert main(command) == 2
    assert "the model has only 30 positions" in one_line(capsys)


def test_a_violated_identity_ends_with_its_name(
    model: str,
    chats: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def violated(*_: object) -> None:
        raise IdentityError("last layer with final norm = the model, nats: expected at most 0")

    monkeypatch.setattr(analysis, "identities", violated)
    out = tmp_path / "out"
    assert main(["--model", model, "--data", chats, "--out", str(out)]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("bupo.analyze: ") and "last layer with final norm" in last
    assert not (out / "tokens.parquet").exists()


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (True, "down_proj.weight: 1 of 3072 values are not finite"),
        (False, "cannot be analysed: model of family 'qwen3', layer 2: expected H^"),
    ],
)
def test_a_broken_model_is_one_line(
    seen: bool,
    message: str,
    chats: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the weights show it or not."""
    if not seen:
        monkeypatch.setattr("bupo.finite.first_bad", lambda tensors: None)
    broken = tiny_model(tmp_path)
    network = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    network.save_pretrained(broken)
    assert main(["--model", broken, "--data", chats, "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_more_top_tokens_than_the_vocabulary_has(
    model: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", model, "--data", chats, "top_k=500", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "top_k=500 exceeds the 275 tokens of the vocabulary" in capsys.readouterr().err


def test_ctrl_c_leaves_the_first_model_of_a_comparison(
    model: str,
    chats: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = internal.analyse, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(internal, "analyse", interrupted)
    out = tmp_path / "out"
    assert main(["--model", model, "--data", chats, "--out", str(out), f"compare={model}"]) == 130
    assert "holds what was written" in capsys.readouterr().err
    assert len(json.loads((out / "summary.json").read_text())["models"]) == 1
    assert (out / "report.html").exists() and len(tokens_of(out)) > 0
