"""What a value may be: one description for a config key and for an option of a command line.

`Whole(1)` checks a value (`problem` says what is wrong with it, or "") and, as the `type` of an argument, reads a text.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crab_jax.io.errors import InputError

INT32 = 2**31 - 1
_SCHEME = re.compile(r"(?P<kind>[a-z][a-z0-9+.-]*):[/\\]", re.IGNORECASE)  # gs://b/x, gs:/b/x and C:\x


class Bound:
    """What a value must be, in words (`wanted`), and whether one is (`fits`)."""

    wanted = ""

    def fits(self, value: Any) -> bool:
        """Whether a value of a config is allowed."""
        raise NotImplementedError

    def problem(self, value: Any) -> str:
        """ "" for an allowed value, otherwise what it must be."""
        return "" if self.fits(value) else f"must be {self.wanted}"

    def read(self, text: str) -> Any:
        """The value that a text of the command line stands for. Raises ValueError."""
        return text

    def __call__(self, text: str) -> Any:
        try:
            value = self.read(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r:.80} must be {self.wanted}") from None
        if problem := self.problem(value):
            raise argparse.ArgumentTypeError(f"{text!r:.80} {problem}")
        return value


@dataclasses.dataclass(frozen=True)
class Whole(Bound):
    """A whole number from `low` to `high`; `note` says what a special one means."""

    low: int = 0
    high: int = INT32
    note: str = ""

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"a whole number from {self.low} to {self.high}" + (f" ({self.note})" if self.note else "")

    def fits(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def read(self, text: str) -> int:
        if len(text) > 20:
            raise ValueError
        return int(text)


@dataclasses.dataclass(frozen=True)
class Real(Bound):
    """A finite number from `low` to `high`, or 0 where `zero` is allowed beside them; `note` says what a special one
    means."""

    low: float = 0.0
    high: float = 1e30
    zero: bool = False
    note: str = ""

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"{'0, or ' if self.zero else ''}a number from {self.low:g} to {self.high:.6g}" + (
            f" ({self.note})" if self.note else ""
        )

    def fits(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        return self.low <= number <= self.high or (self.zero and number == 0)

    def read(self, text: str) -> float:
        return float(text)


@dataclasses.dataclass(frozen=True)
class Choice(Bound):
    """One of some words."""

    words: Sequence[str]

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.words)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.words


class Flag(Bound):
    """True or false."""

    wanted = "true or false"

    def fits(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Fixed(Bound):
    """A value that may not be changed, and why."""

    value: Any
    why: str

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"{self.value!r}: {self.why}"

    def fits(self, value: Any) -> bool:
        return type(value) is type(self.value) and value == self.value


@dataclasses.dataclass(frozen=True)
class Words(Bound):
    """Comma-separated words, each of `known` (of any letters, where that is empty); "" is none."""

    known: Sequence[str] = ()

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"some of {','.join(self.known)}, each once"

    def fits(self, value: Any) -> bool:
        words = value.split(",") if isinstance(value, str) and value else []
        return isinstance(value, str) and len(words) == len(set(words)) and all(word in self.known for word in words)


class Modules(Bound):
    """Comma-separated modules as Python imports them, each with or without `:NAME`; "" is none."""

    wanted = "modules as Python imports them, as in package.module:NAME,package.other"
    _one = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?")

    def fits(self, value: Any) -> bool:
        parts = value.split(",") if isinstance(value, str) and value else []
        return isinstance(value, str) and len(value) <= 1000 and all(self._one.fullmatch(part) for part in parts)


class Name(Bound):
    """A name of a file without its ending, such as that of a split."""

    wanted = "a name without slashes"

    def fits(self, value: Any) -> bool:
        return (
            isinstance(value, str)
            and bool(value.strip())
            and value not in (".", "..")
            and not set("/\\\0\n") & set(value)
            and len(value) <= 200
        )


@dataclasses.dataclass(frozen=True)
class Place(Bound):
    """A path of a file or folder; "" only where `empty`. A URL is none: it would become a folder called "gs:" here."""

    empty: bool = True

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return "a path"

    def fits(self, value: Any) -> bool:
        return not self.problem(value)

    def problem(self, value: Any) -> str:
        if not isinstance(value, str) or "\0" in value or not (value.strip() or self.empty and not value):
            return f"must be {self.wanted}"
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
            else "mount the bucket and give its path, see docs/training.md"
        )
        return f"is a {'path of Windows' if len(kind) == 1 else 'URL'}, which is no file or folder here: {fix}"


def _unexpanded(value: str) -> str:
    """What is wrong with a path of no file, which would be made as it stands: a shell usually reads it otherwise."""
    if re.match(r"~[\w.-]*(/|$)|\$\{?[a-z_]\w*", value, re.IGNORECASE):
        return "was not expanded by the shell: write the whole path"
    if value != value.strip():
        return "begins or ends in white space, and there is no such file: leave it out"
    return "is no path: give one (./- for a file of that name)" if value == "-" else ""


def check(section: str, values: Mapping[str, Any], bounds: Mapping[str, Bound]) -> None:
    """Raise InputError naming the first value of a section ("" for the top) that is out of its bounds."""
    for name, bound in bounds.items():
        if problem := bound.problem(values[name]):
            shown = " ".join(repr(values[name]).split())
            raise InputError("--config", f"{section}.{name}".lstrip("."), f"is {shown:.60}", problem)


PATH, ANY_PATH = Place(empty=False), Place()


def path(text: str) -> Path:
    """A path of the command line as a Path (the `type` of an argument)."""
    return Path(PATH(text))


@dataclasses.dataclass(frozen=True)
class Patterns(Bound):
    """A tuple of regular expressions; `least` of them."""

    least: int = 0

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"{'at least one' if self.least else 'any number of'} regular expression in parentheses: ('clip/.*',)"

    def fits(self, value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) < self.least:
            return False
        try:
            return all(isinstance(one, str) and one and re.compile(one) for one in value)
        except (re.error, OverflowError, RecursionError):
            return False


@dataclasses.dataclass(frozen=True)
class Wholes(Bound):
    """At least `least` whole numbers from `low` to `high`; `rising`: each greater than the one before."""

    low: int = 0
    high: int = INT32
    least: int = 1
    rising: bool = False

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return (
            f"{self.least} or more {'increasing ' if self.rising else ''}whole numbers from {self.low} to {self.high}"
        )

    def fits(self, value: Any) -> bool:
        one = Whole(self.low, self.high)
        return (
            isinstance(value, tuple | list)
            and len(value) >= self.least
            and all(map(one.fits, value))
            and not (self.rising and list(value) != sorted(set(value)))
        )

    def read(self, text: str) -> tuple[int, ...]:
        return tuple(Whole(self.low, self.high).read(part) for part in text.split(","))


@dataclasses.dataclass(frozen=True)
class Text(Bound):
    """Text of `least` to `most` characters."""

    least: int = 0
    most: int = 2**16

    @property
    def wanted(self) -> str:  # type: ignore[override]
        return f"text of {self.least} to {self.most} characters"

    def fits(self, value: Any) -> bool:
        return isinstance(value, str) and self.least <= len(value) <= self.most


class Inside(Bound):
    """A path below the folder of the file that names it: relative, and without parts that climb."""

    wanted = "a path inside the folder, with / between its parts"

    def fits(self, value: Any) -> bool:
        return (
            isinstance(value, str)
            and 0 < len(value) <= 1000
            and value.isprintable()
            and "\\" not in value
            and not {"", ".", ".."} & set(value.split("/"))
        )


class Number(Bound):
    """Any number, also one that is not finite."""

    wanted = "a number"

    def fits(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)


class Anything(Bound):
    """Whatever there is."""

    def fits(self, value: Any) -> bool:
        return True
