"""Count what is there of every dataset and split: have / missing / corrupt / effective N.

    python -m data_pipelines status --root R --datasets ave,avqa --json runs/status.json

Reads the annotations and checks the container structure of every media file, without decoding any (`validate` does).
Missing or damaged files are no errors here: the command exits 0 on any partial copy, and lists every problem in --json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from crab_jax.io import paths
from crab_jax.io.bounds import ANY_PLACE, ANYWHERE
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import out_file, write_whole
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.tasks import add_flag, use_tasks
from data_pipelines import media, shards
from data_pipelines.datasets import DATASETS, dataset_of, is_there, media_of, records, selection
from data_pipelines.examples import Example
from data_pipelines.sources.release import MissingFile

# The kinds of problems, which are the first words of their texts.
MISSING, CORRUPT, MALFORMED, LEAK, WARNING = "missing", "corrupt", "malformed", "leak", "warning"
KINDS = (MISSING, CORRUPT, MALFORMED, LEAK, WARNING)
FILMS = ("video", "audio")  # fields of an Example with films and sounds; the others have pictures
Look = Callable[[str, str, Example], Iterable[tuple[str, str, str]]]  # (dataset, split, Example) -> (field, path, text)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of the data.

    id: of the Example, or the line of the annotation file. path: of the file. problem: its kind, a colon, and a
    description.
    """

    dataset: str
    split: str
    id: str
    path: str
    field: str
    problem: str

    @property
    def kind(self) -> str:
        """Return the kind, one of KINDS."""
        return self.problem.partition(":")[0]


@dataclasses.dataclass
class Count:
    """The counts of one split.

    complete: Examples of the whole release, None where unknown. annotated = have + the others; missing: a media file
    does not exist; corrupt: a media file is damaged; malformed: the annotation is faulty; have: the effective N. note:
    why nothing could be counted. notes: remarks on the annotations (Release.notes).
    """

    dataset: str
    split: str
    complete: int | None
    annotated: int = 0
    have: int = 0
    missing: int = 0
    corrupt: int = 0
    malformed: int = 0
    note: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def status(
    root: str | Path, names: Sequence[str] = (), progress: Callable[[str], None] | None = None, look: Look | None = None
) -> tuple[list[Count], list[Problem]]:
    """Return the counts of every split of the datasets `names` (all when empty), and every problem.

    look: returns the problems of an Example whose files exist; None checks the container structure of each file (those
    of a prepared root are checked when it is opened). Raises InputError only for a root that is no folder, a prepared
    root that is unfinished or damaged, and an unknown name.
    """
    look = look or ((lambda *example: ()) if shards.opened(root) else outlines(root))
    counts: list[Count] = []
    problems: list[Problem] = []
    for name, split in selection(root, names):
        count = Count(name, split, dataset_of(name).sizes[split])
        counts.append(count)
        if not is_there(root, name):
            count.note = f"no folder {dataset_of(name).folder}/"
            continue
        try:
            problems += _count(count, root, look, progress)
        except InputError as error:  # an annotation file as a whole cannot be read
            count.note = str(error)
            kind = MISSING if isinstance(error, MissingFile) else MALFORMED
            problems.append(Problem(name, split, "", error.where, error.field, f"{kind}: {error.problem}"))
    return counts, problems


def outlines(root: str | Path) -> Look:
    """Return a function that checks the container structure of each file once."""
    damage_of = functools.cache(functools.partial(damage, root))  # most files belong to several Examples

    def look(dataset: str, split: str, example: Example) -> Iterator[tuple[str, str, str]]:
        for field, path in media_of(example):
            if what := damage_of(path, field):
                yield field, path, f"{CORRUPT}: {what}"

    return look


def _count(count: Count, root: str | Path, look: Look, progress: Callable[[str], None] | None) -> Iterator[Problem]:
    """Count one split and yield its problems."""
    pace = Progress(f"{count.dataset} {count.split}", count.complete or 0, progress)
    notes: list[InputError] = []
    for found in pace.over(records(root, count.dataset, count.split, notes=notes)):
        count.annotated += 1
        if isinstance(found, Example):
            problems = [
                Problem(count.dataset, count.split, found.id, path, field, text)
                for field, path, text in look(count.dataset, count.split, found)
            ]
            kinds = {problem.kind for problem in problems}
            kind = next((kind for kind in (MALFORMED, CORRUPT) if kind in kinds), "")
            yield from problems
        else:
            kind = MISSING if isinstance(found, MissingFile) else MALFORMED
            yield Problem(
                count.dataset,
                count.split,
                _within(root, found.where),
                found.where,
                found.field,
                f"{kind}: {found.problem}",
            )
        count.missing += kind == MISSING
        count.corrupt += kind == CORRUPT
        count.malformed += kind == MALFORMED
        count.have += not kind
    count.notes = [
        f"{_within(root, note.where)}{f' [{note.field}]' if note.field else ''}: {note.problem}" for note in notes
    ]


