"""The persistent compilation cache: a program is compiled once per machine, not once per process."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable() -> None:
    """Keep compiled programs under ~/.cache/crab_jax, unless JAX_COMPILATION_CACHE_DIR already says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "crab_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
