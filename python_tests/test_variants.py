"""The variants of the Hopper kernels: each can still be made, and how their figures are read."""

from pathlib import Path
from typing import Any

import pytest
import variants

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_changes_what_it_says(name: str, tmp_path: Path) -> None:
    tree = variants.copy_sources(name, tmp_path)
    changes = variants.VARIANTS[name].changes
    changed = {file for file, _, _ in changes}
    assert len({new for _, _, new in changes}) == len(changes)
    for file in sorted(tree.rglob("csrc/**/*.*")):
        path = str(file.relative_to(tree))
        assert (file.read_text() != (ROOT / path).read_text()) == (path in changed), path
    for file, _, new in changes:
        assert new in (tree / file).read_text()
    assert (tree / "CMakeLists.txt").exists() and not list(tree.rglob("_C*.so"))


def test_a_change_that_no_longer_fits_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = variants.Variant(changes=((variants.SCAN, "no such line", "x"),))
    monkeypatch.setitem(variants.VARIANTS, "gone", gone)
    with pytest.raises(SystemExit, match=r"gone: expected once .* came 0 x: no such"):
        variants.copy_sources("gone", tmp_path)


def test_a_variant_that_hangs_or_breaks_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "SECONDS", 1)
    program = tmp_path / "bench" / "bench_lm_head.py"
    program.parent.mkdir()
    for text, wrong in (
        ("import time; time.sleep(30)", "over 1 s"),
        ("raise ValueError('no GPU')", "ValueError: no GPU"),
        ("import sys; open(sys.argv[4], 'a').write('{\"name\": 1}\\n')", ""),
    ):
        program.write_text(text)
        rows, came = variants.run(tmp_path, "auto", [1, 2, 3])
        assert came.endswith(wrong) and bool(came) == bool(wrong)
        assert rows == ([] if wrong else [{"name": 1}])


def row(name: str, ratio: float, **more: Any) -> dict[str, Any]:
    figures = {"ms": 1.0, "x_one_gemm": ratio, "x_three_gemms": ratio, "error_d_weight": 1e-3}
    return {"name": name} | figures | more


def test_figures_of_several_processes() -> None:
    forward, policy = "lm_head_logprobs fwd", variants.POLICY
    found = {
        "ping-pong": [row(forward, x) for x in (1.1, 1.2, 1.0)] + [row(policy, 1.3)],
        "no exponentials": [row(policy, 1.0, error_d_weight=float("nan"))],
        "8 MiB in L2": [
            row(forward, 1.0),
            {"name": policy, "failed": "out of memory"},
        ],
    }
    assert variants.summary(found).splitlines()[2:] == [
        "| ping-pong | 1.100 (1.000-1.200) | 1.300 (1.300-1.300) | - | 1.0e-03 |",
        "| no exponentials | - | 1.000 (1.000-1.000) | - | any |",
        "| 8 MiB in L2 | 1.000 (1.000-1.000) | - | - | - |",
    ]
