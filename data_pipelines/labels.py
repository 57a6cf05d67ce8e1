"""What the label of an Example says, and whether its target says the same.

The label is `meta`, with the fields that crab_jax/tasks/<task>.py lists. Some are weak: a training clip of LLP names
its events but not their times (`{"labels": [name, ...]}`), a clip of MS3's object release does not say what sounds
(`{"objects": []}`). No target can be built from a weak label, but one can be checked against what it does say.
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
    """Whether the label says too little for a target: events without times, or a mask without what sounds."""
    return bool(TASKS[example.task].weak(example.meta))


def sound(example: Example) -> bool:
    """Whether the label has every field that an answer needs, as it must be."""
    return not any(wrong_fields(TASKS[example.task], example.meta, ("answer",)))


def label(example: Example) -> dict[str, Any]:
    """The arguments of `TASKS[example.task].target`, less `reasoning`, from the label.

    Raises InputError naming the example and the field when the label lacks it, or holds what no answer can say (times
    outside the clip, names with angle brackets), and for a weak label.
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
    """The answer alone, as the task writes it."""
    return TASKS[example.task].target(**label(example))


def names(example: Example) -> tuple[str, ...]:
    """The names of things and events in the label. Raises InputError as `label`, but for a weak one."""
    if not weak(example):
        label(example)
    return TASKS[example.task].names(example.meta)


def disagreements(example: Example) -> list[str]:
    """What in a target is not as its label says, in words; [] when all agrees, and for an empty target.

    Its tags parse, its events are in the label, its ranges, answer, objects and expression are equal, its coordinates
    are within a pixel, and what the task's parser reads is the label. Raises InputError as `label`.
    """
    if not example.target.strip():
        return []
    values = {} if weak(example) else label(example)
    task, second = TASKS[example.task], example.second or 0
    return _tag_problems(example) or disagreements_of(task, example.target, values, example.meta, second)


def _tag_problems(example: Example) -> list[str]:
    """Tags that the task does not have, that are not closed, or that are inside each other."""
    task, text, found = TASKS[example.task], example.target, []
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
            found.append(f"holds {mark!r}, which is no tag of {example.task}")
        elif (name if slash else "") != open_tag:
            found.append(f"the tags do not match at {mark!r}")
        else:
            open_tag = "" if slash else name
    return found + ([f"<{open_tag}> is never closed"] if open_tag else [])
