"""What all tasks share: labels and their checks, audio windows, scores by class, and how tags and names are read."""

import dataclasses
import math

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import (
    Task,
    arguments_of,
    by_group,
    disagreements_of,
    is_list,
    is_number,
    is_text,
    is_whole,
    sample_metric,
    sample_score,
    shown_label,
    windows_for,
    wrong_fields,
)
from crab_jax.tasks.text import find_tags, normalise, object_words, plain


@pytest.mark.parametrize("value", ["", " ", "\n", "a<b", "a>b", "a\nb", None, 3, ["a"], True])
def test_text_says_something_on_one_line_without_brackets(value):
    assert not is_text(value) and is_text("a") and is_text("Frying (food), 2")


def test_numbers_of_a_label():
    assert is_whole(0, 0, 10) and is_whole(10, 0, 10) and is_number(0, 0, 10) and is_number(10.0, 0, 10)
    for value in (-1, 11, "3", None, True):
        assert not is_whole(value, 0, 10) and not is_number(value, 0, 10)
    assert not is_whole(3.0, 0, 10) and is_number(3.5, 0, 10)
    assert not is_number(math.nan, 0, 10) and not is_number(math.inf, 0, math.inf)


def test_lists_of_a_label():
    assert is_list([], is_text) and is_list(("a",), is_text, 1) and is_list(["a", "b"], is_text)
    assert not is_list([], is_text, 1) and not is_list(["a", ""], is_text) and not is_list("ab", is_text)


LABELS = {
    "ave": {"event": "Dog", "start": 2, "end": 5},
    "avqa": {"answer": "yes", "type": ["Audio", "Counting"]},
    "avvp": {"audio": [["Dog", 0, 10]], "visual": []},
    "avcap": {"captions": ["a dog", "it barks"]},
    "arig": {"object": "dog", "box": [0, 10.5, 224, 10.5]},
    "s4": {"objects": ["dog"], "video": "clip"},
    "ms3": {"objects": [], "video": None},
    "avss": {"objects": ["dog", "man"]},
    "ref-avs": {"expression": "the loud one", "object": "dog", "split": "seen"},
}


@pytest.mark.parametrize("name", LABELS)
def test_a_sound_label_has_no_wrong_field(name):
    assert list(wrong_fields(TASKS[name], LABELS[name])) == []
    assert list(wrong_fields(TASKS[name], {**LABELS[name], "beside": object()})) == []


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("ave", "event", ("", None, "a\nb")),
        ("ave", "start", (-1, 11, 2.0, True, "2")),
        ("ave", "end", (1, 11, None)),
        ("avqa", "answer", ("", 2)),
        ("avqa", "type", (["Audio"], ["Audio", "Dancing"], "Audio", [1], None)),
        ("avvp", "audio", ("Dog", [["Dog", 0]], [["Dog", 0, 11]], [["", 0, 1]], [["Dog", 0.0, 1]], [["Dog", 0, 1, 2]])),
        ("avvp", "visual", (None, [["Dog", -1, 3]])),
        ("avcap", "captions", ([], [" "], ["a", 1], "a dog")),
        ("arig", "object", ("", None)),
        ("arig", "box", ([0, 0, 5], [0, 0, 5, 5, 5], [6, 0, 5, 5], [0, 6, 5, 5], [0, 0, 225, 5], [0, -1, 5, 5])),
        ("s4", "objects", (["dog", ""], "dog", None)),
        ("s4", "video", (3, ["clip"])),
        ("ref-avs", "expression", ("", None)),
        ("ref-avs", "object", (None, " ", 3)),
        ("ref-avs", "split", ("null", "Seen", "", None)),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_it_must_be(name, field, values):
    for value in values:
        ((found, problem, must_be),) = wrong_fields(TASKS[name], {**LABELS[name], field: value})
        assert found == field and problem == f"is {value!r:.60}" and must_be == TASKS[name].label[field].must_be


