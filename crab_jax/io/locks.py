"""Locks on folders and files that a process writes.

A lock names its owner, is refreshed while the owner lives, and is replaced when its owner is gone. Only one of several
processes creates it: by a hard link on a disk, by a conditional request in a bucket, which its server decides.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import out_file, out_folder
from crab_jax.io.structured import strict_json

LOCK = ".lock"
BEAT_SECONDS = 20.0  # how often a lock is refreshed
# A lock of another machine that was not refreshed for so long is stale. Network shares may show changes a minute late.
STALE_SECONDS = 120.0
SEEN_SECONDS = 30.0  # by which time all hosts see a new lock
WAIT_SECONDS = 0.5  # between two looks at a lock that is waited for
_held: dict[Path, _Holder] = {}  # the locks of this process


class Owner(NamedTuple):
    """The owner of a lock.

    machine: the host, boot and PID namespace that a process id belongs to (a container has its own). started: start
    time of the process, so that another process with its id is not mistaken for it. since: seconds since the epoch.
    use: what the folder is locked for; owners with the same use and different shares hold it together.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: float
    command: str
    use: str
    share: int

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since} ({self.command:.120})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _machine() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {_read('/proc/sys/kernel/random/boot_id').strip()} {space}"


def _started(pid: int) -> str:
    """Return the start time of a process of this machine, or "" if there is none or it has ended (zombies included)."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields:
        return "" if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"


def _me(use: str, share: int) -> Owner:
    command = " ".join(sys.argv).encode("utf-8", "backslashreplace").decode()
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), time.time(), command, use, share)


def _owner_of(lock: Path) -> Owner | None:
    """Return the owner of an existing lock, or None without a lock.

    A lock that cannot be read is being written, or was left by a full disk: its owner has process id 0.
    """
    try:
        text = lock.read_bytes()
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**strict_json(text.decode()))
        str(owner), int(owner.pid)
        return owner
    except (ValueError, TypeError, OverflowError, OSError):
        return Owner("an unknown host", "", 0, "", 0.0, "its lock cannot be read", "", 0)


class _Holder(NamedTuple):
    owner: Owner
    done: threading.Event


def _take(lock: Path, owner: Owner) -> bool:
    """Create a lock file unless it exists; return whether this process created it. It appears complete."""
    partial = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    content = json.dumps(owner._asdict()).encode()
    if paths.is_remote(lock):
        return paths.in_bucket(lock).create(content)
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, lock)
            return True
        except FileExistsError:
            return False
        except OSError:  # the file system has no hard links (gcsfuse)
            pass
        try:
            with open(lock, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return _owner_of(lock) == owner
    finally:
        partial.unlink(missing_ok=True)


def _age(lock: Path) -> float:
    """Return the seconds since a lock was refreshed, by the clock of its disk; 0 if it is gone."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        probe.write_bytes(b"")
        return max(0.0, probe.stat().st_mtime - lock.stat().st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_stale(lock: Path, owner: Owner) -> bool | None:
    """Return whether the owner of a lock is gone; None if that can only be seen after more waiting."""
    if owner.machine == _machine():
        return not owner.started or _started(owner.pid) != owner.started
    return True if _age(lock) > STALE_SECONDS else None


def _gone(lock: Path, owner: Owner, what: Path) -> bool:
    """Return whether the owner of a lock is gone.

    For an owner on another machine, wait until the lock is refreshed or has not been refreshed for STALE_SECONDS.
    """
    try:
        stamp, announced = lock.stat().st_mtime_ns, False
        while (stale := _is_stale(lock, owner)) is None:
            if lock.stat().st_mtime_ns != stamp or _owner_of(lock) != owner:
                return _owner_of(lock) is None
            if not announced:
                print(
                    f"{what} is locked by {owner}: waiting up to {STALE_SECONDS:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
                announced = True
            time.sleep(min(1.0, STALE_SECONDS / 10))
        return stale
    except FileNotFoundError:  # released
        return True


def _drop(lock: Path, owner: Owner, what: Path) -> None:
    """Remove the lock of an owner that is gone.

    If several processes do so at once, a guard file lets only one through, so that none removes another's new lock.
    """
    guard = lock.with_name(f"{lock.name}.drop")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.05)
        if _age(guard) > STALE_SECONDS:  # left by a process killed in this function
            guard.unlink(missing_ok=True)
        return
    try:
        if _owner_of(lock) == owner:
            print(f"{what}: the stale lock of {owner} is replaced", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _refused(what: Path, lock: Path, flag: str, owner: Owner, use: str = "") -> InputError:
    """Return the error for a path in use; it names the first differing field when both processes meant to share it."""
    try:
        own_use, other_use = strict_json(use), strict_json(owner.use)
        field = next(field for field in (*own_use, *other_use) if own_use.get(field) != other_use.get(field))
    except (ValueError, TypeError, AttributeError, StopIteration):  # the uses are not comparable
        pass
    else:
        return InputError(
            f"this process, which is to share {what}",
            field,
            f"is {own_use.get(field)!r:.300}, of {owner} it is {other_use.get(field)!r:.300}",
            "start all with the same command, data and versions",
        )
    return InputError(
        str(what),
        flag,
        f"is in use by {owner}",
        f"wait for it, end it or give another {flag}; remove {lock} only if you know that it is gone",
    )


def _beat(lock: Path, holder: _Holder) -> None:
    """Refresh a lock until it is released.

    If another process took the lock over while this one stood still, end this process: the other one writes now.
    """
    while not holder.done.wait(BEAT_SECONDS):
        try:
            owner = _owner_of(lock)
            if holder.done.is_set():
                return
            if owner is None:
                _take(lock, holder.owner)
            elif owner == holder.owner:
                lock.write_bytes(json.dumps(owner._asdict()).encode()) if paths.is_remote(lock) else os.utime(lock)
            elif owner.pid:
                print(
                    f"error: {lock.parent}: was taken over by {owner}, while this process stood still; start again "
                    "when that one is done",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
        except OSError:  # a full or absent disk may have recovered at the next refresh
            pass


@contextmanager
def locked(folder: str | Path, flag: str = "--out", use: str = "", share: int = 0) -> Iterator[Path]:
    """Create a folder and yield it locked for this process until the end of the context or of the process.

    Processes that give the same `use` and different `share` hold it together. A lock whose owner is gone is replaced:
    on this machine at once, on another one after STALE_SECONDS without a refresh. Raises InputError when the folder is
    in use or cannot be written.
    """
    out = out_folder(folder, flag)
    lock = out.absolute() / f"{LOCK}.{share}"
    with _lock(lock, _me(use, share), out, flag):
        for other in sorted(lock.parent.glob(f"{LOCK}.*")):
            if other != lock and other.name.removeprefix(f"{LOCK}.").isdecimal():
                owner = _owner_of(other)
                if owner is None or use and owner.use == use:
                    continue
                # When two different uses start at once, both may be refused, but never are both admitted.
                if not _gone(other, owner, out):
                    raise _refused(out, other, flag, owner, use)
                _drop(other, owner, out)
        yield out


def mark(folder: Path) -> str:
    """Return a text that identifies a locked folder by its owner, waiting until this host sees the lock."""
    lock, until = folder / f"{LOCK}.0", time.monotonic() + SEEN_SECONDS
    while (owner := _owner_of(lock)) is None and time.monotonic() < until:
        time.sleep(0.2)
    return f"the folder of {owner}" if owner else "a folder without a lock"


@contextmanager
def locked_file(file: str | Path, flag: str = "--out", wait: bool = False) -> Iterator[Path]:
    """Lock one file, in a folder that others may use, and yield its path; see `locked`.

    wait: wait for another process that holds it, instead of raising InputError.
    """
    path = out_file(file, flag)
    with _lock(path.absolute().with_name(f".{path.name}{LOCK}"), _me("", 0), path, flag, wait):
        yield path


@contextmanager
def _lock(lock: Path, owner: Owner, what: Path, flag: str, wait: bool = False) -> Iterator[None]:
    try:
        announced = False
        while not _take(lock, owner):
            if (other := _owner_of(lock)) is None:
                continue
            if _gone(lock, other, what):
                _drop(lock, other, what)
            elif not wait:
                raise _refused(what, lock, flag, _owner_of(lock) or other)
            else:
                if not announced:
                    print(f"waiting for {other}, which holds {what}", file=sys.stderr, flush=True)
                announced = True
                time.sleep(WAIT_SECONDS)
    except OSError as error:
        raise InputError(str(what), flag, f"cannot be locked ({error.strerror})", "give another one") from error
    holder = _held[lock] = _Holder(owner, threading.Event())
    threading.Thread(target=_beat, args=(lock, holder), daemon=True, name="lock").start()
    try:
        yield
    finally:
        _release(lock)


def _release(lock: Path) -> None:
    holder = _held.pop(lock, None)
    if holder is None or holder.owner.pid != os.getpid():  # a copy in a forked child
        return
    holder.done.set()
    try:
        if _owner_of(lock) == holder.owner:
            lock.unlink()
    except OSError:
        pass


def release_all() -> None:
    """Release all locks of this process, before it exits without the usual clean-up."""
    for lock in list(_held):
        _release(lock)
