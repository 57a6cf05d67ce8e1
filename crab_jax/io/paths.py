"""Where a path lies: on a disk of this machine, or as an object in a bucket (gs://bucket/key, s3://bucket/key).

`at` makes a path of the user's text, and nothing else does: `pathlib.Path` and `os.path` turn `gs://b/x` into a local
folder called `gs:`. Both kinds of paths have the same methods; what a bucket cannot do (rename, append, lock, map into
memory) is done in files.py, locks.py and `local`, which gives a local copy to libraries that need a file.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crab_jax.io.buckets import BucketPath

SCHEMES = ("gs", "s3")  # kinds of buckets
_REMOTE = re.compile(rf"({'|'.join(SCHEMES)})://[^/\s]")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a bucket."""
    return _REMOTE.match(os.fspath(path)) is not None


def at(path: str | os.PathLike[str]) -> Path:
    """Return the path of a text: a `pathlib.Path`, or one with the same methods for gs:// and s3://."""
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    found: Path = in_bucket(path)
    return found


def in_bucket(path: str | os.PathLike[str]) -> BucketPath:
    """Return a path that is in a bucket, with the methods that only objects have."""
    from crab_jax.io.buckets import BucketPath  # imported late: a run on local disks needs none of it

    return path if isinstance(path, BucketPath) else BucketPath(os.fspath(path))


def local(path: str | os.PathLike[str]) -> Path:
    """Return a local file with the content of `path`: itself, or the copy of an object in the cache of this machine.

    The whole object is fetched once; see `buckets.cached`. Raises OSError.
    """
    if not is_remote(path):
        return Path(path)
    from crab_jax.io.buckets import cached

    return cached(in_bucket(path))


def real(path: str | os.PathLike[str]) -> str:
    """Return the text of a path without links and relative parts; one in a bucket has neither."""
    return os.fspath(path) if is_remote(path) else os.path.realpath(path)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path that does not depend on the current folder."""
    return at(path) if is_remote(path) else Path(path).absolute()


def normal(path: str | os.PathLike[str]) -> str:
    """Return the absolute text of a path without relative parts; links stay. One in a bucket is what it is."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def named_in(folder: Path, text: str) -> Path:
    """Return the path that a file in `folder` names: below that folder, unless it is absolute or in a bucket."""
    return at(text) if is_remote(text) or os.path.isabs(text) else folder / text


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is anything, a broken link included."""
    return at(path).exists() if is_remote(path) else os.path.lexists(path)


def own_part(path: Path) -> Path:
    """Return the file to which this process appends where several processes append to `path`.

    On a disk this is `path` itself. In a bucket each process has an object of its own, named NAME.HOST-PID.SUFFIX.
    """
    return path.with_name(f"{path.stem}.{os.uname().nodename}-{os.getpid()}{path.suffix}") if is_remote(path) else path


def settle() -> None:
    """Write all lines that this process has appended to objects of buckets and that are not written yet."""
    if buckets := sys.modules.get("crab_jax.io.buckets"):
        buckets.settle()
