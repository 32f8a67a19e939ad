"""Keeps the padded rows of a head from being sampled, in the process that runs the model of vLLM.

vLLM loads this module by its name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

from bupo.rollouts.vllm_options import SAMPLED_ROWS


class PaddingMask(LogitsProcessor):
    """Sets the logits of the padded rows to -inf, for all requests at once.

    A list of allowed tokens in each request has the same effect, but vLLM would copy and check all
    entries of every list.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._rows = int(vllm_config.additional_config[SAMPLED_ROWS])

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [requests, rows of the head], which are changed in place."""
        logits[:, self._rows :] = -float("inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        """False: a padded row may have the largest logit."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """All requests are treated alike, so there is no state."""
