"""Runs the tests of the CPU operators on another device: BUPO_TEST_DEVICE=cuda.

The tests make their tensors without naming a device. OnDevice sends what they make to the device,
with the numbers that a CPU generator gives, so that the same samples are tested everywhere.
"""

from __future__ import annotations

import os
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("BUPO_TEST_DEVICE", "cpu")

# What the CUDA operators do otherwise, by the name of the test (with or without its parameters).
NOT_ON_CUDA = {
    "test_what_other_cpus_run": "is about the CPU's products and vectors",
    "test_log_probs_do_not_depend_on_the_number_of_threads": "is about CPU threads",
    "test_dtensor_weight_is_refused": "makes a mesh of CPU processes",
    "test_autocast_to_float16_is_refused": "CUDA takes float16",
    "test_numbers_that_float32_cannot_divide_by[change0]": "CUDA does not read values on the host",
}
for _op in ("lm_head_logprobs", "policy_loss"):
    for _case in ("target below 0", "target at V", "temperature tensor 0"):
        NOT_ON_CUDA[f"test_errors_name_the_op_and_the_argument[{_op}-{_case}]"] = (
            "CUDA does not read values on the host: test_gpu.py has what it does instead"
        )
    NOT_ON_CUDA[f"test_errors_name_the_op_and_the_argument[{_op}-float16]"] = "CUDA takes float16"


class OnDevice(TorchFunctionMode):
    """torch.set_default_device, and random numbers of a CPU generator, moved."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if kwargs.get("generator") is None:
            return func(*args, **kwargs | {"device": self.device})
        requires_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)
