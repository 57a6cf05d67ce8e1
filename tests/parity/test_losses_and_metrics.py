"""Loss terms, the released pooling of mask losses, and every metric function."""

import numpy as np
import pytest

from crab_jax import losses
from crab_jax.losses import BINARY, SEMANTIC, LossConfig, Term
from crab_jax.tasks import segmentation as seg
from crab_jax.tasks.avvp import f_scores


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float32)))


def test_single_terms(data):
    z = data.arrays("losses.npz")
    for suffix, target in (("", z["bin.gt"]), ("_empty", np.zeros_like(z["bin.gt"]))):
        np.testing.assert_allclose(losses.bce_rows(z["bin.logits"], target)[0], z[f"bce{suffix}"], rtol=1e-6)
        np.testing.assert_allclose(losses.dice_rows(z["bin.logits"], target)[0], z[f"dice{suffix}"], rtol=1e-6)
    np.testing.assert_allclose(losses.ce_rows(z["cls.logits"][None], z["cls.gt"])[0], z["avss_ce"], rtol=1e-6)
    labels = z["text.labels"]
    term = losses.text_loss(z["text.logits"], np.maximum(labels, 0), labels != -100, np.ones(len(labels), bool))
    np.testing.assert_allclose(term.sum / term.number, z["text.ce"], rtol=1e-6)


@pytest.mark.parametrize("state", ["avs", "avss"])
def test_released_pooling_of_mask_losses(state, data, seg_masks):
    """Sums over samples, scaled by the share of their kind; the masks come from the model on the reference's states."""
    z, expected = data.arrays("seg.npz"), data.arrays("losses.npz", f"{state}.mask_loss.")
    binary, semantic = seg_masks(state)
    samples = {"s4": 0, "avss": 1, "ms3": 2, "avqa": 3}  # the rows of seg.npz, part of the layout
    kinds = {"s4": BINARY, "ms3": BINARY, "avss": SEMANTIC, "avqa": 0}
    for names, value in expected.items():
        rows = np.array([samples[name] for name in names.split("+")])
        target = np.concatenate([z[f"gt.{i}"] for i in rows]).astype(np.int32)
        found = losses.mask_losses(
            binary[rows],
            semantic[rows],
            target,
            np.array([kinds[name] for name in names.split("+")]),
            np.ones(len(rows), bool),
        )
        total = losses.total({"text": Term(0.0, 1.0), **found}, LossConfig(reduction="released"))
        data.close(total, value, "seg") if value else np.testing.assert_array_equal(total, 0)


def test_mask_metrics(data):
    z = data.arrays("metrics.npz")
    pairs = [(sigmoid(p), g) for p, g in zip(z["mask.pred"], z["mask.gt"], strict=True)]
    ious = [seg.mask_iou(p, g) for p, g in pairs]
    np.testing.assert_allclose(ious, z["mask_iou.each"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.mean(ious), z["mask_iou.batch"], rtol=0, atol=1e-6)
    curves = [seg.f_curve(p, g) for p, g in pairs]
    np.testing.assert_allclose([seg.f_measure([c]) for c in curves], z["Fmeasure.each"], rtol=0, atol=1e-6)
    shown = [c for c, (_, g) in zip(curves, pairs, strict=True) if g.any()]
    np.testing.assert_allclose(seg.f_measure(shown), z["Fmeasure.batch"], rtol=0, atol=1e-6)
    np.testing.assert_allclose([seg.null_s(p) for p, _ in pairs], z["metric_s.each"], rtol=0, atol=1e-6)


def test_class_metrics(data):
    z = data.arrays("metrics.npz", "color.")
    frames = [seg.class_scores(p, g) for p, g in zip(z["pred"].argmax(1), z["gt"], strict=True)]
    for ours, theirs in (("iou", "miou_pc"), ("f", "fscore_pc"), ("seen", "cls_count")):
        total = sum(frame[ours] for frame in frames)
        np.testing.assert_allclose(total, z[theirs], rtol=0, atol=1e-6 * z[theirs].max())
    each = [frame["iou"].sum() / (frame["iou"] > 0).sum() for frame in frames]  # the release averages over hits only
    np.testing.assert_allclose(each, z["vid_miou"], rtol=0, atol=1e-6)


def test_box_metrics(data):
    """The released c_iou adds the y corners of the enclosing diagonal where the definition subtracts them."""
    z = data.arrays("metrics.npz")
    pairs = list(zip(z["box1"], z["box2"], strict=True))
    np.testing.assert_allclose([seg.box_iou(a, b) for a, b in pairs], z["iou"], rtol=0, atol=1e-6)
    centred = lambda box: np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]).astype(int)  # noqa: E731
    corners = [[centred(box) for box in pair] for pair in pairs]
    np.testing.assert_allclose([seg.box_iou(a, b) for a, b in corners], z["iou_wh"], rtol=0, atol=1e-6)
    for (a, b), released in zip(pairs, z["c_iou"], strict=True):
        low, high = np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])
        distance = ((a[:2] + a[2:] - b[:2] - b[2:]) ** 2).sum() / 4
        width, height, slipped = high[0] - low[0], high[1] - low[1], high[1] + low[1]
        correction = distance / (width**2 + height**2) - distance / (width**2 + slipped**2)
        assert seg.complete_iou(a, b) + correction == pytest.approx(released, abs=1e-6)


def test_the_box_metric_that_nothing_released_calls(data):
    """bbox_overlaps_ciou: its aspect term is not divided by the area, values are cut at 1, equal boxes give NaN."""
    z = data.arrays("metrics.npz")
    for a, b, released, in_float32 in zip(
        z["box1"], z["box2"], z["bbox_overlaps_ciou"], z["bbox_overlaps_ciou_32"], strict=True
    ):
        width, height = a[2] - a[0], a[3] - a[1]
        tilt = np.arctan((b[2] - b[0]) / (b[3] - b[1])) - np.arctan(width / height)
        aspect, slipped = 4 / np.pi**2 * tilt**2, -8 / np.pi**2 * tilt * width * height
        rest = 1 - seg.box_iou(a, b) + aspect
        expected = np.clip(seg.complete_iou(a, b) + aspect / rest * (aspect - slipped), -1, 1) if rest else np.nan
        np.testing.assert_allclose(released, expected, rtol=1e-12)
        np.testing.assert_allclose(in_float32, expected, rtol=0, atol=1e-6)


def test_parsing_metrics(data):
    z = data.arrays("metrics.npz", "avvp.")
    for case in sorted({name.split(".")[0] for name in z}):
        answers = [z[f"{case}.{name}"].astype(bool) for name in ("SO_a", "SO_v", "GT_a", "GT_v")]
        for kind, (heard, seen) in (("SO", answers[:2]), ("GT", answers[2:])):
            np.testing.assert_array_equal(heard & seen, z[f"{case}.{kind}_av"])
        for level in ("segment", "event"):
            ours = f_scores(level, *answers)
            found = [ours[name] for name in ("audio", "visual", "event_av", "audio_visual")]
            np.testing.assert_allclose(found, z[f"{case}.{level}_level"], rtol=0, atol=1e-12)
