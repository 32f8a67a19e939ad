"""Shows what each layer, attention block and FFN of a model predicts, and how certain it is.

    python -m bupo.analyze --model MODEL --data train.parquet          responses are generated
    python -m bupo.analyze --model RUN --data RUN/rollouts/step_000010.jsonl
    python -m bupo.analyze --model BASE --data book.txt whole_files=true compare=TUNED
    python -m bupo.analyze task=bupo.tasks.arithmetic rollout.max_new_tokens=24      no download

MODEL is a folder or hub name of a causal LM, or a run directory (its newest checkpoint); the data
can be anything that bupo.run reads, the rollouts of a run, or .txt files. Writes a directory:
report.html (figures and heat maps, one file), figures/, tokens.parquet (a row per token, layer and
policy), top_tokens.parquet, summary.json (means with standard errors, boundary layer, checks),
texts.jsonl and config.yaml. docs/internal_policies.md has the definitions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo.commands.analysis_plan import AnalysisPlan, Subject, make_plan
from bupo.commands.command import Command, keys_and_defaults, user_paths
from bupo.commands.models import load_model
from bupo.commands.run_lock import locked
from bupo.commands.sources import build_task, make_engine
from bupo.config import AnalysisConfig, ConfigError, RunError
from bupo.terminal import TERMINAL

IGNORED = "data.weights, rollout.prompts, .samples, .refills, .max_logprob_gap"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="same as model.path=MODEL")
    parser.add_argument("--data", action="append", help="a value for data.train; may be repeated")
    parser.add_argument("--minutes", type=float, help="same as minutes=MINUTES")


def _settings(arguments: argparse.Namespace) -> tuple[AnalysisConfig, Path]:
    config = configuration.read(arguments.config, arguments.overrides, AnalysisConfig)
    if arguments.model is not None:
        config = replace(config, model=replace(config.model, path=arguments.model))
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, train=arguments.data))
    if arguments.minutes is not None:
        config = replace(config, minutes=arguments.minutes)
    return config, Path(arguments.out or f"analyses/{time.strftime('%Y%m%d-%H%M%S')}")


def execute(plan: AnalysisPlan) -> list[Any]:
    """Loads and measures the models in turn, writes the results and returns the Analyses."""
    with user_paths():
        plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        return _analyse(plan)


def _analyse(plan: AnalysisPlan) -> list[Any]:
    from bupo.commands.analysis_files import write_results, write_texts
    from bupo.commands.analysis_texts import again, generate
    from bupo.runlog.display import Display
    from bupo.runlog.run_directory import replace_text

    config, first, display = plan.config, plan.subjects[0], Display()
    build_task(plan.run, plan.sources)
    model: Any = None
    if plan.how != "generate" or config.rollout.engine == "hf":
        model = _loaded(plan, first)
    with user_paths():
        replace_text(plan.out / "config.yaml", configuration.dump(config))
    texts = plan.texts
    if plan.how == "generate":
        with display.waiting(f"starting {config.rollout.engine}"):
            engine = make_engine(plan.run, first.source, model, first.tokenizer, texts, plan.out)
        try:
            with display.waiting(f"responses to {len(texts)} prompts"):
                texts = generate(texts, config, engine)
        finally:
            engine.close()
        texts = first.measurable(texts)
    write_texts(plan.out, texts)
    found: list[Any] = []
    for n, subject in enumerate(plan.subjects):
        if n:
            model = None  # free its memory before the next model is loaded
            before = {m.where for m in texts}
            if subject.own_tokens:
                texts = again(texts, plan.rows, config, subject.tokenizer)
            texts = subject.measurable(texts)
            if lost := before - {m.where for m in texts}:
                raise ConfigError(
                    f"{min(lost)} can be measured by {first.name}, but not by {subject.name}, for "
                    "which it is too long or a single token; both models need the same texts, so "
                    "choose others"
                )
        model = model if model is not None else _loaded(plan, subject)
        with display.waiting(f"measuring {subject.name}"):
            some = config
            if config.minutes is not None:
                some = replace(config, minutes=config.minutes / len(plan.subjects))
            if config.minutes is not None and n:  # the same tokens, if the tokenizer is the same
                count, closer = len(found[0].flow.token), found[0].closer_tokens
                some = replace(config, minutes=None, tokens=count, heat_map_tokens=closer)
            found.append(_measured(some, subject, model, [m.text for m in texts]))
        if config.minutes is not None and not n:
            texts = [texts[number] for number in found[0].numbers]
            write_texts(plan.out, texts)
        with display.waiting("writing tables and report"):
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
            minutes=config.minutes,
            tokens=config.tokens,
            seed=config.seed,
        )
    except internal.IdentityError as error:
        raise RunError(f"{subject.name}: {error}; its figures would be wrong") from None
    except internal.DecompositionError as error:
        raise ConfigError(f"{subject.source} cannot be analysed: {error}") from None


def _facts(plan: AnalysisPlan) -> list[str]:
    """Returns the sentence of the report that names the models and the texts."""
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


def _loaded(plan: AnalysisPlan, subject: Subject) -> Any:
    import torch

    from bupo.policy import num_layers, unembedding
    from bupo.runlog.display import Display

    with Display().waiting(f"loading {subject.source}"):
        model = load_model(plan.run, subject.source).eval()
        # Nothing is trained, so no float32 copy of the weights is needed.
        model = model.to(getattr(torch, plan.config.model.compute_dtype))
    try:  # fail before responses are generated
        num_layers(model)
        rows = unembedding(model).weight.shape[0]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{subject.source} cannot be analysed: {error}") from None
    if plan.config.top_k > rows:
        raise ConfigError(f"top_k={plan.config.top_k} exceeds the {rows} tokens of the vocabulary")
    return model


def print_results(found: Sequence[Any]) -> None:
    """Prints the boundary layer and the kind of convergence of each model."""
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
            f"{each.name}: {summary['tokens']} of {summary['of_tokens']} tokens of "
            f"{len(each.texts)} texts\n"
            f"  boundary layer       {where}\n"
            f"  convergence          {ways['layer']['kind']} raw, "
            f"{ways['layer_normed']['kind']} with the final norm\n"
            f"  identities           {len(each.checks)} hold",
            *(f"\n  note                 {note}" for note in each.notes()),
            sep="",
        )


def _analyse_and_report(plan: AnalysisPlan) -> int:
    print_results(execute(plan))
    print(f"report: {plan.out / 'report.html'}", file=TERMINAL)
    return 0


main = Command(
    program="bupo.analyze",
    description=str(__doc__),
    epilog=keys_and_defaults(AnalysisConfig) + f"\nNot used here: {IGNORED}.\n"
    "model.compute_dtype=bfloat16 also stores the weights in bfloat16, since nothing is trained.",
    settings=_settings,
    make_plan=lambda settings: make_plan(*settings),
    execute=_analyse_and_report,
    kept=lambda out: f"what {out} already holds is kept; --out {out} starts the analysis again",
    stopped=lambda out: f"stopped; {out} holds what was written so far" if out else "stopped",
    config_help="YAML file, e.g. an analysis' config.yaml",
    out_help="output directory; default: analyses/TIME",
    add_arguments=_add_arguments,
).main
