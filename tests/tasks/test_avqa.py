"""MUSIC-AVQA: prompt, target, tolerant parsing, accuracy per type."""

import numpy as np
import pytest

from crab_jax.tasks.avqa import SUBTYPES, constants, instruction, parse, reduce, stats, target

META = {"answer": "more than ten", "type": ["Audio-Visual", "Counting"]}


def test_prompt_is_the_released_one():
    expected = (
        "This is a video:\n<video_start><video><video_end>\n"
        "This is an audio:\n<audio_start><audio><audio_end>\n"
        "Please answer this question: Is there a voiceover?"
    )
    assert {instruction(v, question="Is there a voiceover?") for v in ("train", "test", "quick")} == {expected}


@pytest.mark.parametrize("answer", ["yes", "more than ten", "acoustic_guitar"])
def test_target_reads_back(answer):
    assert target(answer) == f"So the answer is <answer> {answer} </answer>."
    assert parse(target(answer, reasoning="There are <b> and numbers 3.")) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<answer>more than ten</answer>",
        "<ANSWER> more than ten </ANSWER>",
        "< answer > more than ten < / answer >",
        "So the answer is <answer> more than ten",
        "So the answer is <answer> more than ten.</s><unk>",
        "<answer> two </answer> or rather <answer> more than ten </answer>",
        "<answer> more than ten </answer> <answer> more th",
        "<answer> more than ten </answer> <answer> </answer>",
        "<answer> more than ten </answers>",
        "<answer>\nmore than ten\n</answer>",
    ],
)
def test_sloppy_texts_are_read(text):
    assert parse(text) == "more than ten"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "</s>",
        "yes",
        "So the answer is yes.",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "<answer> </answer>",
        "<answer> . </answer>",
        "<answer> __ </answer>",
        "<answers> yes </answers>",
        "<ans> yes </ans>",
        "answer> yes </answer>",
        "<answer yes",
        "<answer_start> yes <answer_end>",
        "<event> yes </event>",
        "<range> 0,8 </range>",
        "<>yes</>",
        "<<>>",
        "<s>[INST] <<SYS>>",
        "[]",
        "{}",
        "null",
        "\x00",
        "\ufffd",
        "<answer><answer><answer>",
        "<answer>" * 400,
        "yes </answer>",
        "<mask_0><mask_1>",
        "< answer",
        "\u3000",
        "<answer></s>",
    ],
)
def test_unreadable_texts_give_none(text):
    assert parse(text) is None


@pytest.mark.parametrize("text", ["More than ten", "more_than_ten", " more  than ten. "])
def test_match_ignores_case_punctuation_and_underscores(text):
    assert stats(text, None, META, None)["correct"] == 1.0


def test_substring_match_is_looser_and_only_that():
    near = stats("a piano", None, {"answer": "piano", "type": ["Visual", "Location"]}, None)
    assert (near["correct"], near["substring"]) == (0.0, 1.0)
    assert stats(None, None, META, None) == {"correct": 0.0, "substring": 0.0, "type": "audio_visual_counting"}


def test_accuracies_equal_a_count_by_hand():
    rng = np.random.default_rng(2)
    types = [["Audio", "Counting"], ["Audio", "Comparative"], ["Visual", "Location"], ["Audio-Visual", "Temporal"]]
    rows = [(types[rng.integers(4)], bool(rng.integers(2)), rng.random() < 0.2) for _ in range(200)]
    samples = [
        stats(None if lost else "yes" if right else "no", None, {"answer": "yes", "type": kind}, None)
        for kind, right, lost in rows
    ]
    metrics = reduce(samples)
    good = [right and not lost for _, right, lost in rows]
    assert metrics["accuracy"] == pytest.approx(np.mean(good))
    for key, wanted in {
        "audio": types[:2],
        "audio_counting": types[:1],
        "visual": types[2:3],
        "audio_visual": types[3:],
        "audio_visual_temporal": types[3:],
    }.items():
        assert metrics[key] == pytest.approx(
            np.mean([g for g, (kind, *_) in zip(good, rows, strict=True) if kind in wanted])
        )
    assert "visual_counting" not in metrics
    assert reduce(samples[::-1]) == pytest.approx(metrics)
    assert reduce([]) == {}


def test_every_released_type_is_known():
    released = [
        ["Audio", "Counting"],
        ["Audio", "Comparative"],
        ["Visual", "Counting"],
        ["Visual", "Location"],
        ["Audio-Visual", "Existential"],
        ["Audio-Visual", "Counting"],
        ["Audio-Visual", "Location"],
        ["Audio-Visual", "Comparative"],
        ["Audio-Visual", "Temporal"],
    ]
    assert tuple(stats("x", None, {"answer": "x", "type": kind}, None)["type"] for kind in released) == SUBTYPES


def test_a_question_without_a_type_counts_overall():
    assert reduce([stats("yes", None, {"answer": "yes"}, None)]) == {"accuracy": 1.0, "accuracy_substring": 1.0}


def test_the_first_constant_is_the_most_frequent_answer():
    metas = [{"answer": a} for a in ("no", "yes", "yes", "two")]
    assert constants(metas, [None] * 4)[0] == (target("yes"), None)


@pytest.mark.parametrize("answer", ["", " ", "?", "--", "😀"])
def test_a_label_without_a_word_is_refused(answer):
    """An answer that cannot be read would equal it."""
    with pytest.raises(ValueError, match="holds no word"):
        stats(None, None, {"answer": answer, "type": META["type"]}, None)
