"""Decode a data root once: write its media as shards that train and evaluate read instead of the files.

    python -m data_pipelines prepare --root DATA --out PREPARED --datasets ave,avqa --workers 8

PREPARED then replaces DATA (`--data`, `data.root`) and gives the same batches, many times faster, for any tokenizer and
prompt variant, with muted and blanked inputs too. A medium that several Examples use is stored once. An interrupted run
continues when it is started again; more --datasets and --splits may be added later. Media that cannot be decoded are
listed at the end, and give the same error when they are read. The shards are TFDS datasets as well; see
docs/datasets.md.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from array_record.python import array_record_module

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Text, Whole, Words
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import need_room, whole, write_whole
from crab_jax.io.locks import LOCK, locked
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.io.structured import read_json, strict_json
from crab_jax.tasks import add_flag, use_tasks
from data_pipelines import datasets, fbank, media, shards
from data_pipelines.decoded import Files, inside
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.isolated import end_with_parent
from data_pipelines.shards import KINDS, MANIFEST, PLACE, PLAN, Decoding, Medium
from data_pipelines.sources.release import Found

LIBRARIES = ("av", "soundfile", "soxr", "pillow", "numpy", "array_record", "crab_jax")
COMPRESSED, UNCOMPRESSED = "zstd:1", "uncompressed"
DECODABLE = 0.8  # assumed share of decodable media; others take no room
_HEAD = 64  # bytes of a record by which it is located in its shard


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a prepared root. An existing root cannot be given others."""

    root: str
    decoding: Decoding
    variants: tuple[str, ...]
    shard_bytes: int
    compress: bool = False

    def compression(self, kind: str) -> str:
        """Return the compression of the records of a kind.

        Masks shrink to nearly nothing. Sound hardly compresses (2 % smaller, four times slower to read). Pixels lie in
        between and then take about twice as long to read.
        """
        return COMPRESSED if kind == "masks" or kind == "frames" and self.compress else UNCOMPRESSED

    def as_json(self) -> dict[str, Any]:
        """Return the settings as written in plan.json."""
        return {
            "root": self.root,
            **self.decoding._asdict(),
            "variants": list(self.variants),
            "shard_bytes": self.shard_bytes,
            "compress": self.compress,
        }


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard to write.

    file: relative to the root. stamps: (size, time in ns) of the file of each medium, and of the one that it is beside.
    """

    file: str
    media: tuple[Medium, ...]
    stamps: tuple[tuple[int, ...], ...]

    def digest(self, settings: Settings) -> str:
        """Return a hash of everything that determines the shard's content."""
        text = json.dumps([shards.FORMAT, settings.decoding, self.media, self.stamps])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# The lists and shards to write


