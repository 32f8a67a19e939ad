"""A process that calls a grading function: `python -m bupo.rewards.worker MODULE:FUNCTION`. It
reads and writes one JSON object per line.

    {"response": "... \\\\boxed{1/2}", "answer": "0.5"}  ->  {"reward": 1.0}

Grading that may run forever, such as symbolic mathematics, cannot be interrupted from within:
killable.py kills and replaces the process. It does not import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30
"""Memory limit, so that an answer like 2^{2^{40}} is an error and does not exhaust the machine."""


def _die_with_parent() -> None:
    """On Linux, makes this process end with its parent, so a killed trainer leaves no worker."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(place: str) -> None:
    """Answers requests from standard input until it closes."""
    _die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # its children do not read requests,
    os.dup2(2, 1)  # and what the function prints is not a reply

    def reply(**content: object) -> None:
        print(json.dumps(content), file=replies, flush=True)

    module, _, function = place.partition(":")
    try:
        loaded = importlib.import_module(module)
        getattr(loaded, "load", lambda: None)()
    except Exception as error:
        return reply(error=f"{type(error).__name__}: {error}")
    reply(ready=True)
    for line in requests:
        request = json.loads(line)
        try:
            (reward,) = getattr(loaded, function)([request["response"]], [request["answer"]])
            reply(reward=None if reward is None else float(reward))
        except Exception as error:
            reply(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
