"""Loss terms, the released pooling of mask losses, and every metric function."""

import numpy as np
import pytest

from crab_jax import losses
from crab_jax.losses import BINARY, SEMANTIC, LossConfig, Term
from crab_jax.models.mask_decoder import SegModule
from crab_jax.tasks import segmentation as seg
from crab_jax.tasks.avvp import f_scores

# Of metrics.npz, `bbox_overlaps_ciou*` has no counterpart: it is NaN for equal boxes and nothing released calls it.


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
def test_released_pooling_of_mask_losses(state, data, load):
    """Sums over samples, scaled by the share of their kind; the masks come from the model on the reference's states."""
    z, expected = data.arrays("seg.npz"), data.arrays("losses.npz", f"{state}.mask_loss.")
    model, params = load(state)
    binary, semantic = SegModule(model.cfg.seg).apply({"params": params["seg_module"]}, z["pred_embeddings"],
                                                      (z["image_features.0"], z["image_features.1"]))
    samples = {"s4": 0, "avss": 1, "ms3": 2, "avqa": 3}  # the rows of seg.npz, part of the layout
    kinds = {"s4": BINARY, "ms3": BINARY, "avss": SEMANTIC, "avqa": 0}
    for names, value in expected.items():
        rows = np.array([samples[name] for name in names.split("+")])
        target = np.concatenate([z[f"gt.{i}"] for i in rows]).astype(np.int32)
        found = losses.mask_losses(binary[rows], semantic[rows], target,
                                   np.array([kinds[name] for name in names.split("+")]), np.ones(len(rows), bool))
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
        np.testing.assert_allclose(sum(frame[ours] for frame in frames), z[theirs], rtol=0, atol=1e-5)
    each = [frame["iou"].sum() / (frame["iou"] > 0).sum() for frame in frames]  # the release averages over hits only
    np.testing.assert_allclose(each, z["vid_miou"], rtol=0, atol=1e-5)


def test_box_metrics(data):
    """The released c_iou adds the y corners of the enclosing diagonal where the definition subtracts them."""
    z = data.arrays("metrics.npz")
    pairs = list(zip(z["box1"], z["box2"], strict=True))
    np.testing.assert_allclose([seg.box_iou(a, b) for a, b in pairs], z["iou"], rtol=0, atol=1e-5)
    centred = lambda box: np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]).astype(int)  # noqa: E731
    corners = [[centred(box) for box in pair] for pair in pairs]
    np.testing.assert_allclose([seg.box_iou(a, b) for a, b in corners], z["iou_wh"], rtol=0, atol=1e-5)
    for (a, b), released in zip(pairs, z["c_iou"], strict=True):
        low, high = np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])
        distance = ((a[:2] + a[2:] - b[:2] - b[2:]) ** 2).sum() / 4
        width, height, slipped = high[0] - low[0], high[1] - low[1], high[1] + low[1]
        correction = distance / (width**2 + height**2) - distance / (width**2 + slipped**2)
        assert seg.complete_iou(a, b) + correction == pytest.approx(released, abs=2e-5)


def test_parsing_metrics(data):
    z = data.arrays("metrics.npz", "avvp.")
    for case in sorted({name.split(".")[0] for name in z}):
        answers = [z[f"{case}.{name}"].astype(bool) for name in ("SO_a", "SO_v", "GT_a", "GT_v")]
        for level in ("segment", "event"):
            ours = f_scores(level, *answers)
            found = [ours[name] for name in ("audio", "visual", "event_av", "audio_visual")]
            np.testing.assert_allclose(found, z[f"{case}.{level}_level"], rtol=0, atol=1e-12)
