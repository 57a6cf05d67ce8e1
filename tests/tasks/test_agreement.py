"""Every metric against an independent computation from its definition, on a thousand random cases each."""

import math
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from pycocotools import mask as coco
from scipy.integrate import trapezoid

from crab_jax.tasks import TASKS, arig, avcap, ave, avqa, avvp
from crab_jax.tasks import segmentation as seg

CASES = 1000


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def scores_and_truths(rng, shape=(5, 6)):
    """CASES of (scores in [0, 1] with ties and exact zeros and ones, ground truth that is sometimes empty)."""
    for _ in range(CASES):
        scores = rng.random(shape).astype(np.float32)
        kind = rng.integers(4)
        scores = (scores, np.round(scores * 4) / 4, scores > 0.5, scores * (scores > 0.6))[kind]
        yield scores, rng.random(shape) < rng.choice([0, 0.1, 0.5, 0.9])


def rle(plane):
    return coco.encode(np.asfortranarray(plane.astype(np.uint8)))


def coco_iou(predicted, truth):
    """IoU by pycocotools; an empty truth scores the share of pixels left empty."""
    if not truth.any():
        return 1 - coco.area(rle(predicted)) / truth.size
    return coco.iou([rle(predicted)], [rle(truth)], [0]).item()


def brute_f(scores, truth):
    """F (beta^2 0.3) of every threshold, zero where nothing is hit."""
    thresholds = np.linspace(0, 1 - 1e-10, 255, dtype=np.float32)
    predicted = np.asarray(scores, np.float32).ravel()[None] >= thresholds[:, None]
    hits = (predicted & truth.ravel()).sum(1)
    with np.errstate(all="ignore"):
        precision, recall = hits / predicted.sum(1), hits / truth.sum()
        return np.nan_to_num(1.3 * precision * recall / (0.3 * precision + recall))


def test_mask_iou_at_both_thresholds_and_null_s(rng):
    for scores, truth in scores_and_truths(rng):
        for threshold in (0.5, 0.4):
            predicted = np.asarray(scores, float) > threshold
            assert seg.mask_iou(scores, truth, threshold) == pytest.approx(coco_iou(predicted, truth))
            assert seg.null_s(scores, threshold) == pytest.approx(math.sqrt(coco.area(rle(predicted)) / truth.size))


def test_f_curves(rng):
    for scores, truth in scores_and_truths(rng):
        np.testing.assert_allclose(seg.f_curve(scores, truth), brute_f(scores, truth), atol=1e-12)


def sets_of_frames(rng, count=3):
    """CASES of `count` (scores or None where no mask was drawn, truth, whether the objects are named right)."""
    frames = list(scores_and_truths(rng, (3, 4)))
    for start in range(CASES):
        yield [
            (
                None if rng.random() < 0.2 else frames[(start * 3 + k * 7) % CASES][0],
                frames[(start * 3 + k * 7) % CASES][1],
                bool(rng.random() < 0.5),
            )
            for k in range(count)
        ]


def drawn(scores, truth):
    """A missing mask counts as an empty one."""
    return np.zeros(truth.shape) if scores is None else np.asarray(scores, float)


def brute_frame_f(scores, truth):
    return np.zeros(255) if scores is None else brute_f(scores, truth)


def brute_video_f(frames, videos):
    """Largest F of the mean curve of each video's frames with an object; mean over videos."""
    values = []
    for video in dict.fromkeys(videos):
        shown = [brute_frame_f(p, t) for (p, t, _), v in zip(frames, videos, strict=True) if v == video and t.any()]
        values.append(np.mean(shown, axis=0).max() if shown else 0.0)
    return np.mean(values)


