"""Lazily built, memory-mapped tensors of a file, and the reader of safetensors files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from crab_jax.io import paths
from crab_jax.io.structured import refuse_special, safetensors_header

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors by name, each built on access. `metadata` holds the file's other values, nested as in the file.

    Names of nested dicts are joined with dots: `{'cfg': ..., 'model': {'a': tensor}}` gives 'model.a'.
    """

    def __init__(self, build: Mapping[str, Callable[[], np.ndarray]], metadata: Mapping[str, Any] | None = None):
        self._build = dict(build)
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._build[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._build

    def __iter__(self) -> Iterator[str]:
        return iter(self._build)

    def __len__(self) -> int:
        return len(self._build)


class ByteRange(NamedTuple):
    """A range of bytes of a file. Each `map` creates its own mapping, so memory is freed with the last view of it.

    A file in a bucket is fetched whole when it is first mapped, and again if its local copy had to make room.
    """

    path: Path
    start: int
    size: int

    def map(self) -> np.ndarray:
        """Map the range as uint8[size], read-only; pages are read on access."""
        if not self.size:  # an empty mapping does not exist
            return np.zeros(0, np.uint8)
        return np.memmap(paths.local(self.path), np.uint8, "r", self.start, (self.size,))


class Storage(NamedTuple):
    """The bytes of one storage record and the name of its element type."""

    record: ByteRange
    dtype: str


class TensorView(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def build(self) -> np.ndarray:
        """Return a read-only view of the file. Raises ValueError when the view exceeds the storage."""
        dtype = np.dtype(DTYPES[self.dtype])
        view = np.ndarray(
            self.shape,
            dtype,
            self.storage.record.map(),
            self.offset * dtype.itemsize,
            tuple(stride * dtype.itemsize for stride in self.strides),
        )
        view.flags.writeable = False
        return view


_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}


def read_safetensors(path: str | Path) -> LazyTensors:
    """Return the tensors of one safetensors file, memory-mapped one by one (see `ByteRange`).

    Raises InputError if the file is missing or damaged.
    """
    path = paths.at(path)
    refuse_special(path)
    header, metadata, start = safetensors_header(path)
    tensors = {}
    for name, entry in header.items():
        (first, end), dtype, shape = entry["data_offsets"], _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = Storage(ByteRange(path, start + first, end - first), dtype)
        tensors[name] = TensorView(storage, dtype, 0, shape, strides).build
    return LazyTensors(tensors, metadata)
