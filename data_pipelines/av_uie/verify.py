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

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.ave import SECONDS
from crab_jax.tasks.text import normalise
from data_pipelines.av_uie import labels, templates
from data_pipelines.av_uie.questions import INSTRUMENTS
from data_pipelines.examples import Example
from data_pipelines.labels import disagreements

RELEASED, LLM = "released", "llm:"  # who wrote a target: meta["reasoning"]
LONGEST = 1500  # characters of an LLM's reasoning
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_GIVEN_AWAY = re.compile(
    r"\b(?:labels?|annotat\w+|ground[- ]truth|the facts|given facts|answer sentence|as an ai)\b", re.IGNORECASE
)


def problems(example: Example, root: str | Path | None = None, vocabulary: Collection[str] = ()) -> list[str]:
    """What in the target disagrees with the label, in words; [] when all agrees.

    root: where mask files are, for what is said about places; without it a text that speaks of a mask's place is not
    recomputed. vocabulary: names of things (see `vocabulary_of`) that an LLM may not mention unless the label or the
    prompt does. Raises InputError when the label itself is unusable.
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
    """task -> every name in the labels of its Examples, and for avqa the instruments of MUSIC-AVQA."""
    names: dict[str, set[str]] = {"avqa": set(INSTRUMENTS)}
    for example in examples:
        names.setdefault(example.task, set()).update(labels.names(example))
    return {task: frozenset(found) for task, found in names.items()}


def invented(
    example: Example, said: str, facts: str, vocabulary: Collection[str] = (), places: bool = True
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
    return {
        "tasks": {task: tasks.count(task) for task in sorted(set(tasks))},
        "quarantined": [{"id": example.id, "task": example.task, "reasons": reasons} for example, reasons in found],
    }
