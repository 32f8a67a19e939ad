"""The LM-head ops of RL post-training: per-token log-probs, entropy, policy losses, and
divergences of two heads. They work directly on hidden states and the unembedding matrix and do not
store [tokens, vocab].

The mathematics is in docs/ops.md; `reference` has the same functions in eager torch.
"""

from bupo.ops import reference
from bupo.ops.divergence import Divergence, lm_head_divergence
from bupo.ops.lm_head import LogProbs, lm_head_logprobs
from bupo.ops.policy_loss import PolicyLoss, policy_loss
from bupo.ops.reductions import token_weights
from bupo.ops.registration import build_info, set_cuda_kernels, set_workspace_bytes

__all__ = [
    "Divergence",
    "LogProbs",
    "PolicyLoss",
    "build_info",
    "lm_head_divergence",
    "lm_head_logprobs",
    "policy_loss",
    "reference",
    "set_cuda_kernels",
    "set_workspace_bytes",
    "token_weights",
]
