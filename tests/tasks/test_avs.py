"""S4, MS3 and AVSS: prompts, answers and scores."""

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from crab_jax.tasks.avs import AVSS, MS3, S4, target
from crab_jax.tasks.avs_classes import CLASSES
from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.text import object_words

META = {"objects": ["dog"], "video": "a"}
GT = np.array([[0, 0, 1, 1]] * 4)


def score(task, *samples):
    """Metrics of (text, mask, gt, meta) samples."""
    return task.reduce([task.stats(task.parse(text), mask, meta, gt) for text, mask, gt, meta in samples])


def test_prompts_are_the_released_ones():
    question = (
        "Please recognize the category of object making sound in the video, and then segment out the object "
        "that makes the sound at the {} second of the video."
    )
    for task in (S4, MS3, AVSS):
        assert task.instruction(second=4) == VIDEO + AUDIO + question.format("fifth")
        quick = IMAGE + AUDIO + "Please segment out the object that makes the sound in the image."
        assert task.instruction("quick", second=4) == quick
    assert S4.instruction("test", second=1) == VIDEO + AUDIO + question.format("second")
    assert MS3.instruction("test", second=4) == VIDEO + AUDIO + question.format("third")
    assert AVSS.instruction("test", second=4) == IMAGE + AUDIO + (
        "Please recognize the category of the object making the sound in the image and segment it out."
    )


def test_the_target_is_the_released_one():
    assert target("dog", 0) == (
        "The object making the sound in the video is dog. "
        "The mask of the object that makes the sound at the first second is " + MASK
    )
    assert target(["dog", "cat"], 9, "Two barks.").startswith(
        "Two barks. The object making the sound in the video is dog and cat. "
    )


def test_seconds_outside_the_clip_are_refused():
    for second in (-1, 10):
        with pytest.raises(InputError, match="second"):
            S4.instruction(second=second)


@pytest.mark.parametrize("objects", [["dog"], ["man", "acoustic-guitar"], ["cap gun shooting", "dog", "woman"]])
@pytest.mark.parametrize("reasoning", ["", "The object making the sound in the video is hidden at first. It barks."])
def test_targets_are_parsed_back(objects, reasoning):
    assert S4.parse(target(objects, 3, reasoning)) == {"objects": objects}
    assert S4.parse(f"<s> {target(objects, 3, reasoning)}</s><unk><unk>") == {"objects": objects}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "</s>",
        MASK,
        "It is a dog.",
        "The object making the sound in the video is",
        "The object making the sound in the video is dog",
        "The object making the sound in the video is . The mask",
        "The mask is " + MASK,
    ],
)
def test_malformed_texts_parse_to_none(text):
    assert S4.parse(text) is None


@pytest.mark.parametrize("task", [S4, MS3])
def test_a_perfect_answer_scores_one(task):
    metrics = score(task, (target("dog"), GT.astype(float), GT, META))
    assert set(metrics) == set(task.metrics) and all(value == pytest.approx(1) for value in metrics.values())
    assert task.headline in metrics and task.mask_kind == "binary"


def test_a_missing_mask_is_an_empty_one():
    metrics = score(MS3, (target("dog"), GT, GT, META), ("no", None, GT, META))
    assert metrics["miou"] == pytest.approx(0.5) and metrics["f_score"] == pytest.approx(0.5)
    assert metrics["mask_rate"] == metrics["object_accuracy"] == 0.5


def test_an_empty_frame_counts_for_iou_and_scores_no_f():
    metrics = score(MS3, (target("dog"), np.zeros((4, 4)), np.zeros((4, 4)), META))
    assert metrics["miou"] == 1 and metrics["f_score"] == 0 and metrics["f_score_video"] == 0


def test_the_official_f_measure_is_taken_per_video_and_never_above_the_per_frame_one():
    rng = np.random.default_rng(0)
    samples = [(target("dog"), rng.random((4, 4)), GT * (i != 2), {**META, "video": "ab"[i % 2]}) for i in range(6)]
    metrics = score(S4, *samples)
    full = [S4.stats(None, mask, meta, gt) for _, mask, gt, meta in samples]
    videos = [[full[i]["curve"] for i in frames] for frames in ((0, 4), (1, 3, 5))]
    assert metrics["f_score_video"] == pytest.approx(np.mean([np.mean(v, axis=0).max() for v in videos]))
    assert metrics["f_score_video"] < np.mean([s["f"] for s in full if s["has_object"]])


