"""The plan of a training run: every check that does not need the weights."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bupo import config as configuration
from bupo import hub, ranks
from bupo.commands.fit import memory_of_card, verdict
from bupo.commands.models import ModelFacts, read_model
from bupo.commands.sizes import Sizes, measure
from bupo.commands.sources import (
    Sources,
    check_engine,
    check_out,
    check_servers,
    find_sources,
)
from bupo.config import Config, ConfigError

PROMPTS_FILE = "prompts.sha256"
"""File in the run directory that tells whether moved data are still the same"""


@dataclass
class RunPlan:
    """The checked settings, model and prompts of a training run, before weights are loaded."""

    config: Config
    out: Path
    resume_from: Path | None
    sources: Sources
    tokenizer: Any
    layers: int
    sizes: Sizes
    train_prompts: list[Any]
    eval_prompts: list[Any]
    prompts_hash: str
    """Hash of the training prompts and their order"""
    dropped: int
    """Number of prompts that are too long"""
    fit: str
    """Whether the run fits the memory of its card; empty if there is no card"""
    warnings: list[str]
    """Settings that are allowed, but probably not intended"""

    @property
    def weights(self) -> str:
        """Folder or hub name of the weights that are loaded. A checkpoint of LoRA adapters does not
        hold the rest of the model."""
        resumed = self.resume_from is not None and self.config.lora.rank is None
        return str(self.resume_from) if resumed else self.sources.model

    def describe(self) -> str:
        """Returns the summary that --dry_run shows and that every run prints first."""
        from bupo.rl.schedule import Schedule

        config, size = self.config, self.config.rollout
        responses = size.prompts * size.samples
        sizes, optimizer = self.sizes, config.optimizer
        parts = optimizer.updates_per_step
        twice = f" x {optimizer.epochs} epochs" if optimizer.epochs > 1 else ""
        share = self._share_of_evaluation(responses)
        evaluated = {config.eval.samples_of(p.source) for p in self.eval_prompts}
        samples = " or ".join(map(str, sorted(evaluated or {config.eval.samples})))
        trained = f" ({sizes.internal / sizes.parameters:.0%} of the parameters)"
        fewer = " (fewer if bupo.auto_stop ends them early)" if config.bupo.auto_stop else ""
        phases = (
            f"steps 1-{config.bupo.steps}{fewer} train the layer that bupo.auto_layer finds, "
            f"then the final policy to step {config.steps}"
            if config.bupo.auto_layer is not None
            else Schedule(config).describe(self.layers)
        )
        return (
            f"{config.name}: policy {config.policy}, {config.advantage} advantages, on "
            f"{self.sources.model}\n"
            f"  model    {sizes.model_line()}\n"
            f"  phases   {phases}{trained if sizes.internal and config.lora.rank is None else ''}\n"
            f"  step     {size.prompts} prompts x {size.samples} responses = {responses}, "
            f"{parts} updates{twice} of {responses // parts} responses ({size.prompts // parts} "
            f"prompts), at most {size.max_new_tokens} new tokens each\n"
            f"  data     {len(self.train_prompts)} training prompts, {len(self.eval_prompts)} for "
            f"evaluation x {samples}, {self.dropped} dropped for length\n"
            + (f"  rollouts {share:.0%} of all responses are for evaluations\n" if share else "")
            + self._time_line()
            + f"  memory   {sizes.memory_line()}\n"
            f"  engine   {sizes.engine_line(config)}\n"
            + (f"  card     {self.fit}\n" if self.fit else "")
            + (f"  ranks    {sizes.ranks}\n" if sizes.ranks else "")
            + f"  disk     {sizes.disk_line(config)}\n"
            f"  out      {self.out}"
            + (f" (continues {self.resume_from})" if self.resume_from else "")
            + "".join(f"\n  warning  {text}" for text in self.warnings)
        )

    def _share_of_evaluation(self, responses: int) -> float:
        """Returns the share of the run's responses that evaluations generate, about."""
        config, switches = self.config, int(self.config.policy == "bupo")
        each = sum(config.eval.samples_of(p.source) for p in self.eval_prompts)
        every = config.eval.every
        times = 2 + switches + ((config.steps - 1) // every if every else 0)
        return times * each / (times * each + config.steps * responses)

    def _time_line(self) -> str:
        """Returns the time of the steps that are left, if the run has done some before."""
        from bupo.rl.checkpoint import load_step
        from bupo.runlog.run_directory import read_rows

        rows = read_rows(self.out / "metrics.jsonl")
        if self.resume_from is None or not rows:
            return ""
        seconds = median(row["time/step"] for row in rows)
        try:
            steps = self.config.steps - load_step(self.resume_from)
        except ConfigError:  # damaged, or removed by a run that has the lock, which will be told
            return ""
        left = timedelta(seconds=round(seconds * steps))
        return f"  time     {seconds:.3g} s a step so far; without evaluations, {left} are left\n"


def make_plan(config: Config, card: str | None = None, world: int | None = None) -> RunPlan:
    """Checks paths, model configuration, layer, tokenizer and prompts, and writes nothing except a
    task's cached files. card, world: the card and the number of ranks to plan for; None: the GPU of
    this machine, if it has one, and the ranks that there are. Raises ConfigError with one line."""
    out = Path(config.out or f"runs/{config.name}-{config.algorithm}-{_now()}")
    check_out(out)
    resume_from = resume_point(config, out)
    sources = find_sources(config)
    world = world or ranks.world()
    check_engine(config, world)
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"wandb={config.wandb} needs the package wandb, which is not installed")

    from bupo.data.prompt_order import PromptOrder
    from bupo.data.prompts import load_prompts  # slow to import, so after the cheap checks
    from bupo.rewards.choice import check_functions, check_sources
    from bupo.runlog.display import Display

    check_functions(sources.reward)
    _refuse_adapters(sources.model)
    facts = read_model(config, sources.model)
    tokenizer, layers = facts.tokenizer, facts.layers
    schedule = _schedule(config, facts)
    with Display().waiting("reading prompts"):
        prompts, dropped = load_prompts(sources.train, tokenizer, config.data, config.data.limit)
    prompts_hash = _hash_of(prompts, bool(config.reward.by_source))
    if resume_from:
        _check_prompts(out, prompts_hash)
    PromptOrder(prompts, config.rollout.prompts, config.seed, config.data.weights)
    eval_prompts, eval_dropped = (
        load_prompts(sources.held_out, tokenizer, config.data, config.eval.limit, apart=True)
        if sources.held_out
        else ([], 0)
    )
    check_sources(sources.reward, [*prompts, *eval_prompts])
    config.eval.check_sources({p.source for p in eval_prompts})
    facts.check([*prompts, *eval_prompts], config.rollout.max_new_tokens)
    check_servers(config, sources.model, tokenizer, [*prompts, *eval_prompts])
    memory = _memory_of_this_gpu() if card is None else memory_of_card(card)
    sizes_of = partial(
        measure,
        source=sources.model,
        longest_prompt=max(len(p.token_ids) for p in prompts),
        internal_layer=max(schedule.layers(), default=None) if schedule is not None else None,
        gpu=memory is not None,
        world=world,
    )
    return RunPlan(
        config=config,
        out=out,
        resume_from=resume_from,
        sources=sources,
        tokenizer=tokenizer,
        layers=layers,
        sizes=sizes_of(config),
        fit="" if memory is None else verdict(config, memory, sizes_of),
        train_prompts=prompts,
        eval_prompts=eval_prompts,
        prompts_hash=prompts_hash,
        dropped=dropped + eval_dropped,
        warnings=_warnings(config, tokenizer, [*prompts, *eval_prompts]),
    )


