#!/usr/bin/env bash
# recipes/qwen3_4b.yaml in verl 0.9.1, for a node of 8 GPUs that has verl with vLLM, and bupo beside
# it (docs/integrations.md). BUPO_DATA: the folder of the data files. Further arguments are verl's.
set -euo pipefail
data=${BUPO_DATA:-data}
exec python -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo \
  algorithm.use_kl_in_reward=False \
  data.train_files="$data/deepmath-5k.parquet" \
  data.val_files="[$data/math500.parquet,$data/aime_2024.parquet,$data/aime_2025.parquet]" \
  data.train_batch_size=128 \
  data.max_prompt_length=1024 \
  data.max_response_length=7168 \
  data.filter_overlong_prompts=True \
  +data.apply_chat_template_kwargs.enable_thinking=False \
  actor_rollout_ref.model.path=Qwen/Qwen3-4B \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.model.enable_gradient_checkpointing=True \
  actor_rollout_ref.model.use_fused_kernels=True \
  actor_rollout_ref.model.fused_kernel_options.impl_backend=bupo \
  +actor_rollout_ref.model.override_config.bupo_layer=6 \
  +actor_rollout_ref.model.override_config.bupo_steps=30 \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.optim.weight_decay=0.01 \
  actor_rollout_ref.actor.grad_clip=1.0 \
  actor_rollout_ref.actor.ppo_mini_batch_size=32 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.actor.clip_ratio=0.2 \
  actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
  actor_rollout_ref.actor.use_kl_loss=False \
  actor_rollout_ref.actor.entropy_coeff=0 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.temperature=1.0 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768 \
  actor_rollout_ref.rollout.val_kwargs.n=16 \
  actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
  actor_rollout_ref.rollout.val_kwargs.do_sample=True \
  trainer.total_training_steps=300 \
  trainer.test_freq=30 \
  trainer.save_freq=25 \
  trainer.n_gpus_per_node=8 \
  trainer.nnodes=1 \
  trainer.project_name=bupo \
  trainer.experiment_name=qwen3_4b_bupo \
  "$@"
