"""Parameters on disk: the checkpoints of a run, packed models and imported ones."""

from __future__ import annotations

from crab_jax.former_names import members

# What `crab_jax.checkpoints` had while it was one module -> the module that has it.
_FORMER = {
    **dict.fromkeys("StoredParams identity load_params stored_params".split(), "stored"),
    **dict.fromkeys("IMPORTED MANIFEST PACKED load_tree note_model save_packed save_tree".split(), "models"),
    **dict.fromkeys("RunCheckpoints".split(), "run_steps"),
    **dict.fromkeys("check_match describe_mismatch leaf_digests tree_hash".split(), "digests"),
    **dict.fromkeys("Streamed save_streamed".split(), "orbax"),
}

__getattr__ = members("crab_jax.checkpoints", _FORMER)
