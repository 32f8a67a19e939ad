"""The documentation site is built without a warning, and holds what it should."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bupo import config, internal, ops

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, with all notebooks run. mkdocs.yml makes broken links and anchors warnings."""
    out = tmp_path_factory.mktemp("site")
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"PATH": programs, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "WARN" not in printed and "ERROR" not in printed, printed
    return out


def pages(nav: Any) -> Iterator[str]:
    """Pages of a navigation of mkdocs.yml."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []:
        yield from pages(part)


def test_every_page_of_the_navigation_is_there(site: Path) -> None:
    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    documents = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    assert set(named) == {str(p) for p in documents} | {f"notebooks/{p.name}" for p in NOTEBOOKS}
    for name in named:
        assert (site / name).with_suffix(".html").stat().st_size > 5_000, name


def test_public_names_and_settings_are_in_the_reference(site: Path) -> None:
    for module in (ops, internal):
        text = (site / f"reference/{module.__name__.partition('.')[2]}.html").read_text()
        ids = {found.rpartition(".")[2] for found in re.findall(r'<h2 id="(bupo\.[^"]+)"', text)}
        assert ids >= set(module.__all__), set(module.__all__) - ids
    text = (site / "reference/settings.html").read_text()
    for key in config.all_keys(config.Config):
        assert f'id="config.{key}"' in text, key


def test_links_out_of_the_documents_are_not_in_the_site(site: Path) -> None:
    text = (site / "memory.html").read_text()
    assert "<code>python_tests/test_fit.py</code>" in text
    assert 'python_tests/test_fit.py"' not in text


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    loaded = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="?https?:[^" >]+')
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_have_run(site: Path, notebook: Path) -> None:
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "is committed without outputs"
    text = (site / f"notebooks/{notebook.stem}.html").read_text()
    shown = {"op_in_your_loop": "MiB at the peak", "look_inside_a_model": "data:image/png"}
    assert shown[notebook.stem] in text and "relative error" in text
