"""Processes that do one task after another and may crash or hang on one without the others noticing; and how any
process that works for another one ends with it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
MEMORY = 4 << 30  # bytes that a process may take beyond what it has when it starts


def end_with_parent(*_: object) -> None:
    """End this process as soon as the one that started it is gone, however that ended. To be called first in a worker.

    The kernel closes the parent's end of the pipe that Python keeps to every worker. (PR_SET_PDEATHSIG looks at the
    thread that started the worker, which in Grain may be one of a pool, or at the fork server.)
    """

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True, name="parent").start()


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Any = None
    limit: float = 0.0  # seconds that its task may take
    until: float = 0.0  # time.monotonic() when they are over


def results(
    function: Callable[[T], Any], tasks: Iterable[T], count: int, seconds: Callable[[T], float]
) -> Iterator[tuple[T, Any]]:
    """(task, function(task)) of every task, in the order in which they are done by `count` processes.

    Where the process dies, or takes longer than seconds(task), the result is an Exception that says so, and another
    process takes its place. What `function` raises is a result too. It must be importable by name, and its module
    should import little.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would inherit its threads' locks
    context.set_forkserver_preload([function.__module__])

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is seen on ours
        try:
            ours.recv()  # it has started: what ends it from now on is a task's doing
        except EOFError:
            raise RuntimeError(
                "a process ended before it had a task; a script needs `if __name__ == '__main__':` "
                "around what starts processes"
            ) from None
        return _Worker(process, ours)

    idle: list[_Worker] = []
    busy: list[_Worker] = []

    def finish() -> list[tuple[T, Any]]:
        done = _done(busy)
        idle.extend(worker for worker, _ in done if worker.process.is_alive())
        return [(worker.task, result) for worker, result in done]

    try:
        for task in tasks:
            while len(busy) >= count:
                yield from finish()
            worker = idle.pop() if idle else start()
            worker.task, worker.limit = task, seconds(task)
            worker.until = time.monotonic() + worker.limit
            worker.pipe.send(task)
            busy.append(worker)
        while busy:
            yield from finish()
    finally:
        for worker in (*idle, *busy):
            worker.process.kill()
            worker.pipe.close()


def _done(busy: list[_Worker]) -> list[tuple[_Worker, Any]]:
    """Wait until some of `busy` are done, and take them out of it."""
    wait([worker.pipe for worker in busy], max(0.0, min(worker.until for worker in busy) - time.monotonic()))
    done = []
    for worker in list(busy):
        try:
            if worker.pipe.poll():
                result = worker.pipe.recv()
            elif worker.until <= time.monotonic():
                worker.process.kill()
                result = TimeoutError(f"took more than {worker.limit:.0f} s")
            else:
                continue
        except (EOFError, OSError):
            result = None
        if result is None or isinstance(result, TimeoutError):
            worker.process.join()
        if result is None:
            code = worker.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            result = ChildProcessError(f"ended the process that decoded it ({how})")
        busy.remove(worker)
        done.append((worker, result))
    return done


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Do what comes through the pipe until its other end is closed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print about a file is no news
    with contextlib.suppress(OSError, ValueError):  # Linux only, and not above a limit that is set already
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    pipe.send("started")
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = function(task)
        except Exception as error:
            result = error
        pipe.send(result)
