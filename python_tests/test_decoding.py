"""bupo.rollouts.decoding: the tokens it draws, and rows that join and leave a batch."""

import warnings

import pytest
import torch
import transformers
from families import FAMILIES, SIZES, VOCAB, build
from rl_samples import small_model, tokens
from torch import Tensor, nn

from bupo.config import RolloutConfig, RunError
from bupo.rollouts import decoding
from bupo.rollouts.decoding import Sampler, draw, rows_can_move
from bupo.rollouts.hf import HFEngine
from bupo.types import Prompt, Rollout

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = [2, *range(5, 24, 2)]
"""Of a vocabulary of 61: responses of many lengths."""
LIMIT = 12


class _Tokenizer:
    """Two rows of the head are padding."""

    pad_token_id, eos_token_id = 0, 2

    def __len__(self):
        return VOCAB - 2

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def prompts(*lengths: int) -> list[Prompt]:
    ids = [[3 + (7 * n * i + n + i) % 50 for i in range(size)] for n, size in enumerate(lengths)]
    return [Prompt(n, "test", "", x, "") for n, x in enumerate(ids)]


PROMPTS = prompts(1, 3, 9, 5, 7)


def engine_of(model: nn.Module, eos: object = EOS, **config: object) -> HFEngine:
    model.generation_config.eos_token_id = eos
    return HFEngine(model, _Tokenizer(), RolloutConfig(**{"max_new_tokens": LIMIT, **config}))


def generate(engine: HFEngine, asked=PROMPTS, samples: int = 6, temperature: float = 1.0):
    return engine.generate(asked, samples, "0", lambda: False, temperature)


@torch.no_grad()
def check_logprobs(model: nn.Module, rollouts: list[Rollout]) -> None:
    for r in rollouts:
        ids = torch.tensor([r.token_ids])
        logits = model(ids, use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(r.stream("engine"), chosen, rtol=0, atol=1e-4)


# ---- numbers to tokens -------------------------------------------------------------------------


def weights_of(size: int) -> Tensor:
    """Of very different sizes, a third of them 0, the first and the last among those."""
    generator = torch.Generator().manual_seed(size)
    weights = (6 * torch.randn(size, generator=generator)).exp()
    weights[torch.rand(size, generator=generator) < 1 / 3] = 0
    if size > 2:
        weights[[0, -1]] = 0
    weights[size // 2] = 1
    return weights


@pytest.mark.parametrize("size", [1, 2, 61, 255, 256, 257, 512, 1000, 4099])
def test_evenly_spaced_numbers_give_every_index_its_share(size):
    """All of [0, 1): the number of hits is that expected to within one at either end."""
    count = 20_000
    weights = weights_of(size)
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    hits = draw(weights.expand(count, size), uniforms).bincount(minlength=size)
    expected = count * weights.double() / weights.double().sum()
    assert (hits - expected).abs().max() <= 1.02, "1, and the rounding of sums in float32"
    assert hits[weights == 0].sum() == 0
    order = draw(weights.expand(count, size), uniforms)
    assert torch.equal(order, order.sort().values), "a distribution function is inverted"


@pytest.mark.parametrize("size", [1, 61, 256, 257, 1000])
def test_the_ends_of_the_numbers_hit_weights_above_zero(size):
    """0 and the float64 below 1, with one positive weight anywhere, and the smallest there is."""
    uniforms = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    for place in range(size):
        for value in (1.0, 1e-38, 1e38):
            weights = torch.zeros(3, size)
            weights[:, place] = value
            assert draw(weights, uniforms).tolist() == [place] * 3
    # Sums of many float32 in two orders differ: the end of every block is tried.
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(0)) + 1e-3
    weights[:, -1] = 0
    weights[:, 0] = 1
    bounds = (weights.double().cumsum(1) / weights.double().sum()).clamp(max=1 - 2.0**-53)[0]
    edges = torch.cat([bounds, torch.nextafter(bounds, bounds.new_zeros(()))])
    drawn = draw(weights.expand(len(edges), size), edges)
    assert weights[0, drawn].min() > 0


def test_numbers_that_are_not_finite_give_some_index():
    """The error about them comes from the engine, not from an index out of range."""
    for value in (torch.nan, torch.inf):
        for size in (61, 512, 1000):
            weights = torch.ones(4, size)
            weights[1, 3] = weights[2, -1] = weights[3] = value
            found = draw(weights, torch.tensor([0.2, 0.5, 0.9, 0.999], dtype=torch.float64))
            assert found.min() >= 0 and found.max() < size


def test_a_likely_padded_row_leaves_the_choice_to_the_others():
    """However likely: nothing is lost to underflow, and log-probs count it."""
    logits = torch.zeros(1000, 6)
    logits[:, 1], logits[:, 4:] = 2.0, 300.0
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    chosen, logprobs = Sampler(4, 1.0, 1.0)(logits, uniforms)
    expected = 1000 * logits[0, :4].softmax(-1)
    assert (chosen.bincount(minlength=4) - expected).abs().max() <= 1
    exact = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_the_engine_samples_from_the_policy(temperature, top_p):
    """Chi-square of the first tokens of 6000 responses and of their second tokens, against
    the model's probabilities, within 4 standard deviations; the seeds are fixed."""
    model = small_model()
    model.generation_config.eos_token_id = None
    engine = HFEngine(model, _Tokenizer(), RolloutConfig(max_new_tokens=2, top_p=top_p))
    engine._decoder.vocab, engine._decoder.eos = 40, []
    count = 6000
    made = torch.tensor(tokens(generate(engine, prompts(4), count, temperature)))
    assert made.shape == (count, 2)

    def chi_square(hits: Tensor, prefix: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1, :40] / temperature
        p = logits.double().softmax(-1)
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= top_p]] = 0
        expected = len(hits) * p / p.sum()
        found = hits.bincount(minlength=40).double()
        assert found[expected == 0].sum() == 0
        rare = expected < 5
        cells = [(found[~rare], expected[~rare]), (found[rare].sum()[None], expected[rare].sum())]
        used = [(f, e) for f, e in cells if e.sum() > 0]
        value = sum(float(((f - e) ** 2 / e).sum()) for f, e in used)
        degrees = sum(len(f) for f, _ in used) - 1
        assert degrees > 2
        return (value - degrees) / (2 * degrees) ** 0.5

    start = prompts(4)[0].token_ids
    assert abs(chi_square(made[:, 0], start)) < 4
    first = int(made[:, 0].mode().values)
    assert abs(chi_square(made[made[:, 0] == first, 1], [*start, first])) < 4


