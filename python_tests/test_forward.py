"""bupo.rl.forward against plain torch: whose log-probs, whose entropies."""

import math
import random

import pytest
import torch
from rl_samples import (
    DEPTH,
    VOCAB,
    random_rollouts,
    small_model,
)
from update_samples import (
    FINAL,
    POLICIES,
    each_policy,
    literal_stats,
    make_trainer,
    name_of,
)

from bupo import ops
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


# Statistics of tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@each_policy
def test_token_stats(policy, temperature):
    model, rollouts = small_model(), random_rollouts()
    stats = make_trainer(model, temperature=temperature).forward.token_stats(rollouts, policy)
    for n, rollout in enumerate(rollouts):
        with torch.no_grad():
            logprobs, entropy = literal_stats(model, rollout, policy, temperature)
        torch.testing.assert_close(stats.logprobs[n], logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.entropy[n], entropy, rtol=1e-5, atol=1e-5)
    everything = torch.cat(stats.entropy)
    assert stats.mean_entropy() == pytest.approx(float(everything.mean()))
    assert everything.min() < 0.8 * math.log(VOCAB), "no near-uniform policy, which hides mistakes"


def test_the_policies_of_this_file_differ():
    model, rollouts = small_model(), random_rollouts()
    trainer = make_trainer(model)
    stats = [torch.cat(trainer.forward.token_stats(rollouts, p).logprobs) for p in POLICIES]
    for i in range(len(POLICIES)):
        for j in range(i):
            gap = float((stats[i] - stats[j]).abs().max())
            same = {name_of(POLICIES[i]), name_of(POLICIES[j])} == {"final", f"layer-{DEPTH}-norm"}
            assert (gap < 1e-5) if same else (gap > 0.1), (POLICIES[i], POLICIES[j], gap)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40])
@pytest.mark.parametrize("policy", [Policy(2), FINAL], ids=name_of)
def test_token_stats_do_not_depend_on_the_batch(policy, micro_batch_tokens):
    model, rollouts = small_model(), random_rollouts()
    expected = make_trainer(model).forward.token_stats(rollouts, policy)
    trainer = make_trainer(model, pad=7, micro_batch_tokens=micro_batch_tokens)
    order = list(range(len(rollouts)))
    random.Random(1).shuffle(order)
    stats = trainer.forward.token_stats([rollouts[i] for i in order], policy)
    for place, i in enumerate(order):
        torch.testing.assert_close(stats.logprobs[place], expected.logprobs[i])
        torch.testing.assert_close(stats.entropy[place], expected.entropy[i])


def test_token_stats_leave_the_model_alone():
    model, rollouts = small_model(), random_rollouts()
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    stats = make_trainer(model).forward.token_stats(rollouts, Policy(1))
    assert not any(x.requires_grad for x in stats.logprobs + stats.entropy)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(ids).logits, before), "outside, it is the final policy again"
    assert model.training


def test_logits_are_never_held(monkeypatch):
    # The LM-head op gets the hidden states of response tokens only, and the model no head.
    model, rollouts = small_model(), random_rollouts()
    seen = []
    real = ops.lm_head_logprobs

    def spy(hidden, weight, targets, **kw):
        seen.append(tuple(hidden.shape))
        return real(hidden, weight, targets, **kw)

    monkeypatch.setattr(ops, "lm_head_logprobs", spy)
    make_trainer(model).forward.token_stats(rollouts, FINAL)
    assert seen == [(sum(r.count for r in rollouts), model.config.hidden_size)]
