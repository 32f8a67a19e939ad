"""Samples of several turns: what a tool or a user says is read by the model and is in nothing else.

Each test has a two-turn rollout whose middle is masked, beside rollouts of one turn.
"""

import math
from dataclasses import replace

import pytest
import torch
from rl_samples import prompt, random_rollouts, small_model
from test_critic import literal_values, make_critic, with_head
from update_samples import FINAL, NO_CHANGE, gradients_of, literal_logits, make_trainer

from bupo.rl.advantages import estimate, penalise_length, with_kl_costs
from bupo.rl.losses import mean_kl
from bupo.samples import Sample, with_streams
from bupo.types import Policy, Rollout

pytestmark = pytest.mark.usefixtures("one_thread")

TURNS = [([5, 6, 9], False), ([7, 8, 2], True), ([11, 3, 12, 4, 13], False), ([14, 1], True)]
"""Token ids of the prompt, an answer, a tool, the last answer; and whether they count"""
POLICIES = [Policy(2), FINAL]


def two_turns(group: int = 0, reward: float = 1.0, tool: int = 0) -> Rollout:
    """tool: added to each token that the tool says."""
    ids = [x + (0 if counts else tool) for turn, counts in TURNS for x in turn]
    ids = [*TURNS[0][0], *ids[3:]]
    mask = [counts for turn, counts in TURNS for _ in turn]
    streams = {"engine": torch.zeros(5)}
    return Rollout(ids, mask, prompt([5, 6, 9]), group, "stop", "", reward, streams=streams)


def one_turn(group: int, reward: float) -> Rollout:
    """A response of as many tokens as the two turns have together."""
    engine = [0.0] * 5
    rollout = Rollout.from_response(prompt([5]), group, [7, 8, 2, 14, 1], engine, "stop", "")
    return replace(rollout, reward=reward)


def literal_stats(model, rollout, policy=FINAL):
    """Log-probs and entropies of the counted tokens, from all logits of the whole sequence."""
    logp = literal_logits(model, rollout.token_ids, policy).log_softmax(-1)
    before = torch.tensor(rollout.positions) - 1
    chosen = logp[before].gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
    return chosen, -(logp[before].exp() * logp[before]).sum(-1)


@pytest.mark.parametrize("policy", POLICIES, ids=["layer 2", "final"])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_log_probs_are_of_the_counted_tokens_after_all_that_stands_before(policy, budget):
    model, rollouts = small_model(), [two_turns(), *random_rollouts()[:3], two_turns(tool=5)]
    stats = make_trainer(model, micro_batch_tokens=budget).forward.token_stats(rollouts, policy)
    for rollout, logprobs, entropy in zip(rollouts, stats.logprobs, stats.entropy):
        expected = literal_stats(model, rollout, policy)
        torch.testing.assert_close((logprobs, entropy), expected, rtol=1e-5, atol=1e-5)
    first, other = stats.logprobs[0], stats.logprobs[-1]
    torch.testing.assert_close(first[:3], other[:3])
    assert not torch.allclose(first[3:], other[3:], atol=1e-2), "the second turn reads the tool"


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo"])
def test_advantages_are_those_of_one_turn_of_as_many_tokens(name):
    """Group advantages, rewards to go with costs, and GAE step over the tool."""

    def advantages(first):
        rollouts = [first, one_turn(0, 0.25), one_turn(1, 0.5), one_turn(1, 0.0)]
        generator = torch.Generator().manual_seed(0)
        for stream in ("old", "reference", "value"):
            values = [torch.randn(r.count, generator=generator) for r in rollouts]
            rollouts = with_streams(rollouts, stream, values)
        rollouts = with_kl_costs(rollouts, 0.3)
        found = estimate(rollouts, name, 0.9, 0.8)
        return [r.stream(s) for r in found for s in ("advantage", "return") if s in r.streams]

    for came, expected in zip(advantages(two_turns()), advantages(one_turn(0, 1.0)), strict=True):
        torch.testing.assert_close(came, expected, rtol=0, atol=0)


def test_lengths_count_what_the_policy_has_said():
    (rollout,) = penalise_length([two_turns()], longest=5, buffer=2)
    assert rollout.penalty == 1 and rollout.count == 5 and len(rollout.token_ids) == 13
    assert rollout.response_ids == [7, 8, 2, 14, 1]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("policy", POLICIES, ids=["layer 2", "final"])
