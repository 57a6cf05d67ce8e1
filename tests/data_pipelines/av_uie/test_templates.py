"""The template writer: what it says follows from the label, and the verifier always agrees with it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import ALL, ONE_EACH, STRATEGIES, example, rectangle
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS, avvp
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.av_uie import labels, questions, templates, verify
from data_pipelines.media import EMPTY_MASK
from data_pipelines.sources import scenes
from data_pipelines.sources.scene_graph import sample
from data_pipelines.sources.scene_questions import questions as scene_questions


@pytest.mark.parametrize("task", STRATEGIES)
def test_whatever_the_label_the_written_target_agrees_with_it(task):
    @settings(max_examples=25, deadline=None)
    @given(STRATEGIES[task])
    def check(plain):
        written = templates.write(plain, "/nowhere")
        assert verify.problems(written, "/nowhere") == []
        assert written.target.endswith(labels.answer(plain))
        assert labels.reasoning_of(written) == written.target.removesuffix(labels.answer(plain)).strip()
        assert templates.write(written, "/nowhere") == written  # what is there already does not matter

    check()


def test_the_target_parses_back_to_the_label():
    read = {task: TASKS[task].parse(templates.write(one).target) for task, one in ONE_EACH.items()}
    assert read["ave"] == {"event": "Church bell", "ranges": [[3, 8]]}
    assert read["avvp"] == {"audio": [["Speech", 0, 4], ["Dog", 2, 3]], "visual": [["Dog", 0, 10]]}
    assert read["avqa"] == "saxophone"
    assert read["arig"] == (53, 59, 153, 177)
    assert read["ms3"] == {"objects": ["guitar", "man"]}
    assert read["ref-avs"] == {"objects": ["guitar"]}


def test_times_and_what_surrounds_them():
    assert templates.reasoning(ONE_EACH["ave"], None) == (
        "I see and hear Church bell from 3 to 8, which is 5 of the 10 seconds. "
        "Before 3 and after 8 it is not both seen and heard."
    )
    whole = example("ave", {"event": "Bark", "start": 0, "end": 10})
    assert templates.reasoning(whole, None) == "I see and hear Bark from 0 to 10, which is all 10 seconds."
    none = example("ave", {"event": "Church bell", "start": 0, "end": 0})  # one released row
    assert "At no time" in templates.reasoning(none, None)


def test_overlaps_of_sight_and_sound_are_computed():
    plain = example(
        "avvp",
        {
            "audio": [["Dog", 0, 3], ["Dog", 3, 5], ["Dog", 7, 9], ["Speech", 0, 10], ["Cat", 0, 1]],
            "visual": [["Dog", 4, 8], ["Frying_(food)", 2, 2], ["Cat", 5, 6], ["Car", 0, 10]],
        },
    )
    text = templates.reasoning(plain, None)
    assert "Dog from 0 to 5 and from 7 to 9" in text  # touching spans are one
    assert "Dog is heard and seen from 4 to 5 and from 7 to 8." in text
    assert "Cat is never heard and seen at the same time." in text
    assert "Speech is heard but not seen." in text and "Car is seen but not heard." in text
    assert "Frying" not in text  # an empty span is nothing


@pytest.mark.parametrize(
    ("box", "where"),
    [
        ((0, 0, 40, 40), "in the upper left"),
        ((90, 90, 130, 130), "in the middle"),
        ((180, 90, 223, 130), "on the right"),
        ((90, 190, 130, 223), "at the bottom"),
    ],
)
def test_positions_and_sizes_come_from_the_mask(box, where):
    plain = dataclasses.replace(ONE_EACH["s4"], mask=rectangle(*box))
    area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1) / 224**2
    said = f"{where} of the picture, between ({box[0]},{box[1]}) and ({box[2]},{box[3]}), filling {100 * area:.0f} %"
    assert said in templates.write(plain, "/nowhere").target


def test_an_empty_mask_is_said_to_be_empty_and_an_unread_one_is_not_spoken_of():
    plain = dataclasses.replace(ONE_EACH["s4"], mask=EMPTY_MASK)
    assert "so the mask is empty" in templates.write(plain, "/nowhere").target
    assert templates.reasoning(plain, labels.places(plain, None)) == "I hear the dog."


def test_each_class_of_a_semantic_mask_has_its_place(tmp_path):
    pixels = np.zeros((224, 224), np.uint8)
    pixels[10:50, 10:50] = CLASSES.index("dog")
    pixels[150:200, 180:220] = CLASSES.index("man")
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    plain = example("avss", {"objects": ["dog", "man", "violin"], "video": "v"}, second=3, mask="mask.png")
    text = templates.write(plain, tmp_path).target
    assert "the dog is in the upper left of the picture, between (10,10) and (49,49)" in text
    assert "the man is in the lower right of the picture, between (180,150) and (219,199)" in text
    assert "the violin is" not in text


def test_every_template_of_music_avqa_is_known_and_no_other():
    assert len(questions.QUESTIONS) == len({question.template for question in questions.QUESTIONS}) == 33
    assert questions.match("How many sounding violin in the video？") is not None  # the release's full-width mark
    assert questions.match("Are there violin and cello sound? ") is not None  # and its trailing space
    assert questions.match("Who is playing?") is None


def test_the_questions_of_the_generated_world_are_all_understood():
    asked = [q for i in range(60) for q in scene_questions(sample(0, "test", i), 3)]
    assert asked and all(questions.match(question.text) for question in asked)


def test_a_question_is_taken_apart():
    say = questions.reasoning
    assert say("Is the erhu more rhythmic than the electric_bass?", "no", ("Audio", "Comparative")) == (
        "The question is about the sound. I listen to the rhythm of the erhu and of the electric bass. "
        "The erhu is not more rhythmic than the electric bass."
    )
    assert "The drum on the left is louder than the flute on the right." in say(
        "Is the drum on the left louder than the flute on the right?", "yes"
    )
    assert say("Something else?", "two", ("Visual", "Counting")) == "The question is about the picture."


def test_a_null_expression_refers_to_nothing():
    plain = example(
        "ref-avs",
        {"expression": "the quietest object on the left", "object": "", "split": "null"},
        second=0,
        mask=EMPTY_MASK,
        expression="the quietest object on the left",
    )
    assert templates.reasoning(plain, ()) == (
        "To find this object I listen to how loud things are and look where things are. Nothing in the video fits."
    )


def test_a_caption_stays_as_it_is():
    written = templates.write(ONE_EACH["avcap"])
    assert written.target == ONE_EACH["avcap"].meta["captions"][0] and written.meta["reasoning"] == "none"


def test_writing_needs_no_state_and_covers_every_task():
    first, again = ([templates.write(one, "/nowhere") for one in order] for order in (ALL, ALL[::-1]))
    assert first == again[::-1]
    assert {one.task for one in first if labels.reasoning_of(one)} == set(TASKS) - {"avcap"}


@pytest.mark.parametrize(
    ("task", "change", "field"),
    [
        ("ave", {"start": 9, "end": 3}, "end"),
        ("ave", {"end": 11}, "end"),
        ("ave", {"event": "<event>"}, "event"),
        ("ave", {"end": None}, "end"),
        ("ave", {"start": True}, "start"),
        ("avvp", {"audio": [["Dog", 0.5, 2]]}, "audio"),
        ("avvp", {"visual": "Dog"}, "visual"),
        ("arig", {"box": [1, 2, 3]}, "box"),
        ("arig", {"box": [9, 9, 3, 3]}, "box"),
        ("arig", {"box": [0, 0, 300, 9]}, "box"),
        ("s4", {"objects": "dog"}, "objects"),
        ("avqa", {"answer": " "}, "answer"),
        ("ref-avs", {"object": 3}, "object"),
        ("avcap", {"captions": []}, "captions"),
    ],
)
def test_a_bad_label_is_named(task, change, field):
    plain = dataclasses.replace(ONE_EACH[task], meta={**ONE_EACH[task].meta, **change})
    with pytest.raises(InputError) as caught:
        templates.write(plain)
    assert caught.value.field == f"meta.{field}" and "'x'" in caught.value.where


def test_weak_labels_give_no_target():
    train = example("avvp", {"labels": ["Speech", "Dog"]})
    silent = example("ms3", {"objects": [], "video": "v"}, second=0)
    for plain in (train, silent):
        assert labels.weak(plain)
        with pytest.raises(InputError):
            templates.write(plain)


@given(st.lists(st.tuples(st.integers(-2, 12), st.integers(-2, 12)), max_size=6))
def test_merged_spans_cover_the_same_seconds(spans):
    merged = avvp.merge_spans(spans)
    covered = {t for start, end in spans for t in range(max(0, start), min(10, end))}
    assert {t for start, end in merged for t in range(start, end)} == covered
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:], strict=False))  # apart, not touching


def test_plain_examples_of_the_generated_world_are_written_and_verified(tmp_path):
    scenes.write(tmp_path, {"train": 2}, seed=1)
    plain = scenes.examples(tmp_path, "train", reasoning="plain")
    written = [templates.write(one, tmp_path) for one in plain]
    good, bad = verify.split(written, tmp_path)
    assert bad == [] and good == written
    assert all(one.target.endswith(before.target) for before, one in zip(plain, written, strict=True))
