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
import importlib.util
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
from bupo.config import Config, ConfigError, RunError, shipped
from bupo.inputs import (
    Sources,
    build_task,
    check_out,
    disk_trouble,
    find_sources,
    make_engine,
)
from bupo.models import load_model, read_model
from bupo.sizes import Sizes, measure


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    lines = [
        f"  {key} = {default}\n      {text}"
        for key, default, text in configuration.describe(Config)
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
    quotes = configuration.QUOTES
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=quotes)
    return parser.parse_intermixed_args(argv)  # options may stand between key=value


@dataclass
class Plan:
    """All that can be known, and go wrong, before weights are loaded."""

    config: Config
    out: Path
    resume_from: Path | None
    sources: Sources
    tokenizer: Any
    layers: int
    sizes: Sizes
    train_prompts: list[Any]
    eval_prompts: list[Any]
    dropped: int


def make_plan(config: Config) -> Plan:
    """Checks paths, model configuration, layer, tokenizer and prompts.

    Raises ConfigError with one line; has written nothing but a task's cached files.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(config.out or f"runs/{config.name}-{config.algorithm}-{now}")
    check_out(out)
    resume_from = _resume_point(config, out)
    sources = find_sources(config)
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb={config.wandb} needs the package wandb, which is not installed")

    from bupo.rl.progress import Progress
    from bupo.rl.prompts import PromptOrder, load_prompts  # slow, so after the cheap checks
    from bupo.rl.rewards import check_sources
    from bupo.rl.schedule import Schedule

    facts = read_model(config, sources.model)
    tokenizer, layers = facts.tokenizer, facts.layers
    schedule = Schedule(config)
    if not config.bupo.auto_layer:
        schedule.check(layers, sources.model)
    with Progress(1, 0).waiting("reading prompts") as share:
        prompts, dropped = load_prompts(
            sources.train, tokenizer, config.data, config.data.limit, share
        )
    PromptOrder(prompts, config.rollout.prompts, config.seed, config.data.weights)
    eval_prompts, eval_dropped = (
        load_prompts(sources.held_out, tokenizer, config.data, config.eval.limit, apart=True)
        if sources.held_out
        else ([], 0)
    )
    check_sources(config.reward, [*prompts, *eval_prompts])
    facts.check([*prompts, *eval_prompts], config.rollout.max_new_tokens)
    return Plan(
        config=config,
        out=out,
        resume_from=resume_from,
        sources=sources,
        tokenizer=tokenizer,
        layers=layers,
        sizes=measure(
            config,
            sources.model,
            max(len(p.token_ids) for p in prompts),
            None if config.bupo.auto_layer else max(schedule.layers(), default=None),
        ),
        train_prompts=prompts,
        eval_prompts=eval_prompts,
        dropped=dropped + eval_dropped,
    )


def _resume_point(config: Config, out: Path) -> Path | None:
    """The checkpoint to go on from. A folder that holds another run is refused, so no result is
    lost or continued under other settings."""
    from bupo.rl.checkpoint import complete, load_step

    if config.resume == "auto":
        points, earlier = complete(out), out / "config.yaml"
        if earlier.is_file() and (points or (out / "metrics.jsonl").exists()):
            changed = configuration.changes_since(earlier, config, configuration.MAY_CHANGE)
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
    from bupo.rl.schedule import Schedule

    config, size = plan.config, plan.config.rollout
    responses = size.prompts * size.samples
    sizes, responses_each = plan.sizes, responses // config.optimizer.updates_per_step
    trained = f" ({sizes.internal / sizes.parameters:.0%} of the parameters)"
    fewer = " (fewer where bupo.auto_stop says so)" if config.bupo.auto_stop else ""
    phases = (
        f"steps 1-{config.bupo.steps}{fewer} train a layer that is measured before them, then the "
        f"final policy to step {config.steps}"
        if config.bupo.auto_layer
        else Schedule(config).describe(plan.layers)
    )
    print(
        f"{config.name}: {config.algorithm}, {config.advantage} advantages, on "
        f"{plan.sources.model}\n"
        f"  model    {sizes.model_line()}\n"
        f"  phases   {phases}{trained if sizes.internal else ''}\n"
        f"  step     {size.prompts} prompts x {size.samples} responses = {responses}, "
        f"{config.optimizer.updates_per_step} updates of "
        f"{responses_each} responses ({size.prompts // config.optimizer.updates_per_step} "
        f"prompts), at most {size.max_new_tokens} new tokens each\n"
        f"  data     {len(plan.train_prompts)} training prompts, {len(plan.eval_prompts)} for "
        f"evaluation x {config.eval.samples}, {plan.dropped} dropped for length\n"
        f"  memory   {sizes.memory_line()}\n"
        f"  rollouts {sizes.engine_line(config)}\n"
        f"  disk     {sizes.disk_line(config)}\n"
        f"  out      {plan.out}" + (f" (continues {plan.resume_from})" if plan.resume_from else ""),
        file=sys.stderr,
    )


def _model_to_train(config: Config, source: str) -> Any:
    """In training mode, without dropout: rollout and training must be the same policy."""
    import torch

    model = load_model(config, source).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _reference(plan: Plan, pad: int) -> Any:
    """A frozen copy of the policy that the run began with, read again where that came from: no
    checkpoint holds it. Raises ConfigError if other weights lie there now."""
    from bupo.rl import checkpoint
    from bupo.rl.reference import Reference

    model = load_model(plan.config, plan.sources.model)
    found, file = checkpoint.fingerprint(model), plan.out / "reference.sha256"
    if plan.resume_from is None:
        file.write_text(found + "\n", encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8").strip() != found:
        raise ConfigError(
            f"loss.kl_coef: {plan.sources.model} does not hold the weights that the run began with "
            f"({file} says which)"
        )
    return Reference(model, plan.config, pad)


def _critic(plan: Plan, pad: int) -> Any:
    """From the policy's first weights, or as it was in the checkpoint."""
    from bupo.rl import checkpoint
    from bupo.rl.critic import Critic

    critic = Critic(_model_to_train(plan.config, plan.sources.model), plan.config, pad)
    if plan.resume_from is not None:
        critic.load(plan.resume_from / checkpoint.CRITIC)
    return critic


