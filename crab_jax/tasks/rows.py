"""Reading of the columns of a user's table that tasks share: names, events, boxes, and fields of any label."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.io.structured import strict_json
from crab_jax.tasks.segmentation import SIZE
from crab_jax.tasks.task import Field, Made, Row, Task, arguments_of, windows_for
from crab_jax.tasks.times import SECONDS, is_event

NOTHING = ("nothing", "none", "null")  # words for no object, or for an empty mask
CLIP = ("video", "frames")  # media of a question about a clip
_SPAN = r"\(?\s*(\d+)(?:\.0+)?\s*s?\s*(?:-|\u2013|\u2014|\bto\b)\s*(\d+)(?:\.0+)?\s*s?\s*\)?"
_BETWEEN = r"(?:[\s,:]|\s[-\u2013\u2014=@]+\s)+(?:(?:from|at|during)\s+)?"  # between a name and its spans
_EVENT = re.compile(rf"(?P<name>.*?\S){_BETWEEN}(?P<spans>{_SPAN}(?:\s*,\s*{_SPAN})*)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def only(row: Row, *wanted: str) -> None:
    """Raise InputError unless the row has exactly one visual source, and that is one of `wanted`."""
    what = {"video": "a video", "frames": "pictures of a clip", "image": "one picture"}
    shown = [field for field in what if field in row.media]
    if len(shown) != 1 or shown[0] not in wanted:
        asked = " or ".join(what[field] for field in wanted)
        raise row.error(
            "media",
            f"{row.values['task']} is asked about {asked}, not about "
            f"{' and '.join(what[field] for field in shown) or 'sound alone'}",
            "give that",
        )


def names_of(row: Row, field: str = "object") -> list[str]:
    """Return the names in a column: a list, or text with "and" or ";" between them. Raises InputError without any."""
    given = row.given(field)
    names = given if isinstance(given, list) else re.split(r"\s*[;|]\s*|\s+and\s+", row.text(field))
    return [row.text_of(field, name) for name in names]


def events_of(row: Row, given: Any) -> list[list[Any]]:
    """Return [[name, start, end], ...] from text such as `Dog 2-5, 7-9; Speech 0-10`, or from a list of such events.

    Raises InputError for events that cannot be read, and for times outside the clip.
    """
    form = f"write name start-end in whole seconds from 0 to {SECONDS}, the end exclusive, as in `Dog 2-5; Speech 0-10`"
    if given is None:
        raise row.error("events", f"is empty, and {row.values['task']} needs it", form)
    found: list[list[Any]] = []
    for part in re.split(r"\s*[;|\n]\s*", given.strip(" ;|\n")) if isinstance(given, str) else given:
        if isinstance(part, str):
            match = _EVENT.fullmatch(part.strip())
            if not match:
                raise row.error("events", f"cannot be read: {part!r:.60}", form)
            if re.search(_SPAN, match["name"]):  # a comma may be part of a name
                raise row.error("events", f"holds two events without a `;` between: {part!r:.60}", form)
            found += [
                [match["name"].strip(" ,:"), int(start), int(end)] for start, end in re.findall(_SPAN, match["spans"])
            ]
        else:
            found.append(list(part) if isinstance(part, list | tuple) else [part])
    for event in found:
        if not is_event(event) or event[1] >= event[2] and event[1:] != [0, 0]:
            raise row.error("events", f"holds {event!r:.60}", form)
    return found


def box_of(row: Row) -> list[int]:
    """Return the box of a row in pixels of the 224 x 224 picture.

    The column `box` is in pixels of the row's picture, `box_224` in pixels of the 224 x 224 one. Raises InputError
    unless exactly one of the two is given, and for corners that are not in order or outside of the picture.
    """
    pixels, scaled = row.given("box"), row.given("box_224")
    if (pixels is None) == (scaled is None):
        raise row.error(
            "box",
            "is empty, and so is box_224" if pixels is None else "is given beside box_224",
            "give x1, y1, x2, y2 in pixels of the picture in `box`, or of the 224 x 224 one in `box_224`",
        )
    field, given = ("box", pixels) if scaled is None else ("box_224", scaled)
    form = "give x1, y1, x2, y2: the corners at the upper left and lower right"
    numbers = given if isinstance(given, list) else [float(text) for text in _NUMBER.findall(str(given))]
    left = _NUMBER.sub("", str(given)).strip("[]() ,;\t")
    if len(numbers) != 4 or left.strip(" ,;") or not all(isinstance(n, int | float) for n in numbers):
        raise row.error(field, f"is {given!r:.60}", form)
    width, height = row.picture_size() if field == "box" else (SIZE, SIZE)
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise row.error(field, f"is {given!r:.60}, whose corners are not in order", f"{form}, not its width and height")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise row.error(field, f"is {given!r:.60}, which leaves the picture of {width} x {height}", form)
    if max(numbers) <= 1:
        raise row.error(field, f"is {given!r:.60}, which seem to be shares of the picture", "give pixels")
    sides = (width, height) * 2
    return [round(value * SIZE / side) for value, side in zip(numbers, sides, strict=True)]


def columns_of(task: Task) -> tuple[str, ...]:
    """Return the columns that a row of a task has besides its media."""
    if task.columns is not None:
        return task.columns
    shown = {"box": ("box", "box_224", "second"), "mask": ("mask", "second")}.get(task.answer, ())
    return tuple(dict.fromkeys((*task.fields, *task.label, *shown)))


def made_of(task: Task, row: Row) -> Made:
    """Read a row by the task's own `from_row`, or column by column. Raises InputError for a wrong cell."""
    return task.from_row(row) if task.from_row else _usual(task, row)


