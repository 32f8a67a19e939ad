"""What the documents say is what the tree holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_are_made_from_the_results() -> None:
    command = [sys.executable, str(ROOT / "bench/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_pictures_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    for link in links:
        if "://" not in link:
            assert (document.parent / link).exists(), link


def test_every_folder_of_the_readme_tree_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```tree\n(.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    paths = [line.split()[0] for line in tree[1].splitlines() if line.strip()]
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path
