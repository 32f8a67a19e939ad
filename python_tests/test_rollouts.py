"""bupo.rollouts: what HFEngine samples, and whether it samples from the policy that it says."""

import copy
from contextlib import contextmanager

import pytest
import torch
from rl_samples import small_model, tiny_qwen3, tokens

from bupo.config import Config, ModelConfig, RolloutConfig
from bupo.rl.forward import Forward
from bupo.rollouts.engine import seed_of
from bupo.rollouts.hf import HFEngine
from bupo.types import Policy, Prompt

TEXTS = ("a", "17+25=", "Prove that the square root of two is irrational.")
"""Prompts of 1, 6 and 48 tokens: padding on the left."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(loaded):
    """The shared model, with its state as it was."""
    model, _ = loaded
    before = copy.deepcopy(model.generation_config)
    yield model.train()
    model.generation_config = before


@pytest.fixture
def tokenizer(loaded):
    return copy.deepcopy(loaded[1])


def never():
    return False


def prompts_of(tokenizer, *texts):
    return [Prompt(n, "test", t, tokenizer(t)["input_ids"], "") for n, t in enumerate(texts)]


def generate(model, tokenizer, texts=TEXTS, samples=3, seed="0", stop=never, **config):
    config = RolloutConfig(**{"max_new_tokens": 8, **config})
    engine = HFEngine(model, tokenizer, config)
    return engine.generate(prompts_of(tokenizer, *texts), samples, seed, stop)


@contextmanager
def shifted(model, shifts):
    """Adds shifts[id] to the logits of each id, wherever the model computes logits."""
    bias = torch.zeros(model.get_output_embeddings().weight.shape[0])
    for token, shift in shifts.items():
        bias[token] = shift
    with model.get_output_embeddings().register_forward_hook(lambda m, a, out: out + bias):
        yield


@torch.no_grad()
def forward_logprobs(model, rollout, temperature):
    """[T, V] of one sequence, without padding: the policy itself, padded rows of its head too."""
    ids = torch.tensor([rollout.token_ids])
    logits = model(ids, use_cache=False).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def check_logprobs(model, rollouts, temperature=1.0):
    for rollout in rollouts:
        expected = forward_logprobs(model, rollout, temperature)
        expected = expected.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.stream("engine"), expected, rtol=0, atol=1e-4)


def test_same_seed_same_tokens(model, tokenizer):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(6)  # and has no say
    again = generate(model, tokenizer)
    assert tokens(again) == tokens(first)
    engine = [[r.stream("engine").tolist() for r in each] for each in (first, again)]
    assert engine[0] == engine[1]
    assert tokens(generate(model, tokenizer, seed="1")) != tokens(first)


def test_order_and_groups(model, tokenizer):
    rollouts = generate(model, tokenizer, texts=("ab", "c", "ab"), samples=2, batch_size=3)
    assert [r.group for r in rollouts] == [0, 0, 1, 1, 2, 2], "one prompt twice is two groups"
    assert [r.prompt.text for r in rollouts] == ["ab", "ab", "c", "c", "ab", "ab"]
    assert [r.text for r in rollouts] == [
        tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts
    ]


@pytest.mark.parametrize("batch_size", [100, 4, 1])
def test_samples_of_a_prompt_differ(model, tokenizer, batch_size):
    # Batch size 1: every batch holds the same prompt, so a seed used twice would show.
    rollouts = generate(model, tokenizer, texts=("ab",), samples=8, batch_size=batch_size)
    assert len({tuple(r.response_ids) for r in rollouts}) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_are_those_of_the_sampling_distribution(model, tokenizer, temperature):
    rollouts = generate(model, tokenizer, temperature=temperature)
    check_logprobs(model, rollouts, temperature)


def test_padding_on_the_left_changes_nothing(model, tokenizer):
    # The log-probs of a forward without padding are the test above; here, sampling itself.
    alone = generate(model, tokenizer, texts=("17+25=",), samples=4)
    check_logprobs(model, alone)
    tokenizer.pad_token = "a"  # whatever the padding is
    beside = generate(model, tokenizer, texts=("a", "17+25=", TEXTS[2]), samples=4)
    check_logprobs(model, beside)
    assert len({len(r.prompt.token_ids) for r in beside}) == 3


def test_ids_beyond_the_tokenizer_are_never_sampled(model, tokenizer):
    size = model.get_output_embeddings().weight.shape[0]
    padded = range(len(tokenizer), size)
    assert len(padded) == 16
    with shifted(model, dict.fromkeys(padded, 50.0)):
        rollouts = generate(model, tokenizer, samples=8)
        check_logprobs(model, rollouts)
    assert max(max(r.response_ids) for r in rollouts) < len(tokenizer)
    with shifted(model, dict.fromkeys(padded, 50.0)):
        rollouts = generate(model, tokenizer, samples=8, top_p=0.9)
    assert max(max(r.response_ids) for r in rollouts) < len(tokenizer)


def check_ends(rollouts, eos, limit):
    for r in rollouts:
        stopped = r.response_ids[-1] in eos
        assert not any(t in eos for t in r.response_ids[:-1]), "cut after the first"
        assert r.finish_reason == ("stop" if stopped else "length")
        assert stopped or r.count == limit
        assert len(r.stream("engine")) == r.count
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}, "the sample has both"
    assert len({r.count for r in rollouts}) > 3


def test_response_ends_with_its_first_end_of_sequence(model, tokenizer):
    eos = tokenizer.eos_token_id
    with shifted(model, {eos: 6.0}):
        rollouts = generate(model, tokenizer, samples=10)
        check_logprobs(model, rollouts)
    check_ends(rollouts, {eos}, 8)
    assert all("<|im_end|>" not in r.text for r in rollouts)


def test_padding_that_is_the_end_of_sequence(model, tokenizer):
    eos = tokenizer.eos_token_id
    with shifted(model, {eos: 6.0}):
        expected = generate(model, tokenizer, samples=10)
        tokenizer.pad_token = tokenizer.eos_token
        rollouts = generate(model, tokenizer, samples=10)
        tokenizer.pad_token = None
        without = generate(model, tokenizer, samples=10)
    check_ends(rollouts, {eos}, 8)
    assert tokens(rollouts) == tokens(without) == tokens(expected)


def test_several_ends_of_sequence(model, tokenizer):
    other = tokenizer.convert_tokens_to_ids("z")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    with shifted(model, {tokenizer.eos_token_id: 5.0, other: 5.0}):
        rollouts = generate(model, tokenizer, samples=10)
    check_ends(rollouts, {tokenizer.eos_token_id, other}, 8)
    assert {r.response_ids[-1] for r in rollouts} >= {tokenizer.eos_token_id, other}


def test_without_an_end_of_sequence_every_response_is_full(model, tokenizer):
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    rollouts = generate(model, tokenizer, max_new_tokens=5)
    assert [(r.count, r.finish_reason) for r in rollouts] == [(5, "length")] * 9


@pytest.mark.parametrize("limit", [1, 5])
def test_max_new_tokens(model, tokenizer, limit):
    with shifted(model, {tokenizer.eos_token_id: -1e9}):
        rollouts = generate(model, tokenizer, max_new_tokens=limit)
    assert [(r.count, r.finish_reason) for r in rollouts] == [(limit, "length")] * 9
    with shifted(model, {tokenizer.eos_token_id: 1e9}):
        rollouts = generate(model, tokenizer, max_new_tokens=limit)
    assert [(r.count, r.finish_reason) for r in rollouts] == [(1, "stop")] * 9


def test_temperature_zero_takes_the_likeliest_token(model, tokenizer):
    """With the padded rows made likely, which still must not be taken; whatever seed and top_p."""
    engine = HFEngine(model, tokenizer, RolloutConfig(max_new_tokens=8, temperature=2, top_p=0.5))
    prompts = prompts_of(tokenizer, *TEXTS)
    with shifted(model, dict.fromkeys(range(len(tokenizer), model.config.vocab_size), 50.0)):
        greedy = engine.generate(prompts, 1, "0", never, 0.0)
        assert tokens(greedy) == tokens(engine.generate(prompts, 1, "1", never, 0.0))
        for rollout in greedy:
            logprobs = forward_logprobs(model, rollout, 1.0)
            assert rollout.response_ids == logprobs[:, : len(tokenizer)].argmax(-1).tolist()
            chosen = logprobs.gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(rollout.stream("engine"), chosen, atol=1e-4, rtol=0)
    other = engine.generate(prompts, 1, "0", never, 1.5)
    assert tokens(other) != tokens(engine.generate(prompts, 1, "0", never)), "its own is 2"


def test_top_p_samples_from_the_nucleus(model, tokenizer):
    def mass_before(rollouts):
        """Probability of all that is likelier than each sampled token."""
        for r in rollouts:
            p = forward_logprobs(model, r, 1.0)[:, : len(tokenizer)].softmax(-1)
            own = p.gather(-1, torch.tensor(r.response_ids)[:, None])
            yield from p.where(p > own, 0).sum(-1).tolist()

    inside = generate(model, tokenizer, samples=6, top_p=0.7)
    assert max(mass_before(inside)) < 0.7 + 1e-4
    check_logprobs(model, inside)  # of the policy: the trainer's ratio is against it
    assert max(mass_before(generate(model, tokenizer, samples=6))) > 0.8
    assert len({tuple(t) for t in tokens(inside)}) > 9, "still a sample"


def test_stop_returns_early_with_what_is_there(model, tokenizer):
    calls = []

    def after_two():
        calls.append(1)
        return len(calls) > 2

    everything = generate(model, tokenizer, batch_size=2)
    rollouts = generate(model, tokenizer, batch_size=2, stop=after_two)
    assert len(everything) == 9
    assert tokens(rollouts) == tokens(everything)[:4]
    assert generate(model, tokenizer, stop=lambda: True) == []


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(model, tokenizer, training, monkeypatch):
    model.train(training)
    generate(model, tokenizer)
    assert model.training is training
    seen = []

    def broken(**_):
        seen.append(model.training)
        raise MemoryError

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(MemoryError):
        generate(model, tokenizer)
    assert (seen, model.training) == ([False], training)


def test_no_gradient_and_no_change(model, tokenizer):
    before = copy.deepcopy(model.state_dict())
    generate(model, tokenizer)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradient_checkpointing_does_not_change_the_sample(model, tokenizer):
    expected = tokens(generate(model, tokenizer))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        assert tokens(generate(model, tokenizer)) == expected
    finally:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.01, "top_k": 1, "top_p": 0.1, "do_sample": False},
        {"max_new_tokens": 2, "max_length": 3},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 8},
        {"min_p": 0.9},
        {"suppress_tokens": list(range(200))},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_shipped_with_a_model_do_not_bend_the_policy(model, tokenizer, setting):
    # generation_config.json of Qwen: temperature 0.6, top_k 20, top_p 0.95, repetition_penalty 1.05
    with shifted(model, {tokenizer.eos_token_id: 6.0}):
        expected = generate(model, tokenizer, samples=6)
        for name, value in setting.items():
            setattr(model.generation_config, name, value)
        rollouts = generate(model, tokenizer, samples=6)
        check_logprobs(model, rollouts)
    assert tokens(rollouts) == tokens(expected)


def gap_to_trainer(model, tokenizer, temperature, dtypes=("float32", "float32")):
    """dtypes: of the engine and of the trainer."""
    config = Config(
        rollout=RolloutConfig(temperature=temperature, max_new_tokens=32),
        model=ModelConfig(compute_dtype=dtypes[1]),
    )
    engine = HFEngine(model, tokenizer, config.rollout, dtypes[0])
    rollouts = engine.generate(prompts_of(tokenizer, *TEXTS), 8, "0", never)
    stats = Forward(model, config, tokenizer.pad_token_id).token_stats(rollouts, Policy(None))
    engine = torch.cat([r.stream("engine") for r in rollouts])
    return (engine - torch.cat(stats.logprobs)).abs()


class _Tokenizer:
    """As many ids as the model's head has rows, two characters each."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, size):
        self._size = size

    def __len__(self):
        return self._size

    def __call__(self, text):
        return {"input_ids": [2 + ord(c) % (self._size - 2) for c in text]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_agree(temperature):
    model = small_model()
    assert gap_to_trainer(model, _Tokenizer(model.config.vocab_size), temperature).max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_agree_on_a_padded_head(model, tokenizer, temperature):
    # Its padded rows are not sampled, but they are in the policy's normaliser on both sides.
    assert gap_to_trainer(model, tokenizer, temperature).max() < 1e-5


def test_in_bfloat16_the_engine_samples_from_what_is_trained(model, tokenizer):
    """As a trainer computes it, not from float32's policy, nor with the head's sums in 16 bits."""
    mixed = gap_to_trainer(model, tokenizer, 1.0, ("float32", "bfloat16")).mean()
    both = gap_to_trainer(model, tokenizer, 1.0, ("bfloat16", "bfloat16")).mean()
    assert both < mixed / 2, (both, mixed)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_seeds():
    seeds = [seed_of(*parts) for parts in ((0, 1), (1, 0), (0, 2), ("0/1", 0), (0, 1, 0), ("a",))]
    assert len(set(seeds)) == 5, "parts are joined by a slash"
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("0/step/1", 0) == seed_of("0/step/1", 0)