def test_avss_scores_classes():
    gt = GT * 7
    perfect = score(AVSS, (target("dog"), gt, gt, META))
    assert perfect["miou"] == pytest.approx(2 / 71) and perfect["miou_nobg"] == pytest.approx(1 / 70)
    assert perfect["miou_present"] == perfect["f_score_present"] == pytest.approx(1)
    missing = score(AVSS, (target("dog"), gt, gt, META), ("", None, gt, META))
    assert missing["miou_present"] == pytest.approx(0.5)
    assert missing["mask_rate"] == 0.5 and AVSS.mask_kind == "semantic"


def test_avss_without_background_fixes_the_index_slip_of_the_official_code_and_reports_both():
    woman, man = GT * 70, GT * 41
    metrics = score(AVSS, (target("woman"), woman, woman, META), (target("man"), np.zeros_like(man), man, META))
    # Right: background (IoU 1 and 1/2) and woman. Without background one of 70 classes scores, woman.
    assert metrics["miou_nobg"] == pytest.approx(1 / 70)
    assert metrics["miou_nobg_official"] == pytest.approx(0.75 / 70)  # the slip keeps background and drops woman
    assert metrics["miou"] == pytest.approx(1.75 / 71)


@pytest.mark.parametrize("task", [S4, AVSS])
def test_constants_are_scorable_answers_and_hold_a_strong_one(task):
    gts = [GT * 3, GT * 3, GT[:, ::-1] * 5]
    metas = [META, META, {"objects": ["cat"], "video": "b"}]
    candidates = task.constants(metas, gts)
    scores = [
        score(task, *((text, mask, gt, meta) for gt, meta in zip(gts, metas, strict=True))) for text, mask in candidates
    ]
    assert all(s["object_accuracy"] == pytest.approx(2 / 3) for s in scores)
    if task is S4:
        assert max(s["miou"] for s in scores) == pytest.approx(2 / 3)
    assert any(np.array_equal(mask > 0, GT > 0) for _, mask in candidates)
    assert [mask for _, mask in task.constants(metas, [None] * 3)] == [None]


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("guitar_man", ["guitar", "man"]),
        ("man and guitar", ["guitar", "man"]),
        ("the guitars and a man", ["guitar", "man"]),
        ("Emergency car", ["emergency-car"]),
        ("emergency_car", ["emergency-car"]),
        ("men and women", ["woman", "man"]),
        ("playing_acoustic_guitar", ["playing acoustic guitar"]),
        ("lawn mowing", ["lawn_mowing"]),
        ("Buses", ["bus"]),
    ],
)
def test_the_wording_of_the_release_names_the_same_objects(said, label):
    """The release writes a_obj as it is, `guitar_man`; whatever the spelling, an object is an object."""
    for text in (target(said), f"The object making sound in the image is {said}. The mask of it is"):
        assert stats_of(text, label)["named"] == 1


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("guitar", ["guitar", "man"]),
        ("guitar_man", ["guitar"]),
        ("null", ["man"]),
        ("woman", ["man"]),
        ("car", ["emergency-car"]),
        ("glass", ["grass"]),
    ],
)
def test_other_objects_are_others(said, label):
    assert stats_of(target(said), label)["named"] == 0


def stats_of(text, label):
    meta = {"objects": label, "video": "v"}
    return MS3.stats(MS3.parse(text), None, meta, np.zeros((2, 2), int))


def test_labels_that_do_not_say_what_sounds_have_no_object_accuracy():
    """MS3 of AVSBench's object release: an accuracy of 0 would say something about the wording alone."""
    unnamed, named = stats_of(target("dog"), []), stats_of(target("dog"), ["dog"])
    assert MS3.reduce([unnamed, named, unnamed])["object_accuracy"] == 1
    assert np.isnan(MS3.reduce([unnamed])["object_accuracy"])


def test_every_class_is_told_from_every_other():
    assert len({object_words([name]) for name in CLASSES}) == len(CLASSES)
