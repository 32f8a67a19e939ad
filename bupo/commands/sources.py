"""Turns a configuration into what the commands work on: the sources of model and data, the engine,
the task and the output directory. The model itself is loaded by bupo.commands.models."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bupo import hub, ranks
from bupo.commands.models import check_place, load_model
from bupo.commands.run_lock import waited_for
from bupo.config import Config, ConfigError, RewardConfig, shipped
from bupo.config.errors import require
from bupo.data import data_files
from bupo.runlog.display import Display
from bupo.tasks import TaskFiles

LOCK = "tasks.lock"
"""Lock file in the cache folder"""


@dataclass
class Sources:
    """The places from which a run takes its model and its data."""

    model: str
    """Folder or hub name"""
    train: list[str]
    held_out: list[str]
    files: TaskFiles | None
    """The files of the task, if there is one"""
    reward: RewardConfig
    """The rewards of the run, that of the task if none is set"""


def cache_dir() -> Path:
    """Returns the folder for files of tasks: $BUPO_CACHE, or bupo in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BUPO_CACHE") or Path(base) / "bupo")


def find_sources(config: Config, training: bool = True) -> Sources:
    """Returns the sources after checking that they exist; training data are left out unless
    `training`. Writes nothing except a task's cached files. Raises ConfigError."""
    files, reward = None, config.reward
    if config.task:
        task, cache = _task(config), cache_dir()
        with waited_for(cache / LOCK):  # another first run may be writing the same files
            files = task.prepare(config.task_options, cache)
        if reward.function is None and hasattr(task, "reward"):
            reward = replace(reward, function=f"{config.task}:reward")
    for key, given, made in (
        ("data.train", config.data.train, files and files.train),
        ("eval.files", config.eval.files, files and files.eval),
    ):
        if given and made:
            raise ConfigError(f"{key} is set, but task={config.task} brings its own data")
    model = config.model.path or (str(files.model) if files and files.model else None)
    if model is None:
        raise ConfigError("model.path is not set (folder or hub name of a causal LM)")
    train = [str(f) for f in files.train] if files and files.train else config.data.train
    held_out = [str(f) for f in files.eval] if files and files.eval else config.eval.files
    if training and config.eval.every and not held_out:
        raise ConfigError(
            f"eval.every={config.eval.every}, but there is nothing to evaluate on: set eval.files, "
            "or eval.every=0"
        )
    train = train if training else []
    for name in [*train, *held_out]:
        data_files.check(name)
    template = config.data.chat_template
    if template and not shipped(template).is_file():
        raise ConfigError(f"data.chat_template={template}: file not found")
    check_place("model.path", model)
    return Sources(model, train, held_out, files, reward)


def check_engine(config: Config, world: int = 1) -> None:
    """Raises ConfigError for an argument in rollout.vllm that vLLM does not have (if vLLM is not
    installed, the check is left to the engine), and for what so many ranks cannot have."""
    rollout = config.rollout
    if world > 1:
        require(
            rollout.engine != "vllm_server" or bool(rollout.servers),
            "rollout.engine=vllm_server with several ranks starts no server itself: start one or "
            "more, and list them in rollout.servers",
        )
        rollout.ranks_together(world)
    if rollout.engine != "hf" and rollout.vllm and importlib.util.find_spec("vllm"):
        from bupo.rollouts.vllm_options import check_options

        check_options(rollout)


def check_servers(config: Config, model: str, tokenizer: Any, prompts: Sequence[Any]) -> None:
    """Raises ConfigError if one of rollout.servers cannot serve these prompts. model: the folder or
    hub name of the weights."""
    rollout, base = config.rollout, hub.base_of(model) or model
    if rollout.engine != "vllm_server":
        return
    import torch

    from bupo.rollouts.vllm_options import arguments, imported
    from bupo.rollouts.vllm_serving import Server, check_server, gpus

    imported(rollout.engine)
    longest, dtype = max(len(p.token_ids) for p in prompts), config.model.compute_dtype
    gpu = torch.cuda.is_available()
    given = arguments(base, len(tokenizer), rollout, longest, dtype, config.seed, gpu)
    for url in rollout.servers:
        check_server(Server(url), given)
    if not rollout.servers:
        gpus(given)


def make_engine(
    config: Config, source: str, model: Any, tokenizer: Any, prompts: Sequence[Any], out: Path
) -> Any:
    """Starts the configured rollout engine for these prompts. model: the trainer's model, or None
    without a trainer. out: the directory for the engine's output, engine.log."""
    from bupo import adapters
    from bupo.rl import sharding
    from bupo.rl.weight_sync import load, load_all
    from bupo.rollouts.hf import HFEngine
    from bupo.rollouts.vllm import VllmEngine
    from bupo.rollouts.vllm_server import VllmServerEngine

    if config.rollout.engine == "hf":
        model = model or load_model(config, source)
        dtype = config.model.compute_dtype
        return HFEngine(model, tokenizer, config.rollout, dtype, sharding.gathered)
    longest = max(len(p.token_ids) for p in prompts)
    dtype = config.model.compute_dtype
    server = config.rollout.engine == "vllm_server"
    base = hub.base_of(source)
    if base or (server and model is None):
        model = load_model(config, source).cpu()  # the engine needs the memory of the device
    make = VllmServerEngine if server else VllmEngine
    given = (base or source, tokenizer, config.rollout, longest, dtype, config.seed)
    engine: Any = make(*given, out / "engine.log")
    half = dtype == "bfloat16"
    try:
        if server:  # it may hold any weights
            load_all(engine, model, half)
        elif model is not None and (trained := adapters.parameters(model)):
            load(engine, model, trained, half)
    except BaseException:  # also Ctrl-C
        engine.close()
        raise
    return engine


def build_task(config: Config, sources: Sources) -> None:
    """Makes the task's weights once, if the configuration names a task and no other model."""
    if sources.files is not None and sources.model == str(sources.files.model):
        folder, wait = Path(sources.model), Display().waiting(f"making the model of {config.task}")
        with waited_for(cache_dir() / LOCK) if ranks.is_first() else nullcontext(), wait:
            ranks.from_first(lambda: _task(config).build(config.task_options, folder))


def _task(config: Config) -> Any:
    try:
        module = importlib.import_module(str(config.task))
    except ImportError as error:
        raise ConfigError(f"task={config.task} cannot be imported: {error}") from None
    if not hasattr(module, "prepare") or not hasattr(module, "build"):
        raise ConfigError(f"task={config.task} is not a task: it has no prepare() and build()")
    return module


def check_out(out: Path) -> None:
    """Raises ConfigError unless this process, as the only one, can make a run directory there."""
    there = out.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"out={out}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK) or str(there).startswith(("/proc", "/sys")):
        raise ConfigError(f"out={out}: {there} cannot be written to")
