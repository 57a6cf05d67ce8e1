"""InputError, the exception for bad input, and the way every verb reports errors."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

AT_END: list[Callable[[], None]] = []  # what other modules still have to do when a verb ends
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors caused by a disk, a path or missing permissions; they may occur wherever a program reads or writes.
DISK_ERRORS = FULL | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOTEMPTY,
    errno.EEXIST,
}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")  # in messages of C++ libraries

# Characters that move the cursor, colour or hide text, change its direction or end a line, and unpaired surrogates.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSEEN_BUT_LINES = re.compile(_UNSEEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def printable(value: object) -> str:
    r"""Return a value as one line of printable text.

    Control characters, escape sequences, line ends and direction marks are escaped as Python does, such as \x1b and
    \u202e.
    """
    return _UNSEEN.sub(_escaped, str(value))


def printable_lines(value: object) -> str:
    """Return a value as `printable` text that keeps its line ends and tabs."""
    return _UNSEEN_BUT_LINES.sub(_escaped, str(value).replace("\r\n", "\n"))


def cell(value: object) -> str:
    """Return a value as the text of one Markdown table cell, without markup, links, HTML or spreadsheet formulas."""
    text = re.sub(r"([\\`\[\]<>|&])", r"\\\1", printable(value))
    return f"'{text}" if text[:1] in ("=", "+", "@") else text


class InputError(ValueError):
    """Bad input that the user can fix: the file (or flag), the field, the problem and the fix.

    It can be pickled, because it is raised in data workers and reported by the main process.
    """

    def __init__(self, where: str, field: str, problem: str, fix: str):
        super().__init__(where, field, problem, fix)
        self.where, self.field, self.problem, self.fix = where, field, problem, fix

    def __str__(self) -> str:
        field = f" [{self.field}]" if self.field else ""
        return printable(" ".join(f"{self.where}{field}: {self.problem}; {self.fix}".splitlines()))


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as an InputError, in one line."""

    def __init__(self, doc: str | None, prog: str | None = None):
        super().__init__(
            prog=prog, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        raise InputError("command line", "", f"{' '.join(message.split()):.500}", "see --help")


def _behind(error: BaseException, context: bool) -> Iterator[BaseException]:
    """Yield an exception and the exceptions that it was raised from (data workers and libraries wrap errors).

    context: also follow the exceptions that were being handled when it was raised.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue += [current.__cause__, current.__context__ if context else None]


def find_input_error(error: BaseException) -> InputError | None:
    """Return the InputError behind an exception, or None. A full disk or an unwritable file counts as one."""
    if explicit := next((cause for cause in _behind(error, True) if isinstance(cause, InputError)), None):
        return explicit
    return next((converted for cause in _behind(error, False) if (converted := _disk_error(cause))), None)


def _disk_error(error: BaseException) -> InputError | None:
    """Convert an error of the disk, a path or permissions into an InputError; None for any other error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and not isinstance(error, BrokenPipeError):
        location = " and ".join(
            os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
            for name in (error.filename, error.filename2)
            if name is not None
        )
        fix = (
            "make room, then start again"
            if error.errno in FULL
            else "check bucket, credentials and endpoint (docs/training.md), then start again"
            if re.match("(gs|s3)://", location)
            else "check the path and who may write to it"
        )
        return InputError(location or "a file", "", error.strerror or str(error), fix)
    words = next((words for words in _FULL_WORDS if words in str(error)), None)
    if words and not isinstance(error, OSError):
        first = str(error).splitlines()[0]
        path = re.search(r"""["'](/[^"']+)["']|writing (/[^\s;:]+)""", first)
        location, more = (path[1] or path[2], "") if path else ("the disk", f" ({first:.200})")
        return InputError(location, "", f"{words}{more}", "make room, then start again")
    return None


def report(error: BaseException, debug: bool = False) -> int:
    """Print the error that ended a verb and return its exit code.

    Returns 2 for an InputError (one line on stderr) and 1 for anything else.
    """
    input_error = find_input_error(error)
    if debug or (input_error is None and not isinstance(error, KeyboardInterrupt | BrokenPipeError)):
        traceback.print_exception(error)
    if input_error is None:
        return 1
    print(f"error: {input_error}", file=sys.stderr)
    return 2


def show_any_name() -> None:
    """Make stdout and stderr escape unprintable characters and characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if not hasattr(stream, "written_raw"):
                _escape_unprintable(stream)


def _escape_unprintable(stream: Any) -> None:
    raw = stream.written_raw = stream.write
    stream.write = lambda text: raw(printable_lines(text))


def run_verb(main: Callable[[], None], debug: bool = False) -> None:
    """Run a verb and exit with 0, or with the code that `report` returns."""
    show_any_name()
    try:
        try:
            main()
        finally:
            for finish in AT_END:
                finish()
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:
        code = report(error, debug)
        try:
            sys.stdout.flush()
        except OSError:  # the reader is gone or the disk is full; Python must not fail at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    sys.exit(0)
