"""A run on disk: its folder, its data, its parameters and its mesh."""

from __future__ import annotations

from crab_jax.former_names import members

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

__getattr__ = members("crab_jax.runs", _FORMER)
