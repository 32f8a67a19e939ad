"""Train a model by Bottom-up Policy Optimization or a baseline.

    python -m bupo.run                                  the built-in arithmetic recipe
    python -m bupo.run algorithm=grpo                   its baseline, from the same warm start
    python -m bupo.run --config recipes/FILE.yaml steps=100 optimizer.lr=2e-6
    python -m bupo.run --config FILE --out DIR resume=auto

Writes a run directory: config.yaml, metrics.jsonl, eval.jsonl, rollouts/, checkpoints/,
tensorboard/, report.html and its plots. Ctrl-C or SIGTERM saves a checkpoint and exits.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that wait by spinning cost a busy machine a factor of ten and
# more on models of this size, and gain an idle one nothing that can be seen.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bupo import config as configuration
from bupo.config import Config, ConfigError
from bupo.tasks import TaskFiles


def recipe(name: str) -> Path:
    """A recipe that comes with bupo."""
    beside = Path(__file__).parent / "recipes" / name
    return beside if beside.is_file() else Path(__file__).parent.parent / "recipes" / name


def cache_dir() -> Path:
    """Where tasks keep what they make: $BUPO_CACHE, or bupo in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BUPO_CACHE") or Path(base) / "bupo")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    lines = [
        f"  {key} = {default}\n      {text}" for key, default, text in configuration.describe()
    ]
    parser = argparse.ArgumentParser(
        prog="python -m bupo.run",
        description=__doc__,
        epilog="keys and defaults:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file; default: the arithmetic recipe")
    parser.add_argument("--out", help="run directory (same as out=DIR)")
    parser.add_argument("--dry_run", action="store_true", help="check and print, load no weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see below")
    return parser.parse_intermixed_args(argv)  # options may stand between key=value


@dataclass
class Plan:
    """All that can be known, and go wrong, before weights are loaded."""

    config: Config
    out: Path
    resume_from: Path | None
    files: TaskFiles | None
    model_path: str
    tokenizer: Any
    layers: int
    train_prompts: list[Any]
    eval_prompts: list[Any]
    dropped: int


