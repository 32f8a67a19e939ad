"""bupo.internal.analyse: every column of its tables against whole logits in float64."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from fake_clock import Clock
from internal_samples import build, ids, layers_of, split_at
from torch import Tensor, nn

from bupo import progress
from bupo.internal import (
    Analysis,
    IdentityError,
    analyse,
    budget,
    distances,
    identities,
    kl_between,
)
from bupo.internal.analysis import kept_layers
from bupo.policy import decoder_stack, unembedding
from bupo.samples import Sample

VOCAB = families.VOCAB
DEPTH = families.DEPTH
TEXTS = ((7, 3), (12, 1), (7, 6))
"""Lengths and starts"""


def texts() -> list[Sample]:
    return [split_at(ids(n + 30 * k)[-n:], start) for k, (n, start) in enumerate(TEXTS)]


Row = dict[str, Any]


def literal(
    model: nn.Module, texts: list[Sample], top_k: int, temperature: float
) -> dict[tuple, Row]:
    """What tokens.parquet must hold, by (text, position, layer, policy): slowly, in float64."""
    model = model.double()
    head, norm = unembedding(model), decoder_stack(model).norm
    found: dict[tuple, Row] = {}

    def logp(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (head.logits(x) / temperature).log_softmax(-1)

    def entropy(x: Tensor) -> float:
        return float(-(logp(x).exp() * logp(x)).sum())

    for number, text in enumerate(texts):
        tokens = torch.tensor([text.token_ids])
        with torch.no_grad():
            final = (model(tokens).logits[0] / temperature).log_softmax(-1)
        layers = layers_of(model, tokens)
        for position in range(text.positions[0], len(text.token_ids)):
            at, target = position - 1, text.token_ids[position]
            key = (number, position)
            found[(*key, 0, "embedding")] = {"entropy": entropy(layers[0].before[0, at])}
            found[(*key, DEPTH, "final")] = {
                "entropy": float(-(final[at].exp() * final[at]).sum()),
                "logprob": float(final[at, target]),
            }
            for layer in layers:
                stream = layer.before if layer.parallel else layer.before + layer.attention
                wrote = {
                    "layer": (layer.after, layer.before, None),
                    "attention": (layer.attention, layer.attention_input, layer.before),
                    "ffn": (layer.ffn, layer.ffn_input, stream),
                }
                for policy, (x, read, onto) in wrote.items():
                    row: Row = {"norm": float(x[0, at].norm())}
                    with torch.no_grad():
                        views = {"": x[0, at], "_normed": norm(x)[0, at]}
                    for suffix, hidden in views.items():
                        q = logp(hidden)
                        row |= {
                            f"entropy{suffix}": entropy(hidden),
                            f"logprob{suffix}": float(q[target]),
                            f"rank{suffix}": int((q > q[target]).sum()),
                            f"kl{suffix}": float((q.exp() * (q - final[at])).sum()),
                            f"agrees{suffix}": int(q.argmax()) == int(final[at].argmax()),
                            f"top{suffix}": q.topk(top_k),
                        }
                    row["entropy_change"] = row["entropy"] - entropy(read[0, at])
                    if onto is not None:
                        a, b = x[0, at], onto[0, at]
                        row["cosine"] = float(a @ b / a.norm() / b.norm())
                    found[(*key, layer.index, policy)] = row
    model.float()
    return found


@pytest.mark.parametrize(
    ("family", "temperature"),
    [("qwen3", 0.7), ("gemma2", 1), ("olmo2", 1), ("gpt_neox-parallel", 1.5), ("bloom", 1)],
)
def test_every_column_against_a_literal_float64(family: str, temperature: float) -> None:
    """Sequential, norms behind the modules, parallel blocks, modules that add the residual."""
    model = build(family)
    found = analyse(model, texts(), name="m", closer=2, top_k=4, temperature=temperature)
    want = literal(model, texts(), 4, temperature)
    rows = found.table().to_pylist()
    assert [key_of(r) for r in rows] == sorted(want, key=by_policy) and len(rows) == len(want)
    columns = [n for n in found.table().column_names if n not in (*KEY, "model", "token_id")]
    columns.remove("token")
    filled = set()
    for row in rows:
        truth = want[key_of(row)]
        assert row["token_id"] == texts()[row["text"]].token_ids[row["position"]]
        assert row["model"] == "m" and row["token"] == f"<{row['token_id']}>"
        for name in columns:
            if name not in truth:
                assert row[name] is None, (key_of(row), name)
                continue
            filled.add(name)
            if isinstance(truth[name], float):
                assert row[name] == pytest.approx(truth[name], rel=2e-4, abs=3e-5), (row, name)
            else:
                assert row[name] == truth[name], (key_of(row), name)
    assert filled == set(columns)
    tops = found.top_table().to_pylist()
    assert {r["text"] for r in tops} == {0, 1}
    assert len(tops) == (4 + 11) * DEPTH * 2 * 4
    for row in tops:
        top = want[key_of(row)]["top" + "_normed" * row["normed"]]
        assert row["policy"] == "layer"
        assert row["top_token_id"] == int(top.indices[row["place"] - 1])
        assert row["logprob"] == pytest.approx(float(top.values[row["place"] - 1]), abs=1e-4)


KEY = ("text", "position", "layer", "policy")


def key_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def by_policy(key: tuple) -> tuple:
    """The order of the rows: text, place, layer, policy."""
    order = ["embedding", "layer", "attention", "ffn", "final"]
    return (*key[:3], order.index(key[3]))


def test_the_summary_has_the_means_over_texts() -> None:
    found = analyse(build("llama"), texts())
    summary, table = found.summary(), found.table()
    for column, name in (
        ("entropy_change", "entropy_change.ffn"),
        ("kl_normed", "kl.ffn_normed"),
        ("rank", "rank.ffn"),
        ("agrees", "agreement.ffn"),
        ("cosine", "cosine.ffn"),
    ):
        part = table.filter((pc.field("policy") == "ffn") & (pc.field("layer") == 2))
        means = [
            np.mean([r[column] for r in part.filter(pc.field("text") == k).to_pylist()])
            for k in range(3)
        ]
        curve = summary["curves"][name]
        assert curve["layers"][1] == 2
        assert curve["mean"][1] == pytest.approx(np.mean(means), abs=1e-6)
        assert curve["se"][1] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3), abs=1e-6)
    assert summary["tokens"] == 4 + 11 + 1 and summary["texts"] == 3
    alone = analyse(build("llama"), texts()[:1]).summary()
    assert alone["curves"]["entropy.layer"]["se"] is None
    assert alone["boundary"]["reason"]


def test_a_stride_keeps_the_last_layer() -> None:
    assert kept_layers(10, 4) == [1, 5, 9, 10]
    assert kept_layers(9, 4) == [1, 5, 9]
    assert kept_layers(1, 5) == [1]
    found = analyse(build("qwen3", num_hidden_layers=4), texts(), stride=2)
    whole = analyse(build("qwen3", num_hidden_layers=4), texts())
    assert found.lens.layers == found.closer.layers == [1, 3, 4]
    rows = [r for r in found.table().to_pylist() if r["policy"] == "layer"]
    others = {key_of(r): r for r in whole.table().to_pylist()}
    for row in rows:
        assert row["entropy"] == others[key_of(row)]["entropy"]
        there = row["layer"] in (1, 3, 4)
        assert row["kl"] == (others[key_of(row)]["kl"] if there else None)
    assert found.curves()["rank.layer"].layers == [1, 3, 4]
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        analyse(build("qwen3"), texts(), stride=0)


def test_top_tokens_of_the_first_tokens_alone() -> None:
    """The text is read whole, so nothing else changes."""
    found, whole = (analyse(build("qwen3"), texts(), closer_tokens=n) for n in (2, 100))
    rows = {(key_of(r), r["normed"], r["place"]): r for r in whole.top_table().to_pylist()}
    few = found.top_table().to_pylist()
    assert {(r["text"], r["position"]) for r in few} == {(0, 3), (0, 4), (1, 1), (1, 2), (2, 6)}
    for row in few:
        same = rows[key_of(row), row["normed"], row["place"]]
        assert row["top_token_id"] == same["top_token_id"]
    assert found.table() == whole.table()


def test_some_tokens_have_the_figures_that_they_have_among_all() -> None:
    model = build("qwen3")
    whole = analyse(model, texts(), closer_tokens=2)
    for tokens, counts in ((9, [4, 4, 1]), (7, [3, 3, 1]), (1, [1, 1, 1]), (100, [4, 11, 1])):
        found = analyse(model, texts(), closer_tokens=2, tokens=tokens)
        assert np.bincount(found.flow.text).tolist() == counts
        rows = {key_of(row): row for row in found.table().to_pylist()}
        of_all = {key_of(row): row for row in whole.table().to_pylist()}
        for key, row in rows.items():
            for name, value in row.items():
                same = of_all[key][name]
                if isinstance(value, float):
                    same = pytest.approx(same, rel=1e-4, abs=1e-5)
                assert value == same, name
        tops = [each.top_table()["top_token_id"].to_pylist() for each in (found, whole)]
        assert tops[0] == tops[1], "the heat maps show the first tokens"
        summary = found.summary()
        assert (summary["tokens"], summary["of_tokens"]) == (sum(counts), 16)
    drawn = [analyse(model, texts(), tokens=5, seed=seed).flow.position.tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def test_time_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a text takes 2 s, and each of its tokens that is measured 0.25 s."""
    clock, long = Clock(), [split_at(ids(64), 1) for _ in range(9)]
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=clock.monotonic))

    def measure(read: list[Sample]) -> None:
        clock.now += sum(2 + 0.25 * text.count for text in read)

    for seconds, number, of_each in ((45, 3, 12), (60, 7, 9), (120, 9, 32), (3, 2, 1)):
        begin = clock.now
        few, tokens = budget.affordable(seconds, long, measure)
        read = budget.only(long[:few], budget.some_tokens(long[:few], tokens, 0))
        measure(read)
        assert len(read) == number and min(text.count for text in read) == of_each
        assert seconds < 10 or clock.now - begin <= seconds
    short = [*long[:1], *[split_at(ids(3), 1) for _ in range(19)]]
    # A text gives 5 tokens on average, so 10 of them take 32.5 s; the probes took 29.75 s.
    assert budget.affordable(29.75 + 32.5, short, measure) == (10, 50)
    monkeypatch.undo()
    found = analyse(build("qwen3"), texts(), minutes=1e-4)
    assert len(found.numbers) == 2
    for number, text in zip(found.numbers, found.texts):
        assert text.token_ids == texts()[number].token_ids
    assert np.bincount(found.flow.text).tolist() == [1, 1]
    assert len(analyse(build("qwen3"), texts(), minutes=5).flow.text) == 16


