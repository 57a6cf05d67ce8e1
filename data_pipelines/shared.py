"""Arrays that worker processes map from a file instead of receiving copies."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np


def _mapped(file: str, dtype: str, length: int) -> Shared:
    return Shared(np.memmap(file, np.dtype(dtype), "r", shape=(length,)) if length else np.zeros(0, dtype), file)


def _remove(file: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a copy of the process
        Path(file).unlink(missing_ok=True)


class Shared:
    """A one-dimensional array that a worker process maps from a file instead of receiving a copy.

    The file is written when the array is first sent to a process, in the folder of temporary files, and goes with the
    array of the process that wrote it.
    """

    def __init__(self, array: np.ndarray, file: str = ""):
        self.array, self._file = array, file

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: Any) -> Any:
        return self.array[at]

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._file:
            descriptor, self._file = tempfile.mkstemp(prefix="crab_jax-", suffix=".order")
            with open(descriptor, "wb") as file:
                file.write(np.ascontiguousarray(self.array).tobytes())
            weakref.finalize(self, _remove, self._file, os.getpid())
        return _mapped, (self._file, self.array.dtype.str, len(self.array))
