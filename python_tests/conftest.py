"""Shared by all tests."""

import ctypes
import functools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from on_device import DEVICE, NOT_ON_CUDA
from sample_inputs import EMULATED
from torch._guards import active_fake_mode

# TRL, which some tests import, would otherwise set it to ERROR for all processes that tests start.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

NO_FLOAT64 = (
    "hidden of Double is not supported on this device",  # the operator
    "hidden on cuda must be float32, bfloat16 or float16, got torch.float64",  # the Python checks
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = NOT_ON_CUDA.get(item.name) or NOT_ON_CUDA.get(item.name.split("[")[0])
        if reason and DEVICE == "cuda":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The CUDA operators have no float64: a test of it has nothing to say of them."""
    try:
        return (yield)
    except (TypeError, ValueError) as error:
        cuda = EMULATED or DEVICE == "cuda"
        if cuda and any(text in str(error) for text in NO_FLOAT64):
            pytest.skip("float64")
        raise


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as most tests have, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def task_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Built-in tasks make their models in a folder of this test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def emulated() -> Path:
    """The CUDA operators, compiled for the host."""
    emulation.build("bupo_emulated")
    return emulation.BUILD / "libbupo_emulated.so"


@pytest.fixture(scope="session")
def plan_library() -> ctypes.CDLL:
    """How the CUDA operators cut a call. Not `emulated`: loaded into this process it would take
    over the operators of all tests."""
    emulation.build("bupo_plan")
    return ctypes.CDLL(str(emulation.BUILD / "libbupo_plan.so"))


@pytest.fixture(scope="session")
def plan(plan_library: ctypes.CDLL) -> Callable[..., dict[str, int]]:
    """emulation.cuda_plan"""
    return functools.partial(emulation.cuda_plan, plan_library)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading or making weights fails the test; a model of tensors without data has none."""
    import transformers

    original = transformers.AutoModelForCausalLM.from_config

    def refuse(*arguments: Any, **options: Any) -> Any:
        if active_fake_mode() is not None:
            return original(*arguments, **options)
        pytest.fail("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a reward function, module:function, of a body and what else its module has."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(body: str, more: str = "") -> str:
        name = f"custom_reward_{len(list(tmp_path.iterdir()))}"
        text = "def score(responses, answers):\n" + textwrap.indent(body, "    ") + f"\n{more}\n"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"{name}:score"

    return make
