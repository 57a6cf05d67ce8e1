"""Writing of output files and folders, which appear complete or not at all, and checks of output paths.

Also refuses input files that are placeholders for the real one, such as Git LFS pointers. Structured input files are
read by structured.py.
"""

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
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE
from crab_jax.io.errors import FULL, InputError


def write_whole(path: str | Path, content: str | bytes, lasting: bool = True) -> None:
    """Write a file (text as UTF-8) atomically; its folder is created.

    lasting: flush it to disk, so that it survives a power cut. False for many files that can be created again, because
    waiting for the disk takes milliseconds each.
    """
    data = content.encode() if isinstance(content, str) else content
    if paths.is_remote(path):
        paths.in_bucket(path).overwrite(data)
        return
    with _partial(Path(path), lasting) as partial, open(partial, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end of the context; see `write_whole`.

    For large files written by other code. Temporary files that killed processes left there over an hour ago are
    removed. For a path in a bucket the temporary file is on this machine's disk (TMPDIR).
    """
    path = paths.at(path)
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (copy := Path(folder) / path.name)
            paths.in_bucket(path).put(copy)
        return
    for stale in path.parent.glob(f".{glob.escape(path.stem)}.*{_PARTIAL}{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _LONG_AGO:
                stale.unlink()
    with _partial(path, lasting=True) as partial:
        yield partial


@contextlib.contextmanager
def _partial(path: Path, lasting: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write one file. The suffix is kept for libraries that choose a format by it.
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
            error.filename, error.filename2 = str(path), None  # errors of a write have no file name
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def append_line(path: str | Path, value: Any, now: bool = False) -> None:
    """Append a value as one line of JSON, completely or not at all.

    When a full disk takes only part of the line, that part is cut off again. Several processes may append to one file
    on a disk, one to an object in a bucket, which has the line after some seconds, or with `now` at once.
    """
    data = (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    if paths.is_remote(path):
        paths.in_bucket(path).append(data, now)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        append(descriptor, data, str(path))
    finally:
        os.close(descriptor)


def append(descriptor: int, data: bytes, name: str) -> None:
    """Append bytes to the open file called `name`, all of them or none. Raises OSError."""
    try:
        if (written := os.write(descriptor, data)) == len(data):
            return
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        error.filename = name
        raise


def work_folder(path: str | Path) -> Path:
    """Return where what will be `path` is written first: there, or for a bucket on this machine's disk (TMPDIR)."""
    return Path(tempfile.gettempdir() if paths.is_remote(path) else path)


def need_room(folder: str | Path, size: int, what: str, flag: str = "--out") -> None:
    """Raise InputError if a disk has less than `size` bytes free, before hours are spent.

    Quotas cannot be queried; exceeding one is reported when the file is written.
    """
    if paths.is_remote(folder):
        return
    try:
        disk = os.statvfs(folder)
    except OSError:
        return  # the later write reports the reason
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < size:  # some network disks do not report their number of blocks
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
    """Flush a folder's list of files to disk, where the file system supports it."""
    if paths.is_remote(folder):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder that replaces `folder` at the end of the context.

    A killed process leaves either the old folder or the new one. Files of the old folder that the new one lacks,
    including locks, are moved to it. One rename exchanges the two where the file system supports it; elsewhere the name
    is missing for an instant. In a mount point, or where the parent folder cannot be written, each file is replaced on
    its own, `manifest.json` first, and so it is in a bucket: what holds files of both is refused as damaged.
    """
    if paths.is_remote(folder):
        with tempfile.TemporaryDirectory() as temporary:
            yield (new := Path(temporary))
            names = _files_in(new)
            first = [_FIRST] if _FIRST in names else []
            _put(new, paths.at(folder), first)
            _put(new, paths.at(folder), [name for name in names if name not in first])
            for inner in (path for path in new.iterdir() if path.is_dir()):  # the old folder of this name is gone
                for old in paths.at(f"{folder}/{inner.name}").rglob("*"):
                    if old.relative_to(paths.at(folder)).as_posix() not in names:
                        old.unlink()
        return
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    alone = os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)
    new = folder / ".new" if alone else folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed process
    new.mkdir()
    try:
        yield new
        sync_folder(new)
        if alone:
            for path in sorted(new.iterdir(), key=lambda path: path.name != _FIRST):
                shutil.rmtree(folder / path.name) if (folder / path.name).is_dir() else None
                path.replace(folder / path.name)
            return
        _exchange(new, folder)
        sync_folder(folder.parent)
        for path in list(new.iterdir()):  # after the exchange `new` is the old folder
            if not (folder / path.name).exists():
                path.rename(folder / path.name)
    except OSError as error:
        if error.filename:  # the user does not know the temporary folder
            error.filename = str(error.filename).replace(str(new), str(folder))
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove_folder(folder: str | Path) -> None:
    """Delete a folder on a disk, or all objects below a name in a bucket, if there are any."""
    if paths.is_remote(folder):
        paths.in_bucket(folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def folder_on_disk(folder: str | Path, last: str) -> Iterator[Path]:
    """Yield a folder to write files into by their names: itself, or for a bucket one on this machine's disk.

    That one is uploaded at the end of the context, its file `last` after all others.
    """
    if not paths.is_remote(folder):
        yield paths.at(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield (new := Path(temporary))
        _put(new, paths.at(folder), [name for name in _files_in(new) if name != last])
        _put(new, paths.at(folder), [last])


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _put(source: Path, target: Path, names: Sequence[str]) -> None:
    """Upload files of a folder to a bucket, several at once."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(lambda name: paths.in_bucket(f"{target}/{name}").put(source / name), names):
            pass


def set_aside(old: Sequence[Path], moving: Path, moved: Path) -> None:
    """Move files and folders into the folder `moved`, which then holds nothing else.

    It is called `moving` until all are there: what a killed process has left there is taken along by the next.
    """
    moving.mkdir(exist_ok=True)
    if paths.is_remote(moved):
        for path in old:
            paths.in_bucket(path).move(paths.in_bucket(moving) / path.name)
        remove_folder(moved)
        paths.in_bucket(moving).move(paths.in_bucket(moved))
        return
    for path in old:
        path.rename(moving / path.name)
    remove_folder(moved)
    moving.rename(moved)


def _exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders of one file system."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None, use_errno=True)
        if library.renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
            return
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def json_object(line: bytes | str) -> dict[str, Any] | None:
    """Return the JSON object in one line, or None if the line is anything else."""
    try:
        value = json.loads(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def end_of_lines(data: bytes) -> int:
    """Return the byte position after the last JSONL line that holds an object.

    Anything after it was left by a killed program or a power cut: half a line, zeros or other bytes.
    """
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if json_object(data[start:end]) is not None:
            return end
        end = start
    return 0


def cut_tail(path: str | Path) -> None:
    """Cut a JSONL file after its last complete line, so that more lines can be appended; warn about what is cut off."""
    path = paths.at(path)
    if not path.is_file():
        return
    data = path.read_bytes()
    end = end_of_lines(data)
    if data[end:].strip():
        print(
            f"warning: {path}: the last {len(data) - end:,} bytes are not a complete line; they are cut off",
            file=sys.stderr,
            flush=True,
        )
    if paths.is_remote(path):
        if data != (kept := data[:end] + (b"\n" if end and data[end - 1 : end] != b"\n" else b"")):
            write_whole(path, kept)
        return
    if end < len(data):
        os.truncate(path, end)
    if end and data[end - 1 : end] != b"\n":
        with open(path, "ab") as file:
            file.write(b"\n")


def out_folder(path: str | Path, flag: str = "--out") -> Path:
    """Create and return the folder of an output option. Raises InputError if it cannot be created or written to."""
    if problem := ANYWHERE.problem(str(path)):
        raise InputError(str(path), flag, problem, "give a folder")
    if paths.is_remote(path):
        return _writable_bucket(paths.at(path), flag)
    if os.path.realpath(path) == "/":
        raise InputError(str(path), flag, "is a folder of the system", "give a folder of your own")
    return _writable(Path(path), flag)


def out_file(path: str | Path, flag: str = "--out") -> Path:
    """Return the file of an output option and create its folder. Raises InputError if the file cannot be written."""
    file = paths.at(path)
    if file.is_dir():
        raise InputError(str(file), flag, "is a folder", "give a file")
    if paths.is_remote(file):
        _writable_bucket(file.parent, flag)
        return file
    _writable(file.parent, flag)
    if file.exists() and not file.is_file():
        raise InputError(str(file), flag, "is a pipe or a device", "give a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(str(file), flag, "cannot be written (Permission denied)", "give a file you may write to")
    return file


def _writable_bucket(out: Path, flag: str) -> Path:
    """Check by a temporary object that a bucket can be written to."""
    probe = out / f".probe-{uuid.uuid4().hex}"
    try:
        if out.is_file():
            raise InputError(str(out), flag, "is an object, no folder", "give another name")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        fix = "check bucket, credentials and endpoint, see docs/training.md"
        raise InputError(str(out), flag, f"cannot be written ({error.strerror})", fix) from error
    return out


def _writable(out: Path, flag: str) -> Path:
    """Create a folder and check by a temporary file that it can be written to."""
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
            probe.write_bytes(bytes(4096))  # a full disk accepts an empty file
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        fix = "make room, or give another folder" if error.errno in FULL else "give a folder you may write to"
        raise InputError(str(out), flag, f"cannot be written ({error.strerror})", fix) from error
    return out


_FIRST = "manifest.json"  # of a model: what was not written with it is refused as damaged
_PARTIAL, _LONG_AGO = ".partial", 3600.0  # part of the name of a file while it is written; seconds
_SYSTEM = ("/proc/", "/sys/", "/dev/")
_AT_ONCE = 8  # uploads
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
HEAD = 1024  # bytes at the beginning of a file that reveal a placeholder
_STAND_INS = (  # (pattern of the beginning, description, fix)
    (rb"version https://git-lfs\.github\.com/spec/v1\r?\n", "a Git LFS pointer", "run: git lfs pull"),
    (rb"(\.\./)*(\.git/|/)annex/objects/", "a git-annex pointer", "run: git annex get"),
    (
        rb"(\xef\xbb\xbf)?\s*(<head|<script|(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype )?html)",
        "a web page",
        "download the file itself (raw or resolve, not blob); a browser shows what the page says",
    ),
)


def stand_in(start: bytes) -> tuple[str, str] | None:
    """Return (problem, fix) if a file beginning with `start` (HEAD bytes) is a placeholder for the real one, else None.

    Placeholders are Git LFS and git-annex pointers and the web pages that download links may return.
    """
    return next(
        (
            (f"is {what}, not the file itself", fix)
            for pattern, what, fix in _STAND_INS
            if re.match(pattern, start, re.IGNORECASE | re.DOTALL)
        ),
        None,
    )


def refuse_stand_in(path: str | Path, field: str = "") -> None:
    """Raise InputError for a placeholder (see `stand_in`) and for a pipe or device, which has no end."""
    if not paths.is_remote(path) and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise InputError(str(path), field, "is a pipe or a device", "give a file")
    try:
        with paths.at(path).open("rb") as file:
            placeholder = stand_in(file.read(HEAD))
    except OSError:
        return  # the code that reads the file reports the error
    if placeholder:
        raise InputError(str(path), field, *placeholder)
