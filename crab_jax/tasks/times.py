"""Reading of times in text that a model wrote. An ambiguous time is left unread rather than guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from crab_jax.tasks.task import Event, Oddity, is_list, is_text, is_whole

SECONDS = 10  # the end of a clip in labels of events, which count tenths of the clip

_SECONDS = {
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "ms": 1e-3,
    "msec": 1e-3,
    "millisecond": 1e-3,
    "min": 60.0,
    "minute": 60.0,
}
_UNIT = r"milliseconds?|msecs?|ms|minutes?|mins?|seconds?|secs?|s"
_DECIMAL = r"[0-9]{1,6}(?:\.[0-9]{1,6})?"
_TOKEN = re.compile(
    rf"""
    (?P<time>(?:
        (?P<clock>(?:[0-9]{{1,2}}:)?[0-9]{{1,2}}:[0-5][0-9](?:\.[0-9]{{1,6}})?)
      | (?P<minutes>[0-9]{{1,3}})\s*(?:m|mins?|minutes?)
        \s*(?P<rest>[0-5]?[0-9](?:\.[0-9]{{1,6}})?)\s*(?:s|secs?|seconds?)
      | (?P<number>{_DECIMAL})(?:\s*(?P<unit>{_UNIT}))?
      )(?![\w:%\u00b0]|\.[0-9]))
  | (?P<word>[^\W\d_]+)
  | (?P<dash>(?<=\s)[-\u2013\u2014\u2212~](?=\s)|(?<=[\w.)\]])[-\u2013\u2014\u2212~](?=[\w(\[]))
  | (?P<mark>[,;.()\[\]])
  | (?P<other>\S)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LONGEST = 999  # the largest number without a unit that is read as seconds; a larger one may be a year or a count
_OPENING, _CLOSING = ("(", "["), (")", "]")
_TO = ("to", "until", "till")
_FILLER = frozenset(
    "from between the time range is are at in on of for during video clip about around and then second "
    "seconds event audio visual".split()
)


def is_event(event: Any) -> bool:
    """Whether a value is [name, start, end] in whole seconds from 0 to 10."""
    return (
        is_list(event, lambda part: True, 3)
        and len(event) == 3
        and is_text(event[0])
        and all(is_whole(second, 0, SECONDS) for second in event[1:])
    )


def no_time(events: Sequence[Event]) -> Iterator[Oddity]:
    """Yield the events of a label that end before or when they start."""
    for event in events:
        if event.start >= event.end:
            yield Oddity(
                True,
                "",
                f"{event.name!r:.60} lasts from {event.start} to {event.end}, which is no time",
                "the end is the first second after the event, as in 2,3 for the third second alone",
            )


class Span(NamedTuple):
    """A time range in seconds, and its first and last position in the text.

    read: False where brackets hold numbers that are no time range.
    """

    start: float
    end: float
    first: int
    last: int
    read: bool


class _Token(NamedTuple):
    kind: str  # time, word, dash, other, or the mark itself
    text: str
    first: int
    last: int
    seconds: float = 0.0  # of a time on a clock; else the number before its unit
    unit: str = ""  # of a time: "" without a unit, "clock", or a key of _SECONDS


def _tokens(text: str) -> list[_Token]:
    found = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or ""
        kind = next(name for name in ("time", "word", "dash", "mark", "other") if match[name] is not None)
        at = match.start(kind), match.end(kind)
        if kind != "time":
            found.append(_Token(match[kind] if kind == "mark" else kind, match[kind].lower(), *at))
            continue
        if at[0] and re.match(r"[\w.:$#]", text[at[0] - 1]):  # a part of another word or number
            found.append(_Token("other", match["time"], *at))
        elif match["clock"]:
            *minutes, rest = match["clock"].split(":")
            total = 0.0
            for part in minutes:
                total = 60 * (total + float(part))
            found.append(_Token("time", match["time"], *at, total + float(rest), "clock"))
        elif match["minutes"]:
            found.append(_Token("time", match["time"], *at, 60 * float(match["minutes"]) + float(match["rest"]), "s"))
        else:
            unit = (match["unit"] or "").lower()
            found.append(
                _Token(
                    "time",
                    match["time"],
                    *at,
                    float(match["number"]),
                    unit if unit in _SECONDS else unit.removesuffix("s"),
                )
            )
    return found


def _seconds(first: _Token, second: _Token) -> tuple[float, float] | None:
    """Return the two times of a range in seconds, or None; a unit that is given once holds for both."""
    units = first.unit, second.unit
    if "clock" in units:
        if units != ("clock", "clock"):
            return None
        scales = 1.0, 1.0
    elif units[0] and not units[1] and units[0] not in ("s", "sec", "second"):
        return None  # "1 min to 2"
    else:
        scales = _SECONDS.get(units[0] or units[1], 1.0), _SECONDS.get(units[1], 1.0)
    if not any(units) and max(first.seconds, second.seconds) > _LONGEST:
        return None
    start, end = (round(token.seconds * scale, 6) for token, scale in zip((first, second), scales, strict=True))
    return (_whole(start), _whole(end)) if start <= end else None


def _whole(seconds: float) -> float:
    """Return the number, as an int where it is whole."""
    return int(seconds) if seconds == int(seconds) else seconds


class _Pair(NamedTuple):
    """Two times: the word or mark between them, their values or None, and the index after them."""

    join: str
    times: tuple[float, float] | None
    past: int


def _pair(tokens: Sequence[_Token], at: int, between: bool) -> _Pair | None:
    """Return the pair of times that starts at `at`, if any."""

    def time(at: int) -> int | None:
        at += at < len(tokens) and tokens[at].text in ("second", "sec")  # "second 3"
        return at if at < len(tokens) and tokens[at].kind == "time" else None

    if (first := time(at)) is None:
        return None
    join, then = " ", first + 1
    if then < len(tokens):
        joint = tokens[then]
        if joint.kind in ("dash", ",", ";") or joint.text in _TO or (between and joint.text == "and"):
            join, then = joint.text, then + 1
    if (second := time(then)) is None:
        return None
    return _Pair(join, _seconds(tokens[first], tokens[second]), second + 1)


def read_ranges(text: str) -> list[tuple[float, float]] | None:
    """Return the time ranges of a text that holds nothing else, such as "0,8" or "from 0:03 to 0:05 and 7-9 s".

    Returns [] for a text without numbers, and None for a text with a number that is no part of a range or that may
    mean something else.
    """
    tokens = _tokens(text)
    if not any(re.search(r"\d", token.text) for token in tokens):
        return []
    ranges: list[tuple[float, float]] = []
    at, glue, joined = 0, "", ""
    while at < len(tokens):
        token = tokens[at]
        pair = _pair(tokens, at, any(one.text == "between" for one in tokens[max(0, at - 2) : at]))
        if pair:
            in_brackets = at > 0 and tokens[at - 1].kind in _OPENING
            if pair.times is None or (
                not in_brackets and joined and joined == (glue or joined)
            ):  # "0,2,5,7" may list four seconds, and "1,5 2,5" hold decimal commas
                return None
            if pair.past < len(tokens) and tokens[pair.past].text == "of":  # "0.3-0.5 of the clip" is a fraction
                return None
            ranges.append(pair.times)
            at, glue, joined = pair.past, "", pair.join
        elif token.kind in (*_OPENING, *_CLOSING, ",", ";", ".") or token.text in _FILLER:
            glue, at = token.text if token.kind in (",", ";") or token.text == "and" else glue or token.text, at + 1
        else:
            return None
    return ranges


def find_spans(text: str) -> list[Span]:
    """Return the time ranges after names, as in "Dog,(0 1),(3 6)" or "Dog from 0:03 to 0:05", in order.

    Two numbers are a range in brackets, after "from" or "between", or with units. Brackets with numbers that are no
    range are returned as a Span that is not `read`.
    """
    tokens, spans = _tokens(text), []
    at = 0
    while at < len(tokens):
        found, at = _bracketed(text, tokens, at) if tokens[at].kind in _OPENING else _bare(tokens, at)
        spans += found
    return spans


def _bracketed(text: str, tokens: Sequence[_Token], at: int) -> tuple[list[Span], int]:
    """Return the span in the brackets that open at `at`, none without numbers, and the index to go on from."""
    close = next((i for i in range(at + 1, len(tokens)) if tokens[i].kind in (*_OPENING, *_CLOSING)), len(tokens))
    if close == len(tokens) or tokens[close].kind in _OPENING:  # never closed, or nested
        return [], at + 1
    inside = text[tokens[at].last : tokens[close].first]
    if not re.search(r"\d", inside):
        return [], at + 1
    ranges = read_ranges(inside) or []
    start, end = ranges[0] if len(ranges) == 1 else (0, 0)
    return [Span(start, end, tokens[at].first, tokens[close].last, len(ranges) == 1)], close + 1


def _bare(tokens: Sequence[_Token], at: int) -> tuple[list[Span], int]:
    """Return the spans without brackets that start at `at`, and the index to go on from.

    Times that follow each other, as in "from 0 to 3 and 5 to 8", are read together or not at all: text that may list
    seconds ("3 s, 5 s, 7 s") or have decimal commas ("1,5 s - 2,5 s") is skipped as a whole.
    """
    first, past, sound = at, at, True
    spans: list[Span] = []
    pairs: list[tuple[str, _Pair]] = []
    while True:
        opening = tokens[at].text if at < len(tokens) and tokens[at].text in ("from", "between") else ""
        pair = _pair(tokens, at + bool(opening), opening == "between")
        if pair is None:
            if pairs and at + bool(opening) < len(tokens) and tokens[at + bool(opening)].kind == "time":
                sound, past = False, at + bool(opening) + 1
            break
        signed = (
            tokens[at].kind == "time"
            and at > 0
            and tokens[at - 1].kind == "other"
            and (tokens[at - 1].last == tokens[at].first)
        )  # "-3 to 5 s"
        sound &= pair.times is not None and pair.join != " " and not signed
        pairs.append((opening, pair))
        start, end = pair.times or (0, 0)
        spans.append(Span(start, end, tokens[at].first, tokens[pair.past - 1].last, True))
        at = past = pair.past
        if at < len(tokens) and (tokens[at].kind in (",", ";", "dash") or tokens[at].text in ("and", "or", *_TO)):
            at += 1
    if not pairs:
        return [], first + 1
    following = tokens[past] if past < len(tokens) else None
    ends = following is None or following.kind in (",", ";", ".", *_OPENING) or following.text in ("and", "then")
    opening, last = pairs[-1]
    sound &= all(pair.join not in (",", ";") for _, pair in pairs) or (len(pairs) == 1 and bool(opening))
    sound &= bool(tokens[last.past - 1].unit or (pairs[0][0] and ends))
    return (spans if sound else []), past
