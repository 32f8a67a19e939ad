"""Engines that generate responses, behind one interface: hf (transformers' generate) or vllm."""