@pytest.mark.parametrize("name", ["s4", "ms3"])
def test_binary_segmentation_figures_of_a_set_of_videos(rng, name):
    task = TASKS[name]
    for frames in sets_of_frames(rng):
        videos = [str(v) for v in rng.integers(0, 2, 3)]
        metrics = task.reduce(
            [
                task.stats({"objects": ["dog" if named else "cat"]}, p, {"objects": ["dog"], "video": video}, t)
                for (p, t, named), video in zip(frames, videos, strict=True)
            ]
        )
        assert metrics == pytest.approx(
            {
                "miou": np.mean([coco_iou(drawn(p, t) > 0.5, t) for p, t, _ in frames]),
                "f_score": np.mean([brute_frame_f(p, t).max() for p, t, _ in frames]),
                "f_score_video": brute_video_f(frames, videos),
                "object_accuracy": np.mean([n for *_, n in frames]),
                "mask_rate": np.mean([p is not None for p, *_ in frames]),
            }
        )


def test_ref_avs_figures_of_every_split(rng):
    task = TASKS["ref-avs"]
    for frames in sets_of_frames(rng, 4):
        splits = rng.choice(["seen", "unseen", "null"], 4).tolist()
        rows = [str(v) for v in rng.integers(0, 2, 4)]  # frames of one expression share its row
        metrics = task.reduce(
            [
                task.stats(
                    {"objects": ["dog" if named else "cat"]}, p, {"object": "dog", "split": s, "one_of": r + s}, t
                )
                for (p, t, named), s, r in zip(frames, splits, rows, strict=True)
            ]
        )
        expected = {
            "object_accuracy": np.mean([n for *_, n in frames]),
            "mask_rate": np.mean([p is not None for p, *_ in frames]),
        }
        for suffix, wanted in {"": ("seen", "unseen"), "_seen": ("seen",), "_unseen": ("unseen",)}.items():
            group = [f for f, split in zip(frames, splits, strict=True) if split in wanted]
            if group:
                names = [r + s for r, s in zip(rows, splits, strict=True) if s in wanted]
                expected |= {
                    f"j{suffix}": np.mean([coco_iou(drawn(p, t) > 0.5, t) for p, t, _ in group]),
                    f"j_04{suffix}": np.mean([coco_iou(drawn(p, t) > 0.4, t) for p, t, _ in group]),
                    f"f{suffix}": np.mean([brute_frame_f(p, t).max() for p, t, _ in group]),
                    f"f_video{suffix}": brute_video_f(group, names),
                }
        nulls = [drawn(p, t) for (p, t, _), split in zip(frames, splits, strict=True) if split == "null"]
        if nulls:
            expected |= {
                "s_null": np.mean([math.sqrt((p > 0.5).mean()) for p in nulls]),
                "s_null_04": np.mean([math.sqrt((p > 0.4).mean()) for p in nulls]),
            }
        assert {k: v for k, v in metrics.items() if not np.isnan(v)} == pytest.approx(expected)


def test_semantic_figures_of_a_set_of_frames(rng):
    task = TASKS["avss"]
    for _ in range(CASES):
        some = rng.choice(71, 4, replace=False) * rng.integers(0, 2, 4)  # background comes often
        frames = [(rng.choice(some, (3, 4)), rng.choice(some, (3, 4))) for _ in range(2)]
        sums = np.zeros((3, 71))  # IoU, F, frames that show the class
        for predicted, truth in frames:
            p, t = ((ids.ravel()[None] == np.arange(71)[:, None]) for ids in (predicted, truth))
            hits, union = (p & t).sum(1), (p | t).sum(1)
            with np.errstate(all="ignore"):
                precision, recall = hits / p.sum(1), hits / t.sum(1)
                f = np.nan_to_num(1.3 * precision * recall / (0.3 * precision + recall))
                sums += np.nan_to_num(hits / union), f, union > 0
        iou, f = sums[:2] / np.maximum(sums[2], 1)
        shown = sums[2, 1:] > 0
        named = rng.random(2) < 0.5
        metrics = task.reduce(
            [
                task.stats({"objects": ["dog" if right else "cat"]}, p, {"objects": ["dog"]}, t)
                for (p, t), right in zip(frames, named, strict=True)
            ]
        )
        assert metrics == pytest.approx(
            {
                "miou": iou.mean(),
                "f_score": f.mean(),
                "miou_nobg": iou[1:].mean(),
                "f_score_nobg": f[1:].mean(),
                "miou_nobg_official": iou[:-1].mean(),
                "f_score_nobg_official": f[:-1].mean(),
                "miou_present": iou[1:][shown].mean() if shown.any() else 0,
                "f_score_present": f[1:][shown].mean() if shown.any() else 0,
                "object_accuracy": named.mean(),
                "mask_rate": 1.0,
            }
        )