def test_the_gradient_is_that_of_the_counted_tokens(policy, kind, checkpointed):
    """Loss, its normaliser, KL and entropy, in float64, against all logits of each sequence."""
    rollouts = [two_turns(0, 1.0), one_turn(0, 0.0)]
    model = small_model(dtype=torch.float64)
    literal = small_model(dtype=torch.float64)
    advantages = [torch.tensor([0.3, -0.7, 1.1, 0.9, -0.4]), torch.full((5,), -0.5)]
    generator = torch.Generator().manual_seed(1)
    noise = [0.3 * torch.randn(5, generator=generator) for _ in range(4)]
    with torch.no_grad():
        now = [literal_stats(literal, r, policy)[0] for r in rollouts]
    old = [x + y for x, y in zip(now, noise[:2])]
    reference = [x + y for x, y in zip(now, noise[2:])]
    total = 0.0
    for n, rollout in enumerate(rollouts):
        logp, entropy = literal_stats(literal, rollout, policy)
        log_ratio = logp - old[n]
        ratio = (log_ratio.mean().expand(5) if kind == "gspo" else log_ratio).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantages[n]
        kl = torch.expm1(reference[n] - logp) - (reference[n] - logp)
        loss = -torch.minimum(ratio * advantages[n], clipped) + 0.2 * kl - 0.1 * entropy
        total = total + loss.sum() / 10
    total.backward()
    rollouts = with_streams(with_streams(rollouts, "advantage", advantages), "reference", reference)
    options = {"type": kind, "kl_coef": 0.2, "entropy_coef": 0.1, "aggregation": "token_mean"}
    trainer = make_trainer(model, loss=options, lr=NO_CHANGE)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (came,), metrics = gradients_of(trainer, rollouts, old, policy, 1)
    assert metrics["policy/loss"] == pytest.approx(total.item(), abs=1e-6)
    for name, parameter in literal.named_parameters():
        if parameter.grad is None:
            assert came[name] is None, name
        else:
            torch.testing.assert_close(came[name], parameter.grad, rtol=1e-5, atol=1e-7)
    old_and_reference = with_streams(rollouts, "old", old)
    gaps = torch.cat(reference) - torch.cat(old)
    assert mean_kl(old_and_reference) == pytest.approx(float((torch.expm1(gaps) - gaps).mean()))


def test_the_critic_sees_the_state_before_each_counted_token():
    critic = with_head(make_critic(small_model(dtype=torch.float64)))
    (rollout,) = critic.evaluate([two_turns()])
    model = critic.forward.model
    seen = []
    with model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out)):
        model(torch.tensor([rollout.token_ids]), use_cache=False)
    states = seen[0][0][[position - 1 for position in rollout.positions]]
    expected = states @ critic.head.weight[0] + critic.head.bias[0]
    torch.testing.assert_close(rollout.stream("value"), expected.detach())
    first = literal_values(critic, one_turn(0, 1.0)).detach()
    assert not torch.allclose(first, expected), "another sequence"


def test_an_update_on_two_turns_does_what_the_advantages_say():
    model = small_model()
    trainer = make_trainer(model, lr=3e-3)
    rollouts = [two_turns(0, 1.0), two_turns(0, 0.0, tool=7)]
    signs = [torch.full((5,), 1.0), torch.full((5,), -1.0)]
    rollouts = with_streams(rollouts, "advantage", signs)
    before = trainer.forward.token_stats(rollouts, FINAL).logprobs
    rollouts = with_streams(rollouts, "old", before)
    for step in range(1, 4):
        assert math.isfinite(trainer.update(rollouts, FINAL, step).metrics["policy/loss"])
    after = trainer.forward.token_stats(rollouts, FINAL).logprobs
    assert (after[0] - before[0]).sum() > 0.1 and (after[1] - before[1]).sum() < -0.1


def test_a_stream_must_fit_the_counted_tokens():
    with pytest.raises(ValueError, match=r"old: expected shape \[5\], .* got \[10\]"):
        two_turns().with_stream("old", torch.zeros(10))
    with pytest.raises(ValueError, match="one per token, got 2"):
        Sample([1, 2, 3], [False, True])
