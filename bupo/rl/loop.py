"""One training run, step by step. The code follows the order of a step: prompts, rollouts, rewards,
old log-probs, advantages, update, sync, metrics, evaluation, checkpoint."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bupo import config as configuration
from bupo import ranks
from bupo.config import AgreedError, Config, RunError
from bupo.data.prompt_order import PromptOrder
from bupo.finite import first_bad
from bupo.report import write_report
from bupo.rl import checkpoint
from bupo.rl.advantages import flat_groups
from bupo.rl.collect import Collected, collect
from bupo.rl.critic import Critic
from bupo.rl.diagnostics import Diagnostics
from bupo.rl.evaluator import Evaluator
from bupo.rl.forward import Forward, WithoutAdapters
from bupo.rl.schedule import Schedule
from bupo.rl.spread import SpreadReward, generate
from bupo.rl.streams import Streams
from bupo.rl.update import PolicyUpdates, Trainer
from bupo.rl.weight_sync import GapLimit, WeightSync, probes_of
from bupo.runlog.monitor import Monitor, Stopped, Stopwatch
from bupo.runlog.recorder import Recorder
from bupo.runlog.run_directory import checkpoints, read_rows, shared_rows
from bupo.runlog.step_metrics import (
    bad_steps_at_end,
    gpu_memory,
    rollout_metrics,
    rollout_row,
    time_line,
)
from bupo.samples import Sample
from bupo.types import Grades, Policy, Prompt, Reward, Rollout, RolloutEngine

WILD_CLIP_FRACTION, WILD_RATIO = 0.1, 10.0
"""The first step of a phase causes a warning if it exceeds either of these"""


@dataclass
class Parts:
    """The components of a run."""

    config: Config
    out: Path
    model: Any
    tokenizer: Any
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    engine: RolloutEngine
    reward: Reward
    trainer: Trainer
    reference: Forward | WithoutAdapters | None = None
    """The frozen model that the run began with, if a KL term needs it. Its policy of the layer that
    is trained is the reference, so a KL term of phase 1 has no gradient above that layer."""
    critic: Critic | None = None
    """Needed for advantage=ppo only"""
    start: int = 0
    """Number of steps that were done before, if this run continues an earlier one"""
    drawn: int = 0
    """Number of prompts that were drawn before in addition to rollout.prompts per step"""


class Run:
    """Executes a run with these components, from the first step to the last."""

    def __init__(self, parts: Parts) -> None:
        config, self.config, self.out = parts.config, parts.config, parts.out
        self.model, self.tokenizer, self.engine = parts.model, parts.tokenizer, parts.engine
        self.train_prompts, self.eval_prompts = parts.train_prompts, parts.eval_prompts
        self.reward, self.trainer = SpreadReward(parts.reward), parts.trainer
        self.critic = parts.critic
        self.start, self.drawn = parts.start, parts.drawn
        self.schedule = Schedule(config)
        size = config.rollout.prompts
        self.order = PromptOrder(parts.train_prompts, size, config.seed, config.data.weights)
        self.streams = Streams(
            config, parts.trainer, parts.reference, parts.critic, parts.engine.samples_from_nucleus
        )
        settings = configuration.values(config)
        self.recorder = Recorder(self.out, self.start, config.wandb, self.out.name, settings)
        self.monitor = Monitor(config, self.out, self.start)
        self.evaluator = Evaluator(
            config, self.out, self.schedule, self.eval_prompts, self._generate_for_evaluation,
            self.reward, self.recorder, self.monitor,
        )  # fmt: skip
        self.diagnostics = Diagnostics(config, self.out, self.model, self.schedule, self.recorder)
        for step in self.diagnostics.ended_phases():
            self.schedule.end_phase(step)
        self.bad_steps = bad_steps_at_end(shared_rows(self.out / "metrics.jsonl"))
        self.writer = checkpoint.Writer(self.out, config.checkpoint.in_background)
        self.saved, self.saved_at = self.start, time.monotonic()
        self.failure, self.updating = "", False

    def train(self) -> int | None:
        """Trains to the end and returns None, or the number of the signal that stopped the run. The
        state is saved in both cases."""
        try:
            done = self._steps()
            self._wait_for_writer(done)
            if done > self.saved or not ranks.from_first(lambda: checkpoints(self.out)):
                self._save(done)
                self._wait_for_writer(done)
        finally:
            if unwritten := self.writer.close():  # beside another error, which is being raised
                self.monitor.display.say(unwritten)
            self.monitor.release()
            self.recorder.close()
        rows = [r for r in read_rows(self.out / "metrics.jsonl") if r["step"] > self.start]
        if ranks.is_first():
            if rows:
                self.monitor.display.say(time_line(rows))
            write_report(self.out)
        if self.failure:
            raise RunError(self.failure)
        return max(ranks.gathered(self.monitor.stop.signal or 0)) or None

    def _steps(self) -> int:
        """Runs all steps, or those before a stop, and returns how many are done."""
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
                    self._save(step)  # before the evaluation, which may take a long time
                self.evaluator.after(step)
                if "best" in self.config.checkpoint.keep and self.evaluator.best_step() == step:
                    self._save(step)
                if self.monitor.stopping():
                    break
        except Stopped:
            pass
        except Exception as error:
            if not getattr(error, "__notes__", ()):
                error.add_note(f"step {done + 1}, between stages")
            together = ranks.world() == 1 or isinstance(error, AgreedError)
            if together and not self.updating and done > self.saved:
                self._save(done)  # the state is that of a complete step
            raise
        return done

    def _look_first(self) -> None:
        """Prepares the probes of weight sync and diagnostics, and measures them before step 1."""
        half = self.config.model.compute_dtype == "bfloat16"
        exact = half and self.trainer.forward.can_widen
        with self.monitor.stage("weights of the engine", self.start):
            self.sync = WeightSync(
                self.engine,
                self.model,
                probes_of(self.train_prompts),
                self._final_logprobs,
                GapLimit(self.config.model.compute_dtype, self.config.rollout.max_logprob_gap),
                self._exact_logprobs if exact else None,
                half,
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
        watch, policy = Stopwatch(), self.schedule.policy(step)
        collected = self._collect(step, watch)
        self.monitor.check_stop()
        with self.monitor.stage("old_logprobs", step, watch):
            rollouts, found = self.streams.with_logprobs(collected.rollouts, policy)
        rollouts = self.streams.with_advantages(rollouts)
        self.monitor.check_stop()
        self.updating = True
        updates = self._update(rollouts, policy, step, watch)
        if updates.old is not None:
            found["policy/entropy"] = updates.old.mean_entropy()
            if policy.layer is None:
                found["final/entropy"] = found["policy/entropy"]
        self._count_bad_steps(step, updates.skipped)
        if policy.layer is not None and self.schedule.begins_with(step):
            entropy = found["policy/entropy"]
            self._warn_of_a_wild_start(step, policy.layer, updates.metrics, entropy)
        with self.monitor.stage("sync", step, watch):
            synced = self.sync(updates.changed)
        measured = self._diagnose(step, watch)
        row = {
            "step": step,
            "phase": policy.phase,
            "layer": policy.layer,
            **rollout_metrics(rollouts, collected.grades),
            **(collected.metrics() if self.config.rollout.refills else {}),
            "response/dropped": sum(r.dropped for r in rollouts) / max(len(rollouts), 1),
            "groups/zero_spread": flat_groups(rollouts),
            **found,
            **updates.metrics,
            **({"policy/skipped_why": updates.skipped[0]} if updates.skipped else {}),
            "sync/logprob_gap": found["rollout/logprob_gap"] if synced is None else synced,
            **measured,
            **{f"time/{name}": seconds for name, seconds in watch.seconds.items()},
            "time/step": watch.total(),
            **watch.rank_metrics(collected.tokens),
            "tokens_per_second": collected.tokens / watch.total(),
            "memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **gpu_memory(self.trainer.forward.device),
        }
        self.drawn += collected.groups - self.config.rollout.prompts
        self.recorder.rollouts(step, [rollout_row(r) for r in rollouts])
        self.recorder.step(row)
        self.monitor.display.step(row)

    def _collect(self, step: int, watch: Stopwatch) -> Collected:
        """Returns a step's rollouts with rewards. Raises RunError if most cannot be graded."""
        size, seed = self.config.rollout, f"{self.config.seed}/step/{step}"
        begin = (step - 1) * size.prompts + self.drawn

        def take(first: int, count: int) -> list[Prompt]:
            return self.order.take(begin + first, count)

        def respond(prompts: Sequence[Prompt], round_: int) -> list[Rollout]:
            with self.monitor.stage("rollout", step, watch):
                of_round = f"{seed}/refill/{round_}" if round_ else seed
                return self._generate(prompts, size.samples, of_round, watch=watch)

        def grade(rollouts: list[Rollout]) -> Grades:
            with self.monitor.stage("reward", step, watch):
                return self.reward(rollouts)

        collected = collect(take, size.prompts, respond, grade, size.refills)
        grades, responses = collected.grades, len(collected.rollouts)
        lost = sum(r.ungraded for r in collected.rollouts)
        if grades.first_failure:
            self.monitor.display.say(
                f"step {step}: {grades.timeouts} timeouts and {grades.errors} errors of the "
                f"reward; {lost} of {responses} responses have no reward and are left out. "
                f"The first failure: {grades.first_failure}"
            )
        if 2 * lost > responses:
            raise AgreedError(
                f"step {step}: {lost} of {responses} responses cannot be graded (first "
                f"failure: {grades.first_failure}); the state after step {step - 1} is saved "
                f"in {self.out}"
            )
        return collected

    def _update(
        self, rollouts: Sequence[Rollout], policy: Policy, step: int, watch: Stopwatch
    ) -> PolicyUpdates:
        """Updates the weights of the policy and of the critic."""
        with self.monitor.stage("update", step, watch):
            updates = self.trainer.update(rollouts, policy, step)
        if self.critic:
            with self.monitor.stage("critic", step, watch):
                of_critic = self.critic.update(rollouts, step)
            updates = replace(
                updates,
                metrics=updates.metrics | of_critic.metrics,
                skipped=updates.skipped + of_critic.skipped,
            )
        return updates

    def _diagnose(self, step: int, watch: Stopwatch) -> dict[str, float]:
        """Measures the policies of all layers if that is due, and ends phase 1 if that is over."""
        if not self.diagnostics.due(step):
            return {}
        with self.monitor.stage("diagnostics", step, watch):
            measured = self.diagnostics.after(step)
        if why := self.diagnostics.ends_phase:
            self.schedule.end_phase(step)
            self.monitor.display.say(f"step {step}: phase 1 ends here, {why} (auto_stop)")
        return measured

    def _count_bad_steps(self, step: int, skipped: Sequence[str]) -> None:
        if not skipped:
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.monitor.display.say(f"step {step}: skipped {'; '.join(skipped)}")
        if self.bad_steps >= self.config.max_bad_steps:
            self.failure = (
                f"{self.bad_steps} steps in a row with nan or infinity (max_bad_steps), the last: "
                f"step {step}, {skipped[0]}; its state is saved in {self.out}"
            )

    def _warn_of_a_wild_start(
        self, step: int, layer: int, update: Mapping[str, float], entropy: float
    ) -> None:
        """Warns if a phase starts out of control. H^l is not normalised, so a raw pi^l can be so
        sharp that one step at a usual learning rate moves it far from where it was."""
        clipped, ratio = update["policy/clip_fraction"], update["policy/ratio_max"]
        if clipped > WILD_CLIP_FRACTION or ratio > WILD_RATIO:
            self.monitor.display.say(
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
        watch: Stopwatch | None = None,
    ) -> list[Rollout]:
        """Returns the responses of all ranks. watch: gets the time of each rank."""
        given = (prompts, samples, seed, self.monitor.stop, temperature)
        rollouts, seconds = generate(self.engine, self.config.rollout, *given)
        self.monitor.check_stop()
        if watch:
            watch.of_ranks = [a + b for a, b in zip(watch.of_ranks, seconds)]
        return rollouts

    def _generate_for_evaluation(
        self, problems: Sequence[Prompt], samples: int, seed: str
    ) -> list[Rollout]:
        return self._generate(problems, samples, seed, self.config.eval.temperature)

    def _final_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        return self.trainer.forward.token_stats(samples, Policy(None), temperature=1.0).logprobs

    def _exact_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        with self.trainer.forward.in_float32():
            return self._final_logprobs(samples)

    def _checkpoint_is_due(self, step: int) -> bool:
        settings = self.config.checkpoint
        late = settings.minutes and time.monotonic() >= self.saved_at + 60 * settings.minutes
        return (
            bool(settings.every and step % settings.every == 0)
            or ranks.any_of(bool(late))
            or ("switch" in settings.keep and self.schedule.switches_after(step))
        )

    def _wait_for_writer(self, step: int) -> None:
        with self.monitor.stage("save", step):
            self.writer.finish()

    def _save(self, step: int) -> None:
        critic = self.critic.parameters().items() if self.critic else ()
        broken = first_bad(
            (*self.model.named_parameters(), *((f"critic {n}", p) for n, p in critic))
        )
        if bad := ranks.first_of(broken):
            earlier = f"the one of step {self.saved} is kept"
            kept = earlier if self.saved else "there is no earlier one"
            raise RunError(
                f"step {step} broke the model ({bad}); no checkpoint of it is saved, and {kept}"
            )
        settings, best = self.config.checkpoint, self.evaluator.best_step()
        steps = set(self.schedule.switches()) if "switch" in settings.keep else set()
        if "best" in settings.keep and best is not None:
            steps.add(best)
        with self.monitor.stage("save", step):
            state = {"step": step, "drawn": self.drawn}
            parts = (self.model, self.tokenizer, self.trainer.optimizer, self.critic)
            self.writer.save(state, *parts, settings.keep_last, steps)
        self.saved, self.saved_at = step, time.monotonic()