def brute_complete_iou(a, b):
    """1 - the Complete-IoU loss of Zheng et al. 2020, term by term."""
    (ax, ay, ax2, ay2), (bx, by, bx2, by2) = a, b
    inter = max(0, min(ax2, bx2) - max(ax, bx)) * max(0, min(ay2, by2) - max(ay, by))
    union = (ax2 - ax) * (ay2 - ay) + (bx2 - bx) * (by2 - by) - inter
    iou = inter / union
    rho2 = math.dist(((ax + ax2) / 2, (ay + ay2) / 2), ((bx + bx2) / 2, (by + by2) / 2)) ** 2
    c2 = (max(ax2, bx2) - min(ax, bx)) ** 2 + (max(ay2, by2) - min(ay, by)) ** 2
    v = 4 / math.pi**2 * (math.atan((bx2 - bx) / (by2 - by)) - math.atan((ax2 - ax) / (ay2 - ay))) ** 2
    return iou - rho2 / c2 - (v * v / (1 - iou + v) if v else 0)


def test_box_figures(rng):
    boxes = np.sort(rng.integers(0, 225, (CASES, 2, 2, 2)), axis=2)  # case, answer or label, corner, axis
    boxes[:, :, 1] += boxes[:, :, 0] == boxes[:, :, 1]  # no box without area: CIoU is not defined there
    pairs = boxes.reshape(CASES, 2, 4).clip(0, 224)
    pairs = pairs[((pairs[..., 2:] - pairs[..., :2]) > 0).all((1, 2))]
    pairs = np.concatenate([pairs, pairs[: CASES - len(pairs) + 20, ::-1]])
    assert len(pairs) >= CASES
    ious = []
    for a, b in pairs.tolist():
        as_coco = [[[x1, y1, x2 - x1, y2 - y1]] for x1, y1, x2, y2 in (a, b)]
        ious.append(coco.iou(*map(np.array, as_coco), [0]).item())
        assert seg.box_iou(a, b) == pytest.approx(ious[-1])
        assert seg.complete_iou(a, b) == pytest.approx(brute_complete_iou(a, b))
    thresholds = np.arange(21) / 20
    for start in range(CASES):
        group = np.array(ious[start : start + 1 + start % 9] + [0.5] * (start % 3))
        metrics = arig.reduce([{"parsed": True, "iou": iou, "complete": iou - 1} for iou in group])
        rates = [(group + 1e-12 >= t).mean() for t in thresholds]
        assert metrics == pytest.approx(
            {
                "mean_iou": group.mean(),
                "ciou_50": (group >= 0.5).mean(),
                "auc": trapezoid(rates, thresholds),
                "complete_iou": group.mean() - 1,
                "parse_rate": 1.0,
            },
            abs=1e-9,
        )


def runs_of(seconds):
    """The events of a row of flags, as sets of seconds."""
    text, events, at = "".join("x" if s else "." for s in seconds), [], 0
    for run in text.split("."):
        if run:
            events.append(set(range(at, at + len(run))))
        at += len(run) + 1
    return events


