"""Computes Avg@n, Pass@K and maj@n of a model with the engine and the reward that training uses.

    python -m bupo.evaluate model.path=MODEL eval.files=[test.parquet] eval.samples=32
    python -m bupo.evaluate --config RUN/config.yaml model.path=RUN/checkpoints/step_000300
    python -m bupo.evaluate ... eval.temperature=0 eval.samples=1           greedy

Writes a directory: config.yaml, responses/DATASET.jsonl (one line per problem: its responses, their
rewards and final answers), eval.jsonl (the figures with standard errors, the problem as the unit)
and pass_at_k.png. The same command with --out DIR continues where it stopped. Settings are
those of bupo.run; those that only training needs are ignored.
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
from bupo.commands.command import Command, user_paths
from bupo.commands.evaluation_plan import EvaluationPlan, make_plan
from bupo.commands.run_lock import locked
from bupo.commands.sources import build_task, make_engine
from bupo.config import Config, ConfigError
from bupo.terminal import TERMINAL, printable
from bupo.types import EvalResult, Prompt


def _settings(arguments: argparse.Namespace) -> tuple[Config, Path]:
    config = configuration.load(arguments.config, arguments.overrides)
    return config, Path(arguments.out or f"evals/{time.strftime('%Y%m%d-%H%M%S')}")


def _rows_done(
    file: Path, dataset: str, problems: Sequence[Prompt], config: Config
) -> list[dict[str, Any]]:
    """Returns the rows of a file that can be kept and rewrites the file with these rows only, as a
    killed process may have left an incomplete line. Raises ConfigError if the problems differ."""
    from bupo.evaluation.estimates import whole_batches
    from bupo.runlog.run_directory import json_lines, read_rows, replace_text

    rows = read_rows(file)
    for n, (row, problem) in enumerate(zip(rows, problems)):
        if (row["prompt"], row["answer"]) != (problem.text, problem.answer):
            raise ConfigError(f"{file}: problem {n} has changed; choose another out")
    rows = rows[: whole_batches(dataset, len(rows), len(problems), config)]
    replace_text(file, json_lines(rows))
    return rows


def execute(plan: EvaluationPlan) -> list[EvalResult]:
    """Locks the directory, evaluates every data set, and writes and returns the results."""
    from bupo.evaluation.estimates import evaluate, file_name
    from bupo.report import write_pass_at_k
    from bupo.rewards.choice import make_reward
    from bupo.runlog.display import Display
    from bupo.runlog.run_directory import append_rows, json_lines, replace_text

    config, out, results = plan.config, plan.out, []
    build_task(config, plan.sources)
    with ExitStack() as parts:
        with user_paths():
            (out / "responses").mkdir(parents=True, exist_ok=True)
            parts.enter_context(locked(out))
            replace_text(out / "config.yaml", configuration.dump(config))
        reward = make_reward(plan.sources.reward)
        parts.callback(reward.close)
        source, display = plan.sources.model, Display()
        with display.waiting(f"loading {source} into {config.rollout.engine}"):
            prompts = [p for problems in plan.sets.values() for p in problems]
            engine = make_engine(config, source, None, plan.tokenizer, prompts, out)
        parts.callback(engine.close)

        def generate(problems: Sequence[Prompt], samples: int, seed: str) -> Any:
            temperature = config.eval.temperature
            return engine.generate(problems, samples, seed, lambda: False, temperature)

        for name, problems in plan.sets.items():
            file = out / "responses" / file_name(name)
            done, keep = _rows_done(file, name, problems, config), partial(append_rows, file)
            with display.waiting(f"evaluation on {name}"):
                results.append(evaluate(name, problems, config, generate, reward, keep, done))
    replace_text(out / "eval.jsonl", json_lines([result.row() for result in results]))
    write_pass_at_k([result.row() for result in results], out / "pass_at_k.png")
    return results


def print_table(results: Sequence[EvalResult]) -> None:
    """Prints Avg@n, Pass@K and maj@n of each data set with standard errors; "-" if undefined."""
    ks = list(results[0].pass_k)
    table = [["data set", "problems", "n", "Avg@n", *(f"Pass@{k}" for k in ks), "maj@n"]]
    table[0] += ["tokens", "truncated", "not graded"]
    for r in results:
        name = printable(r.dataset)
        figures = [(r.avg, r.avg_se), *r.pass_k.values(), r.maj]
        cells = ["-" if p is None else " ± ".join(map(_digits, p)) for p in figures]
        shares = [f"{r.length:.0f}", f"{r.truncated:.1%}", f"{r.ungraded:.1%}"]
        table.append([name, str(r.problems), str(r.samples), *cells, *shares])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _digits(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _score_and_print(plan: EvaluationPlan) -> int:
    print_table(execute(plan))
    print(f"written: {plan.out}", file=TERMINAL)
    return 0


main = Command(
    program="bupo.evaluate",
    description=str(__doc__),
    epilog="Keys: python -m bupo.run --help. Used here: model, data, rollout, reward, eval, "
    "task, task_options, seed, name.",
    settings=_settings,
    make_plan=lambda settings: make_plan(*settings),
    execute=_score_and_print,
    kept=lambda out: f"what {out} already holds is kept; continue with --out {out}",
    stopped=lambda out: (
        f"stopped; continue with the same command and --out {out}"
        if out
        else "stopped before the evaluation began"
    ),
    config_help="YAML file, e.g. a run's config.yaml",
    out_help="output directory; default: evals/TIME",
).main
