"""Who may import whom, checked from the syntax tree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = {
    "types": {"samples"},
    "finite": {"ranks"},
    "ranks": {"config"},
    "samples": set(),
    "progress": set(),
    "terminal": set(),
    "config": set(),
    "ops": set(),
    "hub": {"config"},
    "adapters": {"config"},
    "policy": {"ops"},
    "internal": {"policy", "ops", "samples", "progress"},
    "data": {"config", "types", "hub", "progress"},
    "rewards": {"config", "types", "progress"},
    "rollouts": {"config", "types", "samples", "policy", "terminal", "progress", "ranks"},
    "runlog": {"config", "types", "terminal", "progress", "ranks"},
    "evaluation": {"config", "types", "progress"},
    "report": {"internal", "runlog"},
    "tasks": {"config", "hub", "progress", "rewards"},
    "integrations": {"ops", "policy"},
}
"""A file or folder of bupo/, and what of the others it may import. Those that are not named, rl and
the commands, are made of all of these."""


def imports(file: Path) -> set[str]:
    """Modules of the project that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name for name in found if name == "bupo" or name.startswith("bupo.")}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / "bupo" / folder).rglob("*.py"))


def reaches(file: Path, *prefixes: str) -> set[str]:
    return {
        name for name in imports(file) for p in prefixes if name == p or name.startswith(f"{p}.")
    }


def room(name: str) -> str:
    """bupo.rl.loop.Run is of the room rl."""
    return name.split(".")[1] if "." in name else ""


def test_rooms_import_only_what_stands_below_them() -> None:
    for name, allowed in ROOMS.items():
        files = sources(name) or [ROOT / "bupo" / f"{name}.py"]
        for file in files:
            found = {room(module) for module in imports(file)} - {name, "", "_C"}
            assert found <= allowed, f"{file} imports {found - allowed}"
    assert room("bupo.rl.loop") == "rl" and imports(ROOT / "bupo/rl/loop.py"), "the check itself"


def test_learning_knows_no_command_and_analysis_no_learning() -> None:
    for file in sources("rl"):
        assert not reaches(file, "bupo.commands", "bupo.tasks"), file
    of_analysis = [file for file in sources("commands") if "analys" in file.name]
    assert len(of_analysis) > 2
    for file in of_analysis:
        assert not reaches(file, "bupo.rl"), file


def test_a_report_is_drawn_without_torch() -> None:
    """`python -m bupo.report` starts at once."""
    for file in sources("report"):
        assert not needed_at_import(file) & {"torch", "transformers"}, file


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    paths = {p.relative_to(ROOT).with_suffix(""): p for p in sources("")}
    return {".".join(p.parts).removesuffix(".__init__"): path for p, path in paths.items()}


def test_no_two_modules_share_a_name() -> None:
    names = [name.rpartition(".")[2] for name in modules()]
    assert len(names) > 60
    assert {n for n in names if names.count(n) > 1} <= {"__main__"}


def test_functions_have_at_most_60_lines() -> None:
    """Their docstrings aside."""
    for file in sources(""):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{file}: {node.name} has {lines} lines"


def needs(file: Path, known: Collection[str]) -> set[str]:
    """Modules that a file takes something from; `from package import module` takes the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


def test_there_is_no_circle() -> None:
    """Imports within functions count too: a circle is one of design, not only of loading."""
    known = modules()
    left = {name: needs(path, known) for name, path in known.items()}
    while ready := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in ready}
    assert not left, {name: needed & left.keys() for name, needed in left.items()}


def needed_at_import(file: Path) -> set[str]:
    """Packages of others that a file imports outside of functions."""
    found, left = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while left:
        node: ast.AST = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left += ast.iter_child_nodes(node)  # type: ignore[arg-type]
    return found - sys.stdlib_module_names - {"bupo"}


def test_what_is_imported_at_once_is_a_dependency() -> None:
    """What comes with an extra, or with a package that it brings, is imported where it is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=;\[ ]", text)[0] for text in project["dependencies"]}
    names = {"yaml": "pyyaml"}
    by_vllm = {f"bupo.rollouts.vllm_{name}" for name in ("padding", "plugin")}
    assert not any(reaches(file, *by_vllm) for file in sources(""))
    late = by_vllm | {"bupo.rollouts.vllm_transfer"}  # a server's engine imports it when it starts
    needed = {
        names.get(name, name): file
        for file in sources("")
        for name in needed_at_import(file)
        if f"bupo.rollouts.{file.stem}" not in late and file.parent.name != "integrations"
    }
    assert {"torch", "numpy", "pyyaml"} <= needed.keys()
    assert not {name: file for name, file in needed.items() if name not in declared}
    for file in sources("integrations"):  # each is of the extra that has its name
        extra = file.stem.removesuffix("_plugin")
        assert needed_at_import(file) <= {"torch", extra}
        assert extra in {"__init__", "transformers", *project["optional-dependencies"]}


