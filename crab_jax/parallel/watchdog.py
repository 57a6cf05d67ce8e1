"""Reports of long waits: what a run waits for (its input, a device step with collectives, a checkpoint)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def print_error(line: str) -> None:
    """Print one line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Watchdog:
    """A thread that reports every wait longer than `seconds`, again each time it has doubled, and its end. 0: disabled.

    It ends nothing: a slow disk recovers, a suspended process resumes, and `peers` ends the run when a process died.
    silent: returns which other processes do not answer, or "".
    """

    def __init__(
        self, seconds: float, name: str = "", say: Callable[[str], None] = print_error, silent: Callable[[], str] = str
    ):
        self.seconds, self.prefix, self.say, self.silent = seconds, f"{name}: " if name else "", say, silent
        self._done = threading.Event()
        self._wait: tuple[str | Callable[[], str], float] | None = None  # (awaited thing, start time)
        self._due = 0.0  # seconds of waiting until the next report

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Name what the block waits for; a callable is called only when a report is due."""
        began = time.monotonic()
        self._due, self._wait = self.seconds, (what, began)
        try:
            yield
        finally:
            self._wait = None
            if self._due > self.seconds > 0:
                self.say(f"{self.prefix}went on after {time.monotonic() - began:.0f} s")

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            wait = self._wait
            if wait is not None and time.monotonic() - wait[1] >= self._due:
                self._due *= 2
                what = wait[0] if isinstance(wait[0], str) else wait[0]()
                silent = f"; {others}" if (others := self.silent()) else ""
                self.say(f"{self.prefix}waiting for {what}, for {time.monotonic() - wait[1]:.0f} s now{silent}")
