"""Whether a target says what its label says; what does not is quarantined with the reasons.

Three layers. Every target: its tags parse, its events are in the label, its ranges, answer and expression are equal,
its coordinates are within a pixel. A target that this package built also ends in exactly the answer of its label. What
an LLM wrote before the answer may name no number and no thing that its facts do not, and may not speak of a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.errors import InputError
from crab_jax.tasks import TASKS, avvp
from crab_jax.tasks.ave import SECONDS
from crab_jax.tasks.avs import names_match, ordinal
from crab_jax.tasks.placeholders import MASK
from crab_jax.tasks.text import find_tags, normalise
from data_pipelines.av_uie import labels, templates
from data_pipelines.av_uie.questions import INSTRUMENTS
from data_pipelines.examples import Example

TAGS = {"ave": ("event", "range"), "avvp": ("audio_event", "visual_event"), "avqa": ("answer",)}
MASKED = ("s4", "ms3", "avss", "ref-avs")
RELEASED, LLM = "released", "llm:"  # who wrote a target: meta["reasoning"]
LONGEST = 1500  # characters of an LLM's reasoning
_RANGE = re.compile(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*")
_EVENT = re.compile(r"\s*(.+?)\s*,\s*(\(\d{1,3} \d{1,3}\)(?:\s*,\s*\(\d{1,3} \d{1,3}\))*)\s*", re.DOTALL)
_SPAN = re.compile(r"\((\d+) (\d+)\)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SOUNDING = re.compile(r"The sounding object is (.+?)\. Its coordinate")
_MOMENT = {"ref-avs": re.compile(r"At the (\w+) second in the video, "),
           "avs": re.compile(r"makes the sound at the (\w+) second is")}
_GIVEN_AWAY = re.compile(r"\b(?:labels?|annotat\w+|ground[- ]truth|the facts|given facts|answer sentence|as an ai)\b",
                         re.IGNORECASE)


def problems(example: Example, root: str | Path | None = None, vocabulary: Collection[str] = ()) -> list[str]:
    """What in the target disagrees with the label, in words; [] when all agrees.

    root: where mask files are, for what is said about places; without it a text that speaks of a mask's place is not
    recomputed. vocabulary: names of things (see `vocabulary_of`) that an LLM may not mention unless the label or the
    prompt does. Raises InputError when the label itself is unusable.
    """
    if not example.target.strip():
        return ["the target is empty"]
    if labels.weak(example):
        return _tag_problems(example) or (
            _avvp_problems(example) if example.task == "avvp" else _moment_problems(example, "avs"))
    answer, by = labels.answer(example), str(example.meta.get("reasoning", ""))
    found = _tag_problems(example) or _CHECKS[example.task](example)
    if (by == templates.WRITER or by.startswith(LLM)) and not example.target.endswith(answer):
        found.append("does not end in the answer of its label")
    known = root is not None or example.task not in MASKED
    if by.startswith(LLM):
        facts = templates.reasoning(example, labels.places(example, root))
        found += invented(example, example.target.removesuffix(answer), f"{facts} {answer}", vocabulary, known)
    if by == templates.WRITER and known and example.target != templates.write(example, root).target:
        found.append("is not what the template writes for its label")
    return found


def vocabulary_of(examples: Iterable[Example]) -> dict[str, frozenset[str]]:
    """task -> every name in the labels of its Examples, and for avqa the instruments of MUSIC-AVQA."""
    names: dict[str, set[str]] = {"avqa": set(INSTRUMENTS)}
    for example in examples:
        names.setdefault(example.task, set()).update(labels.names(example))
    return {task: frozenset(found) for task, found in names.items()}


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
    return (contents[-1] if contents else "",
            [] if len(contents) == 1 else [f"{len(contents)} <{tag}> tags where one is needed"])


def _ave_problems(example: Example) -> list[str]:
    values = labels.label(example)
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


def _avvp_problems(example: Example) -> list[str]:
    by_sense: dict[str, avvp.Events] = {"audio": [], "visual": []}
    tags, found = find_tags(example.target, TAGS["avvp"]), []
    for tag, content in tags:
        sense, event = tag.removesuffix("_event"), _EVENT.fullmatch(content)
        if event is None:
            if normalise(content) != "none":
                found.append(f"the {sense} event {content!r} is not `name,(start end),...`")
            continue
        spans = [(int(start), int(end)) for start, end in _SPAN.findall(event[2])]
        found += [f"the {sense} event {event[1]!r} has the impossible time ({start} {end})"
                  for start, end in spans if not 0 <= start < end <= SECONDS]
        by_sense[sense] += [[event[1], *span] for span in spans]
    if not tags:
        found.append("holds no event tag")
    said = by_sense["audio"] + by_sense["visual"]
    known = {normalise(name): name for name in labels.names(example)}
    found += [f"the event {name!r} is not in the label" for name in dict.fromkeys(name for name, *_ in said)
              if normalise(name) not in known]
    if labels.weak(example):
        heard_or_seen = {normalise(name) for name, *_ in said}
        found += [f"the event {name!r} of the label is missing" for key, name in known.items()
                  if key not in heard_or_seen]
    elif not found:
        classes, truth = list(known), labels.label(example)
        for sense, events in by_sense.items():
            differ = avvp.occurrence(events, classes) != avvp.occurrence(truth[sense], classes)
            found += [f"the {sense} times of {known[classes[k]]!r} differ from the label"
                      for k in np.flatnonzero(differ.any(axis=1))]
        if not found and TASKS["avvp"].parse(example.target) is None:
            found.append("the parser of the task reads no event")
    return found


def _avqa_problems(example: Example) -> list[str]:
    said, found = _one(example, "answer")
    truth = labels.label(example)["answer"]
    if normalise(said) != normalise(truth) or normalise(TASKS["avqa"].parse(example.target) or "") != normalise(truth):
        found.append(f"the answer is {said!r}, the label says {truth!r}")
    return found


def _arig_problems(example: Example) -> list[str]:
    values, box = labels.label(example), TASKS["arig"].parse(example.target)
    found = []
    if box is None:
        found.append("no two corners in order can be read")
    else:
        found += [f"{corner} is {said:g}, the label says {truth:g}" for corner, said, truth
                  in zip(("x1", "y1", "x2", "y2"), box, values["box"], strict=True) if abs(said - truth) > 1]
    stated = _SOUNDING.findall(example.target)
    if stated and normalise(stated[-1]) != normalise(values["object"]):
        found.append(f"the object is {stated[-1]!r}, the label says {values['object']!r}")
    elif not stated and f" {normalise(values['object'])} " not in f" {normalise(example.target)} ":
        found.append(f"the object {values['object']!r} is not named")
    return found


def _moment_problems(example: Example, task: str) -> list[str]:
    said, truth = _MOMENT[task].findall(example.target), ordinal(example.second or 0)
    return [] if said and said[-1] == truth else [f"the {said[-1] if said else 'missing'} second, not the {truth}"]


def _avs_problems(example: Example) -> list[str]:
    parsed, objects = TASKS[example.task].parse(example.target), labels.label(example)["objects"]
    said = [] if parsed is None else parsed["objects"]
    found = [] if names_match(parsed, objects) else [f"the objects are {said}, the label says {objects}"]
    return found + _moment_problems(example, "avs")


def _ref_avs_problems(example: Example) -> list[str]:
    values, parsed = labels.label(example), TASKS["ref-avs"].parse(example.target)
    found = []
    if not names_match(parsed, [values["object"]] if values["object"] else []):
        said = "unreadable" if parsed is None else ", ".join(parsed["objects"]) or "nothing"
        found.append(f"the object is {said}, the label says {values['object'] or 'nothing'}")
    if normalise(values["expression"]) not in normalise(example.target):
        found.append("does not repeat the expression")
    return found + _moment_problems(example, "ref-avs")


def _avcap_problems(example: Example) -> list[str]:
    captions = [caption.strip() for caption in example.meta["captions"]]
    return [] if example.target in captions else ["is none of the captions"]


_CHECKS: dict[str, Callable[[Example], list[str]]] = {
    "ave": _ave_problems, "avvp": _avvp_problems, "avqa": _avqa_problems, "arig": _arig_problems,
    "s4": _avs_problems, "ms3": _avs_problems, "avss": _avs_problems, "ref-avs": _ref_avs_problems,
    "avcap": _avcap_problems}


def invented(example: Example, said: str, facts: str, vocabulary: Collection[str] = (), places: bool = True
             ) -> list[str]:
    """What the reasoning `said` of an LLM adds to the `facts` that it was given; [] when nothing.

    places: whether the facts say where things are; if not, numbers are not compared.
    """
    said, facts = said.strip(), f"{facts} {example.instruction}"
    found = [] if said else ["there is no reasoning before the answer"]
    if len(said) > LONGEST:
        found.append(f"the reasoning has {len(said)} characters, more than {LONGEST}")
    numbers = set(_NUMBER.findall(said)) - {*_NUMBER.findall(facts), str(SECONDS)} if places else ()
    if numbers:
        found.append(f"the reasoning says {', '.join(sorted(numbers))}, which no fact says")
    found += [f"the reasoning says {match[0]!r}" for match in [_GIVEN_AWAY.search(said)] if match]
    known, left = f" {normalise(facts)} ", f" {normalise(said)} "
    for name in sorted(labels.names(example), key=len, reverse=True):  # `car` is not named by `race car`
        left = left.replace(f" {normalise(name)} ", "  ")
    other = [name for name in sorted(vocabulary) if f" {normalise(name)} " in left
             and f" {normalise(name)} " not in known]
    return found + [f"the reasoning names {name!r}, which no fact does" for name in other]


def split(examples: Sequence[Example], root: str | Path | None = None, accept: Collection[str] = (),
          reject: Collection[str] = (), progress: Callable[[int], None] | None = None
          ) -> tuple[list[Example], list[tuple[Example, list[str]]]]:
    """The Examples that agree with their labels, and the others with the reasons.

    accept, reject: ids that a person has looked at; they go where the person says, whatever the checks say.
    progress: called with the number of Examples that are done.
    """
    words, good, bad = vocabulary_of(usable(examples)), [], []
    for number, example in enumerate(examples):
        if progress:
            progress(number)
        try:
            found = problems(example, root, words.get(example.task, ()))
        except InputError as error:
            found = [f"the label cannot be used: {error.field} {error.problem}"]
        if example.id in reject:
            found.append("rejected by a reviewer")
        if example.id in accept or not found:
            good.append(example)
        else:
            bad.append((example, found))
    return good, bad


def usable(examples: Iterable[Example]) -> Iterable[Example]:
    """The Examples whose label can be read."""
    for example in examples:
        try:
            labels.names(example)
        except InputError:
            continue
        yield example


def counted(bad: Iterable[tuple[Example, list[str]]]) -> dict[str, Any]:
    """How many Examples were quarantined per task, and the ids with their reasons."""
    found = list(bad)
    tasks = [example.task for example, _ in found]
    return {"tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
            "quarantined": [{"id": example.id, "task": example.task, "reasons": reasons} for example, reasons in found]}
