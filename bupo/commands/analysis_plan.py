"""The plan of an analysis: every check that does not need the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo.commands.models import ModelFacts, check_place, read_model
from bupo.commands.sizes import Sizes, measure
from bupo.commands.sources import (
    Sources,
    check_engine,
    check_out,
    check_servers,
    find_sources,
)
from bupo.config import AnalysisConfig, Config, ConfigError

ENTROPY_ROWS, LENS_ROWS = 8, 6
"""Rows of logits for each token and layer. Entropies need those of what a layer, its attention and
its FFN read and write, raw and normed; ranks and KL need six of them again for each layer that is
kept, and once those of the model."""


@dataclass
class Subject:
    """A model to analyse, before its weights are loaded."""

    name: str
    """Short name for figures and tables"""
    facts: ModelFacts
    own_tokens: bool = False
    """Whether it is compared with a model that has a different tokenizer"""

    @property
    def source(self) -> str:
        return self.facts.source

    @property
    def tokenizer(self) -> Any:
        return self.facts.tokenizer

    def measurable(self, texts: Sequence[Any]) -> list[Any]:
        """Returns the texts that this model can be measured on. Raises ConfigError if there are
        none, or if one exceeds the model's positions or its vocabulary."""
        from bupo.commands.analysis_texts import measurable

        kept = measurable(texts, self.facts.positions)
        self.facts.check_tokens(max(max(m.text.token_ids) for m in kept))
        return kept


@dataclass
class AnalysisPlan:
    """The checked settings, models and texts of an analysis, before weights are loaded."""

    config: AnalysisConfig
    run: Config
    """The same settings as those of a run"""
    out: Path
    sources: Sources
    subjects: list[Subject]
    rows: list[Any]
    texts: list[Any]
    """Measured texts, or the Prompts to which responses are generated"""
    how: str
    """generate, column or none"""
    available: int
    """Number of texts in the data"""

    def describe(self) -> str:
        """Returns the summary that --dry_run shows and that every analysis prints first."""
        config, first = self.config, self.subjects[0]
        lengths = [
            len(t.token_ids) if self.how == "generate" else len(t.response_ids) for t in self.texts
        ]
        texts = f"{len(self.texts)} of {self.available}, "
        texts += {
            "generate": f"one response to each by {config.rollout.engine}, temperature "
            f"{config.rollout.temperature}, at most {config.rollout.max_new_tokens} tokens",
            "column": f"their responses: {sum(lengths)} tokens, longest {max(lengths)}",
            "none": f"measured as they are: {sum(lengths)} tokens, longest {max(lengths)}",
        }[self.how]
        lines, sizes_of = [f"analysis of {first.source}"], []
        for n, subject in enumerate(self.subjects):
            sizes = measure(self.run, subject.source, max(lengths))
            sizes_of.append(sizes)
            title = "compared" if n else "model"
            lines.append(f"  {title:<8} {subject.name}: {sizes.model_line()}")
        lines.append(f"  texts    {texts}")
        most = len(lengths) * config.rollout.max_new_tokens
        tokens = most if self.how == "generate" else sum(lengths)
        if config.tokens is not None:
            tokens = min(tokens, config.tokens + config.heat_maps * config.heat_map_tokens)
        seconds = sum(_measuring_time(config, found, tokens) for found in sizes_of)
        if config.minutes is not None:
            seconds = min(seconds, 60 * config.minutes)
        bound = "at most " if self.how == "generate" else ""
        beside = ", not counting generation" if self.how == "generate" else ""
        lines.append(f"  time     {bound}about {_duration(seconds)} to measure{beside}")
        lines.append(f"  out      {self.out}")
        return "\n".join(lines)


