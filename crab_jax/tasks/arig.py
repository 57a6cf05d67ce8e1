"""Audio-referred image grounding: name the sounding object of an image and give its box.

Prompts and targets: dataset/unified_dataset.py and dataset/quick_start_dataset.py. Boxes are (x1, y1, x2, y2) in the
224 x 224 picture. meta: {"object": name, "box": [x1, y1, x2, y2]}. The paper's "cIoU" is ambiguous: mean_iou, ciou_50
(sound localisation protocol) and complete_iou are all reported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks.placeholders import AUDIO, IMAGE
from crab_jax.tasks.segmentation import Box, box_iou, complete_iou, success_auc, success_rate
from crab_jax.tasks.task import Stats, Task

SIZE = 224
_POINT = re.compile(r"\(\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\)")
_QUESTIONS = {
    "train": "Please recognize the category of object that makes the sound and then output its location coordinates.",
    "test": "Please recognize the category of object that makes the sound and then output the location coordinates.",
    "quick": "Please output the location coordinates of sounding object.",
}


def instruction(variant: str = "train") -> str:
    """The prompt; it has no fields."""
    return f"{IMAGE}{AUDIO}{_QUESTIONS[variant]}"


def target(object: str, box: Sequence[float], reasoning: str = "") -> str:
    """The answer: optional reasoning, the object and its corners, rounded to whole pixels."""
    x1, y1, x2, y2 = (round(value) for value in box)
    answer = (f"The sounding object is {object}. Its coordinate of top left corner is ({x1},{y1}) and coordinate of "
              f"bottom right corner is ({x2},{y2})")
    return f"{reasoning} {answer}".lstrip()


def parse(text: str) -> Box | None:
    """The box (x1, y1, x2, y2): the first two points after the last "top left", or of a text without it.

    None without two points, or when the corners are not in order.
    """
    points = _POINT.findall(text[max(text.rfind("top left"), 0):])[:2]
    if len(points) < 2:
        return None
    x1, y1, x2, y2 = (float(value) for point in points for value in point)
    return (x1, y1, x2, y2) if x1 <= x2 and y1 <= y2 else None


def stats(parsed: Box | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None) -> Stats:
    """IoU and Complete-IoU of one sample, the prediction cut to the picture. No box scores 0 and -1."""
    if parsed is None:
        return {"parsed": False, "iou": 0.0, "complete": -1.0}
    x1, y1, x2, y2 = (min(float(value), SIZE) for value in parsed)
    box = x1, y1, x2, y2
    return {"parsed": True, "iou": box_iou(box, meta["box"]), "complete": complete_iou(box, meta["box"])}


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """mean_iou, ciou_50, auc and complete_iou (in (-2, 1]) over all samples and, as `_parsed`, over those with a box;
    parse_rate."""
    metrics = {"parse_rate": float(np.mean([s["parsed"] for s in samples]))}
    for suffix, group in (("", samples), ("_parsed", [s for s in samples if s["parsed"]])):
        ious = [s["iou"] for s in group] or [0.0]
        complete = [s["complete"] for s in group] or [-1.0]
        metrics |= {f"mean_iou{suffix}": float(np.mean(ious)), f"ciou_50{suffix}": success_rate(ious),
                    f"auc{suffix}": success_auc(ious), f"complete_iou{suffix}": float(np.mean(complete))}
    return metrics


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
              ) -> list[tuple[str, np.ndarray | None]]:
    """The most frequent object with the mean, the median, the full and the central box."""
    name = Counter(meta["object"] for meta in metas).most_common(1)[0][0]
    boxes = np.array([meta["box"] for meta in metas], float)
    quarter = SIZE // 4
    candidates = (boxes.mean(0), np.median(boxes, axis=0), (0, 0, SIZE, SIZE),
                  (quarter, quarter, SIZE - quarter, SIZE - quarter))
    return [(target(name, box), None) for box in candidates]


ARIG = Task(name="arig", instruction=instruction, target=target, parse=parse, stats=stats, reduce=reduce,
            constants=constants, headline="mean_iou")
