"""What TRL (GRPOConfig) and verl call settings, for errors that name the key of bupo."""

from __future__ import annotations

from collections.abc import Collection

OTHER_NAMES = {
    "name": "run_name experiment_name",
    "out": "output_dir default_local_dir",
    "wandb": "project_name",
    "advantage": "adv_estimator scale_rewards norm_adv_by_std_in_grpo",
    "steps": "max_steps total_training_steps",
    "model.path": "model_name_or_path",
    "model.gradient_checkpointing": "enable_gradient_checkpointing",
    "model.shard_ranks": "fsdp_size data_parallel_shard_degree",
    "lora.rank": "lora.r lora_r lora_rank model.lora_rank peft_config.r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_target_modules target_modules",
    "data.train": "dataset_name train_files",
    "data.max_prompt_tokens": "max_prompt_length",
    "rollout.engine": "use_vllm vllm_mode rollout.name",
    "rollout.servers": "vllm_server_base_url vllm_server_host",
    "rollout.prompts": "train_batch_size",
    "rollout.samples": "num_generations rollout.n",
    "rollout.max_new_tokens": "max_completion_length max_response_length",
    "rollout.vllm={gpu_memory_utilization: SHARE}": "gpu_memory_utilization "
    "vllm_gpu_memory_utilization",
    "rollout.vllm={tensor_parallel_size: N}": "tensor_model_parallel_size "
    "vllm_tensor_parallel_size",
    "reward.function": "reward_funcs custom_reward_function.path custom_reward_function.name",
    "loss.type": "importance_sampling_level",
    "loss.clip_low and loss.clip_high": "epsilon clip_ratio",
    "loss.clip_low": "clip_ratio_low",
    "loss.clip_high": "epsilon_high clip_ratio_high",
    "loss.dual_clip": "delta clip_ratio_c",
    "loss.aggregation and loss.type": "loss_type",
    "loss.aggregation": "loss_agg_mode",
    "loss.kl_coef": "beta kl_loss_coef",
    "loss.drop_truncated": "mask_truncated_completions",
    "critic.lr": "critic.optim.lr critic.learning_rate",
    "critic.gamma": "algorithm.gamma",
    "critic.gae_lambda": "algorithm.lam",
    "optimizer.lr": "learning_rate optim.lr",
    "optimizer.betas": "optimizer.beta adam_beta1 adam_beta2",
    "optimizer.micro_batch_tokens": "ppo_max_token_len_per_gpu",
    "optimizer.grad_clip": "max_grad_norm",
    "optimizer.mini_batch_prompts": "ppo_mini_batch_size",
    "optimizer.epochs": "num_iterations ppo_epochs",
    "eval.files": "val_files",
    "eval.every": "eval_steps test_freq",
    "eval.samples": "val_kwargs.n",
    "checkpoint.every": "save_steps save_freq",
    "checkpoint.keep_last": "save_total_limit",
}
"""Our keys, and the names that others have for them, whatever group they put them in"""

INSTEAD = {
    "rollout.prompts and optimizer.updates_per_step decide how many prompts an update has, and "
    "optimizer.micro_batch_tokens how many tokens a forward pass has": "ppo_micro_batch_size "
    "per_device_train_batch_size gradient_accumulation_steps steps_per_generation "
    "ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu",
    "bupo always writes files for TensorBoard; wandb=PROJECT also sends everything to W&B": (
        "report_to"
    ),
    "AdamW's epsilon is always 1e-8": "optimizer.epsilon adam_epsilon",
    "bupo counts steps of rollout.prompts prompts, not epochs: set steps": "num_train_epochs "
    "total_epochs",
    "lora.rank=16 trains LoRA adapters": "use_peft",
    "bupo trains on one device; rollout.vllm={tensor_parallel_size: N} generates on several": (
        "n_gpus_per_node nnodes deepspeed"
    ),
}
"""What to do where no key of ours is the same, and the names that call for it"""


def our_name(name: str, keys: Collection[str]) -> str | None:
    """Returns what an error says about a dotted name that another trainer uses: the entry of the
    longest name that it ends in. Returns None for other names, and if the command, which has these
    keys, does not have ours or does not train."""
    found = {
        other: ours
        for ours, others in (OTHER_NAMES | INSTEAD).items()
        for other in others.split()
        if f".{name}".endswith(f".{other}")
    }
    if not found:
        return None
    ours = found[max(found, key=len)]
    if ours in INSTEAD:
        return ours if "policy" in keys else None
    return f"bupo calls it {ours}" if ours.startswith(tuple(keys)) else None
