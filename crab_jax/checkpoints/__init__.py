"""Parameters on disk: the checkpoints of a run, packed models and imported ones."""

from __future__ import annotations

import importlib
from typing import Any

# What `crab_jax.checkpoints` had while it was one module -> the module that has it.
_FORMER = {
    **dict.fromkeys("StoredParams identity load_params stored_params".split(), "stored"),
    **dict.fromkeys("IMPORTED MANIFEST PACKED load_tree note_model save_packed save_tree".split(), "models"),
    **dict.fromkeys("RunCheckpoints".split(), "run_steps"),
    **dict.fromkeys("check_match describe_mismatch leaf_digests tree_hash".split(), "digests"),
    **dict.fromkeys("Streamed save_streamed".split(), "orbax"),
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module 'crab_jax.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(f"crab_jax.checkpoints.{_FORMER[name]}"), name)
