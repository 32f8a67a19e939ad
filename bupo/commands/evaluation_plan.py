"""The plan of an evaluation: every check that does not need the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo.commands.models import read_model
from bupo.commands.sizes import Sizes, measure
from bupo.commands.sources import (
    Sources,
    check_engine,
    check_out,
    check_servers,
    find_sources,
)
from bupo.config import Config, ConfigError
from bupo.types import Prompt

TRAINING = (
    *("name", "out", "resume", "steps", "policy", "advantage", "phases", "max_bad_steps"),
    *("bupo.", "loss.", "critic.", "optimizer.", "checkpoint.", "watchdog.", "diagnostics."),
    *("lora.", "model.gradient_checkpointing"),
    *("data.train", "data.weights", "data.limit", "rollout.prompts", "rollout.samples", "wandb"),
    "rollout.servers",
)
"""Keys, or beginnings of keys, that do not change the result of an evaluation"""


@dataclass
class EvaluationPlan:
    """The checked settings, model and problems of an evaluation, before weights are loaded."""

    config: Config
    out: Path
    sources: Sources
    tokenizer: Any
    sizes: Sizes
    sets: dict[str, list[Prompt]]
    """Problems by data set"""
    dropped: int
    """Number of problems that are too long"""

    def describe(self) -> str:
        """Returns the summary that --dry_run shows and that every evaluation prints first."""
        config = self.config
        problems = ", ".join(f"{name} {len(prompts)}" for name, prompts in self.sets.items())
        numbers = sorted({config.eval.samples_of(name) for name in self.sets})
        samples = " or ".join(map(str, numbers))
        temperature = config.eval.temperature
        temperature = config.rollout.temperature if temperature is None else temperature
        top_p = config.rollout.top_p
        how = f"temperature {temperature}, top_p {top_p}" if temperature else "greedy"
        return (
            f"{config.name}: {self.sources.model}\n"
            f"  model    {self.sizes.model_line()}\n"
            f"  problems {problems}; {self.dropped} dropped for length\n"
            f"  samples  {samples} for each problem, {how}, "
            f"at most {config.rollout.max_new_tokens} tokens\n"
            f"  out      {self.out}"
        )


def make_plan(config: Config, out: Path) -> EvaluationPlan:
    """Checks the settings, model and problems, and writes nothing except a task's cached files.
    Raises ConfigError with one line."""
    earlier = out / "config.yaml"
    check_out(out)
    changed = configuration.changes_since(earlier, config, TRAINING) if earlier.is_file() else []
    sources = find_sources(config, training=False)
    check_engine(config)
    if changed:
        raise ConfigError(
            f"out={out} holds an evaluation with different settings ({'; '.join(changed)}); "
            "restore them or choose another out"
        )
    if not sources.held_out:
        raise ConfigError("eval.files is empty: nothing to evaluate on")

    from bupo.data.prompts import load_prompts  # slow to import, so after the cheap checks
    from bupo.evaluation.estimates import by_dataset
    from bupo.rewards.choice import check_functions, check_sources
    from bupo.runlog.display import Display

    check_functions(sources.reward)
    facts = read_model(config, sources.model)
    with Display().waiting("reading prompts"):
        prompts, dropped = load_prompts(
            sources.held_out, facts.tokenizer, config.data, config.eval.limit, apart=True
        )
    check_sources(sources.reward, prompts)
    config.eval.check_sources({p.source for p in prompts})
    facts.check(prompts, config.rollout.max_new_tokens)
    check_servers(config, sources.model, facts.tokenizer, prompts)
    sizes = measure(config, sources.model, max(len(p.token_ids) for p in prompts))
    sets = by_dataset(prompts)
    return EvaluationPlan(config, out, sources, facts.tokenizer, sizes, sets, dropped)
