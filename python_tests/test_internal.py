"""Internal policies read: decomposition, entropies against literal float64, the boundary rule."""

import math
import sys
from itertools import pairwise
from typing import Any

import families
import numpy as np
import pytest
import torch
from internal_samples import build, ids, layers_of, split_at
from torch import Tensor, nn

from bupo.internal import (
    DecompositionError,
    Sample,
    boundary_layer,
    convergence,
    entropy_flow,
    identities,
    lens,
)
from bupo.internal.boundary import segments
from bupo.internal.decomposition import rounding
from bupo.internal.log_probs import log_probs
from bupo.policy import decoder_stack, unembedding

VOCAB = families.VOCAB


@pytest.mark.parametrize("family", families.FAMILIES)
def test_writes_add_up_to_the_stream(family: str) -> None:
    """H^0 + sum A + sum F = H^L, and each layer begins where the last one ended."""
    model = build(family)
    found = layers_of(model, ids(2, 7))
    assert [layer.index for layer in found] == list(range(1, families.DEPTH + 1))
    total = found[0].before.double()
    for layer in found:
        total = total + layer.attention.double() + layer.ffn.double()
        assert layer.error < 1e-6
        assert layer.attention.norm() > 0 and layer.ffn.norm() > 0
    torch.testing.assert_close(total, found[-1].after.double(), rtol=1e-5, atol=1e-5)
    for earlier, later in pairwise(found):
        assert torch.equal(earlier.after, later.before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# family: (module whose output attention writes, the same of the FFN, factor, parallel)
INNER: dict[str, tuple[str, str, float, bool]] = {
    "qwen3": ("self_attn.o_proj", "mlp.down_proj", 1.0, False),
    "llama": ("self_attn.o_proj", "mlp.down_proj", 1.0, False),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0, False),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", 1.0, False),
    "granite": ("self_attn.o_proj", "mlp.down_proj", 0.5, False),
    "phi": ("self_attn.dense", "mlp.fc2", 1.0, True),
    "gpt2": ("attn.c_proj", "mlp.c_proj", 1.0, False),
    "gpt_neox-parallel": ("attention.dense", "mlp.dense_4h_to_h", 1.0, True),
    "gpt_neox-sequential": ("attention.dense", "mlp.dense_4h_to_h", 1.0, False),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0, False),
    "falcon-parallel": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0, True),
    "falcon-sequential": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0, False),
    "falcon-new": ("self_attention.dense", "mlp.dense_4h_to_h", 1.0, True),
    "cohere": ("self_attn.o_proj", "mlp.down_proj", 1.0, True),
    "opt": ("self_attn.out_proj", "fc2", 1.0, False),
}


@pytest.mark.parametrize("family", INNER)
def test_writes_are_those_of_the_last_projections(family: str) -> None:
    attention, ffn, factor, parallel = INNER[family]
    model = build(family, **({"residual_multiplier": factor} if factor != 1 else {}))
    written: dict[str, list[Tensor]] = {"attention": [], "ffn": []}
    for layer in decoder_stack(model).layers:
        for name, path in (("attention", attention), ("ffn", ffn)):
            layer.get_submodule(path).register_forward_hook(
                lambda _, __, out, name=name: written[name].append(out.clone())
            )
    for k, layer in enumerate(layers_of(model, ids(2, 7))):
        assert layer.parallel == parallel
        for name in written:
            own = written[name][k].reshape(getattr(layer, name).shape) * factor
            torch.testing.assert_close(getattr(layer, name), own, rtol=1e-4, atol=1e-5)


def test_writes_keep_their_precision_in_bfloat16() -> None:
    """On a large stream the difference of two roundings would be noise."""
    model = build("qwen3")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    exact = layers_of(model, ids(1, 9))
    coarse = layers_of(model.to(torch.bfloat16), ids(1, 9))
    for a, b in zip(exact, coarse):
        for name in ("attention", "ffn"):
            x, y = getattr(a, name), getattr(b, name).float()
            assert (x - y).norm() < 0.03 * x.norm(), (a.index, name)


def test_a_layer_without_attention_is_refused_by_name() -> None:
    model = build("llama")
    for layer in decoder_stack(model).layers:
        layer.mixing = layer._modules.pop("self_attn")
        layer.mixing.__class__.__name__ = "Mixing"
        layer.forward = lambda hidden, *a, layer=layer, **k: layer.mlp(hidden) + hidden
    match = "family 'llama', layer 1: found no attention"
    with pytest.raises(DecompositionError, match=match):
        layers_of(model, ids(1, 4))


