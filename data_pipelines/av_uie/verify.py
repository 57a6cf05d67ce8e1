"""Comparison of targets with their labels; targets that disagree are quarantined with the reasons.

There are three levels. Every target: its tags parse, its events are in the label, its ranges, answer and expression are
equal, its coordinates are within a pixel. A target that this package wrote also ends in exactly the answer of its
label. The reasoning of an LLM may name no number and no thing that its facts lack, and may not mention labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.text import normalise
from crab_jax.tasks.times import SECONDS
from data_pipelines.av_uie import labels, templates
from data_pipelines.av_uie.questions import INSTRUMENTS
from data_pipelines.examples import Example
from data_pipelines.labels import disagreements

RELEASED, LLM = "released", "llm:"  # writers of a target, in meta["reasoning"]
LONGEST = 1500  # characters of an LLM's reasoning
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_GIVEN_AWAY = re.compile(
    r"\b(?:labels?|annotat\w+|ground[- ]truth|the facts|given facts|answer sentence|as an ai)\b", re.IGNORECASE
)


def problems(example: Example, root: str | Path | None = None, vocabulary: Collection[str] = ()) -> list[str]:
    """Return descriptions of how the target disagrees with the label; [] if it agrees.

    root: where mask files are, for statements about places; without it, texts about a mask's place are not checked.
    vocabulary: names of things (see `vocabulary_of`) that an LLM may not mention unless the label or the prompt does.
    Raises InputError when the label itself is unusable.
    """
    if not example.target.strip():
        return ["the target is empty"]
    if labels.weak(example):
        return disagreements(example)
    answer, by = labels.answer(example), str(example.meta.get("reasoning", ""))
    found = disagreements(example)
    if (by == templates.WRITER or by.startswith(LLM)) and not example.target.endswith(answer):
        found.append("does not end in the answer of its label")
    known = root is not None or TASKS[example.task].answer != "mask"
    if by.startswith(LLM):
        facts = templates.reasoning(example, labels.places(example, root))
        found += invented(example, example.target.removesuffix(answer), f"{facts} {answer}", vocabulary, known)
    if by == templates.WRITER and known and example.target != templates.write(example, root).target:
        found.append("is not what the template writes for its label")
    return found


def vocabulary_of(examples: Iterable[Example]) -> dict[str, frozenset[str]]:
    """Return {task: all names in the labels of its Examples}, for avqa also the instruments of MUSIC-AVQA."""
    names: dict[str, set[str]] = {"avqa": set(INSTRUMENTS)}
    for example in examples:
        names.setdefault(example.task, set()).update(labels.names(example))
    return {task: frozenset(found) for task, found in names.items()}


def invented(
    example: Example, said: str, facts: str, vocabulary: Collection[str] = (), places: bool = True
) -> list[str]:
    """Return what an LLM's reasoning `said` adds to the `facts` that it was given; [] if nothing.

    places: whether the facts have positions; if not, numbers are not compared.
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
    for name in sorted(labels.names(example), key=len, reverse=True):  # `race car` does not mention `car`
        left = left.replace(f" {normalise(name)} ", "  ")
    other = [
        name for name in sorted(vocabulary) if f" {normalise(name)} " in left and f" {normalise(name)} " not in known
    ]
    return found + [f"the reasoning names {name!r}, which no fact does" for name in other]


def split(
    examples: Sequence[Example],
    root: str | Path | None = None,
    accept: Collection[str] = (),
    reject: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Example], list[tuple[Example, list[str]]]]:
    """Return the Examples that agree with their labels, and the others with the reasons.

    accept, reject: ids decided by a person, which override the checks. progress: called with the number of Examples
    done.
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
    """Return the Examples whose labels can be read."""
    for example in examples:
        try:
            labels.names(example)
        except InputError:
            continue
        yield example


def counted(bad: Iterable[tuple[Example, list[str]]]) -> dict[str, Any]:
    """Return the number of quarantined Examples per task, and their ids with the reasons."""
    found = list(bad)
    tasks = [example.task for example, _ in found]
    return {
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "quarantined": [{"id": example.id, "task": example.task, "reasons": reasons} for example, reasons in found],
    }
