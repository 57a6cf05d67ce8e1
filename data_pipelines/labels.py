"""Labels of Examples, and checks of targets against them.

The label is `meta`, with the fields that crab_jax/tasks/<task>.py lists. Some labels are weak: a training clip of LLP
names its events but not their times (`{"labels": [name, ...]}`), and a clip of MS3's object release does not name what
sounds (`{"objects": []}`). No target can be built from a weak label, but a target can be checked against its content.
"""

from __future__ import annotations

import re
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from crab_jax.tasks.task import arguments_of, disagreements_of, wrong_fields
from data_pipelines.examples import Example


def weak(example: Example) -> bool:
    """Whether the label is too incomplete for a target: events without times, or a mask without its object."""
    return bool(TASKS[example.task].weak(example.meta))


def sound(example: Example) -> bool:
    """Whether the label has every field that an answer needs, each with a valid value."""
    return not any(wrong_fields(TASKS[example.task], example.meta, ("answer",)))


def label(example: Example) -> dict[str, Any]:
    """Return the arguments of `TASKS[example.task].target`, without `reasoning`, from the label.

    Raises InputError naming the Example and the field when a field is missing or invalid (times outside the clip, names
    with angle brackets), and for a weak label.
    """
    task, where = TASKS[example.task], f"example {example.id!r}"
    if problem := task.weak(example.meta):
        raise InputError(where, "meta", problem, "only a released target can be used for it")
    for name, problem, must_be in wrong_fields(task, example.meta, ("answer",)):
        raise InputError(where, f"meta.{name}", problem, f"must be {must_be}")
    try:
        return arguments_of(task, example.meta, example.second or 0)
    except InputError as error:
        raise InputError(where, f"meta.{error.field}", error.problem, error.fix) from None


def answer(example: Example) -> str:
    """Return the answer without reasoning, as the task writes it. Raises InputError as `label` does."""
    return TASKS[example.task].target(**label(example))


def names(example: Example) -> tuple[str, ...]:
    """Return the names of things and events in the label. Raises InputError as `label` does, but not for a weak one."""
    if not weak(example):
        label(example)
    return TASKS[example.task].names(example.meta)


def disagreements(example: Example) -> list[str]:
    """Return how a target differs from its label, in words; [] when they agree, and for an empty target.

    They agree when the tags are well formed, all events are in the label, ranges, answer, objects and expression are
    equal, coordinates are within a pixel, and the task's parser reads the label from the target. Raises InputError as
    `label` does.
    """
    if not example.target.strip():
        return []
    values = {} if weak(example) else label(example)
    task, second = TASKS[example.task], example.second or 0
    return _tag_problems(example) or disagreements_of(task, example.target, values, example.meta, second)


def _tag_problems(example: Example) -> list[str]:
    """Return the problems of a target's tags: tags of other tasks, tags that are not closed, and nested tags."""
    task, text, problems = TASKS[example.task], example.target, []
    if task.answer == "mask":
        if text.count(MASK) != 1 or not text.rstrip(" .").endswith(MASK):
            return ["does not end in one run of the six mask tokens"]
        text = text.replace(MASK, "")
    if task.tags is None:
        return []
    open_tag = ""
    for mark in re.findall(r"<[^<>]{0,40}>|[<>]", text):
        whole = re.fullmatch(r"<(/?)(\w*)>", mark)
        slash, name = whole.groups() if whole else ("", "")
        if name not in task.tags:
            problems.append(f"holds {mark!r}, which is no tag of {example.task}")
        elif (name if slash else "") != open_tag:
            problems.append(f"the tags do not match at {mark!r}")
        else:
            open_tag = "" if slash else name
    return problems + ([f"<{open_tag}> is never closed"] if open_tag else [])
