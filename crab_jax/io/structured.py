"""The reader of all structured files: JSON, JSONL, safetensors headers and shard indices.

A file's size is bounded before it is read (`read_bytes`), its syntax is strict (`strict_json`), and its values are
checked against a schema beside the code that uses it (`check`) before use. Every error is an InputError that names the
file, the field and the fix. docs/architecture.md lists the files with their schemas and bounds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import reprlib
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax.io import paths
from crab_jax.io.bounds import Bound, Choice, Name, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.files import HEAD, refuse_stand_in, stand_in

SETTINGS, LIST = 2**28, 2**31  # bytes of a file of settings (manifests, tokenizers), and of a list (LVIS has 1.1 GB)
LONGEST_LINE = 2**24  # characters of one line of JSONL
DEPTH = 64  # nesting depth of objects and lists
DIGITS = 300  # of a whole number; model_max_length of tokenizers has 31
ENTRIES = 2**20  # of one object or list of settings
HEADER, TENSORS, AXES = 2**25, 2**17, 32  # of a safetensors file: bytes of its header, tensors, axes of a tensor
_AGAIN = "fetch or copy the file again"
# An unpaired surrogate escape (or an escaped backslash before such letters, which the caller tells apart).
_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|"
    r"(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_LARGE = re.compile(r"[0-9](?:[eE]\+?[0-9]{3}|[0-9]{18})")  # a text without a match holds no large number


# Bytes and text


def read_bytes(path: str | Path, field: str = "", most: int = SETTINGS, fix: str = "check the path") -> bytes:
    """Return the content of an ordinary file of at most `most` bytes.

    Raises InputError, before anything is read, for a folder, pipe, device or placeholder file.
    """
    if paths.is_remote(path):
        return _read_object(paths.at(path), field, most, fix)
    refuse_special(path, field, most, fix)
    refuse_stand_in(path, field)
    try:
        with open(path, "rb") as file:
            return file.read(most + 1)[:most]
    except OSError as error:
        raise InputError(str(path), field, f"cannot be read ({error.strerror})", fix) from None


def _read_object(path: Path, field: str, most: int, fix: str) -> bytes:
    refuse_special(path, field, most, fix)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:  # any other error says nothing about the file
        raise InputError(str(path), field, f"cannot be read ({error.strerror})", fix) from None
    if placeholder := stand_in(data[:HEAD]):
        raise InputError(str(path), field, *placeholder)
    return data


def refuse_special(path: str | Path, field: str = "", most: int | None = None, fix: str = "check the path") -> int:
    """Return the size of an ordinary file. Raises InputError for anything else and for more than `most` bytes."""
    try:
        status = paths.at(path).stat() if paths.is_remote(path) else os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if paths.is_remote(path) and not isinstance(error, FileNotFoundError):
            raise
        raise InputError(str(path), field, f"cannot be read ({getattr(error, 'strerror', error)})", fix) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise InputError(str(path), field, f"is {kind}, not a file", "give a file")
    if most is not None and status.st_size > most:
        raise InputError(str(path), field, f"has {status.st_size:,} bytes, of at most {most:,}", _AGAIN)
    return status.st_size


def refuse_utf16(data: bytes, where: str) -> None:
    """Raise InputError for UTF-16 text, which some editors and shells write."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        raise InputError(where, "", "is UTF-16 text", "save it as UTF-8")


def text_of_bytes(data: bytes, where: str) -> str:
    """Decode UTF-8 text, without its byte order mark. Raises InputError that names the line, or UTF-16."""
    refuse_utf16(data, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}:{number}", "", "is not UTF-8 text", "save it as UTF-8") from None


def read_text(path: str | Path, field: str = "", most: int = LIST) -> str:
    """Return the text of a UTF-8 file, without its byte order mark. Raises InputError."""
    return text_of_bytes(read_bytes(path, field, most), str(path))


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {repeated!r:.60} comes twice in one object")
    return result


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text:.20} is too large for a number")
    return number


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits, of at most {DIGITS}")
    return int(text)


# Keys: (NaN and Infinity are accepted, a number may be large). Numbers are checked one by one only where needed.
_DECODERS = {
    (constants, large): json.JSONDecoder(
        object_pairs_hook=_object,
        parse_constant=None if constants else _refused,
        parse_float=_finite if large and not constants else None,
        parse_int=_whole if large else None,
    )
    for constants in (False, True)
    for large in (False, True)
}