def lists_of(root: Path, names: Sequence[str], splits: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (dataset, split) of every requested list of Examples; the dataset is "" for a `<split>.jsonl`.

    Raises InputError.
    """
    lists: list[tuple[str, str]] = []
    for split in splits:
        if datasets.list_of(root, split):
            lists.append(("", split))
    if lists and names:
        raise InputError(
            str(root),
            "--datasets",
            f"the root has {lists[0][1]}.jsonl, which then is all that is read",
            "leave --datasets out",
        )
    if not lists:
        lists = [
            (name, split)
            for name in datasets.choose(root, names)
            for split in splits
            if split in datasets.DATASETS[name].sizes
        ]
    if not lists:
        raise InputError(str(root), "--splits", f"holds none of {', '.join(splits)}", "check --root and --splits")
    return lists


def read_list(settings: Settings, out: Path, name: str, split: str) -> tuple[int, dict[Medium, None]]:
    """Write one list of Examples into `out`; return their number and the media that they need."""
    needed: dict[Medium, None] = {}
    if not name:
        examples = datasets.read_jsonl(settings.root, split)
        write_jsonl(out / f"{split}.jsonl", examples)
        for example in examples:
            needed.update(dict.fromkeys(shards.media_of(example, settings.decoding)))
        return len(examples), needed
    count = 0
    for variant in settings.variants:
        lines = []
        for found, of_all in _found(settings.root, name, split, variant):
            lines.append(shards.found_json(found, of_all))
            if isinstance(found, Example):
                count += variant == settings.variants[0]
                needed.update(dict.fromkeys(shards.media_of(found, settings.decoding)))
        write_whole(out / shards.examples_file(name, split, variant), "".join(lines))
    return count, needed


def _found(root: str, name: str, split: str, variant: str) -> Iterator[tuple[Found, bool]]:
    """Yield the result of `datasets.records`, and last the error of the annotations as a whole, if any."""
    try:
        for found in datasets.records(root, name, split, variant):
            yield found, False
    except InputError as error:
        yield error, True


def cut(kind: str, name: str, needed: Sequence[Medium], settings: Settings) -> list[Shard]:
    """Return the shards of one kind of one list, each with as many media as fill `shard_bytes` before compression."""
    groups: list[list[Medium]] = []
    room = 0
    for medium in needed:
        size = _bytes_of(medium, settings.decoding)
        if room < size:
            groups.append([])
            room = settings.shard_bytes
        groups[-1].append(medium)
        room -= size
    stem = f"{kind}/{kind}-{name}.array_record"
    return [
        Shard(
            f"{stem}-{number:05d}-of-{len(groups):05d}",
            tuple(group),
            tuple(_stamps(paths.at(settings.root), medium) for medium in group),
        )
        for number, group in enumerate(groups)
    ]


def _bytes_of(medium: Medium, decoding: Decoding) -> int:
    """Return the approximate size of a record before compression."""
    square = decoding.image_size**2
    if medium.kind == "frames":
        return 3 * square * (decoding.video_frames if medium.detail == "video" else 1)
    if medium.kind == "masks":
        return square
    return 4 * fbank.MEL_BINS * fbank.WINDOW_COUNT[medium.detail] * fbank.WINDOW_FRAMES[medium.detail]


def _stamps(root: Path, medium: Medium) -> tuple[int, ...]:
    return _stamp(root / medium.path) + (_stamp(root / medium.beside) if medium.beside else ())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


# Decoding


def record_of(medium: Medium, stamp: tuple[int, ...], files: Files) -> dict[str, str | bytes | int]:
    """Return the record of a medium; for one that cannot be decoded, its error and no arrays."""
    record: dict[str, str | bytes | int] = {
        "path": medium.path,
        "detail": medium.detail,
        "beside": medium.beside,
        "error": "",
        "bytes": stamp[0],
        "mtime_ns": stamp[1],
    }
    try:
        return record | _DECODERS[medium.kind](medium, files)
    except InputError as error:
        numbers, arrays = _FIELDS[medium.kind]
        record["error"] = json.dumps(shards.error_json(error))
        return record | dict.fromkeys(numbers, 0) | dict.fromkeys(arrays, b"")


def _frames(medium: Medium, files: Files) -> dict[str, str | bytes | int]:
    path = medium.path
    if medium.detail == "video":
        pixels, (width, height) = files.video(path), files.video_size(path)
    else:
        pixels, (width, height) = files.picture(path, "image"), files.picture_size(path, "image")
    return {"pixels": pixels.tobytes(), "width": width, "height": height}


def _sound(medium: Medium, files: Files) -> dict[str, str | bytes | int]:
    """Return the filter banks of a sound; a sound that is too short has none, and reading it raises the error."""
    waveform, short = files.samples(medium.path, medium.beside or None), files.decoding.pad_short_audio
    try:
        bands = fbank.fbank(fbank.cut_windows(waveform, medium.detail, pad_short=short)).tobytes()
    except InputError:
        bands = b""
    return {"samples": len(waveform), "fbank": bands}


def _mask(medium: Medium, files: Files) -> dict[str, str | bytes | int]:
    """Return the class ids at the size of the model, and the file itself for the metrics at other sizes."""
    labels = files.mask(medium.path, medium.detail, files.decoding.image_size).astype(np.uint8)
    full = inside(files.root, medium.path)
    width, height = media.image_size(full, "mask")
    return {"labels": labels.tobytes(), "content": full.read_bytes(), "width": width, "height": height}


_DECODERS: dict[str, Callable[[Medium, Files], dict[str, str | bytes | int]]] = {
    "frames": _frames,
    "sounds": _sound,
    "masks": _mask,
}
# The fields of a record besides path, detail, beside, error, bytes and mtime_ns of the source: numbers, and arrays with
# their shapes and dtypes; S is image_size.
_FIELDS: dict[str, tuple[tuple[str, ...], dict[str, tuple[tuple[int | str | None, ...], type]]]] = {
    "frames": (("width", "height"), {"pixels": ((None, "S", "S", 3), np.uint8)}),
    "sounds": (("samples",), {"fbank": ((None, fbank.MEL_BINS), np.float32)}),
    "masks": (("width", "height"), {"labels": ((None, "S", "S"), np.uint8), "content": ((None,), np.uint8)}),
}
_counter: Any = None  # number of media decoded by all processes


def _begin_worker(counter: Any) -> None:
    global _counter
    end_with_parent()
    _counter = counter


def write_shard(settings: Settings, out: Path, shard: Shard) -> dict[str, Any]:
    """Write one shard atomically, with its note, and return the note."""
    with whole(out / shard.file) as partial:
        note = _write(settings, partial, shard)
    write_whole(_note(out / shard.file), json.dumps(note))
    return note


def _write(settings: Settings, partial: Path, shard: Shard) -> dict[str, Any]:
    """Write one shard to a file on this machine, and return its note."""
    files, compression = Files(settings.root, settings.decoding), settings.compression(shard.media[0].kind)
    writer = array_record_module.ArrayRecordWriter(str(partial), f"group_size:1,{compression}")
    failed, size, places = [], 0, []
    try:
        for medium, stamp in zip(shard.media, shard.stamps, strict=True):
            record = record_of(medium, stamp, Files(files.root, files.decoding))
            if record["error"]:
                failed.append(str(shards.error_of(strict_json(str(record["error"])))))
            data = shards.encode(record)
            size += len(data)
            places.append((data[:_HEAD], len(data), shards.checksum(data)))
            writer.write(data)
            if _counter is not None:
                with _counter.get_lock():
                    _counter.value += 1
    finally:
        writer.close()
    return {
        "file": shard.file,
        "records": len(shard.media),
        "bytes": partial.stat().st_size,
        "record_bytes": size,
        "sha256": _sha256(partial),
        "of": shard.digest(settings),
        "failed": failed,
        "places": _locate(partial, places) if compression == UNCOMPRESSED else [(0, 0, 0)] * len(places),
    }


def _locate(path: Path, written: Sequence[tuple[bytes, int, int]]) -> list[tuple[int, int, int]]:
    """Return (at, length, sum) of `shards.PLACE` for the records of a shard, given their (head, length, sum).

    at is 0 for a record that `shards.read_at` does not read correctly, as when a block begins in its head.
    """
    places, after = [], 0
    with io.FileIO(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for head, length, total in written:
            at = content.find(head, after)
            if at < 0 or length > shards.LARGEST or shards.checksum(shards.read_at(file, at, length)) != total:
                at = 0
            places.append((at, length, total))
            after = max(after, at + 1)
    return places


_PLACE = (Whole(0, 2**63), Whole(0, 2**63), Whole(0, 2**64 - 1))
NOTE = {**shards.SHARD, "record_bytes": Whole(0, 2**63), "of": Text(1, 200), "failed": [Text()], "places": [_PLACE]}


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished(settings: Settings, out: Path, shard: Shard) -> dict[str, Any] | None:
    """Return the note of an existing shard that is complete and up to date; None for any other."""
    path = out / shard.file
    try:
        note = read_json(_note(path), NOTE)
        same = note["of"] == shard.digest(settings) and path.stat().st_size == note["bytes"]
        # An object in a bucket is whole, and its server keeps it so: it is not fetched to be compared.
        return note if same and (paths.is_remote(path) or _sha256(path) == note["sha256"]) else None
    except (OSError, ValueError):  # includes InputError
        return None


# The whole root


def claim(out: Path, settings: Settings, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lists of an existing `out`, then the new ones of `wanted`, and write them to plan.json.

    Raises InputError when `out` was made with other settings, or holds something else.
    """
    plan = out / PLAN
    known: list[tuple[str, str]] = []
    if plan.is_file():
        old = read_json(plan, {"lists": [(Text(), Text(1))]}, fix="give an empty --out")
        known = [(name, split) for name, split in old.pop("lists")]
        current = settings.as_json()
        for field, value in old.items():
            if current.get(field) != value:
                raise InputError(
                    str(out),
                    field,
                    f"was prepared with {value!r:.60}, not {current.get(field)!r:.60}",
                    "use the same options, or another --out",
                )
    elif any(not path.name.startswith(LOCK) for path in out.iterdir()):
        raise InputError(str(out), "--out", "holds something that prepare did not write", "give an empty folder")
    lists = [*known, *(pair for pair in wanted if pair not in known)]
    write_whole(plan, json.dumps({**settings.as_json(), "lists": lists}, indent=1))
    return lists


def prepare(
    settings: Settings,
    out: Path,
    wanted: Sequence[tuple[str, str]],
    workers: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write or complete the prepared root `out`; return a line for every medium that could not be decoded.

    See the module's docstring.
    """
    lists = claim(out, settings, wanted)
    _leave_older_format(out)
    _remove_partial(out)
    counts: dict[str, dict[str, int]] = collections.defaultdict(dict)
    seen: dict[Medium, None] = {}
    todo: list[Shard] = []
    for name, split in lists:
        counts[name][split], needed = read_list(settings, out, name, split)
        new = [medium for medium in needed if medium not in seen]
        seen.update(needed)
        title = f"{name}_{split}" if name else split
        for kind in KINDS:
            todo += cut(kind, title, [medium for medium in new if medium.kind == kind], settings)
        progress(f"{title}: {counts[name][split]} examples, {len(new)} new media")
    notes = {shard.file: note for shard in todo if (note := finished(settings, out, shard))}
    if notes:
        progress(f"{len(notes)} of {len(todo)} shards exist already")
    left = [shard for shard in todo if shard.file not in notes]
    sizes = [
        _bytes_of(medium, settings.decoding)
        for shard in left
        for medium in shard.media
        if settings.compression(medium.kind) == UNCOMPRESSED
    ]
    need_room(out, int(DECODABLE * sum(sizes)), f"the media of {len(left)} shards")
    for note in _write_all(settings, out, left, workers, progress):
        notes[note["file"]] = note
    _finish(settings, out, counts, todo, [notes[shard.file] for shard in todo])
    return [line for note in notes.values() for line in note["failed"]]


def _leave_older_format(out: Path) -> None:
    """Remove the manifest of an older format, whose shards are all rewritten: until then nothing can be read."""
    manifest = out / MANIFEST
    with contextlib.suppress(OSError, ValueError):
        if read_json(manifest).get("format") != shards.FORMAT:
            manifest.unlink()


def _write_all(
    settings: Settings, out: Path, todo: Sequence[Shard], workers: int, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Yield the notes of all shards of `todo` as they are finished; without workers, write them in this process."""
    written = Progress("media", sum(len(shard.media) for shard in todo), progress)
    if not workers:
        for shard in todo:
            yield write_shard(settings, out, shard)
            written.add(len(shard.media))
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (counter,))
    try:
        waiting = {pool.submit(write_shard, settings, out, shard) for shard in todo}
        while waiting:
            ready, waiting = concurrent.futures.wait(waiting, 3, concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in ready)
            written.to(counter.value)
    except concurrent.futures.process.BrokenProcessPool:
        raise InputError(
            str(out),
            "--workers",
            "a decoding process was killed or crashed",
            "run validate to find the file, or use fewer workers if memory ran out",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(
    settings: Settings,
    out: Path,
    counts: dict[str, dict[str, int]],
    todo: Sequence[Shard],
    notes: Sequence[dict[str, Any]],
) -> None:
    """Write the index, the TFDS metadata and last the manifest; then remove shards of an older plan."""
    places = np.array(
        [
            (medium.key(), number, row, *place)
            for number, (shard, note) in enumerate(zip(todo, notes, strict=True))
            for row, (medium, place) in enumerate(zip(shard.media, note["places"], strict=True))
        ],
        PLACE,
    )
    places.sort(order="key")
    if len(places) and (places["key"][1:] == places["key"][:-1]).any():
        raise RuntimeError("two media have the same key")
    write_whole(out / shards.INDEX, places.tobytes())
    for kind in KINDS:
        describe(out / kind, kind, settings.decoding, [note for note in notes if note["file"].startswith(f"{kind}/")])
    kept = ("file", "records", "bytes", "sha256")
    manifest = {
        "format": shards.FORMAT,
        "root": settings.root,
        "decoding": settings.decoding._asdict(),
        "variants": list(settings.variants),
        "records": len(places),
        "lists": dict(counts.get("", {})),
        "datasets": {name: splits for name, splits in counts.items() if name},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": sys.version.split()[0], **{k: ".".join(map(str, v)) for k, v in av.library_versions.items()}},
        "shards": [{key: note[key] for key in kept} for note in notes],
        shards.SUMS: {name: shards.file_sum(out / name) for name in (shards.INDEX, *_lists(settings, counts))},
    }
    manifest[shards.SUM] = shards.sum_of(manifest)
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1))
    current = {shard.file for shard in todo}
    for path in (path for kind in KINDS for path in (out / kind).glob("*.array_record-*-of-?????")):
        if str(path.relative_to(out)) not in current:
            _note(path).unlink(missing_ok=True)
            path.unlink()


