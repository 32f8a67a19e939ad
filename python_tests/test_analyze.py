"""python -m bupo.analyze: the real program, from data of every kind to tables and report."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import run_samples
import torch
from analyze_samples import BUILT_IN, chats_file, one_line, texts_of, tiny_model, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo import config
from bupo.analyze import main
from bupo.commands import analysis_plan
from bupo.commands.analysis_texts import Measured, _one_beginning, choose_rows, measurable
from bupo.policy import decoder_stack, unembedding


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chats_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in task, with generated responses."""
    out = tmp_path_factory.mktemp("analyze") / "whole"
    assert main(["--out", str(out), *BUILT_IN]) == 0
    return out


def test_everything_is_written(whole: Path) -> None:
    names = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    figures = ("entropy_flow", "entropy_change", "scale", "to_model", "residual_cosines")
    want = {f"figures/{n}.{kind}" for n in (*figures, "layer_cosines") for kind in ("png", "svg")}
    want |= {"config.yaml", "texts.jsonl", "tokens.parquet", "top_tokens.parquet"}
    assert names == want | {"summary.json", "report.html"}


def test_the_same_settings_give_the_same_files(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert main(["--config", str(whole / "config.yaml"), "--out", str(out)]) == 0
    for name in ("texts.jsonl", "summary.json", "tokens.parquet", "figures/entropy_flow.svg"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert (out / "report.html").read_text() == (whole / "report.html").read_text()


def test_generated_responses_are_measured_token_for_token(whole: Path) -> None:
    table, texts = tokens_of(whole), texts_of(whole)
    assert len(texts) == 12
    for n, text in enumerate(texts):
        final = table.filter((pc.field("text") == n) & (pc.field("policy") == "final"))
        assert final["token_id"].to_pylist() == text["token_ids"][text["start"] :]
        places = range(text["start"], len(text["token_ids"]))
        assert final["position"].to_pylist() == list(places)
        assert text["start"] == len(text["prompt"]), "a token a character"
    assert len({tuple(t["token_ids"][t["start"] :]) for t in texts}) > 6, "they are sampled"


def test_the_summary_is_that_of_the_table(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    (of_model,) = summary["models"]
    table = tokens_of(whole)
    ffn = table.filter((pc.field("policy") == "ffn") & (pc.field("layer") == 2))
    means = ffn.group_by("text").aggregate([("entropy_change", "mean")])["entropy_change_mean"]
    curve = of_model["curves"]["entropy_change.ffn"]
    assert curve["mean"][1] == pytest.approx(np.mean(means), abs=1e-5)
    assert curve["se"][1] == pytest.approx(np.std(means, ddof=1) / math.sqrt(12), abs=1e-5)
    assert of_model["boundary"]["curve"] == pytest.approx(curve["mean"], abs=1e-5)
    assert of_model["tokens"] == len(table.filter(pc.field("policy") == "final"))
    assert len(of_model["checks"]) == 5
    assert all(c["value"] <= c["limit"] for c in of_model["checks"])
    assert summary["responses"] == "generate" and summary["same_tokens"]


def test_the_column_of_responses(model: str, chats: str, tmp_path: Path) -> None:
    """Their place is counted in ids: a prompt that says "Assistant:" misleads nobody."""
    out = tmp_path / "out"
    assert main(["--model", model, "--data", chats, "--out", str(out)]) == 0
    texts, tokenizer = texts_of(out), AutoTokenizer.from_pretrained(model)
    assert len(texts) == 4, "one a prompt"
    assert {t["response"] for t in texts} >= {"It is 2.", "It is 3.", "It is 4."}
    for text in texts:
        assert tokenizer.decode(text["token_ids"][text["start"] :]) == text["response"]
        assert tokenizer.decode(text["token_ids"][: text["start"]]) == text["prompt"]
        assert text["prompt"].endswith("<|im_start|>assistant\n")
    # The figures are those of the model itself on the same ids.
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    head, norm = unembedding(network), decoder_stack(network).norm
    table = tokens_of(out)
    for n, text in enumerate(texts):
        with torch.no_grad():
            ids = torch.tensor([text["token_ids"]])
            states = network(ids, output_hidden_states=True).hidden_states
            places = slice(text["start"] - 1, -1)
            raw = head.logits(states[2])[0, places].log_softmax(-1)
            normed = head.logits(norm(states[2]))[0, places].log_softmax(-1)
        mine = table.filter(
            (pc.field("text") == n) & (pc.field("policy") == "layer") & (pc.field("layer") == 2)
        )
        for column, logp in (("entropy", raw), ("entropy_normed", normed)):
            np.testing.assert_allclose(mine[column], -(logp.exp() * logp).sum(-1), atol=1e-4)
        target = ids[0, text["start"] :, None]
        np.testing.assert_allclose(mine["logprob"], raw.gather(1, target)[:, 0], atol=1e-4)


def test_texts_of_an_analysis_are_data_again(whole: Path, tmp_path: Path) -> None:
    """As a run's rollouts are: prompt and response as strings, without special tokens."""
    out, data = tmp_path / "out", tmp_path / "texts.jsonl"
    data.write_text((whole / "texts.jsonl").read_text().replace('"response"', '"said"'))
    command = ["--model", source_of(whole), "--data", str(data), "--out", str(out)]
    assert main([*command, "responses=column", "response=said"]) == 0
    before = {f"row {t['text']} of {data}": t for t in texts_of(whole)}
    assert len(texts_of(out)) > 6
    for text in texts_of(out):
        same = before[text["where"]]
        assert text["start"] == same["start"] and text["prompt"] == same["prompt"]
        said = [t for t in same["token_ids"][same["start"] :] if t > 1]
        assert text["token_ids"][text["start"] :] == said


def source_of(out: Path) -> str:
    """The task's model, from the first line of the page."""
    page = (out / "report.html").read_text()
    return page.split('<p class="lead">')[1].split(" on responses")[0]


@pytest.mark.parametrize(
    ("options", "count"), [([], 3), (["data.limit=1"], 1), (["whole_files=true"], 1)]
)
def test_text_files(options: list[str], count: int, model: str, tmp_path: Path) -> None:
    file, out = tmp_path / "book.txt", tmp_path / "out"
    file.write_text("First line.\n\nThe second\nx\nand the last one\n")
    assert main(["--model", model, "--data", str(file), "--out", str(out), *options]) == 0
    texts = texts_of(out)
    assert len(texts) == count and all(t["start"] == 1 for t in texts), "one token is no text"
    said = AutoTokenizer.from_pretrained(model).decode(texts[0]["token_ids"])
    assert said == (file.read_text() if "whole_files=true" in options else "First line.")


def test_a_long_text_is_measured_whole(model: str, tmp_path: Path) -> None:
    """Longer than a batch, and than what is kept for the cosines between layers."""
    file, out = tmp_path / "book.txt", tmp_path / "out"
    file.write_text("abcdefg " * 560)
    long = tiny_model(tmp_path / "models", layers=2)
    settings = json.loads((Path(long) / "config.json").read_text())
    settings["max_position_embeddings"] = 8192
    (Path(long) / "config.json").write_text(json.dumps(settings))
    command = ["--data", str(file), "--out", str(out), "whole_files=true", "batch_tokens=512"]
    assert main(["--model", long, *command]) == 0
    assert len(tokens_of(out).filter(pc.field("policy") == "final")) == 560 * 8 - 1
    found = json.loads((out / "summary.json").read_text())["models"][0]
    np.testing.assert_allclose(np.diag(found["similarity"]), 1, atol=1e-4)


def test_prompts_themselves_and_a_cut(model: str, chats: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--model", model, "--data", chats, "--out", str(out), "max_tokens=9"]
    assert main([*command, "responses=none", "data.max_prompt_tokens=3"]) == 0
    for text in texts_of(out):
        assert len(text["token_ids"]) == 9 and text["start"] == 1


def test_a_comparison_within_minutes(model: str, chats: str, tmp_path: Path) -> None:
    """Both models are measured on the same tokens of the texts that are listed."""
    out, other = tmp_path / "out", tiny_model(tmp_path, seed=1, layers=2, family="llama")
    command = ["--data", chats, "responses=column", f"compare={other}", "heat_maps=1"]
    assert main(["--model", model, "--out", str(out), *command, "--minutes", "1e-4"]) == 0
    table, texts = tokens_of(out), texts_of(out)
    final = table.filter(pc.field("policy") == "final").to_pylist()
    names = list(dict.fromkeys(row["model"] for row in final))
    places = [
        [(row["text"], row["position"]) for row in final if row["model"] == name] for name in names
    ]
    assert places[0] == places[1] and len(places[0]) == len(texts) == 2
    tops = pq.read_table(out / "top_tokens.parquet").to_pylist()
    shown = [{(r["text"], r["position"]) for r in tops if r["model"] == name} for name in names]
    assert shown[0] == shown[1] and len(shown[0]) == 1
    for row in final:
        assert texts[row["text"]]["token_ids"][row["position"]] == row["token_id"]
    with pytest.raises(config.ConfigError, match=r"minutes=1.0 and tokens=3 are both set"):
        config.AnalysisConfig(minutes=1.0, tokens=3)


def test_a_comparison_on_the_same_tokens(model: str, chats: str, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tiny_model(tmp_path, seed=1, layers=2, family="llama")
    command = ["--data", chats, "responses=column", f"compare={other}"]
    assert main(["--model", model, "--out", str(out), *command]) == 0
    table = tokens_of(out)
    names = pc.unique(table["model"]).to_pylist()
    assert len(names) == 2 and names[0] != names[1]
    ids = [
        table.filter((pc.field("model") == n) & (pc.field("policy") == "final"))["token_id"]
        for n in names
    ]
    assert ids[0].to_pylist() == ids[1].to_pylist()
    summary = json.loads((out / "summary.json").read_text())
    assert [m["layers"] for m in summary["models"]] == [3, 2] and summary["same_tokens"]
    alone = tmp_path / "alone"
    assert main(["--model", other, "--data", chats, "--out", str(alone)]) == 0
    second = table.filter(pc.field("model") == names[1])
    np.testing.assert_array_equal(second["entropy"], tokens_of(alone)["entropy"])
    page = (out / "report.html").read_text()
    assert page.count("holds</tr>") == 5 and "different tokenizers" not in page


def test_a_comparison_of_two_tokenizers_says_so(whole: Path, tmp_path: Path) -> None:
    """Each on its own tokens of the same texts."""
    other, out = tiny_model(tmp_path, layers=1), tmp_path / "out"
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "12+5=", "response": "17#"}\n{"prompt": "3=", "response": "3"}\n')
    command = ["--model", other, "--data", str(file), f"compare={source_of(whole)}"]
    assert main(["--out", str(out), *command]) == 0
    assert not json.loads((out / "summary.json").read_text())["same_tokens"]
    assert "different tokenizers" in (out / "report.html").read_text()
    table = tokens_of(out).filter(pc.field("policy") == "final")
    for name in pc.unique(table["model"]).to_pylist():
        mine = table.filter(pc.field("model") == name)
        assert "".join(mine["token"].to_pylist()) == "17#3"
    assert len(pc.unique(table["token_id"])) > 4, "two vocabularies"


def test_a_comparison_on_fewer_texts_than_the_first_had_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers would be those of other texts: the second tokenizer takes bytes."""
    other, file = tiny_model(tmp_path, layers=1), tmp_path / "sums.jsonl"
    rows = [{"prompt": "é3=", "response": "17#"}, {"prompt": "3=", "response": "3"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", source_of(whole), "--data", str(file), f"compare={other}"]
    limit = ["data.max_prompt_tokens=3", "data.overlong=drop"]
    assert main(["--out", str(tmp_path / "out"), *command, *limit]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "row 0 of" in error and "can be measured by" in error and "but not by" in error


def test_a_run_and_its_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory is its newest checkpoint; its rollouts are measured as they were."""
    run, out = tmp_path / "mine", tmp_path / "out"
    assert run_samples.run(run, "steps=2", "bupo.steps=1", "checkpoint.every=1") == 0
    rollouts = run / "rollouts/step_000002.jsonl"
    first = run / "checkpoints/step_000001"
    command = ["--model", str(run), "--data", str(rollouts), f"compare={first}", "--out", str(out)]
    assert main(command) == 0
    written = [json.loads(line) for line in rollouts.read_text().splitlines()]
    said = {(row["prompt"], row["response"]) for row in written}
    texts = texts_of(out)
    assert texts and {(t["prompt"], t["response"]) for t in texts} <= said
    assert len({t["prompt"] for t in texts}) == len(texts)
    names = pc.unique(tokens_of(out)["model"]).to_pylist()
    assert names == ["mine/step_000002", "mine/step_000001"]
    (tmp_path / "none/checkpoints").mkdir(parents=True)
    command = ["--model", str(tmp_path / "none"), "--data", str(rollouts)]
    assert main([*command, "--out", str(tmp_path / "x")]) == 2
    assert "a run directory without a complete checkpoint" in capsys.readouterr().err


def test_a_model_in_bfloat16(model: str, chats: str, tmp_path: Path) -> None:
    command = ["--model", model, "--data", chats, "responses=column"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert main([*command, "--out", str(tmp_path / "b"), "model.compute_dtype=bfloat16"]) == 0
    exact, coarse = (tokens_of(tmp_path / name) for name in "ab")
    np.testing.assert_allclose(exact["logprob"], coarse["logprob"], atol=0.05)
    assert exact["logprob"] != coarse["logprob"]


def test_an_analysis_with_other_settings_is_kept(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "summary.json").read_bytes()
    assert main(["--out", str(whole), *BUILT_IN, "top_k=2"]) == 2
    assert "holds an analysis with different settings (top_k: 5 -> 2)" in one_line(capsys)
    assert (whole / "summary.json").read_bytes() == before


def test_dry_run_writes_nothing(
    model: str, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--model", model, "--data", chats, f"compare={model}", "--dry_run"]
    assert main(["--out", str(out), *command, "responses=generate"]) == 0
    said = capsys.readouterr().err
    assert "4 of 5, one response to each by hf" in said and "compared" in said and "qwen3" in said
    assert re.search(r"  time     at most about (\d+ s|\d+ minutes) to measure, not count", said)
    assert not out.exists()


def test_the_plan_knows_the_budget(
    model: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that measures a token a second."""
    monkeypatch.setattr(analysis_plan, "_measuring_time", lambda config, sizes, tokens: tokens)
    common = ["responses=column", "heat_maps=1", "heat_map_tokens=2"]

    def seconds(*options: str) -> str:
        given = [f"model.path={model}", f"data.train=[{chats}]", *common, *options]
        loaded = config.read(None, given, config.AnalysisConfig)
        text = analysis_plan.make_plan(loaded, tmp_path / "out").describe()
        return re.search(r"about (.*) to measure", text)[1]

    every = int(seconds().removesuffix(" s"))
    assert every > 12 and seconds("tokens=3") == "5 s" and seconds("minutes=0.1") == "6 s"


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    for key, _, text in config.describe(config.AnalysisConfig):
        assert f"  {key} = " in shown and len(text) > 10, key


def test_a_second_beginning_is_taken_off(model: str) -> None:
    """A recorded prompt begins with the template's own beginning-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<|im_start|>"
    begin = tokenizer.bos_token_id
    assert _one_beginning([begin, begin, 5], tokenizer) == [begin, 5]
    assert _one_beginning([begin, 5, begin], tokenizer) == [begin, 5, begin]


def test_rows_are_drawn_by_the_seed(chats: str) -> None:
    def drawn(seed: int) -> list[str]:
        settings = config.read(None, ["prompts=2", f"seed={seed}"], config.AnalysisConfig)
        rows, how, available = choose_rows(settings, [chats])
        assert (how, available, len(rows)) == ("column", 5, 2)
        return [row.where for row in rows]

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 2


def test_empty_responses_are_left_out(model: str) -> None:
    texts = [Measured("a", "p", "", [1, 2], []), Measured("b", "p", "r", [1, 2], [3])]
    assert [m.where for m in measurable(texts, None)] == ["b"]
