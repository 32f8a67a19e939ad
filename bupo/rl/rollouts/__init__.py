"""Prompts to responses, behind one interface: hf (transformers' generate) or vllm."""

from bupo.rl.rollouts.engine import RolloutEngine, seed_of
from bupo.rl.rollouts.hf import HFEngine
from bupo.rl.rollouts.vllm import VllmEngine

__all__ = ["HFEngine", "RolloutEngine", "VllmEngine", "seed_of"]
