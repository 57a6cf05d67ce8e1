"""AVVP: prompt, target, tolerant parsing, F-scores against golden numbers and against counting by hand."""

import numpy as np
import pytest

from crab_jax.tasks.avvp import constants, f_scores, instruction, occurrence, parse, reduce, stats, target

DOG = {"audio": [["Dog", 0, 10]], "visual": [["Dog", 0, 1], ["Dog", 3, 6]]}


def test_prompts_are_the_released_ones():
    head = "This is a video:\n<video_start><video><video_end>\nThis is an audio:\n<audio_start><audio><audio_end>\n"
    assert (
        instruction()
        == instruction("test")
        == head
        + (
            "Please determine the events that occur based on the visual and audio information in the video, "
            "as well as the start and end times of these events."
        )
    )
    assert instruction("quick") == head + (
        "Please determine the events that occur based on the visual and audio "
        "information, as well as the start and end time of these events."
    )


def test_target_has_one_tag_per_event():
    assert target(**DOG, reasoning="It barks.") == (
        "It barks. Therefore, visual and audio events are: <visual_event> Dog,(0 1),(3 6) </visual_event> and "
        "<audio_event> Dog,(0 10) </audio_event>."
    )


@pytest.mark.parametrize(
    "label",
    [
        DOG,
        {"audio": [], "visual": []},
        {"audio": [["Frying_(food)", 2, 5]], "visual": []},
        {"audio": [["Speech", 0, 4], ["Speech", 6, 9], ["Dog", 1, 2]], "visual": [["Baby_cry_infant_cry", 0, 10]]},
    ],
)
def test_target_reads_back(label):
    assert parse(target(**label)) == label


@pytest.mark.parametrize(
    "text",
    [
        "<visual>Dog,(0 1),(3 6)</visual> and <audio>Dog,(0 10)</audio>",
        "<Visual_Event> Dog , ( 0 1 ) , ( 3 6 ) </Visual_Event><AUDIO_EVENT>Dog,(0,10)</AUDIO_EVENT>",
        "<visual event> Dog (0 1) (3 6) </visual event> <audio-event> Dog: (0-10) </audio-event>",
        "<visual_event> Dog,(0 1) </visual_event> <visual_event> Dog,(3 6) </visual_event> <audio> Dog,(0 10) </audio>",
        "<visual_event> Dog,(0 1),(3 6) and <audio_event> Dog,(0 10)",
        "<visual_event> Dog,(0 1),(3 6),(8 </visual_event> <audio_event> Dog,(0 10),(1",
        "<visual_event> Dog,(0 1),Dog,(3 6) </visual_event> <audio_event> Dog,(0s to 10s) </audio_event></s><unk>",
        "<visual_event> Dog,(0 1),(3 6) </visual_event> <audio_event> Dog,(0.0 10.0) </audio_event>",
        "<visual>\nDog,(0 1) and Dog,(3 6)\n</visual> <audio_event> none </audio_event> <audio> Dog,(0 10) </audio>",
        "<audio_event> Dog,(0 10) </audio_event>, <visual_event> Dog,(0 1),(3 6) </visual_event>",
    ],
)
def test_sloppy_texts_are_read(text):
    assert parse(text) == DOG


def test_an_event_without_a_span_adds_nothing():
    assert parse("<audio_event> Dog </audio_event>") == {"audio": [], "visual": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "</s>",
        "Dog,(0 10)",
        "Dog from 0 to 10",
        "<audio_event>",
        "<audio_event></audio_event>",
        "</audio_event>",
        "<audio_event> </audio_event> <visual_event> </visual_event>",
        "<audio_event> ,,, </audio_event>",
        "audio_event> Dog,(0 10)",
        "<audio_start> Dog,(0 10) <audio_end>",
        "<video> Dog,(0 10) </video>",
        "<event> Dog </event> <range> 0,8 </range>",
        "<answer> Dog </answer>",
        "<audioevents> Dog,(0 10) </audioevents>",
        "<audio_event",
        "<<audio_event",
        "<>",
        "\x00",
        "none",
        "There are no events.",
        "Therefore, visual and audio events are:",
        "Therefore, visual and audio events are: .",
        "<s>[INST]",
        "[]",
        "{}",
        "(0 10)",
        "<visual_event><visual_event>",
        "<visual_event>" * 300,
        "<mask_0>",
        "audio: Dog 0 10",
        "<audio_event> () </audio_event>",
        "\u3000",
    ],
)
def test_unreadable_texts_give_none(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "<audio_event> Dog,(" + "9" * 5000 + " 1) </audio_event>",
        "<audio_event> Dog,(9 2) </audio_event>",
        "<audio_event> Dog,(900 950) </audio_event>",
        "<audio_event> (1 2) </audio_event>",
    ],
)
def test_odd_spans_do_not_stop_scoring(text):
    value = stats(parse(text), None, DOG, None)
    assert 0.0 <= value["segment_audio"] <= 1.0


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("level", ["segment", "event"])
def test_f_scores_equal_the_reference(golden, case, level):
    arrays = np.load(golden / "metrics.npz")
    ours = f_scores(level, *(arrays[f"avvp.{case}.{name}"].astype(bool) for name in ("SO_a", "SO_v", "GT_a", "GT_v")))
    names = ("audio", "visual", "event_av", "audio_visual")  # the order in which the reference returns them
    np.testing.assert_allclose([ours[n] for n in names], arrays[f"avvp.{case}.{level}_level"], rtol=0, atol=1e-12)