def strict_json(text: str, constants: bool = False) -> Any:
    """Parse a JSON text. constants: also accept NaN, Infinity and 1e400, which JSON does not have.

    Raises ValueError also where a value could be misread or could not be written again: a key that occurs twice in an
    object, an unpaired surrogate, a whole number that no float holds, and nesting deeper than DEPTH.
    """
    try:
        value = _DECODERS[constants, _LARGE.search(text) is not None].decode(text)
        if "\\u" in text and _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > DEPTH and _too_deep(value):
            raise RecursionError
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("brackets too deep") from None
    except MemoryError:
        raise ValueError("does not fit into memory") from None
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def json_line(line: str, where: str, constants: bool = False) -> Any:
    """Parse the JSON value of one line. Raises InputError naming `where` (file:line)."""
    fix = "write one JSON object per line"
    if len(line) > LONGEST_LINE or line.startswith("\0"):
        if line.startswith("\0"):
            raise InputError(where, "", "holds zeros, as a power cut leaves them", "copy the file again")
        raise InputError(where, "", f"is a line of {len(line) >> 20} MB, of at most {LONGEST_LINE >> 20}", fix)
    try:
        return strict_json(line, constants)
    except json.JSONDecodeError as error:
        raise InputError(where, "", f"not valid JSON ({error.msg})", fix) from None
    except ValueError as error:  # also for numbers of thousands of digits
        raise InputError(where, "", f"not readable JSON ({str(error):.100})", fix) from None


def read_lines(path: str | Path, schema: Any, constants: bool = False) -> Iterator[Any]:
    """Yield the checked values of the lines of a JSONL file. Raises InputError naming the line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            value = json_line(line, f"{path}:{number}", constants)
            check(value, schema, f"{path}:{number}")
            yield value


def stream_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of a JSONL file of any size, one line in memory at a time. Raises InputError."""
    refuse_special(path)
    with paths.at(path).open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            yield f"{path}:{number}", text_of_bytes(line, f"{path}:{number}")


def read_json(path: str | Path, schema: Any = None, field: str = "", fix: str = _AGAIN, constants: bool = False) -> Any:
    """Return the value of a JSON file, checked against `schema` (see `check`; None: any object). Raises InputError."""
    try:
        value = strict_json(read_text(path, field, SETTINGS), constants)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(path), field, f"not valid JSON ({str(error):.200})", fix) from None
    if not isinstance(value, dict) and (schema is None or isinstance(schema, Mapping)):
        raise InputError(str(path), field, "is no JSON object", fix)
    if schema is not None:
        check(value, schema, str(path))
    return value


# Schemas


class Each(NamedTuple):
    """Schema of an object of `least` to `most` fields with arbitrary keys: a bound for keys and a schema for values."""

    key: Bound
    value: Any
    least: int = 0
    most: int = ENTRIES


class Null(NamedTuple):
    """Schema of a value that may be null."""

    schema: Any


@dataclasses.dataclass(frozen=True)
class Either(Bound):
    """A value that satisfies any of several bounds."""

    bounds: tuple[Bound, ...]

    @property
    def wanted(self) -> str:
        """Describe the alternatives."""
        return " or ".join(bound.wanted for bound in self.bounds)

    def fits(self, value: Any) -> bool:
        """Return whether any of the bounds allows `value`."""
        return any(bound.fits(value) for bound in self.bounds)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def check(value: Any, schema: Any, where: str, at: str = "") -> None:
    """Raise InputError naming the file and the first field of `value` that violates the schema.

    A schema is a Bound; a dict, for an object with these fields (keys ending in `?` are optional) and perhaps others; a
    list of one schema, for a list of any length; a tuple, for a list of exactly these; an `Each`; or a `Null`.
    """

    def refuse(problem: str, must_be: str) -> InputError:
        return InputError(where, at, problem, f"must be {must_be}")

    if isinstance(schema, Null):
        if value is not None:
            check(value, schema.schema, where, at)
    elif isinstance(schema, Bound):
        if problem := schema.problem(value):
            raise InputError(where, at, f"is {_short.repr(value)}", problem)
    elif isinstance(schema, Each):
        if not isinstance(value, dict) or not schema.least <= len(value) <= schema.most:
            count = f"has {len(value)} fields" if isinstance(value, dict) else f"is {_short.repr(value)}"
            raise refuse(count, f"an object of {schema.least} to {schema.most} fields")
        for key, inner in value.items():
            check(key, schema.key, where, at)
            check(inner, schema.value, where, f"{at}.{key:.60}".lstrip("."))
    elif isinstance(schema, Mapping):
        if not isinstance(value, dict):
            raise refuse(f"is {_short.repr(value)}", "an object")
        for key, inner in schema.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, where, f"{at}.{name}".lstrip("."))
            elif name == key:
                fix = f"the file is damaged or another one: {_AGAIN}"
                raise InputError(where, f"{at}.{name}".lstrip("."), "is missing", fix)
    elif (
        not isinstance(value, list) or len(value) > ENTRIES or (isinstance(schema, tuple) and len(value) != len(schema))
    ):
        must_be = f"a list of {len(schema)}" if isinstance(schema, tuple) else f"a list of at most {ENTRIES}"
        raise refuse(f"is {_short.repr(value)}", must_be)
    else:
        for number, inner in enumerate(value):
            check(inner, schema[number if isinstance(schema, tuple) else 0], where, f"{at}[{number}]")


