"""Says what a run waits for when it waits long: its input, a device step (a collective), a checkpoint."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def print_error(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Watchdog:
    """A thread that reports every wait longer than `seconds`, again each time it has doubled, and its end. 0 is off.

    It ends nothing: a slow disk recovers, a process that stands still goes on, and one that died ends the run by
    `peers`. silent: which other processes do not answer, or "".
    """

    def __init__(
        self, seconds: float, name: str = "", say: Callable[[str], None] = print_error, silent: Callable[[], str] = str
    ):
        self.seconds, self.prefix, self.say, self.silent = seconds, f"{name}: " if name else "", say, silent
        self._done = threading.Event()
        self._wait: tuple[str | Callable[[], str], float] | None = None  # what for, since when
        self._due = 0.0  # seconds of waiting that bring the next report

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Name what the block waits for; a callable is asked only when it is reported."""
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
