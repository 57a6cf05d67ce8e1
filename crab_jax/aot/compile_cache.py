"""The persistent compilation cache: programs are compiled once per machine or bucket, not once per process."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import jax
from etils import epath
from jax._src import lru_cache  # no public API replaces the writer of entries

from crab_jax.io.errors import InputError
from crab_jax.io.files import write_whole

EXTRAS = {"gs": ("gcsfs", "-e '.[gcs]'"), "s3": ("s3fs", "-e '.[s3]'")}  # scheme of a bucket: its package, our extra


def enable() -> None:
    """Keep compiled programs under ~/.cache/crab_jax (XDG_CACHE_HOME moves ~/.cache).

    JAX_COMPILATION_CACHE_DIR names another folder, also gs://bucket/folder or s3://bucket/folder, which all hosts of a
    run and its restarts share; process 0 alone writes there. If the folder cannot be written, print a note and keep
    nothing. Raises InputError if the package for the bucket is not installed.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in chosen:
        if not _bucket_answers(chosen):
            jax.config.update("jax_enable_compilation_cache", False)
            return
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # which XLA writes to local folders only
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
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


def _bucket_answers(place: str) -> bool:
    """Return whether a bucket answers; if not, print why. Raises InputError for a place that nothing here can open."""
    scheme = place.partition("://")[0]
    where = "environment", "JAX_COMPILATION_CACHE_DIR"
    if scheme not in EXTRAS:
        raise InputError(*where, f"is {place!r}", "give a folder, gs://bucket/folder or s3://bucket/folder")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package, extra = EXTRAS[scheme]
        raise InputError(*where, f"is {place!r}, and {package} is not installed", f"pip install {extra}") from error
    try:
        epath.Path(place).exists()
    except Exception as error:  # whatever the library of the bucket raises: no credentials, no bucket, no network
        _not_kept(place, " ".join(str(error).split())[:200] or type(error).__name__)
        return False
    return True


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
