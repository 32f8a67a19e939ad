"""A process that grades mathematical answers: one JSON object a line in, one a line out.

    {"response": "... \\\\boxed{1/2}", "answer": "0.5"}  ->  {"reward": 1.0}

A process of its own, because symbolic mathematics can run for ever and cannot be interrupted from
within: rewards.py kills and replaces it. Imports no torch.
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
"""An answer like 2^{2^{40}} ends in an error, not in the machine's last byte."""


def grade(response: str, answer: str) -> float:
    """1.0 if the last boxed answer equals the ground truth as a string or by Math-Verify."""
    given = last_boxed(response)
    if given is None:
        return 0.0
    if "".join(given.split()) == "".join(answer.split()):
        return 1.0
    from math_verify import parse, verify

    # No alarm inside: the deadline is the caller's, which kills this process.
    truth = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    guess = parse(f"\\boxed{{{given}}}", parsing_timeout=None)
    return float(verify(truth, guess, timeout_seconds=None))


def _die_with_parent() -> None:
    """On Linux: a trainer that is killed leaves no worker behind, however long it computes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Serves standard input until it closes."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import math_verify  # noqa: F401  # slow to import: before the first deadline runs

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
