"""A run on disk: its folder, its data, its parameters and its mesh."""

from __future__ import annotations

import importlib
from typing import Any

# What `crab_jax.runs` had while it was one module -> the module that has it.
_FORMER = {
    **dict.fromkeys("claim_workdir load_config save_description tokenizer_of".split(), "run_folder"),
    **dict.fromkeys(
        "data_root eval_batches read_examples train_dataset train_examples train_order".split(), "run_data"
    ),
    **dict.fromkeys(
        "abstract_params count init_batch initial_params load_model parameter_table wanted_params".split(), "run_params"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module 'crab_jax.runs' has no attribute {name!r}")
    return getattr(importlib.import_module(f"crab_jax.runs.{_FORMER[name]}"), name)
