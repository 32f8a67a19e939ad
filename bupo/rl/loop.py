"""One training run, step by step. Reads top-down: prompts, rollouts, rewards, advantages, old
log-probs, update, sync, metrics, evaluation, checkpoint."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bupo import config as configuration
from bupo.config import Config, RunError
from bupo.data.prompts import PromptOrder
from bupo.finite import first_bad
from bupo.report import write_report
from bupo.rewards.choice import Reward
from bupo.rl import checkpoint
from bupo.rl.advantages import estimate, penalise_length
from bupo.rl.collect import PromptStream, Sample, collect
from bupo.rl.critic import Critic
from bupo.rl.diagnostics import Diagnostics
from bupo.rl.evaluator import Evaluator
from bupo.rl.forward import TokenStats
from bupo.rl.losses import drop, importance_weights
from bupo.rl.reference_model import Reference
from bupo.rl.schedule import Schedule
from bupo.rl.update import Trainer
from bupo.rl.weight_sync import GapLimit, WeightSync, gap, probes_of
from bupo.rollouts import RolloutEngine
from bupo.runlog.monitor import Monitor, Stopped, Stopwatch
from bupo.runlog.recorder import Recorder
from bupo.runlog.run_directory import checkpoints, read_rows
from bupo.runlog.step_metrics import (
    bad_steps_at_end,
    gpu_memory,
    rollout_metrics,
    rollout_row,
    time_line,
)
from bupo.types import Policy, Prompt, RewardReport, Rollout

FINAL_ROLLOUTS, FINAL_SHARE = 8, 16
"""In phase 1 the final policy is evaluated on 1 / FINAL_SHARE of the rollouts, at least
FINAL_ROLLOUTS: for metrics, and to see that the engine has its weights"""

WILD_CLIP_FRACTION, WILD_RATIO = 0.1, 10.0
"""A first step of a phase beyond either of these is said to be out of control"""


@dataclass
class Run:
    """The parts of a run, made by bupo.run, and what happens with them."""

    config: Config
    out: Path
    model: Any
    tokenizer: Any
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    engine: RolloutEngine
    reward: Reward
    trainer: Trainer
    reference: Reference | None = None
    """The policy that the run began with, if a KL term needs it"""
    critic: Critic | None = None
    """For advantage=ppo"""
    start: int = 0
    """Steps already done, by a run that this one continues"""
    drawn: int = 0
    """Prompts drawn until then beyond rollout.prompts a step"""

    def train(self) -> int | None:
        """Trains to the end; returns None, or the number of the signal that stopped it. Either
        way the state is saved."""
        config = self.config
        self.schedule = Schedule(config)
        size = config.rollout.prompts
        order = PromptOrder(self.train_prompts, size, config.seed, config.data.weights)
        self.stream = PromptStream(order.take, size, self.drawn)
        self.rollout_limit = self._gap_limit(sampled=True)
        settings = configuration.values(config)
        self.recorder = Recorder(self.out, self.start, config.wandb, self.out.name, settings)
        self.monitor = Monitor(config, self.out, self.start)
        for part in (self.trainer, self.reference, self.critic):
            if part is not None:
                part.forward.share = self.monitor.share
        self.reward.share = self.monitor.share
        self.evaluator = Evaluator(
            config, self.out, self.schedule, self.eval_prompts, self._generate_for_evaluation,
            self.reward, self.recorder, self.monitor,
        )  # fmt: skip
        self.diagnostics = Diagnostics(config, self.out, self.model, self.schedule, self.recorder)
        self.diagnostics.share = self.monitor.share
        self.bad_steps = bad_steps_at_end(read_rows(self.out / "metrics.jsonl"))
        self.saved, self.saved_at = self.start, time.monotonic()
        self.failure, self.updating = "", False
        try:
            done = self._steps()
            if done > self.saved or not checkpoints(self.out):
                self._save(done)
        finally:
            self.monitor.release()
            self.recorder.close()
        rows = [r for r in read_rows(self.out / "metrics.jsonl") if r["step"] > self.start]
        if rows:
            self.monitor.progress.say(time_line(rows))
        write_report(self.out)
        if self.failure:
            raise RunError(self.failure)
        return self.monitor.stop.signal

    def _steps(self) -> int:
        """All steps, or as many as there are until a stop; returns how many are done."""
        done = self.start
        try:
            self._look_first()
            self.evaluator.after(done)
            for step in range(self.start + 1, self.config.steps + 1):
                self.updating = False
                self._step(step)
                done, self.updating = step, False
                if self.failure:
                    break
                if self._checkpoint_is_due(step):
                    self._save(step)  # before the evaluation, which may take long
                self.evaluator.after(step)
                if "best" in self.config.checkpoint.keep and self.evaluator.best_step() == step:
                    self._save(step)
                if self.monitor.stop():
                    break
        except Stopped:
            pass
        except Exception:
            if not self.updating and done > self.saved:  # the state is still that of a whole step
                self._save(done)
            raise
        return done

    def _look_first(self) -> None:
        """The probes of the weight sync and of the diagnostics and, before the first step, what
        they say."""
        with self.monitor.stage("weights of the engine", self.start):
            self.sync = WeightSync(
                self.engine,
                self.model,
                probes_of(self.train_prompts),
                self._final_logprobs,
                self._gap_limit(),
                self._exact_logprobs if self.config.model.compute_dtype == "bfloat16" else None,
            )
        with self.monitor.stage("probes", self.start):
            prompts = self.eval_prompts or self.train_prompts
            seed = f"{self.config.seed}/probes"
            self.diagnostics.begin(
                self.start, lambda chosen: self._generate(chosen, 1, seed), prompts
            )
        if self.start == 0:
            with self.monitor.stage("diagnostics", 0):
                self.diagnostics.after(0)

    def _step(self, step: int) -> None:
        config, watch = self.config, Stopwatch()
        policy = self.schedule.policy(step)

        sample = self._sample(step, watch)
        rollouts = sample.rollouts
        self.monitor.check_stop()
        with self.monitor.stage("old_logprobs", step, watch):
            old = self.trainer.token_stats(rollouts, policy)
            probe, final = self._final_policy(rollouts, policy, old)
            mismatch = gap([torch.tensor(r.logprobs) for r in probe], final.logprobs)
            if config.rollout.engine == "hf" or config.rollout.top_p == 1:  # vllm's: of the nucleus
                self.rollout_limit.check(mismatch, "log-probs of sampled tokens")
            reference = self.reference
            kl = reference.compare(rollouts, policy, old.logprobs) if reference else {}
            costs = reference.costs(rollouts, old.logprobs) if reference else None
            if self.critic:
                self.critic.evaluate(rollouts)
        loss = config.loss
        dropped = drop(rollouts, final.logprobs, loss.max_sequence_gap, loss.drop_truncated)
        penalise_length(rollouts, config.rollout.max_new_tokens, config.reward.overlong_buffer)
        gae = (config.critic.gamma, config.critic.gae_lambda)
        zero_spread = estimate(rollouts, config.advantage, costs, *gae)
        self.monitor.check_stop()
        self.updating = True
        with self.monitor.stage("update", step, watch):
            cap = config.loss.tis_cap
            correction = None if cap is None else importance_weights(rollouts, final.logprobs, cap)
            update = self.trainer.update(rollouts, old.logprobs, policy, step, correction)
        if self.critic:
            with self.monitor.stage("critic", step, watch):
                update |= self.critic.update(rollouts, step)
        skipped = [*self.trainer.skipped, *(self.critic.skipped if self.critic else [])]
        self._count_bad_steps(step, skipped)
        if policy.layer is not None and self.schedule.begins_with(step):
            self._warn_of_a_wild_start(step, policy.layer, update, old.mean_entropy())
        with self.monitor.stage("sync", step, watch):
            synced = self.sync(self.trainer.changed)
        looked: dict[str, float] = {}
        if self.diagnostics.due(step):
            with self.monitor.stage("diagnostics", step, watch):
                looked = self.diagnostics.after(step)
            if self.diagnostics.ends_phase:
                self.monitor.progress.say(
                    f"step {step}: phase 1 ends here, {self.diagnostics.ends_phase} (auto_stop)"
                )

        row = {
            "step": step,
            "phase": policy.phase,
            "layer": policy.layer,
            **rollout_metrics(rollouts, sample.report),
            **(sample.metrics() if config.rollout.refills else {}),
            "response/dropped": dropped,
            "groups/zero_spread": zero_spread,
            "policy/entropy": old.mean_entropy(),
            "final/entropy": final.mean_entropy(),
            **kl,
            **update,
            **({"policy/skipped_why": skipped[0]} if skipped else {}),
            "rollout/logprob_gap": mismatch,
            "sync/logprob_gap": mismatch if synced is None else synced,
            **looked,
            **{f"time/{name}": seconds for name, seconds in watch.seconds.items()},
            "time/step": watch.total(),
            "tokens_per_second": sample.tokens / watch.total(),
            "memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **gpu_memory(self.trainer.forward.device),
        }
        self.stream.drawn += sample.drawn
        self.recorder.rollouts(step, [rollout_row(r) for r in rollouts])
        self.recorder.step(row)
        self.monitor.progress.step(row)

    def _sample(self, step: int, watch: Stopwatch) -> Sample:
        """Rollouts with their rewards."""
        size, seed = self.config.rollout, f"{self.config.seed}/step/{step}"

        def generate(prompts: Sequence[Prompt], round_: int) -> list[Rollout]:
            with self.monitor.stage("rollout", step, watch):
                at = f"{seed}/refill/{round_}" if round_ else seed
                return self._generate(prompts, size.samples, at)

        def grade(rollouts: list[Rollout]) -> RewardReport:
            with self.monitor.stage("reward", step, watch):
                return self.reward(rollouts)

        sample = collect(self.stream, step, size.prompts, generate, grade, size.refills)
        report, lost = sample.report, sum(r.ungraded for r in sample.rollouts)
        if report.first:
            self.monitor.progress.say(
                f"step {step}: {report.timeouts} timeouts and {report.errors} errors of the "
                f"reward; {lost} of {len(sample.rollouts)} responses have none and are left out. "
                f"The first failure: {report.first}"
            )
        if 2 * lost > len(sample.rollouts):
            raise RunError(
                f"step {step}: {lost} of {len(sample.rollouts)} responses cannot be graded, the "
                f"first failure: {report.first}; the state after step {step - 1} is saved in "
                f"{self.out}"
            )
        return sample

    def _count_bad_steps(self, step: int, skipped: Sequence[str]) -> None:
        if not skipped:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.monitor.progress.say(f"step {step}: skipped {'; '.join(skipped)}")
        if self.bad_steps >= self.config.max_bad_steps:
            self.failure = (
                f"{self.bad_steps} steps in a row with nan or infinity (max_bad_steps), the last: "
                f"step {step}, {skipped[0]}; its state is saved in {self.out}"
            )

    def _warn_of_a_wild_start(
        self, step: int, layer: int, update: Mapping[str, float], entropy: float
    ) -> None:
        """A raw pi^l can be so sharp that one step at a usual rate throws it far off its old self:
        nothing normalises H^l."""
        clipped, ratio = update["policy/clip_fraction"], update["policy/ratio_max"]
        if clipped > WILD_CLIP_FRACTION or ratio > WILD_RATIO:
            self.monitor.progress.say(
                f"step {step}: the phase of layer {layer} starts out of control: {clipped:.0%} of "
                f"the ratios are clipped, the largest is {ratio:.3g}, the gradient norm is "
                f"{update['policy/grad_norm']:.3g}, and pi^{layer} has an entropy of {entropy:.2f} "
                "nats; lower optimizer.lr, or try another bupo.layer or bupo.final_norm=true"
            )

    def _generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        seed: str,
        temperature: float | None = None,
    ) -> list[Rollout]:
        batches = -(-len(prompts) * samples // self.config.rollout.batch_size)
        asked = 0

        def stop() -> bool:  # asked before every batch
            nonlocal asked
            self.monitor.share(asked / batches)
            asked += 1
            return self.monitor.stop()

        rollouts = self.engine.generate(prompts, samples, seed, stop, temperature)
        self.monitor.check_stop()
        return rollouts

    def _final_policy(
        self, rollouts: Sequence[Rollout], policy: Policy, old: TokenStats
    ) -> tuple[Sequence[Rollout], TokenStats]:
        """The final policy's statistics: what the engine sampled from, so the gap to its log-probs
        is a check of the weights it holds. Phase 1 looks at a sample of the rollouts only."""
        if policy.layer is None:
            return rollouts, old
        corrected = self.config.loss.tis_cap or self.config.loss.max_sequence_gap
        wanted = max(FINAL_ROLLOUTS, len(rollouts) // FINAL_SHARE)
        probe = rollouts if corrected else rollouts[:: max(1, len(rollouts) // wanted)]
        return probe, self.trainer.token_stats(probe, Policy(None))

    def _gap_limit(self, sampled: bool = False) -> GapLimit:
        dtype, fixed = self.config.model.compute_dtype, self.config.rollout.max_logprob_gap
        return GapLimit(dtype, fixed, sampled)

    def _final_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        return self.trainer.token_stats(rollouts, Policy(None), temperature=1.0).logprobs

    def _exact_logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        with self.trainer.forward.in_float32():
            return self._final_logprobs(rollouts)

    def _generate_for_evaluation(
        self, problems: Sequence[Prompt], samples: int, seed: str
    ) -> list[Rollout]:
        return self._generate(problems, samples, seed, self.config.eval.temperature)

    def _checkpoint_is_due(self, step: int) -> bool:
        settings = self.config.checkpoint
        return (
            bool(settings.every and step % settings.every == 0)
            or bool(settings.minutes and time.monotonic() >= self.saved_at + 60 * settings.minutes)
            or ("switch" in settings.keep and self.schedule.switches_after(step))
        )

    def _save(self, step: int) -> None:
        critic = self.critic.parameters().items() if self.critic else ()
        bad = first_bad((*self.model.named_parameters(), *((f"critic {n}", p) for n, p in critic)))
        if bad:
            earlier = f"the one of step {self.saved} is kept"
            kept = earlier if self.saved else "there is none before it"
            raise RunError(
                f"step {step} has left the model with {bad}; no checkpoint is made of that, {kept}"
            )
        with self.monitor.stage("save", step), checkpoint.writing(self.out, step):
            state = {"step": step, "drawn": self.stream.drawn}
            parts = (self.model, self.tokenizer, self.trainer.optimizer, self.critic)
            checkpoint.save(self.out, state, *parts)
        self.saved, self.saved_at = step, time.monotonic()
        settings, best = self.config.checkpoint, self.evaluator.best_step()
        steps = set(self.schedule.switches()) if "switch" in settings.keep else set()
        if "best" in settings.keep and best is not None:
            steps.add(best)
        checkpoint.prune(self.out, settings.keep_last, steps)
