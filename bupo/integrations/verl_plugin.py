"""What verl loads at its start (entry point verl.plugins): bupo's engine takes the place of verl's
once verl has defined it. Nothing heavier is imported before."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENGINES = "verl.workers.engine.fsdp.transformer_impl"
"""The module of verl that registers its FSDP engines"""


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ENGINES as usual, then registers bupo's engine."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != ENGINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self._verls, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._verls.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._verls.exec_module(module)
        sys.modules[ENGINES] = module
        from bupo.integrations.verl import register

        register()


if ENGINES in sys.modules:
    from bupo.integrations.verl import register

    register()
else:
    sys.meta_path.insert(0, _AfterImport())
