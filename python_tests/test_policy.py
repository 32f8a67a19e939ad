"""Internal policies against the models' own hidden states, on a tiny random model per family."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from families import DEPTH, FAMILIES, VOCAB, WIDTH, build
from torch import Tensor, nn

from bupo.policy import (
    Unembedding,
    check_internal_policy,
    hidden_states,
    internal_policy,
    num_layers,
    parameter_layers,
    unembedding,
)

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def seed_and_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small more threads only wait for each other
    yield
    torch.set_num_threads(threads)


def batch(rows: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def parts(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Layers and final norm, by name: the tests do not trust the search of policy.py."""
    names = {
        "gpt2": "h ln_f",
        "bloom": "h ln_f",
        "falcon": "h ln_f",
        "phi": "layers final_layernorm",
    }
    names |= {"gpt_neox": "layers final_layer_norm", "opt": "layers final_layer_norm"}
    layers, norm = names.get(model.config.model_type, "layers norm").split()
    backbone = model.base_model
    backbone = backbone.decoder if model.config.model_type == "opt" else backbone
    return getattr(backbone, layers), getattr(backbone, norm)


def own_hidden_states(model: nn.Module, ids: Tensor, **kw: Tensor) -> list[Tensor]:
    """H^0 .. H^L of the unchanged model; H^L is the norm's input, hidden_states[-1] its output."""
    last = []
    with parts(model)[1].register_forward_pre_hook(lambda _, args: last.append(args[0])):
        output = model(ids, output_hidden_states=True, use_cache=False, **kw)
    return [*output.hidden_states[:-1], *last]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def above(model: nn.Module, layer: int) -> set[str]:
    """Names of the parameters that pi^layer does not contain: layers above and the final norm."""
    layers, norm = parts(model)
    outside = {id(p) for m in [*layers[layer:], norm] for p in m.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in outside}


