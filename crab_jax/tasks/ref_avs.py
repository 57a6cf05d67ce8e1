"""Ref-AVS: segment the object an expression refers to, at one second of a clip; some expressions refer to nothing.

Prompts and targets: dataset/unified_dataset.py and dataset/quick_start_dataset.py; metrics: utils/avss_utils.py.
meta: {"expression": text, "object": name ("" when null), "split": "seen" | "unseen" | "null"}. Where one expression is
asked about several frames, their Examples also share the value of "one_of".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks import segmentation
from crab_jax.tasks.avs import binary_stats, mean_scores, moment_problems, names_match, ordinal, video_f
from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.rows import CLIP, NOTHING
from crab_jax.tasks.task import TEXT, Field, Made, Meta, Row, Stats, Task, by_group, is_text
from crab_jax.tasks.text import normalise, object_words

J_THRESHOLDS = {"": 0.5, "_04": 0.4}  # of the released Crab code, and of the Ref-AVS release
_SPLITS = {"": "seen and unseen together", "_seen": "seen objects", "_unseen": "unseen objects"}
METRICS = {
    **{f"j{split}": f"mean IoU (J), threshold 0.5 (released Crab code), {what}" for split, what in _SPLITS.items()},
    **{f"j_04{split}": f"mean IoU (J), threshold 0.4 (Ref-AVS release), {what}" for split, what in _SPLITS.items()},
    **{
        f"f{split}": f"mean over frames of the largest F over 255 thresholds (released Crab code), {what}"
        for split, what in _SPLITS.items()
    },
    **{
        f"f_video{split}": "mean over expressions of the largest F of the mean curve of the frames, without empty ones "
        f"(Ref-AVS release), {what}"
        for split, what in _SPLITS.items()
    },
    "s_null": "null expressions: square root of the share of pixels above 0.5, lower is better",
    "s_null_04": "the same above 0.4",
    "object_accuracy": "answers that name the object, or say that there is none",
    "mask_rate": "answers with six mask tokens",
}
LABEL = {
    "expression": TEXT,
    "object": Field(
        'the name of the object, "" where the expression refers to nothing',
        lambda value, meta: value == "" or is_text(value),
    ),
    "split": Field(
        '"seen" or "unseen", and "null" where `object` is ""',
        lambda value, meta: (
            value in ("seen", "unseen", "null") and (value == "null") == (meta.get("object", value) == "")
        ),
        "score",
    ),
}
EXPRESSION = "the object that is making the sound"  # asked by --all-tasks where the user gives no expression
_MOMENT = re.compile(r"At the (\w+) second in the video, ")
_ANSWER, _NULL, _MASK_FOLLOWS = "second in the video, ", "does not appear", re.compile(r"\.\s*Its mask\b")


def instruction(variant: str = "train", expression: str = "", second: int = 0) -> str:
    """Return the prompt about `second` (0-based); "quick" shows an image, "test" the clip and the image."""
    if variant == "quick":
        return f"{IMAGE}{AUDIO}Please segment out {expression.lower()} in the image."
    if variant == "test":
        return (
            f"{VIDEO}{AUDIO}{IMAGE}Please segment out the corresponding object in the image based on the "
            f"referential expression: {expression}"
        )
    return f"{VIDEO}{AUDIO}Please segment out {expression.lower()} at the {ordinal(second)} second in the video."


def target(expression: str, object: str, second: int = 0, reasoning: str = "") -> str:
    """Return the answer: optional reasoning, the object ("" for a null expression), and the mask tokens."""
    found = f"is {object}" if object else _NULL
    answer = f"At the {ordinal(second)} second in the video, {expression} {found}. Its mask is {MASK}"
    return f"{reasoning} {answer}".lstrip()


def parse(text: str) -> dict[str, list[str]] | None:
    """Return {"objects": [name]}, or None when the text cannot be read.

    Returns {"objects": []} where the expression refers to nothing ("does not appear", or "is null" as in the release).
    """
    _, answer, rest = " ".join(text.split()).rpartition(_ANSWER)
    sentence, *follows = _MASK_FOLLOWS.split(rest, maxsplit=1)
    if not answer or not follows:
        return None
    if sentence.endswith(_NULL):
        return {"objects": []}
    _, found, name = sentence.rpartition(" is ")  # the last " is ", because the expression may contain one
    if not found or not name.strip():
        return None
    return {"objects": [name.strip()] if object_words([name]) else []}


def stats(parsed: Any, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray) -> Stats:
    """Return the statistics of one sample; a missing mask counts as an empty one."""
    sample = binary_stats(mask, gt_mask)
    empty = np.zeros(np.shape(gt_mask))
    scores = empty if mask is None else mask
    names = [meta["object"]] if meta["object"] else []
    return {
        "split": meta["split"],
        "has_mask": sample["has_mask"],
        "f": sample["f"],
        "named": names_match(parsed, names),
        "curve": sample["curve"],
        "has_object": sample["has_object"],
        "video": meta.get("one_of"),
        **{f"j{name}": segmentation.mask_iou(scores, gt_mask, at) for name, at in J_THRESHOLDS.items()},
        **{f"s{name}": segmentation.null_s(scores, at) for name, at in J_THRESHOLDS.items()},
    }


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return the metrics of METRICS for the splits that occur; those of all samples are NaN when every one is null."""
    groups = {"": [s for s in samples if s["split"] != "null"]}
    groups |= {f"_{split}": [s for s in samples if s["split"] == split] for split in ("seen", "unseen")}
    metrics = dict.fromkeys(("j", "j_04", "f", "f_video"), float("nan")) if samples else {}
    for suffix, group in groups.items():
        metrics |= mean_scores(group, {f"{name}{suffix}": name for name in ("j", "j_04", "f")})
        metrics |= {f"f_video{suffix}": video_f(group)} if group else {}
    metrics |= mean_scores([s for s in samples if s["split"] == "null"], {"s_null": "s", "s_null_04": "s_04"})
    return metrics | mean_scores(samples, {"object_accuracy": "named", "mask_rate": "has_mask"})


