"""Folders and files that are one process's alone while it writes them: who has them, and whose lock is left over."""

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

from crab_jax.io.errors import InputError
from crab_jax.io.files import out_file, out_folder
from crab_jax.io.structured import strict_json

LOCK = ".lock"
BEAT_SECONDS = 20.0  # how often a lock is refreshed
# A lock of another machine that was not refreshed for so long is left over. A share may show a change a minute late.
STALE_SECONDS = 120.0
SEEN_SECONDS = 30.0  # after which a lock is seen by all hosts
_held: dict[Path, _Holder] = {}  # the locks of this process


class Owner(NamedTuple):
    """Whose a lock is. machine: one running system and its process ids; a container has its own. started: of the
    process, so that another one with its id is not taken for it. since: seconds of the epoch. use: what it is locked
    for; owners of one use and another share go together."""

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
    """When a process of this machine was started; "" when there is none (one that has ended but was not waited for is
    none)."""
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
    """The owner of a lock that is there; one that cannot be read is being written, or was left by a full disk."""
    try:
        text = lock.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = Owner(**strict_json(text.decode()))
        str(found), int(found.pid)
        return found
    except (ValueError, TypeError, OverflowError, OSError):
        return Owner("an unknown host", "", 0, "", 0.0, "its lock cannot be read", "", 0)


class _Holder(NamedTuple):
    owner: Owner
    done: threading.Event


def _take(lock: Path, owner: Owner) -> bool:
    """Make a lock file that is not there yet; it appears with its content."""
    partial = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    content = json.dumps(owner._asdict()).encode()
    try:
        partial.write_bytes(content)
        try:
            os.link(partial, lock)
            return True
        except FileExistsError:
            return False
        except OSError:  # no links on this disk (gcsfuse)
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
    """Seconds since a lock was refreshed, by the clock of its disk; 0 for one that is gone."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        probe.write_bytes(b"")
        return max(0.0, probe.stat().st_mtime - lock.stat().st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _left_over(lock: Path, owner: Owner) -> bool | None:
    """Whether the owner of a lock is gone; None when only time tells."""
    if owner.machine == _machine():
        return not owner.started or _started(owner.pid) != owner.started
    return True if _age(lock) > STALE_SECONDS else None


def _gone(lock: Path, owner: Owner, what: Path) -> bool:
    """Whether the owner of a lock is gone. One of another machine is waited for, until its lock is refreshed or was not
    for STALE_SECONDS."""
    try:
        stamp, told = lock.stat().st_mtime_ns, False
        while (left := _left_over(lock, owner)) is None:
            if lock.stat().st_mtime_ns != stamp or _owner_of(lock) != owner:
                return _owner_of(lock) is None
            if not told:
                print(
                    f"{what} is locked by {owner}: waiting up to {STALE_SECONDS:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(min(1.0, STALE_SECONDS / 10))
        return left
    except FileNotFoundError:  # given free
        return True


def _drop(lock: Path, owner: Owner, what: Path) -> None:
    """Remove the lock of an owner that is gone. Of several that find it so one does, behind a guard, so that none
    removes the new lock of another."""
    guard = lock.with_name(f"{lock.name}.drop")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(0.05)
        if _age(guard) > STALE_SECONDS:  # of a process that was killed right there
            guard.unlink(missing_ok=True)
        return
    try:
        if _owner_of(lock) == owner:
            print(f"{what}: the lock of {owner} is left over, and is replaced", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _refused(what: Path, lock: Path, flag: str, owner: Owner, use: str = "") -> InputError:
    try:
        ours, theirs = strict_json(use), strict_json(owner.use)
        field = next(field for field in (*ours, *theirs) if ours.get(field) != theirs.get(field))
    except (ValueError, TypeError, AttributeError, StopIteration):  # they have nothing in common
        pass
    else:
        return InputError(
            f"this process, which is to share {what}",
            field,
            f"is {ours.get(field)!r:.300}, of {owner} it is {theirs.get(field)!r:.300}",
            "start all with the same command, data and versions",
        )
    return InputError(
        str(what),
        flag,
        f"is in use by {owner}",
        f"wait for it, end it or give another {flag}; remove {lock} only if you know that it is gone",
    )


def _beat(lock: Path, holder: _Holder) -> None:
    """Refresh a lock until it is released. One that was taken over, after this process stood still for long, ends the
    process: another one writes now."""
    while not holder.done.wait(BEAT_SECONDS):
        try:
            found = _owner_of(lock)
            if holder.done.is_set():
                return
            if found is None:
                _take(lock, holder.owner)
            elif found == holder.owner:
                os.utime(lock)
            elif found.pid:
                print(
                    f"error: {lock.parent}: was taken over by {found}, while this process stood still; start again "
                    "when that one is done",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
        except OSError:  # a full or absent disk: the next beat may find it better
            pass


@contextmanager
def locked(folder: str | Path, flag: str = "--out", use: str = "", share: int = 0) -> Iterator[Path]:
    """The folder, made, and this process's alone until the end of the context or of the process.

    Processes that give the same `use` and different `share` have it together. A lock whose owner is gone is replaced:
    of this machine at once, of another when it was not refreshed for STALE_SECONDS. Raises InputError when the folder
    is in use or cannot be written.
    """
    out = out_folder(folder, flag)
    lock = out.absolute() / f"{LOCK}.{share}"
    with _lock(lock, _me(use, share), out, flag):
        for other in sorted(lock.parent.glob(f"{LOCK}.*")):
            if other != lock and other.name.removeprefix(f"{LOCK}.").isdecimal():
                found = _owner_of(other)
                if found is None or use and found.use == use:
                    continue
                # Of two uses that start at once both may be refused, and never both let in.
                if not _gone(other, found, out):
                    raise _refused(out, other, flag, found, use)
                _drop(other, found, out)
        yield out


def mark(folder: Path) -> str:
    """What tells a locked folder from any other: its lock, which another host may see a little later."""
    lock, until = folder / f"{LOCK}.0", time.monotonic() + SEEN_SECONDS
    while (owner := _owner_of(lock)) is None and time.monotonic() < until:
        time.sleep(0.2)
    return f"the folder of {owner}" if owner else "a folder without a lock"


@contextmanager
def locked_file(file: str | Path, flag: str = "--out") -> Iterator[Path]:
    """The same for one file in a folder that others may use."""
    path = out_file(file, flag)
    with _lock(path.absolute().with_name(f".{path.name}{LOCK}"), _me("", 0), path, flag):
        yield path


@contextmanager
def _lock(lock: Path, owner: Owner, what: Path, flag: str) -> Iterator[None]:
    try:
        while not _take(lock, owner):
            if (found := _owner_of(lock)) is None:
                continue
            if not _gone(lock, found, what):
                raise _refused(what, lock, flag, _owner_of(lock) or found)
            _drop(lock, found, what)
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
    if holder is None or holder.owner.pid != os.getpid():  # a forked child has a copy
        return
    holder.done.set()
    try:
        if _owner_of(lock) == holder.owner:
            lock.unlink()
    except OSError:
        pass


def release_all() -> None:
    """Give up all locks of this process, before it ends without the usual clean-up."""
    for lock in list(_held):
        _release(lock)
