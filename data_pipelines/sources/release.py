"""One dataset as its project publishes it: annotation files read row by row, media files found without leaving it.

Every reader of this room is `read(release, split, variant) -> Iterator[Example | InputError]`: what is wrong with a row
is yielded in its place, so that one pass can list every defect (`status`) or stop at the first (`datasets.read`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crab_jax.errors import InputError
from data_pipelines.examples import Example, strict_json

Found = Example | InputError
T = TypeVar("T")
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_DRIVE = re.compile(r"[A-Za-z]:")


class MissingFile(InputError):
    """A file that an annotation names, or an annotation file itself, is not there: a partial copy, not a bad one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One record of an annotation file. `place` is file:line (file:item for JSON) within the release."""

    base: Path
    place: str
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        return str(self.base / self.place)

    def error(self, field: str, problem: str, fix: str) -> InputError:
        return InputError(self.where, field, problem, fix)

    def text(self, field: str) -> str:
        """A field that must be text."""
        value = self.values.get(field)
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"is {value!r:.60}, not text"
            raise self.error(field, problem, "use the annotation file as released")
        return value

    def matching(self, field: str, pattern: re.Pattern[str], example: str) -> re.Match[str]:
        """A text that is of one form, such as a clip's name; never one that leads to another folder."""
        found = pattern.fullmatch(self.text(field))
        if not found:
            raise self.error(field, f"is {self.text(field)!r:.60}", f"must look like {example}")
        return found

    def one_of(self, field: str, allowed: Sequence[str]) -> str:
        """A text from a closed list."""
        if (value := self.text(field)) not in allowed:
            listed = ", ".join(allowed[:6]) + (", ..." if len(allowed) > 6 else "")
            raise self.error(field, f"unknown value {value!r:.60}", f"use one of {listed}")
        return value

    def integer(self, field: str, low: int, high: int) -> int:
        """A whole number in [low, high], written as a JSON number or in ASCII digits."""
        value = self.values.get(field)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(field, f"is {value!r:.60}", f"must be a whole number from {low} to {high}")
        return value


def each(rows: Iterable[Row | InputError], make: Callable[[Row], Iterable[T]]) -> Iterator[T | InputError]:
    """What is made of every row, with what is wrong with a row in its place."""
    for row in rows:
        if isinstance(row, InputError):
            yield row
            continue
        try:
            yield from make(row)
        except InputError as error:
            yield error


