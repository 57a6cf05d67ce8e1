"""Audio-referred image grounding: name the sounding object of an image and give its box.

Prompts and targets: dataset/unified_dataset.py and dataset/quick_start_dataset.py. Boxes are (x1, y1, x2, y2) in the
224 x 224 picture. meta: {"object": name, "box": [x1, y1, x2, y2]}. The paper's "cIoU" is ambiguous: mean_iou, ciou_50
(sound localisation protocol) and complete_iou are all reported.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks.placeholders import AUDIO, IMAGE
from crab_jax.tasks.rows import box_of, names_of, only
from crab_jax.tasks.segmentation import SIZE, box_iou, complete_iou, success_auc, success_rate
from crab_jax.tasks.task import (
    AV_REASONER,
    NOTES,
    TEXT,
    Box,
    Field,
    Made,
    Meta,
    Oddity,
    Published,
    Row,
    Stats,
    Task,
    by_group,
    is_list,
    is_number,
    windows_for,
)
from crab_jax.tasks.text import normalise

METRICS = {
    "mean_iou": "mean intersection over union of the box (published pairs of cIoU and AUC fit this reading of cIoU)",
    "ciou_50": "share of boxes with an IoU of at least 0.5 (cIoU of the sound localisation protocol)",
    "auc": "area under that share over the thresholds 0, 0.05, ..., 1",
    "complete_iou": "mean Complete-IoU in (-2, 1]: IoU less distance and aspect penalties (utils/ciou.py, sign fixed)",
    "parse_rate": "answers with a readable box",
}
LABEL = {
    "object": TEXT,
    "box": Field(
        f"[x1, y1, x2, y2] in pixels of the {SIZE} x {SIZE} picture, x1 <= x2 and y1 <= y2",
        lambda value, meta: (
            is_list(value, lambda edge: is_number(edge, 0, SIZE), 4)
            and len(value) == 4
            and value[0] <= value[2]
            and value[1] <= value[3]
        ),
    ),
}
_NUMBER = r"([0-9]{1,6}(?:\.[0-9]{1,6})?)"  # longer numbers cannot be pixels
_POINT = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*\d[^()\[\]{}]*[)\]}]")
_NO_CORNERS = re.compile(
    r"\b(?:width|height|size|cent(?:er|re)|radius|(?:bottom|lower)[\s-]*left|"
    r"(?:top|upper)[\s-]*right)\b",
    re.IGNORECASE,
)  # words that show that two points are not the two corners
_SOUNDING = re.compile(r"The sounding object is (.+?)\. Its coordinate")
_QUESTIONS = {
    "train": "Please recognize the category of object that makes the sound and then output its location coordinates.",
    "test": "Please recognize the category of object that makes the sound and then output the location coordinates.",
    "quick": "Please output the location coordinates of sounding object.",
}


def instruction(variant: str = "train") -> str:
    """Return the prompt, which has no fields."""
    return f"{IMAGE}{AUDIO}{_QUESTIONS[variant]}"


def target(object: str, box: Sequence[float], reasoning: str = "") -> str:
    """Return the answer: optional reasoning, the object, and its corners rounded to whole pixels."""
    x1, y1, x2, y2 = (round(value) for value in box)
    answer = (
        f"The sounding object is {object}. Its coordinate of top left corner is ({x1},{y1}) and coordinate of "
        f"bottom right corner is ({x2},{y2})"
    )
    return f"{reasoning} {answer}".lstrip()


def parse(text: str) -> Box | None:
    """Return the box (x1, y1, x2, y2) in pixels: the first two points after the last "top left", or of the whole text.

    Returns None when there are fewer than two points, when other brackets with numbers come before the second, when
    the corners are not in order, when the text mentions a width or a centre, and for fractions of the picture
    (decimals, none above 1).
    """
    said = text[max(text.rfind("top left"), 0) :]
    found = list(itertools.islice(_BRACKETS.finditer(said), 2))
    points = [point for one in found if (point := _POINT.fullmatch(one[0]))]
    if len(points) < 2 or _NO_CORNERS.search(said[max(0, found[0].start() - 40) : found[1].start()]):
        return None
    numbers = [number for point in points for number in point.groups()]
    x1, y1, x2, y2 = map(float, numbers)
    fractions = max(x1, y1, x2, y2) <= 1 and any("." in number for number in numbers)
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 and not fractions else None


def stats(parsed: Box | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None) -> Stats:
    """Return IoU and Complete-IoU of one sample, the prediction cut to the picture; 0 and -1 without a box."""
    if parsed is None:
        return {"parsed": False, "iou": 0.0, "complete": -1.0}
    x1, y1, x2, y2 = (min(float(value), SIZE) for value in parsed)
    box = x1, y1, x2, y2
    return {"parsed": True, "iou": box_iou(box, meta["box"]), "complete": complete_iou(box, meta["box"])}


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return the metrics of METRICS over all samples."""
    if not samples:
        return {}
    ious = [s["iou"] for s in samples]
    return {
        "mean_iou": float(np.mean(ious)),
        "ciou_50": success_rate(ious),
        "auc": success_auc(ious),
        "complete_iou": float(np.mean([s["complete"] for s in samples])),
        "parse_rate": float(np.mean([s["parsed"] for s in samples])),
    }


