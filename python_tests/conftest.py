"""Shared by all tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def task_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Built-in tasks make their models in a folder of this test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