def _remove_partial(out: Path) -> None:
    """Remove partial shards of an interrupted run."""
    for path in (path for kind in KINDS for path in (out / kind).glob(".*.partial")):
        path.unlink(missing_ok=True)


def _lists(settings: Settings, counts: dict[str, dict[str, int]]) -> list[str]:
    """Return the lists of Examples that `read_list` wrote, relative to the root."""
    return [
        shards.examples_file(name, split, variant) if name else f"{split}.jsonl"
        for name, splits in counts.items()
        for split in splits
        for variant in (settings.variants if name else ("",))
    ]


def describe(folder: Path, kind: str, decoding: Decoding, notes: Sequence[dict[str, Any]]) -> None:
    """Write features.json and dataset_info.json, with which TFDS reads a kind of shards; nothing without shards."""
    import tensorflow_datasets as tfds  # imported late: it takes seconds, and only this function needs it

    if not notes:
        return
    numbers, arrays = _FIELDS[kind]
    features = tfds.features.FeaturesDict(
        {
            **{name: tfds.features.Text() for name in ("path", "detail", "beside", "error")},
            **{name: tfds.features.Scalar(np.int64) for name in ("bytes", "mtime_ns", *numbers)},
            **{
                name: tfds.features.Tensor(
                    shape=tuple(decoding.image_size if n == "S" else n for n in shape), dtype=dtype, encoding="bytes"
                )
                for name, (shape, dtype) in arrays.items()
            },
        }
    )
    splits: dict[str, list[dict[str, Any]]] = {}
    for note in notes:
        title = note["file"].split("/")[1].removeprefix(f"{kind}-").split(".")[0]
        splits.setdefault(title, []).append(note)
    with tempfile.TemporaryDirectory() as written:  # TFDS looks at the names of the shards in a folder on a disk
        for note in notes:
            (Path(written) / note["file"].split("/")[1]).touch()
        _write_metadata(Path(written), features, splits)
        for path in Path(written).glob("*.json"):
            write_whole(folder / path.name, path.read_bytes())