def literal(model: nn.Module, tokens: list[int], normed: bool) -> dict[str, Tensor]:
    """Entropies and log-probs of every policy in float64, [layer, place], from whole logits."""
    model = model.double()
    head, norm = unembedding(model), decoder_stack(model).norm
    found: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        with torch.no_grad():
            logp = head.logits(norm(x) if normed else x)[0, :-1].log_softmax(-1)
        found.setdefault(f"{name} entropy", []).append(-(logp.exp() * logp).sum(-1))
        next_tokens = torch.tensor(tokens[1:])[:, None]
        found.setdefault(f"{name} logprob", []).append(logp.gather(1, next_tokens).squeeze(1))

    for layer in layers_of(model, torch.tensor([tokens])):
        for name in ("before", "attention_input", "attention", "ffn_input", "ffn", "after"):
            note(name, getattr(layer, name))
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "granite", "opt", "bloom", "gpt_neox-parallel", "cohere", "gpt2"]
)
def test_entropies_against_a_literal_float64(family: str) -> None:
    model = build(family)
    texts = [split_at(ids(n), start) for n, start in ((7, 3), (11, 1), (7, 6))]
    flow = entropy_flow(model, texts)
    assert flow.text.tolist() == [0] * 4 + [1] * 10 + [2]
    assert flow.decomposition_error < 1e-6 and flow.last_layer_error < 1e-5
    names = {"layer": "after", "attention": "attention", "ffn": "ffn"}
    for number, text in enumerate(texts):
        mine = flow.text == number
        assert flow.token[mine].tolist() == text.token_ids[text.positions[0] :]
        assert flow.position[mine].tolist() == list(range(text.positions[0], len(text.token_ids)))
        places = slice(text.positions[0] - 1, None)
        raw, normed = (literal(model, text.token_ids, n) for n in (False, True))
        model.float()

        def same(got: Any, truth: Tensor, mine: Any = mine, places: slice = places) -> None:
            want = truth[:, places].numpy()
            np.testing.assert_allclose(got[:, mine], want, rtol=1e-4, atol=2e-5)

        for name, literally in names.items():
            same(flow.entropy[name], raw[f"{literally} entropy"])
            same(flow.logprob[name], raw[f"{literally} logprob"])
            same(flow.entropy[f"{name}_normed"], normed[f"{literally} entropy"])
            same(flow.logprob[f"{name}_normed"], normed[f"{literally} logprob"])
        same(flow.change("layer"), raw["after entropy"] - raw["before entropy"])
        for name in ("attention", "ffn"):
            same(flow.change(name), raw[f"{name} entropy"] - raw[f"{name}_input entropy"])


def test_the_last_layer_with_the_norm_is_the_model() -> None:
    model = build("gemma2")
    tokens = ids(9)
    flow = entropy_flow(model, [split_at(tokens, 1)])
    with torch.no_grad():
        logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    np.testing.assert_allclose(flow.final_entropy, -(logp.exp() * logp).sum(-1), atol=1e-5)
    np.testing.assert_allclose(flow.entropy["layer_normed"][-1], flow.final_entropy, atol=1e-5)