def _usual(task: Task, row: Row) -> Made:
    """Read each field of the label from the column of its name, boxes by `box_of` and masks by `Row.moment`."""
    asked: dict[str, Any] = {name: row.text(name) for name in task.fields if name != "second"}
    second = row.second()
    fields: dict[str, Any]
    clip = bool(row.media & set(CLIP))
    if task.answer == "mask":
        second, fields = row.moment()
    else:
        only(row, *(("image",) if task.answer == "box" else CLIP))
        fields = {"windows": windows_for(task, row.seconds), "second": second}
        if "second" in task.fields and second is None:
            raise row.error("second", f"is empty, and {task.name} needs it", "give a number, counted from 0")
    label: dict[str, Any] = {}
    for name, field in task.label.items():
        if name in asked:
            label[name] = asked[name]
        elif name == "box" and task.answer == "box":
            label[name] = box_of(row)
        elif field.needed == "answer" or row.given(name) is not None:
            label[name] = _value(row, name, field, label)
    try:
        arguments = arguments_of(task, label, second or 0)
    except InputError as error:
        raise row.error(error.field, error.problem, error.fix) from None
    if "second" in task.fields:
        asked["second"] = second
    variant = "train" if clip or task.answer != "mask" else "quick"
    questions = {name: asked[name] for name in task.fields if name != "second"}
    return Made(task.instruction(variant=variant, **asked), arguments, {**questions, **label}, fields)


def _value(row: Row, name: str, field: Field, label: dict[str, Any]) -> Any:
    """Return the value of a column for a field of a label: its text, or the text decoded as JSON, whichever fits."""
    given = row.given(name)
    if given is None:
        raise row.error(name, f"is empty, and {row.values['task']} needs it", f"give {field.must_be}")
    found = [given]
    if isinstance(given, str):
        found = [" ".join(given.split())]
        with contextlib.suppress(ValueError):
            found.append(strict_json(given))
    for value in found:
        if field.holds(value, {**label, name: value}):
            return value
    raise row.error(name, f"is {given!r:.60}", f"must be {field.must_be}")
