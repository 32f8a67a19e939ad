"""Tokens per second of rollouts by bupo's vLLM engine, against a bare LLM.generate of the same
requests by the same engine, on a CPU. Protocol: bench/README.md.

    python bench/bench_rollouts.py --model FOLDER         (real_models.py makes a real one)

A random Qwen3 whose head has padded rows is measured as well.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Timed, environment, milliseconds_of, time_rounds
from real_models import random_qwen3
from rows import Row, aligned, append, bar, print_run
from tables import rollouts_table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bupo.config import Config, ModelConfig, RolloutConfig
from bupo.rl.forward import Forward
from bupo.rl.weight_sync import gap
from bupo.rollouts.vllm import VllmEngine
from bupo.types import Policy, Prompt

OURS, FAST, BARE = "bupo", "bupo, deterministic=false", "LLM.generate"
LISTS = "LLM.generate, allowed_token_ids"
"""Keeps padded rows out by a list of the other rows in each request"""
VOCAB, ROWS = 151669, 151936
"""Tokens of Qwen3, and rows of its head"""


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that a model answers."""

    prompts: int
    prompt_tokens: tuple[int, int]
    """of the shortest prompt and of the longest; the others are spread evenly"""
    new_tokens: int

    def requests(self, vocab: int) -> list[Prompt]:
        random = torch.Generator().manual_seed(0)
        lengths = torch.linspace(*self.prompt_tokens, self.prompts).long().tolist()
        ids = [torch.randint(5, vocab, (length,), generator=random).tolist() for length in lengths]
        return [Prompt(n, "", "", tokens, "") for n, tokens in enumerate(ids)]


def padded_model(folder: Path) -> None:
    """Writes a small Qwen3 with a head as large as that of the real one."""
    random_qwen3(2, 256, ROWS, eos_token_id=None).save_pretrained(folder)
    words = {f"t{n}": n for n in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(folder)


class Way(Timed):
    """One way to generate the same responses."""

    def __init__(self, name: str, run: Callable[[], int]) -> None:
        super().__init__(name, torch.device("cpu"))
        self.run, self.tokens = run, 0

    def run_once(self, turn: int) -> float:
        def run() -> None:
            self.tokens = self.run()

        return milliseconds_of(run, self.device)


def ways(engine: VllmEngine, prompts: list[Prompt], with_lists: bool) -> list[Way]:
    """The engine's own parameters are those of the bare calls: they are taken from a call."""
    llm, config = engine._llm, engine._config
    sent: list[Any] = []
    enqueue = llm.enqueue
    llm.enqueue = lambda *given, **named: sent.append(given) or enqueue(*given, **named)
    engine.generate(prompts, 1, "seed", lambda: False)
    llm.enqueue = enqueue
    requests, parameters = sent[0]

    def ours(deterministic: bool) -> int:
        config.deterministic = deterministic
        return sum(r.count for r in engine.generate(prompts, 1, "seed", lambda: False))

    def bare(**changed: object) -> int:
        given = [p.clone() for p in parameters]
        for one in given:
            for name, value in changed.items():
                setattr(one, name, value)
        outputs = llm.generate(requests, given, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    found = [
        Way(BARE, bare),
        Way(OURS, lambda: ours(True)),
        Way(FAST, lambda: ours(False)),
    ]
    if with_lists:
        found.append(Way(LISTS, lambda: bare(allowed_token_ids=list(range(VOCAB)))))
    return found


def rows_of(found: list[Way]) -> list[Row]:
    """Milliseconds, tokens per second, and the ratio of the latter to that of the bare call."""
    rows: list[Row] = []
    for way in found:
        row = {"name": way.label, "tokens": way.tokens, **way.times()}
        row["tokens_per_second"] = 1e3 * row["tokens"] / row["ms"]
        rows.append(row)
    for row in rows:
        row["x_bare"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def verdict(rows: list[Row]) -> str:
    """Whether the bar of a real model, or of one with a padded head, is met."""
    by_name = {row["name"]: row["x_bare"] for row in rows}
    if LISTS in by_name:
        return bar(f"{OURS} over {LISTS}", by_name[OURS] / by_name[LISTS], 3, least=True)
    return bar(f"{OURS}, x_bare", by_name[OURS], 0.95, least=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=32, help="of the real model")
    parser.add_argument("--batch_size", type=int, default=16, help="max_num_seqs of vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line per way")
    return parser.parse_args()


def measure(folder: Path, load: Load, args: argparse.Namespace) -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = RolloutConfig("vllm", max_new_tokens=load.new_tokens, batch_size=args.batch_size)
    engine = VllmEngine(str(folder), tokenizer, config, load.prompt_tokens[1], "float32", 0)
    padded = len(tokenizer) == VOCAB
    found = ways(engine, load.requests(len(tokenizer)), with_lists=padded)
    time_rounds(found, args.rounds)
    engine.close()
    if failed := [f"{way.label}: {way.failed}" for way in found if way.failed]:
        raise SystemExit("; ".join(failed))
    return [dataclasses.asdict(load) | row for row in rows_of(found)]


def gap_rows(folder: Path, load: Load, args: argparse.Namespace) -> list[Row]:
    """In bfloat16, the mean distance of vLLM's log-probs of its responses to those of training, in
    nats: with the head's logits as vLLM computes them, and in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = Config(model=ModelConfig(path=str(folder), compute_dtype="bfloat16"))
    trainer = Forward(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings, 0
    )
    prompts, rows = load.requests(len(tokenizer)), []
    for head in ("bfloat16", "float32"):
        config = RolloutConfig(
            "vllm",
            max_new_tokens=load.new_tokens,
            batch_size=args.batch_size,
            vllm={"hf_overrides": {"head_dtype": head}},
        )
        longest = load.prompt_tokens[1]
        engine = VllmEngine(str(folder), tokenizer, config, longest, "bfloat16", 0)
        rollouts = engine.generate(prompts, 1, "seed", lambda: False)
        engine.close()
        theirs = trainer.token_stats(rollouts, Policy(None))
        found = gap([r.stream("engine") for r in rollouts], theirs.logprobs)
        rows.append({**dataclasses.asdict(load), "head": head, "logprob_gap": found})
    return rows


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    keys = ("batch_size", "rounds")
    run = environment("cpu", args.threads) | {key: getattr(args, key) for key in keys}
    print_run(run)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as made:
        padded_model(Path(made))
        # Two new tokens: the lists cost time when a request arrives.
        loads = {"a random Qwen3 with a padded head": (Path(made), Load(args.prompts, (4, 16), 2))}
        if args.model:
            real = Load(args.prompts, (16, 400), args.new_tokens)
            loads = {args.model.name: (args.model, real)} | loads
        for name, (folder, load) in loads.items():
            found = measure(folder, load, args)
            print(f"{name}:\n{verdict(found)}", flush=True)
            if folder == args.model:
                found += gap_rows(folder, load, args)
            rows += [{"model": name, **row} for row in found]
    print(aligned(rollouts_table([run | row for row in rows])))
    append(args.json, run, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
