"""Checks names on the Hugging Face hub and keeps its libraries quiet, so that an error is one line.

This module imports fast.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bupo.config import first_line

_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
_OFFLINE = (
    "without a network connection, give a folder, or fill the hub's cache while connected and "
    "set HF_HUB_OFFLINE=1"
)


def is_name(text: str, owner: bool = False) -> bool:
    """Whether this is a valid repository name, [OWNER/]NAME; with `owner`, only OWNER/NAME is."""
    return _NAME.fullmatch(text) is not None and ("/" in text or not owner)


def reason(error: Exception) -> str:
    """Returns what the libraries report and, if they cannot reach the hub, what to do about it."""
    text = first_line(error).rstrip(".")
    return f"{text}; {_OFFLINE}" if "connect" in text.lower() else text


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the context, the libraries log errors only and draw no bars: bupo draws its own."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def base_of(folder: str) -> str | None:
    """Returns folder or hub name of the model that the LoRA adapters in a folder belong to, or None
    if it holds no adapters."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