def make_plan(config: AnalysisConfig, out: Path) -> AnalysisPlan:
    """Checks the settings, models and texts, and writes nothing except a task's cached files.
    Raises ConfigError with one line."""
    check_out(out)
    if (out / "config.yaml").is_file():
        changed = configuration.changes_since(out / "config.yaml", config, ("rollout.servers",))
        if changed:
            raise ConfigError(
                f"out={out} holds an analysis with different settings ({'; '.join(changed)}); "
                "choose another out"
            )
    if config.task is None and config.model.path is None:
        raise ConfigError(
            "no model: --model FOLDER --data FILE; to try it without either: "
            "task=bupo.tasks.arithmetic rollout.max_new_tokens=24"
        )
    for name in config.data.train:
        if name.endswith(".txt") and not Path(name).is_file():
            raise ConfigError(f"data file not found: {name}")
    path = config.model.path and newest(config.model.path)
    config_of_files = replace(config, model=replace(config.model, path=path))
    sources = find_sources(config_of_files.as_run())
    check_engine(config_of_files.as_run())
    if not sources.train:
        raise ConfigError("no data: --data FILE (parquet, JSON lines or .txt)")

    from bupo.commands.analysis_texts import again, choose_rows, tokenise

    rows, how, available = choose_rows(config, sources.train)
    run = config_of_files.as_run(how == "generate")
    paths = [sources.model, *([newest(config.compare)] if config.compare else [])]
    names = [label(path) for path in paths]
    if config.model.path is None:
        names[0] = str(config.task).rpartition(".")[2]
    subjects = _subjects(run, paths, names)
    texts = tokenise(rows, config, subjects[0].tokenizer, how)
    if how == "generate":
        for subject in subjects:
            own = tokenise(rows, config, subject.tokenizer, how) if subject.own_tokens else texts
            subject.facts.check(own, config.rollout.max_new_tokens)
        check_servers(run, sources.model, subjects[0].tokenizer, texts)
    else:
        texts = subjects[0].measurable(texts)
        for other in subjects[1:]:
            own = again(texts, rows, config, other.tokenizer) if other.own_tokens else texts
            other.measurable(own)
    return AnalysisPlan(config, run, out, sources, subjects, rows, texts, how, available)


def newest(model: str) -> str:
    """Returns the newest checkpoint if `model` is a run directory, else `model` unchanged."""
    if not (Path(model) / "checkpoints").is_dir():
        return model
    from bupo.runlog.run_directory import checkpoints

    points = checkpoints(Path(model))
    if not points:
        raise ConfigError(f"{model} is a run directory without a complete checkpoint")
    return str(points[-1])


def _subjects(run: Config, paths: Sequence[str], names: list[str]) -> list[Subject]:
    found: list[Subject] = []
    for path, name in zip(paths, names):
        check_place("model" if not found else "compare", path)
        found.append(Subject(name, read_model(run, path)))
    for other in found[1:]:
        other.own_tokens = other.tokenizer.get_vocab() != found[0].tokenizer.get_vocab()
    if len(found) == 2 and found[0].name == found[1].name:
        parents = [Path(s.source).resolve().parent.name for s in found]
        names = [f"{p}/{s.name}" for p, s in zip(parents, found)]
        if names[0] == names[1]:
            names = [f"{found[0].name} (first)", f"{found[1].name} (compared)"]
        found = [replace(s, name=n) for s, n in zip(found, names)]
    return found


def label(path: str) -> str:
    place = Path(path)
    if place.parent.name == "checkpoints":  # RUN/checkpoints/step_000300
        return f"{place.parent.parent.name}/{place.name}"
    return place.parent.name if place.name == "model" else place.name


def _measuring_time(config: AnalysisConfig, sizes: Sizes, tokens: int) -> float:
    """Estimates the seconds that all products with the head take, which dominate the measurement,
    by timing a small block."""
    import torch

    from bupo.internal.analysis import kept_layers
    from bupo.internal.log_probs import log_probs
    from bupo.policy import Unembedding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, block = 64, min(8192, sizes.vocabulary)
    hidden = torch.randn(rows, sizes.width, device=device)
    head = Unembedding(torch.randn(block, sizes.width, device=device), None, None, 1.0)
    best = math.inf
    for _ in range(4):
        begin = time.perf_counter()
        float(log_probs(head, hidden).exp().sum())
        best = min(best, time.perf_counter() - begin)
    kept = len(kept_layers(sizes.layers, config.stride))
    rows_of_token = ENTROPY_ROWS * sizes.layers + LENS_ROWS * kept + 1
    return tokens * rows_of_token * sizes.vocabulary / block * best / rows


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, round(seconds))} s"