def execute(plan: Plan) -> int | None:
    """Loads the model and trains; returns the stopping signal, if any."""
    from bupo.auto_layer import with_measured_layer
    from bupo.policy import check_internal_policy
    from bupo.rl import checkpoint
    from bupo.rl.loop import Run
    from bupo.rl.metrics import replace_text
    from bupo.rl.progress import Progress
    from bupo.rl.rewards import make_reward
    from bupo.rl.schedule import Schedule
    from bupo.rl.update import Trainer

    config, tokenizer = plan.config, plan.tokenizer
    build_task(config, plan.sources)
    source = str(plan.resume_from or plan.sources.model)
    with Progress(1, 0).working(f"loading {source}"):
        model = _model_to_train(config, source)
    trained = None if config.bupo.auto_layer else Schedule(config).layers() or plan.layers
    try:
        check_internal_policy(model, trained)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source} cannot be trained: {error}") from None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer = Trainer(model, config, pad)
    state = {"step": 0, "drawn": 0}
    if plan.resume_from is not None:
        state = checkpoint.load_state(plan.resume_from)
        checkpoint.load_optimizer(plan.resume_from, model, trainer.optimizer)
    reward = make_reward(config.reward)
    engine = None
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        replace_text(plan.out / "config.yaml", configuration.dump(config))
        prompts = [*plan.train_prompts, *plan.eval_prompts]
        reference = _reference(plan, pad) if config.loss.kl_coef else None
        critic = _critic(plan, pad) if config.advantage == "ppo" else None
        with Progress(1, 0).working(f"starting {config.rollout.engine} for rollouts"):
            engine = make_engine(config, source, model, tokenizer, prompts)
        if config.bupo.auto_layer:
            config = with_measured_layer(config, plan.out, model, engine, plan.train_prompts)
        run = Run(
            config, plan.out, model, tokenizer, plan.train_prompts, plan.eval_prompts,
            engine, reward, trainer, reference, critic, state["step"], state["drawn"],
        )  # fmt: skip
        return run.train()
    finally:
        if engine is not None:
            engine.close()
        reward.close()


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run that could not go on (nan, a full disk, a rollout engine with
    other weights than the trainer), 2 a configuration that cannot be run, 128 + n stopped by
    signal n."""
    arguments = _arguments(argv)
    overrides = arguments.overrides + ([f"out={arguments.out}"] if arguments.out else [])
    try:
        file = arguments.config or shipped("arithmetic.yaml")
        plan = make_plan(configuration.load(file, overrides))
    except ConfigError as error:
        print(f"bupo.run: {error}", file=sys.stderr)
        return 2
    print_plan(plan)
    if arguments.dry_run:
        return 0
    try:
        signal = execute(plan)
    except ConfigError as error:
        print(f"bupo.run: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"bupo.run: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        kept = f"all up to the newest checkpoint in {plan.out} is"
        print(f"bupo.run: {disk_trouble(error, kept)} with resume=auto", file=sys.stderr)
        return 1
    if signal is not None:
        print(f"stopped; continue with: --out {plan.out} resume=auto", file=sys.stderr)
        return 128 + signal
    print(f"report: {plan.out / 'report.html'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