def test_a_null_expression_has_no_object_and_the_other_way_round():
    null = {"expression": "it", "object": "", "split": "null"}
    assert not list(wrong_fields(TASKS["ref-avs"], null))
    assert [name for name, *_ in wrong_fields(TASKS["ref-avs"], {**null, "split": "seen"})] == ["split"]


@pytest.mark.parametrize(
    ("name", "target", "score"),
    [
        ("ave", ["event", "start", "end"], []),
        ("avqa", ["answer"], []),
        ("avvp", ["audio", "visual"], []),
        ("avcap", ["captions"], []),
        ("arig", ["object", "box"], []),
        ("s4", ["objects"], ["video"]),
        ("avss", ["objects"], []),
        ("ref-avs", ["expression", "object"], ["split"]),
    ],
)
def test_which_fields_a_target_and_a_score_need(name, target, score):
    task = TASKS[name]
    assert [field for field, *_ in wrong_fields(task, {}, ("answer",))] == target
    missing = [(field, problem) for field, problem, _ in wrong_fields(task, {})]
    assert missing == [(field, "missing") for field in task.label if field in (*target, *score)]


@pytest.mark.parametrize(
    ("name", "seconds", "whole", "one"),
    [
        ("ave", 10.0, "ten", "ten"),
        ("ave", 60.0, "ten", "ten"),
        ("avqa", 10.0, "ten", "ten"),
        ("avqa", 30.0, "ten", "ten"),
        ("avqa", 30.1, "music_avqa", "music_avqa"),
        ("s4", 5.0, "five", "one_of_five"),
        ("s4", 7.4, "five", "one_of_five"),
        ("s4", 7.5, "ten", "one"),
        ("arig", 5.0, "five", "one_of_five"),
        ("arig", 10.0, "ten", "one"),
        ("avss", 5.0, "ten", "one"),
        ("avss", 10.0, "ten", "one"),
        ("ref-avs", 10.0, "ten", "ten"),
        ("avcap", 5.0, "ten", "ten"),
    ],
)
def test_the_windows_of_a_clip(name, seconds, whole, one):
    assert windows_for(TASKS[name], seconds) == whole
    assert windows_for(TASKS[name], seconds, one_window=True) == one


def test_what_every_task_is():
    assert [name for name, task in TASKS.items() if task.timed] == ["ave", "avvp"]
    kinds = {name: task.mask_kind for name, task in TASKS.items() if task.mask_kind != "none"}
    assert kinds == {"s4": "binary", "ms3": "binary", "avss": "semantic", "ref-avs": "binary"}
    assert {task.headline for task in TASKS.values()} == {
        "accuracy", "segment_type_av", "cider_d", "mean_iou", "miou", "j"}  # fmt: skip


def test_a_breakdown_scores_each_group_over_its_samples_in_alphabetical_order():
    mean = lambda samples: {"m": float(np.mean([s["x"] for s in samples]))}  # noqa: E731
    breakdown = by_group(lambda meta: meta["groups"], mean, "m")
    metas = [{"groups": ["b", "a"]}, {"groups": ["b"]}, {"groups": []}]
    found = breakdown([{"x": 1.0}, {"x": 0.0}, {"x": 9.0}], metas)
    assert found == {"a": (1.0, 1), "b": (0.5, 2)} and list(found) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "answers", "found"),
    [
        ("ave", [({"event": "Dog", "start": 0, "end": 10}, None)] * 2, {"Dog": (0.0, 2)}),
        (
            "avqa",
            [(LABELS["avqa"], "yes"), ({"answer": "no"}, "yes")],
            {"Audio/Counting": (1.0, 1), "no type": (0.0, 1)},
        ),
        ("arig", [(LABELS["arig"], None)], {"dog": (0.0, 1)}),
        ("avcap", [(LABELS["avcap"], None)], {}),
        (
            "avvp",
            [({"audio": [["Dog", 0, 9]], "visual": [["Cat", 1, 2]]}, None)],
            {"Cat": (1 / 3, 1), "Dog": (1 / 3, 1)},
        ),
    ],
)
def test_the_breakdown_of_a_task_is_by_class_or_type(name, answers, found):
    task = TASKS[name]
    samples = [task.stats(parsed, None, meta, None) for meta, parsed in answers]
    breakdown = task.breakdown(samples, [meta for meta, _ in answers])
    assert {key: (pytest.approx(score), count) for key, (score, count) in breakdown.items()} == found


