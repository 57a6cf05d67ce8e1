"""What the label of an Example says: the checked arguments of its task's `target`, and where its mask is.

The label is `meta`, with the fields that crab_jax/tasks/<task>.py lists. Some are weak: a training clip of LLP names
its events but not their times (`{"labels": [name, ...]}`), a clip of MS3's object release does not say what sounds
(`{"objects": []}`). No target can be built from a weak label, but one can be checked against what it does say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crab_jax.errors import InputError
from crab_jax.tasks import TASKS, arig
from crab_jax.tasks.ave import SECONDS
from crab_jax.tasks.avs import CLASSES
from crab_jax.tasks.avvp import merge_spans
from data_pipelines.examples import Example
from data_pipelines.media import read_mask
from data_pipelines.sources.arig import box_of

BOX_SPACE = arig.SIZE  # coordinates are pixels of a 224 x 224 picture, as in AV-UIE
# How the answer of each task begins; what stands before it is the reasoning. AVCap has an answer only.
ANSWER_STARTS = {
    "ave": "So the audible and visible event", "avvp": "Therefore, visual and audio events are",
    "avqa": "So the answer is", "arig": "The sounding object is", "s4": "The object making the sound in the video is",
    "ms3": "The object making the sound in the video is", "avss": "The object making the sound in the video is",
    "ref-avs": "At the "}
AVS = ("s4", "ms3", "avss")
_WHERE = (("in the upper left", "at the top", "in the upper right"),
          ("on the left", "in the middle", "on the right"),
          ("in the lower left", "at the bottom", "in the lower right"))
_FIX = "give the label fields listed in crab_jax/tasks"


class Place(NamedTuple):
    """Where something is in the 224 x 224 picture: the box (x1, y1, x2, y2) of its first and last pixels, the centre
    (x, y) of its pixels, the share of the picture that they fill, and its name where a mask tells several apart."""

    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    share: float
    name: str = ""

    @property
    def where(self) -> str:
        """The ninth of the picture that holds the centre, as `in the upper left`."""
        column, row = (min(2, max(0, int(3 * value / BOX_SPACE))) for value in self.centre)
        return _WHERE[row][column]


def spans_of(events: Sequence[Sequence[Any]]) -> dict[str, list[tuple[int, int]]]:
    """name -> merged spans of `[[name, start, end], ...]`, by first second; names without a real span are left out."""
    spans: dict[str, list[Sequence[int]]] = {}
    for name, *span in events:
        spans.setdefault(name, []).append(span)
    merged = {name: merge_spans(found) for name, found in spans.items()}
    return dict(sorted(((n, s) for n, s in merged.items() if s), key=lambda item: (item[1][0], item[0])))


def weak(example: Example) -> bool:
    """Whether the label says too little for a target: events without times, or a mask without what sounds."""
    if example.task == "avvp":
        return "labels" in example.meta and "audio" not in example.meta
    return example.task in AVS and example.meta.get("objects") == []


def label(example: Example) -> dict[str, Any]:
    """The arguments of `TASKS[example.task].target`, less `reasoning`, from the label.

    Raises InputError naming the example and the field when the label lacks it, or holds what no answer can say (times
    outside the clip, names with angle brackets), and for a weak label.
    """
    if weak(example):
        problem = "names events without their times" if example.task == "avvp" else "does not say what sounds"
        raise InputError(f"example {example.id!r}", "meta", problem, "only a released target can be used for it")
    return _LABELS[example.task](example)


def answer(example: Example) -> str:
    """The answer alone, as the task writes it."""
    return TASKS[example.task].target(**label(example))


def with_reasoning(example: Example, reasoning: str, by: str) -> Example:
    """The Example whose target is `reasoning` and then the answer of its label."""
    target = TASKS[example.task].target(**label(example), reasoning=reasoning)
    return dataclasses.replace(example, target=target, meta={**example.meta, "reasoning": by})


def reasoning_of(example: Example) -> str:
    """What a target says before its answer, "" when it is the answer alone or empty."""
    start = ANSWER_STARTS.get(example.task)
    return example.target.rpartition(start)[0].strip() if start else ""


def names(example: Example) -> tuple[str, ...]:
    """The names of things and events in the label."""
    if weak(example):
        return tuple(example.meta.get("labels", ()))
    values = label(example)
    match example.task:
        case "ave":
            return (values["event"],)
        case "avvp":
            return tuple(dict.fromkeys(name for name, *_ in (*values["audio"], *values["visual"])))
        case "s4" | "ms3" | "avss":
            return tuple(values["objects"])
        case "arig" | "ref-avs":
            return (values["object"],) if values["object"] else ()
    return ()


def mask_place(mask: np.ndarray, name: str = "") -> Place | None:
    """Where the foreground of `mask` [224,224] is; None when there is none."""
    box = box_of(mask)
    if box is None:
        return None
    rows, columns = np.nonzero(mask)
    return Place(box, (float(columns.mean()), float(rows.mean())), len(rows) / mask.size, name)


def box_place(box: Sequence[float]) -> Place:
    """The place of everything inside a box."""
    x1, y1, x2, y2 = (round(value) for value in box)
    return Place((x1, y1, x2, y2), ((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1) * (y2 - y1) / BOX_SPACE ** 2)


def places(example: Example, root: str | Path | None) -> tuple[Place, ...] | None:
    """Where the labelled objects of a spatial task are: one Place of all, or for AVSS one of each class that the label
    names; () for an empty mask; None when it is not known.

    ARIG has its box in the label. The others need the mask file below `root`; None without a root or for other tasks.
    """
    if example.task == "arig":
        return (box_place(label(example)["box"]),)
    if root is None or not example.mask or TASKS[example.task].mask_kind == "none":
        return None
    mask = read_mask(Path(root) / example.mask, BOX_SPACE, example.mask_kind)
    named = {CLASSES.index(name): name for name in names(example) if name in CLASSES[1:]}
    each = [mask_place(mask == number, name) for number, name in named.items() if example.mask_kind == "semantic"]
    return tuple(place for place in (each if any(each) else [mask_place(mask)]) if place)


# One function per task: the label of an Example, checked.

def _bad(example: Example, field: str, problem: str, fix: str = _FIX) -> InputError:
    return InputError(f"example {example.id!r}", f"meta.{field}", problem, fix)


def _value(example: Example, field: str, kind: type | tuple[type, ...]) -> Any:
    if field not in example.meta:
        raise _bad(example, field, "missing")
    value = example.meta[field]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(example, field, f"is {value!r:.60}")
    return value


def _checked_name(example: Example, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or any(mark in value for mark in "<>\n"):
        raise _bad(example, field, f"is {value!r:.60}", "must be a name, without angle brackets")
    return value.strip()


def _name(example: Example, field: str) -> str:
    return _checked_name(example, field, _value(example, field, str))


def _ave(example: Example) -> dict[str, Any]:
    start, end = (_value(example, field, int) for field in ("start", "end"))
    if not 0 <= start <= end <= SECONDS:
        raise _bad(example, "start", f"the range {start},{end} is not in 0..{SECONDS}", "use whole seconds of the clip")
    return {"event": _name(example, "event"), "start": start, "end": end}


def _avvp(example: Example) -> dict[str, Any]:
    found: dict[str, list[list[Any]]] = {}
    for field in ("audio", "visual"):
        events = []
        for event in _value(example, field, (list, tuple)):
            if len(event) != 3 or not all(type(second) is int for second in event[1:]):
                raise _bad(example, field, f"holds {event!r:.60}", "must be [name, start, end] in whole seconds")
            events.append([_checked_name(example, field, event[0]), *event[1:]])
        found[field] = [[name, *span] for name, spans in spans_of(events).items() for span in spans]
    return found


def _arig(example: Example) -> dict[str, Any]:
    box = _value(example, "box", (list, tuple))
    numbers = len(box) == 4 and all(isinstance(v, int | float) and 0 <= v <= BOX_SPACE for v in box)
    if not numbers or box[0] > box[2] or box[1] > box[3]:
        raise _bad(example, "box", f"is {box!r:.60}", f"must be [x1, y1, x2, y2] in 0..{BOX_SPACE}, in order")
    return {"object": _name(example, "object"), "box": [*box]}


def _avs(example: Example) -> dict[str, Any]:
    objects = _value(example, "objects", (list, tuple))
    if not objects:
        raise _bad(example, "objects", "is empty", "name what sounds")
    return {"objects": [_checked_name(example, "objects", name) for name in objects], "second": example.second or 0}


def _ref_avs(example: Example) -> dict[str, Any]:
    name = _value(example, "object", str) and _name(example, "object")
    return {"expression": _name(example, "expression"), "object": name, "second": example.second or 0}


def _avcap(example: Example) -> dict[str, Any]:
    captions = _value(example, "captions", (list, tuple))
    if not captions:
        raise _bad(example, "captions", "is empty", "give at least one caption")
    return {"caption": _checked_name(example, "captions", captions[0])}


_LABELS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "ave": _ave, "avvp": _avvp, "avqa": lambda example: {"answer": _name(example, "answer")}, "arig": _arig,
    "s4": _avs, "ms3": _avs, "avss": _avs, "ref-avs": _ref_avs, "avcap": _avcap}
