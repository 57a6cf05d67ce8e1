"""Mask and box metrics agree with the released code and with brute force."""

import numpy as np
import pytest

from crab_jax.tasks import segmentation as seg


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "metrics.npz")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float32)))


def test_mask_iou_equals_the_released_one(arrays):
    ours = [seg.mask_iou(sigmoid(p), g) for p, g in zip(arrays["mask.pred"], arrays["mask.gt"], strict=True)]
    np.testing.assert_allclose(ours, arrays["mask_iou.each"], atol=1e-6)
    np.testing.assert_allclose(np.mean(ours), arrays["mask_iou.batch"], atol=1e-6)


def test_f_measure_equals_the_released_one(arrays):
    curves = [seg.f_curve(sigmoid(p), g) for p, g in zip(arrays["mask.pred"], arrays["mask.gt"], strict=True)]
    np.testing.assert_allclose([seg.f_measure([c]) for c in curves], arrays["Fmeasure.each"], atol=1e-6)
    with_object = [c for c, g in zip(curves, arrays["mask.gt"], strict=True) if g.any()]
    np.testing.assert_allclose(seg.f_measure(with_object), arrays["Fmeasure.batch"], atol=1e-6)
    assert seg.f_measure([]) == 0


def test_null_s_equals_the_released_one(arrays):
    ours = [seg.null_s(sigmoid(p)) for p in arrays["mask.pred"]]
    np.testing.assert_allclose(ours, arrays["metric_s.each"], atol=1e-6)


@pytest.mark.parametrize("kind", ["scores", "coarse", "bool"])
def test_f_curve_is_the_f_measure_at_every_threshold(rng, kind):
    scores = {
        "scores": rng.random((9, 11)).astype(np.float32),
        "bool": rng.random((9, 11)) < 0.4,
        "coarse": rng.choice(seg.THRESHOLDS[::50], (9, 11)),
    }[kind]
    gt = rng.random((9, 11)) < 0.3
    curve = seg.f_curve(scores, gt)
    for i, threshold in enumerate(seg.THRESHOLDS):
        predicted = scores >= threshold
        hits, chosen = (predicted & gt).sum(), predicted.sum()
        precision, recall = (hits / chosen if chosen else 0), hits / gt.sum()
        expected = 1.3 * precision * recall / (0.3 * precision + recall) if hits else 0
        assert curve[i] == pytest.approx(expected)


def test_mask_iou_counts_pixels(rng):
    for _ in range(20):
        scores, gt = rng.random((6, 5)), rng.random((6, 5)) < 0.5
        predicted = {i for i in np.ndindex(6, 5) if scores[i] > 0.4}
        truth = {i for i in np.ndindex(6, 5) if gt[i]}
        assert seg.mask_iou(scores, gt, 0.4) == pytest.approx(len(predicted & truth) / len(predicted | truth))
    assert seg.mask_iou(np.eye(4), np.zeros((4, 4))) == 0.75  # an empty ground truth scores the pixels left empty
    assert seg.mask_iou(np.zeros((4, 4)), np.eye(4)) == 0


def test_class_scores_equal_the_released_ones(arrays):
    predicted = arrays["color.pred"].argmax(1)
    frames = [seg.class_scores(p, g) for p, g in zip(predicted, arrays["color.gt"], strict=True)]
    total = {name: sum(frame[name] for frame in frames) for name in ("iou", "f", "seen")}
    np.testing.assert_allclose(total["iou"], arrays["color.miou_pc"], atol=1e-5)
    np.testing.assert_allclose(total["f"], arrays["color.fscore_pc"], atol=1e-5)
    np.testing.assert_array_equal(total["seen"], arrays["color.cls_count"])
    per_class = np.nan_to_num(arrays["color.miou_pc"] / arrays["color.cls_count"])
    assert seg.class_means(frames)[0] == pytest.approx(per_class.mean(), abs=1e-6)
    assert seg.class_means(frames, background=False)[0] == pytest.approx(per_class[1:].mean(), abs=1e-6)
    slip = seg.class_means(frames, background=False, official_slip=True)
    assert slip[0] == pytest.approx(per_class[:-1].mean(), abs=1e-6)


def test_class_means_are_per_class_averages_over_the_frames_that_show_the_class(rng):
    frames = [(rng.integers(0, 4, (5, 6)), rng.integers(0, 5, (5, 6))) for _ in range(3)]
    ious = {}
    for predicted, gt in frames:
        for c in range(6):
            union = ((predicted == c) | (gt == c)).sum()
            if union:
                ious.setdefault(c, []).append(((predicted == c) & (gt == c)).sum() / union)
    scores = [seg.class_scores(p, g, classes=6) for p, g in frames]
    means = [np.mean(ious.get(c, [0])) for c in range(6)]
    assert seg.class_means(scores)[0] == pytest.approx(np.mean(means))
    assert seg.class_means(scores, absent=False)[0] == pytest.approx(np.mean([np.mean(v) for v in ious.values()]))
    assert seg.class_means([seg.class_scores(np.zeros((2, 2), int), np.zeros((2, 2), int))], False, False) == (0, 0)


def test_box_iou_equals_the_released_one(arrays):
    pairs = list(zip(arrays["box1"], arrays["box2"], strict=True))
    np.testing.assert_allclose([seg.box_iou(a, b) for a, b in pairs], arrays["iou"], atol=1e-5)


def test_complete_iou_equals_the_released_one_but_for_its_sign_slip(arrays):
    for a, b, released in zip(arrays["box1"], arrays["box2"], arrays["c_iou"], strict=True):
        low, high = np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])
        width, height, slipped = high[0] - low[0], high[1] - low[1], high[1] + low[1]
        distance = ((a[:2] + a[2:] - b[:2] - b[2:]) ** 2).sum() / 4
        correction = distance / (width**2 + height**2) - distance / (width**2 + slipped**2)
        assert seg.complete_iou(a, b) + correction == pytest.approx(released, abs=2e-5)


def test_box_iou_counts_pixels_and_survives_degenerate_boxes(rng):
    for _ in range(50):
        a, b = (np.sort(rng.integers(0, 12, (2, 2)), axis=0).ravel() for _ in range(2))
        maps = np.zeros((2, 12, 12), bool)
        for plane, (x1, y1, x2, y2) in zip(maps, (a, b), strict=True):
            plane[y1:y2, x1:x2] = True
        union = (maps[0] | maps[1]).sum()
        assert seg.box_iou(a, b) == pytest.approx((maps[0] & maps[1]).sum() / union if union else 0)
        assert -2 < seg.complete_iou(a, b) <= 1
    assert seg.box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0
    assert seg.complete_iou((1, 2, 5, 9), (1, 2, 5, 9)) == 1


def test_success_rate_and_its_area():
    assert seg.success_rate([0.5, 0.49, 1.0, 0.0]) == 0.5
    assert seg.success_auc([1.0, 1.0]) == pytest.approx(1)
    assert seg.success_auc([0.0]) == pytest.approx(0.025)  # a threshold of 0 is passed by all
    assert seg.success_auc([0.52]) == pytest.approx(0.5 + 0.025)


def test_constant_masks_hold_the_mean_map_and_the_trivial_masks():
    gts = [np.array([[1, 0], [0, 0]]), None, np.array([[1, 1], [0, 0]])]
    masks = seg.constant_masks(gts)
    assert any(np.array_equal(m, [[1, 0.5], [0, 0]]) for m in masks)
    assert any(m.all() for m in masks) and any(not m.any() for m in masks)
    assert seg.constant_masks([None]) == []