def test_the_breakdown_of_masks_is_by_object_and_by_class():
    truth = np.array([[0, 17], [17, 17]])
    metas = [{"objects": ["dog", "dog"], "video": "a"}, {"objects": [], "video": "b"}]
    s4 = TASKS["s4"]
    samples = [s4.stats(None, mask, meta, truth) for meta, mask in zip(metas, (truth > 0, None), strict=True)]
    assert s4.breakdown(samples, metas) == {"dog": (1.0, 1), "nothing sounds": (0.0, 1)}
    samples = [TASKS["avss"].stats(None, mask, meta, truth) for meta, mask in zip(metas, (truth, None), strict=True)]
    assert TASKS["avss"].breakdown(samples, metas) == {"background": (pytest.approx(0.625), 2), "dog": (0.5, 2)}
    ref = {"expression": "it", "object": "tuba", "split": "seen"}
    samples = [TASKS["ref-avs"].stats(None, truth > 0, ref, truth)] * 2
    assert TASKS["ref-avs"].breakdown(samples, [ref, {**ref, "object": ""}]) == {"tuba": (1.0, 1)}


@pytest.mark.parametrize(
    ("name", "normal"),
    [("Male_speech,  man", "male speech man"), (" A-B ", "a b"), ("__", ""), ("Déjà Vu 2", "déjà vu 2")],
)
def test_names_are_compared_by_their_words(name, normal):
    assert normalise(name) == normal


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["the guitars", "A man"], {"guitar", "man"}),
        (["buses"], {"bus"}),
        (["churches", "brushes", "glasses"], {"church", "brush", "glass"}),
        (["wolves and geese"], {"wolf", "goose"}),
        (["bass", "bus", "tennis", "gas"], {"bass", "bus", "tennis", "gas"}),
        (["axes"], {"axe"}),
        (["none"], set()),
        (["nothing", "null"], set()),
        (["nothing", "dog"], {"nothing", "dog"}),
        ([], set()),
    ],
)
def test_what_object_names_say(names, words):
    assert object_words(names) == words


def test_control_tokens_are_no_part_of_a_text():
    assert plain("<s>[INST] A  dog\nbarks [/INST]</s><unk><PAD>.") == "A dog barks ."


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("<audio_event> a </audio_event> <visual> b </visual>", [("audio_event", "a"), ("visual", "b")]),
        ("<Audio-Event>a</Audio-Event>< audio event >b</x>", [("audio_event", "a"), ("audio_event", "b")]),
        ("<audio> a </audio> <audio> b", [("audio", "a")]),
        ("<visual> b <audio> a </audio>", [("visual", "b"), ("audio", "a")]),
        ("<audio> a, and the rest", [("audio", "a")]),
        ("<audio> a. And so on", [("audio", "a")]),
        ("<audio> a 0.5 b</s>", [("audio", "a 0.5 b")]),
        ("<audios> a </audios>", []),
    ],
)
def test_tags_in_what_a_model_wrote(text, tags):
    assert find_tags(text, ("audio_event", "visual_event", "audio", "visual")) == tags


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Counting it"}, "name"),
        ({"name": "question"}, "name"),
        ({"name": "text"}, "name"),
        ({"answer": "number"}, "answer"),
        ({"answer": "mask"}, "mask_kind"),
        ({"mask_kind": "binary"}, "mask_kind"),
        ({"fields": ("where",)}, "fields"),
        ({"windows": ("seven",)}, "windows"),
        ({"headline": "f1"}, "headline"),
        ({"ranked_by": "f1"}, "ranked_by"),
        ({"windows": ()}, "windows"),
        ({"name": "a" * 41}, "name"),
        *(({"name": name}, "name") for name in ("bce", "dice", "ce", "loss", "samples")),  # other names in logs
    ],
)
def test_a_task_checks_itself(changes, said):
    with pytest.raises(InputError, match=rf"\[{said}\]"):
        dataclasses.replace(TASKS["avqa"], **changes)


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"answer": "number"}, "use one of text, events, box, mask"),
        ({"answer": "mask"}, "use 'binary' or 'semantic' for answers of this kind"),
        ({"mask_kind": "binary"}, "use 'none' for answers of this kind"),
        ({"fields": ("where",)}, "use some of question, expression, second"),
        ({"windows": ("seven",)}, "use some of ten, five, music_avqa, one, one_of_five, none"),
        ({"headline": "f1"}, "use one of the metrics, accuracy, accuracy_substring, "),
        ({"ranked_by": "f1"}, "use one of the metrics, accuracy, accuracy_substring, "),
    ],
)
def test_a_refused_field_of_a_task_is_told_its_choices(changes, fix):
    with pytest.raises(InputError, match="task 'avqa'") as error:
        dataclasses.replace(TASKS["avqa"], **changes)
    assert error.value.fix.startswith(fix)


