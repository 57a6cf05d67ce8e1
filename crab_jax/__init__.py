"""Crab, a unified audio-visual language model, in JAX: see `crab_jax.api` for the library.

import crab_jax as cj

crab = cj.load("warm_start")
print(crab.answer(cj.ask("clip.mp4", task="ave")).text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from crab_jax import former_names

if TYPE_CHECKING:
    from crab_jax.api import Answer, Ask, Box, Crab, Trace, ask, load
    from crab_jax.io.errors import InputError
    from crab_jax.models.presets import crab_7b, tiny
    from crab_jax.tasks.task import Event, Task

former_names.install()

__version__ = "0.2.0"
__all__ = [
    "Answer",
    "Ask",
    "Box",
    "Crab",
    "Event",
    "InputError",
    "Task",
    "Trace",
    "__version__",
    "ask",
    "crab_7b",
    "load",
    "tiny",
]
# Imported when first asked for, so that `import crab_jax` costs nothing.
_HOMES = {
    **dict.fromkeys(("Answer", "Ask", "Box", "Crab", "Trace", "ask", "load"), "crab_jax.api"),
    **dict.fromkeys(("crab_7b", "tiny"), "crab_jax.models.presets"),
    "InputError": "crab_jax.io.errors",
    **dict.fromkeys(("Event", "Task"), "crab_jax.tasks.task"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crab_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
