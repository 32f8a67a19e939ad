"""Avg@n, Pass@K and maj@n of a model, by the engine and the reward that training uses.

    python -m bupo.evaluate model.path=MODEL eval.files=[test.parquet] eval.samples=32
    python -m bupo.evaluate --config RUN/config.yaml model.path=RUN/checkpoints/step_000300
    python -m bupo.evaluate ... eval.temperature=0 eval.samples=1           greedy

Writes a directory: config.yaml, responses/DATASET.jsonl (a line a problem: its responses, their
rewards and final answers), eval.jsonl (the figures with standard errors, the problem as the unit)
and pass_at_k.png. The same command with --out DIR continues where it was stopped. Settings are
those of bupo.run; what only training needs is ignored.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bupo import config as configuration
from bupo.commands.ending import allowed, ended
from bupo.commands.models import read_model
from bupo.commands.run_lock import locked
from bupo.commands.sizes import measure
from bupo.commands.sources import (
    build_task,
    check_engine,
    check_out,
    find_sources,
    make_engine,
)
from bupo.config import Config, ConfigError
from bupo.terminal import TERMINAL

_TRAINING = (
    *("name", "out", "resume", "steps", "algorithm", "advantage", "phases", "max_bad_steps"),
    *("bupo.", "loss.", "critic.", "optimizer.", "checkpoint.", "watchdog.", "diagnostics."),
    *("data.train", "data.weights", "data.limit", "rollout.prompts", "rollout.samples", "wandb"),
)
"""Settings that no evaluation reads"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bupo.evaluate",
        description=__doc__,
        epilog="Keys: python -m bupo.run --help. Used here: model, data, rollout, reward, eval, "
        "task, task_options, seed, name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file, e.g. a run's config.yaml")
    parser.add_argument("--out", help="directory to write; default evals/TIME")
    parser.add_argument("--dry_run", action="store_true", help="check and print, load no weights")
    quotes = configuration.QUOTES
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=quotes)
    return parser.parse_intermixed_args(argv)


def _rows_done(
    file: Path, dataset: str, problems: Sequence[Any], config: Config
) -> list[dict[str, Any]]:
    """The rows of a file that can be kept; the file, which a kill may have cut, then holds these
    alone. They must be of these problems."""
    from bupo.evaluation.estimates import whole_batches
    from bupo.runlog.run_directory import json_lines, read_rows, replace_text

    rows = read_rows(file)
    for n, (row, problem) in enumerate(zip(rows, problems)):
        if (row["prompt"], row["answer"]) != (problem.text, problem.answer):
            raise ConfigError(f"{file}: problem {n} is another one now; choose another out")
    rows = rows[: whole_batches(dataset, len(rows), len(problems), config)]
    replace_text(file, json_lines(rows))
    return rows