def make_plan(config: Config) -> Plan:
    """Checks paths, model configuration, layer, tokenizer and prompts.

    Raises ConfigError with one line; has written nothing but a task's cached files.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(config.out or f"runs/{config.name}-{config.algorithm}-{now}")
    _check_out(out)
    resume_from = _resume_point(config, out)
    files = _task(config).prepare(config.task_options, cache_dir()) if config.task else None
    for key, given, made in (
        ("data.train", config.data.train, files and files.train),
        ("eval.files", config.eval.files, files and files.eval),
    ):
        if given and made:
            raise ConfigError(f"{key} is set, but task={config.task} brings its own data")
    model_path = config.model.path or (str(files.model) if files else None)
    if model_path is None:
        raise ConfigError("model.path is not set (folder or hub name of a causal LM)")
    train = [str(f) for f in files.train] if files and files.train else config.data.train
    held_out = [str(f) for f in files.eval] if files and files.eval else config.eval.files
    for name in [*train, *held_out, *filter(None, [config.data.chat_template])]:
        if not Path(name).is_file():
            raise ConfigError(f"data file not found: {name}")

    from transformers import AutoConfig, AutoTokenizer  # slow, so after the cheap checks

    from bupo.rl.prompts import PromptOrder, load_prompts
    from bupo.rl.rewards import FunctionReward

    if config.reward.function != "math":
        FunctionReward(config.reward.function)
    if model_path.startswith(("/", ".")) and not Path(model_path).is_dir():
        raise ConfigError(f"model.path={model_path}: folder not found")
    try:
        model_config = AutoConfig.from_pretrained(model_path)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={model_path} cannot be read: {first}") from None
    text_config = model_config.get_text_config(decoder=True)
    layers = text_config.num_hidden_layers
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and config.rollout.max_new_tokens >= context:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} does not fit the model's "
            f"context of {context} tokens"
        )
    if config.algorithm == "bupo" and config.bupo.layer > layers:
        raise ConfigError(
            f"bupo.layer={config.bupo.layer} is out of range: {model_path} has layers 1..{layers}"
        )
    prompts, dropped = load_prompts(train, tokenizer, config.data, config.data.limit)
    PromptOrder(prompts, config.rollout.prompts, config.seed)
    eval_prompts, eval_dropped = (
        load_prompts(held_out, tokenizer, config.data, config.eval.limit) if held_out else ([], 0)
    )
    return Plan(
        config=config,
        out=out,
        resume_from=resume_from,
        files=files,
        model_path=model_path,
        tokenizer=tokenizer,
        layers=layers,
        train_prompts=prompts,
        eval_prompts=eval_prompts,
        dropped=dropped + eval_dropped,
    )


def _task(config: Config) -> Any:
    try:
        module = importlib.import_module(str(config.task))
    except ImportError as error:
        raise ConfigError(f"task={config.task} cannot be imported: {error}") from None
    if not hasattr(module, "prepare") or not hasattr(module, "build"):
        raise ConfigError(f"task={config.task} is not a task: it has no prepare() and build()")
    return module


def _check_out(out: Path) -> None:
    there = out.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"out={out}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK) or str(there).startswith(("/proc", "/sys")):
        raise ConfigError(f"out={out}: {there} cannot be written to")


def _resume_point(config: Config, out: Path) -> Path | None:
    """The checkpoint to go on from. A folder that holds another run is refused, so no result is
    lost or continued under other settings."""
    from bupo.rl.checkpoint import complete, load_step

    if config.resume == "auto":
        points, earlier = complete(out), out / "config.yaml"
        if earlier.is_file() and (points or (out / "metrics.jsonl").exists()):
            changed = configuration.changes_since(earlier, config)
            if changed:
                raise ConfigError(
                    f"resume=auto: out={out} holds a run with other settings ("
                    + "; ".join(changed)
                    + "); restore them or choose another out"
                )
        done = load_step(points[-1]) if points else 0
        if done > config.steps:
            raise ConfigError(f"resume=auto: out={out} has done {done} steps, steps={config.steps}")
        return points[-1] if points else None
    if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
        raise ConfigError(f"out={out} holds a run; continue it with resume=auto or choose another")
    return None


def print_plan(plan: Plan) -> None:
    """What --dry_run shows, and every run begins with."""
    config, size = plan.config, plan.config.rollout
    responses = size.prompts * size.samples
    phases = (
        f"steps 1-{config.internal_steps} train layer {config.bupo.layer} of {plan.layers}, "
        f"then the final policy to step {config.steps}"
        if config.internal_steps
        else f"the final policy for {config.steps} steps"
    )
    print(
        f"{config.name}: {config.algorithm} on {plan.model_path}\n"
        f"  phases   {phases}\n"
        f"  step     {size.prompts} prompts x {size.samples} responses = {responses}, "
        f"{config.optimizer.updates_per_step} updates of "
        f"{responses // config.optimizer.updates_per_step} responses\n"
        f"  data     {len(plan.train_prompts)} training prompts, {len(plan.eval_prompts)} for "
        f"evaluation x {config.eval.samples}, {plan.dropped} dropped for length\n"
        f"  out      {plan.out}" + (f" (continues {plan.resume_from})" if plan.resume_from else ""),
        file=sys.stderr,
    )


def execute(plan: Plan) -> int | None:
    """Loads the model and trains; returns the stopping signal, if any."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from bupo.policy import check_internal_policy
    from bupo.rl import checkpoint
    from bupo.rl.loop import Run
    from bupo.rl.rewards import make_reward
    from bupo.rl.rollouts import HFEngine, RolloutEngine, VllmEngine
    from bupo.rl.update import Trainer

    logging.disable_progress_bar()  # ours is the only live line
    config, tokenizer = plan.config, plan.tokenizer
    if plan.files is not None:
        _task(config).build(config.task_options, plan.files)
    source = plan.resume_from or plan.model_path
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation=config.model.attn_implementation,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{source} cannot be loaded: {first}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.train()
    for module in model.modules():  # rollout and training must be the same policy
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_internal_policy(model, config.bupo.layer if config.internal_steps else plan.layers)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = Trainer(model, config, pad)
    start = 0
    if plan.resume_from is not None:
        start = checkpoint.load_step(plan.resume_from)
        checkpoint.load_optimizer(plan.resume_from, model, trainer.optimizer)
    reward = make_reward(config.reward)
    engine: RolloutEngine = HFEngine(model, tokenizer, config.rollout)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        (plan.out / "config.yaml").write_text(configuration.dump(config), encoding="utf-8")
        if config.rollout.engine == "vllm":
            longest = max(len(p.token_ids) for p in [*plan.train_prompts, *plan.eval_prompts])
            engine = VllmEngine(
                str(source), tokenizer, config.rollout, longest, config.model.compute_dtype,
                config.seed,
            )  # fmt: skip
        run = Run(
            config, plan.out, model, tokenizer, plan.train_prompts, plan.eval_prompts,
            engine, reward, trainer, start,
        )  # fmt: skip
        return run.train()
    finally:
        engine.close()
        reward.close()


def _sync_error() -> type[Exception]:
    from bupo.rl.weight_sync import SyncError  # imports torch, so not at the top

    return SyncError


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a rollout engine with other weights than the trainer, 2 a
    configuration that cannot be run, 128 + n stopped by signal n."""
    arguments = _arguments(argv)
    overrides = arguments.overrides + ([f"out={arguments.out}"] if arguments.out else [])
    try:
        file = arguments.config or recipe("arithmetic.yaml")
        plan = make_plan(configuration.load(file, overrides))
        print_plan(plan)
        if arguments.dry_run:
            return 0
        signal = execute(plan)
    except ConfigError as error:
        print(f"bupo.run: {error}", file=sys.stderr)
        return 2
    except _sync_error() as error:
        print(f"bupo.run: {error}", file=sys.stderr)
        return 1
    if signal is not None:
        print(f"stopped; continue with: --out {plan.out} resume=auto", file=sys.stderr)
        return 128 + signal
    print(f"report: {plan.out / 'report.html'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
