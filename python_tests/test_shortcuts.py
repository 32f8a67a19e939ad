"""What an update leaves out: it saves work and changes no result."""

import json

import pytest
import run_samples
import torch
from rl_samples import random_rollouts, small_model
from update_samples import FINAL, each_policy, make_trainer, parameters, update

from bupo.config import load
from bupo.rl import update as updates
from bupo.rl.forward import Forward
from bupo.rl.update import Trainer
from bupo.samples import with_streams
from bupo.types import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(rollouts, policy, monkeypatch, shortcut, **settings):
    """Parameters, metrics and the number of sequences that went through the model, of two steps."""
    trainer, seen = make_trainer(small_model(), weight_decay=0.1, **settings), []
    old = trainer.forward.token_stats(rollouts, policy).logprobs
    hidden = trainer.forward.hidden
    trainer.forward.hidden = lambda batch, of: seen.append(len(batch.members)) or hidden(batch, of)
    with monkeypatch.context() as patch:
        if not shortcut:
            patch.setattr(updates, "_with_gradient", lambda part, settings: list(part))
        for step in (1, 2):
            metrics = update(trainer, rollouts, old, policy, step).metrics
    return parameters(trainer.model), metrics, sum(seen)


def assert_near(a, b):
    """They have moved to the same place. Of a gradient that is only rounding, AdamW makes a whole
    step, so single entries may differ."""

    def distance(x, y):
        return sum(float((x[name] - y[name]).double().square().sum()) for name in x) ** 0.5

    start = parameters(small_model())
    assert distance(a, start) > 0.01
    assert distance(a, b) < 1e-3 * distance(a, start)


def with_idle(rollouts, idle):
    """Some responses get advantages of 0."""
    return [
        r.with_stream("advantage", r.stream("advantage") * (n not in idle))
        for n, r in enumerate(rollouts)
    ]


@each_policy
def test_responses_without_advantage_are_left_out(policy, monkeypatch):
    rollouts = with_idle(random_rollouts(), {0, 1, 5, 6, 9})
    fast, of_fast, few = trained(rollouts, policy, monkeypatch, True, updates_per_step=2)
    slow, of_slow, many = trained(rollouts, policy, monkeypatch, False, updates_per_step=2)
    assert few == many - 2 * 5 and many == 2 * len(rollouts)
    assert_near(fast, slow)
    for name in ("live_fraction", "loss", "grad_norm"):
        assert of_fast[f"policy/{name}"] == pytest.approx(of_slow[f"policy/{name}"], rel=1e-4)


def test_an_update_without_any_advantage_still_decays_and_moves(monkeypatch):
    """AdamW moves on by its momentum where gradients are 0, and not where there are none."""
    rollouts, found = random_rollouts(), []
    for shortcut in (True, False):
        trainer = make_trainer(small_model(), weight_decay=0.1)
        old = trainer.forward.token_stats(rollouts, FINAL).logprobs
        update(trainer, rollouts, old, FINAL, 1)
        before = parameters(trainer.model)
        if not shortcut:
            monkeypatch.setattr(updates, "_with_gradient", lambda part, settings: list(part))
        update(trainer, with_idle(rollouts, range(len(rollouts))), old, FINAL, 2)
        found.append(parameters(trainer.model))
        assert any(not torch.equal(before[name], p) for name, p in found[-1].items())
    assert_near(*found)


@pytest.mark.parametrize(
    ("loss", "left_out"),
    [
        ({"entropy_coef": 0.1}, 0),
        ({"kl_coef": 0.1}, 0),
        ({}, 3),
    ],
    ids=["entropy", "kl", "neither"],
)
def test_entropy_and_kl_terms_need_every_response(loss, left_out, monkeypatch):
    rollouts = with_idle(random_rollouts(), {0, 1, 2})
    rollouts = with_streams(rollouts, "reference", [r.stream("engine") - 1 for r in rollouts])
    _, _, seen = trained(rollouts, FINAL, monkeypatch, True, loss=loss)
    assert seen == 2 * (len(rollouts) - left_out)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("policy", [FINAL, Policy(2)], ids=["final", "layer 2"])
def test_one_update_needs_no_earlier_pass(policy, kind):
    """Its old log-probs are those of the weights that it begins with, and it returns them."""
    rollouts, loss = with_idle(random_rollouts(), {0, 4}), {"type": kind}
    given, alone = (make_trainer(small_model(), loss=loss) for _ in range(2))
    old = given.forward.token_stats(rollouts, policy)
    theirs = update(given, rollouts, old.logprobs, policy, 1)
    ours = alone.update(rollouts, policy, 1)
    assert theirs.old is None
    assert_near(parameters(given.model), parameters(alone.model))
    for mine, truth in ((ours.old.logprobs, old.logprobs), (ours.old.entropy, old.entropy)):
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours.metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    for name, value in theirs.metrics.items():
        assert ours.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_run_with_one_update_per_step_measures_the_same(tmp_path, monkeypatch):
    """Both phases; without the shortcut, an earlier pass computes the same figures."""
    options = ("optimizer.updates_per_step=1", "diagnostics.every=0", "eval.every=0")
    read: dict[str, list[int]] = {"fast": [], "slow": []}
    stats = Forward.token_stats
    for name, sizes in read.items():
        if name == "slow":
            monkeypatch.setattr(Trainer, "updates_once", False)

        def counted(self, samples, *arguments, sizes=sizes, **named):
            sizes.append(len(samples))
            return stats(self, samples, *arguments, **named)

        monkeypatch.setattr(Forward, "token_stats", counted)
        assert run_samples.run(tmp_path / name, *options) == 0
    # Of 16: some for the comparison with the engine, then those that are not trained on.
    assert read["fast"][::2] == [8] * 6 and max(read["fast"]) == 8
    assert read["slow"].count(16) == 6
    fast, slow = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("fast", "slow")
    )
    assert len(fast) == len(slow) > 1 and {row["phase"] for row in fast} == {"internal", "final"}
    keys = [key for key in slow[0] if key.startswith(("policy/", "final/", "rollout/", "reward/"))]
    for a, b in zip(fast, slow):
        assert a.keys() == b.keys()
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


def test_a_mini_batch_may_be_given_in_prompts():
    config = load(None, ["rollout.prompts=12", "optimizer.mini_batch_prompts=4", "bupo.layer=1"])
    assert config.optimizer.updates_per_step == 3
