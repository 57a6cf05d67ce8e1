"""Decode a data root once: write its media as shards that train and evaluate read instead of the files.

    python -m data_pipelines prepare --root DATA --out PREPARED --datasets ave,avqa --workers 8

PREPARED then replaces DATA (`--data`, `data.root`) and gives the same batches, many times faster, for any tokenizer and
prompt variant, with muted and blanked inputs too. A medium that several Examples use is stored once. An interrupted run
continues when it is started again; more --datasets and --splits may be added later, also from a root that has moved.
Media that cannot be decoded are listed at the end, and give the same error when they are read. The shards are TFDS
datasets as well; see docs/datasets.md.

On many machines, with --out on a disk that all of them see:

    python -m data_pipelines prepare --root DATA --out PREPARED --part 0/8      and so on to 7/8, in any order, at once
    python -m data_pipelines prepare --out PREPARED --merge                     when all are done

Parts are counted from 0: --part $SLURM_ARRAY_TASK_ID/8 with sbatch --array=0-7, --part $JOB_COMPLETION_INDEX/8 in an
indexed Job or JobSet, --part auto in the processes of one srun or jax.distributed job. A part that was killed goes on
where it stopped when it is started again. Parts may also write folders of their own, which are copied into one (rsync
-a) before --merge.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from array_record.python import array_record_module

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Choice, Flag, Text, Whole, Words
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import need_room, out_folder, remove_folder, whole, write_whole
from crab_jax.io.locks import locked, locked_file
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.io.structured import Each, check, json_line, read_json, stream_lines, strict_json
from crab_jax.tasks import add_flag, use_tasks
from data_pipelines import datasets, fbank, index, media, parts, shards
from data_pipelines.decoded import Files, inside
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.isolated import end_with_parent
from data_pipelines.parts import Part
from data_pipelines.shards import KINDS, MANIFEST, PLACE, PLAN, Decoding, Medium
from data_pipelines.sources.release import Found, stamp

LIBRARIES = ("av", "soundfile", "soxr", "pillow", "numpy", "array_record", "crab_jax")
COMPRESSED, UNCOMPRESSED = "zstd:1", "uncompressed"
DECODABLE = 0.8  # assumed share of decodable media; others take no room
_HEAD = 64  # bytes of a record by which it is located in its shard


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a prepared root. An existing root cannot be given others, except that its source may move."""

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
        """Return the settings as written in plan.json: without the place of the source, which may move."""
        return {
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a prepared root will hold: a pure function of settings, annotations and media files.

    counts: {dataset: {split: Examples}}. shards: in the order of the index. texts: {list of Examples: hash}. sources:
    {annotation file, relative to the source: (size, time in ns)}, which is no part of the digest.
    """

    counts: Mapping[str, Mapping[str, int]]
    shards: tuple[Shard, ...]
    texts: Mapping[str, str]
    sources: Mapping[str, tuple[int, int]]

    def digest(self, settings: Settings) -> str:
        """Return a hash of everything that determines the content of the prepared root."""
        content = hashlib.blake2b(digest_size=16)
        content.update(json.dumps([shards.FORMAT, settings.as_json(), self.counts, self.texts]).encode())
        for shard in self.shards:
            content.update(json.dumps([shard.file, shard.media, shard.stamps]).encode())
        return content.hexdigest()


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


class Listed(NamedTuple):
    """One list of Examples.

    examples: their number. needed: media. texts: {file: hash of the text}. files: the annotation files that were read.
    """

    examples: int
    needed: dict[Medium, None]
    texts: dict[str, str]
    files: set[str]


def read_list(settings: Settings, out: Path, name: str, split: str) -> Listed:
    """Write one list of Examples into `out`, and return what it holds."""
    needed: dict[Medium, None] = {}
    texts: dict[str, str] = {}
    if not name:
        examples = datasets.read_jsonl(settings.root, split)
        write_jsonl(out / f"{split}.jsonl", examples)
        for example in examples:
            needed.update(dict.fromkeys(shards.media_of(example, settings.decoding)))
        texts[f"{split}.jsonl"] = _hash_of(map(shards.found_json, examples))
        return Listed(len(examples), needed, texts, {datasets.list_of(settings.root, split) or ""})
    count, used = 0, datasets.Used()
    for variant in settings.variants:
        lines, without_places = [], []
        for found, of_all in _found(settings.root, name, split, variant, used):
            lines.append(shards.found_json(found, of_all))
            if isinstance(found, Example):
                count += variant == settings.variants[0]
                needed.update(dict.fromkeys(shards.media_of(found, settings.decoding)))
                without_places.append(lines[-1])
            else:
                without_places.append(json.dumps([type(found).__name__, found.field]))
        file = shards.examples_file(name, split, variant)
        write_whole(out / file, "".join(lines))
        texts[file] = _hash_of(without_places)
    folder, root = datasets.folder_of(settings.root, name), paths.at(settings.root)
    read = {os.path.join(folder, file) for file in used}
    return Listed(count, needed, texts, {file for file in read if (root / file).is_file()})


def _hash_of(lines: Iterable[str]) -> str:
    content = hashlib.blake2b(digest_size=16)
    for line in lines:
        content.update(line.encode("utf-8", "backslashreplace"))
    return content.hexdigest()


def _found(root: str, name: str, split: str, variant: str, used: datasets.Used) -> Iterator[tuple[Found, bool]]:
    """Yield the result of `datasets.records`, and last the error of the annotations as a whole, if any."""
    try:
        for found in datasets.records(root, name, split, variant, used=used):
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
    return stamp(path) or (0, 0)


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
        "sha256": shards.sha256(partial),
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


def finished(settings: Settings, out: Path, shard: Shard, verify: bool = False) -> dict[str, Any] | None:
    """Return the note of an existing shard that is complete and up to date; None for any other.

    A shard is written before its note. One that is newer was changed or copied since, and its checksum is compared;
    with `verify` that of every shard is.
    """
    path = out / shard.file
    try:
        note: dict[str, Any] = read_json(_note(path), NOTE)
        if note["of"] != shard.digest(settings) or path.stat().st_size != note["bytes"]:
            return None
        # An object in a bucket is whole, and its server keeps it so: it is not fetched to be compared.
        if not paths.is_remote(path) and (verify or path.stat().st_mtime_ns > _note(path).stat().st_mtime_ns):
            if shards.sha256(path) != note["sha256"]:
                return None
            with contextlib.suppress(OSError):  # so that it is not read again the next time
                os.utime(_note(path))
        return note
    except (OSError, ValueError):  # includes InputError
        return None


def _all_finished(
    settings: Settings, out: Path, todo: Sequence[Shard], workers: int, verify: bool
) -> dict[str, dict[str, Any]]:
    """Return {file: note} of the shards that are `finished`; several are looked at at once."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        notes = pool.map(lambda shard: finished(settings, out, shard, verify), todo)
        return {shard.file: note for shard, note in zip(todo, notes, strict=True) if note}


# The whole root


def claim(out: Path, settings: Settings, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the lists of an existing `out`, then the new ones of `wanted`, and write them to plan.json.

    Raises InputError when `out` was made with other settings, or holds something else.
    """
    plan = out / PLAN
    known: list[tuple[str, str]] = []
    if plan.is_file():
        old = read_json(plan, _LISTS, fix="give an empty --out")
        known = [(name, split) for name, split in old.pop("lists")]
        current = settings.as_json()
        old.pop("root", None)  # older versions wrote it
        for field, value in old.items():
            if current.get(field) != value:
                raise InputError(
                    str(out),
                    field,
                    f"was prepared with {value!r:.60}, not {current.get(field)!r:.60}",
                    "use the same options, or another --out",
                )
        _check_source(settings, out, known)
    elif any(not path.name.startswith(".") for path in out.iterdir()):  # locks, and probes of other parts
        raise InputError(str(out), "--out", "holds something that prepare did not write", "give an empty folder")
    lists = [*known, *(pair for pair in wanted if pair not in known)]
    write_whole(plan, json.dumps({**settings.as_json(), "lists": lists}, indent=1))
    return lists


_LISTS = {"lists": [(Text(), Text(1))]}


def _check_source(settings: Settings, out: Path, known: Sequence[tuple[str, str]]) -> None:
    """Raise InputError for a source that cannot be the one, perhaps moved, of which `out` was prepared.

    It must have every known list, and where its place is new, one of a few prepared media at least must be the same
    file by size and time: otherwise everything would be decoded again, and replaced.
    """
    try:
        prepared = shards.Shards(out)
        held = {("", split): count for split, count in prepared.manifest["lists"].items()}
        for name, splits in prepared.manifest["datasets"].items():
            held |= {(name, split): count for split, count in splits.items()}
        moved = prepared.manifest["root"] != settings.root
        sample = range(0, len(prepared.shards), max(1, len(prepared.shards) // 16)) if moved else ()
        records = [prepared.first(number) for number in sample]
    except (InputError, KeyError, ValueError, OSError):  # unfinished or damaged: nothing to compare with
        return
    for name, split in known:
        there = datasets.is_there(settings.root, name) if name else datasets.list_of(settings.root, split)
        if held.get((name, split)) and not there:
            raise InputError(
                settings.root,
                "--root",
                f"lacks {name or f'{split}.jsonl'}, with which {out} was prepared",
                "give the root that has it, or another --out",
            )
    same = (
        _stamp(paths.at(settings.root) / str(record["path"], "utf-8")) == (record["bytes"], record["mtime_ns"])
        for record in records
    )
    if records and not any(same):
        raise InputError(
            settings.root,
            "--root",
            f"is not what {out} was prepared from: of {len(records)} of its media none has the same size and time here",
            "copy a root that moves with its times (rsync -a, cp -p), or give another --out",
        )


def plan_of(settings: Settings, out: Path, lists: Sequence[tuple[str, str]], progress: Callable[[str], None]) -> Plan:
    """Read the annotations, write their lists of Examples into `out`, and return what is to be prepared."""
    counts: dict[str, dict[str, int]] = collections.defaultdict(dict)
    seen: dict[Medium, None] = {}
    todo: list[Shard] = []
    texts: dict[str, str] = {}
    files: set[str] = set()
    for name, split in lists:
        listed = read_list(settings, out, name, split)
        counts[name][split] = listed.examples
        new = [medium for medium in listed.needed if medium not in seen]
        seen.update(listed.needed)
        texts |= listed.texts
        files |= listed.files
        title = f"{name}_{split}" if name else split
        for kind in KINDS:
            todo += cut(kind, title, [medium for medium in new if medium.kind == kind], settings)
        progress(f"{title}: {listed.examples} examples, {len(new)} new media")
    sources = {file: _stamp(paths.at(settings.root) / file) for file in sorted(files)}
    return Plan(dict(counts), tuple(todo), texts, sources)


def prepare(
    settings: Settings,
    out: Path,
    wanted: Sequence[tuple[str, str]],
    workers: int,
    progress: Callable[[str], None] = lambda line: None,
    verify: bool = False,
) -> list[str]:
    """Write or complete the prepared root `out`; return a line for every medium that could not be decoded.

    See the module's docstring.
    """
    lists = claim(out, settings, wanted)
    _leave_older_format(out)
    _remove_partial(out)
    plan = plan_of(settings, out, lists, progress)
    notes = _complete(settings, out, plan.shards, workers, progress, verify)
    _finish(settings, out, plan.counts, plan.shards, notes)
    return [line for note in notes for line in note["failed"]]


def prepare_sample(settings: Settings, out: Path, examples: Sequence[Example]) -> None:
    """Prepare a few Examples of a raw root into the empty folder `out`, as a list `train`, in this process."""
    write_jsonl(out / "train.jsonl", examples)
    needed = dict.fromkeys(medium for one in examples for medium in shards.media_of(one, settings.decoding))
    todo = [
        shard
        for kind in KINDS
        for shard in cut(kind, "train", [medium for medium in needed if medium.kind == kind], settings)
    ]
    notes = [write_shard(settings, out, shard) for shard in todo]
    _finish(settings, out, {"": {"train": len(examples)}}, todo, notes)


def prepare_part(
    settings: Settings,
    out: Path,
    wanted: Sequence[tuple[str, str]],
    workers: int,
    part: Part,
    progress: Callable[[str], None] = lambda line: None,
    verify: bool = False,
) -> list[dict[str, Any]]:
    """Write or complete the shards of one part, and return their notes; `merge` makes a prepared root of all parts."""
    with locked_file(out / PLAN, wait=True):
        lists = claim(out, settings, wanted)
        _leave_older_format(out)
        plan = kept_plan(out, settings)
        if plan and _is_current(plan, settings, lists, part):
            progress(f"the plan of {sum(len(shard.media) for shard in plan.shards)} media is there")
        else:
            plan = plan_of(settings, out, lists, progress)
            keep_plan(out, settings, plan)
        parts.write_note(out, part, plan.digest(settings), settings.root, settings.as_json(), versions())
    own = part.share(plan.shards)
    _remove_partial(out, {shard.file for shard in own})
    return _complete(settings, out, own, workers, progress, verify)


def merge(
    out: Path, workers: int, progress: Callable[[str], None] = lambda line: None, verify: bool = False
) -> list[str]:
    """Make a prepared root of finished parts; return a line for every medium that could not be decoded.

    Raises InputError naming the part that is missing, unfinished, damaged or different from the others.
    """
    if not (out / parts.FOLDER).is_dir() and shards.opened(out):
        progress(f"{out} is merged already")
        return []
    settings = _settings_in(out)
    plan = kept_plan(out, settings)
    if plan is None:
        there = (out / parts.FOLDER / _PLAN).is_file()
        problem = "its plan is damaged, or of other settings" if there else "holds no parts"
        raise InputError(str(out), "--merge", problem, "run prepare with --part 0/N to N-1/N")
    count, root = parts.agreed(out, plan.digest(settings), settings.as_json())
    notes = _all_finished(settings, out, plan.shards, workers, verify)
    files = [shard.file for shard in plan.shards]
    parts.complete(out, files, {file: file in notes for file in files if (out / file).is_file()}, count)
    _remove_partial(out)
    settings = dataclasses.replace(settings, root=root)
    _finish(settings, out, plan.counts, plan.shards, [notes[file] for file in files])
    return [line for file in files for line in notes[file]["failed"]]


# The plan on disk, for parts: one line of what it is, then one for each medium.

_PLAN = "plan.jsonl"
_STAMP = (Whole(0, 2**63), Whole(0, 2**63))
_HEADER = {
    "digest": Text(1, 200),
    "counts": Each(Text(0, 100), Each(Text(1, 100), Whole())),
    "texts": Each(Text(1, 1000), Text(1, 200)),
    "sources": Each(Text(1, 1000), _STAMP),
    "files": [Text(1, 1000)],
}
_MEDIUM = {"shard": Whole(0, 2**32), "medium": (Choice(KINDS), Text(1), Text(1), Text()), "stamps": [Whole(0, 2**63)]}
_SETTINGS = {
    **shards.DECODING,
    "clock": Choice(media.CLOCKS),
    "variants": [Choice(datasets.VARIANTS)],
    "shard_bytes": Whole(1, 10**12),
    "compress": Flag(),
    **_LISTS,
}


def keep_plan(out: Path, settings: Settings, plan: Plan) -> None:
    """Write the plan that the other parts follow."""
    header = {
        "digest": plan.digest(settings),
        "counts": plan.counts,
        "texts": plan.texts,
        "sources": plan.sources,
        "files": [shard.file for shard in plan.shards],
    }
    lines = [json.dumps(header)]
    lines += [
        json.dumps({"shard": number, "medium": medium, "stamps": stamps})
        for number, shard in enumerate(plan.shards)
        for medium, stamps in zip(shard.media, shard.stamps, strict=True)
    ]
    write_whole(out / parts.FOLDER / _PLAN, "\n".join([*lines, ""]))


def kept_plan(out: Path, settings: Settings) -> Plan | None:
    """Return the plan that a part wrote; None if there is none of these settings, or it is damaged."""
    file = out / parts.FOLDER / _PLAN
    try:
        lines = stream_lines(file)
        where, line = next(lines)
        header = json_line(line, where)
        check(header, _HEADER, where)
        groups: list[tuple[list[Medium], list[tuple[int, ...]]]] = [([], []) for _ in header["files"]]
        for where, line in lines:
            row = json_line(line, where)
            check(row, _MEDIUM, where)
            chosen, stamps = groups[row["shard"]]
            chosen.append(Medium(*row["medium"]))
            stamps.append(tuple(row["stamps"]))
        found = [
            Shard(name, tuple(chosen), tuple(stamps))
            for name, (chosen, stamps) in zip(header["files"], groups, strict=True)
        ]
        sources = {name: (size, time) for name, (size, time) in header["sources"].items()}
        plan = Plan(header["counts"], tuple(found), header["texts"], sources)
        return plan if plan.digest(settings) == header["digest"] else None
    except (OSError, ValueError, IndexError, StopIteration):  # includes InputError
        return None


def _is_current(plan: Plan, settings: Settings, lists: Sequence[tuple[str, str]], part: Part) -> bool:
    """Return whether a plan is of these lists, and of the annotations and the media of a part as they are."""
    root = paths.at(settings.root)
    return (
        [(name, split) for name, splits in plan.counts.items() for split in splits] == _by_dataset(lists)
        and all(_stamp(root / file) == stamp for file, stamp in plan.sources.items())
        and all(
            _stamps(root, medium) == stamps
            for shard in part.share(plan.shards)
            for medium, stamps in zip(shard.media, shard.stamps, strict=True)
        )
    )


def _by_dataset(lists: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(name for name, _ in lists))
    return sorted(lists, key=lambda pair: names.index(pair[0]))


def _settings_in(out: Path) -> Settings:
    """Return the settings of a prepared root, finished or not, without its source. Raises InputError."""
    if not (out / PLAN).is_file():
        raise InputError(str(out), "--merge", "holds no parts", "run prepare with --part 0/N to N-1/N before")
    kept = read_json(out / PLAN, _SETTINGS)
    decoding = Decoding(*(kept[field] for field in Decoding._fields))
    return Settings("", decoding, tuple(kept["variants"]), kept["shard_bytes"], kept["compress"])


def _complete(
    settings: Settings, out: Path, todo: Sequence[Shard], workers: int, progress: Callable[[str], None], verify: bool
) -> list[dict[str, Any]]:
    """Write the shards of `todo` that are not finished, and return the notes of all."""
    notes = _all_finished(settings, out, todo, workers, verify)
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
    return [notes[shard.file] for shard in todo]


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
    counts: Mapping[str, Mapping[str, int]],
    todo: Sequence[Shard],
    notes: Sequence[dict[str, Any]],
) -> None:
    """Write the index, the TFDS metadata and last the manifest; then remove shards of an older plan, and the parts."""
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
        "versions": versions(),
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
    remove_folder(out / parts.FOLDER)


def versions() -> dict[str, str]:
    """Return the versions of what decodes and writes."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES} | {
        "python": sys.version.split()[0],
        **{name: ".".join(map(str, version)) for name, version in av.library_versions.items()},
    }


def _remove_partial(out: Path, files: set[str] | None = None) -> None:
    """Remove the partial shards of an interrupted run; files: of these shards only, as others may be being written."""
    for path in (path for kind in KINDS for path in (out / kind).glob(".*.partial")):
        shard = f"{path.parent.name}/{path.name[1:].rsplit('.', 2)[0]}"
        if files is None or shard in files:
            path.unlink(missing_ok=True)


def _lists(settings: Settings, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
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
        "--root", type=ANYWHERE, help="data root: releases in folders of their names, or <split>.jsonl; not for --merge"
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
    parser.add_argument(
        "--part",
        type=lambda text: parts.read_part(text, os.environ),
        metavar="I/N",
        help="write the shards of part I of N only, counted from 0/N (--array=0-7 and --part $SLURM_ARRAY_TASK_ID/8, "
        "or $JOB_COMPLETION_INDEX/8); auto: of this process of a jax.distributed or srun job",
    )
    parser.add_argument("--merge", action="store_true", help="make a prepared root of the finished parts in --out")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the checksums of all existing shards; by default of those that were changed or copied since "
        "they were written",
    )
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.merge and arguments.part:
        raise InputError("command line", "--merge", "does not go with --part", "merge when all parts are done")
    if not arguments.merge and arguments.root is None:
        raise InputError("command line", "--root", "is missing", "give --root, the folder that holds the datasets")
    if unknown := [v for v in arguments.variants.split(",") if v not in datasets.VARIANTS]:
        raise InputError(
            "command line",
            "--variants",
            f"unknown variant {unknown[0]!r}",
            f"use some of {','.join(datasets.VARIANTS)}",
        )
    return arguments


def run(argv: Sequence[str]) -> None:
    """Prepare the requested data or a part of them, or merge parts; list media that could not be decoded."""
    arguments = parse_arguments(argv)
    use_tasks([arguments.task_modules])
    if arguments.merge:
        with locked(arguments.out) as out:
            _tell(out, merge(out, arguments.workers, on_stderr, arguments.verify))
        return
    out_folder(arguments.out)  # before hours of reading
    settings, wanted = _requested(arguments)
    part: Part | None = arguments.part
    if part is None:
        with locked(arguments.out) as out:
            _tell(out, prepare(settings, out, wanted, arguments.workers, on_stderr, arguments.verify))
        return
    use = json.dumps({"number of parts": part.of, **settings.as_json(), "lists": wanted})
    with locked(arguments.out, use=use, share=part.number) as out:
        notes = prepare_part(settings, out, wanted, arguments.workers, part, on_stderr, arguments.verify)
        _tell_failed([line for note in notes for line in note["failed"]])
        size = sum(note["bytes"] for note in notes)
        print(
            f"{out}: part {part} has {sum(note['records'] for note in notes)} media, {size / 1e9:.2f} GB in "
            f"{len(notes)} shards; when all {part.of} are done: prepare --out {out} --merge"
        )


def _requested(arguments: argparse.Namespace) -> tuple[Settings, list[tuple[str, str]]]:
    """Return (settings, lists) of a command line. Raises InputError."""
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
    names = [name for name in arguments.datasets.split(",") if name]
    return settings, lists_of(root, names, arguments.splits.split(","))


def _tell(out: Path, failed: Sequence[str]) -> None:
    """Write the index of a finished root, and print what the root holds and which media could not be decoded."""
    manifest = read_json(out / MANIFEST)
    index.write_all(out, variants=manifest["variants"], progress=on_stderr)
    _tell_failed(failed)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    print(f"{out}: {manifest['records']} media, {size / 1e9:.2f} GB in {len(manifest['shards'])} shards")


def _tell_failed(failed: Sequence[str]) -> None:
    for line in failed[:10]:
        print(f"cannot be decoded: {printable(line)}")
    if failed[10:]:
        print(f"and {len(failed) - 10} more")


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines prepare`."""
    run_verb(lambda: run(argv), "--debug" in argv)
