"""Objects in buckets (gs://, s3://), with the methods of `pathlib.Path`, over etils.epath and fsspec.

An object appears whole or not at all, and listings are never taken from a cache. gcsfs and s3fs repeat requests that
fail for a passing reason (a 503, a broken connection, a truncated answer) a bounded number of times; what still fails
is an OSError that names the object and the reason, which verbs report in one line.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import importlib
import io
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

# gcsfs otherwise asks by gRPC what kind of bucket it is, which an endpoint of the user's own does not answer.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
os.environ.setdefault("EPATH_USE_TF", "false")

import fsspec
import fsspec.config
from etils.epath.gpath import PosixGPath

from crab_jax.io.errors import AT_END, FULL, InputError

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 10, 60, 5  # of one request
NO_OBJECT = "No such object"
SETTLE_SECONDS = 10.0  # after which an appended line is in the bucket
CACHE, CACHE_GB = "CRAB_JAX_OBJECT_CACHE", "CRAB_JAX_OBJECT_CACHE_GB"  # environment variables: its folder and size
DEFAULT_GB = 20.0
_AT_ONCE = 8  # deletions

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, with a traceback, is raised too
# They also hold for the paths that Orbax makes of its own. Settings of the user's (fsspec's conf files) come first.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gcs": {"use_listings_cache": False},
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": READ_SECONDS,
            "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
        },
    },
}
with contextlib.suppress(ImportError):  # gcsfs brings it
    import aiohttp

    _SETTINGS["gcs"]["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
for _kind, _values in _SETTINGS.items():
    for _name, _value in _values.items():
        fsspec.config.conf.setdefault(_kind, {}).setdefault(_name, _value)


def _files(path: str) -> Any:
    """Return the file system of a path. Raises InputError when its package is missing."""
    kind = path.partition(":")[0]
    try:
        importlib.import_module(PACKAGES[kind])
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # otherwise credentials are looked for in vain
            fsspec.config.conf["gcs"].setdefault("token", "anon")
        return fsspec.filesystem({"gs": "gcs"}.get(kind, kind))
    except ImportError as error:
        raise InputError(
            path, "", f"needs the package {PACKAGES[kind]} ({error})", f"pip install {PACKAGES[kind]}"
        ) from None
    except Exception as error:  # of many kinds: credentials are looked for here
        raise as_os_error(path, error) from error


def as_os_error(path: str, error: BaseException, written: bool = False) -> OSError:
    """Return an error of fsspec, gcsfs, s3fs or what they use as an OSError with a number, a reason and the path."""
    if isinstance(error, OSError) and error.errno in FULL:  # the disk on which a copy is made
        return error
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = status or getattr(error, "code", None) or getattr(error, "status", None)
    reason = " ".join((str(error) or type(error).__name__).split())[:200]
    if isinstance(error, FileNotFoundError):
        what = "No such bucket" if written or "specified bucket does not exist" in reason else NO_OBJECT
        return FileNotFoundError(errno.ENOENT, what, path)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "The object exists", path)
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return OSError(error.errno or errno.EISDIR, reason, path)
    refused = isinstance(error, PermissionError) or status in (401, 403, "401", "403") or "Forbidden" in reason
    if refused or any(word in type(error).__name__ for word in ("Credential", "Auth", "Refresh", "Token")):
        return PermissionError(errno.EACCES, f"The bucket refuses these credentials: {reason}", path)
    return OSError(errno.EIO, f"The bucket does not answer: {reason}", path)


class Status(NamedTuple):
    """What is known of an object: bytes, time of its writing, and a tag that changes with its content."""

    st_size: int
    st_mtime_ns: int
    st_mode: int
    tag: str

    @property
    def st_mtime(self) -> float:
        """Return the time of writing in seconds since the epoch."""
        return self.st_mtime_ns / 1e9


class BucketPath(PosixGPath):  # type: ignore[misc]  # etils has no types
    """An object in a bucket, or the folder that its slashes suggest. A folder exists while an object is below it."""

    # The constructor of PosixGPath takes a text such as gs://bucket/key.

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the file system on this path. Raises OSError."""
        text = str(self)
        try:
            return getattr(_files(text), method)(text, *args, **options)
        except InputError:
            raise
        except Exception as error:  # they have no common base class
            raise as_os_error(text, error, method in ("pipe_file", "put_file")) from error

    def _info(self) -> dict[str, Any]:
        settle(str(self))
        found: dict[str, Any] = self._ask("info")
        return found

    def _kind(self) -> str:
        try:
            return str(self._info()["type"])
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        """Return whether there is an object of this name, or one below it."""
        return bool(self._kind())

    def is_file(self) -> bool:
        """Return whether there is an object of this name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether there is an object below this name."""
        return self._kind() == "directory"

    def is_symlink(self) -> bool:
        """Return False: buckets have no links."""
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Status:
        """Return size, time and tag of an object, or of a folder (zeros). Raises OSError."""
        import stat

        info = self._info()
        if info["type"] == "directory":
            return Status(0, 0, stat.S_IFDIR, "")
        when = info.get("LastModified") or info.get("mtime") or info.get("updated") or 0
        seconds = when.timestamp() if hasattr(when, "timestamp") else float(when or 0)
        tag = str(info.get("generation") or info.get("ETag") or info.get("etag") or seconds)
        return Status(int(info["size"]), int(seconds * 1e9), stat.S_IFREG, tag)

    def resolve(self, strict: bool = False) -> BucketPath:
        """Return the path itself."""
        return self

    def absolute(self) -> BucketPath:
        """Return the path itself."""
        return self

    def iterdir(self) -> Iterator[BucketPath]:
        """Yield what is directly in a folder. Raises OSError."""
        for name, _ in self.entries():
            yield self / name

    def entries(self) -> list[tuple[str, str]]:
        """Return the (name, kind) of what is directly in a folder, which may be nothing; kind is "file" or "folder".

        Raises OSError.
        """
        settle(str(self))
        prefix, found = str(self).partition("://")[2].rstrip("/"), []
        try:
            listed = self._ask("ls", detail=True)
        except FileNotFoundError as error:
            if error.strerror != NO_OBJECT:
                raise
            return []
        for info in listed:
            name = info["name"].rstrip("/").removeprefix(prefix).strip("/")
            if name:  # some programs write an object for the folder itself
                found.append((name, "folder" if info["type"] == "directory" else "file"))
        return sorted(set(found))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the matching objects and folders directly in this folder, or any deeper ones for `**/`."""
        if "/" in pattern:
            for path in self._below():
                if PurePosixPath("/", path.relative_to(self).as_posix()).match(pattern.removeprefix("**/")):
                    yield path
            return
        yield from (self / name for name, _ in self.entries() if fnmatch.fnmatchcase(name, pattern))

    def rglob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the matching objects of this folder and those below it."""
        yield from (path for path in self._below() if fnmatch.fnmatchcase(path.name, pattern))

    def _below(self) -> list[BucketPath]:
        settle(str(self))
        scheme = str(self).partition("://")[0]
        return [BucketPath(f"{scheme}://{name}") for name in self._ask("find") if not name.endswith("/")]

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists when an object is in it."""

    def read_bytes(self) -> bytes:
        """Return the content of an object. Raises OSError."""
        settle(str(self))
        content: bytes = self._ask("cat_file")
        return content

    def read_range(self, start: int, length: int) -> bytes:
        """Return the bytes from `start` on, fewer at the end of the object. Raises OSError."""
        content: bytes = self._ask("cat_file", start=start, end=start + length)
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return the content of an object as text. Raises OSError."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Write an object, which then appears whole. Raises OSError."""
        self._ask("pipe_file", bytes(data))
        return len(data)

    def create(self, data: bytes) -> bool:
        """Write an object unless there is one; return whether this call wrote it, which one of several does.

        The server decides: If-None-Match of S3, generation 0 of Google Cloud Storage. Raises OSError.
        """
        try:
            self._ask("pipe_file", bytes(data), mode="create")
            return True
        except FileExistsError:
            return False

    def overwrite(self, data: bytes) -> None:
        """Write an object that this process may have appended to. Raises OSError."""
        with _forgotten(str(self)):
            self.write_bytes(data)

    def append(self, line: bytes, now: bool) -> None:
        """Append to an object that no other process writes.

        It is in the bucket when this function returns, or with now=False within SETTLE_SECONDS: the object is written
        as a whole each time. Raises OSError, also for a failed writing of earlier lines.
        """
        _append(self, line, now)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write an object of text. Raises OSError."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Write an empty object unless there is one. Raises FileExistsError when there is and may not be."""
        if not self.create(b"") and not exist_ok:
            raise FileExistsError(errno.EEXIST, "The object exists", str(self))

    def open(self, mode: str = "r", **options: Any) -> Any:
        """Open an object for reading, by ranges with read-ahead of some MB. Raises OSError."""
        if set(mode) - set("rbt"):
            raise ValueError("objects are written whole: use crab_jax.io.files")
        settle(str(self))
        file = io.BufferedReader(self._ask("open", "rb", cache_type="readahead"))  # fsspec's has no readline(limit)
        return file if "b" in mode else io.TextIOWrapper(file, options.get("encoding") or "utf-8")

    def put(self, source: Path) -> None:
        """Write an object from a local file; it appears whole. Raises OSError."""
        text = str(self)
        try:
            _files(text).put_file(str(source), text)
        except Exception as error:
            raise as_os_error(text, error, written=True) from error

    def get(self, target: Path) -> None:
        """Write the content of an object to a local file. Raises OSError."""
        settle(str(self))
        self._ask("get_file", str(target))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object. Raises OSError."""
        with _forgotten(str(self)):
            try:
                self._ask("rm_file")
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def _delete(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file")

    def rmtree(self, missing_ok: bool = False) -> None:
        """Delete all objects below this name. Raises OSError."""
        with _forgotten(str(self)):
            inside = self._below()  # fsspec's own `rm` takes *, ? and [] of a name as a pattern
            if not inside and not missing_ok:
                raise FileNotFoundError(errno.ENOENT, NO_OBJECT, str(self))
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for _ in pool.map(BucketPath._delete, inside):
                    pass

    def move(self, target: BucketPath) -> None:
        """Copy all objects below this name to another one, without fetching them, and delete them. Raises OSError."""
        inside = self._below()
        for path in inside:
            path._ask("cp_file", f"{target}/{path.relative_to(self).as_posix()}" if path != self else str(target))
        for path in inside:
            path.unlink()

    def rename(self, target: Any) -> Any:
        """Raise OSError: objects cannot be renamed."""
        raise OSError(errno.EPERM, "Objects of a bucket cannot be renamed", str(self))

    replace = rename


# Appending: the lines of this process are kept here, and the object is written again with all of them.


class _Appended:
    def __init__(self, path: BucketPath):
        try:
            self.data = bytearray(path.read_bytes())
        except FileNotFoundError:
            self.data = bytearray()
        self.written, self.since = len(self.data), 0.0


_appended: dict[str, _Appended] = {}
_lock = threading.RLock()
_clock: threading.Thread | None = None


def _append(path: BucketPath, line: bytes, now: bool) -> None:
    global _clock
    with _lock:
        known = _appended.get(str(path)) or _appended.setdefault(str(path), _Appended(path))
        known.data += line
        if now or time.monotonic() - known.since > SETTLE_SECONDS:
            settle(str(path))
        elif _clock is None:
            _clock = threading.Thread(target=_settle_later, daemon=True, name="buckets")
            _clock.start()


def settle(below: str = "") -> None:
    """Write the lines that were appended to the objects of this name, or below it, and are not written yet."""
    with _lock:
        for text, known in list(_appended.items()):
            if known.written < len(known.data) and (text + "/").startswith(below.rstrip("/") + "/" if below else ""):
                BucketPath(text).write_bytes(bytes(known.data))
                known.written, known.since = len(known.data), time.monotonic()


def _settle_later() -> None:
    global _clock
    time.sleep(SETTLE_SECONDS)
    with _lock:
        _clock = None
        with contextlib.suppress(OSError):  # the next append or reading reports it
            settle()


AT_END.append(settle)


@contextlib.contextmanager
def _forgotten(below: str) -> Iterator[None]:
    """Forget what was appended to the objects of a name or below it, which are deleted or replaced in the context."""
    with _lock:
        for text in list(_appended):
            if (text + "/").startswith(below.rstrip("/") + "/"):
                del _appended[text]
        yield


# The cache of whole objects


def cache_folder() -> Path:
    """Return the folder of the copies of objects: CRAB_JAX_OBJECT_CACHE, or one in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(CACHE) or Path(base) / "crab_jax" / "objects")


