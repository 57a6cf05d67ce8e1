"""The persistent compilation cache: a program is compiled once per machine, not once per process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax


def enable() -> None:
    """Keep compiled programs under ~/.cache/crab_jax (XDG_CACHE_HOME moves ~/.cache), unless JAX_COMPILATION_CACHE_DIR
    already says where; nowhere, and that is said, where the folder cannot be written."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "crab_jax" / "xla"
        try:
            if not folder.is_absolute():  # no home
                raise OSError
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError
        except OSError:
            print(f"{folder} cannot be written: what is compiled is not kept; JAX_COMPILATION_CACHE_DIR names another "
                  "folder", file=sys.stderr, flush=True)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