def test_norms_and_cosines() -> None:
    model = build("qwen3")
    tokens = ids(6)
    flow = entropy_flow(model, [split_at(tokens, 1)])
    for k, layer in enumerate(layers_of(model, tokens[None])):
        cosine = nn.functional.cosine_similarity(layer.ffn, layer.before + layer.attention, dim=-1)
        np.testing.assert_allclose(flow.cosine["ffn"][k], cosine[0, :-1], atol=1e-5)
        cosine = nn.functional.cosine_similarity(layer.attention, layer.before, dim=-1)
        np.testing.assert_allclose(flow.cosine["attention"][k], cosine[0, :-1], atol=1e-5)
        np.testing.assert_allclose(flow.norm["layer"][k], layer.after[0, :-1].norm(dim=-1), 1e-5)
    assert (flow.entropy["layer"] <= math.log(VOCAB) + 1e-5).all()
    assert (flow.entropy["layer"] >= 0).all()
    with pytest.raises(ValueError, match="at least one"):
        entropy_flow(model, [])


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox-parallel"])
def test_lens_against_whole_logits(family: str) -> None:
    model = build(family)
    texts = [split_at(ids(n), start) for n, start in ((7, 3), (70, 1), (7, 6))]
    got = lens(model, texts, top_k=3)
    head, norm = unembedding(model), decoder_stack(model).norm
    streams = []
    for number, text in enumerate(texts):
        mine = got.text == number
        places = slice(text.positions[0] - 1, -1)
        target = torch.tensor(text.token_ids[text.positions[0] :])[:, None]
        with torch.no_grad():
            tokens = torch.tensor([text.token_ids])
            final = model(tokens).logits[0, places].double().log_softmax(-1)
        assert got.final_top[mine].tolist() == final.argmax(-1).tolist()
        found = layers_of(model, tokens)
        streams.append([layer.after[0, places] for layer in found])
        for k, layer in enumerate(found):
            for name, x in (("layer", layer.after), ("attention", layer.attention)):
                for normed in (False, True):
                    view = name + "_normed" * normed
                    with torch.no_grad():
                        z = head.logits(norm(x) if normed else x)[0, places].double()
                    logp = z.log_softmax(-1)
                    kl = (logp.exp() * (logp - final)).sum(-1)
                    np.testing.assert_allclose(got.kl[view][k, mine], kl, rtol=1e-4, atol=2e-5)
                    rank = (z > z.gather(1, target)).sum(-1)
                    assert got.rank[view][k, mine].tolist() == rank.tolist()
                    top = logp.topk(3)
                    assert got.top_tokens[view][k, mine].tolist() == top.indices.tolist()
                    np.testing.assert_allclose(
                        got.top_logprobs[view][k, mine], top.values, rtol=1e-4, atol=1e-5
                    )
                    agrees = top.indices[:, 0] == final.argmax(-1)
                    assert got.agrees[view][k, mine].tolist() == agrees.tolist()
    joined = [torch.cat(layer) for layer in zip(*streams)]
    cosine = nn.functional.cosine_similarity(joined[0], joined[2], dim=-1).mean()
    assert abs(float(cosine) - got.similarity[0, 2]) < 1e-5
    np.testing.assert_allclose(np.diag(got.similarity), 1, atol=1e-5)
    # The last layer with the norm is the model itself.
    assert got.agrees["layer_normed"][-1].all() and got.kl["layer_normed"][-1].max() < 1e-5


def test_lens_refuses_what_it_cannot_show() -> None:
    model, text = build("llama"), Sample.of([3], [4, 5])
    with pytest.raises(ValueError, match="views: expected some of"):
        lens(model, [text], views=["mlp"])
    with pytest.raises(ValueError, match=f"top_k: expected 1..{VOCAB}, got 0"):
        lens(model, [text], top_k=0)
    with pytest.raises(ValueError, match="texts: expected at least one"):
        lens(model, [])
    assert set(lens(model, [text], views=["layer"]).rank) == {"layer"}


# ---- boundary ----------------------------------------------------------------------------------

QWEN = (
    [0.3, 0.5, 0.6, 0.5, 0.4, 0.3] + [0.0] * 20 + [-0.2, -0.3, -0.5, -0.6, -0.8, -1, -1, -1, -2, -3]
)
LLAMA = [0.1] * 27 + [-4.0]


def noisy(curve: list[float], noise: float, prompts: int = 60) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.array(curve)[:, None] + noise * random.standard_normal((len(curve), prompts))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_papers_boundaries(noise: float) -> None:
    """PAPER: layer 6 of 36 with a plateau near 0 behind it, layer 27 of 28 without one."""
    found = boundary_layer(noisy(QWEN, noise))
    assert (found.layer, found.low, found.high) == (6, 6, 6), found
    assert found.segments[0] == ("exploration", 1, 6)
    assert found.segments[-1][0] == "convergence" and found.segments[-1][1] == 27
    found = boundary_layer(noisy(LLAMA, noise / 4))
    assert found.layer == 27 and found.reason == ""


def test_a_noisy_plateau_does_not_move_it() -> None:
    """The literal rule, the last layer above 0, would give a layer of the plateau."""
    change = noisy(QWEN, 0.15)
    plateau = change.mean(axis=1)[6:26]
    assert (plateau > 0).any()
    assert boundary_layer(change).layer == 6


