"""Entropies of all internal policies of a model: bupo's sweep, the hook-and-softmax way, and the
bare GEMMs with the head that no way can do without. Seconds and peak memory, on a CPU.

Each runs in a process of its own, in turns. Protocol: bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment
from resident import PeakMemory
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from bupo.internal import Text, entropy_flow

FLOOR, OURS, HOOKS = "bare GEMMs", "entropy_flow", "hooks and softmax"
CHUNK = 1024
"""Rows of a bare GEMM: enough for its full speed"""
Entropies = dict[str, Tensor]
"""[layer, token] by policy"""


def build(size: argparse.Namespace, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64,
        head_dim=64,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # policies that are neither flat nor certain
        model.lm_head.weight.mul_(30)
    return model


def texts(size: argparse.Namespace) -> Tensor:
    """[texts, length]"""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(size.vocab, (size.texts, size.length), generator=generator)


def products(size: argparse.Namespace) -> int:
    """Rows that the head is multiplied with: of each layer three policies, raw and with the final
    norm, and two inputs; the embedding and the model itself."""
    return (8 * size.layers + 2) * size.texts * (size.length - 1)


def bare(size: argparse.Namespace) -> Callable[[], Entropies]:
    weight, x = torch.randn(size.vocab, size.width), torch.randn(CHUNK, size.width)
    logits = torch.empty(CHUNK, size.vocab)

    def run() -> Entropies:
        rows = products(size)
        for first in range(0, rows, CHUNK):
            n = min(CHUNK, rows - first)
            torch.mm(x[:n], weight.T, out=logits[:n])
        return {}

    return run


def ours(size: argparse.Namespace) -> Callable[[], Entropies]:
    model, ids = build(size, "sdpa"), texts(size)

    def run() -> Entropies:
        flow = entropy_flow(model, [Text(row, 1) for row in ids.tolist()])
        return {name: torch.from_numpy(x) for name, x in flow.entropy.items()}

    return run


def hooks(size: argparse.Namespace) -> Callable[[], Entropies]:
    """A text at a time: a forward that keeps hidden states, attention maps and, by hooks, a copy
    of what each module reads and writes; then logits, softmax and log-softmax of each."""
    model, ids = build(size, "eager"), texts(size)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    for n, layer in enumerate(model.model.layers):
        parts = {"attention": layer.self_attn, "ffn": layer.mlp, "layer": layer}
        parts["attention_input"] = layer.input_layernorm
        parts["ffn_input"] = layer.post_attention_layernorm
        for name, module in parts.items():
            module.register_forward_hook(keep(f"{n}/{name}"), with_kwargs=True)

    def entropy(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = model.lm_head(hidden)
        probabilities, logp = logits.softmax(-1), logits.log_softmax(-1)
        logp.gather(1, targets[:, None])
        return -(probabilities * logp).sum(-1)

    @torch.no_grad()
    def run() -> Entropies:
        found: dict[str, list[list[Tensor]]] = {}
        for row in ids:
            kept.clear()
            out = model(row[None], output_hidden_states=True, output_attentions=True)
            assert out.attentions[0] is not None
            targets = row[1:]
            entropy(model.model.norm(kept[f"{size.layers - 1}/layer"])[0, :-1], targets)
            entropy(out.hidden_states[0][0, :-1], targets)
            for name in ("layer", "attention", "ffn", "attention_input", "ffn_input"):
                for n in range(size.layers):
                    x = kept[f"{n}/{name}"][0, :-1]
                    views = {name: x}
                    if not name.endswith("input"):
                        views[f"{name}_normed"] = model.model.norm(x)
                    for view, h in views.items():
                        layers = found.setdefault(view, [[] for _ in range(size.layers)])
                        layers[n].append(entropy(h, targets))
        return {v: torch.stack([torch.cat(x) for x in layers]) for v, layers in found.items()}

    return run


WAYS: dict[str, Callable[[argparse.Namespace], Callable[[], Entropies]]] = {
    FLOOR: bare,
    OURS: ours,
    HOOKS: hooks,
}


def once(name: str, size: argparse.Namespace) -> dict[str, Any]:
    """One analysis, after one of a sixteenth of the tokens as a warm-up."""
    small = argparse.Namespace(**vars(size) | {"length": max(2, size.length // 16)})
    WAYS[name](small)()
    run, memory = WAYS[name](size), PeakMemory()
    memory.start()
    began = time.perf_counter()
    entropies = run()
    seconds, peak = time.perf_counter() - began, memory.peak()
    return {
        "seconds": seconds,
        "peak_mib": peak,
        "means": {k: x.double().mean(1).tolist() for k, x in sorted(entropies.items())},
    }


def in_process(name: str, size: argparse.Namespace) -> dict[str, Any]:
    """What once() finds, in a process of its own."""
    shape = [f"--{key}={getattr(size, key)}" for key in SHAPE]
    command = [sys.executable, __file__, "--way", name, *shape, f"--threads={size.threads}"]
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise SystemExit(f"{name}: exit status {done.returncode}: {last[0] if last else ''}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def largest_gap(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """In nats, of mean entropies by policy and layer."""
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name]))


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians, and ratios to the bare GEMMs and to ours."""
    rows = [
        {
            "name": name,
            "seconds": median(run["seconds"] for run in runs),
            "peak_mib": max(run["peak_mib"] for run in runs),
        }
        for name, runs in found.items()
    ]
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        row["x_gemms"] = row["seconds"] / by_name[FLOOR]["seconds"]
        row["x_ours"] = row["seconds"] / by_name[OURS]["seconds"]
        row["x_ours_peak_mib"] = row["peak_mib"] / by_name[OURS]["peak_mib"]
    return rows


BARS = (
    (OURS, "x_gemms", "<=", 1.5),
    (HOOKS, "x_ours", ">=", 1.5),
    (HOOKS, "x_ours_peak_mib", ">=", 10.0),
)


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Whether each is met."""
    found = []
    for name, key, sign, limit in BARS:
        value = next(row[key] for row in rows if row["name"] == name)
        met = value <= limit if sign == "<=" else value >= limit
        verdict = "met" if met else "NOT MET"
        found.append(f"{verdict:>7}: {name}, {key} {value:.2f}, bar {sign} {limit:g}")
    return found


SHAPE = {"layers": 12, "width": 512, "vocab": 32768, "texts": 16, "length": 1024}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line per way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(once(args.way, args)))
        return 0
    run: dict[str, Any] = environment("cpu", args.threads)
    run |= {key: getattr(args, key) for key in SHAPE} | {"rounds": args.rounds}
    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name in WAYS:
            found[name].append(in_process(name, args))
            print(f"  {name}: {found[name][-1]['seconds']:.1f} s", flush=True)
    gap = largest_gap(found[OURS][0]["means"], found[HOOKS][0]["means"])
    rows = rows_of(found)
    for row in rows:
        row["gap_to_hooks"] = gap if row["name"] == OURS else None
        print(
            f"| {row['name']:<18} | {row['seconds']:9.1f} s | x gemms {row['x_gemms']:5.2f} "
            f"| x ours {row['x_ours']:5.2f} | {row['peak_mib']:7.0f} MiB |"
        )
    print(f"largest difference of a mean entropy to the hook way: {gap:.1e} nats")
    if not math.isfinite(gap) or gap > 1e-3:
        print("the figures differ: nothing is compared", file=sys.stderr)
        return 1
    print("\n".join(bars(rows)))
    if args.json:
        with args.json.open("a") as out:
            out.writelines(json.dumps(run | row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
