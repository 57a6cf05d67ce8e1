"""Explicit reasoning written from the label alone: what is heard, what is seen, and how the two fit (paper section 3).

Every statement follows from the label, the mask or the question: times, overlaps of sound and sight, positions, sizes,
and for a question the comparison it asks for. The text of an Example is a pure function of the Example and its mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from crab_jax.tasks.avs import ordinal
from crab_jax.tasks.times import SECONDS
from data_pipelines.av_uie import questions
from data_pipelines.av_uie.labels import Place, label, places, spans_of, with_reasoning
from data_pipelines.av_uie.questions import spoken
from data_pipelines.examples import Example

WRITER = "template"
Places = tuple[Place, ...] | None  # see labels.places
_ASK = "Please answer this question: "
_NOTHING = "nothing"  # object of the generated scenes where nothing sounds
_CUES = {  # words of a referring expression -> the comparison they ask for, in the order of mention
    "listen to how loud things are": r"loud\w*|quiet\w*|volume",
    "listen to the rhythm": r"rhythm\w*|faster|slower|fastest|slowest",
    "listen to when things sound": r"first|last|long\w*|short\w*|duration|start\w*|before|after|continuous\w*|earl\w*",
    "listen to what makes a sound": r"sound\w*|silent|play\w*|mak\w*|sing\w*|speak\w*|talk\w*|bark\w*|voice|noise",
    "look where things are": r"left|right|middle|cent\w+|front|behind|beside|next|near\w*|under|above|top|bottom|back",
}


def write(example: Example, root: str | Path | None = None) -> Example:
    """Return the Example with a target of reasoning and answer; captions are unchanged.

    root: where mask files are; None leaves out statements about the mask. Raises InputError for a label with missing
    information (see labels.label) and for a mask that cannot be read.
    """
    text = reasoning(example, places(example, root))
    return with_reasoning(example, text, WRITER) if text else with_reasoning(example, "", "none")


def reasoning(example: Example, found: Places) -> str:
    """Return the sentences before the answer, given the places of the object (labels.places); "" for a caption."""
    values = label(example)
    return _WRITERS[example.task](example, values, found) if example.task in _WRITERS else ""


def _avqa(example: Example, values: dict[str, Any], found: Places) -> str:
    _, _, question = example.instruction.partition(_ASK)
    return questions.reasoning(question, values["answer"], tuple(example.meta.get("type", ())))


def _listing(parts: Iterable[str]) -> str:
    """Return a list in words: `a`, `a and b`, `a, b and c`."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _times(spans: Iterable[Sequence[int]]) -> str:
    return _listing(f"from {start} to {end}" for start, end in spans)


def _ave(example: Example, values: dict[str, Any], found: Places) -> str:
    event, start, end = values["event"], values["start"], values["end"]
    if start == end:
        return f"At no time of the clip is {event} both seen and heard."
    length = "all" if end - start == SECONDS else f"{end - start} of the"
    sentences = [f"I see and hear {event} {_times([(start, end)])}, which is {length} {SECONDS} seconds."]
    outside = [f"before {start}"] * (start > 0) + [f"after {end}"] * (end < SECONDS)
    if outside:
        sentences.append(f"{_listing(outside).capitalize()} it is not both seen and heard.")
    return " ".join(sentences)


def _avvp(example: Example, values: dict[str, Any], found: Places) -> str:
    heard, seen = spans_of(values["audio"]), spans_of(values["visual"])
    sentences = []
    for verb, events in (("hear", heard), ("see", seen)):
        parts = [f"{spoken(name)} {_times(spans)}" for name, spans in events.items()]
        sentences.append(f"I {verb} {'; '.join(parts) or 'no event'}.")
    for name in dict.fromkeys((*heard, *seen)):
        both = _overlaps(heard.get(name, []), seen.get(name, []))
        if name not in seen or name not in heard:
            relation = "is heard but not seen" if name in heard else "is seen but not heard"
        else:
            relation = f"is heard and seen {_times(both)}" if both else "is never heard and seen at the same time"
        sentences.append(f"{spoken(name)} {relation}.")
    return " ".join(sentences)


def _overlaps(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in both of two lists of merged spans."""
    return sorted((max(a, c), min(b, d)) for a, b in first for c, d in second if max(a, c) < min(b, d))


def _place(place: Place) -> str:
    """Return a phrase such as `on the left of the picture, between (53,59) and (153,177), filling 12 % of it`."""
    x1, y1, x2, y2 = place.box
    share = f"{round(100 * place.share)} %" if place.share >= 0.01 else "less than 1 %"
    return f"{place.where} of the picture, between ({x1},{y1}) and ({x2},{y2}), filling {share} of it"


def _arig(example: Example, values: dict[str, Any], found: Places) -> str:
    assert found  # an ARIG label has its box
    return f"I hear the {spoken(values['object'])} and see it {_place(found[0])}."


def _avs(example: Example, values: dict[str, Any], found: Places) -> str:
    moment, objects = f"the {ordinal(values['second'])} second", values["objects"]
    if objects == [_NOTHING]:
        return f"At {moment} nothing that I see makes a sound."
    sentences = [f"I hear {_listing(f'the {spoken(name)}' for name in objects)}."]
    if found == ():
        they = "they are" if len(objects) > 1 else "it is"
        sentences.append(f"At {moment} {they} not in the picture, so the mask is empty.")
    for place in found or ():
        name = f"the {spoken(place.name)}" if place.name else "what sounds" if len(objects) > 1 else "it"
        sentences.append(f"At {moment} {name} is {_place(place)}.")
    return " ".join(sentences)


def _ref_avs(example: Example, values: dict[str, Any], found: Places) -> str:
    expression = values["expression"].rstrip(" .")
    words = expression.lower()
    cues = [what for what, pattern in _CUES.items() if re.search(rf"\b(?:{pattern})\b", words)]
    sentences = [f"To find this object I {_listing(cues or ['look at what things are like'])}."]
    if not values["object"]:
        return f"{sentences[0]} Nothing in the video fits."
    sentences.append(f"The object that fits is the {spoken(values['object'])}.")
    if found:
        sentences.append(f"At the {ordinal(values['second'])} second it is {_place(found[0])}.")
    elif found == ():
        sentences.append(f"At the {ordinal(values['second'])} second it is not in the picture, so the mask is empty.")
    return " ".join(sentences)


_WRITERS: dict[str, Callable[[Example, dict[str, Any], Places], str]] = {
    "avqa": _avqa,
    "ave": _ave,
    "avvp": _avvp,
    "arig": _arig,
    "s4": _avs,
    "ms3": _avs,
    "avss": _avs,
    "ref-avs": _ref_avs,
}
