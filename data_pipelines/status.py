"""What of every dataset is there: have / missing / corrupt / effective N, per dataset and split.

    python -m data_pipelines status --root R --datasets ave,avqa --json runs/status.json

Reads the annotations and looks at the outline of every media file, without decoding any (`validate` does). Nothing that
is missing or damaged is an error here: the command exits 0 on any partial copy, and names every problem in --json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crab_jax.errors import CommandLine, InputError, run_verb
from data_pipelines.datasets import DATASETS, choose, media_of, records
from data_pipelines.examples import Example
from data_pipelines.media import riff_damage
from data_pipelines.sources.release import MissingFile

_MP4 = (".mp4", ".m4a", ".m4v", ".mov")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"uuid", b"pnot")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong. dataset, id (the annotation's line), path of the file, field, and what it is."""

    dataset: str
    split: str
    id: str
    path: str
    field: str
    problem: str


@dataclasses.dataclass
class Count:
    """Examples of one split. complete: of the whole release, None where not known; annotated = have + the others;
    missing: a media file is not there; corrupt: one is damaged; malformed: the annotation is; have: the effective N."""

    dataset: str
    split: str
    complete: int | None
    annotated: int = 0
    have: int = 0
    missing: int = 0
    corrupt: int = 0
    malformed: int = 0
    note: str = ""


def status(root: str | Path, names: Sequence[str] = (), progress: Callable[[str], None] | None = None
           ) -> tuple[list[Count], list[Problem]]:
    """Counts of every split of the datasets `names` (all when empty), and every problem. Raises InputError only for a
    root that is no folder and an unknown name."""
    if not Path(root).is_dir():
        raise InputError(str(root), "--root", "is no folder", "give the folder that holds the datasets")
    names = choose(root, names) if names else list(DATASETS)
    damage_of = functools.cache(functools.partial(damage, root))
    counts: list[Count] = []
    problems: list[Problem] = []
    for name in names:
        for split, complete in DATASETS[name].sizes.items():
            if split in ("test_s", "test_u", "test_n"):
                continue  # parts of test
            count = Count(name, split, complete)
            counts.append(count)
            if not (Path(root) / DATASETS[name].folder).is_dir():
                count.note = f"no folder {DATASETS[name].folder}/"
                continue
            try:
                problems += _count(count, root, damage_of, progress)
            except InputError as error:  # of an annotation file as a whole
                count.note = str(error)
                kind = "missing" if isinstance(error, MissingFile) else "malformed"
                problems.append(Problem(name, split, "", error.where, error.field, f"{kind}: {error.problem}"))
    return counts, problems


def _count(count: Count, root: str | Path, damage_of: Callable[[str], str], progress: Callable[[str], None] | None
           ) -> Iterator[Problem]:
    """Count one split; yields its problems."""
    began = shown = time.monotonic()
    for found in records(root, count.dataset, count.split):
        count.annotated += 1
        if isinstance(found, Example):
            damaged = [(field, path, what) for field, path in media_of(found) if (what := damage_of(path))]
            count.corrupt += bool(damaged)
            count.have += not damaged
            for field, path, what in damaged:
                yield Problem(count.dataset, count.split, found.id, path, field, f"corrupt: {what}")
        else:
            kind = "missing" if isinstance(found, MissingFile) else "malformed"
            count.missing += kind == "missing"
            count.malformed += kind == "malformed"
            yield Problem(count.dataset, count.split, os.path.relpath(found.where, root), found.where, found.field,
                          f"{kind}: {found.problem}")
        now = time.monotonic()
        if progress and now - shown > 3:
            shown, rate = now, count.annotated / (now - began)
            left = f", {max(0, count.complete - count.annotated) / rate:.0f} s left" if count.complete else ""
            progress(f"{count.dataset} {count.split}: {count.annotated} examples, {rate:.0f}/s{left}")


def damage(root: str | Path, path: str) -> str:
    """What is wrong with the outline of a media file: empty, no file of its kind, or cut off; "" when nothing is."""
    full = Path(root) / path
    try:
        size = full.stat().st_size
        if not size:
            return "the file is empty"
        with open(full, "rb") as file:
            head = file.read(16)
            file.seek(max(0, size - 4096))
            tail = file.read()
            suffix = full.suffix.lower()
            if suffix in _MP4:
                return _mp4_damage(file, size)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if suffix == ".wav":
        return riff_damage(full) if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE" else "is no WAV file"
    if suffix == ".png":
        return ("is no PNG file" if head[:8] != b"\x89PNG\r\n\x1a\n" else "ends before the picture does"
                if b"IEND\xaeB`\x82" not in tail else "")
    if suffix in (".jpg", ".jpeg"):
        return ("is no JPEG file" if head[:2] != b"\xff\xd8" else "ends before the picture does"
                if b"\xff\xd9" not in tail else "")
    return ""


def _mp4_damage(file: Any, size: int) -> str:
    """Walk the boxes of the outermost level: their sizes must add up to the file, and the index must be among them."""
    at, kinds = 0, set()
    while at < size:
        file.seek(at)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if not at and kind not in _MP4_BOXES:
            return "is no MP4 file"
        length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
        if at + length > size:
            return f"ends inside of its {kind.decode('latin-1')!r} box, {at + length - size} bytes short"
        if length < 8:
            return "" if b"moov" in kinds else f"has a broken box at byte {at}"
        kinds.add(kind)
        at += length
    return "" if b"moov" in kinds else "has no index (moov); the copy stopped early"


def table(counts: Sequence[Count]) -> str:
    """The counts as text. `-` stands for what is not known or not there."""
    header = ("dataset", "split", "complete", "annotated", "missing", "corrupt", "malformed", "effective N")
    rows: list[tuple[str, ...]] = [header]
    for c in counts:
        numbers = (c.annotated, c.missing, c.corrupt, c.malformed, c.have)
        rows.append((c.dataset, c.split, "-" if c.complete is None else f"{c.complete:,}",
                     *("-" if c.note else f"{n:,}" for n in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    notes = ["", *(c.note for c in counts)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of the verb."""
    parser = CommandLine(__doc__, "python -m data_pipelines status")
    parser.add_argument("--root", required=True, help="data root: releases in folders of their names")
    parser.add_argument("--datasets", default="", help=f"comma-separated, of {','.join(DATASETS)} (default: all)")
    parser.add_argument("--json", default="", help="file to write the counts and every problem to")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Print the table, and write the report when asked to."""
    arguments = parse_arguments(argv)
    names = [name for name in arguments.datasets.split(",") if name]
    counts, problems = status(arguments.root, names, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        report = {"counts": [dataclasses.asdict(count) for count in counts],
                  "problems": [dataclasses.asdict(problem) for problem in problems]}
        try:
            Path(arguments.json).write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise InputError(arguments.json, "--json", f"cannot be written ({error.strerror})",
                             "give a file in a folder that exists") from error
    print(table(counts))
    for problem in problems[:10]:
        print(f"  {problem.dataset} {problem.split}, {problem.id} [{problem.field}]: {problem.problem}")
    if problems[10:]:
        print(f"  and {len(problems) - 10} more; --json FILE lists them")


def main(argv: Sequence[str]) -> None:
    """Entry point of `python -m data_pipelines status`."""
    run_verb(lambda: run(argv), "--debug" in argv)