def _schedule(config: Config, facts: ModelFacts) -> Any:
    """Returns the schedule of a run, or None if bupo.auto_layer is to measure its layer. Raises
    ConfigError if it does not fit the model."""
    from bupo.rl.schedule import Schedule

    if config.bupo.auto_layer is not None:
        return None
    schedule, lora = Schedule(config), config.lora.rank is not None
    schedule.check(facts.layers, facts.source, facts.tied, lora, several=ranks.world() > 1)
    return schedule


def _now() -> str:
    """Returns the time of rank 0."""
    return ranks.from_first(lambda: time.strftime("%Y%m%d-%H%M%S"))


def _refuse_adapters(model: str) -> None:
    """Raises ConfigError if the folder of the model to train holds adapters instead of a model."""
    if base := hub.base_of(model):
        raise ConfigError(
            f"model.path={model} holds LoRA adapters of {base}; merge them into the model before "
            "you train it further (docs/memory.md)"
        )


def _check_prompts(out: Path, found: str) -> None:
    """Raises ConfigError if the run in `out` started with prompts that have another hash."""
    earlier = out / PROMPTS_FILE
    if earlier.is_file() and earlier.read_text().strip() != found:
        raise ConfigError(
            f"resume=auto: the run in out={out} started with different training prompts: "
            "data.train, the tokenizer or the chat template has changed; restore it or choose "
            "another out"
        )


