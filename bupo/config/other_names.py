"""What TRL (GRPOConfig) and verl call settings, for errors that name the key of bupo."""

from __future__ import annotations

from collections.abc import Collection

KEYS = {
    "name": "run_name experiment_name",
    "out": "output_dir default_local_dir",
    "resume": "resume_from_checkpoint resume_mode",
    "wandb": "project_name report_to trainer.logger",
    "advantage": "adv_estimator scale_rewards norm_adv_by_std_in_grpo",
    "steps": "max_steps total_training_steps",
    "model.path": "model_name_or_path",
    "model.compute_dtype": "bf16 fp16",
    "model.gradient_checkpointing": "enable_gradient_checkpointing",
    "data.train": "dataset_name train_files",
    "data.max_prompt_tokens": "max_prompt_length",
    "data.overlong": "filter_overlong_prompts data.truncation",
    "data.chat_template_options": "chat_template_kwargs apply_chat_template_kwargs",
    "rollout.engine": "use_vllm rollout.name",
    "rollout.prompts": "train_batch_size gen_batch_size",
    "rollout.samples": "num_generations rollout.n",
    "rollout.max_new_tokens": "max_completion_length max_response_length",
    "rollout.vllm": "gpu_memory_utilization vllm_gpu_memory_utilization "
    "tensor_model_parallel_size vllm_tensor_parallel_size",
    "reward.function": "reward_funcs custom_reward_function.path custom_reward_function.name",
    "loss.type": "importance_sampling_level",
    "loss.clip_low and loss.clip_high": "epsilon clip_ratio",
    "loss.clip_low": "clip_ratio_low",
    "loss.clip_high": "epsilon_high clip_ratio_high",
    "loss.dual_clip": "delta clip_ratio_c",
    "loss.aggregation": "loss_type loss_agg_mode",
    "loss.entropy_coef": "entropy_coeff",
    "loss.kl_coef": "beta kl_loss_coef use_kl_loss",
    "loss.kl_estimator": "kl_loss_type use_kl_in_reward kl_penalty",
    "loss.drop_truncated": "mask_truncated_completions",
    "loss.tis_cap": "vllm_importance_sampling_cap rollout_is_threshold",
    "critic.gae_lambda": "algorithm.lam",
    "optimizer.lr": "learning_rate optim.lr",
    "optimizer.schedule": "lr_scheduler_type",
    "optimizer.warmup_steps": "warmup_ratio lr_warmup_steps lr_warmup_steps_ratio",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "optimizer.grad_clip": "max_grad_norm",
    "optimizer.epochs": "num_iterations ppo_epochs",
    "eval.files": "val_files",
    "eval.every": "eval_steps test_freq",
    "eval.samples": "val_kwargs.n",
    "checkpoint.every": "save_steps save_freq",
    "checkpoint.keep_last": "save_total_limit max_actor_ckpt_to_keep",
}
"""Our keys, and the names that others have for them"""

_BATCHES = (
    "rollout.prompts and optimizer.updates_per_step decide how many prompts an update has, and "
    "optimizer.micro_batch_tokens how many tokens one forward pass has"
)
_EPOCHS = "bupo counts steps of rollout.prompts prompts, not epochs: set steps"
_LORA = "bupo does not have LoRA yet: it trains all parameters, or those that phases[].lr leaves"
_ONE_DEVICE = (
    "bupo trains on one device; vLLM can generate on several with "
    "rollout.vllm={tensor_parallel_size: N}"
)
INSTEAD = {
    _BATCHES: "per_device_train_batch_size gradient_accumulation_steps ppo_mini_batch_size "
    "ppo_micro_batch_size ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu "
    "ppo_max_token_len_per_gpu",
    _EPOCHS: "num_train_epochs total_epochs",
    _LORA: "lora.r lora_r lora_rank lora_alpha use_peft",
    _ONE_DEVICE: "n_gpus_per_node nnodes deepspeed fsdp_config",
}
"""What to do where no key of ours is the same, and the names that call for it"""


def our_name(name: str, keys: Collection[str]) -> str | None:
    """What an error says of a name that another trainer has, in any of its groups; None if there is
    no such name, or none of `keys` is the same setting."""
    for table, text in ((KEYS, "bupo calls it {}"), (INSTEAD, "{}")):
        for ours, names in table.items():
            known = table is INSTEAD or set(ours.split(" and ")) <= set(keys)
            if known and f".{name}".endswith(tuple(f".{other}" for other in names.split())):
                return text.format(ours)
    return None
