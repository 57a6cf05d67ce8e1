"""What verbs write: files that are there whole or not at all, in folders that may be written to."""

from __future__ import annotations

import os
from pathlib import Path

from crab_jax.errors import InputError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it is there completely or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def out_folder(path: str | Path) -> Path:
    """The folder of --out, made. Raises InputError where that cannot be done."""
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(out), "--out", f"cannot be written ({error.strerror})", "give another folder") from error
    return out


_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def git_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is what git checks out in place of a large file until `git lfs pull` fetches it."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False  # whoever reads the file says why