class Release:
    """The folder of one dataset under a data root. Paths are relative to that folder unless said otherwise.

    The folder itself may be a link to another disk; nothing inside it may lead out of it.
    """

    def __init__(self, root: str | Path, folder: str = ""):
        self.root, self.folder, self.base = Path(root), folder, Path(root) / folder
        self._real = os.path.realpath(self.base)
        self._listed: dict[str, dict[str, str] | None] = {}

    # Annotation files.

    def annotation(self, *names: str) -> str:
        """The first of `names` that is there. Raises MissingFile."""
        found = next((name for name in names if os.path.isfile(self.base / name)), None)
        if found is None:
            others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
            raise MissingFile(str(self.base / names[0]), "", f"no such annotation file{others}",
                              "copy the release's annotation files; docs/datasets.md shows the tree")
        return found

    def text(self, name: str) -> str:
        """The content of a UTF-8 file, without a byte order mark. Raises InputError, also for an empty file."""
        again = "copy the annotation file again"
        try:
            data = (self.base / name).read_bytes()
        except OSError as error:
            raise InputError(str(self.base / name), "", f"cannot be read ({error.strerror})", again) from None
        if not data.strip():
            raise InputError(str(self.base / name), "", "is empty", again)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            raise InputError(f"{self.base / name}:{number}", "", "is not UTF-8 text", again) from None

    def lines(self, name: str) -> list[str]:
        """Lines of a text file; CRLF ends and empty lines at the end of the file are dropped."""
        lines = [line.removesuffix("\r") for line in self.text(name).split("\n")]
        while lines and not lines[-1].strip():
            lines.pop()
        return lines

    def table(self, name: str, columns: Sequence[str], delimiter: str = ",", quoted: bool = True,
              header: bool | None = True) -> Iterator[Row | InputError]:
        """Rows of a table of text, one line each.

        header: True = the first line names the columns, which may be more than `columns` and in any order;
        None = a first line of exactly `columns` is a header, and the columns are fixed.
        """
        lines = self.lines(name)
        names, first = list(columns), 0
        if header or (lines and lines[0] == delimiter.join(columns)):
            names, first = (_cells(lines[0], delimiter, quoted) or []) if lines else [], 1
            if absent := [column for column in columns if column not in names]:
                raise InputError(f"{self.base / name}:1", absent[0], "no such column in the header",
                                 f"the header of the release has {delimiter.join(columns)!r}")
        for number, line in enumerate(lines[first:], first + 1):
            cells = _cells(line, delimiter, quoted)
            if cells is None or len(cells) != len(names):
                problem = f"has {len(cells)} fields, not {len(names)}" if cells else "has an unfinished quotation"
                yield InputError(f"{self.base / name}:{number}", "", f"{problem}: {line!r:.60}",
                                 "restore the row from the release")
            else:
                yield Row(self.base, f"{name}:{number}", dict(zip(names, cells, strict=True)))

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        try:
            return strict_json(self.text(name))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.base / name}:{error.lineno}", "", f"not valid JSON ({error.msg})",
                             "copy the file again") from None
        except ValueError as error:  # numbers of thousands of digits, too
            raise InputError(str(self.base / name), "", f"not readable JSON ({str(error):.100})",
                             "copy the file again") from None

    def records(self, name: str, items: Any = None) -> Iterator[Row | InputError]:
        """The objects of a JSON file that holds a list, or of `items` from inside of one."""
        items = self.json(name) if items is None else items
        if not isinstance(items, list):
            raise InputError(str(self.base / name), "", f"holds {type(items).__name__}, not a list",
                             "use the annotation file as released")
        for number, item in enumerate(items):
            row = Row(self.base, f"{name}:item {number}", item if isinstance(item, dict) else {})
            yield row if isinstance(item, dict) else row.error("", f"is {item!r:.40}, not an object",
                                                               "use the annotation file as released")

    # Media files.

    def inside(self, path: str, where: str, field: str) -> str:
        """`path` relative to the data root. Raises InputError for one that is absolute or climbs out with `..`."""
        parts = path.rstrip("/").split("/")
        if path.startswith(("/", "~")) or "\\" in path or "\0" in path or {"", ".."} & set(parts) or _DRIVE.match(path):
            raise InputError(where, field, f"the path {path!r:.80} leaves the data root",
                             "give a path inside it, with / between its parts")
        return f"{self.folder}/{path}" if self.folder else path

    def pick(self, path: str, *folders: str) -> str:
        """`path` in the first of `folders` that holds it, or in the first of them."""
        return next((f"{folder}/{path}" for folder in folders if self.kind(f"{folder}/{path}")), f"{folders[0]}/{path}")

    def kind(self, path: str) -> str:
        """"file", "folder", "outside" for a link that leaves the release, "special" for a pipe or a device, "" for
        nothing there.

        A folder is listed once, so that a hundred thousand questions cost a few hundred system calls.
        """
        folder, _, name = path.rpartition("/")
        listed = self._listing(folder)
        return "outside" if listed is None else listed.get(name, "")

    def names(self, folder: str) -> list[str]:
        """The files of a folder."""
        return [name for name, kind in (self._listing(folder) or {}).items() if kind == "file"]

    def _listing(self, folder: str) -> dict[str, str] | None:
        """name -> kind of what is in a folder; None for a folder outside."""
        if folder not in self._listed:
            self._listed[folder] = self._list(folder)
        return self._listed[folder]

    def _list(self, folder: str) -> dict[str, str] | None:
        if not self._contains(self.base / folder):
            return None
        try:
            with os.scandir(self.base / folder) as entries:
                return {entry.name: self._kind_of(entry) for entry in entries}
        except (OSError, ValueError):
            return {}

    def _kind_of(self, entry: os.DirEntry[str]) -> str:
        try:
            if entry.is_symlink() and not self._contains(entry.path):
                return "outside"
            return "file" if entry.is_file() else "folder" if entry.is_dir() else "special" if os.path.exists(
                entry.path) else ""
        except OSError:  # links in a circle
            return ""

    def _contains(self, path: str | Path) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(self._real + os.sep)

    def check(self, path: str, where: str, field: str) -> None:
        """Raise MissingFile when `path` (relative to the data root) is no file, InputError when it leads elsewhere."""
        kind = self.kind(path.removeprefix(f"{self.folder}/") if self.folder else path)
        if kind == "outside":
            raise InputError(where, field, f"{path} is a link out of the data root",
                             "put the file there, or link the dataset's whole folder")
        if kind == "special":
            raise InputError(where, field, f"{path} is a pipe or a device", "put a file there")
        if kind != "file":
            problem = f"{path} is {'a folder' if kind else 'missing'}"
            raise MissingFile(where, field, problem,
                              "complete the copy, or read what is there with missing=skip (data.on_error=skip)")


def _cells(line: str, delimiter: str, quoted: bool) -> list[str] | None:
    """The cells of one line; None when a quotation does not end on it."""
    if not quoted:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None
