"""What makes a run take less memory: each setting follows the run without it, leaves alone what a
phase does not train, and is resumed exactly."""

import json
from pathlib import Path

import pytest
import torch
from rl_samples import random_rollouts, small_model
from run_samples import assert_same_run, rows, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from update_samples import FINAL, make_trainer, parameters, update

from bupo import adapters, evaluate
from bupo.config import LoraConfig, OptimizerConfig, RunError
from bupo.policy import parameter_layers
from bupo.rl import optimizer, state_files
from bupo.rl.critic import Critic
from bupo.rl.forward import WithoutAdapters
from bupo.rl.weight_sync import changed_tensors
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def losses(trainer, policy, steps=12):
    """Of updates on the same rollouts, against the old log-probs of the float32 model."""
    rollouts = random_rollouts()
    old = make_trainer(small_model()).forward.token_stats(rollouts, policy).logprobs
    updates = [update(trainer, rollouts, old, policy, step) for step in range(1, steps + 1)]
    assert not any(u.metrics["policy/skipped_updates"] for u in updates)
    return torch.tensor([u.metrics["policy/loss"] for u in updates])


def assert_follows(ours, theirs, bound):
    """The losses differ by at most this share of how far they fall."""
    fall = theirs[0] - theirs[-1]
    assert fall > 0.01, "there is something to follow"
    assert (ours - theirs).abs().max() < bound * fall, (ours, theirs)


@pytest.fixture
def in_bfloat16():
    return make_trainer(small_model(dtype=torch.bfloat16), dtype="bfloat16")


@pytest.mark.parametrize("policy", [FINAL, Policy(1)], ids=["final", "layer 1"])
def test_parameters_in_bfloat16_follow_those_in_float32(policy, in_bfloat16):
    """They are the rounded values of float32 copies, so small steps are not lost."""
    assert {p.dtype for p in in_bfloat16.model.parameters()} == {torch.bfloat16}
    before = parameters(in_bfloat16.model)
    theirs = losses(make_trainer(small_model(), dtype="bfloat16"), policy)
    assert_follows(losses(in_bfloat16, policy), theirs, 0.1)
    places = parameter_layers(in_bfloat16.model)
    for name, parameter in in_bfloat16.model.named_parameters():
        still = policy.layer is not None and (places[name] or 0) > policy.layer
        assert torch.equal(parameter, before[name]) == still, name
        state = in_bfloat16.optimizer.flat_state()
        assert torch.equal(state[f"{name}/float32"].bfloat16(), parameter), name


def test_steps_below_the_precision_of_bfloat16_add_up():
    """Each is a fortieth of the last bit of the largest weights."""
    trainer = make_trainer(small_model(dtype=torch.bfloat16), dtype="bfloat16", lr=3e-5)
    before = parameters(trainer.model)
    losses(trainer, FINAL, steps=40)
    moved = torch.cat([(p - before[n]).flatten() for n, p in trainer.model.named_parameters()])
    assert moved.abs().max() < 3e-3 and (moved != 0).float().mean() > 0.5


def test_copies_of_float32_parameters_change_nothing(monkeypatch):
    """As optimizer.place=host keeps them beside a GPU."""
    found = []
    for copies in (False, True):
        if copies:
            monkeypatch.setattr(optimizer, "_copy_of", lambda p, host: p.detach().clone())
        trainer = make_trainer(small_model(), weight_decay=0.1)
        found.append((losses(trainer, FINAL, steps=3), parameters(trainer.model)))
        assert not any(name.endswith("/float32") for name in trainer.optimizer.flat_state())
    (a, plain), (b, copied) = found
    assert torch.equal(a, b) and all(torch.equal(plain[name], p) for name, p in copied.items())


def with_adapters(rank=8):
    model = small_model()
    adapters.add(model, LoraConfig(rank=rank, alpha=16), "a/model", seed=0)
    return model


@pytest.mark.parametrize("policy", [FINAL, Policy(1)], ids=["final", "layer 1"])
def test_adapters_are_all_that_moves(policy):
    model = with_adapters()
    trainer, before = make_trainer(model), parameters(model)
    found = losses(trainer, policy)
    assert found[-1] < found[0] - 0.01
    places, kept = (
        parameter_layers(model),
        {key.rpartition("/")[0] for key in trainer.optimizer.flat_state()},
    )
    assert kept == set(trainer.parameters)
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name and places[name] <= (policy.layer or 99)
        assert torch.equal(parameter, before[name]) != trained, name


