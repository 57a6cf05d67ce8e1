"""Lines that tell, every few seconds, how far long work is and when it will end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from crab_jax.io.errors import printable

T = TypeVar("T")


def on_stderr(line: str) -> None:
    """Print a line apart from what a verb prints as its result."""
    print(printable(line), file=sys.stderr, flush=True)


class Progress:
    """`clips 400/1500  33.5/s  eta 33 s`, every few seconds and once at the end.

    total: 0 when it is not known; then there is no ETA. say: what becomes of a line; None keeps silent. unit, scale:
    such as "GB", 1e9 where bytes are counted. done: how much was done before.
    """

    def __init__(
        self,
        what: str,
        total: float = 0,
        say: Callable[[str], None] | None = on_stderr,
        unit: str = "",
        scale: float = 1,
        done: float = 0,
        every: float = 3.0,
    ):
        self.what, self.total, self.say, self.unit, self.scale, self.every = what, total, say, unit, scale, every
        self.first = self.done = done
        self.began = self.shown = time.monotonic()

    def add(self, count: float = 1, more: str = "") -> None:
        """So much more is done; `more` is written behind the line."""
        self.to(self.done + count, more)

    def to(self, done: float, more: str = "") -> None:
        """So much is done in all."""
        ends, now = self.done < done == self.total, time.monotonic()
        self.done = done
        if self.say and done > self.first and (ends or now - self.shown >= self.every):
            self.shown = now
            self.say(self._line(max(now - self.began, 1e-9)) + more)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.add()

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.first) / seconds
        number, unit = (".1f", f" {self.unit}") if self.unit else (".0f", "")
        share = f"{self.done / self.scale:{number}}" + (f"/{self.total / self.scale:{number}}" if self.total else "")
        left = f"  eta {max(0, self.total - self.done) / rate:.0f} s" if self.total else ""
        return f"{self.what} {share}{unit}  {rate / self.scale:.3g}{unit}/s{left}"
