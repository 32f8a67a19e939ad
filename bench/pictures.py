"""Pictures of the documents, each with a digest of the results that it was made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import ROOT, Row

DOCS = ROOT / "docs"
KEY = "results"  # the key of the digest in a picture's metadata


def update(name: str, rows: list[Row], draw: Callable[[list[Row]], Any], check: bool) -> list[str]:
    """Draws docs/name, unless it shows these results already; with `check` draws nothing. Returns
    the name if the picture was or would be drawn."""
    picture = DOCS / name
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    if not rows or _is_made_from(picture, digest):
        return []
    if not check:
        draw(rows).savefig(picture, dpi=110, metadata={KEY: digest})
    return [name]


def _is_made_from(picture: Path, digest: str) -> bool:
    from PIL import Image

    if not picture.exists():
        return False
    with Image.open(picture) as image:
        return image.info.get(KEY) == digest
