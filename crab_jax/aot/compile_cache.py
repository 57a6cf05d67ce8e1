"""The persistent compilation cache: programs are compiled once per machine, not once per process."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax._src import lru_cache  # no public API replaces the writer of entries

from crab_jax.io.files import write_whole


def enable() -> None:
    """Keep compiled programs under ~/.cache/crab_jax (XDG_CACHE_HOME moves ~/.cache).

    JAX_COMPILATION_CACHE_DIR names another folder. If the folder cannot be written, print a note and keep nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "crab_jax" / "xla"
        try:
            if not folder.is_absolute():  # without a home folder
                raise OSError
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError
        except OSError:
            _not_kept(str(folder), "")
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    lru_cache.LRUCache.put = _put  # type: ignore[method-assign,assignment]  # JAX has no setting for it


@functools.lru_cache(maxsize=64)
def _not_kept(folder: str, why: str) -> None:
    reason = f" ({why})" if why else ""
    print(
        f"{folder} cannot be written{reason}: compiled programs are not kept; JAX_COMPILATION_CACHE_DIR names another "
        "folder",
        file=sys.stderr,
        flush=True,
    )


def _put(cache: Any, key: str, value: bytes, original: Any = lru_cache.LRUCache.put) -> None:
    """Add a cache entry atomically.

    JAX itself leaves a partial entry on a full disk or when killed, and then compiles that program in every process.
    JAX asks to add an existing entry only when it could not read it, so the entry is replaced.
    """
    if cache.eviction_enabled or "://" in str(cache.path):
        original(cache, key, value)
        return
    try:
        write_whole(str(cache.path / f"{key}-cache"), value, lasting=False)
    except OSError as error:
        _not_kept(str(cache.path), error.strerror or "")
