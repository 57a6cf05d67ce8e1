"""Audio-visual segmentation: S4 (one source), MS3 (several sources) and AVSS (semantic), one frame per question.

Prompts and targets: dataset/unified_dataset.py and dataset/quick_start_dataset.py; metrics: utils/avss_utils.py.
meta: {"objects": [names], "video": id of the clip}. Masks: foreground scores for S4 and MS3, class ids for AVSS.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks import segmentation
from crab_jax.tasks.avs_classes import CLASSES
from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.rows import CLIP, names_of
from crab_jax.tasks.task import (
    CLIP_NAME,
    NOTES,
    Breakdown,
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
    is_text,
)
from crab_jax.tasks.text import object_words

BINARY_METRICS = {
    "miou": "mean IoU over frames, threshold 0.5; an empty frame scores the share of pixels left empty",
    "f_score": "mean over frames of the largest F (beta^2 0.3) over 255 thresholds (released Crab code)",
    "f_score_video": "mean over videos of the largest F of a video's mean curve, without empty frames (AVSBench)",
    "object_accuracy": "answers that name the sounding objects, of the labels that say them, in whatever spelling",
    "mask_rate": "answers with six mask tokens",
}
SEMANTIC_METRICS = {
    "miou": "mean over all 71 classes of a class's mean IoU over its frames; absent classes are 0 (AVSBench)",
    "f_score": "the same for F (beta^2 0.3)",
    "miou_nobg": "miou over the 70 classes without background",
    "f_score_nobg": "f_score without background",
    "miou_nobg_official": "as the official code computes it: an index slip drops class 70 (woman), not background",
    "f_score_nobg_official": "f_score with the same slip",
    "miou_present": "miou over the classes that occur, without background",
    "f_score_present": "f_score over the classes that occur, without background",
    "object_accuracy": "answers that name the sounding objects, of the labels that say them, in whatever spelling",
    "mask_rate": "answers with six mask tokens",
}
_OBJECTS = Field(
    "a list of names; [] where the annotation does not say what sounds", lambda value, meta: is_list(value, is_text)
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MOMENT = re.compile(r"makes the sound at the (\w+) second is")
_ANSWER = re.compile(r"object making (?:the )?sound in the (?:video|image) is ")
_MASK_FOLLOWS = re.compile(r"\.\s*The mask\b")


def ordinal(second: int) -> str:
    """Return the ordinal of a second, such as "first" for 0. Raises InputError outside 0..9."""
    if not 0 <= second < len(ORDINALS):
        raise InputError("segmentation prompt", "second", f"is {second}", "use 0 to 9")
    return ORDINALS[second]


def _video_prompt(second: int) -> str:
    return (
        f"{VIDEO}{AUDIO}Please recognize the category of object making sound in the video, and then segment out "
        f"the object that makes the sound at the {ordinal(second)} second of the video."
    )


def _instruction(test: Callable[[int], str]) -> Callable[..., str]:
    def instruction(variant: str = "train", second: int = 0) -> str:
        """Return the prompt about `second` (0-based); "quick", and "test" of AVSS, ask about an image."""
        if variant == "quick":
            return f"{IMAGE}{AUDIO}Please segment out the object that makes the sound in the image."
        return test(second) if variant == "test" else _video_prompt(second)

    return instruction


def target(objects: Sequence[str] | str, second: int = 0, reasoning: str = "") -> str:
    """Return the answer: optional reasoning, the sounding objects, and the mask tokens."""
    names = objects if isinstance(objects, str) else " and ".join(objects)
    answer = (
        f"The object making the sound in the video is {names}. "
        f"The mask of the object that makes the sound at the {ordinal(second)} second is {MASK}"
    )
    return f"{reasoning} {answer}".lstrip()


def parse(text: str) -> dict[str, list[str]] | None:
    """Return {"objects": names} of the last statement about what sounds, or None; masks are not in the text."""
    *before, rest = _ANSWER.split(" ".join(text.split()))
    stated, *follows = _MASK_FOLLOWS.split(rest, maxsplit=1)
    names = [name.strip() for name in stated.split(" and ")]
    return {"objects": names} if before and follows and all(names) else None


def names_match(parsed: Mapping[str, Any] | None, names: Sequence[str]) -> bool:
    """Whether the parsed objects are the labelled ones, ignoring order and spelling (`object_words`)."""
    return parsed is not None and object_words(parsed["objects"]) == object_words(names)


def named(parsed: Mapping[str, Any] | None, names: Sequence[str]) -> float:
    """Return `names_match` as a number; NaN where the label does not name what sounds (MS3 of the object release)."""
    return float(names_match(parsed, names)) if names else math.nan


def moment_problems(said: Sequence[str], second: int) -> list[str]:
    """Return the problem where the last ordinal in a target is not that of `second`; [] where it is."""
    truth = ordinal(second)
    return [] if said and said[-1] == truth else [f"the {said[-1] if said else 'missing'} second, not the {truth}"]


def weak(meta: Meta) -> str:
    """Return why a label is weak, "" if it is not: MS3 of AVSBench's object release does not name what sounds."""
    return "does not say what sounds" if meta.get("objects") == [] else ""


