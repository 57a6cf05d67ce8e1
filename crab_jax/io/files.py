"""What verbs write: files that are there whole or not at all, in folders that may be written to. And what they are
given: files that only stand in for the one that was meant (structured.py reads the others)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crab_jax.io.bounds import PATH
from crab_jax.io.errors import FULL, InputError


def write_whole(path: str | Path, content: str | bytes, lasting: bool = True) -> None:
    """Write a file (text as UTF-8) so that it is there completely or not at all, also after a power cut unless
    `lasting` is False (for many files that can be made again, since waiting for the disk takes milliseconds). Its
    folder is made."""
    with _partial(Path(path), lasting) as partial, open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path for what other code writes, beside `path`, whose place it takes when all is written; see `write_whole`.
    For large files: what processes that were killed long ago had left of the same one is removed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*{_PARTIAL}{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LONG_AGO:
                left.unlink()
    with _partial(path, lasting=True) as partial:
        yield partial


@contextlib.contextmanager
def _partial(path: Path, lasting: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write one file. The suffix stays, for libraries that go by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}{_PARTIAL}{path.suffix}")
    try:
        yield partial
        if lasting:
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        partial.replace(path)
        if lasting:
            sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and str(partial) in (str(error.filename or partial), str(error.filename2)):
            error.filename, error.filename2 = str(path), None  # a write has none
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def append_line(path: str | Path, value: Any) -> None:
    """Append a value as one line of JSON, whole or not at all: what a full disk took of it is cut off again. Several
    processes may append to one file."""
    data = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        append(descriptor, data, str(path))
    finally:
        os.close(descriptor)


def append(descriptor: int, data: bytes, name: str) -> None:
    """Append bytes to the open file `name`, all of them or none."""
    try:
        if (taken := os.write(descriptor, data)) == len(data):
            return
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - taken)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        error.filename = name
        raise


def need_room(folder: str | Path, size: int, what: str, flag: str = "--out") -> None:
    """Raise InputError where a disk has less room than `size` bytes, before hours are spent. Quotas tell nobody; what
    they stop is told when it is written."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return  # whoever writes there says why
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < size:  # some network disks have no number of blocks
        raise InputError(
            str(folder),
            flag,
            f"its disk has {_bytes(free)} free, {what} takes at least {_bytes(size)}",
            "make room, or give another folder",
        )


def _bytes(size: float) -> str:
    return next(
        f"{size / unit:.1f} {name}"
        for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if size >= unit or unit == 1
    )


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
    except OSError as error:
        if error.filename:  # nobody knows the new folder
            error.filename = str(error.filename).replace(str(new), str(folder))
        raise
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
        print(
            f"warning: {path}: the last {len(data) - end:,} bytes are no whole line; they are cut off",
            file=sys.stderr,
            flush=True,
        )
    if end < len(data):
        os.truncate(path, end)
    if end and data[end - 1 : end] != b"\n":
        with open(path, "ab") as file:
            file.write(b"\n")


def out_folder(path: str | Path, flag: str = "--out") -> Path:
    """The folder of --out, made. Raises InputError where that cannot be done, or nothing can be written into it."""
    if problem := PATH.problem(str(path)):
        raise InputError(str(path), flag, problem, "give a folder")
    if os.path.realpath(path) == "/":
        raise InputError(str(path), flag, "is a folder of the system", "give a folder of your own")
    return _writable(Path(path), flag)


def out_file(path: str | Path, flag: str = "--out") -> Path:
    """The file of an option, whose folder is made. Raises InputError where it cannot be written."""
    file = Path(path)
    if file.is_dir():
        raise InputError(str(file), flag, "is a folder", "give a file")
    _writable(file.parent, flag)
    if file.exists() and not file.is_file():
        raise InputError(str(file), flag, "is a pipe or a device", "give a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(str(file), flag, "cannot be written (Permission denied)", "give a file you may write to")
    return file


def _writable(out: Path, flag: str) -> Path:
    """A folder, made; nothing is left of what is written into it to see whether that can be done."""
    real, probe = f"{os.path.realpath(out)}/", out / f".probe{os.getpid()}"
    if real.startswith(_SYSTEM) and not real.startswith("/dev/shm/"):
        raise InputError(str(out), flag, "is a folder of the system", "give a folder of your own")
    try:
        if out.is_symlink() and not out.exists():
            raise InputError(str(out), flag, f"is a link to {os.readlink(out)}, which is not there", "make that folder")
        if out.exists() and not out.is_dir():
            raise InputError(str(out), flag, "is no folder", "give a folder")
        out.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))  # a full disk takes an empty file
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        fix = "make room, or give another folder" if error.errno in FULL else "give a folder you may write to"
        raise InputError(str(out), flag, f"cannot be written ({error.strerror})", fix) from error
    return out


_PARTIAL, _LONG_AGO = ".partial", 3600.0  # in the name of a file while it is written; seconds
_SYSTEM = ("/proc/", "/sys/", "/dev/")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
HEAD = 1024  # bytes from the beginning of a file that tell what stands in its place
_STAND_INS = (  # (how the file begins, what it is, what to do)
    (rb"version https://git-lfs\.github\.com/spec/v1\r?\n", "a Git LFS pointer", "run: git lfs pull"),
    (rb"(\.\./)*(\.git/|/)annex/objects/", "a git-annex pointer", "run: git annex get"),
    (
        rb"(\xef\xbb\xbf)?\s*(<head|<script|(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype )?html)",
        "a web page",
        "download the file itself (raw or resolve, not blob); a browser shows what the page says",
    ),
)


def stand_in(start: bytes) -> tuple[str, str] | None:
    """(problem, fix) of a file that begins so (HEAD bytes) and was not fetched: what git checks out in its place, or
    the page that a browser was shown; None for any other."""
    return next(
        (
            (f"is {what}, not the file itself", fix)
            for pattern, what, fix in _STAND_INS
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL)
        ),
        None,
    )


def refuse_stand_in(path: str | Path, field: str = "") -> None:
    """Raise InputError for a file that was not fetched, see `stand_in`, and for a pipe or device, which has no end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(str(path), field, "is a pipe or a device", "give a file")
    try:
        with open(path, "rb") as file:
            found = stand_in(file.read(HEAD))
    except OSError:
        return  # whoever reads it says what is wrong
    if found:
        raise InputError(str(path), field, *found)
