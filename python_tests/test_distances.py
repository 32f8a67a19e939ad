"""bupo.internal.distances against literal float64."""

import families
import pytest
import torch
from torch import nn

from bupo.internal import Sample, distances
from bupo.policy import decoder_stack, hidden_states, unembedding

TEXTS = [Sample.of([5, 6], [7, 8, 9]), Sample.of([9], [8, 7, 6, 5]), Sample.of([4], [3, 5])]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return families.build(family).eval()


def literal(
    model: nn.Module, anchor: int, temperature: float, final_norm: bool
) -> dict[str, list[float]]:
    """Token by token, layer by layer, in float64."""
    head = unembedding(model)

    def logp(hidden: torch.Tensor) -> torch.Tensor:
        return (head.logits(hidden.float()).double() / temperature).log_softmax(-1)

    kept: list[torch.Tensor] = []
    stack = decoder_stack(model)

    def keep(_m: object, _a: object, out: object) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)  # type: ignore[arg-type]

    hooks = [layer.register_forward_hook(keep) for layer in stack.layers]
    found: list[list[list[float]]] = []
    singles = []
    for text in TEXTS:
        kept.clear()
        with torch.no_grad():
            final = hidden_states(model, torch.tensor([text.token_ids]))[0]
            for place in range(text.positions[0], len(text.token_ids)):
                pi = logp(final[place - 1])
                raw = [x.view(1, -1, x.shape[-1])[0, place - 1] for x in kept]
                policies = [logp(stack.norm(x) if final_norm else x) for x in raw]
                rows = []
                for x, p in zip(raw, policies):
                    a = policies[anchor - 1]
                    rows.append(
                        [
                            float(-(p.exp() * p).sum()),
                            float((p.exp() * (p - pi)).sum()),
                            float((a.exp() * (a - p)).sum()),
                            float(nn.functional.cosine_similarity(raw[anchor - 1], x, dim=0)),
                        ]
                    )
                found.append(rows)
                singles.append([float(-(pi.exp() * pi).sum()), -float(pi[text.token_ids[place]])])
    for hook in hooks:
        hook.remove()
    means = torch.tensor(found, dtype=torch.float64).mean(0).T.tolist()
    names = ("entropy", "kl_to_final", "kl_from_anchor", "similarity")
    final_entropy, log_perplexity = torch.tensor(singles, dtype=torch.float64).mean(0).tolist()
    return dict(zip(names, means)) | {
        "final_entropy": final_entropy,
        "log_perplexity": log_perplexity,
    }


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite", "falcon-parallel", "bloom"])
def test_figures_are_the_literal_ones(family: str, final_norm: bool) -> None:
    model, anchor, temperature = build(family), 2, 0.7
    expected = literal(model, anchor, temperature, final_norm)
    found = distances(model, TEXTS, anchor, temperature=temperature, final_norm=final_norm)
    assert found.layers == list(range(1, families.DEPTH + 1))
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(values, rel=2e-5, abs=2e-6), name
    assert found.kl_from_anchor[anchor - 1] == 0 and found.similarity[anchor - 1] > 0.99999
    if final_norm:
        assert found.kl_to_final[-1] == pytest.approx(0, abs=1e-6), "it is the model"


def test_chosen_layers_and_no_anchor() -> None:
    model = build("qwen3").train()
    everything = distances(model, TEXTS, 1)
    some = distances(model, TEXTS, layers=[2])
    assert model.training
    assert some.layers == [2] and some.entropy == everything.entropy[1:2]
    assert some.kl_from_anchor == some.similarity == []
    assert not any(m._forward_hooks for m in model.modules())


def test_tokens_count_alike_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    whole = distances(model, TEXTS, 1)
    monkeypatch.setattr("bupo.internal.sweep.CHUNK", 1)
    split = distances(model, TEXTS, 1, batch_tokens=1)
    assert split.entropy == pytest.approx(whole.entropy, rel=1e-6)
    assert split.similarity == pytest.approx(whole.similarity, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "distances: texts: expected at least one, got none"),
        ({"anchor": 9}, r"distances: anchor: expected 1\.\.\d, got 9"),
        ({"anchor": 0}, r"distances: anchor: expected 1\.\.\d, got 0"),
        ({"layers": [1, 0]}, r"distances: layers: expected 1\.\.\d, got 0"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distances(build("qwen3"), **({"texts": TEXTS} | options))  # type: ignore[arg-type]
