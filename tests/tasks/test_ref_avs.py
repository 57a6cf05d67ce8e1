"""Ref-AVS: prompts, answers with and without an object, and scores per split."""

import numpy as np
import pytest

from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.ref_avs import REF_AVS, target

GT, EMPTY = np.eye(4), np.zeros((4, 4))
EXPRESSION = "The object that is making the longest sound"


def meta(split):
    return {"expression": EXPRESSION, "object": "" if split == "null" else "tuba", "split": split}


def score(*samples):
    return REF_AVS.reduce(
        [REF_AVS.stats(REF_AVS.parse(text), mask, meta(split), gt) for text, mask, gt, split in samples]
    )


def test_prompts_are_the_released_ones():
    fields = {"expression": EXPRESSION, "second": 6}
    assert REF_AVS.instruction(**fields) == (
        f"{VIDEO}{AUDIO}Please segment out the object that is making the longest sound at the seventh second "
        "in the video."
    )
    assert REF_AVS.instruction("test", **fields) == (
        f"{VIDEO}{AUDIO}{IMAGE}Please segment out the corresponding object in the image based on the referential "
        f"expression: {EXPRESSION}"
    )
    assert REF_AVS.instruction("quick", **fields) == (
        f"{IMAGE}{AUDIO}Please segment out the object that is making the longest sound in the image."
    )


def test_the_target_is_the_released_one_and_a_null_one_keeps_the_mask_tokens():
    assert target(EXPRESSION, "tuba", 6) == (
        f"At the seventh second in the video, {EXPRESSION} is tuba. Its mask is {MASK}"
    )
    null = target(EXPRESSION, "", 0, "Nothing is heard.")
    assert null.startswith("Nothing is heard. At the first second") and null.endswith(MASK)


@pytest.mark.parametrize("name", ["tuba", "emergency-car", ""])
@pytest.mark.parametrize(
    "expression", [EXPRESSION, "The white dog.", "The one who is left of what is loud", "At the end it does not appear"]
)
@pytest.mark.parametrize("reasoning", ["", "At the end it is louder. Its mask is small."])
def test_targets_are_parsed_back(name, expression, reasoning):
    parsed = REF_AVS.parse(f"<s> {target(expression, name, 2, reasoning)}</s>")
    assert parsed == {"objects": [name] if name else []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        MASK,
        "Its mask is " + MASK,
        "At the first second in the video, it is tuba",
        "At the first second in the video, tuba. Its mask is",
        "At the first second in the video, it is . Its mask is",
    ],
)
def test_malformed_texts_parse_to_none(text):
    assert REF_AVS.parse(text) is None


def test_splits_are_scored_apart():
    metrics = score(
        (target(EXPRESSION, "tuba"), GT, GT, "seen"),
        (target(EXPRESSION, "dog"), EMPTY, GT, "unseen"),
        (target(EXPRESSION, ""), GT, EMPTY, "null"),
    )
    assert metrics["j_seen"] == metrics["f_seen"] == pytest.approx(1)
    assert metrics["j_unseen"] == 0 and metrics["j"] == pytest.approx(0.5)
    assert metrics["s_null"] == pytest.approx(0.5)  # a quarter of the pixels
    assert metrics["object_accuracy"] == pytest.approx(2 / 3) and REF_AVS.headline in metrics


def test_a_missing_mask_is_an_empty_one():
    metrics = score(("", None, GT, "seen"), (target(EXPRESSION, "tuba"), GT, GT, "seen"), ("", None, EMPTY, "null"))
    assert metrics["j"] == metrics["j_seen"] == pytest.approx(0.5) and metrics["f"] == pytest.approx(0.5)
    assert metrics["s_null"] == 0 and metrics["mask_rate"] == pytest.approx(1 / 3)


def test_absent_splits_are_not_reported():
    assert "s_null" not in score(("", None, GT, "seen")) and "j_unseen" not in score(("", None, GT, "seen"))
    only_null = score(("", None, EMPTY, "null"))
    assert np.isnan(only_null["j"]) and "j_seen" not in only_null


def test_constants_are_scorable_answers():
    metas = [meta("seen"), meta("seen"), meta("null")]
    candidates = REF_AVS.constants(metas, [GT, GT, EMPTY])
    assert all(REF_AVS.parse(text) == {"objects": ["tuba"]} for text, _ in candidates)
    assert any(np.array_equal(mask, GT) for _, mask in candidates) and any(not mask.any() for _, mask in candidates)


@pytest.mark.parametrize("said", ["does not appear", "is null", "is Null", "is none", "is nothing"])
def test_the_release_says_that_there_is_nothing_by_null(said):
    text = f"At the first second in the video, the loud one {said}. Its mask is {MASK}"
    meta = {"expression": "the loud one", "object": "", "split": "null"}
    assert REF_AVS.parse(text) == {"objects": []}
    assert REF_AVS.stats(REF_AVS.parse(text), None, meta, np.zeros((2, 2), int))["named"]
    named = {**meta, "object": "tuba", "split": "seen"}
    assert not REF_AVS.stats(REF_AVS.parse(text), None, named, np.zeros((2, 2), int))["named"]
