"""A process that grades mathematical answers. It reads and writes one JSON object per line.

    {"response": "... \\\\boxed{1/2}", "answer": "0.5"}  ->  {"reward": 1.0}

Grading has its own process because symbolic mathematics can run forever and cannot be interrupted
from within: math_reward.py kills and replaces the process. It does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import resource
import signal
import sys

from bupo.rewards.boxed import last_boxed

MEMORY_BYTES = 4 << 30
"""Memory limit, so that an answer like 2^{2^{40}} is an error and does not exhaust the machine."""


def grade(response: str, answer: str) -> float:
    """Returns 1.0 if the last boxed answer equals the ground truth as a string or by Math-Verify,
    else 0.0."""
    given = last_boxed(response)
    if given is None:
        return 0.0
    if "".join(given.split()) == "".join(answer.split()):
        return 1.0
    from math_verify import parse, verify

    # No timeouts here: the caller kills this process at its deadline.
    truth = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    guess = parse(f"\\boxed{{{given}}}", parsing_timeout=None)
    return float(verify(truth, guess, timeout_seconds=None))


def _die_with_parent() -> None:
    """On Linux, makes this process end with its parent, so a killed trainer leaves no worker."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Answers requests from standard input until it closes."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import math_verify  # noqa: F401  # slow to import, so before the first deadline

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns on every call
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: dict[str, object] = {"reward": grade(request["response"], request["answer"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