# Weights

SAFETENSORS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}  # dtype -> bytes per element
_OFFSET = Whole(0, 2**63 - 1)
_TENSOR = {"dtype": Choice(tuple(SAFETENSORS)), "shape": [_OFFSET], "data_offsets": (_OFFSET, _OFFSET)}
INDEX = {"weight_map": Each(Text(1, 1000), Name(), least=1)}


def safetensors_header(path: str | Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Return ({name: {"dtype", "shape", "data_offsets"}}, metadata, offset of the data) of a safetensors file.

    Raises InputError unless the tensors are contiguous, fill the file and have the bytes of their shapes.
    """
    fix = "fetch the file again, or give a directory that holds the whole model"

    def refuse(problem: str) -> InputError:
        return InputError(str(path), "", f"it cannot be read as safetensors ({problem})", fix)

    size = refuse_special(path)
    refuse_stand_in(path)
    try:
        with paths.at(path).open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size - 8:
                raise refuse("its header is longer than the file")
            if length > HEADER:
                raise refuse(f"its header has {length:,} bytes, of at most {HEADER:,}")
            data = file.read(length)
            if data.count(b"{") > TENSORS + 2:
                raise refuse(f"its header holds more than {TENSORS:,} tensors")
            header = strict_json(data.decode())
    except struct.error:
        raise refuse("it has less than 8 bytes") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise refuse(f"{str(error):.200}") from None
    check(header, Each(Text(0, 2**12), {}, most=TENSORS), str(path))
    metadata = header.pop("__metadata__", {})
    check(metadata, Each(Text(), Text(0, 2**24)), str(path), "__metadata__")
    for name, tensor in header.items():
        if isinstance(tensor.get("shape"), list) and len(tensor["shape"]) > AXES:
            raise InputError(str(path), f"{name:.60}.shape", f"has {len(tensor['shape'])} axes, of at most {AXES}", fix)
        check(tensor, _TENSOR, str(path), f"{name:.60}")
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = tensor["data_offsets"]
        if not first <= last <= size - 8 - length:
            raise refuse(f"the record {name!r:.60} ends after the file")
        if first != end:
            raise refuse(f"the record {name!r:.60} begins at {first}, where the one before ends at {end}")
        if last - first != math.prod(tensor["shape"]) * SAFETENSORS[tensor["dtype"]]:
            raise refuse(f"the record {name!r:.60} has {last - first} bytes for shape {_short.repr(tensor['shape'])}")
        end = last
    if end != size - 8 - length:
        raise refuse(f"{size - 8 - length - end} bytes behind the last record belong to none")
    return header, metadata, 8 + length


def shard_index(path: Path) -> dict[str, str]:
    """Return {tensor name: name of its file} of a shard index.

    Raises InputError for a file outside the folder of the index. Links may point into it or into the `blobs` of the
    same Hugging Face cache.
    """
    files: dict[str, str] = read_json(path, INDEX)["weight_map"]
    for name in sorted(set(files.values())):
        refuse_special(path.parent / name, "weight_map")
        real, folder = paths.at(paths.real(path.parent / name)).parent, paths.at(paths.real(path.parent))
        if real != folder and not (folder.parent.name == "snapshots" and real == folder.parent.parent / "blobs"):
            raise InputError(str(path), "weight_map", f"{name} is a link out of the folder", "put the file there")
    return files
