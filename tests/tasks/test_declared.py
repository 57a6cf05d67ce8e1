"""What the nine tasks declare, as docs/your_data.md, docs/evaluation.md and the releases of the datasets state it.

One table each: how a question and its label are shown, what a row of a user's table becomes, which rows are refused,
the constant answers of a few labels, how a target may differ from its label, and what looks wrong in a label.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES, avss_palette
from crab_jax.tasks.placeholders import AUDIO, IMAGE, MASK, VIDEO
from crab_jax.tasks.rows import columns_of, made_of
from crab_jax.tasks.task import (
    Event,
    arguments_of,
    disagreements_of,
    odd_names,
    sample_metric,
    shown_label,
    wrong_fields,
)
from data_pipelines.own.table import Row

LABELS: dict[str, dict[str, Any]] = {
    "avqa": {"answer": " two ", "type": ["Audio-Visual", "Counting"]},
    "ave": {"event": " Dog ", "start": 2, "end": 5},
    "avvp": {"audio": [["Dog", 2, 5], ["Dog ", 7, 9]], "visual": [["Cat", 0, 10]]},
    "arig": {"object": " dog ", "box": [10, 20, 110, 120]},
    "s4": {"objects": [" dog ", "man"], "video": "v1"},
    "ms3": {"objects": [], "video": None},
    "avss": {"objects": ["dog"], "video": None},
    "ref-avs": {"expression": " The loud one ", "object": " dog ", "split": "seen"},
    "avcap": {"captions": [" A dog barks. ", "A dog."]},
}

# Columns of a table besides the media, the windows that suit, the tags of a target, and how an answer begins.
DECLARED = {
    "avqa": (("question", "answer", "type"), ("music_avqa", "ten"), ("answer",), "So the answer is"),
    "ave": (("events",), ("ten",), ("event", "range"), "So the audible and visible event"),
    "avvp": (("events",), ("ten",), ("audio_event", "visual_event"), "Therefore, visual and audio events are"),
    "arig": (
        ("object", "box", "box_224", "second"),
        ("five", "one_of_five", "ten", "one"),
        (),
        "The sounding object is",
    ),
    "s4": (
        ("object", "mask", "second"),
        ("five", "one_of_five", "ten", "one"),
        (),
        "The object making the sound in the video is",
    ),
    "ms3": (
        ("object", "mask", "second"),
        ("five", "one_of_five", "ten", "one"),
        (),
        "The object making the sound in the video is",
    ),
    "avss": (
        ("object", "mask", "second"),
        ("ten", "one", "five", "one_of_five"),
        (),
        "The object making the sound in the video is",
    ),
    "ref-avs": (("expression", "object", "mask", "second", "type"), ("ten",), (), "At the "),
    "avcap": (("answer",), ("ten", "none"), (), ""),
}


@pytest.mark.parametrize("name", TASKS)
def test_columns_windows_tags_and_the_beginning_of_an_answer(name):
    task = TASKS[name]
    assert (columns_of(task), task.windows, task.tags, task.answer_start) == DECLARED[name] and task.name == name
    made = task.target(**arguments_of(task, LABELS[name]))
    assert made.startswith(task.answer_start) and all(f"<{tag}>" in made and f"</{tag}>" in made for tag in task.tags)


@pytest.mark.parametrize(
    ("name", "drawn", "shown"),
    [
        ("avqa", "", " two "),
        ("ave", "", " Dog  2-5"),
        ("avvp", "", "Dog 2-5 (heard); Dog  7-9 (heard); Cat 0-10 (seen)"),
        ("arig", "a box around the sounding object", " dog "),
        ("s4", "the pixels of the sounding object", " dog , man"),
        ("ms3", "the pixels of all sounding objects", "nothing sounds"),
        ("avss", "the classes of the sounding pixels", "dog"),
        ("ref-avs", "the pixels of what is asked for", " The loud one "),
        ("avcap", "", " A dog barks. "),
    ],
)
def test_how_pages_word_a_picture_and_a_label(name, drawn, shown):
    assert TASKS[name].drawn == drawn and shown_label(TASKS[name], LABELS[name]) == shown


def test_labels_without_content_are_shown_in_words():
    assert shown_label(TASKS["avvp"], {"audio": [], "visual": []}) == "nothing"
    assert shown_label(TASKS["s4"], {}) == shown_label(TASKS["ref-avs"], {}) == "nothing sounds"


def test_what_only_some_tasks_have():
    tasks = TASKS.values()
    assert {task.name: task.fields for task in tasks if task.fields} == {
        "avqa": ("question",),
        "s4": ("second",),
        "ms3": ("second",),
        "avss": ("second",),
        "ref-avs": ("expression", "second"),
    }
    assert {task.name: dict(task.unasked) for task in tasks if task.unasked} == {
        "avqa": {
            "question": (
                "How many musical instruments were heard throughout the video?",
                "How many types of musical instruments appeared in the entire video?",
            )
        },
        "ref-avs": {"expression": ("the object that is making the sound",)},
    }
    assert [task.name for task in tasks if task.own_words] == ["avcap"]
    assert [task.name for task in tasks if task.sound_alone] == ["avcap"]
    assert [task.name for task in tasks if task.several] == ["ave"]  # a clip of AVE may have two events
    assert {task.name: task.test_second for task in tasks if task.test_second is not None} == {"ms3": 2}
    assert {task.name: sample_metric(task) for task in tasks if sample_metric(task) != task.headline} == {
        "avss": "miou_present",
        "avcap": "rouge_l",
    }
    assert {task.name: task.breakdown_of for task in tasks if task.breakdown_of} == {"avss": "IoU"}
    assert {task.name: task.name_field for task in tasks if task.name_field} == {"ref-avs": "object"}
    kinds = {"ave": "events", "avvp": "events", "arig": "box", "s4": "mask", "ms3": "mask", "avss": "mask"}
    kinds |= {"ref-avs": "mask", "avqa": "text", "avcap": "text"}
    assert {task.name: task.answer for task in tasks} == kinds
    assert [task.name for task in tasks if task.about_picture] == ["arig", "s4", "ms3", "avss", "ref-avs"]


def test_published_rows_state_metrics_of_their_task():
    """Rows of Crab: docs/evaluation.md."""
    crab = {
        "avqa": {"accuracy": 0.7894, "audio": 0.7658, "visual": 0.9073, "audio_visual": 0.7413},
        "ave": {"accuracy": 0.8015},
        "avvp": {"segment_type_av": 0.59, "event_type_av": 0.5444},
        "arig": {"mean_iou": 0.4178, "auc": 0.42},
        "ms3": {"miou": 0.5821},
    }
    assert {name: task.published[0].scores for name, task in TASKS.items() if task.published} == crab
    rows = {name: [row.model for row in task.published] for name, task in TASKS.items() if task.published}
    assert all(models[0] == "Crab" and len(models) > 1 for models in rows.values())
    assert all(row.scores.keys() <= task.metrics.keys() for task in TASKS.values() for row in task.published)


@pytest.mark.parametrize(
    ("box", "valid"),
    [
        ([100, 0, 150, 50], True),
        ([0, 100, 50, 150], True),
        ([7, 7, 7, 7], True),
        ([0, 0, 224, 224], True),
        ([150, 0, 100, 200], False),
        ([0, 150, 200, 100], False),
        ([0, 0, 224, 224.5], False),
        ([-0.5, 0, 1, 1], False),
        ([0, 0, 1], False),
        ([0, 0, 1, 1, 1], False),
        ([0, 0, 1, True], False),
    ],
)
def test_a_box_has_four_corners_in_order_within_the_picture(box, valid):
    assert (not list(wrong_fields(TASKS["arig"], {"object": "dog", "box": box}))) == valid


# Official order and spelling: YapengTian/AVE-ECCV18 (Annotations.txt), AVVP-ECCV20 (dataloader.py), AVSBench
# (label2idx.json).
AVE = """Church bell; Male speech, man speaking; Bark; Fixed-wing aircraft, airplane; Race car, auto racing;
Female speech, woman speaking; Helicopter; Violin, fiddle; Flute; Ukulele; Frying (food); Truck; Shofar; Motorcycle;
Acoustic guitar; Train horn; Clock; Banjo; Goat; Baby cry, infant cry; Bus; Chainsaw; Cat; Horse; Toilet flush;
Rodents, rats, mice; Accordion; Mandolin"""
AVVP = """Speech Car Cheering Dog Cat Frying_(food) Basketball_bounce Fire_alarm Chainsaw Cello Banjo Singing
Chicken_rooster Violin_fiddle Vacuum_cleaner Baby_laughter Accordion Lawn_mower Motorcycle Helicopter Acoustic_guitar
Telephone_bell_ringing Baby_cry_infant_cry Blender Clapping"""


def test_the_blocks_of_prompts_and_targets_are_those_of_the_released_dataset(golden):
    samples = json.loads((golden / "samples.json").read_text()).values()
    blocks = {block for one in samples for block in re.findall(r"This is an? \w+:\n\S+\n", one["instruction"])}
    assert blocks == {VIDEO, AUDIO, IMAGE}
    assert {run for one in samples for run in re.findall(r"<mask_start>.*<mask_end>", one["output"])} == {MASK}


def test_the_names_of_the_benchmarks():
    assert TASKS["ave"].known == tuple(AVE.replace("\n", " ").split("; ")) and len(TASKS["ave"].known) == 28
    assert TASKS["avvp"].known == tuple(AVVP.split()) and len(TASKS["avvp"].known) == 25
    assert TASKS["avss"].known == CLASSES[1:] and len(CLASSES) == 71 and list(CLASSES[1:]) == sorted(CLASSES[1:])
    assert [CLASSES[k] for k in (0, 1, 17, 34, 70)] == ["background", "accordion", "dog", "harp", "woman"]


def test_the_palette_is_that_of_pascal_voc():
    palette = avss_palette()
    first = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]
    assert palette.dtype == np.uint8 and palette.shape == (71, 3) and palette[:7].tolist() == first
    assert palette[[8, 15, 64, 70]].tolist() == [[64, 0, 0], [192, 128, 128], [32, 0, 0], [32, 128, 128]]
    assert not palette.flags.writeable and avss_palette() is palette and len(np.unique(palette, axis=0)) == 71


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("avqa", {"answer": "two"}, ()),
        ("ave", {"event": "Dog", "start": 2, "end": 5}, ("Dog",)),
        ("avvp", {"audio": [["Dog", 2, 5], ["Dog", 7, 9]], "visual": [["Cat", 0, 10]]}, ("Dog", "Cat")),
        ("arig", {"object": "dog", "box": [10, 20, 110, 120]}, ("dog",)),
        ("s4", {"objects": ["dog", "man"], "second": 3}, ("dog", "man")),
        ("ms3", {"objects": [], "second": 3}, ()),
        ("ref-avs", {"expression": "The loud one", "object": "dog", "second": 3}, ("dog",)),
        ("avcap", {"caption": "A dog barks."}, ()),
    ],
)
def test_the_arguments_of_a_target_and_the_names_in_a_label(name, arguments, names):
    assert arguments_of(TASKS[name], LABELS[name], 3) == arguments and TASKS[name].names(LABELS[name]) == names


def test_labels_without_a_name_have_none_and_a_caption_that_breaks_a_target_is_refused():
    assert TASKS["arig"].names({"object": " "}) == TASKS["ref-avs"].names({"object": ""}) == ()
    with pytest.raises(InputError, match="captions") as error:
        arguments_of(TASKS["avcap"], {"captions": ["a <b>", "fine"]})
    assert "angle brackets" in str(error.value)


def test_weak_labels_lack_what_a_target_needs():
    assert {name for name in TASKS if TASKS[name].weak(LABELS[name])} == {"ms3"}
    assert TASKS["ms3"].weak(LABELS["ms3"]) == "does not say what sounds" and not TASKS["ms3"].weak({})
    llp = {"labels": ["Dog", "Cat"]}
    assert TASKS["avvp"].weak(llp) == "names events without their times" and TASKS["avvp"].names(llp) == ("Dog", "Cat")
    assert not TASKS["avvp"].weak({**llp, "audio": []})


def test_events_and_boxes_of_labels_and_answers():
    dog, cat = Event("Dog", 2, 5, "heard"), Event("Cat", 0, 10, "seen")
    assert TASKS["avvp"].events({"audio": [["Dog", 2, 5]], "visual": [["Cat", 0, 10]]}) == [dog, cat]
    assert TASKS["avvp"].events({"labels": ["Dog"]}) == []
    both = [Event("Dog", 2, 5, "heard and seen"), Event("Dog", 7, 9, "heard and seen")]
    assert TASKS["ave"].events({"event": "Dog", "start": 2, "end": 5}) == both[:1]
    assert TASKS["ave"].events({"event": "Dog", "ranges": [[2, 5], [7, 9]]}) == both
    assert TASKS["arig"].box(LABELS["arig"]) == [10, 20, 110, 120] and TASKS["arig"].box((1, 2, 3, 4)) == (1, 2, 3, 4)
    assert [t.events({}) for t in TASKS.values() if not t.timed] == [()] * 7
    assert [t.box({}) for t in TASKS.values() if t.name != "arig"] == [None] * 8


# Rows of a user's table.


class Cells(Row):
    """A row of a table whose picture is of 448 x 112 pixels; a column `media` names its kinds of media."""

    @property
    def media(self) -> frozenset[str]:
        return frozenset(self.values.get("media", "video audio").split())

    @property
    def seconds(self) -> float:
        return float(self.values.get("seconds", 10.0))

    def moment(self, empty: bool = False) -> tuple[int, dict[str, Any]]:
        return self.second() or 0, {"mask": self.given("mask"), "empty": empty}

    def picture_size(self) -> tuple[int, int]:
        return 448, 112


def row(name: str, **cells: Any) -> Cells:
    """A row about a task."""
    return Cells("table.csv:2", 2, {"task": name, **cells})


DOG = {"event": "Dog", "start": 2, "end": 5}
HEARD = {"audio": [["Speech", 0, 10], ["Dog", 2, 5]], "visual": [["Dog", 0, 10]]}
ONE = "image audio"


@pytest.mark.parametrize(
    ("name", "cells", "prompt", "meta", "fields"),
    [
        (
            "avqa",
            {"question": "How many?", "answer": "two", "type": "Audio-Visual/Counting"},
            f"{VIDEO}{AUDIO}Please answer this question: How many?",
            {"answer": "two", "question": "How many?", "type": ["Audio-Visual", "Counting"]},
            {"windows": "ten"},
        ),
        (
            "avqa",
            {"question": "Is it?", "answer": "yes", "type": "Audio , Counting", "seconds": 60},
            f"{VIDEO}{AUDIO}Please answer this question: Is it?",
            {"answer": "yes", "question": "Is it?", "type": ["Audio", "Counting"]},
            {"windows": "music_avqa"},
        ),
        (
            "avqa",
            {"question": "Is it?", "answer": "yes", "media": "frames audio"},
            f"{VIDEO}{AUDIO}Please answer this question: Is it?",
            {"answer": "yes", "question": "Is it?"},
            {"windows": "ten"},
        ),
        ("ave", {"events": "Dog 2-5"}, None, DOG, {"windows": "ten"}),
        ("ave", {"events": [["Dog", 2, 5]]}, None, DOG, {"windows": "ten"}),
        ("ave", {"events": "Dog from 2s to 5s"}, None, DOG, {"windows": "ten"}),
        ("ave", {"events": "Dog 0-0"}, None, {"event": "Dog", "start": 0, "end": 0}, {"windows": "ten"}),
        ("avvp", {"events": "audio: Speech 0-10; Dog 2-5; visual: Dog 0-10"}, None, HEARD, {"windows": "ten"}),
        (
            "avvp",
            {"events": "Visual: None | AUDIO: Dog 2-5, 7-9"},
            None,
            {"audio": [["Dog", 2, 5], ["Dog", 7, 9]], "visual": []},
            {"windows": "ten"},
        ),
        ("avvp", {"events": HEARD}, None, HEARD, {"windows": "ten"}),
        (
            "arig",
            {"object": "dog; man", "box": "40, 10, 448, 112", "media": ONE, "second": "3"},
            None,
            {"object": "dog and man", "box": [20, 20, 224, 224]},
            {"windows": "ten", "second": 3},
        ),
        (
            "arig",
            {"object": "dog", "box_224": [1, 2, 3.6, 224], "media": ONE, "seconds": 5},
            None,
            {"object": "dog", "box": [1, 2, 4, 224]},
            {"windows": "five", "second": None},
        ),
        ("s4", {"object": "dog and man", "second": "4"}, None, {"objects": ["dog", "man"]}, {}),
        (
            "ms3",
            {"object": ["dog"], "media": ONE},
            f"{IMAGE}{AUDIO}Please segment out the object that makes the sound in the image.",
            {"objects": ["dog"]},
            {},
        ),
        (
            "avss",
            {"object": "dog", "media": ONE},
            f"{IMAGE}{AUDIO}Please recognize the category of the object making the sound in the image and "
            "segment it out.",
            {"objects": ["dog"]},
            {},
        ),
        (
            "ref-avs",
            {"expression": "The loud one", "object": "dog", "second": "3"},
            f"{VIDEO}{AUDIO}Please segment out the loud one at the fourth second in the video.",
            {"expression": "The loud one", "object": "dog", "split": "seen"},
            {},
        ),
        (
            "ref-avs",
            {"expression": "The loud one", "object": "Nothing", "media": ONE, "type": "seen"},
            f"{IMAGE}{AUDIO}Please segment out the loud one in the image.",
            {"expression": "The loud one", "object": "", "split": "null"},
            {"empty": True},
        ),
        (
            "ref-avs",
            {"expression": "it", "object": "dog", "type": "Unseen"},
            None,
            {"expression": "it", "object": "dog", "split": "unseen"},
            {},
        ),
        (
            "avcap",
            {"answer": "A dog barks."},
            f"{VIDEO}{AUDIO}Please describe this video and audio.",
            {"captions": ["A dog barks."]},
            {"windows": "ten"},
        ),
        (
            "avcap",
            {"answer": ["A dog  barks.", "A dog."], "media": "audio"},
            f"{AUDIO}Please describe this audio.",
            {"captions": ["A dog barks.", "A dog."]},
            {"windows": "ten"},
        ),
    ],
)
def test_what_a_row_becomes(name, cells, prompt, meta, fields):
    task = TASKS[name]
    made = made_of(task, row(name, **cells))
    second = int(cells.get("second") or 0)
    if task.answer == "mask":
        fields = {"mask": None, "empty": False, **fields}
    asked = {"second": second} if "second" in task.fields else {}
    if "expression" in task.fields:
        asked["expression"] = cells["expression"]
    assert made.instruction == (prompt or task.instruction(**asked))
    assert made.meta == meta and made.fields == fields
    assert made.arguments == arguments_of(task, meta, second)
    assert list(wrong_fields(task, meta, ("answer",))) == []
    assert disagreements_of(task, task.target(**made.arguments), made.arguments, meta, second) == []


@pytest.mark.parametrize(
    ("name", "cells", "field", "said"),
    [
        ("avqa", {"question": "Is it?"}, "answer", "is empty, and avqa needs it"),
        ("avqa", {"answer": "yes"}, "question", "is empty"),
        ("avqa", {"question": "Is it?", "answer": "yes", "type": "Audio/Dancing"}, "type", "'Audio/Dancing'"),
        ("avqa", {"question": "Is it?", "answer": "yes", "media": ONE}, "media", "a video or pictures of a clip"),
        ("avqa", {"question": "Is it?", "answer": "yes", "media": "audio"}, "media", "not about sound alone"),
        ("avqa", {"question": "Is it?", "answer": "yes", "media": "video image"}, "media", "a video and one picture"),
        ("ave", {}, "events", "is empty, and ave needs it"),
        ("ave", {"events": "Dog 2-5; Cat 3-4"}, "events", "holds 2 events, and ave asks about one"),
        ("ave", {"events": "Dog 2-5", "media": ONE}, "media", "not about one picture"),
        ("ave", {"events": "Dog"}, "events", "cannot be read: 'Dog'"),
        ("ave", {"events": "Dog 2-5 Cat 3-4"}, "events", "holds two events without a `;` between"),
        ("ave", {"events": "Dog 5-2"}, "events", "holds ['Dog', 5, 2]"),
        ("ave", {"events": "Dog 3-3"}, "events", "holds ['Dog', 3, 3]"),
        ("ave", {"events": "Dog 2-11"}, "events", "holds ['Dog', 2, 11]"),
        ("ave", {"events": [3]}, "events", "holds [3]"),
        ("avvp", {}, "events", "is empty"),
        ("avvp", {"events": "Dog 2-5"}, "events", "does not say whether 'Dog 2-5' is heard or seen"),
        ("avvp", {"events": "audio: Dog 2-5"}, "events", "does not say what is heard and what is seen"),
        ("avvp", {"events": "audio: Dog 2-5; audio: Cat 2-5"}, "events", "says audio: twice"),
        ("avvp", {"events": "audio: Dog 2-5; visual:"}, "events", "is empty, and avvp needs it"),
        (
            "arig",
            {"object": "dog", "box_224": "1 2 3 4"},
            "media",
            "arig is asked about one picture, not about a video",
        ),
        ("arig", {"object": "dog", "media": ONE}, "box", "is empty, and so is box_224"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 2 3 4", "box_224": "1 2 3 4"}, "box", "beside box_224"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 2 3"}, "box", "is '1 2 3'"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 2 3 4 px"}, "box", "is '1 2 3 4 px'"),
        ("arig", {"object": "dog", "media": ONE, "box": [1, 2, 3, "4"]}, "box", "is [1, 2, 3, '4']"),
        ("arig", {"object": "dog", "media": ONE, "box": "3 2 3 4"}, "box", "not in order"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 4 3 4"}, "box", "not in order"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 2 449 4"}, "box", "leaves the picture of 448 x 112"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 2 3 113"}, "box", "leaves the picture"),
        ("arig", {"object": "dog", "media": ONE, "box": "-1 2 3 4"}, "box", "leaves the picture"),
        ("arig", {"object": "dog", "media": ONE, "box": "1 -2 3 4"}, "box", "leaves the picture"),
        ("arig", {"object": "dog", "media": ONE, "box_224": "0 0 1 1"}, "box_224", "shares of the picture"),
        ("s4", {}, "object", "is empty, and s4 needs it"),
        ("ref-avs", {"expression": "it"}, "object", "is empty"),
        ("ref-avs", {"expression": "it", "object": "dog", "type": "known"}, "type", "is 'known'"),
        ("avcap", {"answer": "A dog.", "media": ONE}, "media", "a video or pictures of a clip"),
        ("avcap", {"answer": ["A dog.", 3]}, "answer", "is 3, not text"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_by_its_column(name, cells, field, said):
    with pytest.raises(InputError) as error:
        made_of(TASKS[name], row(name, **cells))
    assert error.value.where == "table.csv:2" and error.value.field == field and said in error.value.problem


@pytest.mark.parametrize(
    ("name", "columns", "cells", "arguments", "meta", "fields"),
    [
        (
            "avqa",
            ("question", "answer", "type"),
            {"question": "Is  it?", "answer": "17", "type": '["Audio", "Counting"]'},
            {"answer": "17"},
            {"question": "Is it?", "answer": "17", "type": ["Audio", "Counting"]},
            {"windows": "ten", "second": None},
        ),
        (
            "ave",
            ("event", "start", "end"),
            {"event": " Dog ", "start": "2", "end": 5, "second": "3"},
            DOG,
            DOG,
            {"windows": "ten", "second": 3},
        ),
        (
            "arig",
            ("object", "box", "box_224", "second"),
            {"object": "dog", "box": "40 10 448 112", "media": ONE, "seconds": 5},
            {"object": "dog", "box": [20, 20, 224, 224]},
            {"object": "dog", "box": [20, 20, 224, 224]},
            {"windows": "five", "second": None},
        ),
        (
            "s4",
            ("second", "objects", "video", "mask"),
            {"objects": '["dog"]', "second": "3", "mask": "m.png"},
            {"objects": ["dog"], "second": 3},
            {"objects": ["dog"]},
            {"mask": "m.png", "empty": False},
        ),
        (
            "s4",
            ("second", "objects", "video", "mask"),
            {"objects": ["dog"], "video": "clip", "media": ONE},
            {"objects": ["dog"], "second": 0},
            {"objects": ["dog"], "video": "clip"},
            {"mask": None, "empty": False},
        ),
        (
            "ref-avs",
            ("expression", "second", "object", "split", "mask"),
            {"expression": "it", "object": "dog", "split": "seen", "second": 2},
            {"expression": "it", "object": "dog", "second": 2},
            {"expression": "it", "object": "dog", "split": "seen"},
            {"mask": None, "empty": False},
        ),
    ],
)
def test_a_task_without_a_reader_of_rows_has_a_column_for_each_field(name, columns, cells, arguments, meta, fields):
    """docs/your_data.md, "A task of your own": cells are text, or JSON where text does not fit."""
    task = dataclasses.replace(TASKS[name], columns=None, from_row=None)
    assert columns_of(task) == columns
    made = made_of(task, row(name, **cells))
    assert (made.arguments, made.meta, made.fields) == (arguments, meta, fields)
    asked = {field: meta[field] for field in task.fields if field != "second"}
    asked |= {"second": arguments["second"]} if "second" in task.fields else {}
    variant = "quick" if task.answer == "mask" and "image" in cells.get("media", "") else "train"
    assert made.instruction == task.instruction(variant=variant, **asked)


@pytest.mark.parametrize(
    ("name", "cells", "field", "said"),
    [
        ("avqa", {"question": "Is it?"}, "answer", "is empty, and avqa needs it"),
        ("avqa", {"answer": "yes"}, "question", "is empty, and avqa needs it"),
        ("avqa", {"question": "Is it?", "answer": "a <b>"}, "answer", "is 'a <b>'"),
        ("avqa", {"question": "Is it?", "answer": "yes", "type": "Dancing"}, "type", "is 'Dancing'"),
        ("avqa", {"question": "Is it?", "answer": "yes", "media": ONE}, "media", "a video or pictures of a clip"),
        ("ave", {"event": "Dog", "start": "6", "end": "5"}, "end", "is '5'"),
        ("ave", {"event": "Dog", "start": 1, "end": "11"}, "end", "is '11'"),
        ("arig", {"object": "dog", "box_224": "1 2 3 4"}, "media", "arig is asked about one picture"),
        ("avcap", {"captions": ["a <b>"]}, "captions", "is 'a <b>'"),
    ],
)
def test_a_cell_that_does_not_fit_its_field_is_refused(name, cells, field, said):
    task = dataclasses.replace(TASKS[name], columns=None, from_row=None)
    with pytest.raises(InputError) as error:
        made_of(task, row(name, **cells))
    assert error.value.where == "table.csv:2" and error.value.field == field and said in error.value.problem


def test_a_question_about_a_second_needs_one_unless_its_mask_says_which():
    task = dataclasses.replace(TASKS["avqa"], fields=("question", "second"), from_row=None)
    with pytest.raises(InputError, match="second.*is empty, and avqa needs it"):
        made_of(task, row("avqa", question="Is it?", answer="yes"))


ARIG = (
    "The sounding object is {}. Its coordinate of top left corner is ({},{}) and coordinate of bottom right corner "
    "is ({},{})"
)
AVS = (
    "The object making the sound in the video is {}. The mask of the object that makes the sound at the {} second is M"
)
REF = "At the {} second in the video, {}. Its mask is M"
AVE_TEXT = "The event is <event> {} </event>, the time range is <range> {} </range>."


# Constant answers: the best one is the baseline "constant" of docs/evaluation.md.


def constants(name: str, metas: list[dict[str, Any]], masks: list[Any] | None = None) -> list[Any]:
    return list(TASKS[name].constants(metas, masks or [None] * len(metas)))


def test_constant_answers_of_questions_are_the_three_most_frequent():
    metas = [{"answer": word} for word in "no yes yes two one no yes".split()]
    text = "So the answer is <answer> {} </answer>."
    assert constants("avqa", metas) == [(text.format(word), None) for word in ("yes", "no", "two")]


def test_constant_answers_of_ave_are_the_three_most_frequent_events_over_every_range():
    metas = [{**DOG, "event": event} for event in "Cat Dog Dog Bus Bus Goat Cat Dog".split()]
    found = constants("ave", metas)
    text = "So the audible and visible event in the video is <event> {} </event>, "
    text += "and the time range is <range> {} </range>."
    assert len(found) == 3 * (1 + 55) and len(set(found)) == len(found)  # 0,0 and the pairs of eleven seconds
    assert found[0] == (text.format("Dog", "0,0"), None) and found[1] == (text.format("Dog", "0,1"), None)
    assert found[-1] == (text.format("Bus", "9,10"), None)


def test_constant_answers_of_avvp_hold_whole_clips_and_median_spans():
    metas = [
        {"audio": [["Dog", 0, 4], ["Cat", 1, 2]], "visual": []},
        {"audio": [["Dog", 2, 6]], "visual": []},
        {"audio": [["Dog", 7, 9], ["Cat", 3, 4], ["Bus", 0, 1], ["Axe", 0, 1]], "visual": []},
    ]
    found = [TASKS["avvp"].parse(text)["audio"] for text, mask in constants("avvp", metas) if mask is None]
    whole = [["Dog", 0, 10], ["Cat", 0, 10], ["Axe", 0, 10]]  # as frequent as Bus, and before it
    median = [["Dog", 2, 6], ["Cat", 2, 3], ["Axe", 0, 1]]
    assert found == [[], whole[:1], whole[:2], whole, median[:1], median[:2], median]
    assert len(constants("avvp", [*metas, {"audio": [], "visual": [["Dog", 2, 5]]}])) == 7 * 3


def test_constant_answers_of_arig_are_four_boxes_of_the_most_frequent_object():
    metas = [{"object": "cat", "box": [0, 0, 10, 10]}, {"object": "dog", "box": [2, 2, 10, 12]}]
    metas += [{"object": "dog", "box": [40, 4, 100, 50]}]

    boxes = [(14, 2, 40, 24), (2, 2, 10, 12), (0, 0, 224, 224), (56, 56, 168, 168)]  # mean, median, full, central
    assert constants("arig", metas) == [(ARIG.format("dog", *box), None) for box in boxes]


def test_constant_answers_of_captions_are_the_most_frequent_one_and_those_of_common_words():
    captions = [["x y z", "a dog barks"], ["x y z", "a dog"], ["a dog runs far"], ["a cat"]]
    # Captions that hold a word: a 4, dog 3, x, y, z 2, others 1. Means: "a dog" 3.5, "a dog barks" 8/3, "a cat" 2.5.
    found = constants("avcap", [{"captions": list(texts)} for texts in captions])
    assert found == [(text, None) for text in ("x y z", "a dog", "a dog barks", "a cat")]
    assert constants("avcap", [{"captions": ["?"]}]) == [("?", None)]


def test_constant_answers_of_masks_are_the_masks_of_the_most_frequent_objects():
    metas = [{"objects": ["cat"]}, {"objects": ["dog", "man"]}, {"objects": ["dog", "man"]}]
    masks = [np.eye(4), np.eye(4), None]
    said = AVS.format("dog and man", "first").removesuffix("M") + MASK
    found = constants("s4", metas, masks)
    # The mean map, its cuts at 0.1 to 0.5, nothing, everything, and the middle.
    assert [text for text, _ in found] == [said] * 9
    middle = np.zeros((4, 4))
    middle[1:3, 1:3] = 1
    expected = [np.eye(4)] * 6 + [np.zeros((4, 4)), np.ones((4, 4)), middle]
    assert all(np.array_equal(mask, wanted) for (_, mask), wanted in zip(found, expected, strict=True))
    assert constants("s4", metas) == [(said, None)]
    ref = [{"expression": "it", "object": ""}] * 2 + [{"expression": "it", "object": "dog"}]
    said = REF.format("first", "it does not appear").removesuffix("M") + MASK
    assert constants("ref-avs", ref) == [(said, None)]
    assert [text for text, _ in constants("ref-avs", ref, [np.eye(4), None, None])] == [said] * 9


def test_constant_answers_of_avss_are_maps_of_classes():
    metas = [{"objects": ["dog"]}] * 2
    first = np.zeros((4, 4), int)
    first[0] = 17
    second = first.copy()
    second[0, 0], second[3] = 3, 5
    (text, frequent), *filled = constants("avss", metas, [first, first, second])
    assert text.startswith("The object making the sound in the video is dog.") and np.array_equal(frequent, first)
    assert len(filled) == 9 and np.array_equal(filled[7][1], np.full((4, 4), 17))  # everything
    assert np.array_equal(filled[6][1], np.zeros((4, 4)))  # nothing
    assert constants("avss", metas) == [(text, None)]


# How a target may differ from its label.


@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        ("avqa", "Two it is: <answer> Two </answer>.", []),
        ("avqa", "<answer> one </answer>", ["the answer is 'one', the label says 'two'"]),
        ("avqa", "two", ["0 <answer> tags where one is needed", "the answer is '', the label says 'two'"]),
        ("avqa", "<answer>one</answer> <answer>two</answer>", ["2 <answer> tags where one is needed"]),
        ("ave", AVE_TEXT.format("dog", "2, 5"), []),
        ("ave", AVE_TEXT.format("cat", "2,5"), ["the event is 'cat', the label says 'Dog'"]),
        ("ave", AVE_TEXT.format("Dog", "2,6"), ["the range is 2,6, the label says 2,5"]),
        ("ave", AVE_TEXT.format("Dog", "3,5"), ["the range is 3,5, the label says 2,5"]),
        ("ave", AVE_TEXT.format("Dog", "2-5"), ["the range '2-5' is not `start,end`"]),
        (
            "ave",
            "<range> 2,5 </range>",
            ["0 <event> tags where one is needed", "the parser of the task reads another range"][:1],
        ),
        (
            "ave",
            "<event> Dog </event> <range> 2,5 </range> <range> 7,9 </range>",
            ["2 <range> tags where one is needed", "the range is 7,9, the label says 2,5"],
        ),
        ("arig", ARIG.format("Dog", 10, 20, 110, 120), []),
        ("arig", ARIG.format("dog", 11, 19, 110, 121), []),  # by rounding
        ("arig", ARIG.format("dog", 12, 20, 110, 120), ["x1 is 12, the label says 10"]),
        (
            "arig",
            ARIG.format("dog", 10, 22, 108, 122),
            ["y1 is 22, the label says 20", "x2 is 108, the label says 110", "y2 is 122, the label says 120"],
        ),
        ("arig", ARIG.format("cat", 10, 20, 110, 120), ["the object is 'cat', the label says 'dog'"]),
        ("arig", "A dog is at (10,20) (110,120).", []),
        ("arig", "A hotdog is at (10,20) (110,120).", ["the object 'dog' is not named"]),
        ("arig", "A dog is there.", ["no two corners in order can be read"]),
        ("s4", AVS.format("man and dogs", "fourth"), []),
        ("s4", AVS.format("man", "fourth"), ["the objects are ['man'], the label says ['dog', 'man']"]),
        ("s4", AVS.format("man and dogs", "third"), ["the third second, not the fourth"]),
        ("s4", "Nothing.", ["the objects are [], the label says ['dog', 'man']", "the missing second, not the fourth"]),
        ("ms3", AVS.format("anything", "fourth"), []),
        ("ref-avs", REF.format("fourth", "the loud one is a dog"), []),
        ("ref-avs", REF.format("third", "the loud one is a dog"), ["the third second, not the fourth"]),
        ("ref-avs", REF.format("fourth", "the loud one is cat"), ["the object is cat, the label says dog"]),
        (
            "ref-avs",
            REF.format("fourth", "the loud one does not appear"),
            ["the object is nothing, the label says dog"],
        ),
        ("ref-avs", REF.format("fourth", "it is dog"), ["does not repeat the expression"]),
        (
            "ref-avs",
            "The loud one.",
            ["the object is unreadable, the label says dog", "the missing second, not the fourth"],
        ),
        ("avcap", "A dog barks.", []),
        ("avcap", "A dog.", []),
        ("avcap", "A cat.", ["is none of the captions"]),
    ],
)
def test_how_a_target_differs_from_its_label(name, text, problems):
    task = TASKS[name]
    assert disagreements_of(task, text, arguments_of(task, LABELS[name], 3), LABELS[name], 3) == problems


AV = "<visual_event> {} </visual_event> and <audio_event> {} </audio_event>"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (AV.format("cat,(0 10)", "Dog,(2 5),(7 9)"), []),
        (AV.format("Cat,(0 10)", "Dog,(2 5) , (7 8),(8 9)"), []),
        (AV.format("Cat,(0 10)", "Dog,(2 5)"), ["the audio times of 'Dog' differ from the label"]),
        (AV.format("Cat,(1 10)", "Dog,(2 5),(7 9)"), ["the visual times of 'Cat' differ from the label"]),
        (AV.format("none", "Dog,(2 5),(7 9)"), ["the visual times of 'Cat' differ from the label"]),
        (AV.format("Cat,(0 10)", "Bus,(2 5)"), ["the event 'Bus' is not in the label"]),
        (AV.format("Cat,(0 10)", "Dog 2-5"), ["the audio event 'Dog 2-5' is not `name,(start end),...`"]),
        (AV.format("Cat,(0 10)", "Dog,(5 5)"), ["the audio event 'Dog' has the impossible time (5 5)"]),
        (AV.format("Cat,(0 11)", "Dog,(2 5),(7 9)"), ["the visual event 'Cat' has the impossible time (0 11)"]),
        ("Dog", ["holds no event tag"]),
    ],
)
def test_how_a_target_of_avvp_differs_from_its_label(text, problems):
    label = {"audio": [["Dog", 2, 5], ["Dog", 7, 9]], "visual": [["Cat", 0, 10]]}
    arguments = arguments_of(TASKS["avvp"], label)
    assert disagreements_of(TASKS["avvp"], text, arguments, label, 0) == problems


def test_a_target_of_a_weak_label_of_avvp_names_its_events_at_any_time():
    label = {"labels": ["Dog", "Cat"]}
    assert disagreements_of(TASKS["avvp"], AV.format("cat,(0 1)", "Dog,(2 5)"), {}, label, 0) == []
    assert disagreements_of(TASKS["avvp"], AV.format("none", "Dog,(2 5)"), {}, label, 0) == [
        "the event 'Cat' of the label is missing"
    ]


def test_moving_text_between_senses_is_noticed_for_each():
    label = {"audio": [["Dog", 0, 4]], "visual": []}
    found = disagreements_of(
        TASKS["avvp"], AV.format("Dog,(0 4)", "none"), arguments_of(TASKS["avvp"], label), label, 0
    )
    assert sorted(found) == [
        "the audio times of 'Dog' differ from the label",
        "the visual times of 'Dog' differ from the label",
    ]


# What looks wrong in a label whose fields are valid: True where it is wrong, False where it is only odd.


@pytest.mark.parametrize(
    ("name", "label", "odd"),
    [
        ("avqa", {"answer": "two"}, []),
        ("avqa", {"answer": "no"}, []),
        ("avqa", {"answer": "nan"}, [(False, "answer", "is 'nan', which stands for no value")]),
        ("avqa", {"answer": "2.5"}, [(False, "answer", "is '2.5', a number")]),
        ("avqa", {"answer": "B"}, [(False, "answer", "is 'B', a letter or a sentence; it is compared word for word")]),
        ("avqa", {"answer": "It is."}, [(False, "answer", "is 'It is.', a letter or a sentence; it is compared")]),
        ("avqa", {"answer": "one two three four five"}, []),
        ("avqa", {"answer": "one two three four five six"}, [(False, "answer", "is 'one two three four five six', a")]),
        ("ave", DOG, []),
        ("ave", {**DOG, "start": 0, "end": 0}, []),  # nothing happens
        ("ave", {**DOG, "start": 5}, [(True, "", "'Dog' lasts from 5 to 5, which is no time")]),
        ("avvp", LABELS["avvp"], []),
        ("avvp", {"labels": ["Dog"]}, []),
        ("avvp", {"audio": [["Dog", 4, 4]], "visual": []}, [(True, "", "'Dog' lasts from 4 to 4, which is no time")]),
        ("avvp", {"audio": [["Dog", 0, 3], ["Dog", 3, 5]], "visual": [["Dog", 1, 9]]}, []),
        ("avvp", {"audio": [["Dog", 2, 5], ["Dog", 0, 3]], "visual": []}, [(False, "audio", "spans of 'Dog' overlap")]),
        ("avvp", {"audio": [], "visual": [["A", 0, 3], ["B", 2, 5]]}, []),
        ("avvp", {"audio": [], "visual": [["B", 0, 3], ["B", 2, 5]]}, [(False, "visual", "spans of 'B' overlap")]),
        ("arig", LABELS["arig"], []),
        ("arig", {"box": [0, 0, 1, 1]}, [(True, "box", "is [0, 0, 1, 1], which seem to be shares of the picture")]),
        ("arig", {"box": [0, 0, 2, 2]}, []),
        ("arig", {"box": [0, 0, 224, 224]}, [(False, "box", "is [0, 0, 224, 224], the whole picture")]),
        ("arig", {"box": [0, 0, 224, 223]}, []),
        ("arig", {"box": [5, 0, 5, 9]}, [(False, "box", "is [5, 0, 5, 9], which has no area")]),
        ("arig", {"box": [5, 9, 6, 9]}, [(False, "box", "is [5, 9, 6, 9], which has no area")]),
        ("s4", {"objects": ["dog", "man"]}, []),
        ("s4", {"objects": ["dog", " dog"]}, [(False, "objects", "names one twice: ['dog', 'dog']")]),
        ("ref-avs", LABELS["ref-avs"], []),
        ("avcap", {"captions": ["A dog.", "Dog"]}, []),
        ("avcap", {"captions": ["A dog.", "N/A"]}, [(True, "captions", "holds 'N/A', which is no caption")]),
        ("avcap", {"captions": [" clip.mp4 "]}, [(True, "captions", "holds ' clip.mp4 ', which is no caption")]),
    ],
)
def test_what_looks_wrong_in_a_label(name, label, odd):
    found = [(one.wrong, one.field, one.problem) for one in TASKS[name].oddities(label)]
    assert [one[:2] for one in found] == [one[:2] for one in odd]
    assert all(problem.startswith(said) for (*_, problem), (*_, said) in zip(found, odd, strict=True))


def test_names_that_stand_for_nothing_or_are_numbers():
    found = list(odd_names(("dog", "NaN", "n/a", "17", "2 dogs", ""), "objects"))
    assert all(one.wrong and one.field == "objects" for one in found)
    stands = "which stands for no value"
    assert [one.problem for one in found] == [
        f"is 'NaN', {stands}",
        f"is 'n/a', {stands}",
        "is '17', a number",
        f"is '', {stands}",
    ]