def some_loss(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return (logits.log_softmax(-1) * weights).sum()


@every_family
def test_parameter_layers_are_where_the_parameters_act(family: str) -> None:
    model = build(family)
    places, (layers, norm) = parameter_layers(model), parts(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert places.keys() == set(names.values())
    for number, part in enumerate([*layers, norm], start=1):
        came = {places[names[id(p)]] for p in part.parameters()}
        assert came <= {number}, "OLMo's norm has no weight"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert places[names[id(model.get_input_embeddings().weight)]] == 0
    assert places[names[id(model.get_output_embeddings().weight)]] == (0 if tied else None)
    rest = {n for n, place in places.items() if place not in range(1, DEPTH + 2)}
    assert rest == set(places) - above(model, 0), "all else is of the embeddings or the head"


# --- the policies --------------------------------------------------------------------------------


@every_family
def test_hidden_states_are_those_of_the_model(family: str) -> None:
    model, ids = build(family), batch()
    with torch.no_grad():
        expected = own_hidden_states(model, ids)
        assert num_layers(model) == DEPTH
        assert len(expected) == DEPTH + 1
        for layer in range(1, DEPTH + 1):
            with internal_policy(model, layer):
                assert num_layers(model) == DEPTH
                hidden, logits = hidden_states(model, ids), model(ids).logits
            assert torch.equal(hidden, expected[layer]), layer
            assert not torch.allclose(hidden, expected[layer - 1], atol=1e-3)
            torch.testing.assert_close(logits, unembedding(model).logits(hidden))


@every_family
def test_last_layer_with_norm_is_the_model_and_none_too(family: str) -> None:
    model, ids = build(family), batch()
    with torch.no_grad():
        expected = model(ids).logits
        normed = model(ids, output_hidden_states=True).hidden_states[-1]
        for layer, final_norm in [(DEPTH, True), (None, False), (None, True)]:
            with internal_policy(model, layer, final_norm):
                assert torch.equal(model(ids).logits, expected)
                assert torch.equal(hidden_states(model, ids), normed)
        assert torch.equal(hidden_states(model, ids), normed)
        torch.testing.assert_close(expected, unembedding(model).logits(normed))
        with internal_policy(model, DEPTH):
            assert (model(ids).logits - expected).abs().max() > 1e-2
        with internal_policy(model, 1, final_norm=True):
            hidden = hidden_states(model, ids)
        norm = parts(model)[1]
        assert torch.equal(hidden, norm(own_hidden_states(model, ids)[1]))


@pytest.mark.parametrize(("family", "layer"), [(f, 2) for f in FAMILIES] + [("qwen3", 1)])
def test_gradients_are_those_through_the_hidden_state(family: str, layer: int) -> None:
    model, ids = build(family), batch()
    hidden = own_hidden_states(model, ids)[layer]
    some_loss(unembedding(model).logits(hidden)).backward()
    expected = gradients(model)
    with internal_policy(model, layer):
        logits = model(ids).logits
    some_loss(logits).backward()  # after the context
    came = gradients(model)
    with internal_policy(model, layer):
        hidden = hidden_states(model, ids)
    some_loss(unembedding(model).logits(hidden)).backward()
    by_hidden = gradients(model)

    outside = above(model, layer)
    for name in expected:
        if name in outside:
            assert came[name] is by_hidden[name] is None, name
        elif expected[name] is None:
            assert came[name] is None, name  # an expert without tokens, a frozen buffer
        else:
            torch.testing.assert_close(came[name], expected[name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(by_hidden[name], expected[name], rtol=1e-4, atol=1e-5)
    inside = list(model.get_input_embeddings().parameters())
    inside += model.get_output_embeddings().parameters()
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(came[names[id(p)]].abs().sum() > 0 for p in inside)
    for below in parts(model)[0][:layer]:
        assert any(came[names[id(p)]].abs().sum() > 0 for p in below.parameters())
    assert outside or family == "olmo"


@every_family
def test_left_padding(family: str) -> None:
    model, ids = build(family), batch(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    given = {"attention_mask": mask}
    if family != "bloom" and "falcon" not in family:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = own_hidden_states(model, ids, **given)[2]
        with internal_policy(model, 2):
            hidden = hidden_states(model, ids, **given)
            alone = hidden_states(model, ids[1:, 2:])
            unmasked = hidden_states(model, ids)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(hidden[1, 2:], alone[0], rtol=1e-4, atol=1e-4)
    if family != "qwen3_next":  # whose linear attention, with random weights, forgets the padding
        assert (unmasked[1, 2:] - alone[0]).abs().max() > 1e-3  # the mask does matter


@every_family
def test_start_up_check_passes(family: str) -> None:
    check_internal_policy(build(family))


# --- what training needs -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bloom", "falcon-parallel"])
def test_early_exit(family: str) -> None:
    model, calls = build(family), []
    layers, norm = parts(model)
    for index, module in enumerate([*layers, norm]):
        module.register_forward_hook(lambda *_, index=index: calls.append(index))
    with internal_policy(model, 2, final_norm=True):
        model(batch())
        assert calls == [0, 1, DEPTH]
        calls.clear()
        hidden_states(model, batch())
        assert calls == [0, 1, DEPTH]
    calls.clear()
    model(batch())
    assert calls == [*range(DEPTH), DEPTH]


def test_hidden_states_computes_no_logits() -> None:
    model, ids = build("gemma2"), batch()
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            shapes.extend([tuple(out.shape)] if isinstance(out, Tensor) else [])
            return out

    with Shapes():
        hidden_states(model, ids)
    assert (2, 6, WIDTH) in shapes
    assert not any(s[-1] == VOCAB for s in shapes if len(s) == 3)
    with Shapes():
        model(ids)
    assert (2, 6, VOCAB) in shapes


def test_hidden_states_keeps_no_cache() -> None:
    model, outputs = build("qwen3"), []
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    hidden_states(model, batch())
    assert outputs[0].past_key_values is None


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gpt2"])
def test_adamw_leaves_the_layers_above_bit_identical(family: str) -> None:
    model, ids = build(family).train(), batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        with internal_policy(model, 1):
            some_loss(model(ids).logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    outside = above(model, 1)
    assert len(outside) > 10
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in outside), name
    # and phase 2 moves everything, with the same optimizer
    some_loss(model(ids).logits).backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "bloom", "falcon-parallel", "opt"])
def test_gradient_checkpointing_with_backward_after_the_context(
    family: str, reentrant: bool
) -> None:
    model, ids = build(family).train(), batch()
    with internal_policy(model, 2):
        some_loss(model(ids).logits).backward()
    expected = gradients(model)
    calls: list[int] = []
    for index, layer in enumerate(parts(model)[0]):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with internal_policy(model, 2):
        logits = unembedding(model).logits(hidden_states(model, ids))
    calls.clear()
    some_loss(logits).backward()
    assert calls == [1, 0]  # recomputed: checkpointing was on
    came = gradients(model)
    for name in expected:
        assert (came[name] is None) == (expected[name] is None) == (name in above(model, 2)), name
        if came[name] is not None:
            torch.testing.assert_close(came[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_module_tree_is_the_same_inside_and_after() -> None:
    model = build("qwen3")

    def tree() -> list[object]:
        return [
            [(name, id(p)) for name, p in model.named_parameters()],
            [(name, id(m)) for name, m in model.named_modules()],
            list(model.state_dict()),
        ]

    before, attributes = tree(), [set(vars(m)) for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    with internal_policy(model, 1):
        assert tree() == before
        model.train()
    assert tree() == before
    assert all(m.training for m in model.modules())
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert classes == [type(m) for m in model.modules()]


@pytest.mark.parametrize("fail_in", ["body", "layer"])
def test_an_exception_restores_the_model(fail_in: str) -> None:
    model, ids = build("llama"), batch()
    expected = model(ids).logits
    handle = parts(model)[0][0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), internal_policy(model, 1):
        _ = 1 / 0 if fail_in == "body" else hidden_states(model, ids)
    handle.remove()
    assert torch.equal(model(ids).logits, expected)
    with internal_policy(model, 1):
        assert not torch.equal(model(ids).logits, expected)


def test_a_forward_set_on_the_instance_does_not_win() -> None:
    """accelerate's hooks put a `forward` into the __dict__ of each module."""
    model, ids = build("llama"), batch()
    with internal_policy(model, 2):
        expected = hidden_states(model, ids), model(ids).logits
    for module in (parts(model)[1], model.get_output_embeddings()):
        module.forward = module.forward
    with internal_policy(model, 2):
        assert torch.equal(hidden_states(model, ids), expected[0])
        assert torch.equal(model(ids).logits, expected[1])
    assert "forward" in vars(parts(model)[1])
    assert "forward" in vars(model.get_output_embeddings())


def test_contexts_do_not_nest() -> None:
    model, ids = build("qwen2"), batch()
    with internal_policy(model, 1):
        expected = model(ids).logits
        for call in (
            lambda: internal_policy(model, 2).__enter__(),
            lambda: check_internal_policy(model),
            lambda: internal_policy(model, None).__enter__(),
        ):
            with pytest.raises(RuntimeError, match="expected no outer policy, got that of layer 1"):
                call()
        assert torch.equal(model(ids).logits, expected)
    with internal_policy(model, None), internal_policy(model, 1):
        assert torch.equal(model(ids).logits, expected)
    with internal_policy(build("qwen2"), 2), internal_policy(model, 1):  # two models: no matter
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "bloom", "cohere2"])
def test_generation_inside(family: str) -> None:
    model, ids = build(family), batch(2, 4)
    with internal_policy(model, 2), torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        greedy = ids
        for _ in range(4):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, greedy)


def test_torch_compile_sees_the_policy() -> None:
    model, ids = build("qwen3"), batch()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        full = model(ids).logits
        for layer in (None, 1, 2, None, 1):
            with internal_policy(model, layer):
                expected, hidden = model(ids).logits, hidden_states(model, ids)
            with internal_policy(compiled, layer):
                assert torch.equal(compiled(ids).logits, expected), layer
                assert torch.equal(hidden_states(compiled, ids), hidden), layer
            assert torch.equal(expected, full) == (layer is None)


FSDP2 = """
import torch, torch.distributed as dist, bupo.policy
from torch.distributed.fsdp import fully_shard
from test_policy import *
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model, ids = build("qwen3").train(), batch()
plain = copy.deepcopy(model)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
for layer in (1, 2, None, 1):  # the first forward of all, FSDP's initialisation, is an internal one
    for m, optimizer in zip((model, plain), optimizers):
        with internal_policy(m, layer):
            hidden = hidden_states(m, ids)
        some_loss(unembedding(m).logits(hidden)).backward()
        optimizer.step()
        optimizer.zero_grad()
for (name, p), q in zip(model.named_parameters(), plain.parameters()):
    torch.testing.assert_close(p.full_tensor(), q)
model.reshard()
for call in (check_internal_policy, unembedding):  # leave the shards where an optimizer finds them
    for known in (True, False):
        if not known:
            bupo.policy._logit_maps.clear()
        call(model)
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
hidden_states(model, ids)
bupo.policy._logit_maps.clear()
assert not hasattr(unembedding(model).weight, "full_tensor")  # the whole matrix, after a forward
dist.destroy_process_group()
print("same")
"""


def test_fsdp2_first_forward_inside() -> None:
    paths = [os.path.dirname(__file__), *sys.path]
    result = subprocess.run(
        [sys.executable, "-c", FSDP2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip().endswith("same"), result.stdout + result.stderr


# --- the head ------------------------------------------------------------------------------------


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


# --- the start-up check --------------------------------------------------------------------------


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


# --- errors --------------------------------------------------------------------------------------


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
