"""Worker processes that may crash or hang on a task without affecting others, and that end with their parent."""

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
    """End this process as soon as its parent is gone, however that ended. Call it first in a worker.

    The kernel closes the parent's end of the pipe that Python keeps to every worker. (PR_SET_PDEATHSIG watches the
    thread that started the worker, which in Grain may be one of a pool, or the fork server.)
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
    limit: float = 0.0  # seconds allowed for its task
    until: float = 0.0  # deadline by time.monotonic()


def results(
    function: Callable[[T], Any], tasks: Iterable[T], count: int, seconds: Callable[[T], float]
) -> Iterator[tuple[T, Any]]:
    """Yield (task, function(task)) of every task, in the order of completion by `count` processes.

    If a process dies, or takes longer than seconds(task), the result is an Exception, and another process replaces it.
    Exceptions of `function` are results too. `function` must be importable by name, and its module should import
    little.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would inherit its threads' locks
    context.set_forkserver_preload([function.__module__])

    def start() -> _Worker:
        parent_end, worker_end = context.Pipe()
        process = context.Process(target=_serve, args=(function, worker_end), daemon=True)
        process.start()
        worker_end.close()  # so that the parent's end sees the worker's exit
        try:
            parent_end.recv()  # it has started: from now on only a task can end it
        except EOFError:
            raise RuntimeError(
                "a process ended before it had a task; a script needs `if __name__ == '__main__':` "
                "around what starts processes"
            ) from None
        return _Worker(process, parent_end)

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
    """Wait until some of `busy` are done, and remove and return them with their results."""
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
    """Run the tasks that come through the pipe until its other end is closed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of libraries about a file are not wanted
    with contextlib.suppress(OSError, ValueError):  # Linux only; an existing limit cannot be raised
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
