"""What the documents say is what the tree holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_samples

from bupo import config
from bupo.internal import tables
from bupo.tasks import tiny

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_tables_and_pictures_are_made_from_the_results() -> None:
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), "--check"]
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


def explained(table: str, document: str = "training") -> set[str]:
    """Names in the first column of a table of a document that have an explanation."""
    text = (ROOT / f"docs/{document}.md").read_text(encoding="utf-8")
    part = text.split(f"<!-- {table} -->")[1].split("<!-- end -->")[0]
    return set(re.findall(r"^\| `([^`]+)` \| \S.{5,} \|$", part, flags=re.MULTILINE))


def test_every_metric_is_explained(tmp_path: Path) -> None:
    """Those that a run of both phases with evaluations writes, and none that bupo never does."""
    out = tmp_path / "run"
    assert run_samples.run(out, "steps=2", "bupo.steps=1") == 0
    options = ("advantage=ppo", "loss.kl_coef=0.1", "rollout.refills=1", "data.limit=null")
    assert run_samples.run(tmp_path / "ppo", "steps=2", "bupo.steps=1", *options) == 0
    files = (out / "metrics.jsonl", tmp_path / "ppo/metrics.jsonl")
    lines = [json.loads(line) for file in files for line in file.open()]
    written = {key for line in lines for key in line}
    assert written <= explained("metrics"), f"not explained: {written - explained('metrics')}"
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "bupo").rglob("*.py"))
    gone = {key for key in explained("metrics") - written if key.rpartition("/")[2] not in code}
    assert not gone and len(explained("metrics")) > 20
    evals = {key for line in (out / "eval.jsonl").open() for key in json.loads(line)}
    assert explained("evaluation") == {re.sub(r"@\d+", "@K", key) for key in evals}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_settings_in_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    places = re.findall(r"```\n.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    keys = {"algorithm", *config.all_keys(config.Config), *config.all_keys(config.AnalysisConfig)}
    groups = "|".join({re.escape(key.partition(".")[0]) for key in keys if "." in key})
    pattern = rf"(?<![\w.])((?:{groups})\.[a-z_]+|resume|algorithm|policy|advantage|wandb|seed)="
    used = {key for place in places for key in re.findall(pattern, place)}
    if document.name == "internal_policies.md":  # of one command, so every word before = is a key
        used |= {k for p in places for k in re.findall(r"(?<![\w.])([a-z][a-z_.]*)=", p)}
    assert used <= keys, used - keys
    assert used or document.name in (
        "index.md",
        "integrations.md",
        "ops.md",
        "performance.md",
        "study.md",
        "reliability.md",
        "CONTRIBUTING.md",
    )


def test_every_column_of_an_analysis_is_explained() -> None:
    assert explained("tokens", "internal_policies") == set(tables.TOKENS.names)
    assert explained("top_tokens", "internal_policies") == set(tables.TOP_TOKENS.names)


def test_the_example_of_an_analysis_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"layers": 3, "width": 32}
    files = tiny.prepare(options, tmp_path)
    tiny.build(options, files.model)
    text = (ROOT / "docs/internal_policies.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace('"MODEL"', repr(str(files.model))), names)
    assert len(names["found"].texts) == 2  # type: ignore[attr-defined]
    assert (tmp_path / "analyses/mine/report.html").stat().st_size > 50_000
