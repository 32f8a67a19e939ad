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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo import ranks
from bupo.commands.command import Command, keys_and_defaults, user_paths
from bupo.commands.fit import CARDS
from bupo.commands.models import check_deterministic, load_model, silence_noise
from bupo.commands.run_lock import locked_by_first
from bupo.commands.run_plan import PROMPTS_FILE, RunPlan, make_plan, resume_point
from bupo.commands.sources import build_task, make_engine
from bupo.config import Config, ConfigError, shipped
from bupo.terminal import TERMINAL


def _model_to_train(config: Config, source: str) -> Any:
    """Loads the model in training mode without randomness: sampling and training must use the same
    policy."""
    model = load_model(config, source).train()
    silence_noise(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _policy(plan: RunPlan, source: str) -> Any:
    """Loads the model to train. Raises ConfigError."""
    from bupo import adapters
    from bupo.rl import checkpoint
    from bupo.runlog.display import Display

    if plan.resume_from is not None:
        with Display().waiting(f"checking {source}"):
            checkpoint.verify(plan.resume_from)
    config, lora = plan.config, plan.config.lora
    if lora.rank is None:
        with checkpoint.reading(plan.resume_from), Display().waiting(f"loading {source}"):
            model = _model_to_train(config, source)
    else:
        with Display().waiting(f"loading {source}"):
            model = _model_to_train(config, source)
        _check_start(plan, model, "lora.rank")
        with checkpoint.reading(plan.resume_from):
            adapters.add(model, lora, source, config.seed, plan.resume_from)
    return model


def _trainer(plan: RunPlan, model: Any, pad: int) -> Any:
    """Makes the trainer of a model, which several ranks divide. Raises ConfigError if it cannot be
    trained."""
    from bupo.policy import check_internal_policy
    from bupo.rl import sharding
    from bupo.rl.schedule import Schedule
    from bupo.rl.update import Trainer

    measured = plan.config.bupo.auto_layer is not None
    trained = None if measured else Schedule(plan.config).layers() or plan.layers
    try:
        trainer = Trainer(model, plan.config, pad)
        check_deterministic(model)
        check_internal_policy(model, trained)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{plan.weights} cannot be trained: {error}") from None
    sharding.reshard(model)
    return trainer


def _check_start(plan: RunPlan, model: Any, key: str) -> None:
    """Records a checksum of the weights that the run begins with, which no checkpoint holds but
    setting `key` needs. In a resumed run, raises ConfigError if the weights have changed."""
    from bupo.rl import checkpoint
    from bupo.runlog.run_directory import replace_text

    found, file = checkpoint.fingerprint(model), plan.out / "reference.sha256"
    if plan.resume_from is None:
        replace_text(file, found + "\n")
    elif not file.is_file() or file.read_text(encoding="utf-8").strip() != found:
        raise ConfigError(
            f"{key}: {plan.sources.model} no longer holds the weights that the run started "
            f"with (their checksum is in {file}); restore them"
        )


def _reference(plan: RunPlan, trainer: Any, pad: int) -> Any:
    """Returns the policy that the run began with: the trainer's model without its adapters or, if
    it has none, a frozen copy from the original place. Raises ConfigError if that has changed."""
    from bupo.rl import sharding
    from bupo.rl.forward import Forward, WithoutAdapters

    if plan.config.lora.rank is not None:
        return WithoutAdapters(trainer.forward)
    model = load_model(plan.config, plan.sources.model)
    _check_start(plan, model, "loss.kl_coef")
    sharding.shard(model, plan.config.model)
    return Forward(model.eval().requires_grad_(False), plan.config, pad)


def _critic(plan: RunPlan, pad: int) -> Any:
    """Makes the critic from the policy's first weights, or restores it from the checkpoint."""
    from bupo.rl import checkpoint
    from bupo.rl.critic import Critic

    critic = Critic(_model_to_train(plan.config, plan.sources.model), plan.config, pad)
    if plan.resume_from is not None:
        with checkpoint.reading(plan.resume_from):
            critic.load(plan.resume_from / checkpoint.CRITIC)
    return critic


def execute(plan: RunPlan) -> int | None:
    """Locks the run directory, loads the model and trains. Returns the number of the signal that
    stopped the run, or None."""
    with user_paths():
        plan.out.mkdir(parents=True, exist_ok=True)
    try:
        with locked_by_first(plan.out):
            if len(seen := {str(each) for each in ranks.gathered(plan.resume_from)}) > 1:
                raise ConfigError(
                    f"out={plan.out}: ranks see different checkpoints ({', '.join(sorted(seen))}); "
                    "all machines need the same file system there; start again"
                )
            if resume_point(plan.config, plan.out) != plan.resume_from:
                raise ConfigError(
                    f"out={plan.out}: another process has used it since this one checked it; "
                    "start again"
                )
            return _train(plan)
    finally:
        if ranks.is_first():
            with suppress(OSError):  # it is not empty
                plan.out.rmdir()


def _train(plan: RunPlan) -> int | None:
    from bupo.rewards.choice import make_reward
    from bupo.rl import checkpoint
    from bupo.rl.auto_layer import with_measured_layer
    from bupo.rl.loop import Parts, Run
    from bupo.runlog.display import Display
    from bupo.runlog.run_directory import replace_text
    from bupo.runlog.watchdog import Watchdog

    config, tokenizer = plan.config, plan.tokenizer
    build_task(config, plan.sources)
    model = _policy(plan, plan.weights)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    trainer, state = _trainer(plan, model, pad), {"step": 0, "drawn": 0}
    if plan.resume_from is not None:
        state = checkpoint.load_state(plan.resume_from)
        checkpoint.load_optimizer(plan.resume_from, trainer.optimizer)
    with ExitStack() as parts:
        reward = make_reward(plan.sources.reward)
        parts.callback(reward.close)
        with user_paths():
            replace_text(plan.out / "config.yaml", configuration.dump(config))
            replace_text(plan.out / PROMPTS_FILE, plan.prompts_hash + "\n")
        watchdog = Watchdog(plan.out, config.watchdog.seconds, config.watchdog.kill)
        parts.callback(watchdog.close)
        prompts = [*plan.train_prompts, *plan.eval_prompts]
        # These are loaded before the engine, which takes the memory that is left.
        reference = _reference(plan, trainer, pad) if config.loss.kl_coef else None
        critic = _critic(plan, pad) if config.advantage == "ppo" else None
        start = f"starting {config.rollout.engine} for rollouts"
        with watchdog.stage(start), Display().waiting(start, watchdog.alive):
            engine = make_engine(config, plan.weights, model, tokenizer, prompts, plan.out)
        parts.callback(engine.close)
        if config.bupo.auto_layer is not None:
            with watchdog.stage("auto_layer"):
                config = with_measured_layer(
                    config, plan.out, model, engine, plan.train_prompts, state["step"],
                    watchdog.alive,
                )  # fmt: skip
        watchdog.close()  # the run starts its own watchdog
        run = Run(
            Parts(
                config=config,
                out=plan.out,
                model=model,
                tokenizer=tokenizer,
                train_prompts=plan.train_prompts,
                eval_prompts=plan.eval_prompts,
                engine=engine,
                reward=reward,
                trainer=trainer,
                reference=reference,
                critic=critic,
                start=state["step"],
                drawn=state["drawn"],
            )
        )
        return run.train()


def _settings(arguments: argparse.Namespace) -> tuple[Config, str | None, int | None]:
    overrides = arguments.overrides + ([f"out={arguments.out}"] if arguments.out else [])
    config = configuration.load(arguments.config or shipped("arithmetic.yaml"), overrides)
    return config, arguments.card, arguments.ranks


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--for",
        dest="card",
        metavar="CARD",
        help=f"plan for the memory of another card: {', '.join(CARDS)}, or a size such as 48GiB",
    )
    parser.add_argument(
        "--ranks", type=_number_of_ranks, help="plan for this number of processes, one per card"
    )


