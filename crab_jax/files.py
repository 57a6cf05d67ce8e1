"""What verbs write: files that are there whole or not at all, in folders that may be written to. And what they are
given: files that only stand in for the one that was meant (structured.py reads the others)."""

from __future__ import annotations

import os
from pathlib import Path

from crab_jax.bounds import PATH
from crab_jax.errors import FULL, InputError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it is there completely or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a write has none
        partial.unlink(missing_ok=True)
        raise


def out_folder(path: str | Path, flag: str = "--out") -> Path:
    """The folder of --out, made. Raises InputError where that cannot be done, or nothing can be written into it."""
    if problem := PATH.problem(str(path)):
        raise InputError(str(path), flag, problem, "give a folder")
    out = Path(path)
    probe = out / f".probe{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))  # a full disk takes an empty file
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        fix = "make room, or give another folder" if error.errno in FULL else "give a folder you may write to"
        raise InputError(str(out), flag, f"cannot be written ({error.strerror})", fix) from error
    return out


def out_file(path: str | Path, flag: str = "--out") -> Path:
    """The file of an option, whose folder is made. Raises InputError where it cannot be written."""
    file = Path(path)
    out_folder(file.parent, flag)
    if file.is_dir():
        raise InputError(str(file), flag, "is a folder", "give a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(str(file), flag, "cannot be written (Permission denied)", "give a file you may write to")
    return file


_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def git_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is what git checks out in place of a large file until `git lfs pull` fetches it."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False  # whoever reads the file says why


def refuse_stand_in(path: str | Path, field: str = "") -> None:
    """Raise InputError for a file that was not fetched: a Git LFS pointer, or the page that a browser was shown."""
    try:
        with open(path, "rb") as file:
            start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return  # whoever reads it says what is wrong
    if git_lfs_pointer(path):
        raise InputError(str(path), field, "is a Git LFS pointer, not the file itself", "run: git lfs pull")
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(str(path), field, "is a web page, not the file itself",
                         "download the file that the page links to (raw or resolve, not blob)")