def test_adapters_of_full_rank_learn_what_the_layers_would():
    """From the same start, they reach a loss as low as that of training the layers."""
    ours = losses(make_trainer(with_adapters(rank=32), lr=3e-3), FINAL)
    theirs = losses(make_trainer(small_model()), FINAL)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    assert ours[0] - ours[-1] > 0.5 * (theirs[0] - theirs[-1])


def test_merged_weights_are_those_of_the_model_with_adapters():
    model, plain = with_adapters(), small_model()
    trainer = make_trainer(model)
    losses(trainer, FINAL, steps=2)
    sent = dict(changed_tensors(model, trainer.parameters))
    assert sent.keys() < plain.state_dict().keys()
    plain.load_state_dict(plain.state_dict() | sent)
    ids = torch.randint(3, 40, (2, 9))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    some = [name for name in trainer.parameters if ".layers.0.self_attn.q_proj." in name]
    names = {name.split(".")[4] for name in dict(changed_tensors(model, some))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}, "vLLM loads what it fuses as a whole"


def test_changes_below_the_precision_of_bfloat16_reach_the_engine_on_average():
    model = small_model(dtype=torch.bfloat16)
    adapters.add(model, LoraConfig(rank=8, alpha=8), "a/model", seed=0)
    layer = model.model.layers[0].mlp.up_proj
    start, name = layer.get_base_layer().weight.float(), "model.layers.0.mlp.up_proj"
    sent = dict(adapters.merged(model, [f"{name}.lora_A.default.weight"], half=True))
    assert torch.equal(sent[f"{name}.weight"].float(), start), "nothing has changed"
    with torch.no_grad():  # a tenth of the last bit of a weight of 0.1
        layer.lora_A.default.weight.fill_(1 / 8)
        layer.lora_B.default.weight.fill_(5e-5)
    sent = dict(adapters.merged(model, [f"{name}.lora_A.default.weight"], half=True))
    moved = (sent[f"{name}.weight"].float() - start).mean()
    assert float(moved) == pytest.approx(5e-5, rel=0.25)


def test_the_distance_to_float32_is_that_of_parameters_in_bfloat16(in_bfloat16):
    """Sync limits follow it; the parameters are the same bits afterwards."""
    rollouts, forward = random_rollouts(), in_bfloat16.forward
    before = parameters(in_bfloat16.model)
    rounded = torch.cat(forward.token_stats(rollouts, FINAL).logprobs)
    with forward.in_float32():
        exact = torch.cat(forward.token_stats(rollouts, FINAL).logprobs)
    assert 1e-4 < (rounded - exact).abs().mean() < 0.1
    assert torch.equal(rounded, torch.cat(forward.token_stats(rollouts, FINAL).logprobs))
    for name, parameter in in_bfloat16.model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])
    assert_follows(losses(in_bfloat16, FINAL), losses(make_trainer(small_model()), FINAL), 0.1)


def test_state_of_a_transposed_parameter_is_restored(tmp_path: Path):
    model = torch.nn.Linear(3, 5)
    model.weight = torch.nn.Parameter(torch.randn(3, 5).T)
    settings = OptimizerConfig()

    def adamw():
        return optimizer.AdamW(dict(model.named_parameters()), {}, settings, settings.lr)

    first, second = adamw(), adamw()
    model(torch.ones(2, 3)).sum().backward()
    first.step()
    state_files.write(tmp_path, first.divided_state())
    state_files.read(tmp_path, second.divided_state())
    assert second.flat_state()["weight/exp_avg"].any()