def test_progress_rises_to_one() -> None:
    shares: list[float] = []
    with progress.watched_by(shares.append):
        analyse(build("qwen3"), texts())
    assert shares == sorted(shares) and len(shares) >= 3 * DEPTH
    assert shares[-1] == pytest.approx(1) and shares[0] < 0.2


def test_a_masked_stretch_is_read_but_not_measured() -> None:
    """Two turns of a policy with the answer of a tool between them: what the turns are measured
    with is what they are measured with where the tool's tokens count too."""
    model, tokens = build("qwen3"), ids(12).tolist()
    turns = [place in (3, 4, 5, 9, 10) for place in range(12)]
    some, every = Sample(tokens, turns), Sample.of(tokens[:3], tokens[3:])
    found, whole = analyse(model, [some], top_k=2), analyse(model, [every], top_k=2)
    assert found.flow.position.tolist() == found.closer.position.tolist() == [3, 4, 5, 9, 10]
    assert found.flow.token.tolist() == [tokens[place] for place in (3, 4, 5, 9, 10)]
    for mine, all_rows in ((found.table(), whole.table()), (found.top_table(), whole.top_table())):
        theirs = all_rows.filter(pc.is_in(all_rows["position"], pa.array([3, 4, 5, 9, 10])))
        for name in mine.column_names:
            if pa.types.is_floating(mine[name].type):
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
            else:
                assert mine[name].to_pylist() == theirs[name].to_pylist(), name
    kl = kl_between(model, [every], 1, 2)[[0, 1, 2, 6, 7]]
    np.testing.assert_allclose(kl_between(model, [some], 1, 2), kl, rtol=1e-5, atol=1e-6)
    mean = whole.flow.final_entropy[[0, 1, 2, 6, 7]].mean()
    assert distances(model, [some]).final_entropy == pytest.approx(mean, rel=1e-5)
    with pytest.raises(ValueError, match="expected measured tokens in each, got none in text 1"):
        analyse(model, [some, Sample(tokens, [False] * 12)])