def _within(root: str | Path, where: str) -> str:
    """Return a place (file, or file:line) below the data root, relative to it."""
    return where.removeprefix(f"{paths.at(root)}/")


def damage(root: str | Path, path: str, field: str) -> str:
    """Return what is wrong with the structure of a media file: empty, of another kind, or cut off; "" if nothing is.

    The content decides, not the name, and everything that the loader reads is accepted.
    """
    full = paths.at(root) / path
    try:
        if not full.stat().st_size:
            return "the file is empty"
        full = paths.local(full)
        if field not in FILMS:
            return media.picture_outline(full, field)
        wrong = media.not_supported(full)
        return wrong[0] if wrong else media.outline(full)
    except OSError as error:
        if paths.is_remote(root):  # says nothing about the file
            raise
        return f"cannot be read ({error.strerror})"


def table(counts: Sequence[Count]) -> str:
    """Format the counts as text. `-` stands for unknown or missing values."""
    header = ("dataset", "split", "complete", "annotated", "missing", "corrupt", "malformed", "effective N")
    rows: list[tuple[str, ...]] = [header]
    for c in counts:
        numbers = (c.annotated, c.missing, c.corrupt, c.malformed, c.have)
        rows.append(
            (
                c.dataset,
                c.split,
                "-" if c.complete is None else f"{c.complete:,}",
                *("-" if c.note else f"{n:,}" for n in numbers),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    notes = ["", *(c.note or (f"{len(c.notes):,} notes" if c.notes else "") for c in counts)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))


def command_line(doc: str | None, prog: str) -> argparse.ArgumentParser:
    """Return the parser of a verb that examines a data root."""
    parser = CommandLine(doc, prog)
    parser.add_argument("--root", type=ANYWHERE, required=True, help="data root: releases in folders of their names")
    parser.add_argument(
        "--datasets",
        default="",
        type=lambda text: [name for name in text.split(",") if name],
        help=f"comma-separated, of {','.join(DATASETS)} (default: all)",
    )
    parser.add_argument("--json", type=ANY_PLACE, default="", help="file to write the counts and every problem to")
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def report(counts: Sequence[Count], problems: Sequence[Problem], file: str) -> None:
    """Print the table and the first problems; write all of them to `file` unless it is ""."""
    if file:
        content = {
            "counts": [dataclasses.asdict(count) for count in counts],
            "kinds": {kind: sum(problem.kind == kind for problem in problems) for kind in KINDS},
            "problems": [dataclasses.asdict(problem) for problem in problems],
        }
        # File names may contain bytes that are not text.
        write_whole(file, json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    print(table(counts))
    for problem in sorted(problems, key=lambda problem: KINDS.index(problem.kind))[:10]:
        line = f"  {problem.dataset} {problem.split}, {problem.id} [{problem.field}]: {problem.problem}"
        print(printable(line)[:300])  # names may be long, or not text
    if problems[10:]:
        print(f"  and {len(problems) - 10} more; --json FILE lists them")
    for c in (c for c in counts if c.notes):
        more = f" (and {len(c.notes) - 1} more notes; --json FILE lists them)" if c.notes[1:] else ""
        print(printable(f"  note on {c.dataset} {c.split}, {c.notes[0]}{more}"))


def run(argv: Sequence[str]) -> None:
    """Print the table, and write the report if requested."""
    arguments = command_line(__doc__, "python -m data_pipelines status").parse_args(argv)
    use_tasks([arguments.task_modules])
    if arguments.json:
        out_file(arguments.json, "--json")
    counts, problems = status(arguments.root, arguments.datasets, on_stderr)
    report(counts, problems, arguments.json)


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines status`."""
    run_verb(lambda: run(argv), "--debug" in argv)