def brute_counts(level, answer, truth):
    """(TP, FP, FN) of one class."""
    if level == "segment":
        cells = Counter(zip(answer.tolist(), truth.tolist(), strict=True))
        return cells[True, True], cells[True, False], cells[False, True]
    ours, wanted = runs_of(answer), runs_of(truth)

    def matches(one, others):
        return any(len(one & other) >= 0.5 * len(one | other) for other in others)

    right = sum(matches(event, wanted) for event in ours)
    return right, len(ours) - right, sum(not matches(event, ours) for event in wanted)


def brute_f1(counts):
    """Mean F1 of the classes that occur, of [(TP, FP, FN)]; 1 when none does."""
    values = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts if tp + fp + fn]
    return np.mean(values) if values else 1.0


@pytest.mark.parametrize("level", avvp.LEVELS)
def test_video_parsing_f_scores(rng, level):
    for _ in range(CASES):
        classes = int(rng.integers(1, 4))
        truth = rng.random((2, classes, 10)) < rng.choice([0, 0.3, 0.7], (2, classes, 1))
        answer = truth ^ (rng.random(truth.shape) < 0.15)
        counts = [
            [brute_counts(level, a, t) for a, t in zip(*pair, strict=True)] for pair in zip(answer, truth, strict=True)
        ]
        both = [brute_counts(level, a, t) for a, t in zip(answer.all(0), truth.all(0), strict=True)]
        pooled = [tuple(np.add(a, v)) for a, v in zip(*counts, strict=True)]
        expected = {
            "audio": brute_f1(counts[0]),
            "visual": brute_f1(counts[1]),
            "audio_visual": brute_f1(both),
            "event_av": brute_f1(pooled),
        }
        found = avvp.f_scores(level, *answer, *truth)
        assert found == pytest.approx(expected)
        metrics = avvp.reduce([{f"{one}_{name}": value for one in avvp.LEVELS for name, value in found.items()}])
        assert metrics[f"{level}_type_av"] == pytest.approx(
            np.mean([expected[k] for k in ("audio", "visual", "audio_visual")])
        )


def test_event_localisation_accuracies(rng):
    for _ in range(CASES):
        clips = []
        for _ in range(2):
            truth = {
                "event": str(rng.choice(["Dog", "Cat"])),
                "start": int(rng.integers(0, 10)),
                "end": int(rng.integers(0, 11)),
            }
            ranges = rng.integers(0, 13, (int(rng.integers(1, 3)), 2)).tolist()
            said = {"event": str(rng.choice(["dog", "CAT"])), "ranges": ranges} if rng.random() < 0.8 else None
            clips.append((said, truth))

        def labels(name, spans, inclusive):
            return [name.lower() if any(s <= t < e + inclusive for s, e in spans) else None for t in range(10)]

        def accuracy(said, truth, inclusive):
            wanted = labels(truth["event"], [(truth["start"], truth["end"])], inclusive)
            found = labels(said["event"], said["ranges"], inclusive) if said else [None] * 10
            return sum(a == b for a, b in zip(found, wanted, strict=True)) / 10

        assert ave.reduce([ave.stats(said, None, truth, None) for said, truth in clips]) == pytest.approx(
            {
                "accuracy": np.mean([accuracy(*clip, False) for clip in clips]),
                "accuracy_inclusive": np.mean([accuracy(*clip, True) for clip in clips]),
                "event_accuracy": np.mean(
                    [said is not None and said["event"].lower() == truth["event"].lower() for said, truth in clips]
                ),
            }
        )


