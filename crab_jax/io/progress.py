"""Progress lines that show, every few seconds, how much work is done and when it will end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from crab_jax.io.errors import printable

T = TypeVar("T")


def on_stderr(line: str) -> None:
    """Print a line on stderr, apart from the results of a verb."""
    print(printable(line), file=sys.stderr, flush=True)


class Progress:
    """Reports lines such as `clips 400/1500  33.5/s  eta 33 s` every few seconds and once at the end.

    total: 0 when unknown; then no ETA is shown. say: receives each line; None is silent. unit, scale: for example "GB"
    and 1e9 when bytes are counted. done: the amount that was done before, which does not count into the rate.
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
        """Add `count` to the amount done; `more` is appended to the line."""
        self.to(self.done + count, more)

    def to(self, done: float, more: str = "") -> None:
        """Set the amount done; `more` is appended to the line."""
        ends, now = self.done < done == self.total, time.monotonic()
        self.done = done
        if self.say and done > self.first and (ends or now - self.shown >= self.every):
            self.shown = now
            self.say(self._line(max(now - self.began, 1e-9)) + more)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and count each when the next one is requested."""
        for item in items:
            yield item
            self.add()

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.first) / seconds
        number, unit = (".1f", f" {self.unit}") if self.unit else (".0f", "")
        share = f"{self.done / self.scale:{number}}" + (f"/{self.total / self.scale:{number}}" if self.total else "")
        left = f"  eta {max(0, self.total - self.done) / rate:.0f} s" if self.total else ""
        return f"{self.what} {share}{unit}  {rate / self.scale:.3g}{unit}/s{left}"
