"""What verbs write: files that are there whole or not at all, in folders that may be written to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from crab_jax.errors import InputError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it is there completely or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def out_folder(path: str | Path) -> Path:
    """The folder of --out, made. Raises InputError where that cannot be done."""
    out = Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(out), "--out", f"cannot be written ({error.strerror})", "give another folder") from error
    return out


class Written:
    """Tells on stderr, every so many seconds, how much of `total` bytes is written."""

    def __init__(self, name: str, total: float, every: float = 10.0):
        self.name, self.total, self.every, self.done = name, total, every, 0.0
        self.began = self.shown = time.monotonic()

    def add(self, size: float) -> None:
        """So many bytes more are written."""
        self.done, now = self.done + size, time.monotonic()
        if now - self.shown >= self.every:
            self.shown, rate = now, self.done / (now - self.began)
            print(f"{self.name}: {self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB  {rate / 1e9:.3f} GB/s  "
                  f"eta {(self.total - self.done) / rate:.0f} s", file=sys.stderr, flush=True)