def names(meta: Meta) -> tuple[str, ...]:
    """Return the names of the sounding objects."""
    return () if weak(meta) else tuple(name.strip() for name in meta["objects"])


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {"objects": [name.strip() for name in meta["objects"]], "second": second}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: the objects, where the label names them, and the second."""
    found: list[str] = []
    if not weak(meta):
        parsed, objects = parse(text), values["objects"]
        said = [] if parsed is None else parsed["objects"]
        found = [] if names_match(parsed, objects) else [f"the objects are {said}, the label says {objects}"]
    return found + moment_problems(_MOMENT.findall(text), second)


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield the names where an object is named twice."""
    if len(set(found := names(meta))) < len(found):
        yield Oddity(False, "objects", f"names one twice: {list(found)}", "name each once")


def _from_row(name: str, instruction: Callable[..., str], picture_variant: str) -> Callable[[Row], Made]:
    def from_row(row: Row) -> Made:
        """Read a row of a user's table: a clip or a picture with its sound, what sounds, and its mask."""
        second, fields = row.moment()
        objects = names_of(row)
        variant = "train" if row.media & set(CLIP) else picture_variant
        return Made(
            instruction(variant=variant, second=second),
            {"objects": objects, "second": second},
            {"objects": objects},
            fields,
        )

    return from_row


def mean_scores(samples: Sequence[Stats], names: Mapping[str, str]) -> dict[str, float]:
    """Average the statistics `names` (metric -> key) over the samples where they are not NaN; NaN if there is none."""
    values = {metric: [s[key] for s in samples if not math.isnan(s[key])] for metric, key in names.items()}
    return {metric: float(np.mean(found)) if found else math.nan for metric, found in values.items() if samples}


def binary_stats(mask: np.ndarray | None, gt: np.ndarray) -> Stats:
    """Return the statistics of one frame. A missing mask counts as an empty one, with an F-measure of 0."""
    missing = mask is None
    scores = np.zeros(np.shape(gt)) if missing else np.asarray(mask)
    curve = np.zeros(len(segmentation.THRESHOLDS)) if missing else segmentation.f_curve(scores, gt)
    return {
        "has_mask": not missing,
        "iou": segmentation.mask_iou(scores, gt),
        "curve": curve,
        "f": float(curve.max()),
        "has_object": bool((np.asarray(gt) > 0).any()),
    }


def _binary_task_stats(parsed: Any, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray) -> Stats:
    return {**binary_stats(mask, gt_mask), "video": meta["video"], "named": named(parsed, meta["objects"])}


def video_f(samples: Sequence[Stats]) -> float:
    """Return the mean over videos of the official F-measure: the maximum of a video's mean curve.

    Frames without an object are left out of the curve. Samples of one video have the same "video"; a sample whose
    "video" is None counts as a video of its own.
    """
    videos = defaultdict(list)
    for place, sample in enumerate(samples):
        videos[place if sample["video"] is None else ("video", sample["video"])].append(sample)
    return float(
        np.mean([segmentation.f_measure([s["curve"] for s in frames if s["has_object"]]) for frames in videos.values()])
    )


def _binary_reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return the metrics of BINARY_METRICS."""
    if not samples:
        return {}
    keys = {"miou": "iou", "f_score": "f", "object_accuracy": "named", "mask_rate": "has_mask"}
    return mean_scores(samples, keys) | {"f_score_video": video_f(samples)}


def _semantic_stats(parsed: Any, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray) -> Stats:
    predicted = np.zeros(np.shape(gt_mask), np.int64) if mask is None else np.asarray(mask)
    return {
        **segmentation.class_scores(predicted, gt_mask),
        "has_mask": mask is not None,
        "named": named(parsed, meta["objects"]),
    }


def _semantic_reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return the metrics of SEMANTIC_METRICS."""
    if not samples:
        return {}
    metrics = mean_scores(samples, {"object_accuracy": "named", "mask_rate": "has_mask"})
    totals = segmentation.class_totals(samples)
    for variant, options in (
        ("", {}),
        ("_nobg", {"background": False}),
        ("_nobg_official", {"background": False, "official_slip": True}),
        ("_present", {"background": False, "absent": False}),
    ):
        metrics[f"miou{variant}"], metrics[f"f_score{variant}"] = segmentation.class_means([totals], **options)
    return metrics