def test_question_accuracies(rng):
    kinds = [
        ["Audio", "Counting"],
        ["Audio", "Comparative"],
        ["Visual", "Counting"],
        ["Visual", "Location"],
        *(["Audio-Visual", kind] for kind in ("Existential", "Counting", "Location", "Comparative", "Temporal")),
    ]
    for _ in range(CASES):
        said = ["yes", "no", "two", "not two", ""]
        rows = [(kinds[rng.integers(9)], *rng.choice(said, 2)) for _ in range(rng.integers(1, 12))]
        rows = [(kind, answer, truth or "yes") for kind, answer, truth in rows]
        metrics = avqa.reduce(
            [
                avqa.stats(str(answer) or None, None, {"answer": str(truth), "type": kind}, None)
                for kind, answer, truth in rows
            ]
        )
        right, asked = Counter(), Counter()
        for kind, answer, truth in rows:
            modality = kind[0].lower().replace("-", "_")
            for key in ("accuracy", modality, f"{modality}_{kind[1].lower()}"):
                asked[key] += 1
                right[key] += answer == truth
            asked["accuracy_substring"] += 1
            right["accuracy_substring"] += truth in answer
        assert metrics == pytest.approx({key: right[key] / asked[key] for key in asked})


VOCABULARY = ["a", "dog", "cat", "barks", "runs", "loudly", "the", "red"]


def grams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def brute_cider(candidates, references):
    """CIDEr-D straight from its definition, with dictionaries."""
    frequency = Counter()
    for refs in references:
        frequency.update({g for r in refs for n in range(1, 5) for g in grams(r, n)})

    def vector(tokens, n):
        return {
            g: c * (math.log(len(references)) - math.log(max(1, frequency[g]))) for g, c in grams(tokens, n).items()
        }

    def norm(v):
        return math.sqrt(sum(x * x for x in v.values()))

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        values = []
        for reference in refs:
            for n in range(1, 5):
                c, r = vector(candidate, n), vector(reference, n)
                dot = sum(min(c[g], r[g]) * r[g] for g in c if g in r)
                cosine = dot / (norm(c) * norm(r)) if norm(c) * norm(r) > 0 else 0.0
                values.append(cosine * math.exp(-((len(candidate) - len(reference)) ** 2) / 72))
        scores.append(10 * np.mean(values))
    return np.mean(scores)


def brute_bleu(candidates, references):
    precisions = []
    for n in range(1, 5):
        hits = total = 0
        for candidate, refs in zip(candidates, references, strict=True):
            for gram, times in grams(candidate, n).items():
                hits += min(times, max(grams(r, n)[gram] for r in refs))
                total += times
        precisions.append(hits / total if total else 0)
    if min(precisions) == 0:
        return 0.0
    length = sum(map(len, candidates))
    closest = sum(
        min((abs(len(r) - len(c)), len(r)) for r in refs)[1] for c, refs in zip(candidates, references, strict=True)
    )
    return math.exp(sum(map(math.log, precisions)) / 4) * (1 if length > closest else math.exp(1 - closest / length))


def brute_rouge(candidate, refs):
    def common(a, b):
        @lru_cache(None)
        def longest(i, j):
            if i == len(a) or j == len(b):
                return 0
            return 1 + longest(i + 1, j + 1) if a[i] == b[j] else max(longest(i + 1, j), longest(i, j + 1))

        return longest(0, 0)

    precision = max(common(candidate, r) for r in refs) / len(candidate)
    recall = max(common(candidate, r) / len(r) for r in refs)
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0


def test_caption_scores(rng):
    def caption():
        return " ".join(rng.choice(VOCABULARY, rng.integers(1, 8)))

    for _ in range(CASES):
        truth = [[caption() for _ in range(rng.integers(1, 3))] for _ in range(rng.integers(1, 4))]
        answers = [refs[0] if rng.random() < 0.6 else caption() for refs in truth]
        metrics = avcap.reduce(
            [avcap.stats(a, None, {"captions": refs}, None) for a, refs in zip(answers, truth, strict=True)]
        )
        tokens, token_refs = [a.split() for a in answers], [[r.split() for r in refs] for refs in truth]
        assert metrics == pytest.approx(
            {
                "cider_d": brute_cider(tokens, token_refs),
                "bleu4": brute_bleu(tokens, token_refs),
                "rouge_l": np.mean([brute_rouge(t, refs) for t, refs in zip(tokens, token_refs, strict=True)]),
            }
        )
