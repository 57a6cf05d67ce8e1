"""Bounds on values, shared by config keys, command-line options and fields of structured files.

A bound such as `Whole(1)` checks a value (`problem` returns "" or a description of what is wrong) and, used as the
`type` of an argparse argument, parses a text.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crab_jax.io import paths
from crab_jax.io.errors import InputError

INT32 = 2**31 - 1
_SCHEME = re.compile(r"(?P<kind>[a-z][a-z0-9+.-]*):[/\\]", re.IGNORECASE)  # gs://b/x, gs:/b/x and C:\x


class Bound:
    """Base class of all bounds: a description of the allowed values (`wanted`) and a check (`fits`)."""

    @property
    def wanted(self) -> str:
        """Describe the allowed values; a subclass whose description is constant has an attribute instead."""
        return ""

    def fits(self, value: Any) -> bool:
        """Return whether a value is allowed."""
        raise NotImplementedError

    def problem(self, value: Any) -> str:
        """Return "" for an allowed value, otherwise a phrase that says what the value must be."""
        return "" if self.fits(value) else f"must be {self.wanted}"

    def read(self, text: str) -> Any:
        """Parse a text of the command line. Raises ValueError."""
        return text

    def __call__(self, text: str) -> Any:
        """Parse and check a text of the command line. Raises argparse.ArgumentTypeError."""
        try:
            value = self.read(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r:.80} must be {self.wanted}") from None
        if problem := self.problem(value):
            raise argparse.ArgumentTypeError(f"{text!r:.80} {problem}")
        return value


@dataclasses.dataclass(frozen=True)
class Whole(Bound):
    """A whole number from `low` to `high`; `note` explains a special value such as 0."""

    low: int = 0
    high: int = INT32
    note: str = ""

    @property
    def wanted(self) -> str:
        """Describe the allowed values."""
        return f"a whole number from {self.low} to {self.high}" + (f" ({self.note})" if self.note else "")

    def fits(self, value: Any) -> bool:
        """Return whether `value` is an int (not a bool) within the range."""
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def read(self, text: str) -> int:
        """Parse a whole number of at most 20 characters. Raises ValueError."""
        if len(text) > 20:
            raise ValueError
        return int(text)


@dataclasses.dataclass(frozen=True)
class Real(Bound):
    """A finite number from `low` to `high`, optionally also 0 (`zero`); `note` explains a special value."""

    low: float = 0.0
    high: float = 1e30
    zero: bool = False
    note: str = ""

    @property
    def wanted(self) -> str:
        """Describe the allowed values."""
        return f"{'0, or ' if self.zero else ''}a number from {self.low:g} to {self.high:.6g}" + (
            f" ({self.note})" if self.note else ""
        )

    def fits(self, value: Any) -> bool:
        """Return whether `value` is an int or float (not a bool) within the range."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        return self.low <= number <= self.high or (self.zero and number == 0)

    def read(self, text: str) -> float:
        """Parse a number. Raises ValueError."""
        return float(text)


@dataclasses.dataclass(frozen=True)
class Choice(Bound):
    """One of a fixed set of words."""

    words: Sequence[str]

    @property
    def wanted(self) -> str:
        """List the allowed words."""
        return f"one of {', '.join(self.words)}"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is one of the words."""
        return isinstance(value, str) and value in self.words


class Flag(Bound):
    """A boolean."""

    wanted = "true or false"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is True or False."""
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Fixed(Bound):
    """A value that may not be changed; `why` gives the reason."""

    value: Any
    why: str

    @property
    def wanted(self) -> str:
        """Describe the only allowed value and the reason."""
        return f"{self.value!r}: {self.why}"

    def fits(self, value: Any) -> bool:
        """Return whether `value` equals the fixed value and has its type."""
        return type(value) is type(self.value) and value == self.value


@dataclasses.dataclass(frozen=True)
class Words(Bound):
    """Comma-separated words from `known`, each at most once; "" for no words."""

    known: Sequence[str] = ()

    @property
    def wanted(self) -> str:
        """List the allowed words."""
        return f"some of {','.join(self.known)}, each once"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a text of distinct known words."""
        words = value.split(",") if isinstance(value, str) and value else []
        return isinstance(value, str) and len(words) == len(set(words)) and all(word in self.known for word in words)


class Modules(Bound):
    """Comma-separated modules as in Python imports, each optionally with `:NAME`; "" for none."""

    wanted = "modules as Python imports them, as in package.module:NAME,package.other"
    _one = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?")

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a text of such modules, of at most 1,000 characters."""
        parts = value.split(",") if isinstance(value, str) and value else []
        return isinstance(value, str) and len(value) <= 1000 and all(self._one.fullmatch(part) for part in parts)


class Module(Modules):
    """A module as in Python imports, optionally with `:` and a name of the module's own; "" for none."""

    wanted = "a module as Python imports it, as in package.module or module:project"
    _one = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[\w.-]+)?")

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a text of at most one such module, of at most 200 characters."""
        return isinstance(value, str) and len(value) <= 200 and (not value or bool(self._one.fullmatch(value)))


class Name(Bound):
    """The name of a file without its suffix, such as the name of a split."""

    wanted = "a name without slashes"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a non-empty name of at most 200 characters without slashes."""
        return (
            isinstance(value, str)
            and bool(value.strip())
            and value not in (".", "..")
            and not set("/\\\0\n") & set(value)
            and len(value) <= 200
        )