def test_the_reference_is_the_model_without_its_adapters():
    model, rollouts = with_adapters(), random_rollouts()
    trainer = make_trainer(model)
    losses(trainer, FINAL, steps=2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    truth = make_trainer(small_model()).forward.token_stats(rollouts, Policy(2))
    found = WithoutAdapters(trainer.forward).token_stats(rollouts, Policy(2))
    torch.testing.assert_close(torch.cat(found.logprobs), torch.cat(truth.logprobs))
    now = trainer.forward.token_stats(rollouts, Policy(2))
    assert not torch.allclose(torch.cat(now.logprobs), torch.cat(truth.logprobs))
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


RUNGS = {
    "bfloat16": ("model.parameter_dtype=bf16", "model.compute_dtype=bf16"),
    "adapters": ("lora.rank=4", "loss.kl_coef=0.1"),
    "both": (
        *("lora.rank=4", "lora.targets=[q_proj, up_proj]", "model.parameter_dtype=bf16"),
        *("model.compute_dtype=bf16", "model.gradient_checkpointing=true"),
    ),
    "critic": ("model.parameter_dtype=bf16", "model.compute_dtype=bf16", "advantage=ppo"),
}


@pytest.mark.parametrize("options", RUNGS.values(), ids=RUNGS)
def test_a_run_is_resumed_exactly(options, tmp_path: Path):
    assert run(tmp_path / "whole", *options) == 0
    assert run(tmp_path / "run", *options, stop=5) == 143
    assert run(tmp_path / "run", *options, "resume=auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert all(row["policy/skipped_updates"] == 0 for row in rows(tmp_path / "run/metrics.jsonl"))


def test_a_checkpoint_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is loaded by transformers and evaluated by bupo, and refused where its base differs."""
    out = tmp_path / "run"
    options = ("lora.rank=4", "checkpoint.keep=[]")
    assert run(out, *options) == 0
    newest = sorted((out / "checkpoints").iterdir())[-1]
    assert not (newest / "model.safetensors").exists()
    assert len(load_file(newest / "adapter_model.safetensors")) == 2 * 2 * 7
    model = AutoModelForCausalLM.from_pretrained(newest)
    assert adapters.parameters(model)
    base = json.loads((newest / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute() and (Path(base) / "config.json").is_file()
    rows_file = next((out / "rollouts").iterdir())
    data = ("task=null", f"data.train=[{rows_file}]", f"eval.files=[{rows_file}]")
    assert run(tmp_path / "other", f"model.path={newest}", *data) == 2
    assert "holds LoRA adapters of /" in capsys.readouterr().err
    settings = [f"model.path={newest}", f"--out={tmp_path / 'eval'}"]
    assert evaluate.main(["--config", str(out / "config.yaml"), *settings]) == 0
    last = [json.loads(line) for line in (out / "eval.jsonl").open()][-1]
    again = json.loads((tmp_path / "eval/eval.jsonl").read_text())
    assert again["avg"] == last["avg"] and again["length"] == last["length"]
    (out / "reference.sha256").write_text("0\n")
    assert run(out, *options, "resume=auto") == 2
    assert "lora.rank: " in (said := capsys.readouterr().err) and "no longer holds" in said


def test_out_of_memory_makes_smaller_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    """The same update, and every later pass begins with the smaller size."""
    rollouts = random_rollouts()
    longest = max(len(r.token_ids) for r in rollouts)
    plain, short = make_trainer(small_model()), make_trainer(small_model())
    critics = [Critic(small_model(), t._config, 0) for t in (plain, short)]
    old = plain.forward.token_stats(rollouts, FINAL).logprobs
    for forward in (short.forward, critics[1].forward):
        limit_memory(forward, 2 * longest)
    theirs = update(plain, rollouts, old, FINAL, 1).metrics
    ours = update(short, rollouts, old, FINAL, 1).metrics
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 3 and all("tokens in a micro-batch; from now on" in x for x in said)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    short.forward.token_stats(rollouts, FINAL)
    assert capsys.readouterr().err == ""
    a, b = (critic.evaluate(rollouts) for critic in critics)
    for x, y in zip(a, b):
        torch.testing.assert_close(x.stream("value"), y.stream("value"))
    limit_memory(short.forward, longest - 1)
    with pytest.raises(RunError, match="out of memory with one sequence in a micro-batch"):
        short.forward.token_stats(rollouts, FINAL)


def limit_memory(forward, tokens):
    """Batches with more tokens than that are out of memory."""
    compute = type(forward).hidden

    def hidden(batch, policy):
        if batch.input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return compute(forward, batch, policy)

    forward.hidden = hidden
