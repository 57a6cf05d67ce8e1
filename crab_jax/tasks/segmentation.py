"""Metrics of masks and boxes: arrays in, floats out. The segmentation and grounding tasks share them.

Source: utils/avss_utils.py and utils/ciou.py of the released code, which follow AVSBench. Where they differ from the
definition of a metric, the definition is the default and a docstring names the difference.
A mask prediction is float[H,W] scores in [0, 1], or bool[H,W]; a ground truth is [H,W], foreground where > 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crab_jax.tasks.avs_classes import CLASSES
from crab_jax.tasks.task import Box

BETA2 = 0.3
THRESHOLDS = np.linspace(0, 1 - 1e-10, 255, dtype=np.float32)
AUC_THRESHOLDS = np.linspace(0, 1, 21)
SIZE = 224  # width and height, in pixels, of the picture that boxes refer to


def mask_iou(scores: np.ndarray, gt: np.ndarray, threshold: float = 0.5) -> float:
    """Return the intersection over union of `scores > threshold` with the ground truth.

    For an empty ground truth it returns the share of pixels left empty (convention of the release and of AVSBench).
    Crab uses the threshold 0.5, the Ref-AVS release 0.4.
    """
    predicted, truth = np.asarray(scores) > threshold, np.asarray(gt) > 0
    if not truth.any():
        return float((~predicted).mean())
    return float((predicted & truth).sum() / (predicted | truth).sum())


def f_curve(scores: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """Return float64[255]: the F-measure (beta^2 = 0.3) of `scores >= t` for each of 255 thresholds t in [0, 1].

    The curve is zero for an empty ground truth. It begins with the F-measure of the full mask, since the first
    threshold is 0.
    """
    truth = np.asarray(gt) > 0
    positives = truth.sum()
    if not positives:
        return np.zeros(len(THRESHOLDS))

    def at_least(counts: np.ndarray) -> np.ndarray:
        return counts[::-1].cumsum()[::-1][1:]

    # A score passes the first `passed` thresholds: one histogram gives the counts at every threshold.
    passed = np.searchsorted(THRESHOLDS, np.asarray(scores, np.float32), side="right")
    predicted = at_least(np.bincount(passed.ravel(), minlength=len(THRESHOLDS) + 1))
    hits = at_least(np.bincount(passed[truth], minlength=len(THRESHOLDS) + 1))
    precision, recall = hits / np.maximum(predicted, 1), hits / positives
    measure: np.ndarray = (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-20)
    return measure


def f_measure(curves: Sequence[np.ndarray]) -> float:
    """Return the maximum over thresholds of the mean of F curves; 0 without a curve.

    One curve gives the per-frame score of the released evaluation; the curves of a video's frames with an object give
    the official AVSBench score.
    """
    return float(np.mean(curves, axis=0).max()) if len(curves) else 0.0


def null_s(scores: np.ndarray, threshold: float = 0.5) -> float:
    """Return the square root of the share of predicted pixels, for null expressions; lower is better."""
    return float(np.sqrt((np.asarray(scores) > threshold).mean()))


def class_scores(predicted: np.ndarray, gt: np.ndarray, classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """Return the per-class scores of one frame of class ids [H,W]: {"iou", "f", "seen"}, each float64[classes].

    seen is 1 where the class is in the prediction or the ground truth; the scores of other classes are 0.
    """
    predicted, gt = np.asarray(predicted).ravel(), np.asarray(gt).ravel()
    area_p, area_g = (np.bincount(ids, minlength=classes).astype(np.float64) for ids in (predicted, gt))
    hits = np.bincount(gt[predicted == gt], minlength=classes).astype(np.float64)
    union = area_p + area_g - hits
    precision, recall = hits / np.maximum(area_p, 1), hits / np.maximum(area_g, 1)
    return {
        "iou": hits / np.maximum(union, 1),
        "seen": (union > 0).astype(np.float64),
        "f": (1 + BETA2) * precision * recall / np.maximum(BETA2 * precision + recall, 1e-20),
    }


def class_totals(frames: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Sum `class_scores` over frames; `class_means` accepts the sums {"iou", "f", "seen"} in place of frames."""
    return {name: np.sum([frame[name] for frame in frames], axis=0) for name in ("iou", "f", "seen")}


def class_means(
    frames: Sequence[dict[str, np.ndarray]], background: bool = True, absent: bool = True, official_slip: bool = False
) -> tuple[float, float]:
    """Return the mean IoU and F over classes; the score of a class is its mean over the frames that show the class.

    background: whether class 0 is included. official_slip: without background, drop the last class instead of class 0,
    as AVSBench and the released code do. absent: whether classes that no frame shows count as 0 (official) or are left
    out.
    """
    iou, f, seen = class_totals(frames).values()
    keep = np.ones(len(seen), bool)
    if not background:
        keep[-1 if official_slip else 0] = False
    if not absent:
        keep &= seen > 0
    if not keep.any():
        return 0.0, 0.0
    mean_iou, mean_f = (float((total / np.maximum(seen, 1))[keep].mean()) for total in (iou, f))
    return mean_iou, mean_f


def box_iou(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes with area (x2 - x1) * (y2 - y1); 0 where the union is empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - overlap
    return float(overlap / union) if union > 0 else 0.0


def complete_iou(a: Box, b: Box) -> float:
    """Return the Complete IoU of two boxes: IoU minus a distance and an aspect penalty, in (-2, 1].

    The released utils/ciou.py adds the y corners of the enclosing diagonal where the definition subtracts them.
    """
    iou = box_iou(a, b)
    distance = sum(((a[i] + a[i + 2]) - (b[i] + b[i + 2])) ** 2 for i in (0, 1)) / 4
    diagonal = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    angles = [np.arctan2(box[2] - box[0], box[3] - box[1]) for box in (a, b)]
    aspect = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    weight = aspect / (1 - iou + aspect) if aspect else 0.0
    return float(iou - (distance / diagonal if diagonal else 0.0) - weight * aspect)


def success_rate(ious: Sequence[float], threshold: float = 0.5) -> float:
    """Return the share of IoUs at or above the threshold ("cIoU" of the sound localisation protocol)."""
    return float((np.asarray(ious) >= threshold).mean())


def success_auc(ious: Sequence[float]) -> float:
    """Return the area under the success rate over the thresholds 0, 0.05, ..., 1 (trapezoids)."""
    return float(np.trapezoid([success_rate(ious, t) for t in AUC_THRESHOLDS], AUC_THRESHOLDS))


def constant_masks(gts: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Return candidate constant answers for binary masks, from ground truths of one size; none without ground truths.

    They are the mean map, the mean map cut at several levels, nothing, everything, and the middle of the picture.
    """
    maps = [np.asarray(gt) > 0 for gt in gts if gt is not None]
    if not maps:
        return []
    mean = np.mean(maps, axis=0)
    height, width = mean.shape
    centre = np.zeros_like(mean)
    centre[height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    cuts = [(mean >= level).astype(np.float64) for level in (0.1, 0.2, 0.3, 0.4, 0.5)]
    return [mean, *cuts, np.zeros_like(mean), np.ones_like(mean), centre]
