"""The head of a model as bupo.policy measures it, the start-up check, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import DEPTH, build
from policy_samples import (
    batch,
    parts,
    seed_and_one_thread,  # noqa: F401 - a fixture for every test
    some_loss,
)
from torch import Tensor, nn

from bupo.policy import (
    Unembedding,
    check_internal_policy,
    hidden_states,
    internal_policy,
    num_layers,
    unembedding,
)


@pytest.mark.parametrize(
    ("family", "softcap", "scale"),
    [
        ("qwen3", None, 1.0),
        ("gemma2", 0.5, 1.0),
        ("cohere", None, 0.25),
        ("granite", None, 1 / 8),
        ("hyperclovax", None, 8.0),  # the same config key as Granite's, the other way round
        ("phi", None, 1.0),
    ],
)
def test_unembedding(family: str, softcap: float | None, scale: float) -> None:
    model = build(family)
    head = unembedding(model)
    assert head.weight is model.get_output_embeddings().weight
    assert head.bias is model.get_output_embeddings().bias
    assert (head.bias is None) == (family != "phi")
    assert (head.softcap, head.scale) == (softcap, pytest.approx(scale, rel=1e-12))
    assert head.temperature == pytest.approx(1 / scale)
    tied = head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_unembedding_of_a_family_that_scales_before_the_softcap() -> None:
    model, ids = build("cohere"), batch()
    head = model.get_output_embeddings()
    # Cohere multiplies by 1/4 after the head; cap the result at 2, and the order is scale, softcap
    forward = model.forward

    def capped(*args: object, **kw: object) -> object:
        output = forward(*args, **kw)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    model.forward = capped
    came = unembedding(model)
    assert (came.scale, came.softcap) == (0.25, pytest.approx(8.0))
    with torch.no_grad():
        hidden, logits = hidden_states(model, ids), model(ids).logits
        torch.testing.assert_close(came.logits(hidden), logits)
        torch.testing.assert_close(2 * torch.tanh(0.25 * head(hidden) / 2), logits)


def test_unembedding_of_a_model_that_scales_in_place() -> None:
    def halve(_: nn.Module, __: object, output: Any) -> None:
        output.logits.mul_(0.5)

    model = build("llama")
    model.register_forward_hook(halve)
    assert unembedding(model).scale == 0.5


def test_unembedding_formula() -> None:
    weight, bias, hidden = torch.randn(7, 4), torch.randn(7), torch.randn(3, 4)
    expected = 0.5 * 3.0 * torch.tanh((hidden @ weight.T + bias) / 3.0)
    torch.testing.assert_close(Unembedding(weight, bias, 3.0, 0.5).logits(hidden), expected)


def test_bfloat16() -> None:
    for family in ("qwen3", "gemma2", "cohere"):
        model = build(family).bfloat16()
        check_internal_policy(model)
        with internal_policy(model, 1):
            assert hidden_states(model, batch()).dtype == torch.bfloat16


def add_one(_: nn.Module, __: object, output: object) -> object:
    if isinstance(output, Tensor):
        return output + 1
    output["last_hidden_state" if "last_hidden_state" in output else "logits"].add_(1)  # type: ignore
    return output


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("backbone", "layer 2: not supported: expected the model's own hidden .*error of 1.000"),
        ("model", "layer 2: not supported: expected the model's own logits .*error of 1.000"),
        ("wrong norm", "layer 2: not supported: expected the model's own hidden .*of [0-9]"),
        ("depth", "layer 3 with norm: not supported: expected the model's own logits .*of [0-9]"),
        ("nan", "layer 2: not supported: expected the model's own hidden .*error of nan"),
        ("twice", "not supported: expected 4 hidden states, got 5"),
    ],
)
@torch.no_grad()
def test_start_up_check_finds_a_broken_family(where: str, message: str) -> None:
    model = build("llama")
    unembedding(model)
    layers, norm = parts(model)
    if where == "backbone":  # something happens between the norm and the head
        model.model.register_forward_hook(add_one)
    elif where == "model":  # or after the head
        model.register_forward_hook(add_one)
    elif where == "wrong norm":  # the norm beside the list is not the last step: one more follows
        second = copy.deepcopy(norm)
        norm.register_forward_hook(lambda _, __, out: second(out) * 2)
    elif where == "depth":  # a model that behaves differently when fewer layers are called
        state = {"calls": 0}

        def third_call(_: nn.Module, __: object, output: Tensor) -> Tensor:
            state["calls"] += 1
            return output + (state["calls"] == 3)

        norm.register_forward_hook(third_call)
    elif where == "twice":  # the norm has a second use, before the layers, as in nanochat
        model.model.embed_tokens.register_forward_hook(lambda _, __, out: norm(out))
    else:
        layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=f"^check_internal_policy: model of family 'llama'.*{message}"
    ):
        check_internal_policy(model, [2] if where != "depth" else [])


def test_start_up_check_disturbs_nothing() -> None:
    model, graphs = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), []
    model.train()
    parts(model)[0][1].eval()
    modes = [m.training for m in model.modules()]
    some_loss(model(batch()).logits).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    state = torch.get_rng_state()
    for layer in (None, 1, [2, 3]):
        check_internal_policy(model, layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not any(graphs)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name])
    assert not parts(model)[1]._forward_pre_hooks


@pytest.mark.parametrize("layer", [0, -1, DEPTH + 1, True, 1.0, "1", torch.tensor(1)])
@pytest.mark.parametrize(
    "function",
    [
        lambda model, layer: internal_policy(model, layer).__enter__(),
        check_internal_policy,
        lambda model, layer: check_internal_policy(model, [1, layer]),
    ],
)
def test_a_layer_that_is_none(function: Callable, layer: object) -> None:
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"^internal_policy: layer: expected an int in 1\.\.3, got "
    ):
        function(model, layer)


CALLS: dict[str, Callable] = {
    "internal_policy": lambda model: internal_policy(model, 1).__enter__(),
    "num_layers": num_layers,
    "check_internal_policy": check_internal_policy,
    "unembedding": unembedding,
    "hidden_states": lambda model: hidden_states(model, batch()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", [None, "llama", nn.Linear(2, 2)])
def test_no_model(call: str, model: object) -> None:
    came = type(model).__name__
    with pytest.raises(TypeError, match=f"^{call}: model: expected a transformers LM, got {came}"):
        CALLS[call](model)


def test_no_model_for_the_final_policy() -> None:
    with pytest.raises(TypeError, match=r"^internal_policy: model: expected a transformers LM"):
        internal_policy(None, None).__enter__()


def unserved() -> dict[str, nn.Module]:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    bert = transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            is_decoder=True,
        )
    )
    opt = build("opt", do_layer_norm_before=False)  # opt-350m: norms inside the layers only
    short = build("llama")
    short.config.num_hidden_layers = 7
    return {"t5": t5, "bert": bert, "opt": opt, "llama": short}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "expected a decoder-only model, got an encoder-decoder"),
        ("bert", "expected one list of 2 layers and a norm beside it, got 1 and 0"),
        ("opt", "expected one list of 3 layers and a norm beside it, got 1 and 0"),
        ("llama", "expected one list of 7 layers and a norm beside it, got 0 and"),
    ],
)
def test_families_that_cannot_be_served(family: str, message: str) -> None:
    model = unserved()[family]
    for call in ("internal_policy", "num_layers", "check_internal_policy"):
        wanted = f"^{call}: model of family '{family}': not supported: {message}"
        with pytest.raises(ValueError, match=wanted):
            CALLS[call](model)
    with internal_policy(model, None):  # the final policy needs nothing
        pass


def test_heads_that_cannot_be_served() -> None:
    backbone = build("llama").base_model  # has layers and norm, but no head
    wanted = "model of family 'llama': expected a Linear head, got NoneType"
    for call in CALLS:
        with pytest.raises(ValueError, match=f"^{call}: {wanted}"):
            CALLS[call](backbone)
    model = build("llama")
    model.forward = lambda **_: None
    with pytest.raises(ValueError, match=r"^hidden_states: .*one call of the head, got 0"):
        hidden_states(model, batch())