def run(config: Config, out: Path, dry_run: bool) -> list[Any]:
    """Evaluates every data set of eval.files; returns their EvalResults."""
    earlier = out / "config.yaml"
    with allowed():
        check_out(out)
        changed = (
            configuration.changes_since(earlier, config, _TRAINING) if earlier.is_file() else []
        )
        sources = find_sources(config, training=False)
        check_engine(config)
    if changed:
        raise ConfigError(
            f"out={out} holds an evaluation with other settings ({'; '.join(changed)}); "
            "restore them or choose another out"
        )
    if not sources.held_out:
        raise ConfigError("eval.files is empty: nothing to evaluate on")

    from bupo.data.prompts import load_prompts
    from bupo.evaluation import estimates as evaluation
    from bupo.report import write_pass_at_k
    from bupo.rewards.choice import check_functions, check_sources, make_reward
    from bupo.runlog.display import Progress
    from bupo.runlog.run_directory import append_rows, json_lines, replace_text

    check_functions(config.reward)
    facts = read_model(config, sources.model)
    tokenizer = facts.tokenizer
    with Progress(1, 0).waiting("reading prompts") as share:
        prompts, dropped = load_prompts(
            sources.held_out, tokenizer, config.data, config.eval.limit, share, True
        )
    check_sources(config.reward, prompts)
    config.eval.check_sources({p.source for p in prompts})
    facts.check(prompts, config.rollout.max_new_tokens)
    sets = evaluation.by_dataset(prompts)
    shown = ", ".join(f"{name} {len(problems)}" for name, problems in sets.items())
    samples = " or ".join(map(str, sorted({config.eval.samples_of(name) for name in sets})))
    sizes = measure(config, sources.model, max(len(p.token_ids) for p in prompts))
    print(
        f"{config.name}: {sources.model}\n"
        f"  model    {sizes.model_line()}\n"
        f"  problems {shown}; {dropped} dropped for length\n"
        f"  samples  {samples} for each problem, {_sampling(config)}, "
        f"at most {config.rollout.max_new_tokens} tokens\n"
        f"  out      {out}",
        file=TERMINAL,
    )
    if dry_run:
        return []
    build_task(config, sources)
    progress, results = Progress(1, 0), []
    with ExitStack() as parts:
        with allowed():
            (out / "responses").mkdir(parents=True, exist_ok=True)
            parts.enter_context(locked(out))
            replace_text(earlier, configuration.dump(config))
        reward = make_reward(config.reward)
        parts.callback(reward.close)
        with progress.waiting(f"loading {sources.model} into {config.rollout.engine}"):
            engine = make_engine(config, sources.model, None, tokenizer, prompts, out)
        parts.callback(engine.close)
        for name, problems in sets.items():
            file = out / "responses" / evaluation.file_name(name)
            done = _rows_done(file, name, problems, config)
            with progress.waiting(f"evaluation on {name}") as share:
                result = evaluation.evaluate(
                    name,
                    problems,
                    config,
                    lambda batch, samples, seed: engine.generate(
                        batch, samples, seed, lambda: False, config.eval.temperature
                    ),
                    reward,
                    partial(append_rows, file),
                    done,
                    share,
                )
            results.append(result)
    replace_text(out / "eval.jsonl", json_lines([result.row() for result in results]))
    write_pass_at_k([result.row() for result in results], out / "pass_at_k.png")
    return results


def _sampling(config: Config) -> str:
    temperature = config.eval.temperature
    temperature = config.rollout.temperature if temperature is None else temperature
    return f"temperature {temperature}, top_p {config.rollout.top_p}" if temperature else "greedy"


def print_table(results: Sequence[Any]) -> None:
    """Avg@n, Pass@K and maj@n of each data set with their standard errors; "-" where undefined."""
    ks = list(results[0].pass_k)
    table = [["data set", "problems", "n", "Avg@n", *(f"Pass@{k}" for k in ks), "maj@n"]]
    table[0] += ["tokens", "truncated", "not graded"]
    for r in results:
        name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in r.dataset)
        figures = [(r.avg, r.avg_se), *r.pass_k.values(), r.maj]
        cells = ["-" if p is None else " ± ".join(map(_digits, p)) for p in figures]
        shares = [f"{r.length:.0f}", f"{r.truncated:.1%}", f"{r.ungraded:.1%}"]
        table.append([name, str(r.problems), str(r.samples), *cells, *shares])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _digits(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a disk that is full, 2 a configuration that cannot be run."""
    arguments = _arguments(argv)
    out = Path(arguments.out or f"evals/{time.strftime('%Y%m%d-%H%M%S')}")

    def act() -> int:
        with allowed():
            config = configuration.load(arguments.config, arguments.overrides)
        results = run(config, out, arguments.dry_run)
        if results:
            print_table(results)
            print(f"written: {out}", file=TERMINAL)
        return 0

    return ended(
        "bupo.evaluate",
        act,
        lambda: f"what was written to {out} before is kept, go on with --out {out}",
        lambda: f"stopped; the same command with --out {out} continues",
    )
