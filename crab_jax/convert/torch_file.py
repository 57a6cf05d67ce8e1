"""Reader of PyTorch checkpoints as lazy NumPy arrays, without PyTorch and without running code in the files."""

from __future__ import annotations

import collections
import io
import itertools
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import refuse_stand_in
from crab_jax.io.stored_tensors import DTYPES, ByteRange, LazyTensors, Storage, TensorView, read_safetensors
from crab_jax.io.structured import shard_index

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
LARGEST_PICKLE = 32 * 2**20  # bytes of tensor names and plain values; a 7 B model has less than a megabyte
MOST_VALUES = 300_000
_CONTAINERS = "save a plain dict of tensors again with torch.save, or as safetensors"


class _Admitted:
    """A function that a pickle may name. It has no attribute that the pickle's BUILD opcode could replace."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"sets {name!r} on a function")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> TensorView:
    return _checked(TensorView(storage, storage.dtype, offset, tuple(shape), tuple(strides)))


def _tensor_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _grad: bool,
    _hooks: Any,
    dtype: str,
    *_: Any,
) -> TensorView:
    return _checked(TensorView(storage, dtype, offset, tuple(shape), tuple(strides)))


def _checked(tensor: TensorView) -> TensorView:
    tensor.build()  # a view costs nothing, so an invalid one is refused at once
    return tensor


_FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor"): _Admitted(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Admitted(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Admitted(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Admitted(lambda tensor, *_: tensor),
    ("torch", "Size"): _Admitted(tuple),
    ("collections", "OrderedDict"): _Admitted(collections.OrderedDict),
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds tensors and plain containers, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, record: str):
        super().__init__(io.BytesIO(_pickle_of(archive, path, record)))
        self._archive, self._path, self._record = archive, path, record
        self._storages: dict[str, ByteRange] = {}
        self.sums: dict[str, tuple[ByteRange, int]] = {}  # record name -> (bytes of the storage, their CRC-32)

    def find_class(self, module: str, name: str) -> Any:
        """Return the function, storage type or dtype that the pickle names. Raises InputError for anything else."""
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in DTYPES:
            return name
        raise InputError(
            str(self._path),
            self._record,
            f"it refers to {module}.{name}, which is not a tensor",
            f"do not load files you do not trust; otherwise {_CONTAINERS}",
        )

    def persistent_load(self, reference: tuple[Any, ...]) -> Storage:
        """Return the storage that the pickle refers to."""
        kind, dtype, key, _device, _count = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"persistent reference of kind {kind!r}")
        if key not in self._storages:
            self._storages[key] = self._find(f"{self._record.removesuffix('data.pkl')}data/{key}")
        return Storage(self._storages[key], dtype)

    def _find(self, record: str) -> ByteRange:
        """Return the position of an uncompressed zip record in the file."""
        try:
            info = self._archive.getinfo(record)
        except KeyError:
            raise InputError(str(self._path), record, "this storage is missing", "fetch the file again") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(str(self._path), record, "this storage is compressed", "unzip and zip it with -0")
        # The local header repeats the name and has its own extra field (padding up to the storage's alignment).
        with open(paths.local(self._path), "rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name + extra
        if start + info.file_size > paths.local(self._path).stat().st_size:
            raise InputError(str(self._path), record, "this storage ends after the file", "fetch the file again")
        position = ByteRange(self._path, start, info.file_size)
        self.sums[record] = position, info.CRC
        return position


def _pickle_of(archive: zipfile.ZipFile, path: Path, record: str) -> bytes:
    """Return the pickle, whose size is bounded before unpacking; memo indices may not exceed its length."""
    size = archive.getinfo(record).file_size
    if size > LARGEST_PICKLE:
        raise InputError(str(path), record, f"has {size:,} bytes, more than {LARGEST_PICKLE:,}", _CONTAINERS)
    data = archive.read(record)
    for code, place, _ in pickletools.genops(data):
        if code.name == "LONG_BINPUT" and isinstance(place, int) and place > len(data):
            raise pickle.UnpicklingError(f"puts a value at place {place:,}")
    return data


def _check_sums(sums: Mapping[str, tuple[ByteRange, int]], path: Path) -> None:
    """Raise InputError if a storage differs from the CRC-32 of its zip record.

    If no storage matches, the file was written without checksums, as PyTorch can be told to; then warn.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        computed = pool.map(lambda storage: zlib.crc32(storage[0].map().data), sums.values())
        wrong = [name for (name, (_, stored)), crc in zip(sums.items(), computed, strict=True) if crc != stored]
    if wrong and len(wrong) == len(sums) > 1:
        print(f"warning: {path} was written without checksums: it is not verified", file=sys.stderr)
    elif wrong:
        raise InputError(
            str(path), wrong[0], f"{len(wrong)} storages are damaged (their CRC-32 differs)", "fetch the file again"
        )


