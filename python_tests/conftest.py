"""Shared by all tests."""

from collections.abc import Iterator

import pytest
import torch
from sample_inputs import EMULATED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The CUDA operators have no float64: a test of it has nothing to say of them."""
    try:
        return (yield)
    except ValueError as error:
        if EMULATED and "hidden of float64 is not supported on this device" in str(error):
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
