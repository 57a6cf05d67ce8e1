"""Modules under the names that they had before the library was divided into packages: imports of them go on working."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "crab_jax.io": "bounds errors files locks packaged progress structured",
    "crab_jax.parallel": "chips distributed peers preemption sharding watchdog",
    "crab_jax.aot": "compile_cache flops hlo",
    "crab_jax.evaluation": "predictions scoring",
    "crab_jax.visualize": "charts overlay page",
    "crab_jax.reports": "clip_page",
    "crab_jax.models": "quantize",
    "crab_jax.checkpoints": "finite",
}
# Former dotted name -> the present one.
FORMER = {f"crab_jax.{name}": f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()} | {
    "crab_jax.compat": "crab_jax.models.quirks",
    "crab_jax.layout": "crab_jax.runs.run_mesh",
    "crab_jax.models.fused": "crab_jax.models.generating",
    "crab_jax.request": "crab_jax.questions",
    "crab_jax.results_page": "crab_jax.reports.evaluation_page",
    "data_pipelines.memory": "data_pipelines.allocator",
    "data_pipelines.padding": "data_pipelines.bucket_fill",
    "data_pipelines.sample": "crab_jax.reports.record_page",
    "data_pipelines.workers": "data_pipelines.isolated",
}


class FormerNames(MetaPathFinder, Loader):
    """Import the module of today under its former name; both names are then one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a former name, None for every other."""
        return ModuleSpec(fullname, self) if fullname in FORMER else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today where the import system looks for the one under its former name."""
        sys.modules[module.__name__] = importlib.import_module(FORMER[module.__name__])


def install() -> None:
    """Let former names be imported, after all present ones have been looked for."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())


def members(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that was one module: `homes` gives the module in it that now has each name.

    A name is imported when it is first asked for. Raises AttributeError for every other name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get