def constants(
    metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
) -> list[tuple[str, np.ndarray | None]]:
    """Return the most frequent expression and object with each constant mask."""
    expression, name = Counter((meta["expression"], meta["object"]) for meta in metas).most_common(1)[0][0]
    text = target(expression, name)
    return [(text, mask) for mask in segmentation.constant_masks(gt_masks)] or [(text, None)]


def rank(metrics: Mapping[str, float]) -> float:
    """Return the score that ranks one sample: J, or for a null expression 1 - `s_null`."""
    return 1 - metrics["s_null"] if "s_null" in metrics else metrics["j"]


def names(meta: Meta) -> tuple[str, ...]:
    """Return the name of the object, if there is one."""
    return (meta["object"].strip(),) if meta["object"].strip() else ()


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {"expression": meta["expression"].strip(), "object": meta["object"].strip(), "second": second}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: the object, the expression, or the second."""
    parsed, found = parse(text), []
    if not names_match(parsed, [values["object"]] if values["object"] else []):
        said = "unreadable" if parsed is None else ", ".join(parsed["objects"]) or "nothing"
        found.append(f"the object is {said}, the label says {values['object'] or 'nothing'}")
    if normalise(values["expression"]) not in normalise(text):
        found.append("does not repeat the expression")
    return found + moment_problems(_MOMENT.findall(text), second)


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a clip or a picture with its sound, an expression, its object and its mask."""
    expression, name = row.text("expression"), row.text("object", "give the name, or `nothing` where nothing fits")
    name = "" if name.lower() in NOTHING else name
    kind = str(row.given("type") or "seen").lower() if name else "null"
    if kind not in ("seen", "unseen", "null"):
        raise row.error("type", f"is {kind!r}", "use seen or unseen")
    second, fields = row.moment(empty=not name)
    variant = "train" if row.media & set(CLIP) else "quick"
    label = {"expression": expression, "object": name, "second": second}
    return Made(
        instruction(variant, expression, second),
        label,
        {"expression": expression, "object": name, "split": kind},
        fields,
    )


REF_AVS = Task(
    name="ref-avs",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="j",
    metrics=METRICS,
    label=LABEL,
    answer="mask",
    mask_kind="binary",
    drawn="the pixels of what is asked for",
    shown=lambda meta: str(meta.get("expression") or "nothing sounds"),
    fields=("expression", "second"),
    unasked={"expression": (EXPRESSION,)},
    rank=rank,
    arguments=arguments,
    names=names,
    name_field="object",
    tags=(),
    disagreements=disagreements,
    answer_start="At the ",
    columns=("expression", "object", "mask", "second", "type"),
    from_row=from_row,
    breakdown=by_group(lambda meta: [meta["object"]] if meta["object"] else [], reduce, "j"),
)
