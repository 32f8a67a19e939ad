"""Seconds and peak memory of the entropies of all internal policies of a model, on a CPU: by bupo's
sweep, by hooks and softmax, and the bare GEMMs with the head that any way needs.

Each runs in a process of its own. Protocol: bench/README.md.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from implementations import bare_head_products, entropy_flow_rows
from measure import Peak, environment, milliseconds_of
from real_models import random_qwen3
from rows import Row, aligned, append, bar, print_run, rows_of_program
from tables import internal_table
from torch import Tensor, nn

from bupo.internal import Sample, entropy_flow

FLOOR, OURS, HOOKS = "bare GEMMs", "entropy_flow", "hooks and softmax"
SIZE = {"layers": 12, "width": 512, "vocab": 32768, "texts": 16, "length": 1024}
CHUNK = 1024  # rows of a bare GEMM: enough for its full speed
LARGEST_GAP = 1e-3  # nats by which the mean entropies of both ways may differ
Entropies = dict[str, Tensor]  # [layer, token] by policy


def build(size: argparse.Namespace, attention: str) -> nn.Module:
    options = {"max_position_embeddings": size.length, "attn_implementation": attention}
    model = random_qwen3(size.layers, size.width, size.vocab, **options).eval()
    with torch.no_grad():  # policies that are neither flat nor certain
        model.lm_head.weight.mul_(30)
    return model


def texts(size: argparse.Namespace) -> Tensor:
    """[texts, length]"""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(size.vocab, (size.texts, size.length), generator=generator)


def floor(size: argparse.Namespace) -> Callable[[], Entropies]:
    weight = torch.randn(size.vocab, size.width)
    rows = entropy_flow_rows(size.layers, size.texts * (size.length - 1))

    return lambda: bare_head_products(weight, rows, CHUNK)


def ours(size: argparse.Namespace) -> Callable[[], Entropies]:
    model, ids = build(size, "sdpa"), texts(size)

    def run() -> Entropies:
        flow = entropy_flow(model, [Sample.of(row[:1], row[1:]) for row in ids.tolist()])
        return {name: torch.from_numpy(x) for name, x in flow.entropy.items()}

    return run


def hooks(size: argparse.Namespace) -> Callable[[], Entropies]:
    """Takes one text at a time: a forward that keeps hidden states, attention maps and, by hooks, a
    copy of what each module reads and writes; then logits, softmax and log-softmax of each."""
    model, ids = build(size, "eager"), texts(size)
    kept: dict[tuple[str, int], Tensor] = {}
    parts = {
        "layer": "",
        "attention": "self_attn",
        "ffn": "mlp",
        "attention_input": "input_layernorm",
        "ffn_input": "post_attention_layernorm",
    }

    def keep(name: str, n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            kept[name, n] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    for n, layer in enumerate(model.model.layers):
        for name, path in parts.items():
            layer.get_submodule(path).register_forward_hook(keep(name, n))

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
            entropy(model.model.norm(kept["layer", size.layers - 1])[0, :-1], targets)
            entropy(out.hidden_states[0][0, :-1], targets)
            for (name, n), whole in kept.items():
                x = whole[0, :-1]
                views = {name: x}
                if not name.endswith("input"):
                    views[f"{name}_normed"] = model.model.norm(x)
                for view, hidden in views.items():
                    layers = found.setdefault(view, [[] for _ in range(size.layers)])
                    layers[n].append(entropy(hidden, targets))
        return {v: torch.stack([torch.cat(x) for x in layers]) for v, layers in found.items()}

    return run


WAYS: dict[str, Callable[[argparse.Namespace], Callable[[], Entropies]]] = {
    FLOOR: floor,
    OURS: ours,
    HOOKS: hooks,
}


def measure_way(name: str, size: argparse.Namespace) -> Row:
    """Measures one analysis, after another of a sixteenth of the tokens as a warm-up."""
    small = argparse.Namespace(**vars(size) | {"length": max(2, size.length // 16)})
    WAYS[name](small)()
    run, cpu, found = WAYS[name](size), torch.device("cpu"), Entropies()
    with Peak(cpu) as peak:
        seconds = milliseconds_of(lambda: found.update(run()), cpu) / 1e3
    means = {name: x.double().mean(1).tolist() for name, x in sorted(found.items())}
    return {"seconds": seconds, "peak_mib": peak.mib, "means": means}


def largest_gap(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest difference of mean entropies by policy and layer, in nats."""
    assert a.keys() == b.keys(), (sorted(a), sorted(b))
    return max(abs(x - y) for name in a for x, y in zip(a[name], b[name]))


def rows_of(found: dict[str, Row]) -> list[Row]:
    """The figures of every way, and ratios to the bare GEMMs and to ours."""
    floor, ours = found[FLOOR], found[OURS]
    return [
        {
            "name": name,
            "seconds": row["seconds"],
            "peak_mib": row["peak_mib"],
            "x_gemms": row["seconds"] / floor["seconds"],
            "x_ours": row["seconds"] / ours["seconds"],
            "x_ours_peak_mib": row["peak_mib"] / ours["peak_mib"],
        }
        for name, row in found.items()
    ]


def bars(rows: list[Row]) -> list[str]:
    _, ours, hooks = rows
    return [
        bar(f"{OURS}, x_gemms", ours["x_gemms"], 1.5),
        bar(f"{HOOKS}, x_ours", hooks["x_ours"], 1.5, least=True),
        bar(f"{HOOKS}, x_ours_peak_mib", hooks["x_ours_peak_mib"], 10.0, least=True),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in SIZE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line per way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(measure_way(args.way, args)))
        return 0
    size = {key: getattr(args, key) for key in SIZE}
    run = environment("cpu", args.threads) | size
    print_run(run)
    found: dict[str, Row] = {}
    options = [f"--{key}={value}" for key, value in (size | {"threads": args.threads}).items()]
    for name in WAYS:
        rows, wrong = rows_of_program([__file__, "--way", name, *options])
        if wrong:
            raise SystemExit(f"{name}: {wrong}")
        found[name] = rows[0]
        print(f"  {name}: {found[name]['seconds']:.1f} s", flush=True)
    gap = largest_gap(found[OURS]["means"], found[HOOKS]["means"])
    rows = rows_of(found)
    for row in rows:
        row["gap_to_hooks"] = gap if row["name"] == OURS else None
    print(aligned(internal_table([run | row for row in rows])))
    if not gap <= LARGEST_GAP:
        print("the figures of both ways differ, so their times are not compared", file=sys.stderr)
        return 1
    print("\n".join(bars(rows)))
    append(args.json, run, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