def cached(path: BucketPath) -> Path:
    """Return the local copy of an object, fetched when it is not there or another one now.

    The copies of a machine take at most CRAB_JAX_OBJECT_CACHE_GB (20); those used longest ago are removed. A process
    asks once whether an object has changed. Raises OSError.
    """
    copy = _known(str(path), os.getpid())
    if not copy.is_file():
        _known.cache_clear()
        copy = _known(str(path), os.getpid())
    with contextlib.suppress(OSError):
        os.utime(copy)
    return copy


@functools.lru_cache(maxsize=2**16)
def _known(text: str, process: int) -> Path:
    path = BucketPath(text)
    status = path.stat()
    key = hashlib.sha256(f"{text}\n{status.st_size}\n{status.tag}".encode()).hexdigest()[:32]
    copy: Path = cache_folder() / key[:2] / key / path.name
    if copy.is_file() and copy.stat().st_size == status.st_size:
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f".{uuid.uuid4().hex}{copy.suffix}")
    try:
        for _ in range(2):  # a truncated answer that the client has not noticed
            path.get(partial)
            if partial.stat().st_size == status.st_size:
                break
        else:
            found = f"{partial.stat().st_size} of {status.st_size} bytes arrived"
            raise OSError(errno.EIO, f"The bucket does not answer: {found}", text)
        os.replace(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    _make_room(copy, status.st_size)
    return copy


_free = 0.0  # bytes that this process may add before it measures the cache again


def _make_room(kept: Path, size: int) -> None:
    """Remove the copies that were used longest ago until all take no more than allowed; `kept`, of `size`, stays.

    Measuring the cache takes a look at every file in it, so it is done once for every 2 % that a process has added.
    """
    global _free
    _free -= size
    if _free >= 0:
        return
    most = float(os.environ.get(CACHE_GB) or DEFAULT_GB) * 1e9
    copies = []
    for file in cache_folder().glob("*/*/*"):
        with contextlib.suppress(OSError):  # another process removes it
            status = file.stat()
            copies.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in copies)
    for _, taken, file in sorted(copies):
        if total <= most:
            break
        if file != kept:
            shutil.rmtree(file.parent, ignore_errors=True)
            total -= taken
    _free = min(most - total, most / 50)
