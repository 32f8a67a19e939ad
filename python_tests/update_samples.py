"""What the tests of updates share: a trainer, and log-probs, losses and gradients in plain torch.

The literal side sees one unpadded sequence at a time, all logits, and hidden states taken from the
decoder layers by hooks.
"""

import copy

import pytest
import torch
from rl_samples import (
    DEPTH,
    prompt,
    response,
)

from bupo.config import Config, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from bupo.rl.update import Trainer
from bupo.samples import with_streams
from bupo.types import Policy

FINAL = Policy(None)
POLICIES = [Policy(1), Policy(2), Policy(2, True), Policy(DEPTH), Policy(DEPTH, True), FINAL]
NO_CHANGE = 1e-30
"""A learning rate that is positive, and moves no float32 parameter."""


def name_of(policy):
    return f"layer-{policy.layer}{'-norm' * policy.final_norm}" if policy.layer else "final"


each_policy = pytest.mark.parametrize("policy", POLICIES, ids=name_of)


def make_trainer(
    model,
    *,
    pad=0,
    temperature=1.0,
    loss=None,
    dtype="float32",
    updates_per_step=1,
    micro_batch_tokens=10**6,
    steps=300,
    **optimizer,
):
    optimizer = {"lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1e9} | optimizer
    config = Config(
        policy="final",
        steps=steps,
        model=ModelConfig(compute_dtype=dtype),
        rollout=RolloutConfig(
            prompts=4 * updates_per_step, samples=3, temperature=temperature, max_new_tokens=11
        ),
        loss=LossConfig(**loss or {}),
        optimizer=OptimizerConfig(
            updates_per_step=updates_per_step, micro_batch_tokens=micro_batch_tokens, **optimizer
        ),
    )
    return Trainer(model, config, pad)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update(trainer, rollouts, old, policy, step, importance=None):
    """An update against old log-probs, with importance weights where they are given."""
    rollouts = with_streams(rollouts, "old", old)
    if importance is not None:
        rollouts = with_streams(rollouts, "importance", importance)
    return trainer.update(rollouts, policy, step)


def gradients_of(trainer, *arguments):
    """The gradients that every optimiser step of an update saw, None where there is none; and its
    metrics."""
    seen, updates = gradients_and_updates(trainer, *arguments)
    return seen, updates.metrics


def gradients_and_updates(trainer, *arguments):
    seen = []

    def note(*_):
        named = trainer.model.named_parameters()
        seen.append({name: None if p.grad is None else p.grad.clone() for name, p in named})

    handle = trainer.optimizer.register_step_pre_hook(note)
    updates = update(trainer, *arguments)
    handle.remove()
    return seen, updates


def literal_logits(model, ids, policy, temperature=1.0):
    """[L, V] of one sequence under a policy."""
    streams = []

    def note(module, args, out):
        streams.append(out[0] if isinstance(out, tuple) else out)

    with model.model.layers[(policy.layer or DEPTH) - 1].register_forward_hook(note):
        logits = model(torch.tensor([ids]), use_cache=False).logits
    if policy.layer is not None:
        hidden = streams[0]
        if policy.final_norm:
            hidden = model.model.norm(hidden)
        logits = hidden @ model.get_output_embeddings().weight.T
    return logits[0] / temperature


def literal_stats(model, rollout, policy, temperature=1.0):
    """Log-prob and entropy of each response token: the logits before it predict it."""
    asked, answered = rollout.prompt.token_ids, rollout.response_ids
    logp = literal_logits(model, [*asked, *answered], policy, temperature).log_softmax(-1)
    logp = logp[len(asked) - 1 : len(asked) - 1 + len(answered)]
    chosen = logp.gather(-1, torch.tensor(answered, dtype=torch.long)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def literal_loss(model, rollouts, old, policy, temperature=1.0, aggregation="seq_mean", **loss):
    """-J_IPA = -E[1/G sum_i 1/|o_i| sum_t min(rho A, clip(rho) A)], and what LossConfig offers."""
    low, high = 1 - loss.get("clip_low", 0.2), 1 + loss.get("clip_high", 0.2)
    tokens = sum(r.count for r in rollouts)
    total = 0.0
    for rollout, old_logprobs in zip(rollouts, old):
        logp, entropy = literal_stats(model, rollout, policy, temperature)
        advantages = rollout.stream("advantage")
        ratio = (logp - old_logprobs).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        if loss.get("type") == "cispo":
            gain = ratio.detach().clamp(max=high) * advantages * logp
        elif loss.get("dual_clip"):
            bound = loss["dual_clip"] * advantages
            gain = torch.where(advantages < 0, torch.maximum(gain, bound), gain)
        gain = gain + loss.get("entropy_coef", 0.0) * entropy
        weight = {
            "seq_mean": 1 / (len(rollouts) * max(rollout.count, 1)),
            "seq_sum": 1 / len(rollouts),
            "token_mean": 1 / tokens,
        }[aggregation]
        total = total - weight * gain.sum()
    return total


def literal_gradients(model, *arguments, **options):
    model = copy.deepcopy(model)
    loss = literal_loss(model, *arguments, **options)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def moved(logprobs, spread=0.4, seed=1234):
    """Log-probs of an older policy: the ratio leaves the clip range on both sides."""
    generator = torch.Generator().manual_seed(seed)
    return [x + spread * torch.randn(x.shape, generator=generator) for x in logprobs]


def check_gradients(came, expected, tolerance=1e-5):
    """Every parameter's, relative to the largest of all."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 1e-3, "the gradient is not trivially small"
    for name, theirs in expected.items():
        ours = came[name]
        if theirs is None or ours is None:
            rest = ours if theirs is None else theirs
            assert rest is None or not rest.any(), f"{name}: {ours is None=}, {theirs is None=}"
            continue
        off = float((ours - theirs).abs().max()) / largest
        assert off < tolerance, f"{name}: {off:.2e} of the largest gradient off"


def with_empty_response(rollouts):
    empty = response(prompt([5, 6]), [], 1).with_stream("advantage", torch.zeros(0))
    return [*rollouts[:4], empty, *rollouts[4:]]