def test_a_task_may_have_any_of_the_kinds_that_there_are():
    every = {"fields": ("question", "expression", "second"), "name": "a-2_" + "b" * 36}
    every |= {"windows": ("ten", "five", "music_avqa", "one", "one_of_five", "none"), "ranked_by": "audio"}
    task = dataclasses.replace(TASKS["avqa"], **every)
    assert task.windows == every["windows"] and sample_metric(task) == "audio"
    for answer in ("text", "events", "box"):
        assert dataclasses.replace(task, answer=answer).mask_kind == "none"
    for kind in ("binary", "semantic"):
        assert dataclasses.replace(task, answer="mask", mask_kind=kind).mask_kind == kind


def test_a_task_that_defines_little_has_usual_answers_and_checks():
    """The fields that have a default: docs/your_data.md, "A task of your own"."""
    avqa = TASKS["avqa"]
    required = {name: getattr(avqa, name) for name in ("name", "instruction", "target", "parse", "stats", "reduce")}
    task = Task(**required, headline="accuracy", metrics=avqa.metrics, label=avqa.label)
    meta = {"answer": " yes ", "type": ["Audio", "Counting"], "beside": 1}
    assert task.answer == "text" and task.windows == ("ten",) and not task.timed and not task.about_picture
    assert not (task.own_words or task.several or task.sound_alone or task.drawn or task.answer_start)
    assert (task.constants([meta], [None]), task.breakdown([], []), task.oddities(meta)) == ([("", None)], {}, ())
    assert task.events(meta) == task.names(meta) == () and task.box(meta) is None and task.weak(meta) == ""
    assert arguments_of(task, meta) == {"answer": "yes"} and sample_metric(task) == "accuracy"
    assert shown_label(task, meta) == " yes , ['Audio', 'Counting']"
    assert disagreements_of(task, "<answer> yes </answer>", {"answer": "yes"}, meta, 0) == []
    assert disagreements_of(task, "<answer> no </answer>", {}, meta, 0) == []
    assert disagreements_of(task, "<answer> no </answer>", {"answer": "yes"}, meta, 0) == [
        "says 'no', the label says 'yes'"
    ]
    assert disagreements_of(task, "no", {"answer": "yes"}, meta, 0) == ["cannot be read as an answer to avqa"]


def test_samples_are_ranked_by_one_score():
    avqa, ref = TASKS["avqa"], TASKS["ref-avs"]
    right = avqa.stats("yes", None, {"answer": "yes"}, None)
    assert sample_score(avqa, right) == 1.0 and sample_score(dataclasses.replace(avqa, rank=lambda m: 7.0), right) == 7
    assert ref.rank({"j": 0.25}) == 0.25 and ref.rank({"j": float("nan"), "s_null": 0.25}) == 0.75
