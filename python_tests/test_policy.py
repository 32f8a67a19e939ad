"""Internal policies against the models' own hidden states, on a tiny random model per family."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from families import DEPTH, FAMILIES, VOCAB, WIDTH, build
from policy_samples import (
    above,
    batch,
    every_family,
    gradients,
    own_hidden_states,
    parts,
    seed_and_one_thread,  # noqa: F401 - a fixture for every test
    some_loss,
)
from torch import Tensor

from bupo.policy import (
    check_internal_policy,
    hidden_states,
    internal_policy,
    num_layers,
    parameter_layers,
    unembedding,
)


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
        part = next(layer.children())  # newer versions recompute a layer without its own hooks
        part.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
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
