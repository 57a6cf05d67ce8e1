"""One dataset as its project publishes it: annotation files read row by row, and media files inside its folder.

Every reader in this package is `read(release, split, variant) -> Iterator[Example | InputError]`: an error of a row is
yielded in its place, so that one pass can list every defect (`status`), skip malformed rows or stop at the first
(`datasets.read`). Remarks about rows without errors go into `Release.notes`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.structured import LIST, json_line, read_bytes, strict_json
from data_pipelines.examples import Example

Found = Example | InputError
T = TypeVar("T")
DELIMITERS = (",", "\t", ";", "&", "|")  # of tables that programs saved again
_DRIVE = re.compile(r"[A-Za-z]:")
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SCIENTIFIC = re.compile(r"-?[0-9]+(\.[0-9]+)?[eE]\+[0-9]+")  # a long number written by a spreadsheet
_UNDECODED = re.compile(r"[\udc80-\udcff]")  # surrogates that stand for bytes that are not UTF-8
_NOTHING = re.compile(r"(nan|NaN|<NA>|None|NULL|#?N/A)?")  # cells without a value
_AGAIN = "copy the annotation file again"


def safe_name(text: str) -> bool:
    """Return whether a text can name one file, in any script: no separator or control character, not empty or `..`."""
    return bool(text.strip()) and text not in (".", "..") and not _UNSAFE.search(text)


class MissingFile(InputError):
    """A file named by an annotation, or an annotation file itself, does not exist: a partial copy, not a faulty one."""


def stamp(path: str | Path) -> tuple[int, int] | None:
    """Return (size, time in ns) of a file, or of a folder, whose time changes with its entries; None without one.

    A folder in a bucket has no time: its entries are counted and hashed. Raises OSError for a bucket that fails.
    """
    try:
        status = paths.at(path).stat()
    except (OSError, ValueError) as error:
        if paths.is_remote(path) and not isinstance(error, FileNotFoundError):
            raise
        return None
    if paths.is_remote(path) and stat.S_ISDIR(status.st_mode):
        return _stamp_of(paths.in_bucket(path).entries())
    return status.st_size, status.st_mtime_ns


def _stamp_of(entries: Sequence[tuple[str, str]]) -> tuple[int, int] | None:
    """Return (number, hash) of the entries of a folder in a bucket, None without any."""
    text = json.dumps(entries).encode("utf-8", "surrogatepass")
    return (len(entries), int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())) if entries else None


@dataclasses.dataclass(frozen=True)
class Row:
    """One record of an annotation file.

    place: file:line (file:item for JSON) within the release. unended: it is the last line of its file and has no line
    end, so it may be incomplete.
    """

    base: Path
    place: str
    values: Mapping[str, Any]
    unended: bool = False

    @property
    def where(self) -> str:
        """Return the full path and line."""
        return os.path.join(self.base, self.place)

    def error(self, field: str, problem: str, fix: str) -> InputError:
        """Return an InputError about a field of this row."""
        return InputError(self.where, field, problem, fix)

    def text(self, field: str) -> str:
        """Return a field that must be text. Raises InputError."""
        value = self.values.get(field)
        if not isinstance(value, str):
            problem = "is missing" if value is None else f"is {value!r:.60}, not text"
            raise self.error(field, problem, "use the annotation file as released")
        return value

    def words(self, field: str) -> str:
        """Return a field that must be non-empty text, stripped. Raises InputError."""
        if _NOTHING.fullmatch(value := self.text(field).strip()):
            raise self.error(field, f"is empty ({value})" if value else "is empty", "restore the row from the release")
        return value

    def name(self, field: str, example: str) -> str:
        """Return the name of a clip, which is also (part of) the name of its file. Raises InputError."""
        value = self.values.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise self.error(field, f"is the number {value}", f"write it as text, with its leading zeros: {example}")
        value = _plain(self.text(field))
        if _SCIENTIFIC.fullmatch(value):
            raise self.error(
                field,
                f"is {value!r}, a name that a spreadsheet turned into a number",
                f"restore the row from the release; it must look like {example}",
            )
        if _NOTHING.fullmatch(value) or not safe_name(value):
            raise self.error(
                field,
                f"is {value!r:.60}",
                f"must look like {example}: the name of a file, without / or \\ or control characters",
            )
        return value

    def matching(self, field: str, pattern: re.Pattern[str], example: str) -> re.Match[str]:
        """Return the match of a `name` with a pattern. Raises InputError."""
        if not (match := pattern.fullmatch(self.name(field, example))):
            raise self.error(field, f"is {self.text(field)!r:.60}", f"must look like {example}")
        return match

    def one_of(self, field: str, allowed: Sequence[str]) -> str:
        """Return a text from a closed list, ignoring case if all entries are lower case. Raises InputError."""
        value = _plain(self.text(field))
        if value in allowed:
            return value
        if allowed and all(choice.islower() for choice in allowed) and value.lower() in allowed:
            return value.lower()
        listed = ", ".join(allowed[:6]) + (", ..." if len(allowed) > 6 else "")
        raise self.error(field, f"unknown value {value!r:.60}", f"use one of {listed}")

    def integer(self, field: str, low: int, high: int) -> int:
        """Return a whole number in [low, high]: a JSON number, or ASCII digits, also `8.0` as pandas writes it.

        Raises InputError.
        """
        value = self.values.get(field)
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}(\.0{1,6})?", value := _plain(value)):
            value = int(value.partition(".")[0])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(field, f"is {value!r:.60}", f"must be a whole number from {low} to {high}")
        return value


def each(rows: Iterable[Row | InputError], make: Callable[[Row], Iterable[T]]) -> Iterator[T | InputError]:
    """Yield the results of `make` for every row, and errors in place of faulty rows."""
    for row in rows:
        if isinstance(row, InputError):
            yield row
            continue
        try:
            yield from make(row)
        except InputError as error:
            yield error


def sample_lists(split: str, folder: str) -> tuple[str, ...]:
    """Return the possible places of a sample list of Crab's code: in the dataset's folder, or in data/`folder`."""
    return tuple(
        f"{prefix}{name}_samples.json" for prefix in ("", f"data/{folder}/") for name in (f"valid_{split}", split)
    )


class Release:
    """The folder of one dataset in a data root. Paths are relative to that folder unless stated otherwise.

    The folder itself may be a link to another disk; nothing inside it may lead out of it.
    """

    def __init__(self, root: str | Path, folder: str = "", used: dict[str, tuple[int, int] | None] | None = None):
        """Open a folder of a data root; `used` collects what is read: file or folder -> its `stamp` at first use."""
        self.root, self.folder = paths.at(root), folder
        self.base = self.root / folder
        self._real = paths.real(self.base)
        self._listed: dict[str, dict[str, str] | None] = {}
        self._unended: set[str] = set()  # files whose last line has no line end
        self.used = {} if used is None else used
        self.notes: list[InputError] = []
        self.unended: list[str] = []  # rows that may be cut off: file:line

    def note(self, where: str, field: str, problem: str, fix: str = "") -> None:
        """Record a remark about the annotations that is no error of a row."""
        self.notes.append(InputError(where, field, problem, fix))

    def use(self, name: str) -> str:
        """Note that the Examples depend on a file or folder, which may not exist, and return its name."""
        if name not in self.used:
            self.used[name] = stamp(self.base / name)
        return name

    # Annotation files

    def annotation(self, *names: str) -> str:
        """Return the first of `names` that exists. Raises MissingFile."""
        existing = next((name for name in names if (self.base / self.use(name)).is_file()), None)
        if existing is None:
            others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
            raise MissingFile(
                str(self.base / names[0]),
                "",
                f"no such annotation file{others}",
                "copy the release's annotation files; docs/datasets.md shows the tree",
            )
        return existing

    def text(self, name: str, whole: bool = True) -> str:
        """Return the content of a UTF-8 file, without a byte order mark. Raises InputError, also for an empty file.

        whole: a byte that is not UTF-8 is an error of the file; otherwise a surrogate replaces it, so that only the
        rows with such bytes are malformed.
        """
        path = self.base / self.use(name)
        if not self._contains(path):
            raise InputError(
                str(path),
                "",
                "is a link out of the data root",
                "put the file there, or link the dataset's whole folder",
            )
        data = read_bytes(path, "", LIST, _AGAIN)
        if not data.strip():
            raise InputError(str(path), "", "is empty", _AGAIN)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
            if whole or wide:
                number = data.count(b"\n", 0, error.start) + 1
                raise InputError(
                    f"{path}:{number}",
                    "",
                    f"is not UTF-8 text{' but UTF-16' if wide else ''}",
                    "save the file as UTF-8" if wide else _AGAIN,
                ) from None
            return data.decode("utf-8-sig", "surrogateescape")

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file, without CRLF ends and without empty lines at the end of the file.

        `check_line` checks whether a line is valid text.
        """
        text = self.text(name, whole=False)
        if not text.endswith("\n"):
            self._unended.add(name)
        lines = [line.rstrip("\r") for line in text.split("\n")]
        while lines and not lines[-1].strip():
            lines.pop()
        return lines

    def check_line(self, name: str, number: int, line: str) -> None:
        """Raise InputError for a line that is not UTF-8, such as one with curly quotes or accents in Windows-1252."""
        if not line.isascii() and _UNDECODED.search(line):
            raise InputError(
                f"{self.base / name}:{number}",
                "",
                f"is not UTF-8 text: {line.encode('utf-8', 'surrogateescape')[:60]!r}",
                "save the file as UTF-8, or restore the row from the release",
            )

    def table(
        self, name: str, columns: Sequence[str], delimiter: str = ",", quoted: bool = True, header: bool | None = True
    ) -> Iterator[Row | InputError]:
        """Yield the rows of a text table, one line each, or several where a quotation continues.

        header: True = the first line names the columns, which may be more than `columns` and in any order; None = it
        may do so; False = the columns are fixed. The header also determines the delimiter. Raises InputError for a
        wrong header.
        """
        lines = self.lines(name)
        if header and lines:
            self.check_line(name, 1, lines[0])
        names, first = list(columns), 0
        if parsed := _header(lines[0] if lines else "", columns, delimiter, quoted):
            (names, delimiter, quoted), first = parsed, 1
        elif header:
            line = lines[0] if lines else ""
            named = _cells(line, delimiter, quoted) or []
            absent = next((column for column in columns if column not in named), columns[0])
            raise InputError(
                f"{self.base / name}:1",
                absent,
                f"no such column in the header {line!r:.80}",
                f"the header of the release has {delimiter.join(columns)!r}",
            )
        if twice := [column for column in columns if names.count(column) > 1]:
            raise InputError(f"{self.base / name}:1", twice[0], "comes twice in the header", "keep one of the columns")
        at, still_open = first, False
        while at < len(lines):
            number, cells, taken = at + 1, *_row(lines, at, delimiter, quoted, len(names))
            at += taken
            if quoted and (cells is None or still_open and lines[at - 1].count('"') % 2):
                cells, still_open = None, not still_open  # the end of a quotation that is not a complete row
            try:
                for k in range(taken):
                    self.check_line(name, number + k, lines[number - 1 + k])
                if cells is None or len(cells) != len(names):
                    problem = f"has {len(cells)} fields, not {len(names)}" if cells else "has an unfinished quotation"
                    raise InputError(
                        f"{self.base / name}:{number}",
                        "",
                        f"{problem}: {lines[number - 1]!r:.60}",
                        "restore the row from the release",
                    )
                row = Row(
                    self.base,
                    f"{name}:{number}",
                    dict(zip(names, cells, strict=True)),
                    at == len(lines) and name in self._unended,
                )
                if row.unended:
                    self.unended.append(row.place)
                yield row
            except InputError as error:
                yield error

    def json(self, name: str) -> Any:
        """Return the content of a JSON file. Raises InputError."""
        return self._parsed(name, self.text(name))

    def _parsed(self, name: str, text: str) -> Any:
        try:
            return strict_json(text, constants=True)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.base / name}:{error.lineno}", "", f"not valid JSON ({error.msg})", "copy the file again"
            ) from None
        except ValueError as error:  # also for numbers of thousands of digits
            raise InputError(
                str(self.base / name), "", f"not readable JSON ({str(error):.100})", "copy the file again"
            ) from None

    def records(self, name: str, key: str = "", items: Any = None) -> Iterator[Row | InputError]:
        """Yield the objects of a JSON file, or `items` from inside one.

        The file holds a list of objects, an object around one list, one object per line, or objects by the value of
        their field `key`, which is added to them.
        """
        places, items, damaged = (None, items, False) if items is not None else self._items(name, key)
        for number, item in enumerate(items):
            row = Row(
                self.base,
                f"{name}:{places[number] if places else f'item {number}'}",
                item if isinstance(item, dict) else {},
            )
            if isinstance(item, InputError):
                yield item
            elif not isinstance(item, dict):
                yield row.error("", f"is {item!r:.40}, not an object", "use the annotation file as released")
            elif damaged and _UNDECODED.search(json.dumps(item, ensure_ascii=False)):
                yield row.error("", "is not UTF-8 text", "save the file as UTF-8, or restore the record")
            else:
                yield row

    def _items(self, name: str, key: str) -> tuple[list[int] | None, list[Any], bool]:
        """Return (line of each record, or None), the records, and whether parts of the file are not UTF-8."""
        text = self.text(name, whole=False)
        damaged = not text.isascii() and bool(_UNDECODED.search(text))
        try:
            content = self._parsed(name, text)
        except InputError:
            if not _JSON_LINES.match(text):
                raise
            lines = [(number, line) for number, line in enumerate(self.lines(name), 1) if line.strip()]
            return [number for number, _ in lines], [self._record(name, *line) for line in lines], damaged
        if isinstance(content, dict) and len(lists := [v for v in content.values() if _is_list_of_objects(v)]) == 1:
            content = lists[0]
        elif isinstance(content, dict) and content and key and all(isinstance(v, dict) for v in content.values()):
            content = [{key: named, **value} for named, value in content.items()]
        if not isinstance(content, list):
            raise InputError(
                str(self.base / name),
                "",
                f"holds {type(content).__name__}, not a list",
                "use the annotation file as released",
            )
        return None, content, damaged

    def _record(self, name: str, number: int, line: str) -> Any:
        try:
            self.check_line(name, number, line)
            return json_line(line, f"{self.base / name}:{number}")
        except InputError as error:
            return error

    # Media files

    def inside(self, path: str, where: str, field: str) -> str:
        """Return `path` relative to the data root. Raises InputError if it is absolute or climbs out with `..`."""
        parts = path.rstrip("/").split("/")
        if path.startswith(("/", "~")) or "\\" in path or "\0" in path or {"", ".."} & set(parts) or _DRIVE.match(path):
            raise InputError(
                where,
                field,
                f"the path {path!r:.80} leaves the data root",
                "give a path inside it, with / between its parts",
            )
        return f"{self.folder}/{path}" if self.folder else path

    def sound(self, name: str) -> str | None:
        """Return the sound of a clip in `audio_data/`, where Crab prepares it; None to use the video's own sound."""
        path = next((path for path in (f"audio_data/{name}.mp3", f"audio_data/{name}.wav") if self.kind(path)), None)
        return path and self.inside(path, str(self.base / path), "audio")

    def pick(self, path: str, *folders: str) -> str:
        """Return `path` in the first of `folders` that holds it, else in the first folder."""
        return next((f"{folder}/{path}" for folder in folders if self.kind(f"{folder}/{path}")), f"{folders[0]}/{path}")

    def kind(self, path: str) -> str:
        """Return "file", "folder", "outside" (a link out of the release), "special" (a pipe or device) or "" (nothing).

        A folder is listed once, so that a hundred thousand questions cost a few hundred system calls.
        """
        folder, _, name = path.rpartition("/")
        listed = self._listing(folder)
        return "outside" if listed is None else listed.get(name, "")

    def names(self, folder: str) -> list[str]:
        """Return the files of a folder."""
        return [name for name, kind in (self._listing(folder) or {}).items() if kind == "file"]

    def _listing(self, folder: str) -> dict[str, str] | None:
        """Return {name: kind} of the entries of a folder; None for a folder outside the release."""
        if folder not in self._listed and paths.is_remote(self.base):
            entries = paths.in_bucket(self.base / folder).entries()
            self.used.setdefault(folder, _stamp_of(entries))
            self._listed[folder] = dict(entries)
        if folder not in self._listed:
            self._listed[folder] = self._list(self.use(folder))
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
            return (
                "file"
                if entry.is_file()
                else "folder"
                if entry.is_dir()
                else "special"
                if os.path.exists(entry.path)
                else ""
            )
        except OSError:  # circular links
            return ""

    def _contains(self, path: str | Path) -> bool:
        real = paths.real(path)
        return real == self._real or real.startswith(self._real + os.sep)

    def check(self, path: str, where: str, field: str) -> None:
        """Raise MissingFile when `path` (relative to the data root) is no file, InputError when it leads elsewhere."""
        kind = self.kind(path.removeprefix(f"{self.folder}/") if self.folder else path)
        if kind == "outside":
            raise InputError(
                where,
                field,
                f"{path} is a link out of the data root",
                "put the file there, or link the dataset's whole folder",
            )
        if kind == "special":
            raise InputError(where, field, f"{path} is a pipe or a device", "put a file there")
        if kind != "file":
            problem = f"{path} is {'a folder' if kind else 'missing'}"
            raise MissingFile(
                where, field, problem, "complete the copy, or read what is there with missing=skip (data.on_error=skip)"
            )


