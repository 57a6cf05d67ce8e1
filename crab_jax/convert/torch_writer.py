"""Writer of files that PyTorch reads, without PyTorch: `torch.save`'s zip format and sharded safetensors directories.

Tensors are given as functions and written one by one, so the whole model is never in memory.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crab_jax.convert.torch_file import STORAGES
from crab_jax.io import paths
from crab_jax.io.files import whole, write_whole
from crab_jax.io.progress import Progress
from crab_jax.io.stored_tensors import SAFETENSORS_NAMES

ALIGNMENT = 64  # bytes; torch.save aligns storages the same way, so that they can be memory-mapped
_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items() if storage != "UntypedStorage"}


class Tensor(NamedTuple):
    """A tensor to write: its shape and dtype, and a function that returns its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


def save(path: str | Path, content: Mapping[str, Any], name: str = "archive") -> None:
    """Write a (nested) dict of `Tensor`s and plain values in the format of `torch.save`.

    `torch.load(weights_only=True)` and `torch_file.read` read it.
    """
    tensors: list[Tensor] = []
    pickled = b"\x80\x02" + _pickle(content, tensors) + b"."
    written = Progress(paths.at(path).name, sum(map(_size, tensors)), unit="GB", scale=1e9)
    with whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, f"{name}/data.pkl", lambda: pickled, len(pickled))
        _record(archive, f"{name}/byteorder", lambda: b"little", len(b"little"))
        for key, tensor in enumerate(tensors):
            _record(archive, f"{name}/data/{key}", functools.partial(_bytes, tensor), _size(tensor))
            written.add(_size(tensor))
        _record(archive, f"{name}/version", lambda: b"3\n", len(b"3\n"))


def _record(archive: zipfile.ZipFile, record: str, load: Callable[[], Any], size: int) -> None:
    """Write one uncompressed record whose bytes start at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(record)
    info.file_size = size
    # A local header is 30 bytes, the name, and extra fields; each of those starts with a 4-byte id and length.
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    padding = -(archive.fp.tell() + 30 + len(record) + zip64 + 4) % ALIGNMENT if archive.fp else 0
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w") as out:
        out.write(load())


def _bytes(tensor: Tensor) -> memoryview:
    value = np.asarray(tensor.load(), order="C")
    if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"expected {tensor.dtype}{tensor.shape}, got {value.dtype}{value.shape}")
    return value.reshape(-1).view(np.uint8).data


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _pickle(value: Any, tensors: list[Tensor]) -> bytes:
    """Return opcodes (protocol 2) that put `value` on the stack; tensors become references to numbered storages."""
    if isinstance(value, Tensor):
        tensors.append(value)
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        storage = (
            b"("
            + _text("storage")
            + _name("torch", _STORAGE_OF[value.dtype.name])
            + _text(str(len(tensors) - 1))
            + _text("cpu")
            + _integer(math.prod(value.shape))
            + b"tQ"
        )
        hooks = _name("collections", "OrderedDict") + b")R"
        return (
            _name("torch._utils", "_rebuild_tensor_v2")
            + b"("
            + storage
            + _integer(0)
            + _integers(value.shape)
            + _integers(strides)
            + b"\x89"
            + hooks
            + b"tR"
        )
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_text(key) + _pickle(item, tensors) for key, item in value.items()) + b"u"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _text(value)
    raise TypeError(f"{type(value).__name__} is not written")


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _integers(values: Any) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + _size(tensor)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written = Progress(paths.at(path).name, end, unit="GB", scale=1e9)
    with whole(path) as partial, open(partial, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            out.write(_bytes(tensor))
            written.add(_size(tensor))


def save_model_dir(folder: str | Path, tensors: Mapping[str, Tensor], shard_bytes: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index, as Hugging Face names them."""
    folder = paths.at(folder)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(map(_size, shards[-1].values())) + _size(tensor) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(map(_size, tensors.values()))
    write_whole(
        folder / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1),
    )