def read(path: str | Path) -> LazyTensors:
    """Return the tensors of a `torch.save` file (.bin, .pt, .pth; the zip format of PyTorch 1.6 and later).

    Storages stay in the file and are memory-mapped; arrays are read-only views. Code in the pickle is never run: only
    tensors, OrderedDict and plain values are built. Raises InputError for anything else, and for damaged files.
    """
    path = paths.at(path)
    refuse_stand_in(path)
    copy = paths.local(path)  # fetched whole, if it is in a bucket
    try:
        with zipfile.ZipFile(copy) as archive:
            tensors, metadata = _load(archive, path)
    except FileNotFoundError:
        raise InputError(str(path), "", "there is no such file", "check the path") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            str(path),
            "",
            f"it is not a whole PyTorch zip file ({error})",
            f"fetch it again; if PyTorch older than 1.6 wrote it, {_CONTAINERS}",
        ) from error
    return LazyTensors(tensors, metadata)


def _load(archive: zipfile.ZipFile, path: Path) -> tuple[dict[str, Callable[[], np.ndarray]], dict[str, Any]]:
    records = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(records) != 1:
        raise InputError(
            str(path),
            "data.pkl",
            f"the zip file holds {len(records)} of this record, not one",
            "give a file written by torch.save",
        )
    order = records[0].removesuffix("data.pkl") + "byteorder"
    if order in archive.namelist() and archive.open(order).read(16) != b"little":
        raise InputError(str(path), order, "only little-endian files are read", "save it on a little-endian machine")
    try:
        tensors: dict[str, Callable[[], np.ndarray]] = {}
        reader = _Unpickler(archive, path, records[0])
        value = reader.load()
        if not isinstance(value, Mapping):
            raise pickle.UnpicklingError(f"holds a {type(value).__name__}, not a dict")
        metadata = _take_tensors(value, "", tensors, itertools.count())
        _check_sums(reader.sums, path)
        return tensors, metadata
    except (InputError, zipfile.BadZipFile):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(
            str(path),
            records[0],
            f"it is damaged or holds more than tensors ({error!r})",
            f"fetch it again, or {_CONTAINERS}",
        ) from error


def _take_tensors(value: Any, prefix: str, tensors: dict[str, Callable[[], np.ndarray]], seen: Iterator[int]) -> Any:
    """Move every tensor under a dict or list into `tensors`; return the other values, nested as before.

    `seen` counts values, because a small pickle can hold the same list many times over.
    """
    if not isinstance(value, Mapping | list | tuple):
        return value
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    rest = {}
    for key, item in items:
        if next(seen) > MOST_VALUES:
            raise pickle.UnpicklingError(f"holds more than {MOST_VALUES:,} values")
        if isinstance(item, TensorView):
            tensors[f"{prefix}{key}"] = item.build
        else:
            rest[key] = _take_tensors(item, f"{prefix}{key}.", tensors, seen)
    return rest if isinstance(value, Mapping) else list(rest.values())


def read_model_dir(folder: str | Path) -> LazyTensors:
    """Return the tensors of a Hugging Face model directory, as safetensors or as .bin files, sharded or not.

    Raises InputError when a file is missing or damaged, or a shard lacks a tensor that the index names.
    """
    folder = paths.at(folder)
    for name, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read)):
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, reader)
        if (folder / name).exists():
            return reader(folder / name)
    raise InputError(
        str(folder),
        "model.safetensors",
        "the directory holds neither this file, nor pytorch_model.bin, nor the index of shards",
        "give a directory that holds the whole model",
    )


def _read_shards(index: Path, reader: Callable[[Path], LazyTensors]) -> LazyTensors:
    files = shard_index(index)
    shards = {file: reader(index.parent / file) for file in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in shards[file]:
            raise InputError(
                str(index.parent / file),
                name,
                "the index names this tensor but the shard lacks it",
                "fetch the directory again",
            )
    return LazyTensors({name: partial(shards[file].__getitem__, name) for name, file in files.items()})
