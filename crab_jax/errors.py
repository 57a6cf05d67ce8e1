"""The one exception for bad input, and how every verb reports it."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Bad input that its user can fix: names the file (or flag), the field, the problem and the fix.

    Pickle-safe, because it is raised in data workers and shown in the main process.
    """

    def __init__(self, where: str, field: str, problem: str, fix: str):
        super().__init__(where, field, problem, fix)
        self.where, self.field, self.problem, self.fix = where, field, problem, fix

    def __str__(self) -> str:
        field = f" [{self.field}]" if self.field else ""
        return f"{self.where}{field}: {self.problem}; {self.fix}"


class CommandLine(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line like any other bad input: in one line."""

    def __init__(self, doc: str | None, prog: str | None = None):
        super().__init__(prog=prog, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise InputError("command line", "", message, "see --help")


def find_input_error(error: BaseException) -> InputError | None:
    """The `InputError` behind an exception, if any (data workers wrap what they raise)."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, InputError):
            return current
        queue += [current.__cause__, current.__context__]
    return None


def report(error: BaseException, debug: bool = False) -> int:
    """Show what ended a verb; its exit code: 2 for an `InputError` (one line on stderr), 1 for anything else."""
    found = find_input_error(error)
    if debug or (found is None and not isinstance(error, KeyboardInterrupt)):
        traceback.print_exception(error)
    if found is None:
        return 1
    print("error:", " ".join(str(found).splitlines()), file=sys.stderr)  # a name may hold line breaks
    return 2


def run_verb(main: Callable[[], None], debug: bool = False) -> None:
    """Run a verb and exit: 0 done, otherwise as `report` says."""
    try:
        main()
    except (KeyboardInterrupt, Exception) as error:
        sys.exit(report(error, debug))
    sys.exit(0)