@dataclasses.dataclass(frozen=True)
class Place(Bound):
    """A path of a file or folder; `empty` allows "", `buckets` also gs:// and s3://.

    Any other URL is refused: Python would create a folder called "gs:" for it.
    """

    empty: bool = True
    buckets: bool = False

    @property
    def wanted(self) -> str:
        """Describe the allowed values."""
        return "a path"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a path."""
        return not self.problem(value)

    def problem(self, value: Any) -> str:
        """Return "" for a path, otherwise what is wrong with the value.

        Refused are URLs, Windows paths and paths with a `~`, a variable or white space that a shell should have
        expanded.
        """
        if not isinstance(value, str) or "\0" in value or not (value.strip() or self.empty and not value):
            return f"must be {self.wanted}"
        if self.buckets and paths.is_remote(value):
            return ""
        scheme = _SCHEME.match(value)
        if "://" not in value and not (scheme and not os.path.lexists(scheme[0].rstrip("/\\"))):
            return "" if not value or os.path.lexists(value) else _unexpanded(value)
        kind = scheme["kind"].lower() if scheme else ""
        fix = (
            "give the path itself"
            if kind == "file"
            else "download it and give its path"
            if kind.startswith("http")
            else "give the path that this machine has for it"
            if len(kind) == 1
            else f"write {kind}://{value[scheme.end() :].strip('/') or 'BUCKET/NAME'}"
            if scheme and kind in paths.SCHEMES and self.buckets
            else "copy it to a folder and give that, see docs/training.md"
            if kind in paths.SCHEMES
            else "mount the bucket and give its path, see docs/training.md"
        )
        return f"is a {'path of Windows' if len(kind) == 1 else 'URL'}, which is no file or folder here: {fix}"


class Places(Bound):
    """Comma-separated paths as in `Place`, each at most once; "" for none."""

    wanted = "paths with commas between them, each once"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a text of distinct paths."""
        given = value.split(",") if isinstance(value, str) and value else []
        return isinstance(value, str) and len(given) == len(set(given)) and all(map(ANYWHERE.fits, given))


def _unexpanded(value: str) -> str:
    """Return what is wrong with a path that does not exist and that a shell would have expanded or stripped, or ""."""
    if re.match(r"~[\w.-]*(/|$)|\$\{?[a-z_]\w*", value, re.IGNORECASE):
        return "was not expanded by the shell: write the whole path"
    if value != value.strip():
        return "begins or ends in white space, and there is no such file: leave it out"
    return "is no path: give one (./- for a file of that name)" if value == "-" else ""


def check(section: str, values: Mapping[str, Any], bounds: Mapping[str, Bound]) -> None:
    """Raise InputError for the first value of a config section ("" for the top level) that is out of its bounds."""
    for name, bound in bounds.items():
        if problem := bound.problem(values[name]):
            shown = " ".join(repr(values[name]).split())
            raise InputError("--config", f"{section}.{name}".lstrip("."), f"is {shown:.60}", problem)


PATH, ANY_PATH = Place(empty=False), Place()  # on a disk
ANYWHERE, ANY_PLACE = Place(empty=False, buckets=True), Place(buckets=True)


def path(text: str) -> Path:
    """Parse a path of the command line, on a disk or in a bucket (used as the `type` of an argparse argument)."""
    return paths.at(ANYWHERE(text))


@dataclasses.dataclass(frozen=True)
class Patterns(Bound):
    """A tuple of at least `least` regular expressions."""

    least: int = 0

    @property
    def wanted(self) -> str:
        """Describe the allowed values."""
        return f"{'at least one' if self.least else 'any number of'} regular expression in parentheses: ('clip/.*',)"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a list or tuple of enough valid regular expressions."""
        if not isinstance(value, tuple | list) or len(value) < self.least:
            return False
        try:
            return all(isinstance(pattern, str) and pattern and re.compile(pattern) for pattern in value)
        except (re.error, OverflowError, RecursionError):
            return False


@dataclasses.dataclass(frozen=True)
class Wholes(Bound):
    """At least `least` whole numbers from `low` to `high`; `rising` requires strictly increasing values."""

    low: int = 0
    high: int = INT32
    least: int = 1
    rising: bool = False

    @property
    def wanted(self) -> str:
        """Describe the allowed values."""
        return (
            f"{self.least} or more {'increasing ' if self.rising else ''}whole numbers from {self.low} to {self.high}"
        )

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a list or tuple of enough whole numbers within the range."""
        bound = Whole(self.low, self.high)
        return (
            isinstance(value, tuple | list)
            and len(value) >= self.least
            and all(map(bound.fits, value))
            and not (self.rising and list(value) != sorted(set(value)))
        )

    def read(self, text: str) -> tuple[int, ...]:
        """Parse comma-separated whole numbers. Raises ValueError."""
        return tuple(Whole(self.low, self.high).read(part) for part in text.split(","))


@dataclasses.dataclass(frozen=True)
class Text(Bound):
    """Text of `least` to `most` characters."""

    least: int = 0
    most: int = 2**16

    @property
    def wanted(self) -> str:
        """Describe the allowed length."""
        return f"text of {self.least} to {self.most} characters"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is text of an allowed length."""
        return isinstance(value, str) and self.least <= len(value) <= self.most


class Inside(Bound):
    """A relative path inside the folder of the file that names it, without "." and ".." parts."""

    wanted = "a path inside the folder, with / between its parts"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is a printable relative path that stays inside the folder."""
        return (
            isinstance(value, str)
            and 0 < len(value) <= 1000
            and value.isprintable()
            and "\\" not in value
            and not {"", ".", ".."} & set(value.split("/"))
        )


class Number(Bound):
    """Any number, including NaN and infinities."""

    wanted = "a number"

    def fits(self, value: Any) -> bool:
        """Return whether `value` is an int or float (not a bool)."""
        return isinstance(value, int | float) and not isinstance(value, bool)


class Anything(Bound):
    """Any value."""

    def fits(self, value: Any) -> bool:
        """Return True."""
        return True
