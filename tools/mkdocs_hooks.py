"""What mkdocs.yml needs beside its plugins: links to files outside of docs/, the reference of the
settings, and notebooks as pages.

A link such as ../recipes/math.yaml works on GitHub, but the site has no such file. It becomes a
link into the repository if mkdocs.yml names one (repo_url), else the path without a link.
"""

from __future__ import annotations

import html
import itertools
import logging
import os
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]\n]*\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
SETTINGS = re.compile(r"<!-- settings of (\w+) -->")
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files outside of docs/, and writes out settings."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            log.warning(f"{page.file.src_uri}: {link[1]} does not exist")
        if not config.repo_url:
            return f"`{path}`"
        return link[0].replace(link[1], f"{config.repo_url.rstrip('/')}/blob/main/{path}")

    shown: set[tuple[str, str, str]] = set()
    markdown = SETTINGS.sub(lambda found: _settings(found[1], shown), markdown)
    return LINK.sub(replaced, markdown)


def _settings(name: str, shown: set[tuple[str, str, str]]) -> str:
    """Returns the settings of a class of bupo.config that are not shown yet, by group, with the
    text that --help prints."""
    import bupo.config

    rows = [row for row in bupo.config.describe(getattr(bupo.config, name)) if row not in shown]
    shown.update(rows)
    parts: list[str] = []
    for group, members in itertools.groupby(rows, lambda row: row[0].rpartition(".")[0]):
        parts += [f"### {group}"] if group else []
        for key, default, text in members:
            help_text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
            # HTML, so that the table of contents has groups and the search has single settings.
            anchor = f"{name.lower()}.{key}"
            heading = f"<code>{key}={html.escape(default, quote=False)}</code>"
            parts.append(f'<h4 id="{anchor}">{heading}</h4>\n<p>{help_text}</p>')
    return "\n\n".join(parts)


class Notebook(File):
    """A notebook, which becomes a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes a page of each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            directories = config.use_directory_urls
            files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, directories))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """Runs a notebook and returns it, with its outputs, as Markdown."""
    if not isinstance(page.file, Notebook):
        return None
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(str(page.file.abs_src_path), as_version=4)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:  # what it writes stays out of the tree
        sockets = Config({"ConnectionFileMixin": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=240, resources=resources, config=sockets)
        client.execute(env=env)
    return "\n\n".join(part for cell in notebook.cells for part in _parts(cell))


def _parts(cell: Any) -> list[str]:
    """Returns a cell as Markdown: its text, or its code and what it has shown."""
    if cell.cell_type != "code":
        return [cell.source]
    parts, printed = [_fenced(cell.source, "python")], ""
    for output in cell.outputs:
        if output.output_type != "stream":
            parts.append(_shown(output.data))
        elif output.name == "stdout":  # warnings, on standard error, depend on the machine
            printed += output.text
    return [*parts, _fenced(printed, "text")] if printed else parts


def _shown(data: Any) -> str:
    if "image/png" in data:
        return f"![Figure](data:image/png;base64,{''.join(data['image/png'].split())})"
    return _fenced(data["text/plain"], "text")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