def _write_metadata(folder: Path, features: Any, splits: dict[str, list[dict[str, Any]]]) -> None:
    import tensorflow_datasets as tfds

    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features,
        check_data=False,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        split_infos=[
            tfds.core.SplitInfo(
                name=title,
                shard_lengths=[note["records"] for note in parts],
                num_bytes=sum(note["record_bytes"] for note in parts),
            )
            for title, parts in splits.items()
        ],
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of the verb."""
    parser = CommandLine(__doc__, "python -m data_pipelines prepare")
    parser.add_argument(
        "--root", type=ANYWHERE, required=True, help="data root: releases in folders of their names, or <split>.jsonl"
    )
    parser.add_argument(
        "--out", type=ANYWHERE, required=True, help="the prepared root: an empty folder, or one to complete"
    )
    parser.add_argument(
        "--datasets",
        type=Words(tuple(datasets.DATASETS)),
        default="",
        metavar="A,B",
        help=f"of {','.join(datasets.DATASETS)} (default: those of the joint stage that are there)",
    )
    parser.add_argument("--splits", default=",".join(datasets.SPLITS), help="default %(default)s")
    parser.add_argument(
        "--variants", default=",".join(datasets.VARIANTS), help="variants of prompts; default %(default)s"
    )
    parser.add_argument(
        "--image-size", type=Whole(1, 2**16), default=224, help="image side in pixels of the model that will read it"
    )
    parser.add_argument(
        "--video-frames", type=Whole(1, 1024), default=10, help="data.video_frames of the runs that will read it"
    )
    parser.add_argument("--pad-short-audio", action="store_true", help="data.pad_short_audio of those runs")
    parser.add_argument(
        "--clock",
        default="shown",
        choices=media.CLOCKS,
        help="how frames and sound are placed: counted for runs with compat=released (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-mb", type=Whole(1, 10**6), default=256, help="size of a shard before compression, in MB"
    )
    parser.add_argument(
        "--compress",
        action="store_true",
        help="compress pictures (a still clip to a third), which halves the reading speed",
    )
    parser.add_argument(
        "--workers", type=Whole(0, 1024), default=os.cpu_count() or 1, help="processes; 0 = this one only"
    )
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if unknown := [v for v in arguments.variants.split(",") if v not in datasets.VARIANTS]:
        raise InputError(
            "command line",
            "--variants",
            f"unknown variant {unknown[0]!r}",
            f"use some of {','.join(datasets.VARIANTS)}",
        )
    return arguments


def run(argv: Sequence[str]) -> None:
    """Prepare the requested data, and list media that could not be decoded."""
    arguments = parse_arguments(argv)
    use_tasks([arguments.task_modules])
    with locked(arguments.out) as out:
        _run(arguments, out)


def _run(arguments: argparse.Namespace, out: Path) -> None:
    root = paths.at(arguments.root)
    if not root.is_dir():
        raise InputError(str(root), "--root", "is no folder", "give the folder that holds the datasets")
    if shards.opened(root):
        raise InputError(str(root), "--root", "is prepared already", "give the root that it was prepared from")
    decoding = Decoding(arguments.image_size, arguments.video_frames, arguments.pad_short_audio, arguments.clock)
    settings = Settings(
        str(paths.absolute(root)),
        decoding,
        tuple(arguments.variants.split(",")),
        arguments.shard_mb * 1_000_000,
        arguments.compress,
    )
    wanted = lists_of(root, [name for name in arguments.datasets.split(",") if name], arguments.splits.split(","))
    failed = prepare(settings, out, wanted, arguments.workers, on_stderr)
    for line in failed[:10]:
        print(f"cannot be decoded: {printable(line)}")
    if failed[10:]:
        print(f"and {len(failed) - 10} more")
    manifest = read_json(out / MANIFEST)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{out}: {manifest['records']} media, {size / 1e9:.2f} GB in {len(manifest['shards'])} shards")


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines prepare`."""
    run_verb(lambda: run(argv), "--debug" in argv)