# ---- a response is its own ---------------------------------------------------------------------


def test_a_response_does_not_depend_on_its_neighbours():
    """Not on the size of a batch, the number of samples, or the other prompts."""
    torch.manual_seed(0)
    model = build("qwen3")
    everything = generate(engine_of(model))
    assert len({r.count for r in everything}) > 5
    assert len({tuple(t) for t in tokens(everything)}) > 20
    for size in (1, 4, 7):
        assert tokens(generate(engine_of(model, batch_size=size))) == tokens(everything)
    few = generate(engine_of(model), samples=2)
    assert tokens(few) == [r.response_ids for n, r in enumerate(everything) if n % 6 < 2]
    assert tokens(generate(engine_of(model), PROMPTS[:2])) == tokens(everything)[:12]
    twice = tokens(generate(engine_of(model, eos=[]), [PROMPTS[2]] * 2))
    assert len({tuple(t) for t in twice}) == 12, "a prompt that comes twice is two groups"


# ---- rows join and leave -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_rows_that_stay(family):
    torch.manual_seed(0)
    model = build(family)
    whole = tokens(generate(engine_of(model, []), samples=1, temperature=0.0))
    for temperature, eos in ((1.0, EOS), (0.0, [whole[0][2], whole[1][4]])):
        moving, staying = engine_of(model, eos), engine_of(model, eos)
        staying._movable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that rows stay would be one
            rollouts = generate(moving, temperature=temperature)
        assert moving._movable is True
        assert tokens(rollouts) == tokens(generate(staying, temperature=temperature))
        check_logprobs(model, rollouts)
        assert min(r.count for r in rollouts) < LIMIT / 2, "rows have left"


def rwkv() -> nn.Module:
    """Its state is a list of tensors."""
    sizes = {k: v for k, v in SIZES.items() if "num_" not in k and k != "max_position_embeddings"}
    config = transformers.RwkvConfig(**sizes, num_hidden_layers=2, attention_hidden_size=32)
    return transformers.RwkvForCausalLM(config)


