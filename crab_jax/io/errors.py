"""The one exception for bad input, and how every verb reports it."""

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

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a disk or a person's rights do to any program, wherever it writes or reads.
OF_THE_DISK = FULL | {
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
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")  # of libraries that are not Python

# Characters that move the cursor, colour or hide text, turn its direction, end a line, or are no characters at all.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNSEEN_BUT_LINES = re.compile(_UNSEEN.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def printable(value: object) -> str:
    """A value as one line of text that says and shows the same anywhere: control characters, escape sequences, line
    ends and marks of direction are written as Python writes them, such as \\x1b and \\u202e."""
    return _UNSEEN.sub(_escaped, str(value))


def printable_lines(value: object) -> str:
    """`printable` text that keeps its line ends and tabs."""
    return _UNSEEN_BUT_LINES.sub(_escaped, str(value).replace("\r\n", "\n"))


def cell(value: object) -> str:
    """A value as the text of one cell of a Markdown table: no markup, link, HTML or formula of a spreadsheet in it."""
    text = re.sub(r"([\\`\[\]<>|&])", r"\\\1", printable(value))
    return f"'{text}" if text[:1] in ("=", "+", "@") else text


class InputError(ValueError):
    """Bad input that its user can fix: names the file (or flag), the field, the problem and the fix.

    Pickle-safe, because it is raised in data workers and shown in the main process.
    """

    def __init__(self, where: str, field: str, problem: str, fix: str):
        super().__init__(where, field, problem, fix)
        self.where, self.field, self.problem, self.fix = where, field, problem, fix

    def __str__(self) -> str:
        field = f" [{self.field}]" if self.field else ""
        return printable(" ".join(f"{self.where}{field}: {self.problem}; {self.fix}".splitlines()))


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line like any other bad input: in one line."""

    def __init__(self, doc: str | None, prog: str | None = None):
        super().__init__(
            prog=prog, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise InputError("command line", "", f"{' '.join(message.split()):.500}", "see --help")


def _behind(error: BaseException, context: bool) -> Iterator[BaseException]:
    """An exception and what it was raised from (data workers and libraries wrap what they raise); `context`: also what
    was being handled when it was raised."""
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
    """The `InputError` behind an exception, if any; a full disk and a file that may not be written are one, too."""
    if found := next((one for one in _behind(error, True) if isinstance(one, InputError)), None):
        return found
    return next((said for one in _behind(error, False) if (said := _of_the_disk(one))), None)


def _of_the_disk(error: BaseException) -> InputError | None:
    if isinstance(error, OSError) and error.errno in OF_THE_DISK and not isinstance(error, BrokenPipeError):
        where = " and ".join(
            os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
            for name in (error.filename, error.filename2)
            if name is not None
        )
        fix = "make room, then start again" if error.errno in FULL else "check the path and who may write to it"
        return InputError(where or "a file", "", error.strerror or str(error), fix)
    words = next((words for words in _FULL_WORDS if words in str(error)), None)
    if words and not isinstance(error, OSError):
        first = str(error).splitlines()[0]
        named = re.search(r"""["'](/[^"']+)["']|writing (/[^\s;:]+)""", first)
        where, more = (named[1] or named[2], "") if named else ("the disk", f" ({first:.200})")
        return InputError(where, "", f"{words}{more}", "make room, then start again")
    return None


def report(error: BaseException, debug: bool = False) -> int:
    """Show what ended a verb; its exit code: 2 for an `InputError` (one line on stderr), 1 for anything else."""
    found = find_input_error(error)
    if debug or (found is None and not isinstance(error, KeyboardInterrupt | BrokenPipeError)):
        traceback.print_exception(error)
    if found is None:
        return 1
    print(f"error: {found}", file=sys.stderr)
    return 2


def show_any_name() -> None:
    """Let the console say by escapes what its encoding lacks (names of files, answers) and what is not `printable`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if not hasattr(stream, "written_raw"):
                _escape_what_is_written(stream)


def _escape_what_is_written(stream: Any) -> None:
    raw = stream.written_raw = stream.write
    stream.write = lambda text: raw(printable_lines(text))


def run_verb(main: Callable[[], None], debug: bool = False) -> None:
    """Run a verb and exit: 0 done, otherwise as `report` says."""
    show_any_name()
    try:
        main()
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:
        code = report(error, debug)
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it any more, or its disk is full: nothing to say at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    sys.exit(0)
