"""What the label of an Example says, and whether its target says the same.

The label is `meta`, with the fields that crab_jax/tasks/<task>.py lists. Some are weak: a training clip of LLP names
its events but not their times (`{"labels": [name, ...]}`), a clip of MS3's object release does not say what sounds
(`{"objects": []}`). No target can be built from a weak label, but one can be checked against what it does say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS, avvp
from crab_jax.tasks.ave import SECONDS
from crab_jax.tasks.avs import names_match, ordinal
from crab_jax.tasks.avvp import merge_spans
from crab_jax.tasks.placeholders import MASK
from crab_jax.tasks.task import is_text, wrong_fields
from crab_jax.tasks.text import find_tags, normalise
from data_pipelines.examples import Example

AVS = ("s4", "ms3", "avss")
MASKED = (*AVS, "ref-avs")
TAGS = {"ave": ("event", "range"), "avvp": ("audio_event", "visual_event"), "avqa": ("answer",)}
_RANGE = re.compile(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*")
_EVENT = re.compile(r"\s*(.+?)\s*,\s*(\(\d{1,3} \d{1,3}\)(?:\s*,\s*\(\d{1,3} \d{1,3}\))*)\s*", re.DOTALL)
_SPAN = re.compile(r"\((\d+) (\d+)\)")
_SOUNDING = re.compile(r"The sounding object is (.+?)\. Its coordinate")
_MOMENT = {
    "ref-avs": re.compile(r"At the (\w+) second in the video, "),
    "avs": re.compile(r"makes the sound at the (\w+) second is"),
}


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
    for name, problem, must_be in wrong_fields(TASKS[example.task], example.meta, ("answer",)):
        raise InputError(f"example {example.id!r}", f"meta.{name}", problem, f"must be {must_be}")
    return _LABELS[example.task](example)


def answer(example: Example) -> str:
    """The answer alone, as the task writes it."""
    return TASKS[example.task].target(**label(example))


def names(example: Example) -> tuple[str, ...]:
    """The names of things and events in the label."""
    return _names(example, {} if weak(example) else label(example))


def _names(example: Example, values: dict[str, Any]) -> tuple[str, ...]:
    if weak(example):
        return tuple(example.meta.get("labels", ()))
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


def disagreements(example: Example) -> list[str]:
    """What in a target is not as its label says, in words; [] when all agrees, and for an empty target.

    Its tags parse, its events are in the label, its ranges, answer, objects and expression are equal, its coordinates
    are within a pixel, and what the task's parser reads is the label. Raises InputError as `label`.
    """
    if not example.target.strip():
        return []
    if weak(example):
        return _tag_problems(example) or (
            _avvp_problems(example, {}) if example.task == "avvp" else _moment_problems(example, "avs")
        )
    values = label(example)
    return _tag_problems(example) or _CHECKS[example.task](example, values)


def _tag_problems(example: Example) -> list[str]:
    """Tags that the task does not have, that are not closed, or that are inside each other."""
    text, found = example.target, []
    if example.task in MASKED:
        if text.count(MASK) != 1 or not text.rstrip(" .").endswith(MASK):
            return ["does not end in one run of the six mask tokens"]
        text = text.replace(MASK, "")
    allowed, open_tag = TAGS.get(example.task, ()), ""
    for mark in re.findall(r"<[^<>]{0,40}>|[<>]", text):
        whole = re.fullmatch(r"<(/?)(\w*)>", mark)
        slash, name = whole.groups() if whole else ("", "")
        if name not in allowed:
            found.append(f"holds {mark!r}, which is no tag of {example.task}")
        elif (name if slash else "") != open_tag:
            found.append(f"the tags do not match at {mark!r}")
        else:
            open_tag = "" if slash else name
    return found + ([f"<{open_tag}> is never closed"] if open_tag else [])


def _one(example: Example, tag: str) -> tuple[str, list[str]]:
    """The content of the one `tag` there should be, and what is wrong."""
    contents = [content for _, content in find_tags(example.target, (tag,))]
    return (
        contents[-1] if contents else "",
        [] if len(contents) == 1 else [f"{len(contents)} <{tag}> tags where one is needed"],
    )


def _ave_problems(example: Example, values: dict[str, Any]) -> list[str]:
    event, found = _one(example, "event")
    span, more = _one(example, "range")
    found += more
    if event and normalise(event) != normalise(values["event"]):
        found.append(f"the event is {event!r}, the label says {values['event']!r}")
    numbers = _RANGE.fullmatch(span)
    if not numbers:
        found.append(f"the range {span!r} is not `start,end`")
    elif (said := tuple(map(int, numbers.groups()))) != (values["start"], values["end"]):
        found.append(f"the range is {said[0]},{said[1]}, the label says {values['start']},{values['end']}")
    parsed = TASKS["ave"].parse(example.target)
    if not found and (parsed is None or parsed["ranges"] != [[values["start"], values["end"]]]):
        found.append("the parser of the task reads another range")
    return found


def _avvp_problems(example: Example, values: dict[str, Any]) -> list[str]:
    by_sense: dict[str, avvp.Events] = {"audio": [], "visual": []}
    tags, found = find_tags(example.target, TAGS["avvp"]), []
    for tag, content in tags:
        sense, event = tag.removesuffix("_event"), _EVENT.fullmatch(content)
        if event is None:
            if normalise(content) != "none":
                found.append(f"the {sense} event {content!r} is not `name,(start end),...`")
            continue
        spans = [(int(start), int(end)) for start, end in _SPAN.findall(event[2])]
        found += [
            f"the {sense} event {event[1]!r} has the impossible time ({start} {end})"
            for start, end in spans
            if not 0 <= start < end <= SECONDS
        ]
        by_sense[sense] += [[event[1], *span] for span in spans]
    if not tags:
        found.append("holds no event tag")
    said = by_sense["audio"] + by_sense["visual"]
    known = {normalise(name): name for name in _names(example, values)}
    found += [
        f"the event {name!r} is not in the label"
        for name in dict.fromkeys(name for name, *_ in said)
        if normalise(name) not in known
    ]
    if weak(example):
        heard_or_seen = {normalise(name) for name, *_ in said}
        found += [
            f"the event {name!r} of the label is missing" for key, name in known.items() if key not in heard_or_seen
        ]
    elif not found:
        classes = list(known)
        for sense, events in by_sense.items():
            differ = avvp.occurrence(events, classes) != avvp.occurrence(values[sense], classes)
            found += [
                f"the {sense} times of {known[classes[k]]!r} differ from the label"
                for k in np.flatnonzero(differ.any(axis=1))
            ]
        if not found and TASKS["avvp"].parse(example.target) is None:
            found.append("the parser of the task reads no event")
    return found


def _avqa_problems(example: Example, values: dict[str, Any]) -> list[str]:
    said, found = _one(example, "answer")
    truth = values["answer"]
    if normalise(said) != normalise(truth) or normalise(TASKS["avqa"].parse(example.target) or "") != normalise(truth):
        found.append(f"the answer is {said!r}, the label says {truth!r}")
    return found


def _arig_problems(example: Example, values: dict[str, Any]) -> list[str]:
    box, found = TASKS["arig"].parse(example.target), []
    if box is None:
        found.append("no two corners in order can be read")
    else:
        found += [
            f"{corner} is {said:g}, the label says {truth:g}"
            for corner, said, truth in zip(("x1", "y1", "x2", "y2"), box, values["box"], strict=True)
            if abs(said - truth) > 1
        ]
    stated = _SOUNDING.findall(example.target)
    if stated and normalise(stated[-1]) != normalise(values["object"]):
        found.append(f"the object is {stated[-1]!r}, the label says {values['object']!r}")
    elif not stated and f" {normalise(values['object'])} " not in f" {normalise(example.target)} ":
        found.append(f"the object {values['object']!r} is not named")
    return found


def _moment_problems(example: Example, task: str) -> list[str]:
    said, truth = _MOMENT[task].findall(example.target), ordinal(example.second or 0)
    return [] if said and said[-1] == truth else [f"the {said[-1] if said else 'missing'} second, not the {truth}"]


def _avs_problems(example: Example, values: dict[str, Any]) -> list[str]:
    parsed, objects = TASKS[example.task].parse(example.target), values["objects"]
    said = [] if parsed is None else parsed["objects"]
    found = [] if names_match(parsed, objects) else [f"the objects are {said}, the label says {objects}"]
    return found + _moment_problems(example, "avs")


def _ref_avs_problems(example: Example, values: dict[str, Any]) -> list[str]:
    parsed, found = TASKS["ref-avs"].parse(example.target), []
    if not names_match(parsed, [values["object"]] if values["object"] else []):
        said = "unreadable" if parsed is None else ", ".join(parsed["objects"]) or "nothing"
        found.append(f"the object is {said}, the label says {values['object'] or 'nothing'}")
    if normalise(values["expression"]) not in normalise(example.target):
        found.append("does not repeat the expression")
    return found + _moment_problems(example, "ref-avs")


def _avcap_problems(example: Example, values: dict[str, Any]) -> list[str]:
    captions = [caption.strip() for caption in example.meta["captions"]]
    return [] if example.target in captions else ["is none of the captions"]


_CHECKS: dict[str, Callable[[Example, dict[str, Any]], list[str]]] = {
    "ave": _ave_problems,
    "avvp": _avvp_problems,
    "avqa": _avqa_problems,
    "arig": _arig_problems,
    "s4": _avs_problems,
    "ms3": _avs_problems,
    "avss": _avs_problems,
    "ref-avs": _ref_avs_problems,
    "avcap": _avcap_problems,
}


# One function per task: the label of an Example as arguments of the task's target.


def _avvp(example: Example) -> dict[str, Any]:
    return {
        sense: [[name.strip(), *span] for name, spans in spans_of(example.meta[sense]).items() for span in spans]
        for sense in ("audio", "visual")
    }


def _avs(example: Example) -> dict[str, Any]:
    return {"objects": [name.strip() for name in example.meta["objects"]], "second": example.second or 0}


def _ref_avs(example: Example) -> dict[str, Any]:
    return {
        "expression": example.meta["expression"].strip(),
        "object": example.meta["object"].strip(),
        "second": example.second or 0,
    }


def _avcap(example: Example) -> dict[str, Any]:
    caption = example.meta["captions"][0]
    if not is_text(caption):
        raise InputError(
            f"example {example.id!r}",
            "meta.captions",
            f"is {caption!r:.60}",
            "must be one line, without angle brackets",
        )
    return {"caption": caption.strip()}


_LABELS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "ave": lambda example: {
        "event": example.meta["event"].strip(),
        "start": example.meta["start"],
        "end": example.meta["end"],
    },
    "avvp": _avvp,
    "avqa": lambda example: {"answer": example.meta["answer"].strip()},
    "arig": lambda example: {"object": example.meta["object"].strip(), "box": [*example.meta["box"]]},
    "s4": _avs,
    "ms3": _avs,
    "avss": _avs,
    "ref-avs": _ref_avs,
    "avcap": _avcap,
}