def _memory_of_this_gpu() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _hash_of(prompts: Sequence[Any], by_source: bool) -> str:
    """Returns the SHA-256 of the prompts as training reads them, whatever their files' location."""
    digest = hashlib.sha256()
    for p in prompts:
        source = p.source if by_source else ""  # else it may be a file name, which can change
        digest.update(json.dumps([p.token_ids, p.answer, source, p.file]).encode())
    return digest.hexdigest()


def _warnings(config: Config, tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """Describes settings that are allowed, but probably not what the user intends."""
    found, loss = [], config.loss
    if loss.type == "cispo" and loss.clip_high < 1:
        found.append(
            f"loss.type=cispo with loss.clip_high={loss.clip_high:g} caps the ratio at "
            f"{1 + loss.clip_high:g}; CISPO's published caps are about 5 (loss.clip_high=4)"
        )
    clip = max(loss.clip_low, loss.clip_high)
    if loss.type == "gspo" and clip > 0.01:
        found.append(
            f"loss.type=gspo hardly ever clips at {clip:g}: its ratio is a mean over a response; "
            "the published values are loss.clip_low=3e-4 and loss.clip_high=4e-4"
        )
    if config.advantage == "dr_grpo" and loss.aggregation != "seq_sum_longest":
        found.append(
            f"advantage=dr_grpo with loss.aggregation={loss.aggregation} is not Dr.GRPO, which "
            "uses loss.aggregation=seq_sum_longest"
        )
    bos = tokenizer.bos_token_id
    without = [p for p in prompts if p.token_ids[0] != bos]
    if bos is not None and without and tokenizer("a")["input_ids"][0] == bos:
        found.append(
            f"{len(without)} of {len(prompts)} prompts do not begin with {tokenizer.bos_token}, "
            "which this tokenizer puts before plain text: a model that was trained with it answers "
            "worse without it; begin data.chat_template with {{ bos_token }}"
        )
    return found


def resume_point(config: Config, out: Path) -> Path | None:
    """Returns the checkpoint to continue from, or None. Raises ConfigError if the folder holds
    another run, so that no result is lost or continued under other settings."""
    from bupo.rl.checkpoint import load_step
    from bupo.runlog.run_directory import checkpoints

    if config.resume == "auto":
        points, earlier = checkpoints(out), out / "config.yaml"
        if points or (out / "metrics.jsonl").exists():
            if not earlier.is_file():
                raise ConfigError(
                    f"resume=auto: out={out} holds a run, but not its config.yaml, without "
                    "which its settings are unknown; put it back or choose another out"
                )
            free: tuple[str, ...] = configuration.MAY_CHANGE
            if points and config.optimizer.schedule == "linear":
                free = tuple(key for key in free if key != "steps")
            changed = configuration.changes_since(earlier, config, free)
            why = " (optimizer.schedule=linear computes the learning rate of every step from it)"
            changed = [text + why * text.startswith("steps: ") for text in changed]
            if changed:
                raise ConfigError(
                    f"resume=auto: out={out} holds a run with different settings ("
                    + "; ".join(changed)
                    + "); restore them or choose another out"
                )
        done = load_step(points[-1]) if points else 0
        if done > config.steps:
            raise ConfigError(
                f"resume=auto: the run in out={out} has done {done} steps, but steps={config.steps}"
            )
        return points[-1] if points else None
    if (out / "metrics.jsonl").exists() or (out / "checkpoints").exists():
        raise ConfigError(f"out={out} holds a run; continue it with resume=auto or choose another")
    return None
