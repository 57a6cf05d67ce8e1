"""Write the rows of your own table as lists of Examples, which training and evaluation read.

    python -m data_pipelines own --csv clips.csv --root R
    python -m data_pipelines own --jsonl clips.jsonl --root R --copy

with a line for each question, for example

    task,media,question,answer,events
    avqa,clips/band.mp4,How many instruments are sounding?,two,
    ave,clips/dog.mp4,,,Bark 2-5
    avvp,clips/dog.mp4,,,audio: Speech 0-10; Dog 2-5; visual: Dog 0-10
    avcap,clips/dog.mp4,,A dog barks at a man.,

writes R/train.jsonl (and R/val.jsonl, R/test.jsonl where the column `split` says so) with the prompt, target, windows
and label of each task. It then validates them; the exit code is 3 when anything is bad. docs/your_data.md describes
every column. Paths of media are relative to the table's folder, or to R. Media must lie below R; --copy copies the
others.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_folder
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.tasks import add_flag, use_tasks
from data_pipelines import validate
from data_pipelines.datasets import DATASETS, SPLITS
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.own.files import Media
from data_pipelines.own.questions import example_of
from data_pipelines.own.table import SPLIT_NAMES, Row, csv_rows, jsonl_rows


def split_of(row: Row, default: str) -> str:
    """Return the split of a row, `default` where the row names none. Raises InputError for an unknown one."""
    stated = row.given("split")
    name = default if stated is None else SPLIT_NAMES.get(str(stated).lower())
    if name is None:
        raise row.error("split", f"unknown split {stated!r}", f"use one of {', '.join(SPLITS)}")
    return name


def build(
    rows: Sequence[Row], files: Media, split: str, progress: Callable[[str], None] | None = None
) -> dict[str, list[Example]]:
    """Return {split: Examples of its rows, in order}.

    Raises the InputError of the first wrong row, with the number of further wrong rows.
    """
    examples: dict[str, list[Example]] = {}
    seen: dict[tuple[str, str], int] = {}
    wrong: list[InputError] = []
    pace = Progress("rows", len(rows), progress)
    for done, row in enumerate(rows):
        pace.to(done)
        try:
            example = example_of(row, files)
            key = (split_of(row, split), example.id)
            if key in seen:
                raise row.error("id", f"{example.id!r:.60} is that of line {seen[key]} too", "give each row its own")
            seen[key] = row.number
            examples.setdefault(key[0], []).append(example)
        except InputError as error:
            wrong.append(error)
    if wrong:
        first = wrong[0]
        more = f" ({len(wrong) - 1} more rows are wrong)" if wrong[1:] else ""
        raise InputError(first.where, first.field, f"{first.problem}{more}", first.fix)
    return examples


def _check_root(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise InputError(str(root), "--root", "is no folder", "give a folder")
    if releases := [d.folder for name, d in DATASETS.items() if name != "own" and (root / d.folder).is_dir()]:
        raise InputError(
            str(root),
            "--root",
            f"holds {releases[0]}/, which is not read where a list of examples is beside it",
            f"give --root {root / 'own'}, which is read as the dataset `own`",
        )


def run(argv: Sequence[str]) -> bool:
    """Write the lists and validate them; return whether anything is bad."""
    parser = CommandLine(__doc__, "python -m data_pipelines own")
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--csv", type=ANYWHERE, help="table with the columns named in its first line")
    tables.add_argument("--jsonl", type=ANYWHERE, help="table of JSON objects, one a line, whose keys are the columns")
    parser.add_argument("--root", type=ANYWHERE, required=True, help="data root to write to")
    parser.add_argument("--split", default="train", choices=SPLITS, help="split of rows that name none (%(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy media that lie elsewhere to R/media")
    parser.add_argument("--overwrite", action="store_true", help="replace lists and copies that exist")
    parser.add_argument(
        "--workers", type=Whole(0, 1024), default=0, help="number of processes that validate (default: one per core)"
    )
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments: argparse.Namespace = parser.parse_args(argv)
    use_tasks([arguments.task_modules])
    table, root = paths.at(arguments.csv or arguments.jsonl), paths.at(arguments.root)
    _check_root(root)
    notes: dict[str, None] = {}  # notes on the table, printed only when all rows can be used
    rows = list((csv_rows if arguments.csv else jsonl_rows)(table, notes.setdefault))
    if not rows:
        raise InputError(str(table), "", "holds no row", "write a line for each question")
    lists = {split: root / f"{split}.jsonl" for split in dict.fromkeys(split_of(row, arguments.split) for row in rows)}
    for path in lists.values():
        if path.exists() and not arguments.overwrite:
            raise InputError(str(path), "", "is there already", "give --overwrite to replace it, or another --root")
    if arguments.copy or root.exists():  # a wrong table must not create the folder
        out_folder(root, "--root")
    files = Media(root, table.parent, arguments.copy, arguments.overwrite)
    examples = build(rows, files, arguments.split, on_stderr)
    for note in notes:
        on_stderr(note)
    out_folder(root, "--root")
    files.write_moments()
    for split, path in lists.items():
        write_jsonl(path, examples[split])
        tasks = Counter(example.task for example in examples[split])
        print(f"{path}: {len(examples[split])} examples ({', '.join(f'{n} {task}' for task, n in tasks.items())})")
    return validate.run(["--root", str(root), "--workers", str(arguments.workers)])


def main(argv: Sequence[str]) -> None:
    """Entry point of `python -m data_pipelines own`."""
    run_verb(lambda: sys.exit(validate.BAD) if run(argv) else None, "--debug" in argv)