def _class_breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
    """Return, for each class that occurs in an answer or a label, its mean IoU and its number of frames."""
    totals = segmentation.class_totals(samples)
    return {
        name: (float(iou / seen), int(seen))
        for name, iou, seen in zip(CLASSES, totals["iou"], totals["seen"], strict=True)
        if seen
    }


def _most_frequent_answer(metas: Sequence[Mapping[str, Any]]) -> str:
    return target(list(Counter(tuple(meta["objects"]) for meta in metas).most_common(1)[0][0]))


def _binary_constants(
    metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
) -> list[tuple[str, np.ndarray | None]]:
    text = _most_frequent_answer(metas)
    return [(text, mask) for mask in segmentation.constant_masks(gt_masks)] or [(text, None)]


def _semantic_constants(
    metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]
) -> list[tuple[str, np.ndarray | None]]:
    """Return class maps: each pixel's most frequent class, and binary candidates filled with the commonest class."""
    text = _most_frequent_answer(metas)
    gts = [np.asarray(gt) for gt in gt_masks if gt is not None]
    if not gts:
        return [(text, None)]
    counts = np.stack([np.sum([gt == c for gt in gts], axis=0) for c in range(len(CLASSES))])
    frequent = 1 + int(counts[1:].sum((1, 2)).argmax())
    fills = [np.where(mask >= 0.5, frequent, 0) for mask in segmentation.constant_masks(gts)]
    return [(text, mask) for mask in (counts.argmax(0), *fills)]


def _image_test(second: int) -> str:
    return (
        f"{IMAGE}{AUDIO}Please recognize the category of the object making the sound in the image and segment it out."
    )


def _task(
    name: str,
    test: Callable[[int], str],
    drawn: str,
    published: Sequence[Published] = (),
    semantic: bool = False,
    test_second: int | None = None,
) -> Task:
    instruction = _instruction(test)
    common: dict[str, Any] = {
        "name": name,
        "instruction": instruction,
        "target": target,
        "parse": parse,
        "headline": "miou",
        "published": published,
        "answer": "mask",
        "drawn": drawn,
        "shown": lambda meta: ", ".join(map(str, meta.get("objects", ()))) or "nothing sounds",
        "fields": ("second",),
        "test_second": test_second,
        "arguments": arguments,
        "weak": weak,
        "names": names,
        "tags": (),
        "disagreements": disagreements,
        "oddities": oddities,
        "answer_start": "The object making the sound in the video is",
        "columns": ("object", "mask", "second"),
        # The prompt variant for a single picture differs.
        "from_row": _from_row(name, instruction, "test" if semantic else "quick"),
    }
    clip = CLIP_NAME._replace(needed="") if semantic else CLIP_NAME
    usual = ("ten", "one", "five", "one_of_five") if semantic else ("five", "one_of_five", "ten", "one")
    common |= {"label": {"objects": _OBJECTS, "video": clip}, "windows": usual}
    if semantic:
        return Task(
            stats=_semantic_stats,
            reduce=_semantic_reduce,
            constants=_semantic_constants,
            mask_kind="semantic",
            metrics=SEMANTIC_METRICS,
            breakdown=_class_breakdown,
            breakdown_of="IoU",
            ranked_by="miou_present",
            known=CLASSES[1:],
            **common,
        )
    return Task(
        stats=_binary_task_stats,
        reduce=_binary_reduce,
        constants=_binary_constants,
        mask_kind="binary",
        metrics=BINARY_METRICS,
        breakdown=by_group(_objects, _binary_reduce, "miou"),
        **common,
    )


def _objects(meta: Meta) -> list[str]:
    return sorted(set(map(str, meta["objects"]))) or ["nothing sounds"]


S4 = _task("s4", _video_prompt, "the pixels of the sounding object")
# The released MS3 evaluation asks about the third second whatever the frame is.
MS3 = _task(
    "ms3",
    lambda second: _video_prompt(2),
    "the pixels of all sounding objects",
    [Published("Crab", {"miou": 0.5821}, NOTES), Published("AVSegFormer", {"miou": 0.5840}, NOTES)],
    test_second=2,
)
AVSS = _task("avss", _image_test, "the classes of the sounding pixels", semantic=True)
