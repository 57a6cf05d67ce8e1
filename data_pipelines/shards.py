"""A prepared root: the Examples of a data root as text, and their media decoded in ArrayRecord shards.

    prepared.json                                   settings, shards, lists and index with checksums, versions, and its
                                                    own checksum; written last
    index.bin                                       the place of every medium (`PLACE`), sorted by the hash of its key
    examples/<dataset>-<split>-<variant>.jsonl      the result of `datasets.records`, errors included; for a root of
                                                    <split>.jsonl, those files
    {frames,sounds,masks}/                          each a TFDS dataset: features.json, dataset_info.json,
        <kind>-<list>.array_record-0000i-of-0000n   one record per medium, in the splits of TFDS; <record>.json beside
                                                    each shard names its sources

`prepare` writes it. A record is a tf.train.Example, so that TFDS and Grain read the shards too; here it is parsed
without a copy. An uncompressed record is read directly from its place in the file, because ArrayRecord's reader copies
it four times.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from crab_jax.io import paths
from crab_jax.io.bounds import Choice, Flag, Inside, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.structured import Each, check, json_line, read_json, stream_lines, strict_json
from data_pipelines import allocator, fbank, media
from data_pipelines.examples import Example, from_json, seg_source, to_json
from data_pipelines.sources.release import Found, MissingFile

FORMAT = 3
COUNTED = 2  # the previous format, with the clock "counted" only; still readable
MANIFEST, PLAN, INDEX = "prepared.json", "plan.json", "index.bin"
SUMS, SUM = (
    "sums",
    "sum",
)  # fields of prepared.json: hashes of index and lists by file; hash of prepared.json without this field
KINDS = ("frames", "sounds", "masks")
# at, length, sum: place in the file and `checksum` of a record that `read_at` can read; otherwise at is 0.
PLACE = np.dtype([("key", "<u8"), ("shard", "<u4"), ("row", "<u4"), ("at", "<u8"), ("length", "<u8"), ("sum", "<u8")])
BLOCK, BLOCK_HEADER = (
    1 << 16,
    24,
)  # bytes; ArrayRecord files are Riegeli files, in which every block begins with a header
LARGEST = 500 * BLOCK  # bytes that `read_at` can read: each block takes two of preadv's 1,024 buffers
CACHE_SHARDS = "CRAB_JAX_CACHE_SHARDS"  # environment variable: fetch shards of buckets whole, once, into the cache
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access


class Decoding(NamedTuple):
    """The settings that determine the arrays of a medium.

    image_size: pixels of a side. video_frames: frames taken from a video. pad_short_audio: accept audio windows shorter
    than 175 ms. clock: how frames and sound are placed, see `Compat`.
    """

    image_size: int
    video_frames: int
    pad_short_audio: bool
    clock: str = "shown"


_COUNT = Whole(0, 2**48)
SHARD = {"file": Inside(), "records": _COUNT, "bytes": _COUNT, "sha256": Text(64, 64)}
DECODING = {
    "image_size": Whole(1, 2**15),
    "video_frames": Whole(1, 1024),
    "pad_short_audio": Flag(),
    "clock?": Choice(("shown", "counted")),
}
MANIFEST_SCHEMA = {
    "format": Whole(),
    "records": _COUNT,
    "shards": [SHARD],
    "variants": [Choice(("train", "test", "quick"))],
    "decoding": DECODING,
    "datasets": Each(Text(1, 100), Each(Text(1, 100), Whole())),
}
ERROR = {"where": Text(), "field": Text(), "problem": Text(), "fix": Text(), "missing": Flag()}  # see `error_json`


class Medium(NamedTuple):
    """One thing that is decoded once.

    detail: video or picture for frames; the windows of a sound; the mask_kind of a mask. beside: the video whose length
    a sound file takes, "" for any other medium.
    """

    kind: str
    path: str
    detail: str
    beside: str = ""

    def key(self) -> int:
        """Return a 64-bit hash."""
        text = "\0".join(self if self.beside else self[:3])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def beside(sound: str, video: str | None, decoding: Decoding) -> str:
    """Return the `Medium.beside` of the sound of an Example with this `video`."""
    return video if video and decoding.clock == "shown" and not media.is_own(sound, video) else ""


def all_windows(windows: str) -> str:
    """Return the policy whose windows include that of a single-window policy."""
    return {"one": "ten", "one_of_five": "five"}.get(windows, windows)


# Records: hand-written encoding of tf.train.Example, which is protobuf of four nested messages.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _message(number: int, *parts: bytes) -> list[bytes]:
    """Return the encoding of field `number` with the bytes of `parts`."""
    return [_varint(number << 3 | 2), _varint(sum(map(len, parts))), *parts]


def encode(record: Mapping[str, str | bytes | int]) -> bytes:
    """Return the tf.train.Example of a record: text and bytes as bytes_list, whole numbers >= 0 as int64_list."""
    features: list[bytes] = []
    for name, value in record.items():
        if isinstance(value, int):
            feature = _message(3, *_message(1, _varint(value)))
        else:
            feature = _message(1, *_message(1, value.encode() if isinstance(value, str) else value))
        features += _message(1, *_message(1, name.encode()), *_message(2, *feature))
    return b"".join(_message(1, *features))


def _content(data: memoryview, at: int) -> tuple[int, int]:
    """Return (start, end) of the content of the field at `at`, which has a tag of one byte and a length."""
    length, start = _read_varint(data, at + 1)
    return start, start + length


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = data[at] & 127, 7
    while data[at] > 127:
        at += 1
        value |= (data[at] & 127) << shift
        shift += 7
    return value, at + 1


def decode(data: bytes | memoryview) -> dict[str, Any]:
    """Parse a record: name -> int, or a memoryview into `data`; the inverse of `encode`.

    Raises ValueError or IndexError.
    """
    record: dict[str, Any] = {}
    view = memoryview(data)
    at, whole = _content(view, 0)
    while at < whole:
        entry, end = _content(view, at)
        name, feature = _content(view, entry)
        values, in_feature = _content(view, feature)
        kind = view[values] >> 3
        value, in_values = _content(view, values)
        start, in_value = _content(view, value)
        if not in_value == in_values == in_feature == end <= whole == len(view):
            raise ValueError("not a record")
        record[str(view[name:feature], "utf-8")] = _read_varint(view, start)[0] if kind == 3 else view[start:end]
        at = end
    if at != len(view):
        raise ValueError("not a record")
    return record


def read_at(file: io.FileIO, at: int, length: int) -> memoryview:
    """Read `length` bytes of a Riegeli file from `at` on, without the headers of its blocks; fewer at its end."""
    data, header = np.empty(length, np.uint8).data, memoryview(bytearray(BLOCK_HEADER))
    ends = [*range(BLOCK - at % BLOCK, length, BLOCK - BLOCK_HEADER), length]
    pieces = [piece for start, end in itertools.pairwise([0, *ends]) for piece in (data[start:end], header)]
    read = os.preadv(file.fileno(), pieces[:-1], at)
    return data[: max(0, read - BLOCK_HEADER * (len(ends) - 1))]


def headers_in(at: int, length: int) -> int:
    """Return the bytes of headers of blocks between the `length` bytes of a Riegeli file from `at` on."""
    return BLOCK_HEADER * -(min(0, BLOCK - at % BLOCK - length) // (BLOCK - BLOCK_HEADER))


def without_headers(data: bytes, at: int, length: int) -> bytes:
    """Return the first `length` bytes of a part of a Riegeli file that begins `at`, without the headers of blocks."""
    first = BLOCK - at % BLOCK  # where the next block begins
    later = (data[start + BLOCK_HEADER : start + BLOCK] for start in range(first, len(data), BLOCK))
    return b"".join((data[:first], *later))[:length]


def checksum(data: bytes | memoryview) -> int:
    """Return the sum, modulo 2**64, of a record's 64-bit words and its remaining bytes."""
    whole = len(data) // 8 * 8
    words = np.frombuffer(data, np.uint64, whole // 8)
    return (int(words.sum()) + int.from_bytes(bytes(data[whole:]), "little")) % 2**64


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as text, as the manifest has it of each shard. Raises OSError."""
    with paths.local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sum(path: Path) -> str:
    """Return a hash of a file, which is read in pieces. Raises InputError."""
    try:
        with paths.local(path).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise InputError(str(path), "", f"cannot be read ({error.strerror})", "run prepare again") from None


def sum_of(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a prepared.json without the field that holds this hash."""
    text = json.dumps({name: value for name, value in manifest.items() if name != SUM}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Errors as text


def error_json(error: InputError) -> dict[str, Any]:
    """Return an InputError as a JSON object."""
    return {
        "where": error.where,
        "field": error.field,
        "problem": error.problem,
        "fix": error.fix,
        "missing": isinstance(error, MissingFile),
    }


def error_of(record: Mapping[str, Any], field: str | None = None) -> InputError:
    """Return the InputError of a JSON object; `field` replaces its field."""
    kind = MissingFile if record["missing"] else InputError
    return kind(record["where"], field or record["field"], record["problem"], record["fix"])


def found_json(found: Found, whole: bool = False) -> str:
    """Return one line of a list of Examples. whole: the error concerns the annotations as a whole."""
    record = {"error": error_json(found), "whole": whole} if isinstance(found, InputError) else to_json(found)
    return json.dumps(record, ensure_ascii=False) + "\n"


# Reading


class Shards:
    """A prepared root, open for reading; the methods up to `mask` are those of `decoded.Files`.

    Shards are opened when first read and stay open. Threads may share the object.
    """

    def __init__(self, root: str | Path):
        allocator.keep_freed()
        self.root = paths.at(root)
        self.manifest = read_json(self.root / MANIFEST, {"format": Whole()}, fix="run prepare again")
        if self.manifest.get("format") not in (FORMAT, COUNTED):
            raise InputError(
                str(self.root / MANIFEST),
                "format",
                f"is {self.manifest.get('format')!r}, not {FORMAT}",
                "prepare the data again with this version",
            )
        if self.manifest.get(SUM, sum_of(self.manifest)) != sum_of(self.manifest):
            raise InputError(
                str(self.root / MANIFEST),
                SUM,
                "does not match the content; the file is damaged",
                "run prepare again with the same options",
            )
        check(self.manifest, MANIFEST_SCHEMA, str(self.root / MANIFEST))
        self.decoding = Decoding(
            **{
                "clock": "counted",
                **{field: value for field, value in self.manifest["decoding"].items() if field in Decoding._fields},
            }
        )
        self._warned = False
        self.shards: list[dict[str, Any]] = self.manifest["shards"]
        for shard in self.shards if not paths.is_remote(self.root) else ():  # one request each in a bucket
            _check_size(self.root / shard["file"], shard["bytes"])
        places = self.manifest["records"]
        _check_size(self.root / INDEX, places * PLACE.itemsize)
        self.check_file(INDEX)
        self._places = np.asarray(
            np.memmap(paths.local(self.root / INDEX), PLACE, "r") if places else np.zeros(0, PLACE)
        )
        if places and self._places["shard"].max() >= len(self.shards):
            raise _damaged(self.root / INDEX, f"names a shard that {MANIFEST} does not have")
        self._keys = np.ascontiguousarray(self._places["key"])  # searchsorted would copy them at every look-up
        self._readers: dict[int, Any] = {}
        self._files: dict[int, io.FileIO] = {}
        self._by_ranges = paths.is_remote(self.root) and not os.environ.get(CACHE_SHARDS)
        self._lock = threading.Lock()

    def check(self, decoding: Decoding) -> None:
        """Raise InputError naming the first setting of `decoding` that differs from that of the shards.

        A root of an older format has no clock; this is a warning, printed once.
        """
        for field, prepared, wanted in zip(Decoding._fields, self.decoding, decoding, strict=True):
            if field == "clock" and prepared != wanted and self.manifest["format"] == COUNTED:
                self._tell_age()
            elif prepared != wanted:
                raise InputError(
                    str(self.root),
                    field,
                    f"was prepared with {prepared}, but {wanted} is asked for",
                    f"prepare it again with --{field.replace('_', '-')}, or read the raw data",
                )

    def check_file(self, name: str) -> None:
        """Raise InputError if the index or a list of Examples has changed. Older roots have no checksums."""
        kept = self.manifest.get(SUMS, {}).get(name)
        if kept is not None and kept != file_sum(self.root / name):
            raise InputError(
                str(self.root / name),
                "",
                "is not what prepare wrote; it is damaged",
                "run prepare again with the same options: it rewrites lists and index",
            )

    def _tell_age(self) -> None:
        if not self._warned:
            print(
                f"warning: {self.root} was prepared by an older version, which counts frames and takes sound from "
                "its first sample: prepare it again if frame rates vary, or if sound does not start and end with the "
                "pictures",
                file=sys.stderr,
            )
        self._warned = True

    def video(self, path: str) -> np.ndarray:
        """Return the frames of a video; see `decoded.Files`."""
        return self._pixels(self._record(Medium("frames", path, "video"), "video"))

    def video_size(self, path: str) -> tuple[int, int]:
        """Return the (width, height) of the video itself."""
        return _size(self._record(Medium("frames", path, "video"), "video"))

    def picture(self, path: str, field: str) -> np.ndarray:
        """Return a picture; see `decoded.Files`."""
        picture: np.ndarray = self._pixels(self._record(Medium("frames", path, "picture"), field))[0]
        return picture

    def picture_size(self, path: str, field: str) -> tuple[int, int]:
        """Return the (width, height) of the picture itself."""
        return _size(self._record(Medium("frames", path, "picture"), field))

    def sound(self, path: str, windows: str, second: int | None, video: str | None = None) -> np.ndarray:
        """Return the filter banks of the audio windows of a clip; see `decoded.Files`."""
        policy, short = all_windows(windows), self.decoding.pad_short_audio
        record = self._sound(path, windows, video)
        fbank.check_windows(record["samples"], windows, second, str(self.root / path), short)
        bands = np.frombuffer(record["fbank"], np.float32)
        bands = bands.reshape(fbank.WINDOW_COUNT[policy], fbank.WINDOW_FRAMES[policy], fbank.MEL_BINS)
        return bands if policy == windows or second is None else bands[second : second + 1]

    def seconds(self, path: str, windows: str, video: str | None = None) -> float:
        """Return the length of a sound in seconds."""
        seconds: float = self._sound(path, windows, video)["samples"] / fbank.SAMPLE_RATE
        return seconds

    def _sound(self, path: str, windows: str, video: str | None) -> dict[str, Any]:
        medium = Medium("sounds", path, all_windows(windows), beside(path, video, self.decoding))
        return self._record(medium, "audio")

    def mask(self, path: str, kind: str, size: int, picture: tuple[int, int] | None = None) -> np.ndarray:
        """Return a ground-truth mask; see `decoded.Files`."""
        if path.startswith(media.INLINE_MASK):
            return media.read_mask(path, size, kind, picture)
        record = self._record(Medium("masks", path, kind), "mask")
        media.check_size(_size(record), picture, str(self.root / path))
        if size == self.decoding.image_size:
            return np.frombuffer(record["labels"], np.uint8).reshape(size, size).astype(np.int32)
        return media.read_mask(path, size, kind, picture, content=bytes(record["content"]))

    def mask_size(self, path: str, kind: str) -> tuple[int, int]:
        """Return the (width, height) of a mask itself."""
        return _size(self._record(Medium("masks", path, kind), "mask"))

    def has(self, name: str, split: str | None = None) -> bool:
        """Return whether a dataset (or its split) is here."""
        splits = self.manifest["datasets"].get(name, {})
        return bool(splits) if split is None else split in splits

    def digest(self, names: Iterable[str], split: str) -> str:
        """Return a hash of the media decoded for one split of some datasets (name "": a `<split>.jsonl`)."""
        titles = {f"{name}_{split}" if name else split for name in names}
        decoded_shards = sorted(
            (shard["file"], shard["sha256"])
            for shard in self.shards
            if shard["file"].partition("/")[2].partition("-")[2].partition(".")[0] in titles
        )
        return hashlib.blake2b(json.dumps([self.decoding, decoded_shards]).encode(), digest_size=16).hexdigest()

    def records(self, name: str, split: str, variant: str) -> Iterator[Found]:
        """Yield the same as `datasets.records` for the original root. Raises InputError."""
        if not self.has(name, split) or variant not in self.manifest["variants"]:
            field, value = ("variant", variant) if self.has(name, split) else ("datasets", f"{name} {split}")
            fix = f"run prepare with it into {self.root}, or read the raw data"
            raise InputError(str(self.root), field, f"was prepared without {value}", fix)
        path = self.root / examples_file(name, split, variant)
        if not path.is_file():
            raise InputError(str(path), "", "no such file", "run prepare again")
        self.check_file(examples_file(name, split, variant))
        for where, line in stream_lines(path):
            record = json_line(line, where)
            if not isinstance(record, dict) or "error" not in record:
                yield from_json(record, where)
                continue
            check(record, {"error": ERROR, "whole": Flag()}, where)
            if record["whole"]:
                raise error_of(record["error"])
            yield error_of(record["error"])

    def _pixels(self, record: Mapping[str, Any]) -> np.ndarray:
        size = self.decoding.image_size
        return np.frombuffer(record["pixels"], np.uint8).reshape(-1, size, size, 3)

    def _record(self, medium: Medium, field: str) -> dict[str, Any]:
        """Return the record of a medium. Raises the InputError of its decoding, or one that names a damaged shard."""
        key = np.uint64(medium.key())
        position = np.searchsorted(self._keys, key)
        if position == len(self._keys) or self._keys[position] != key:
            raise InputError(
                str(self.root),
                field,
                f"{medium.path} ({medium.detail}) is not among what was prepared",
                "run prepare again with the same options; it adds what is new",
            )
        _, number, row, at, length, total = self._places[position].item()
        try:
            data = self._read(number, at, length) if at else self._reader(number).read([row])[0]
            record = decode(data)
            if at and checksum(data) != total:
                raise ValueError
            if str(record["path"], "utf-8") != medium.path:
                raise ValueError
        except (ValueError, IndexError, KeyError, RuntimeError, OSError) as error:
            raise _damaged(self.root / self.shards[number]["file"], f"record {row} cannot be read") from error
        if len(record["error"]):
            raise error_of(strict_json(bytes(record["error"]).decode()), field)
        return record

    def first(self, number: int) -> dict[str, Any]:
        """Return the first record of a shard, as it is stored."""
        return decode(self._reader(number).read([0])[0])

    def _read(self, number: int, at: int, length: int) -> bytes | memoryview:
        if not self._by_ranges:
            return read_at(self._file(number), at, length)
        path = paths.in_bucket(self.root / self.shards[number]["file"])
        return without_headers(path.read_range(at, length + headers_in(at, length)), at, length)

    def _reader(self, number: int) -> Any:
        with self._lock:
            if number not in self._readers:
                path = str(paths.local(self.root / self.shards[number]["file"]))
                self._readers[number] = array_record_module.ArrayRecordReader(path, READER_OPTIONS)
            return self._readers[number]

    def _file(self, number: int) -> io.FileIO:
        with self._lock:
            if number not in self._files:
                self._files[number] = io.FileIO(paths.local(self.root / self.shards[number]["file"]))
            return self._files[number]


def _unfinished(root: str | Path) -> InputError:
    return InputError(
        str(root),
        "",
        "is not completely prepared",
        "run prepare again with the same options; it goes on where it stopped",
    )


def _size(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["width"], record["height"]


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(
        str(path),
        "",
        f"{problem}; the shard is damaged",
        "run prepare again with the same options: it rewrites damaged shards",
    )


def _check_size(path: Path, size: int) -> None:
    stored = path.stat().st_size if path.is_file() else None
    if stored != size:
        raise _damaged(path, "is missing" if stored is None else f"holds {stored} of {size} bytes")


def examples_file(name: str, split: str, variant: str) -> str:
    """Return the list of Examples of one split of a dataset, relative to the prepared root."""
    return f"examples/{name}-{split}-{variant}.jsonl"


def opened(root: str | Path) -> Shards | None:
    """Return the prepared root `root`; None for any other folder. Raises InputError if it is unfinished or damaged."""
    if paths.is_remote(root):
        return _opened_in_bucket(str(root), os.getpid())
    path = os.path.abspath(root)
    try:
        stamp = os.stat(os.path.join(path, MANIFEST)).st_mtime_ns
    except OSError:
        if os.path.isfile(os.path.join(path, PLAN)):
            raise _unfinished(root) from None
        return None
    return _opened(path, stamp)


@functools.lru_cache(maxsize=64)
def _opened_in_bucket(root: str, process: int) -> Shards | None:
    """Return the prepared root in a bucket, looked for once by a process; None for any other folder."""
    if not (paths.at(root) / MANIFEST).is_file():
        if (paths.at(root) / PLAN).is_file():
            raise _unfinished(root)
        return None
    return Shards(root)


@functools.lru_cache(maxsize=64)
def _opened(root: str, stamp: int) -> Shards:
    return Shards(root)


def media_of(example: Example, decoding: Decoding) -> Iterator[Medium]:
    """Yield the media that `batching.load` and the metrics read for an Example, in the order of reading."""
    names, taken = example.frames, min(decoding.video_frames, len(example.frames))
    if example.video:
        yield Medium("frames", example.video, "video")
    for number in media.frame_numbers(len(names), taken):
        yield Medium("frames", names[number], "picture")
    if example.image:
        yield Medium("frames", example.image, "picture")
    if example.mask_kind != "none" and (found := seg_source(example)) and found[0] != "video":
        yield Medium("frames", found[1], "picture")
    if example.windows != "none" and (sound := example.audio or example.video):
        yield Medium("sounds", sound, all_windows(example.windows), beside(sound, example.video, decoding))
    if example.mask and not example.mask.startswith(media.INLINE_MASK):
        yield Medium("masks", example.mask, example.mask_kind)
