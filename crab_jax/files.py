"""What verbs write: files that are there whole or not at all, in folders that may be written to. And what they are
given: text, and files that only stand in for the one that was meant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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


def refuse_utf16(data: bytes, where: str) -> None:
    """Raise InputError for text of two bytes a character, as some editors and shells write it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        raise InputError(where, "", "is UTF-16 text", "save it as UTF-8")


def text_of_bytes(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark. Raises InputError that names the line, or UTF-16."""
    refuse_utf16(data, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}:{number}", "", "is not UTF-8 text", "save it as UTF-8") from None


def read_text(path: str | Path, field: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises InputError, also for what only stands in for it."""
    refuse_stand_in(path, field)
    try:
        return text_of_bytes(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise InputError(str(path), field, f"cannot be read ({error.strerror})", "check the path") from None


def read_json(path: str | Path, field: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError."""
    try:
        value = json.loads(read_text(path, field))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(str(path), field, f"not valid JSON ({error})", "fetch or copy the file again") from None
    if not isinstance(value, dict):
        raise InputError(str(path), field, "is no JSON object", "fetch or copy the file again")
    return value
