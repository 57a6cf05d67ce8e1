"""What verbs write: files that are there whole or not at all, in folders that may be written to. And what they are
given: files that only stand in for the one that was meant (structured.py reads the others)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crab_jax.bounds import PATH
from crab_jax.errors import FULL, InputError


def write_whole(path: str | Path, content: str | bytes, lasting: bool = True) -> None:
    """Write a file (text as UTF-8) so that it is there completely or not at all, also after a power cut unless
    `lasting` is False (for many files that can be made again, since waiting for the disk takes milliseconds). Its
    folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        partial.replace(path)
        if lasting:
            sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # a write has none
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: str | Path) -> None:
    """Have the disk keep which files a folder holds, where its file system can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when all is written: whoever is killed leaves the old or the
    new. What the new one lacks of the old is carried over, locks among it.

    One rename exchanges the two where the file system can do so; elsewhere the names are free for an instant. In a
    folder that has nothing beside it (a mounted disk) each name is taken on its own, a manifest before what it vouches
    for.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    alone = os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)
    new = folder / ".new" if alone else folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of one that was killed
    new.mkdir()
    try:
        yield new
        sync_folder(new)
        if alone:
            for path in sorted(new.iterdir(), key=lambda path: path.name != "manifest.json"):
                shutil.rmtree(folder / path.name) if (folder / path.name).is_dir() else None
                path.replace(folder / path.name)
            return
        _exchange(new, folder)
        sync_folder(folder.parent)
        for path in list(new.iterdir()):  # the old one now
            if not (folder / path.name).exists():
                path.rename(folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Give two folders of one file system each other's names."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None, use_errno=True)
        if library.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
            return
    aside = other.with_name(f".{other.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def json_object(line: bytes | str) -> dict[str, Any] | None:
    """The JSON object in one line, None where it holds something else."""
    try:
        value = json.loads(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def end_of_lines(data: bytes) -> int:
    """Where the last line of JSONL ends that is an object: what follows was left by a program that was killed, or by a
    disk that lost its power (half a line, zeros, anything)."""
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if json_object(data[start:end]) is not None:
            return end
        end = start
    return 0


def cut_tail(path: str | Path) -> None:
    """Make a JSONL file end with a whole line, so that more can be appended; what is cut off is said."""
    path = Path(path)
    if not path.is_file():
        return
    data = path.read_bytes()
    end = end_of_lines(data)
    if data[end:].strip():
        print(f"warning: {path}: the last {len(data) - end:,} bytes are no whole line; they are cut off",
              file=sys.stderr, flush=True)
    if end < len(data):
        os.truncate(path, end)
    if end and data[end - 1:end] != b"\n":
        with open(path, "ab") as file:
            file.write(b"\n")


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


_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
HEAD = 1024  # bytes from the beginning of a file that tell what stands in its place
_STAND_INS = (  # (how the file begins, what it is, what to do)
    (rb"version https://git-lfs\.github\.com/spec/v1\r?\n", "a Git LFS pointer", "run: git lfs pull"),
    (rb"(\.\./)*(\.git/|/)annex/objects/", "a git-annex pointer", "run: git annex get"),
    (rb"(\xef\xbb\xbf)?\s*(<head|<script|(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype )?html)", "a web page",
     "download the file itself (raw or resolve, not blob); a browser shows what the page says"))


def stand_in(start: bytes) -> tuple[str, str] | None:
    """(problem, fix) of a file that begins so (HEAD bytes) and was not fetched: what git checks out in its place, or
    the page that a browser was shown; None for any other."""
    return next(((f"is {what}, not the file itself", fix) for pattern, what, fix in _STAND_INS
                 if re.match(pattern, start, re.IGNORECASE | re.DOTALL)), None)


def refuse_stand_in(path: str | Path, field: str = "") -> None:
    """Raise InputError for a file that was not fetched, see `stand_in`; also for a pipe or a device, which have no end.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(str(path), field, "is a pipe or a device", "give a file")
    try:
        with open(path, "rb") as file:
            found = stand_in(file.read(HEAD))
    except OSError:
        return  # whoever reads it says what is wrong
    if found:
        raise InputError(str(path), field, *found)