@pytest.mark.parametrize("final_norm", [False, True])
def test_kl_between_layers(final_norm: bool) -> None:
    model = build("gemma2").double()
    head, norm = unembedding(model), decoder_stack(model).norm
    for l, m in ((1, 3), (3, 1), (2, None), (None, 2)):
        want = []
        for text in texts():
            tokens = torch.tensor([text.token_ids])
            layers = layers_of(model, tokens)

            def policy(layer: int | None, tokens: Tensor = tokens, layers: Any = layers) -> Tensor:
                with torch.no_grad():
                    if layer is None:
                        return (model(tokens).logits[0] / 0.6).log_softmax(-1)
                    x = layers[layer - 1].after[0]
                    return (head.logits(norm(x) if final_norm else x) / 0.6).log_softmax(-1)

            p, q = policy(l), policy(m)
            want.append((p.exp() * (p - q)).sum(-1)[text.positions[0] - 1 : -1])
        got = kl_between(model, texts(), l, m, final_norm, temperature=0.6)
        np.testing.assert_allclose(got, torch.cat(want), rtol=1e-4, atol=1e-6)
    assert kl_between(model, texts(), 2, 2).max() == 0
    with pytest.raises(ValueError, match="texts: expected at least one"):
        kl_between(model, [], 1, 2)
    with pytest.raises(ValueError, match=r"layer: expected an int in 1..3, got 4"):
        kl_between(model, texts(), 1, 4)