def constants(
    metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
) -> list[tuple[str, np.ndarray | None]]:
    """Return the most frequent object with the mean, the median, the full and the central box."""
    name = Counter(meta["object"] for meta in metas).most_common(1)[0][0]
    boxes = np.array([meta["box"] for meta in metas], float)
    quarter = SIZE // 4
    candidates = (
        boxes.mean(0),
        np.median(boxes, axis=0),
        (0, 0, SIZE, SIZE),
        (quarter, quarter, SIZE - quarter, SIZE - quarter),
    )
    return [(target(name, box), None) for box in candidates]


def box(said: Mapping[str, Any] | Box) -> Box:
    """Return the box of a label, or of a parsed answer."""
    return said["box"] if isinstance(said, Mapping) else said


def names(meta: Meta) -> tuple[str, ...]:
    """Return the name of the sounding object."""
    return (meta["object"].strip(),) if meta["object"].strip() else ()


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {"object": meta["object"].strip(), "box": [*meta["box"]]}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: a corner by more than a pixel, or the object."""
    corners, found = parse(text), []
    if corners is None:
        found.append("no two corners in order can be read")
    else:
        found += [
            f"{corner} is {said:g}, the label says {truth:g}"
            for corner, said, truth in zip(("x1", "y1", "x2", "y2"), corners, values["box"], strict=True)
            if abs(said - truth) > 1
        ]
    stated = _SOUNDING.findall(text)
    if stated and normalise(stated[-1]) != normalise(values["object"]):
        found.append(f"the object is {stated[-1]!r}, the label says {values['object']!r}")
    elif not stated and f" {normalise(values['object'])} " not in f" {normalise(text)} ":
        found.append(f"the object {values['object']!r} is not named")
    return found


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield what looks wrong with a box: fractions of the picture, the whole picture, or no area."""
    x1, y1, x2, y2 = meta["box"]
    if max(x2, y2) <= 1:
        problem = f"is {meta['box']}, which seem to be shares of the picture"
        yield Oddity(True, "box", problem, f"multiply by {SIZE}")
    elif (x1, y1, x2, y2) == (0, 0, SIZE, SIZE):
        yield Oddity(False, "box", f"is {meta['box']}, the whole picture", "check it")
    elif x1 == x2 or y1 == y2:
        yield Oddity(False, "box", f"is {meta['box']}, which has no area", "check it")


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a picture, the object and its box."""
    only(row, "image")
    label = {"object": " and ".join(names_of(row)), "box": box_of(row)}
    return Made(instruction(), label, label, {"windows": windows_for(ARIG, row.seconds), "second": row.second()})


ARIG = Task(
    name="arig",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="mean_iou",
    metrics=METRICS,
    label=LABEL,
    answer="box",
    box=box,
    drawn="a box around the sounding object",
    shown=lambda meta: str(meta["object"]),
    arguments=arguments,
    names=names,
    tags=(),
    disagreements=disagreements,
    oddities=oddities,
    answer_start="The sounding object is",
    columns=("object", "box", "box_224", "second"),
    from_row=from_row,
    windows=("five", "one_of_five", "ten", "one"),
    breakdown=by_group(lambda meta: [str(meta["object"])], reduce, "mean_iou"),
    published=[
        Published("Crab", {"mean_iou": 0.4178, "auc": 0.42}, NOTES),
        Published("FNAC", {"mean_iou": 0.2715, "auc": 0.31}, NOTES),
        Published("GroundingGPT", {"mean_iou": 0.4402, "auc": 0.45}, AV_REASONER),
        Published("AV-Reasoner", {"mean_iou": 0.4506, "auc": 0.47}, AV_REASONER),
        Published("AV-Reasoner, thinking", {"mean_iou": 0.4673, "auc": 0.49}, AV_REASONER),
    ],
)