def test_no_clear_boundary_is_said() -> None:
    depth = 24
    falling = boundary_layer(noisy([-0.5] * depth, 0.1))
    assert falling.layer is None and "raises" in falling.reason
    rising = boundary_layer(noisy([0.5] * depth, 0.1))
    assert rising.layer is None and "still explores" in rising.reason
    vague = boundary_layer(noisy(list(np.linspace(0.3, -0.3, depth)), 3.0, prompts=5))
    assert vague.layer is None and vague.candidate is not None and vague.reason
    alone = boundary_layer(noisy(QWEN, 0.0, prompts=1))
    assert alone.layer is None and "single prompt" in alone.reason and alone.candidate == 6


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((3, 0)), np.full((3, 2), np.nan)])
def test_boundary_refuses_what_is_no_curve(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"boundary_layer: change: expected finite values"):
        boundary_layer(bad)


def test_segments_and_convergence() -> None:
    curve = np.array([0.3, 0.2, 0.01, -0.01, -0.5])
    assert segments(curve, 0.05) == [
        ("exploration", 1, 2),
        ("integration", 3, 4),
        ("convergence", 5, 5),
    ]
    assert convergence(np.array([10.0, 9.9, 9.8, 9.7, 2.0, 1.0]))[0] == "sudden"
    assert convergence(np.linspace(10, 1, 20))[0] == "progressive"
    assert convergence(np.array([1.0, 2.0, 3.0]))[0] == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_that_is_lost_is_noticed(dtype: torch.dtype) -> None:
    """In 16 bits too, where rounding alone is a per cent: a third of the sum is none."""
    model = build("qwen3").to(dtype)
    with torch.no_grad():  # writes that are as large as the stream
        for layer in decoder_stack(model).layers:
            layer.mlp.down_proj.weight.mul_(30)  # type: ignore[union-attr]
    flow = entropy_flow(model, [split_at(ids(1, 12)[0], 1)])
    assert flow.decomposition_error < rounding(dtype) / 4
    identities(flow, dtype)
    found = layers_of(model, ids(1, 12))
    whole = found[-1].after.double()
    lost = (found[-1].ffn.double().norm() / whole.norm()).item()
    assert lost > 2 * rounding(dtype), "the limit is far below one write"


def test_log_probs_of_a_head_in_16_bits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2").to(torch.bfloat16)  # with a softcap
    head, generator = unembedding(model), torch.Generator().manual_seed(2)
    head = head._replace(bias=torch.randn(len(head.weight), generator=generator).to(torch.bfloat16))
    hidden = torch.randn(5, head.weight.shape[1], generator=generator).to(torch.bfloat16)
    assert head.bias is not None
    wide = head._replace(weight=head.weight.double(), bias=head.bias.double())
    exact = wide.logits(hidden.double())
    expected = (exact / 0.7).log_softmax(-1)
    for block in (8192, 7):
        monkeypatch.setattr("bupo.internal.log_probs.BLOCK", block)
        torch.testing.assert_close(
            log_probs(head, hidden, 0.7).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_a_call_of_the_op_may_hold_part_of_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = build("qwen3"), [split_at(ids(1, 12)[0], 2)]
    whole = entropy_flow(model, texts)
    for rows in (3, 10, 25):  # less than a vector, one, and two
        monkeypatch.setitem(sys.modules["bupo.internal.entropy_flow"].ROWS, "cpu", rows)
        split = entropy_flow(model, texts)
        for name, values in whole.entropy.items():
            np.testing.assert_allclose(split.entropy[name], values, rtol=1e-5, atol=1e-6)
            if name in whole.logprob:
                pair = (split.logprob[name], whole.logprob[name])
                np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6)


def test_what_the_last_two_layers_fall_is_from_the_highest_of_them() -> None:
    assert convergence(np.array([5, 5, 5, 5, 10, 4.0])) == ("sudden", 1.0)
    assert convergence(np.array([9, 8, 6, 4, 3, 2.0])) == ("progressive", pytest.approx(2 / 7))


def test_the_tolerance_moves_the_boundary() -> None:
    curve = np.array([[1.0, 0.8, 0.3, 0.02, -0.5]]).T @ np.ones((1, 4))
    assert [boundary_layer(curve, t).layer for t in (0.01, 0.1, 0.5)] == [4, 3, 2]


def test_similarity_of_two_layers() -> None:
    model, texts = build("llama"), [split_at(ids(1, 9)[0], 1)]
    streams = [layer.after[0, :-1].double() for layer in layers_of(model, ids(1, 9))]
    found = lens(model, texts, 1, ["layer"]).similarity
    for i, a in enumerate(streams):
        for j, b in enumerate(streams):
            expected = float(nn.functional.cosine_similarity(a, b, dim=-1).mean())
            assert found[i, j] == pytest.approx(expected, abs=1e-5)
    assert found[0, 1] < 0.999