def brute_events(row):
    """Maximal runs of ones, as sets of seconds."""
    runs, current = [], set()
    for t, on in enumerate([*row, 0]):
        if on:
            current.add(t)
        elif current:
            runs.append(current)
            current = set()
    return runs


def brute_counts(answer, truth, level):
    if level == "segment":
        return np.array(
            [
                (
                    sum(a and b for a, b in zip(x, y, strict=True)),
                    sum(a and not b for a, b in zip(x, y, strict=True)),
                    sum(b and not a for a, b in zip(x, y, strict=True)),
                )
                for x, y in zip(answer, truth, strict=True)
            ]
        )
    counts = []
    for x, y in zip(answer, truth, strict=True):
        xs, ys = brute_events(x), brute_events(y)
        hits = sum(any(len(a & b) >= 0.5 * len(a | b) for b in ys) for a in xs)
        missed = sum(not any(len(a & b) >= 0.5 * len(a | b) for a in xs) for b in ys)
        counts.append((hits, len(xs) - hits, missed))
    return np.array(counts)


def brute_f(counts):
    scores = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts if tp + fp + fn]
    return sum(scores) / len(scores) if scores else 1.0


@pytest.mark.parametrize("level", ["segment", "event"])
def test_f_scores_equal_a_count_by_hand(level):
    rng = np.random.default_rng(1)
    for density in (0.05, 0.3, 0.7):
        for _ in range(40):
            a, v, ga, gv = rng.random((4, 3, 10)) < density
            audio, visual = brute_counts(a, ga, level), brute_counts(v, gv, level)
            expected = {
                "audio": brute_f(audio),
                "visual": brute_f(visual),
                "event_av": brute_f(audio + visual),
                "audio_visual": brute_f(brute_counts(a & v, ga & gv, level)),
            }
            assert f_scores(level, a, v, ga, gv) == pytest.approx(expected)


def test_scores_from_labels():
    perfect = stats(parse(target(**DOG)), None, DOG, None)
    assert set(perfect.values()) == {1.0}
    nothing = stats(None, None, DOG, None)
    assert set(nothing.values()) == {0.0}
    silent = {"audio": [], "visual": []}
    assert set(stats(parse(target(**silent)), None, silent, None).values()) == {1.0}


def test_names_ignore_case_and_an_invented_event_costs():
    exact = stats({"audio": [["dog", 0, 10]], "visual": DOG["visual"]}, None, DOG, None)
    assert exact["segment_audio"] == 1.0
    invented = stats({"audio": [["Dog", 0, 10], ["Unicorn", 0, 1]], "visual": DOG["visual"]}, None, DOG, None)
    assert invented["segment_audio"] == 0.5 and invented["segment_visual"] == 1.0


def test_spans_of_one_name_join_and_negative_spans_are_empty():
    assert occurrence([["Dog", 1, 3], ["Dog", 3, 5], ["Dog", 9, 0], ["Dog", -1, 1]], ["dog"]).nonzero()[1].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_type_av_is_the_mean_of_three_and_order_does_not_matter():
    samples = [
        stats(None, None, DOG, None),
        stats(DOG, None, DOG, None),
        stats({"audio": DOG["audio"], "visual": []}, None, DOG, None),
    ]
    metrics = reduce(samples)
    for level in ("segment", "event"):
        parts = [metrics[f"{level}_{kind}"] for kind in ("audio", "visual", "audio_visual")]
        assert metrics[f"{level}_type_av"] == pytest.approx(sum(parts) / 3)
    assert reduce(samples[::-1]) == pytest.approx(metrics)
    assert reduce([]) == {}


def test_constant_answers_can_be_read_and_name_the_most_frequent_event():
    texts = [text for text, _ in constants([DOG, DOG, {"audio": [["Cat", 0, 2]], "visual": []}], [None] * 3)]
    assert {"audio": [["Dog", 0, 10]], "visual": [["Dog", 0, 10]]} in [parse(text) for text in texts]
    assert all(parse(text) is not None for text in texts)
