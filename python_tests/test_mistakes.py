"""Mistakes in a command: one line that says the way out, before any model is loaded."""

import importlib.util
from pathlib import Path

import pytest
from run_samples import arguments

from bupo.run import main

BAD = {
    "unknown key": (["rollout.sample=3"], "key rollout.sample; did you mean rollout.samples?"),
    "unknown group": (
        ["optimiser.lr=1"], "unknown key optimiser.lr; did you mean optimizer.lr?"
    ),
    "key as it was typed": (
        ["rolout.prompts=3"], "unknown key rolout.prompts; did you mean rollout.prompts?"
    ),
    "key in a group": (
        ["optimizer={lrr: 1}"], "unknown key optimizer.lrr; did you mean optimizer.lr?"
    ),
    "key without its group": (["gamma=1"], "unknown key gamma; did you mean critic.gamma?"),
    "cut by the shell": (
        ["data.columns={prompt:", "question}"],
        "in a shell, quote what has spaces or braces: 'data.columns={prompt: question}'",
    ),
    "clip": (["loss.clip_low=1.5"], "loss.clip_low must be at least 0 and at most 1, got 1.5"),
    "entropy": (["loss.entropy_coef=-0.1"], "loss.entropy_coef must be at least 0"),
    "long warm-up": (
        ["optimizer.warmup_steps=7"], "optimizer.warmup_steps (7) exceeds steps (6)"
    ),
    "nothing to evaluate on": (
        ["task=null", "model.path=a/b", "data.train=[x.jsonl]"],
        "eval.every=2, but there is nothing to evaluate on: set eval.files, or eval.every=0",
    ),
    "wrong type": (["steps=many"], "steps: Value 'many'"),
    "no assignment": (["steps"], "expected key=value, got 'steps'"),
    "algorithm": (["algorithm=bup"], "must be one of bupo, internal, custom, grpo, dr_grpo, rloo,"),
    "group size": (["rollout.samples=1"], "rollout.samples must be at least 2"),
    "batch split": (
        ["rollout.prompts=6", "optimizer.updates_per_step=4"],
        "rollout.prompts (6) must be a multiple of optimizer.updates_per_step (4)",
    ),
    "mini-batch": (
        ["rollout.prompts=6", "optimizer.mini_batch_prompts=4"],
        "rollout.prompts (6) must be a multiple of optimizer.mini_batch_prompts (4)",
    ),
    "too many prompts": (["rollout.prompts=100000"], "exceeds the number of training prompts"),
    "no layer": (["bupo.layer=null"], "bupo.layer is not set: name the layer whose policy"),
    "no layer, internal": (["bupo.layer=null", "algorithm=internal"], "bupo.auto_layer=0.1"),
    "correction of a nucleus": (
        ["loss.tis_cap=2", "rollout.top_p=0.9"], "loss.tis_cap needs rollout.top_p=1, got 0.9"
    ),
    "sequence gap of a nucleus": (
        ["loss.max_sequence_gap=1", "rollout.top_p=0.9", "rollout.engine=vllm"],
        "loss.max_sequence_gap with rollout.engine=vllm needs rollout.top_p=1",
    ),
    "bound of the ratio": (["loss.max_log_ratio=0"], "loss.max_log_ratio must be above 0 or null"),
    "epochs": (["optimizer.epochs=0"], "optimizer.epochs must be at least 1, got 0"),
    "checkpoints kept": (
        ["checkpoint.keep=[worst]"], "checkpoint.keep must be one of switch, best, got 'worst'"
    ),
    "samples of no set": (
        ["eval.samples_by_source={other: 2}"], "eval.samples_by_source names other, but eval.files"
    ),
    "no samples": (
        ["eval.samples_by_source={addition: 0}"], "eval.samples_by_source.addition must be at least"
    ),
    "layer zero": (["bupo.layer=0"], "bupo.layer must be at least 1 or null, got 0"),
    "layer over L": (["bupo.layer=3"], "bupo.layer=3 is out of range"),
    "phase 1 too long": (["bupo.steps=6"], "bupo.steps (6) must be less than steps (6)"),
    "phases alone": (["phases=[{}]"], "policy=custom needs phases, and phases"),
    "custom without phases": (["algorithm=custom"], "policy=custom needs phases, and phases"),
    "phase key": (
        ["algorithm=custom", "phases=[{layr: 1}]"],
        "unknown key phases[].layr; did you mean phases[].layer?",
    ),
    "phase type": (["algorithm=custom", "phases=[{layer: x}]"], "layer: Value 'x'"),
    "phase layer over L": (
        ["algorithm=custom", "phases=[{layer: 1, steps: 1}, {layer: 3}]"],
        "phases[1].layer=3 is out of range",
    ),
    "rate of a layer over L": (
        ["algorithm=custom", "phases=[{lr: {1-3: 0}}]"], "phases[0].lr.1-3 is out of range: "
    ),
    "rate from a layer over L": (
        ["algorithm=custom", "phases=[{lr: {3-: 0}}]"], "phases[0].lr.3- is out of range: "
    ),
    "open phase first": (
        ["algorithm=custom", "phases=[{layer: 1}, {}]"], "only the last phase may omit steps"
    ),
    "phases too short": (
        ["algorithm=custom", "phases=[{steps: 2}, {steps: 3}]"], "phases have 5 steps, but steps=6"
    ),
    "phases too long": (
        ["algorithm=custom", "phases=[{steps: 6}, {}]"],
        "phases have 6 steps before the last, but steps=6",
    ),
    "rate of what is no part": (
        ["algorithm=custom", "phases=[{lr: {embeddings: 0}}]"],
        "expected embedding, head, others, a layer (6) or layers (1-6, 7-), got 'embeddings'",
    ),
    "rate of layers backwards": (
        ["algorithm=custom", "phases=[{lr: {2-1: 0}}]"], "or layers (1-6, 7-), got '2-1'"
    ),
    "rate of a layer twice": (
        ["algorithm=custom", "phases=[{lr: {1-: 0, 2: 1}}]"], "phases[].lr names layer 2 twice"
    ),
    "rate below 0": (
        ["algorithm=custom", "phases=[{lr: {2: -1}}]"], "phases[].lr.2 must be at least 0"
    ),
    "everything frozen": (
        ["algorithm=custom", "phases=[{lr: {others: 0}}]"],
        "phases[0].lr freezes all of the final policy",
    ),
    "policy frozen": (
        ["algorithm=custom", "phases=[{layer: 1, lr: {2: 1, others: 0}}]"],
        "phases[0].lr freezes all of pi^1",
    ),
    "auto_layer on": (
        ["bupo.auto_layer=true"], "bupo.auto_layer: Value 'True' of type 'bool' could not be"
    ),
    "auto_layer of more than all": (
        ["bupo.auto_layer=1"], "bupo.auto_layer must be at least 0 and below 1 or null, got 1"
    ),
    "an option that vllm has not": (
        ["rollout.engine=vllm", "rollout.vllm={tensor_paralel_size: 2}"],
        "no argument 'tensor_paralel_size'; did you mean tensor_parallel_size?",
    ),
    "vllm's ranks": (
        ["rollout.vllm={tensor_parallel_size: null}"],
        "rollout.vllm.tensor_parallel_size must be an integer above 0, got None",
    ),
    "vllm's cache": (
        ["rollout.vllm={kv_cache_memory_bytes: 1e9}"],
        "rollout.vllm.kv_cache_memory_bytes must be an integer above 0, got 1000000000.0",
    ),
    "vllm's share": (
        ["rollout.vllm={gpu_memory_utilization: 40}"],
        "rollout.vllm.gpu_memory_utilization must be a share above 0 and below 1, got 40",
    ),
    "servers of another engine": (
        ["rollout.servers=[http://a:1]"],
        "rollout.servers needs rollout.engine=vllm_server, got hf",
    ),
    "no address of a server": (
        ["rollout.engine=vllm_server", "rollout.servers=[10.0.0.2:8000]"],
        "rollout.servers must be addresses such as http://10.0.0.2:8000, got '10.0.0.2:8000'",
    ),
    "a server that is not there": (
        ["rollout.engine=vllm_server", "rollout.servers=[http://127.0.0.1:9]"],
        "rollout.servers: the vLLM server http://127.0.0.1:9 does not answer",
    ),
    "vllm option that follows": (
        ["rollout.vllm={seed: 1}"], "rollout.vllm.seed: bupo sets it (seed)"
    ),
    "kl in the reward": (
        ["loss.kl_estimator=k1_reward"], "loss.kl_estimator=k1_reward needs advantage=reinforce_pp"
    ),
    "refills alone": (
        ["rollout.refills=1", "rollout.samples=1", "advantage=reinforce_pp"],
        "rollout.refills needs rollout.samples of at least 2",
    ),
    "overlong buffer": (
        ["reward.overlong_buffer=13"], "reward.overlong_buffer (13) exceeds rollout.max_new_tokens"
    ),
    "critic": (["critic.gae_lambda=2"], "critic.gae_lambda must be at least 0 and at most 1"),
    "missing template": (["data.chat_template=no.jinja"], "chat_template=no.jinja: file not found"),
    "weights": (["data.weights=[1,2]"], "data.weights has 2 values, but data.train has 0"),
    "weight": (["data.weights=[0]"], "data.weights must be above 0, got 0"),
    "column": (["data.columns={question: x}"], "data.columns' names must be one of prompt, answer"),
    "hub": (
        ["task=null", "model.path=a/b", "data.train=[owner/no-such]", "eval.every=0"],
        "from the Hugging Face hub, install the package datasets",
    ),
    "prompt too long": (["data.max_prompt_tokens=5"], "data.max_prompt_tokens=5 (longest 6)"),
    "task": (["task=bupo.tasks.nothing"], "task=bupo.tasks.nothing cannot be imported"),
    "task option": (["task_options={wide: 3}"], "unknown task_options: ['wide']"),
    "task option's type": (
        ["task_options.layers=two"], "task_options.layers must be of type int, got 'two'"
    ),
    "task option's truth": (
        ["task_options.layers=true"], "task_options.layers must be of type int, got True"
    ),
    "task option below 1": (["task_options.layers=-1"], "layers must be at least 1, got -1"),
    "task option 0": (["task_options.width=0"], "task_options.width must be at least 1, got 0"),
    "task option nan": (["task_options.warm_lr=.nan"], "warm_lr must be at least 0, got nan"),
    "task option's multiple": (
        ["task_options.width=12"], "task_options.width must be a multiple of 8, got 12"
    ),
    "all held out": (
        ["task_options.eval_problems=8100"], "must leave some of 8100 problems for training"
    ),
    "long name of out": (["out=" + 300 * "x"], "File name too long; fix that, or choose another"),
    "long name of template": (["data.chat_template=" + 300 * "x"], "File name too long"),
    "task is no task": (["task=os"], "task=os is not a task"),
    "task with data": (["data.train=[x.parquet]"], "data.train is set, but task="),
    "model": (["model.path=/nowhere/model"], "model.path=/nowhere/model: folder not found"),
    "model name": (["model.path=nobody/ no"], "model.path=nobody/ no: folder not found"),
    "model of a run": (
        ["model.path=runs/x/checkpoints/y"], "model.path=runs/x/checkpoints/y: folder not found"
    ),
    "context": (["rollout.max_new_tokens=1000000"], "does not fit in the model's context of 256"),
    "out in a file": (["out=/dev/null/run"], "out=/dev/null/run: /dev/null is a file"),
    "out in proc": (["out=/proc/run"], "out=/proc/run: /proc cannot be written to"),
    "list not closed": (["steps=[1"], "cannot be read"),
    "a value for a group": (["optimizer=3"], "optimizer"),
    "no name": (["=3"], "expected key=value, got '=3'"),
    "not finite": (["optimizer.lr=inf"], "optimizer.lr must be finite, got inf"),
    "nan": (["loss.entropy_coef=nan"], "loss.entropy_coef must be finite, got nan"),
    "betas": (["optimizer.betas=[2,3]"], "optimizer.betas must be at least 0 and below 1, got 2"),
    "decay": (["optimizer.weight_decay=-1"], "optimizer.weight_decay must be at least 0"),
    "warm-up": (["optimizer.warmup_steps=-5"], "optimizer.warmup_steps must be at least 0"),
    "eval.limit": (["eval.limit=0"], "eval.limit must be at least 1 or null, got 0"),
    "reward module": (["reward.function=nope:x"], "reward.function=nope:x cannot be loaded"),
    "reward signature": (["reward.function=math:sqrt"], "reward.function=math:sqrt must take"),
    "reward name": (["reward.function=maths"], "reward.function must be math, strict or module:"),
    "reward of a source": (
        ["reward.by_source={x: 'a'}"], "reward.by_source.x must be math, strict or module:function"
    ),
    "source without reward": (
        ["reward.by_source={other: strict}"],
        "no reward for data source addition (",
    ),
    "wandb": (["wandb=project"], "wandb=project needs the package wandb, which is not installed"),
    "watchdog": (["watchdog.seconds=-1"], "watchdog.seconds must be at least 0"),
    "bad steps": (["max_bad_steps=0"], "max_bad_steps must be at least 1, got 0"),
    "resume without out": (["resume=auto", "out=null"], "resume=auto needs out=DIR"),
    "temperature": (["rollout.temperature=0"], "rollout.temperature must be above 0, got 0"),
}  # fmt: skip


@pytest.fixture
def no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the optional packages."""
    find, absent = importlib.util.find_spec, ("wandb", "datasets")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name)
    )


@pytest.mark.usefixtures("no_extras")
@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_mistakes_give_one_line_before_a_model_is_loaded(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    overrides, message = BAD[case]
    out = tmp_path / "run"
    assert main(arguments(out, *overrides)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert not out.exists()


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "steps: 1\nsteps: 2\n", "steps: [1\n", "# Title\n\ntext `x`: y\n", "\xff"],
)
def test_configuration_file_that_is_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="latin-1")
    assert main(["--config", str(file)]) == 2
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1 and errors.startswith("bupo.run: "), errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollot: {top_p: 1}", "unknown key rollot; did you mean rollout?"),
        ("rollout: {topp: 1}", "unknown key rollout.topp; did you mean rollout.top_p?"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_an_unknown_key_of_a_file(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err == f"bupo.run: {message}\n"