def test_workers_start_fast() -> None:
    graders = imports(ROOT / "bupo/rewards/mathematics.py")
    assert graders == {"bupo.rewards", "bupo.rewards.boxed"}
    assert not imports(ROOT / "bupo/rewards/worker.py")
    assert not imports(ROOT / "bupo/rewards/boxed.py")


def test_torch_operators_are_named_in_ops_only() -> None:
    for file in sources(""):
        if "ops" not in file.parts:
            assert "torch.ops" not in file.read_text(encoding="utf-8"), file


def test_vllm_is_imported_in_one_place() -> None:
    for file in sources(""):
        found = any(
            name.split(".")[0] == "vllm"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        )
        assert not found or (file.parent.name == "rollouts" and file.name.startswith("vllm")), file


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickles(file: Path) -> list[str]:
    """Places that could run code from a file: pickle modules, torch.load without weights_only,
    numpy's allow_pickle, remote code of a model."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {getattr(node, "module", None) or "", *(a.name for a in node.names)}
            if {name.split(".")[0] for name in names} & PICKLES:
                found.append(f"{file}:{node.lineno} imports a pickle module")
        if isinstance(node, ast.Call):
            options = {k.arg: k.value for k in node.keywords}
            safe = ast.dump(options.get("weights_only", ast.Constant(False)))
            if ast.unparse(node.func) == "torch.load" and safe != ast.dump(ast.Constant(True)):
                found.append(f"{file}:{node.lineno} torch.load without weights_only=True")
            if {"allow_pickle", "trust_remote_code", "pickle_module"} & options.keys():
                found.append(f"{file}:{node.lineno} {ast.unparse(node)}")
    return found


def test_nothing_is_unpickled_from_disk(tmp_path: Path) -> None:
    for file in [*sources(""), *(ROOT / "bench").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        assert not unpickles(file), file
    bad = tmp_path / "bad.py"  # the check itself
    for line in (
        "import pickle",
        "from pickle import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "M.from_pretrained(x, trust_remote_code=True)",
    ):
        bad.write_text(line)
        assert unpickles(bad), line
    bad.write_text("torch.load(f, weights_only=True)")
    assert not unpickles(bad)


def test_backends_do_not_include_each_other_and_kernels_no_torch() -> None:
    for file in (ROOT / "csrc").rglob("*"):
        if not file.is_file():
            continue
        lines = [x for x in file.read_text().splitlines() if x.startswith("#include")]
        part = file.relative_to(ROOT / "csrc").parts
        if part[0] == "cpu":
            assert not any("cuda" in x for x in lines), file
        if part[0] == "cuda":
            assert not any("cpu/" in x for x in lines), file
        if file.suffix in (".cu", ".cuh") or file.name in ("args.h", "row_math.h"):
            assert not any("torch/" in x for x in lines), file


def test_csrc_uses_nothing_newer_than_the_oldest_torch() -> None:
    """torch 2.11 is the target; its headers are not here, so what broke a build is remembered."""
    newer = {"STABLE_TORCH_ERROR_CODE_CHECK": "TORCH_ERROR_CODE_CHECK"}  # 2.12
    for path in (ROOT / "csrc").rglob("*.*"):
        for name, instead in newer.items():
            assert name not in path.read_text(encoding="utf-8"), f"{path}: use {instead}"


def test_setup_pins_torch_by_the_version_that_pip_knows(tmp_path: Path) -> None:
    """PyPI's CUDA builds say 2.11.0+cu130 of themselves and 2.11.0 in their metadata: pinned by the
    former, nothing could be installed beside them."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.11.0+cu130'; cuda = '13.0'")
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
    (tmp_path / "torch-2.11.0.dist-info/METADATA").write_text(metadata)
    script = (ROOT / "tools/setup.sh").read_text()
    (function,) = re.findall(r"^torch_requirement\(\) \{.*?^\}", script, re.DOTALL | re.MULTILINE)
    assert 'torch_requirement "$py" >.venv/constraints.txt' in script
    done = subprocess.run(
        ["bash", "-c", f"{function}\ntorch_requirement {sys.executable}"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "torch==2.11.0\n", done.stderr


def test_setup_names_a_setuptools_that_is_too_old(tmp_path: Path) -> None:
    """What a fresh venv has: its own words for it are "2 matches found", and a schema."""
    (tmp_path / "setuptools/command").mkdir(parents=True)
    old = "__version__ = '65.5.0'\nExtension = object\ndef setup(**_): print('built')\n"
    (tmp_path / "setuptools/__init__.py").write_text(old)
    (tmp_path / "setuptools/command/__init__.py").touch()
    (tmp_path / "setuptools/command/build_ext.py").write_text("build_ext = object\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "built" not in done.stdout
    assert done.stderr.startswith("setuptools 65.5.0 is here, 77 or newer is needed"), done.stderr
