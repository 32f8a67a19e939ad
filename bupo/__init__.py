"""bupo: reinforcement learning on the internal policies of language models.

bupo.ops       fused LM-head log-probs, entropy and policy loss
bupo.policy    a causal language model as a stack of policies, one per layer
bupo.run       `python -m bupo.run`: Bottom-up Policy Optimization and its baselines
"""
