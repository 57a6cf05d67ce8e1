"""Seconds in text: read as they were meant, or left unread. Never something else."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crab_jax.tasks import ave, avvp
from crab_jax.tasks.times import find_spans, read_ranges


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("0,8", [(0, 8)]),
        (" 0 , 8 ", [(0, 8)]),
        ("0 8", [(0, 8)]),
        ("(0,8)", [(0, 8)]),
        ("[0, 8]", [(0, 8)]),
        ("0-8", [(0, 8)]),
        ("0 - 8", [(0, 8)]),
        ("3–5", [(3, 5)]),
        ("3 — 5", [(3, 5)]),
        ("3~5", [(3, 5)]),
        ("from 3 s to 5 s", [(3, 5)]),
        ("3sec-5sec", [(3, 5)]),
        ("3 to 5 seconds.", [(3, 5)]),
        ("3s until 5s", [(3, 5)]),
        ("0:03-0:05", [(3, 5)]),
        ("00:03 to 00:05", [(3, 5)]),
        ("00:00:03, 00:00:05", [(3, 5)]),
        ("1:10-1:20", [(70, 80)]),
        ("1m20s to 1m30s", [(80, 90)]),
        ("50 s to 1 min 10 s", [(50, 70)]),
        ("3000 ms to 5000 ms", [(3, 5)]),
        ("500-1500 ms", [(0.5, 1.5)]),
        ("1 to 2 minutes", [(60, 120)]),
        ("30 s to 1 min", [(30, 60)]),
        ("3.5-4.5", [(3.5, 4.5)]),
        ("3.5s, 4.25s", [(3.5, 4.25)]),
        ("0.0, 8.0", [(0, 8)]),
        ("0:03.5-0:05", [(3.5, 5)]),
        ("between second 3 and 5", [(3, 5)]),
        ("from second 3 to second 5", [(3, 5)]),
        ("between 0:03 and 0:05", [(3, 5)]),
        ("between about 3 and 5", [(3, 5)]),
        ("0,2 and 5,7", [(0, 2), (5, 7)]),
        ("0-2, 5-7", [(0, 2), (5, 7)]),
        ("(0,2),(5,7)", [(0, 2), (5, 7)]),
        ("8-12", [(8, 12)]),
        ("4,4", [(4, 4)]),
        ("", []),
        ("three to five", []),
        ("none", []),
    ],
)
def test_spellings_that_are_read(text, ranges):
    assert read_ranges(text) == ranges


@pytest.mark.parametrize(
    "text",
    [
        "8,2",
        "0:05-0:03",
        "3",
        "3 s",
        "0:08",
        "0, ",
        "0 - ",
        "-1,5",
        "3 -5",
        "(-3,5)",
        "−3 to 5",
        "0:3",
        "3:8",
        "0:75-0:80",
        "0,2,5,7",
        "0 2 5 7",
        "0 1 2 3 4",
        "0,8,2",
        "3 and 5",
        "3 or 5",
        "3/5",
        "3%,5%",
        "30 % to 50 %",
        "frames 0 to 80",
        "0 to 80 frames",
        "3 dogs, 5 cats",
        "0,8 (2 dogs)",
        "in 2010 0,8",
        "2010,2012",
        "12345678,9",
        "1e5,8",
        "0x1,8",
        "3rd to 5th",
        "3am to 5am",
        "3m to 5m",
        "3.5.2,5",
        "3..5",
        "3,5-4,5",
        "00:00:03,500 --> 00:00:05,000",
        "1:20:00",
        "00:00:03:12-00:00:04:01",
        "0:03-5",
        "3 to 0:05",
        "1 min to 2",
        "3000 ms to 5",
        "٣,٤",
        "３,５",
        "3½,5",
        "3²,5",
        "$3,5",
        "t1,t2 3",
        "start_time: 0 end_time: 8",
        "3 s to 5 kg",
        "1 of 2",
        "0.5.5,1",
        "v3.5 6",
        "8 to the 9",
        "0.3-0.5 of the clip",
        "1,5 2,5",
        "3 to 5 of 10",
        "throughout 10 s",
        "from the start to 4 s",
        "0,2, from 5,7",
        "between the video at 3 and 5",
        "between the video 3 and 5",
    ],
)
def test_spellings_that_may_mean_anything_are_not_read(text):
    assert read_ranges(text) is None
    parsed = ave.parse(f"<event> Dog </event> <range> {text} </range>")
    assert parsed is None


UNITS = {
    "bare": "{0:g}",
    "s": "{0:g}s",
    " s": "{0:g} s",
    "seconds": "{0:g} seconds",
    "sec": "{0:g} sec",
    "clock": "{1:d}:{2:04.1f}",
    "long": "00:{1:02d}:{2:04.1f}",
    "ms": "{3:d} ms",
}
JOINS = {
    "bare": (",", ", ", "-", " - ", "–", " to ", " until ", " "),
    "other": (" to ", "-", " - ", "–", ", ", " till "),
}
TIMES = st.tuples(st.integers(0, 119), st.integers(0, 119)).map(sorted).map(lambda pair: [time / 2 for time in pair])


def spelt(times, unit, join):
    """ "3.5 s to 4 s" and the like."""
    return join.join(UNITS[unit].format(time, int(time // 60), time % 60, int(time * 1000)) for time in times)


def spellings(times):
    return st.sampled_from(sorted(UNITS)).flatmap(
        lambda unit: st.sampled_from(JOINS["bare" if unit == "bare" else "other"]).map(
            lambda join: spelt(times, unit, join)
        )
    )


@settings(max_examples=400, deadline=None)
@given(st.data(), TIMES, st.sampled_from(["{}", "({})", "[ {} ]", "from {}", "{}.", "the time range is {}", " {} \n"]))
def test_a_range_is_read_as_it_was_meant_in_every_spelling(data, times, around):
    text = around.format(data.draw(spellings(times)))
    assert read_ranges(text) == [tuple(times)], text
    assert ave.parse(f"<event> Dog </event> <range> {text} </range>")["ranges"] == [times]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(TIMES, min_size=1, max_size=3), st.lists(TIMES, min_size=1, max_size=2))
def test_events_are_read_as_they_were_meant(data, dog, cat):
    def said(name, spans):
        return name + "".join(f",({data.draw(spellings(span))})" for span in spans)

    text = f"<audio_event> {said('Dog', dog)} and {said('Frying_(food)', cat)} </audio_event>"
    assert avvp.parse(text) == {
        "visual": [],
        "audio": [["Dog", *span] for span in dog] + [["Frying_(food)", *span] for span in cat],
    }


PIECES = st.sampled_from(
    [
        *"0123456789",
        "10",
        "2010",
        "3.5",
        "0:05",
        " ",
        " ",
        ",",
        "-",
        ":",
        ".",
        "(",
        ")",
        ";",
        "–",
        "to",
        "and",
        "from",
        "between",
        "s",
        "ms",
        "min",
        "second",
        "dogs",
        "frames",
        "%",
        "Dog",
        "st",
        "/",
    ]
)
NUMBER = re.compile(r"\d+(?:[.:]\d+)*")


@settings(max_examples=3000, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_every_number_of_a_text_that_is_read_is_one_of_its_times(text):
    """Whatever is put together: no number is passed over, cut, or read twice."""
    ranges = read_ranges(text)
    if ranges is not None:
        scale = 1000 if "ms" in text else 1
        written = [
            float(n) if ":" not in n else sum(float(part) * 60**i for i, part in enumerate(n.split(":")[::-1]))
            for n in NUMBER.findall(text)
        ]
        found = [time for span in ranges for time in span]
        assert len(found) == len(written), text
        if "min" not in text:
            for time, number in zip(found, written, strict=True):
                assert np.isclose(time, number) or (scale > 1 and np.isclose(time * scale, number)), text
        assert all(start <= end for start, end in ranges)
    for span in find_spans(text):
        assert span.first < span.last <= len(text) and (not span.read or span.start <= span.end)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("Dog from 0:03 to 0:05", [["Dog", 3, 5]]),
        ("Dog between second 3 and 5", [["Dog", 3, 5]]),
        ("Dog 3s-5s", [["Dog", 3, 5]]),
        ("2 dogs,(0 8)", [["2 dogs", 0, 8]]),
        ("Dog (2 of them),(0 8)", [["Dog", 0, 8]]),
        ("Dog,(8 2),(1 2)", [["Dog", 1, 2]]),
        ("Dog,(0 8 10)", []),
        ("Dog,(-3 5)", []),
        ("Dog from 2 to 5 dogs", []),
        ("Dog in 2010,(0 8)", [["Dog in 2010", 0, 8]]),
        ("Dog 0 8", []),
        ("Dog,(0 1), Cat,(900 950)", [["Dog", 0, 1], ["Cat", 900, 950]]),
        ("Dog from 0 to 3 and 5 to 8", [["Dog", 0, 3], ["Dog", 5, 8]]),
        ("Dog 0-3, 5-8 s", [["Dog", 0, 3], ["Dog", 5, 8]]),
        ("Dog 3 s, 5 s, 7 s", []),
        ("Dog at 3 s, 5 s", []),
        ("Dog from 0,3,5,8", []),
        ("Dog 1,5 s - 2,5 s", []),
        ("Dog 1,5 s to 3 s", []),
        ("Dog from 1,5 to 2,5 s", []),
        ("Dog -3 to 5 s", []),
        ("Dog 2, 5 s to 8 s", []),
        ("Dog between 3 and 5 and 7", []),
        ("Dog from 5 to 3, 7 to 9", []),
        ("Dog from 3 to 5, Cat from 0 to 9", [["Dog", 3, 5], ["Cat", 0, 9]]),
        ("Dog,(0.5 1.5)", [["Dog", 0.5, 1.5]]),
        ("Dog,(3rd 5th)", []),
        ("Dog,(0%-80%)", []),
        ("Dog 0:03 0:05 from", []),
        ("Dog 0:03 to 0:05 from", [["Dog", 3, 5]]),
    ],
)
def test_spans_behind_names(text, events):
    assert avvp.parse(f"<audio_event> {text} </audio_event>") == {"audio": events, "visual": []}


REASONED = st.lists(
    st.sampled_from(
        [
            "In 2010 it began.",
            "From 0:03 to 0:05 there are 3 dogs.",
            "Between 2 and 4 s.",
            "7",
            "(1 2)",
            "0,8",
            "12:30:05",
            "The range is 3,5.",
            "50 %",
            "1920x1080",
            "top left",
        ]
    ),
    max_size=5,
).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(REASONED, TIMES.filter(lambda times: times[1] <= 10))
def test_numbers_of_the_reasoning_never_become_times(reasoning, times):
    assert ave.parse(ave.target("Dog", *times, reasoning)) == {"event": "Dog", "ranges": [times]}
    assert avvp.parse(avvp.target([["Dog", *times]], [], reasoning)) == {"audio": [["Dog", *times]], "visual": []}
    assert ave.parse(reasoning) is None and avvp.parse(reasoning) is None


def test_decimals_are_scored_by_the_middle_of_a_second():
    assert ave.active_seconds([(3.5, 4.5)]).nonzero()[0].tolist() == [3]
    assert ave.active_seconds([(2.6, 4.4)]).nonzero()[0].tolist() == [3]
    assert ave.active_seconds([(0.4, 9.6)]).all()
    for start in range(11):
        for end in range(13):
            expected = [t for t in range(10) if start <= t < end]
            assert ave.active_seconds([(start, end)]).nonzero()[0].tolist() == expected
            assert avvp.occurrence([["Dog", start, end]], ["dog"]).nonzero()[1].tolist() == expected
    assert avvp.occurrence([["Dog", 2.6, 4.4], ["Dog", -3, 0.5]], ["dog"]).nonzero()[1].tolist() == [3]