def _number_of_ranks(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of processes, got {text!r}")
    return int(text)


def _kept(out: Path | None) -> str:
    up_to = f"everything up to the newest checkpoint in {out}" if out else "what was there before"
    way = f"--out {out} resume=auto" if out else "the same command"
    return f"{up_to} is kept; continue with {way}"


def _stopped(out: Path | None) -> str:
    if out is None or not (out / "metrics.jsonl").exists():
        return "stopped before training began"
    return f"stopped; continue with: --out {out} resume=auto"


def _train_and_report(plan: RunPlan) -> int:
    """Trains and returns the exit status: 0 when done, 128 + n when stopped by signal n."""
    if (signal := execute(plan)) is not None:
        print(_stopped(plan.out), file=TERMINAL)
        return 128 + signal
    print(f"report: {plan.out / 'report.html'}", file=TERMINAL)
    return 0


main = Command(
    program="bupo.run",
    description=str(__doc__),
    epilog=keys_and_defaults(Config),
    settings=_settings,
    make_plan=lambda settings: make_plan(*settings),
    add_arguments=_add_arguments,
    execute=_train_and_report,
    several=True,
    kept=_kept,
    stopped=_stopped,
    config_help="YAML file; default: the arithmetic recipe",
    out_help="run directory (the same as out=DIR)",
).main
