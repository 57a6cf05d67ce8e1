"""Tables of users: their columns, and reading their rows from CSV and JSONL files."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.io.progress import on_stderr
from crab_jax.io.structured import LIST, json_line, read_bytes
from crab_jax.tasks import TASKS
from crab_jax.tasks.rows import columns_of
from data_pipelines.datasets import SPLITS

COMMON = ("id", "task", "split", "media", "video", "frames", "image", "audio", "reasoning")
OTHER_NAMES = {"objects": "object", "event": "events", "caption": "answer", "captions": "answer"}
SPLIT_NAMES = {
    **{split: split for split in SPLITS},
    "training": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
}
# Texts that pandas, R and spreadsheets write into empty cells, and into cells whose formula failed.
EMPTY = frozenset(
    (
        "nan",
        "NaN",
        "NA",
        "N/A",
        "<NA>",
        "NaT",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "#REF!",
        "#NAME?",
        "#VALUE!",
        "#DIV/0!",
        "#NUM!",
        "#NULL!",
    )
)
Say = Callable[[str], None]


def columns() -> tuple[str, ...]:
    """Return every column that a table may have: the common ones, then those of each task."""
    return tuple(dict.fromkeys((*COMMON, *(name for task in TASKS.values() for name in columns_of(task)))))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table.

    where: file and line. number: of the line. values: column -> text, or any value from JSON.
    """

    where: str
    number: int
    values: Mapping[str, Any]

    def error(self, field: str, problem: str, fix: str) -> InputError:
        """Return the error that names the row's file and line."""
        return InputError(self.where, field, problem, fix)

    def given(self, field: str) -> Any:
        """Return the value of a column, None where it is empty. Raises InputError for words such as NaN."""
        value = self.values.get(field)
        value = value.strip() if isinstance(value, str) else value
        if isinstance(value, str) and value in EMPTY:
            raise self.error(
                field,
                f"is {value!r}, which programs write for nothing, or for an error of a formula",
                "leave the cell empty, or write what is meant",
            )
        return None if value in ("", []) else value

    def text(self, field: str, fix: str = "") -> str:
        """Return the text of a column. Raises InputError, with `fix`, where it is empty or not text."""
        value = self.given(field)
        if value is None:
            raise self.error(field, f"is empty, and {self.values['task']} needs it", fix or f"give the {field}")
        if not isinstance(value, str):
            raise self.error(field, f"is {value!r:.60}, not text", "write it in quotes")
        return " ".join(value.split())

    def text_of(self, field: str, value: Any) -> str:
        """Return `value`, which is a part of a column, checked as `text` checks a whole one."""
        return dataclasses.replace(self, values={**self.values, field: value}).text(field)

    def second(self) -> int | None:
        """Return the column `second`, None where it is empty. Raises InputError unless it is a whole number."""
        value = self.given("second")
        if isinstance(value, bool) or value is not None and not re.fullmatch(r"\d{1,4}(?:\.0+)?", str(value)):
            raise self.error("second", f"is {value!r:.60}", "give a whole number, counted from 0")
        return None if value is None else int(float(value))


# Reading a table.


def read_text(path: Path, flag: str, say: Say) -> str:
    """Return the text of a table file: UTF-8, UTF-16 with a byte order mark, or Western Windows text, with a note."""
    data = read_bytes(path, flag, LIST, "give a file")
    if data.startswith(b"PK\x03\x04"):
        raise InputError(str(path), flag, "is a workbook, not text", "save it as CSV UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings: tuple[str, ...] = ("utf-16",)
    else:
        encodings = ("utf-8-sig",) if b"\0" in data else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if encoding == "cp1252":
            say(f"{path} is not UTF-8; it is read as Western Windows text (cp1252)")
        return text
    raise InputError(str(path), flag, "is no text of a known encoding", "save it as CSV UTF-8")


def _name(header: str) -> str:
    """Return the column that a header names, in any case and with spaces or hyphens for underscores."""
    name = re.sub(r"[\s-]+", "_", header.strip().lower())
    return OTHER_NAMES.get(name, name)


def _check_columns(names: Sequence[str], where: str, say: Say) -> None:
    """Raise InputError for columns that come twice or seem misspelt; report others that are not read."""
    for name, times in Counter(name for name in names if name).items():
        if times > 1:
            raise InputError(where, name, "comes twice in the header", "keep one column")
    if "task" not in names:
        raise InputError(
            where,
            "task",
            f"no such column among {', '.join(names)[:80]!r}",
            f"name the columns in the first line, some of {', '.join(columns())}",
        )
    known = columns()
    others = [name for name in names if name and name not in known]
    for name in others:
        if close := difflib.get_close_matches(name, [c for c in known if c not in names], 1, 0.8):
            raise InputError(where, name, "no such column", f"did you mean {close[0]!r}? Rename or remove it")
    if others:
        say(f"columns that are not read: {', '.join(others)}")


def csv_rows(path: Path, say: Say = on_stderr) -> Iterator[Row]:
    """Yield the rows of a table with commas, semicolons, tabs or bars between cells; empty rows are skipped."""
    text = read_text(path, "--csv", say)
    skipped = 0
    if separator := re.match(r"sep=(.)\r?\n", text):
        text, skipped = text[separator.end() :], 1
    first, known = text.lstrip("\r\n").split("\n", 1)[0], columns()
    delimiter = (
        separator[1]
        if separator
        else max(",;\t|", key=lambda mark: sum(_name(cell) in known for cell in first.replace('"', "").split(mark)))
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        while True:
            number = reader.line_num + skipped + 1
            cells = next(reader, None)
            if cells is None:
                break
            where = f"{path}:{number}"
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [_name(cell) for cell in cells]
                _check_columns(names, where, say)
                continue
            if any(cell.strip() for cell in cells[len(names) :]):
                raise InputError(
                    where,
                    "",
                    f"has {len(cells)} cells, but the header {len(names)}",
                    f"put text that holds {delimiter!r} in double quotes",
                )
            yield Row(where, number, dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.line_num + skipped}",
            "",
            f"cannot be read as CSV ({error})",
            "look for a double quote that is not closed",
        ) from None
    if not names:
        raise InputError(str(path), "--csv", "is empty", "name the columns in its first line")


def jsonl_rows(path: Path, say: Say = on_stderr) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object on each line as rows."""
    for number, line in enumerate(read_text(path, "--jsonl", say).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            value = json_line(line, where)
            if not isinstance(value, dict):
                raise InputError(where, "", f"is {type(value).__name__}, not an object", "write one object a line")
            values = {_name(key): inside for key, inside in value.items()}
            _check_columns(list(values), where, say)
            yield Row(where, number, values)
