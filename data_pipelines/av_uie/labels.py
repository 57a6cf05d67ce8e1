"""Labels for AV-UIE targets: the place of a mask or box in its picture, and the reasoning before an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES
from crab_jax.tasks.avvp import spans_of
from crab_jax.tasks.segmentation import SIZE
from data_pipelines.decoded import read_mask
from data_pipelines.examples import Example
from data_pipelines.labels import answer, label, names, weak
from data_pipelines.sources.arig import box_of

__all__ = [
    "BOX_SPACE",
    "Place",
    "answer",
    "box_place",
    "label",
    "mask_place",
    "names",
    "places",
    "reasoning_of",
    "spans_of",
    "weak",
    "with_reasoning",
]

BOX_SPACE = SIZE  # width and height of the picture that coordinates refer to, as in AV-UIE
_WHERE = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)


class Place(NamedTuple):
    """The place of an object in the 224 x 224 picture.

    box: (x1, y1, x2, y2) of its first and last pixels. centre: mean (x, y) of its pixels. share: of the picture that it
    fills, in [0, 1]. name: of the object, where a mask distinguishes several.
    """

    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    share: float
    name: str = ""

    @property
    def where(self) -> str:
        """The ninth of the picture that holds the centre, in words such as `in the upper left`."""
        column, row = (min(2, max(0, int(3 * value / BOX_SPACE))) for value in self.centre)
        return _WHERE[row][column]


def with_reasoning(example: Example, reasoning: str, by: str) -> Example:
    """Return the Example with `reasoning` and then the answer of its label as target; `by` names the author."""
    target = TASKS[example.task].target(**label(example), reasoning=reasoning)
    return dataclasses.replace(example, target=target, meta={**example.meta, "reasoning": by})


def reasoning_of(example: Example) -> str:
    """Return the text before the answer in a target, "" where there is none."""
    start = TASKS[example.task].answer_start
    return example.target.rpartition(start)[0].strip() if start else ""


def mask_place(mask: np.ndarray, name: str = "") -> Place | None:
    """Return the place of the foreground of `mask` [224,224]; None for an empty mask."""
    box = box_of(mask)
    if box is None:
        return None
    rows, columns = np.nonzero(mask)
    return Place(box, (float(columns.mean()), float(rows.mean())), len(rows) / mask.size, name)


def box_place(box: Sequence[float]) -> Place:
    """Return the place of a box (x1, y1, x2, y2) in pixels of the 224 x 224 picture."""
    x1, y1, x2, y2 = (round(value) for value in box)
    return Place((x1, y1, x2, y2), ((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1) * (y2 - y1) / BOX_SPACE**2)


def places(example: Example, root: str | Path | None) -> tuple[Place, ...] | None:
    """Return the places of the labelled objects: one Place, or for AVSS one per class that the label names.

    Returns () for an empty mask, and None for a task without places, or without the mask file below `root` where the
    label has no box.
    """
    task = TASKS[example.task]
    if task.answer == "box" and (box := task.box(label(example))):
        return (box_place(box),)
    if root is None or not example.mask or task.answer != "mask":
        return None
    mask = read_mask(root, example, BOX_SPACE)
    named = {CLASSES.index(name): name for name in names(example) if name in CLASSES[1:]}
    each = [mask_place(mask == number, name) for number, name in named.items() if example.mask_kind == "semantic"]
    return tuple(place for place in (each if any(each) else [mask_place(mask)]) if place)