_JSON_LINES = re.compile(r"\s*\{[^\n]*\}\s*\n\s*\{")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _plain(cell: str) -> str:
    """Return a cell without the white space and byte order marks around it."""
    return cell.strip().strip("\ufeff").strip()


def _header(line: str, columns: Sequence[str], delimiter: str, quoted: bool) -> tuple[list[str], str, bool] | None:
    """Return (names, delimiter, quoted) of a first line that names all `columns` in any case; None for other lines."""
    known = {column.casefold(): column for column in columns}
    for mark in (delimiter, *(other for other in DELIMITERS if other != delimiter)):
        quotes = quoted or mark != delimiter
        names = [known.get(_plain(cell).casefold(), cell) for cell in _cells(line, mark, quotes) or []]
        if set(columns) <= set(names):
            return names, mark, quotes
    return None


def _row(lines: Sequence[str], at: int, delimiter: str, quoted: bool, width: int) -> tuple[list[str] | None, int]:
    """Return (cells of the row that begins at a line, or None if its quotation does not end; number of its lines).

    A line break inside quotation marks becomes a space. Lines that are complete rows themselves are never joined, so
    that a lost quotation mark costs one row.
    """
    cells = _cells(lines[at], delimiter, quoted)
    if cells is None and quoted:
        for end in range(at + 1, min(at + 20, len(lines))):
            if lines[end].count('"') % 2 == 0 and len(_cells(lines[end], delimiter, quoted) or []) == width:
                break
            joined = _cells(" ".join(lines[at : end + 1]), delimiter, quoted)
            if joined is not None:
                return (joined, end + 1 - at) if len(joined) == width else (None, 1)
    while cells and len(cells) > width and not cells[-1].strip():  # delimiters at the end of the line
        cells.pop()
    return cells, 1


def _cells(line: str, delimiter: str, quoted: bool) -> list[str] | None:
    """Return the cells of one line; None when a quotation does not end on it."""
    if not quoted and '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None if quoted else line.split(delimiter)
