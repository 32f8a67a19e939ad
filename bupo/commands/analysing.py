"""What every layer, attention and FFN of a model would say, and how sure of it they are.

    python -m bupo.analyze --model MODEL --data train.parquet          responses are generated
    python -m bupo.analyze --model RUN --data RUN/rollouts/step_000010.jsonl
    python -m bupo.analyze --model BASE --data book.txt whole_files=true compare=TUNED
    python -m bupo.analyze task=bupo.tasks.arithmetic rollout.max_new_tokens=24      no download

MODEL is a folder or hub name of a causal LM, or a run directory (its newest checkpoint); data are
those of bupo.run, rollouts of a run, or .txt files. Writes a directory: report.html (figures and
heat maps, one file), figures/, tokens.parquet (a row a token, layer and policy),
top_tokens.parquet, summary.json (means with standard errors, boundary layer, checks), texts.jsonl
and config.yaml. docs/internal_policies.md has the definitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo.commands.analysis_plan import Plan, Subject, make_plan, print_plan
from bupo.commands.ending import allowed, ended
from bupo.commands.models import load_model
from bupo.commands.run_lock import locked
from bupo.commands.sources import build_task, make_engine
from bupo.config import AnalysisConfig, ConfigError, RunError
from bupo.progress import watched_by
from bupo.terminal import TERMINAL

IGNORED = "data.weights, rollout.prompts, .samples, .refills, .max_logprob_gap"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    lines = [
        f"  {key} = {default}\n      {text}"
        for key, default, text in configuration.describe(AnalysisConfig)
    ]
    parser = argparse.ArgumentParser(
        prog="python -m bupo.analyze",
        description=__doc__,
        epilog="keys and defaults:\n" + "\n".join(lines) + f"\nNot used here: {IGNORED}.\n"
        "model.compute_dtype=bfloat16 holds the weights in bfloat16 too: nothing is trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="same as model.path=MODEL")
    parser.add_argument("--data", action="append", help="one of data.train; may be repeated")
    parser.add_argument("--config", type=Path, help="YAML file, e.g. an analysis' config.yaml")
    parser.add_argument("--out", help="directory to write; default analyses/TIME")
    parser.add_argument("--dry_run", action="store_true", help="check and print, load no weights")
    quotes = configuration.QUOTES
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=quotes)
    return parser.parse_intermixed_args(argv)


def _settings(arguments: argparse.Namespace) -> AnalysisConfig:
    config = configuration.read(arguments.config, arguments.overrides, AnalysisConfig)
    if arguments.model is not None:
        config = replace(config, model=replace(config.model, path=arguments.model))
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, train=arguments.data))
    return config


def execute(plan: Plan) -> list[Any]:
    """Loads the models one after the other, measures and writes; returns the Analyses."""
    with allowed():
        plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        return _analyse(plan)


def _analyse(plan: Plan) -> list[Any]:
    from bupo.commands.analysis_files import write_results, write_texts
    from bupo.commands.analysis_texts import again, generate
    from bupo.runlog.display import Progress
    from bupo.runlog.run_directory import replace_text

    config, first, progress = plan.config, plan.subjects[0], Progress(1, 0)
    build_task(plan.run, plan.sources)
    model: Any = None
    if plan.how != "generate" or config.rollout.engine == "hf":
        model = _loaded(plan, first)
    with allowed():
        replace_text(plan.out / "config.yaml", configuration.dump(config))
    texts = plan.texts
    if plan.how == "generate":
        with progress.waiting(f"starting {config.rollout.engine}"):
            engine = make_engine(plan.run, first.source, model, first.tokenizer, texts, plan.out)
        try:
            with progress.waiting(f"responses to {len(texts)} prompts") as share:
                texts = generate(texts, config, engine, share)
        finally:
            engine.close()
        texts = first.measurable(texts)
    write_texts(plan.out, texts)
    found: list[Any] = []
    for n, subject in enumerate(plan.subjects):
        if n:
            model = None  # its memory first
            before = {m.where for m in texts}
            if subject.own_tokens:
                texts = again(texts, plan.rows, config, subject.tokenizer)
            texts = subject.measurable(texts)
            if lost := before - {m.where for m in texts}:
                raise ConfigError(
                    f"{min(lost)} can be measured by {first.name}, but not by {subject.name}: too "
                    "long, or a single token; both have to have the same texts, so choose others"
                )
        model = model if model is not None else _loaded(plan, subject)
        with progress.waiting(f"measuring {subject.name}") as share, watched_by(share):
            found.append(_measured(config, subject, model, [m.text for m in texts]))
        with progress.waiting("writing tables and report"):
            write_results(plan.out, config, found, plan.how, subject.own_tokens, _facts(plan))
    return found


def _measured(config: AnalysisConfig, subject: Subject, model: Any, texts: list[Any]) -> Any:
    from bupo import internal

    try:
        return internal.analyse(
            model,
            texts,
            subject.tokenizer,
            name=subject.name,
            top_k=config.top_k,
            closer=config.heat_maps,
            closer_tokens=config.heat_map_tokens,
            stride=config.stride,
            temperature=config.temperature,
            tolerance=config.tolerance,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
        )
    except internal.IdentityError as error:
        raise RunError(f"{subject.name}: {error}; its figures would be wrong") from None
    except internal.DecompositionError as error:
        raise ConfigError(f"{subject.source} cannot be analysed: {error}") from None


def _facts(plan: Plan) -> list[str]:
    """For the page: whose texts these are."""
    config = plan.config
    files = ", ".join(plan.sources.train)
    how = {
        "generate": f"responses of {plan.subjects[0].name} to prompts of {files}, sampled at "
        f"temperature {config.rollout.temperature}",
        "column": f"the column {config.response} of {files}",
        "none": f"the texts of {files} themselves",
    }[plan.how]
    temperature = "" if config.temperature == 1 else f" Temperature {config.temperature}."
    models = " and ".join(s.source for s in plan.subjects)
    return [f"{models} on {how}.{temperature}"]


def _loaded(plan: Plan, subject: Subject) -> Any:
    import torch

    from bupo.policy import num_layers, unembedding
    from bupo.runlog.display import Progress

    with Progress(1, 0).waiting(f"loading {subject.source}"):
        model = load_model(plan.run, subject.source).eval()
        # Nothing is trained, so there is no float32 to keep.
        model = model.to(getattr(torch, plan.config.model.compute_dtype))
    try:  # before responses are generated
        num_layers(model)
        rows = unembedding(model).weight.shape[0]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{subject.source} cannot be analysed: {error}") from None
    if plan.config.top_k > rows:
        raise ConfigError(f"top_k={plan.config.top_k} exceeds the {rows} tokens of the vocabulary")
    return model


def print_results(found: Sequence[Any]) -> None:
    """The boundary layer and how the model converges."""
    for each in found:
        summary, boundary = each.summary(), each.boundary
        where = (
            f"layer {boundary.layer} of {each.flow.layers} "
            f"(95 % of resamples in {boundary.low}..{boundary.high})"
            if boundary.layer is not None
            else f"not clear: {boundary.reason}"
        )
        ways = summary["convergence"]
        print(
            f"{each.name}: {len(each.flow.token)} tokens of {len(each.texts)} texts\n"
            f"  boundary layer       {where}\n"
            f"  convergence          {ways['layer']['kind']} raw, "
            f"{ways['layer_normed']['kind']} with the final norm\n"
            f"  identities           {len(each.checks)} hold",
            *(f"\n  note                 {note}" for note in each.notes()),
            sep="",
        )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a violated identity or a disk that is full, 2 a configuration or a
    model that cannot be analysed, 130 stopped by Ctrl-C."""
    arguments = _arguments(argv)
    out = Path(arguments.out or f"analyses/{time.strftime('%Y%m%d-%H%M%S')}")

    def act() -> int:
        with allowed():
            plan = make_plan(_settings(arguments), out)
        print_plan(plan)
        if not arguments.dry_run:
            print_results(execute(plan))
            print(f"report: {out / 'report.html'}", file=TERMINAL)
        return 0

    return ended(
        "bupo.analyze",
        act,
        lambda: f"what was written to {out} before is kept; it begins anew with --out {out}",
        lambda: f"stopped; {out} holds what was written",
    )