def recurrent_gemma() -> nn.Module:
    """Its state is in its modules."""
    sizes = SIZES | {"lru_width": 32, "attention_window_size": 8}
    return transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**sizes))


@pytest.mark.parametrize("made", [rwkv, recurrent_gemma])
def test_a_state_that_does_not_follow_its_rows_keeps_them(made):
    """With a warning that says why, and the result of generate() itself. Without an end: in
    transformers' RWKV a row depends on the others, ended ones too."""
    model = made().eval()
    torch.manual_seed(0)  # after what the family's own initialisation draws, which varies
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0.0, 0.2)
    asked = [Prompt(n, "test", "", [5 + n, 30 + n, 9], "") for n in range(4)]
    engine = engine_of(model, eos=[])
    with pytest.warns(UserWarning, match=r"finished rows stay in the batch \(.*two rows"):
        rollouts = generate(engine, asked, 1, 0.0)
    assert engine._movable is False
    ids = torch.tensor([p.token_ids for p in asked])
    options = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": None}
    padded = [VOCAB - 2, VOCAB - 1]
    own = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), suppress_tokens=padded, **options
    )
    assert tokens(rollouts) == own[:, 3:].tolist()
    assert len({tuple(t) for t in tokens(rollouts)}) == 4
    with pytest.warns(UserWarning, match="finished rows stay"):
        ended = tokens(generate(engine_of(model), asked, 6))
    assert any(len(t) < LIMIT for t in ended) and not any(set(t[:-1]) & set(EOS) for t in ended)


def test_a_cache_that_refuses_keeps_the_rows(monkeypatch):
    model = build("qwen3")

    def refuses(*_: object) -> None:
        raise NotImplementedError("no reordering")

    expected = generate(engine_of(model))
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", refuses)
    assert rows_can_move(model) == "NotImplementedError: no reordering"
    with pytest.warns(UserWarning, match="no reordering"):
        rollouts = generate(engine_of(model))
    assert tokens(rollouts) == tokens(expected)


class Forwards:
    """The shape of the ids of every forward."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.padding = 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs["input_ids"].shape[1] > 1:
            self.padding += int((mask == 0).sum())


def test_a_prompt_is_read_once_and_ended_rows_leave():
    torch.manual_seed(0)
    model = build("qwen3")
    engine = engine_of(model)
    engine._rows_can_move()
    forwards = Forwards(model)
    rollouts = generate(engine, samples=12)
    rows = [shape[0] for shape in forwards.shapes]
    assert forwards.shapes[0] == (5, 9), "prompts, not responses"
    lengths = torch.tensor([r.count for r in rollouts])
    assert len(rows) == lengths.max(), "nothing is computed behind the last end"
    for step, count in enumerate(rows[1:], start=1):
        alive = int((lengths > step).sum())
        assert alive <= count < max(alive / decoding.FULL, alive + 1), (step, rows)
    assert rows[1] > 2 * rows[-1]


def test_prompts_of_similar_length_are_batched():
    model = build("qwen3")
    engine = engine_of(model, batch_size=4)
    engine._rows_can_move()
    asked = prompts(9, 2, 5, 9, 2, 5)
    forwards = Forwards(model)
    rollouts = generate(engine, asked, 2)
    widths = [shape[1] for shape in forwards.shapes if shape[1] > 1]
    assert (widths, forwards.padding) == ([2, 5, 9], 0)
    assert [(r.group, r.prompt) for r in rollouts] == [(n // 2, asked[n // 2]) for n in range(12)]


def test_the_interval_of_looking_changes_nothing(monkeypatch):
    """A GPU is asked for the rows that are alive now and then."""
    model = build("qwen3")
    expected = generate(engine_of(model))
    for pause in (3, 8, 100):
        monkeypatch.setattr(decoding, "PAUSE", {"cpu": pause})
        assert tokens(generate(engine_of(model))) == tokens(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_an_error(value):
    model = build("qwen3")
    engine = engine_of(model)
    engine._rows_can_move()
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 3] = value
    with pytest.raises(RunError, match="log-probs are not finite"):
        generate(engine)
