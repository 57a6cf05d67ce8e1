"""Ref-AVS: segment the object an expression refers to, at one second of a clip; some expressions refer to nothing.

Prompts and targets: dataset/unified_dataset.py and dataset/quick_start_dataset.py; metrics: utils/avss_utils.py.
meta: {"expression": text, "object": name ("" when null), "split": "seen" | "unseen" | "null"}.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks import segmentation
from crab_jax.tasks.avs import binary_stats, mean_scores, names_match, ordinal
from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.task import Stats, Task

_ANSWER, _NULL, _MASK_FOLLOWS = "second in the video, ", "does not appear", re.compile(r"\.\s*Its mask\b")


def instruction(variant: str = "train", expression: str = "", second: int = 0) -> str:
    """Prompt for an expression at `second` (0-based); "quick" shows one image, "test" the clip and the image."""
    if variant == "quick":
        return f"{IMAGE}{AUDIO}Please segment out {expression.lower()} in the image."
    if variant == "test":
        return (f"{VIDEO}{AUDIO}{IMAGE}Please segment out the corresponding object in the image based on the "
                f"referential expression: {expression}")
    return f"{VIDEO}{AUDIO}Please segment out {expression.lower()} at the {ordinal(second)} second in the video."


def target(expression: str, object: str, second: int = 0, reasoning: str = "") -> str:
    """The answer: optional reasoning, the object ("" when the expression refers to nothing), and the mask tokens."""
    found = f"is {object}" if object else _NULL
    answer = f"At the {ordinal(second)} second in the video, {expression} {found}. Its mask is {MASK}"
    return f"{reasoning} {answer}".lstrip()


def parse(text: str) -> dict[str, list[str]] | None:
    """{"objects": [name]}, {"objects": []} for an expression that refers to nothing, or None."""
    _, answer, rest = " ".join(text.split()).rpartition(_ANSWER)
    sentence, *follows = _MASK_FOLLOWS.split(rest, maxsplit=1)
    if not answer or not follows:
        return None
    if sentence.endswith(_NULL):
        return {"objects": []}
    _, found, name = sentence.rpartition(" is ")  # the last one, because an expression may hold one itself
    return {"objects": [name.strip()]} if found and name.strip() else None


def stats(parsed: Any, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray) -> Stats:
    """Statistics of one sample; a missing mask counts as an empty one."""
    sample = binary_stats(mask, gt_mask)
    empty = np.zeros(np.shape(gt_mask))
    names = [meta["object"]] if meta["object"] else []
    return {"split": meta["split"], "has_mask": sample["has_mask"], "j": sample["iou"], "f": sample["f"],
            "s": segmentation.null_s(empty if mask is None else mask), "named": names_match(parsed, names)}


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """j (IoU) and f (maximum per frame) over seen and unseen together and `_seen`, `_unseen` where there are such
    samples; s_null (lower is better); each also `_parsed`; object_accuracy and mask_rate. j and f are 0 when every
    sample is null."""
    groups = {"": [s for s in samples if s["split"] != "null"]}
    groups |= {f"_{split}": [s for s in samples if s["split"] == split] for split in ("seen", "unseen")}
    metrics: dict[str, float] = {}
    for suffix, group in groups.items():
        if group or not suffix:
            metrics |= mean_scores(group, {f"j{suffix}": "j", f"f{suffix}": "f"})
    nulls = [s for s in samples if s["split"] == "null"]
    if nulls:
        metrics |= mean_scores(nulls, {"s_null": "s"})
    rates = mean_scores(samples, {"object_accuracy": "named", "mask_rate": "has_mask"})
    return {**metrics, "object_accuracy": rates["object_accuracy"], "mask_rate": rates["mask_rate"]}


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
              ) -> list[tuple[str, np.ndarray | None]]:
    """The most frequent expression and object with each constant mask."""
    expression, name = Counter((meta["expression"], meta["object"]) for meta in metas).most_common(1)[0][0]
    text = target(expression, name)
    return [(text, mask) for mask in segmentation.constant_masks(gt_masks)] or [(text, None)]


REF_AVS = Task(name="ref-avs", instruction=instruction, target=target, parse=parse, stats=stats, reduce=reduce,
               constants=constants, headline="j", mask_kind="binary")
