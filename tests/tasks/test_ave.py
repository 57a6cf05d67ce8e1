"""AVE: prompt, target, tolerant parsing, segment accuracy."""

import itertools

import pytest

from crab_jax.tasks.ave import AVE, constants, instruction, parse, reduce, segment_accuracy, stats, target

META = {"event": "Male speech, man speaking", "start": 0, "end": 8}
ANSWER = {"event": "Male speech, man speaking", "ranges": [[0, 8]]}


def test_prompt_is_the_released_one():
    expected = (
        "This is a video:\n<video_start><video><video_end>\n"
        "This is an audio:\n<audio_start><audio><audio_end>\n"
        "Please describe the events and time range that occurred in the video."
    )
    assert [instruction(v) for v in ("train", "test", "quick")] == [expected] * 3
    with pytest.raises(KeyError):
        instruction("other")


def test_target_puts_reasoning_first():
    text = target(**META, reasoning="A man talks.")
    assert text == (
        "A man talks. So the audible and visible event in the video is <event> Male speech, man speaking "
        "</event>, and the time range is <range> 0,8 </range>."
    )


@pytest.mark.parametrize("event", ["Church bell", "Male speech, man speaking", "Frying (food)", "Rodents, rats, mice"])
@pytest.mark.parametrize("span", [(0, 10), (2, 3), (0, 0)])
def test_target_reads_back(event, span):
    assert parse(target(event, *span)) == {"event": event, "ranges": [list(span)]}


@pytest.mark.parametrize(
    "text",
    [
        "<event>Male speech, man speaking</event><range>0,8</range>",
        "<EVENT> Male speech, man speaking </EVENT>, and <Range> 0 , 8 </Range>",
        "< event > Male speech, man speaking < / event > < range >0 8< /range >",
        "<event> Male speech, man speaking </event>, and the time range is <range> 0,8",
        "<event> Male speech, man speaking, and the time range is <range> 0,8 </range>.",
        "<event> Male speech, man speaking </event>, and the time range is <range> (0,8) </range>.</s><unk><unk>",
        "<event> Male speech, man speaking </event> <range> 0-8 </range>",
        "<event> Male speech, man speaking </event> <range> from 0 to 8 </range>",
        "<event> Male speech, man speaking </event> <range> 0s to 8s </range>",
        "<event> Male speech, man speaking </event> <range> 0.0, 8.0 </range>",
        "<event> Male speech, man speaking,(0 8) </event>",
        "<range> 0,8 </range> is when <event> Male speech, man speaking </event> happens",
        "<event> Cat </event> no: <event> Male speech, man speaking </event>, <range> 0,8 </range>",
        "<event> Male speech, man speaking </event>, <range> 0,8 </range>. So <event> Male sp",
        "<event> Male speech, man speaking </event>\n<range>\n0,8\n</range>",
    ],
)
def test_sloppy_texts_are_read(text):
    assert parse(text) == ANSWER


def test_several_ranges_are_kept():
    assert parse("<event> Dog </event> <range> 0,2 </range> and <range> 5,7 </range>")["ranges"] == [[0, 2], [5, 7]]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "</s>",
        "<event>",
        "</event>",
        "<event></event>",
        "<event> </event><range> 0,8 </range>",
        "<range> 0,8 </range>",
        "<event> Dog </event>",
        "<event> Dog </event> <range>",
        "<event> Dog </event> <range> </range>",
        "<event> Dog </event> <range> 0, </range>",
        "<event> Dog </event> <range> zero,eight </range>",
        "<event> Dog </event> <range> 8 </range>",
        "<event> ,. </event> <range> 0,8 </range>",
        "The dog barks from 0 to 8.",
        "event: Dog start_time:0 end_time:8",
        "<evnt> Dog </evnt> <range> 0,8 </range>",
        "event> Dog </event <range> 0,8",
        "<event_start> Dog <event_end> <range> 0,8 </range>",
        "<answer> Dog </answer>",
        "<<<>>>",
        "<event<range>>",
        "\x00\ufffd",
        "<event> Dog </event> <range> 12345678,9 </range>",
        "<event> Dog </event> <range> " + "9" * 5000 + " </range>",
        "<s>[INST] <</SYS>>",
        "[]",
        "null",
        "<event> Dog",
        "<event> </event> <event> </event>",
        "<range> 0,8 </range>" * 3,
        "<event> (0,8) </event>",
        "<event>" * 500,
        "<mask_0><mask_1>",
    ],
)
def test_unreadable_texts_give_none(text):
    assert parse(text) is None


def test_end_second_is_background_by_default():
    assert segment_accuracy({"event": "Dog", "ranges": [[2, 5]]}, "Dog", 2, 5) == 1.0
    assert segment_accuracy({"event": "Dog", "ranges": [[2, 6]]}, "Dog", 2, 5) == 0.9
    assert segment_accuracy({"event": "Cat", "ranges": [[2, 5]]}, "Dog", 2, 5) == 0.7
    assert segment_accuracy(None, "Dog", 0, 8) == 0.2


def test_unread_answers_stay_in_the_denominator():
    metrics = reduce([stats(ANSWER, None, META, None), stats(None, None, META, None)])
    assert metrics["accuracy"] == pytest.approx((1.0 + 0.2) / 2)
    assert metrics["event_accuracy"] == 0.5


def test_event_names_ignore_case_and_underscores():
    assert stats({"event": "male_speech man speaking", "ranges": [[0, 8]]}, None, META, None)["accuracy"] == 1.0


def test_reduce_ignores_order():
    samples = [
        stats(parse(target("Dog", s, e)), None, META | {"event": "Dog"}, None)
        for s, e in itertools.product(range(4), range(4, 9))
    ]
    assert reduce(samples) == pytest.approx(reduce(samples[::-1]))
    assert reduce([]) == {}


def test_constant_answers_hold_the_best_single_guess():
    metas = [META, META, {"event": "Dog", "start": 1, "end": 3}]
    texts = [text for text, mask in constants(metas, [None] * 3)]
    assert target(**META) in texts and target("Dog", 1, 3) in texts and target("Dog", 0, 10) in texts
    assert all(parse(text) for text in texts) and AVE.headline in reduce([stats(None, None, META, None)])
