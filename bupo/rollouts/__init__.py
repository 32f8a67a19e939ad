"""Engines that generate responses, behind one interface: hf (transformers' generate) or vllm."""

from bupo.rollouts.engine import seed_of
from bupo.rollouts.hf import HFEngine
from bupo.rollouts.vllm import VllmEngine

__all__ = ["HFEngine", "VllmEngine", "seed_of"]
