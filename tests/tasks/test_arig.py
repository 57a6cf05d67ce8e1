"""Audio-referred image grounding: prompts, boxes in text, and scores."""

import numpy as np
import pytest

from crab_jax.tasks.arig import ARIG, target
from crab_jax.tasks.placeholders import AUDIO, IMAGE

BOX = (21, 72, 196, 140)


def score(*samples):
    return ARIG.reduce(
        [ARIG.stats(ARIG.parse(text), None, {"object": "dog", "box": list(box)}, None) for text, box in samples]
    )


def test_prompts_are_the_released_ones():
    question = "Please recognize the category of object that makes the sound and then output {} location coordinates."
    assert ARIG.instruction() == IMAGE + AUDIO + question.format("its")
    assert ARIG.instruction("test") == IMAGE + AUDIO + question.format("the")
    assert ARIG.instruction("quick") == IMAGE + AUDIO + "Please output the location coordinates of sounding object."


def test_the_target_is_the_released_one():
    assert target("dog", BOX) == (
        "The sounding object is dog. Its coordinate of top left corner is (21,72) and "
        "coordinate of bottom right corner is (196,140)"
    )


@pytest.mark.parametrize("reasoning", ["", "It barks near (3, 4), top left of the cat at (9,9)."])
def test_targets_are_parsed_back(reasoning):
    assert ARIG.parse(f"<s> {target('dog', BOX, reasoning)}</s><unk>") == BOX
    assert ARIG.parse(target("dog", np.array([20.6, 72.2, 196.0, 139.9]), reasoning)) == BOX


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("Its coordinates are <obj>(1,2)(30,40)</obj>.", (1, 2, 30, 40)),
        ("( 1 , 2 ) and (30.5, 40)", (1, 2, 30.5, 40)),
        ("top left corner is (1,2) and coordinate of bottom right corner is (30,40) or (50,60)", (1, 2, 30, 40)),
        ("The centre is at (9,9). Its top left corner is (1,2) and its bottom right corner is (30,40)", (1, 2, 30, 40)),
        ("In 2010, dog (3 years). Its coordinate of top left corner is (1,2) and (30,40)", (1, 2, 30, 40)),
        ("(0,0) and (1,1)", (0, 0, 1, 1)),
    ],
)
def test_other_ways_to_write_a_box_are_read(text, box):
    assert ARIG.parse(text) == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dog",
        "top left (1,2), bottom left (30,40)",
        "top left (1,2), top-right (30,9)",
        "top left corner is (1,2)",
        "(1,2) and 3,4",
        "(30,40) and (1,2)",
        "(a,b) and (c,d)",
        "(1,2,3,4)",
        "[1,2] [3,4]",
        "(-5,-7) and (3,9) (10,20)",
        "(1,2,3) (4,5) (6,7)",
        "(10%,20%) (3,4) (5,6)",
        "(0.1,0.2) and (0.5,0.6)",
        "(0.0,0.0) and (1.0,1.0)",
        "(1;2) (3,4) (5,6)",
        "top left corner is (1,2), width and height are (30,40)",
        "[5,6] (1,2) (30,40)",
        "centre (100,100) size (50,60)",
        "(1234567,2) (3,4) (5,6)",
        "(1px,2px) (3,4) (5,6)",
    ],
)
def test_malformed_texts_parse_to_none(text):
    assert ARIG.parse(text) is None


def test_scores():
    half = (21, 72, 196, 106)
    metrics = score((target("dog", BOX), BOX), (target("dog", half), BOX), ("nothing", BOX))
    assert metrics["mean_iou"] == pytest.approx(0.5) and metrics["ciou_50"] == pytest.approx(2 / 3)
    assert metrics["auc"] == pytest.approx((1 + 0.525 + 0.025) / 3)
    assert metrics["parse_rate"] == pytest.approx(2 / 3) and ARIG.headline in metrics
    assert metrics["complete_iou"] < metrics["mean_iou"]


def test_a_box_is_cut_to_the_picture():
    assert score(("top left (0,0) bottom right (9999,9999)", (0, 0, 224, 224)))["mean_iou"] == pytest.approx(1)


def test_no_box_at_all_scores_nothing():
    metrics = score(("", BOX))
    assert metrics["mean_iou"] == 0 and metrics["complete_iou"] == -1


def test_constants_are_scorable_answers():
    metas = [{"object": "dog", "box": box} for box in ([0, 0, 10, 10], [0, 0, 10, 10], [30, 30, 40, 70])]
    boxes = [ARIG.parse(text) for text, _ in ARIG.constants(metas, [None] * 3)]
    assert boxes[:2] == [(10, 10, 20, 30), (0, 0, 10, 10)] and all(boxes)