def analysed() -> Analysis:
    return analyse(build("llama"), texts())


def test_a_frame_for_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the command does not need."""
    found = analysed()
    frame, table = found.frame(), found.table()
    assert list(frame.columns) == table.column_names
    for name in ("token", "layer", "policy", "entropy"):
        values = frame[name].tolist()
        assert [None if v != v else v for v in values] == [
            None if v != v else v for v in table[name].to_pylist()
        ], name
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError):
        found.frame()


def test_a_violated_identity_is_named() -> None:
    flow = analysed().flow
    assert len(identities(flow, torch.float32)) == 5
    for change, name in (
        ({"decomposition_error": 1e-3}, r"\|H\^0 \+ sum A \+ sum F - H\^L\| / \|H\^L\|"),
        ({"last_layer_error": 0.5}, "last layer with final norm = the model"),
        ({"final_entropy": flow.final_entropy + 5}, "entropy <= ln V"),
        ({"embedding_entropy": flow.embedding_entropy * -1}, "entropy >= 0"),
        ({"embedding_entropy": flow.embedding_entropy * np.nan}, "figures that are not finite"),
        ({"norm": flow.norm | {"ffn": flow.norm["ffn"] * np.inf}}, "figures that are not finite"),
    ):
        before = {key: getattr(flow, key) for key in change}
        for key, value in change.items():
            setattr(flow, key, value)
        with pytest.raises(IdentityError, match=name):
            identities(flow, torch.float32)
        for key, value in before.items():
            setattr(flow, key, value)


def test_a_model_with_nan_ends_with_the_name_of_the_check() -> None:
    model = build("llama")
    with torch.no_grad():
        decoder_stack(model).layers[1].mlp.down_proj.weight[0, 0] = math.nan  # type: ignore
    with pytest.raises(ValueError, match=r"layer 2: expected H\^|figures that are not finite"):
        analyse(model, texts())


def test_a_policy_that_names_what_it_has_read_is_said() -> None:
    """A tied model whose embedding dominates the stream, as a small Llama's does for long."""
    model = build("llama-tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    found = analyse(model, texts())
    rows = found.table().filter(pc.equal(found.table()["policy"], "layer")).to_pylist()
    for n, m in enumerate(found.lens.layers):
        at = [row for row in rows if row["layer"] == m]
        same = []
        for row in at:
            read = found.texts[row["text"]].token_ids[row["position"] - 1]
            stream = layers_of(model, torch.tensor([found.texts[row["text"]].token_ids]))
            hidden = stream[m - 1].after[0, row["position"] - 1]
            same.append(int(unembedding(model).logits(hidden).argmax()) == read)
        assert found.echo("layer")[n] == pytest.approx(sum(same) / len(same))
    assert found.echo("layer")[0] > 0.5
    (note,) = found.notes()
    assert note.startswith("model: in layers 1") and "read the curves with the final norm" in note
    assert found.summary()["notes"] == [note]
    assert found.summary()["echo"]["layer"] == found.echo("layer").tolist()
    assert not analyse(build("llama"), texts()).notes(), "untied: nothing to echo with"
