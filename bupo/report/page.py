"""Writes a self-contained page of figures, tables and texts. All pages share base.html.j2."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from bupo.report.drawing import encoded, style
from bupo.report.palette import VARIABLES
from bupo.report.run_files import plus_minus
from bupo.runlog.run_directory import replace_text

Draw = dict[str, Callable[[], Figure | None]]


def write_page(
    out: Path, template: str, draw: Draw, notes: Sequence[str], folder: str = "", **values: Any
) -> Path:
    """Writes OUT/report.html and a PNG file of each of its figures, and returns the page's path.

    draw: functions by name that make a figure, or None if there is nothing to show. A figure that
    fails is left out, and a note on the page says so. folder: subfolder of out for the figures,
    which are then also written as SVG. values: passed to the template, which escapes them. Raises
    OSError.
    """
    figures, notes = {}, list(notes)
    (out / folder).mkdir(parents=True, exist_ok=True)
    for name, make in draw.items():
        try:
            with style():
                figure = make()
                files = {kind: encoded(figure, kind) for kind in ("png", "svg") if figure}
        except Exception as error:  # a figure must never end a training run
            notes.append(f"{name}.png could not be drawn: {error!r:.200}")
            continue
        for kind, content in files.items():
            if kind == "png" or folder:
                (out / folder / f"{name}.{kind}").write_bytes(content)
        if files:
            figures[name] = files["svg"].decode()
    pages = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=pages, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"inline": inline, "plus_minus": plus_minus}
    values |= {"figures": figures, "notes": notes, "variables": VARIABLES}
    page = env.get_template(template).render(values)
    replace_text(out / "report.html", page.encode(errors="replace").decode())
    return out / "report.html"


def inline(text: str, name: str, description: str) -> str:
    """Turns an SVG file into an element of a page, with unique identifiers and colours from CSS."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<image [^>]*?)\bid="[^"]*"', r"\1", text)  # equal colour bars have equal ids
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    label = html.escape(description)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    for color, (variable, _) in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text
