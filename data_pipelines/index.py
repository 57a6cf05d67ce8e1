"""An index of Examples, made once: what training reads in place of all annotations.

    python -m data_pipelines index --root DATA --tokenizer FILE     DATA/example_index/<dataset>-<split>-<variant>.arrow

Without it every process reads and checks every annotation at every start; with it, a process maps a file and builds an
Example when it is drawn. The index holds what was read, faulty rows with their errors too, and what it was read from:
when a file or folder changes, training says so, reads the annotations instead, and this command makes the index anew.
`prepare` writes the index of a prepared root at its end. --tokenizer also counts the tokens of the texts, which the
first training with a tokenizer does otherwise. It can be interrupted and started again: finished lists stay.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import logging
import mmap
import os
import posixpath
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import crab_jax
from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Text, Whole, Words
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import whole, write_whole
from crab_jax.io.locks import locked
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.io.structured import Each, Null, read_json
from crab_jax.tasks import BENCHMARKS, TASKS, add_flag, use_tasks
from data_pipelines import datasets, fbank, leaks, shards
from data_pipelines.batching import Bucket, DataConfig, check_sources, place
from data_pipelines.datasets import PREPARED, LeftOut, Used
from data_pipelines.examples import MASK_KINDS, WINDOWS, Example, choice, seg_source
from data_pipelines.mistakes import TrainingLabels
from data_pipelines.shared import Shared
from data_pipelines.sources.release import Found, MissingFile, stamp
from data_pipelines.tokens import Tokenizer

_log = logging.getLogger(__name__)
FORMAT = 1  # of the index; increased whenever its columns change
FOLDER = "example_index"
ROWS = 4096  # rows that are written, and decoded, together
KEPT = 8  # reads after which mapped pages are given back
# What a row is, and traits of an Example that decide about buckets and checks without building it.
EXAMPLE, MISSING, WRONG = range(3)
VIDEO, FRAMES, IMAGE, SAYS_VIDEO, SAYS_IMAGE, AGREES, TENTH, ANSWERED, MARKED, REFUSED, ODD = (
    1 << bit for bit in range(11)
)
_NUMBERS = {"kind": pa.uint8(), "task": pa.uint16(), "windows": pa.uint8(), "mask_kind": pa.uint8()} | {
    "traits": pa.uint16(),
    "pictures": pa.int32(),  # the length of `frames`
}
_TEXTS = ("id", "instruction", "target", "video", "image", "audio", "second", "seg_image", "mask", "meta")
# one_of, dataset: of meta. clip, own: names by which leaks.py compares clips. error: why a row is no Example. refused:
# why an Example must not be trained on. odd: where it looks odd. All are null where there is none.
_EXTRA = ("one_of", "dataset", "clip", "own", "error", "refused", "odd")
# Texts are bytes: names of files, and with them errors, may hold bytes that are not UTF-8.
SCHEMA = pa.schema(
    [*_NUMBERS.items(), *((name, pa.binary()) for name in (*_TEXTS, *_EXTRA)), ("frames", pa.list_(pa.binary()))]
)
# Token counts of one Example: those of prompt and target, and how many of each are <video>, <image>, <audio>.
LENGTHS = pa.schema([(f"{text}_{what}", pa.int32()) for text in ("prompt", "target") for what in ("ids", *"via")])
# The JSON file beside an index. notes, failed: errors as `_error_text` writes them.
INFO = {
    "format": Whole(),
    "made_by": Text(),
    "rows": Whole(0, 2**40),
    "bytes": Whole(0, 2**48),
    "sum": Text(32, 32),
    "failed": Null(Text()),
    "tasks": [Text(1)],
    "notes": [Text()],
    "sources": {"prepared?": Text(1), "stamps?": Each(Text(), Null((Whole(0, 2**62), Whole(-(2**62), 2**62))))},
}


# Writing


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _row(found: Found, labels: TrainingLabels, base: str) -> dict[str, Any]:
    """Return the values of a row by column. base: the data root, which errors name relatively."""
    if isinstance(found, InputError):
        kind = MISSING if isinstance(found, MissingFile) else WRONG
        return {"kind": kind, "error": _error_text(found, base)}
    dataset = leaks.dataset_of(found)
    clip = leaks.clip_of(found, dataset)
    row: dict[str, Any] = {name: _bytes(getattr(found, name)) for name in _TEXTS if name not in ("second", "meta")}
    stated, mark = found.meta.get("dataset"), found.meta.get("one_of")
    row |= {
        "kind": EXAMPLE,
        "task": list(TASKS).index(found.task),
        "windows": WINDOWS.index(found.windows),
        "mask_kind": MASK_KINDS.index(found.mask_kind),
        "pictures": len(found.frames),
        "second": None if found.second is None else str(found.second).encode(),
        "meta": json.dumps(found.meta).encode(),
        "frames": [_bytes(path) for path in found.frames],
        "one_of": None if mark is None else _bytes(str(mark)),
        "dataset": _bytes(stated) if isinstance(stated, str) else None,
        "clip": _bytes(clip.video) if clip else None,
        "own": _bytes(leaks.own_name(found)) if dataset in leaks.OWN else None,
    }
    odd = labels.odd
    try:
        labels.check(found)
    except InputError as error:
        row["refused"] = _error_text(error, base)
    if labels.odd > odd:
        row["odd"] = _bytes(_relative(labels.last_odd, base))
    row["traits"] = _traits(found, row)
    return row


def _traits(example: Example, row: dict[str, Any]) -> int:
    try:
        check_sources(example)
        agrees = True
    except InputError:
        agrees = False
    tenth = example.mask_kind != "none" and seg_source(example) == ("video", example.video)
    return sum(
        bit
        for bit, holds in (
            (VIDEO, example.video),
            (FRAMES, example.frames),
            (IMAGE, example.image),
            (SAYS_VIDEO, "<video>" in example.instruction),
            (SAYS_IMAGE, "<image>" in example.instruction),
            (AGREES, agrees),
            (TENTH, tenth),
            (ANSWERED, example.target),
            (MARKED, row["one_of"] is not None),
            (REFUSED, "refused" in row),
            (ODD, "odd" in row),
        )
        if holds
    )


def _relative(text: str, base: str) -> str:
    return text.removeprefix(base + os.sep)


def _error_text(error: InputError, base: str) -> bytes:
    record = shards.error_json(error)
    return json.dumps(record | {"where": _relative(error.where, base), "here": error.where.startswith(base)}).encode()


def _error(data: bytes, root: str) -> InputError:
    record = json.loads(data)  # names of files in it may hold bytes that are not UTF-8
    where = posixpath.join(root, record["where"]) if record["here"] else record["where"]
    return shards.error_of(record | {"where": where})


def file_of(root: str | Path, name: str, split: str, variant: str) -> Path:
    """Return the file of the index of one list of Examples; for PREPARED there is one for all variants of prompts."""
    stem = f"{name}-{split}" if name == PREPARED else f"{name}-{split}-{variant}"
    return paths.at(root) / FOLDER / f"{stem}.arrow"


def _info_file(file: Path) -> Path:
    return file.with_suffix(".json")


@functools.cache
def _code() -> str:
    """Return a hash of the code that makes Examples of annotations."""
    here, state = Path(__file__).parent, hashlib.blake2b(digest_size=16)
    files = [
        here / f"{name}.py" for name in ("batching", "datasets", "examples", "index", "labels", "leaks", "mistakes")
    ]
    tasks = sorted((Path(crab_jax.__file__).parent / "tasks").glob("*.py"))
    for file in (*files, *sorted((here / "sources").glob("*.py")), *tasks):
        state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()


def _made_by() -> str:
    """Return a text that identifies the code and the tasks that Examples depend on."""
    own = {name: task for name, task in TASKS.items() if task not in BENCHMARKS}
    files = {sys.modules[task.stats.__module__].__dict__.get("__file__") for task in own.values()}
    contents = [
        hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() for file in sorted(filter(None, files))
    ]
    return json.dumps([_code(), list(TASKS), contents])


def _sources(root: str | Path, name: str, split: str, variant: str, used: Used) -> dict[str, Any]:
    """Return what a list of Examples was read from: the hash in a prepared root, else the stamps of files."""
    if prepared := shards.opened(root):
        file = f"{split}.jsonl" if name == PREPARED else shards.examples_file(name, split, variant)
        if kept := prepared.manifest.get(shards.SUMS, {}).get(file):
            return {"prepared": kept}
        return {"stamps": {file: stamp(paths.at(root) / file)}}
    folder = "" if name == PREPARED else datasets.folder_of(root, name)
    # The folder of a list changes whenever something, such as this index, is put there; its files count by themselves.
    return {"stamps": {posixpath.join(folder, path): kept for path, kept in used.items() if folder or path}}


def _change(root: str | Path, name: str, split: str, variant: str, info: dict[str, Any]) -> str:
    """Return what has changed since an index was made, or ""."""
    if info["format"] != FORMAT or info["made_by"] != _made_by():
        return "was made by another version, or with other tasks"
    kept = info["sources"]
    if "prepared" in kept:
        return "" if kept == _sources(root, name, split, variant, {}) else "is of Examples that were prepared again"
    for path, before in kept["stamps"].items():
        if stamp(paths.at(root) / path) != (tuple(before) if before else None):
            return f"is older than {paths.at(root) / path}"
    return ""


def write(
    root: str | Path, name: str, split: str, variant: str = "train", progress: Callable[[str], None] | None = None
) -> Path:
    """Write the index of one list of Examples and return its file; one that is up to date stays.

    Where the annotations cannot be read as a whole, the index holds that error alone.
    """
    file = file_of(root, name, split, variant)
    if opened(root, name, split, variant, lambda line: None):
        return file
    notes: list[InputError] = []
    used: Used = {}
    pace = Progress(f"{name} {split}", _expected(root, name, split), progress)
    if name == PREPARED:
        every = functools.partial(datasets.listed, root, split, used)
    else:
        every = functools.partial(datasets.records, root, name, split, variant, notes, used)
    labels, base = TrainingLabels(root, split), str(paths.at(root))
    count, failed = 0, None
    _info_file(file).unlink(missing_ok=True)
    try:
        with whole(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            rows = (_row(found, labels, base) for found in pace.over(every()))
            while batch := list(itertools.islice(rows, ROWS)):
                writer.write_batch(_batch(batch))
                count += len(batch)
    except InputError as error:
        count, failed = 0, _error_text(error, base).decode()
        with whole(file) as partial, pa.OSFile(str(partial), "wb") as sink:
            pa.ipc.new_file(sink, SCHEMA).close()
    info = {
        "format": FORMAT,
        "made_by": _made_by(),
        "rows": count,
        "bytes": file.stat().st_size,
        "sum": shards.file_sum(file),
        "failed": failed,
        "tasks": list(TASKS),
        "notes": [_error_text(note, base).decode() for note in notes],
        "sources": _sources(root, name, split, variant, used),
    }
    write_whole(_info_file(file), json.dumps(info))
    return file


def _expected(root: str | Path, name: str, split: str) -> int:
    """Return about how many rows a list of Examples has, 0 when unknown."""
    if prepared := shards.opened(root):
        manifest = prepared.manifest
        number: int = manifest["lists"].get(split, 0) if name == PREPARED else manifest["datasets"][name][split]
        return number
    if name != PREPARED or paths.is_remote(root):
        return datasets.dataset_of(name).sizes.get(split) or 0
    with open(Path(root) / (datasets.list_of(root, split) or ""), "rb") as file:
        return sum(part.count(b"\n") for part in iter(functools.partial(file.read, 1 << 20), b""))


def _batch(rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    columns = []
    for field in SCHEMA:
        absent: Any = 0 if field.name in _NUMBERS else [] if field.name == "frames" else None
        columns.append(pa.array([row.get(field.name, absent) for row in rows], field.type))
    return pa.record_batch(columns, schema=SCHEMA)


# Reading


class Table:
    """The open index of one list of Examples, mapped: nothing of it is copied, and what was read is let go again."""

    def __init__(self, file: str):
        self.file, self.info = paths.at(file), read_json(_info_file(paths.at(file)), INFO)
        self._copy = paths.local(self.file)  # itself, unless it is in a bucket
        self.root = str(self.file.parent.parent)
        self.rows: int = self.info["rows"]
        self.tasks: list[str] = self.info["tasks"]
        with self._copy.open("rb") as content:
            self._map = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.py_buffer(self._map))
        self._read = 0
        self._batches: dict[int, pa.RecordBatch] = {}
        self._lock = threading.Lock()

    def batch(self, number: int) -> pa.RecordBatch:
        """Return ROWS rows, mapped.

        Every KEPT calls the pages that were read are given back, which a process that draws Examples at random would
        collect until it holds the whole file; the system keeps them, and reading them again costs microseconds.
        """
        with self._lock:
            self._read += 1
            if self._read % KEPT == 0 and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
            if number not in self._batches:
                self._batches[number] = self._reader.get_batch(number)
            return self._batches[number]

    @property
    def failed(self) -> InputError | None:
        """The error of annotations that cannot be read as a whole."""
        return _error(self.info["failed"].encode(), self.root) if self.info["failed"] else None

    def scan(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in memory, ROWS at a time, so that what was read does not stay mapped."""
        with pa.OSFile(str(self._copy)) as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of whole numbers."""
        parts = [self.batch(number).column(name).to_numpy() for number in range(self._reader.num_record_batches)]
        return np.concatenate(parts) if parts else np.zeros(0, SCHEMA.field(name).type.to_pandas_dtype())

    def value(self, name: str, row: int) -> Any:
        """Return one value."""
        number, at = divmod(row, ROWS)
        return self.batch(number).column(name)[at].as_py()

    def example(self, row: int) -> Example:
        """Build the Example of a row."""
        number, at = divmod(row, ROWS)
        batch = self.batch(number)

        def value(name: str) -> Any:
            found = batch.column(name)[at].as_py()
            return _text(found) if isinstance(found, bytes) else found

        second, mask_kind = value("second"), MASK_KINDS[value("mask_kind")]
        return Example(
            **{name: value(name) for name in _TEXTS if name not in ("second", "meta")},
            task=self.tasks[value("task")],
            frames=tuple(map(_text, value("frames"))),
            windows=WINDOWS[value("windows")],
            second=None if second is None else int(second),
            mask_kind=mask_kind,
            meta=json.loads(value("meta")),
        )

    def error(self, row: int, column: str = "error") -> InputError:
        """Return the error of a row: why it is no Example, or of the column `refused`, why it is not trained on."""
        return _error(self.value(column, row), self.root)

    def lengths(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """Return the columns of LENGTHS, int32[rows] each; they are counted once for each tokenizer.

        The counts lie beside the index, with the hashes of the index and the tokenizer; they are counted again when one
        of these, or their own, does not match.
        """
        digest = tokenizer.digest()
        file = self.file.with_name(f"{self.file.stem}.{digest[:12]}.lengths")
        kept = {b"index": self.info["sum"].encode(), b"tokenizer": digest.encode()}
        try:
            with pa.memory_map(str(paths.local(file))) as stored:
                table = pa.ipc.open_file(stored).read_all()
                columns = {name: table.column(name).to_numpy() for name in table.column_names}
                if table.schema.metadata == kept | {b"sum": _sum_of(columns)} and list(columns) == LENGTHS.names:
                    return columns
        except (OSError, pa.ArrowInvalid):
            pass
        columns = self._count(tokenizer)
        schema = LENGTHS.with_metadata(kept | {b"sum": _sum_of(columns)})
        try:
            with whole(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                writer.write_table(pa.table(list(columns.values()), schema=schema))
        except OSError as error:
            _log.warning("%s: cannot be written (%s): every start counts the tokens again", file, error.strerror)
        return columns

    def _count(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        pace = Progress(f"tokens of {self.file.stem}", self.rows)
        parts = []
        for batch in self.scan():
            unique = pc.dictionary_encode(batch.column("instruction").fill_null(b""))
            prompts = tokenizer.counts([_text(text) for text in unique.dictionary.to_pylist()], prompts=True)
            texts = batch.column("target").fill_null(b"").to_pylist()
            targets = tokenizer.counts([_text(text) for text in texts], prompts=False)
            parts.append(np.concatenate([prompts[unique.indices.to_numpy()], targets], axis=1))
            pace.add(len(batch))
        counts = np.concatenate(parts) if parts else np.zeros((0, len(LENGTHS)), np.int32)
        return {name: np.ascontiguousarray(counts[:, k]) for k, name in enumerate(LENGTHS.names)}


def _sum_of(columns: dict[str, np.ndarray]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for column in columns.values():
        state.update(column.tobytes())
    return state.hexdigest().encode()


@functools.lru_cache(maxsize=64)
def _table(file: str, total: str) -> Table:
    """Open an index whose hash is `total`. Raises InputError when another one is in its place now."""
    table = Table(file)
    if table.info["sum"] != total:
        fix = "start the run again, or leave the index while runs use it"
        raise InputError(file, "", "was made anew while this run used it", fix)
    return table


def opened(
    root: str | Path, name: str, split: str, variant: str, say: Callable[[str], None] = _log.warning
) -> Table | None:
    """Return the index of one list of Examples; None where there is none, or where it is not of these Examples.

    say: is told why an index cannot be used.
    """
    file = file_of(root, name, split, variant)
    if not _info_file(file).exists():
        return None
    try:
        info = read_json(_info_file(file), INFO)
        problem = _change(root, name, split, variant, info)
        if not problem and (file.stat().st_size != info["bytes"] or shards.file_sum(file) != info["sum"]):
            problem = "is damaged"
        if not problem:
            return _table(str(file), info["sum"])
    except (InputError, OSError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read ({' '.join(str(error).split()):.120})"
    say(
        f"the index {printable(file)} {printable(problem)}: the annotations are read instead; make it anew with "
        f"python -m data_pipelines index --root {printable(root)}"
    )
    return None


class Indexed(Sequence[Example]):
    """Examples of an index, each built when it is asked for. Sent to a process, it is a few hundred bytes.

    rows: the chosen rows, ascending, counted through all tables. marks: whether Examples keep their `one_of`.
    """

    def __init__(self, tables: Sequence[Table], rows: np.ndarray | Shared, marks: bool):
        self.tables, self.marks = tuple(tables), marks
        self.rows = rows if isinstance(rows, Shared) else Shared(rows.astype(np.int32))
        self.starts = np.cumsum([0, *(table.rows for table in tables)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _indexed, ([(str(table.file), table.info["sum"]) for table in self.tables], self.rows, self.marks)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Indexed: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Example | Indexed:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        table, row = self._place(int(at))
        example = table.example(row)
        if not self.marks:
            example.meta.pop("one_of", None)
        return example

    def _place(self, at: int) -> tuple[Table, int]:
        row = int(self.rows[at])
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        return self.tables[number], row - int(self.starts[number])

    def take(self, positions: np.ndarray) -> Indexed:
        """Return the Examples at these positions (ascending), or those where a mask is True."""
        return Indexed(self.tables, self.rows[positions], self.marks)

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of whole numbers, of the chosen rows."""
        values = np.concatenate([table.numbers(name) for table in self.tables])
        chosen: np.ndarray = values[self.rows.array]
        return chosen

    def has(self, trait: int) -> np.ndarray:
        """Return bool[N]: which Examples have a trait."""
        has: np.ndarray = (self.numbers("traits") & trait) > 0
        return has

    def tasks(self) -> tuple[np.ndarray, list[str]]:
        """Return (int[N], names): the task of each Example as a position in the names."""
        return self.numbers("task"), list(TASKS)  # an index of other tasks is not opened

    def datasets(self) -> set[str]:
        """Return the values of `meta["dataset"]`."""
        return {_text(name) for name in _unique(self._column("dataset"))}

    def marks_of(self) -> np.ndarray | None:
        """Return int[N]: a number for each value of `one_of`, -1 for Examples without one; None if all are without."""
        marked = self.has(MARKED) if self.marks else np.zeros(0, bool)
        if not marked.any():
            return None
        codes = pa.concat_arrays(list(self._column("one_of"))).dictionary_encode().indices
        marks: np.ndarray = codes.fill_null(-1).to_numpy()
        return marks

    def counts(self, seed: int) -> Counter[str]:
        """Return the number of Examples of each task in the first epoch, as `datasets.one_frame_each` takes them."""
        (tasks, names), marks = self.tasks(), self.marks_of()
        if marks is not None:
            order = np.argsort(marks, kind="stable")
            order = order[np.searchsorted(marks[order], 0) :]
            groups = np.split(order, np.flatnonzero(np.diff(marks[order])) + 1)
            taken = [self._first(group, tasks, seed) for group in groups]
            tasks = np.concatenate([tasks[marks < 0], tasks[taken]])
        return Counter({names[task]: int(count) for task, count in enumerate(np.bincount(tasks)) if count})

    def _first(self, group: np.ndarray, tasks: np.ndarray, seed: int) -> int:
        same = (tasks[group] == tasks[group[0]]).all()
        return int(group[0 if same else choice(self[group[0]].meta["one_of"], len(group), seed, 0)])

    def _column(self, name: str) -> Iterator[pa.Array]:
        """Yield a column of the chosen rows, mapped, a part at a time."""
        for table, number, rows in self._parts():
            column = table.batch(number).column(name)
            yield column if len(rows) == len(column) else column.take(pa.array(rows))

    def _parts(self) -> Iterator[tuple[Table, int, np.ndarray]]:
        """Yield (table, number of a batch, chosen rows of that batch)."""
        for start, table in zip(self.starts, self.tables, strict=False):
            for number in range(-(-table.rows // ROWS)):
                first = start + number * ROWS
                edges = np.searchsorted(self.rows.array, (first, min(first + ROWS, start + table.rows)))
                yield table, number, self.rows[edges[0] : edges[1]] - first

    def learned(self) -> str:
        """Return what `examples.learned` returns for these Examples."""
        state, parts = hashlib.blake2b(digest_size=16), self._parts()
        names = pa.array([name.encode() for name in TASKS], pa.binary())
        windows, kinds = (pa.array([name.encode() for name in list_], pa.binary()) for list_ in (WINDOWS, MASK_KINDS))
        for table in self.tables:
            for batch in table.scan():
                rows = next(parts)[2]
                if not len(rows):
                    continue
                chosen = batch if len(rows) == len(batch) else batch.take(pa.array(rows))
                column = {name: chosen.column(name) for name in SCHEMA.names}
                empty = pa.scalar(b"", pa.binary())
                fields = (
                    names.take(column["task"]),
                    column["instruction"],
                    column["target"],
                    column["video"].fill_null(empty),
                    column["image"].fill_null(empty),
                    pc.binary_join(column["frames"], pa.scalar(b"\1", pa.binary())),
                    column["audio"].fill_null(empty),
                    windows.take(column["windows"]),
                    column["second"].fill_null(pa.scalar(b"None", pa.binary())),
                    column["seg_image"].fill_null(empty),
                    column["mask"].fill_null(empty),
                    kinds.take(column["mask_kind"]),
                    column["one_of"].fill_null(empty) if self.marks else pa.repeat(empty, len(chosen)),
                )
                lines = pc.binary_join_element_wise(*fields, b"\0")
                lines = pc.binary_join_element_wise(lines, b"", b"\n")
                at = np.frombuffer(lines.buffers()[1], np.int32)[lines.offset : lines.offset + len(lines) + 1]
                state.update(memoryview(lines.buffers()[2])[at[0] : at[-1]])
        return state.hexdigest()

    def placed(self, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Bucket], np.ndarray, np.ndarray]:
        """Return what `batching.place` returns for every Example, without building it.

        The result is (buckets, int32[N] the bucket of each Example, int32[N,3] its Fill); the bucket is -1 for an
        Example that `fault` finds an error in.
        """
        counts = {table.file: table.lengths(tokenizer) for table in self.tables}
        numbers: dict[Bucket, int] = {}
        of, fills, done = np.full(len(self), -1, np.int32), np.empty((len(self), 3), np.int32), 0
        for table, number, rows in self._parts():
            batch, start = table.batch(number), number * ROWS
            columns = {name: batch.column(name).to_numpy()[rows] for name in _NUMBERS}
            lengths = {name: column[start : start + ROWS][rows] for name, column in counts[table.file].items()}
            here = slice(done, done := done + len(rows))
            sizes, good, fills[here] = _sizes(columns, lengths, config)
            unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
            names = [numbers.setdefault(Bucket(*map(int, size)), len(numbers)) for size in unique]
            of[here] = np.where(good, np.array(names, np.int32)[inverse], -1)
        return list(numbers), of, fills

    def fault(self, at: int, tokenizer: Tokenizer, config: DataConfig) -> InputError:
        """Return the error of an Example that `placed` gives no bucket."""
        table, row = self._place(at)
        if table.value("traits", row) & REFUSED:
            return table.error(row, "refused")
        try:
            place(self[at], tokenizer, config)
        except InputError as error:
            return error
        raise RuntimeError(f"the index {table.file} does not fit example {self[at].id}")

    def odd(self) -> tuple[int, str]:
        """Return the number of Examples whose labels look odd, and what the first of them says."""
        positions = np.flatnonzero(self.has(ODD) & ~self.has(REFUSED))
        if not len(positions):
            return 0, ""
        table, row = self._place(int(positions[0]))
        return len(positions), posixpath.join(table.root, _text(table.value("odd", row)))

    def suspects(self, clips: Collection[str], own: Collection[str]) -> np.ndarray:
        """Return the positions of Examples whose video is among `clips`, or whose own name is among `own`."""
        found = []
        for name, wanted in (("clip", clips), ("own", own)):
            values = pa.array([_bytes(one) for one in wanted], pa.binary())
            parts = [pc.is_in(column, values).to_numpy(zero_copy_only=False) for column in self._column(name)]
            found.append(np.concatenate(parts) if parts else np.zeros(0, bool))
        return np.flatnonzero(found[0] | found[1])


def _sizes(
    columns: dict[str, np.ndarray], lengths: dict[str, np.ndarray], config: DataConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (int[N,5] the bucket, bool[N] whether the Example may be drawn and fits it, int32[N,3] the Fill).

    columns, lengths: those of the index and LENGTHS. The rules are those of `batching.place`.
    """
    traits, windows = columns["traits"], columns["windows"]
    shows_clip, image = (traits & (VIDEO | FRAMES)) > 0, (traits & IMAGE) > 0
    pair = shows_clip & image
    most = np.where(traits & VIDEO, config.video_frames, np.minimum(columns["pictures"], config.video_frames))
    frames = most + image
    heard = np.array([fbank.WINDOW_COUNT[name] for name in WINDOWS])[windows]
    video = np.where(traits & SAYS_VIDEO, np.where(pair, frames - 1, frames) * config.visual_queries, 1)
    picture = np.where(traits & SAYS_IMAGE, np.where(pair, 1, frames) * config.visual_queries, 1)
    runs = {"v": video, "i": picture, "a": heard * config.audio_queries}
    needed, good = np.zeros(len(traits), int), ((traits & AGREES) > 0) & ((traits & REFUSED) == 0)
    for text in ("prompt",) if config.prompt_only else ("prompt", "target"):
        good &= lengths[f"{text}_ids"] >= 0
        needed += lengths[f"{text}_ids"] + sum(lengths[f"{text}_{name}"] * (run - 1) for name, run in runs.items())
    fitting = np.searchsorted(config.lengths, needed)
    single = np.array([name in (*fbank.SINGLE, "none") for name in WINDOWS])[windows]
    bucket = (
        np.append(config.lengths, -1)[fitting],
        np.where(shows_clip, config.video_frames + pair, 1),
        np.where(single, 1, 10),
        np.array([fbank.WINDOW_FRAMES[name] for name in WINDOWS])[windows],
        columns["mask_kind"] != MASK_KINDS.index("none"),
    )
    good &= fitting < len(config.lengths)
    return np.stack(bucket, axis=1), good, np.stack([needed, frames, heard], axis=1).astype(np.int32)


def _indexed(tables: Sequence[tuple[str, str]], rows: Shared, marks: bool) -> Indexed:
    return Indexed([_table(*table) for table in tables], rows, marks)


def _unique(columns: Iterator[pa.Array]) -> set[bytes]:
    return {value.as_py() for column in columns for value in column.unique() if value.is_valid}


# The Examples of a run


class Wanted(NamedTuple):
    """Which Examples a run draws from a data root, as `datasets.read_examples` takes it; on_error: raise or skip."""

    split: str
    names: Sequence[str]
    variant: str
    frames: str
    on_error: str


def read(root: str | Path, wanted: Wanted, left: list[LeftOut] | None = None) -> Sequence[Example]:
    """Return the Examples that a run may draw: of the index where one is there and right, else of the annotations.

    The result equals that of `datasets.read_examples(..., epoch=None)`, with the same warnings and errors.
    """
    tables = _tables(root, wanted)
    if not tables:
        return datasets.read_examples(
            root,
            wanted.split,
            wanted.names,
            wanted.variant,
            wanted.frames,
            wanted.on_error,
            epoch=None,
            malformed=wanted.on_error,
            left=left,
        )
    rows, start, answered = [], 0, Counter[str]()
    for name, table in list(tables.items()):
        if error := table.failed:
            if not isinstance(error, MissingFile) or name == PREPARED or wanted.names or wanted.on_error == "raise":
                raise error
            datasets.warn_absent(name, wanted.split, error)
            del tables[name]
            continue
        kinds, traits = table.numbers("kind"), table.numbers("traits")
        errors = datasets.allowed(
            (table.error(int(row)) for row in np.flatnonzero(kinds != EXAMPLE)), wanted.on_error, wanted.on_error
        )
        notes = [_error(note.encode(), table.root) for note in table.info["notes"]]
        chosen = np.flatnonzero(kinds == EXAMPLE)
        datasets.report_left_out(name, wanted.split, len(chosen), errors, notes, left)
        if name != PREPARED and wanted.split == "train":
            with_answer = (traits[chosen] & ANSWERED) > 0
            answered[name] += int(np.sum(~with_answer))
            chosen = chosen[with_answer]
        rows.append(chosen + start)
        start += table.rows
    chosen = np.concatenate([np.zeros(0, np.int64), *rows])
    examples = Indexed(list(tables.values()), chosen, wanted.frames == "one")
    if PREPARED in tables:
        datasets.warn_of_list(root, wanted.split, wanted.names, wanted.variant, examples.datasets())
    elif without := +answered:
        datasets.warn_without_answer(without)
    if not len(examples) and PREPARED not in tables:
        raise datasets.nothing_left(root, wanted.split)
    return examples


def _tables(root: str | Path, wanted: Wanted) -> dict[str, Table]:
    """Return {dataset: its index} of all that a run reads; {} unless all of them are there and right."""
    if "+" in wanted.split or not (paths.at(root) / FOLDER).is_dir():
        return {}  # splits that are joined are compared with each other
    names: Sequence[str] = [PREPARED]
    if not datasets.list_of(root, wanted.split):
        if not any(datasets.is_there(root, name) for name in datasets.DATASETS):
            return {}
        names = datasets.choose(root, wanted.names, wanted.split)
    tables = {name: opened(root, name, wanted.split, wanted.variant) for name in names}
    there = {name: table for name, table in tables.items() if table}
    if there and len(there) < len(tables):
        lacking = ", ".join(name for name, table in tables.items() if not table)
        _log.warning("%s holds no index of %s: all annotations are read", paths.at(root) / FOLDER, lacking)
    return there if len(there) == len(tables) else {}


def without_leaks(
    examples: Sequence[Example], roots: Sequence[str | Path], split: str, exclude: bool
) -> tuple[Sequence[Example], str]:
    """Return what `leaks.without` returns; of an index, only the Examples whose clips are held out are built."""
    if not isinstance(examples, Indexed):
        return leaks.without(examples, roots, split, exclude)
    held = leaks.all_held_out(roots, split)
    gone, line = leaks.leaking(examples, examples.suspects(held.clips, held.own).tolist(), held, split, exclude)
    kept = np.ones(len(examples), bool)
    kept[gone] = False
    return (examples if kept.all() else examples.take(kept)), line


# The verb


def write_all(
    root: str | Path,
    names: Sequence[str] = (),
    splits: Sequence[str] = datasets.SPLITS,
    variants: Sequence[str] = ("train",),
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Table]:
    """Write the index of every list of a data root that is there, and return them.

    names: datasets; all that are there when empty. tokenizer: counts the tokens of the texts as well. Raises
    InputError.
    """
    lists = [(name, split) for name, split in datasets.selection(root, names) if split in splits]
    prepared, tables = shards.opened(root), []
    if not lists:
        raise InputError(str(root), "--splits", f"holds none of {', '.join(splits)}", "check --root and --splits")
    with locked(paths.at(root) / FOLDER, "--root"):
        for name, split in lists:
            if name != PREPARED and not datasets.is_there(root, name):
                continue
            there = prepared.manifest["variants"] if prepared and name != PREPARED else datasets.VARIANTS
            for variant in [v for v in variants if v in there] if name != PREPARED else ("",):
                write(root, name, split, variant, progress)
                if table := opened(root, name, split, variant):
                    tables.append(table)
                    if tokenizer:
                        table.lengths(tokenizer)
    return tables


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of the verb."""
    parser = CommandLine(__doc__, "python -m data_pipelines index")
    parser.add_argument("--root", type=ANYWHERE, required=True, help="data root: raw, prepared, or with <split>.jsonl")
    parser.add_argument(
        "--datasets",
        type=Words(tuple(datasets.DATASETS)),
        default="",
        metavar="A,B",
        help="comma-separated names (default: all that are there)",
    )
    parser.add_argument("--splits", default=",".join(datasets.SPLITS), help="default %(default)s")
    parser.add_argument("--variants", default="train", help="variants of prompts (data.variant); default %(default)s")
    parser.add_argument("--tokenizer", type=ANYWHERE, help="the config key `tokenizer` of the runs to come")
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if unknown := [v for v in arguments.variants.split(",") if v not in datasets.VARIANTS]:
        fix = f"use some of {','.join(datasets.VARIANTS)}"
        raise InputError("command line", "--variants", f"unknown variant {unknown[0]!r}", fix)
    return arguments


def run(argv: Sequence[str]) -> None:
    """Write the index and print a line for each list."""
    arguments = parse_arguments(argv)
    use_tasks([arguments.task_modules])
    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    names = [name for name in arguments.datasets.split(",") if name]
    tables = write_all(
        arguments.root, names, arguments.splits.split(","), arguments.variants.split(","), tokenizer, on_stderr
    )
    for table in tables:
        if error := table.failed:
            print(printable(f"{table.file}: cannot be read: {error}"))
            continue
        good = int(np.sum(table.numbers("kind") == EXAMPLE))
        bad = f", {table.rows - good:,} rows that cannot be read" if good < table.rows else ""
        print(printable(f"{table.file}: {good:,} examples{bad}, {table.info['bytes'] / 1e6:.1f} MB"))


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines index`."""
    run_verb(lambda: run(argv), "--debug" in argv)
