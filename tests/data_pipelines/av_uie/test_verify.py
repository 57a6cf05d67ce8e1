"""The verifier: what agrees passes, every spoilt target is caught with a reason, and the review page shows both."""

import dataclasses
import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from labelled import ALL, OBJECTS, ONE_EACH, STRATEGIES, example

from crab_jax.reports import review_page
from crab_jax.tasks.avs import ORDINALS
from crab_jax.tasks.placeholders import MASK
from data_pipelines.av_uie import labels, prompts, templates, verify
from data_pipelines.examples import Example
from data_pipelines.sources import ave, avqa, avvp


def by(plain: Example, target: str, writer: str = verify.RELEASED) -> Example:
    """An Example with another target, by a writer whose wording is free: only what it means can be checked."""
    return dataclasses.replace(plain, target=target, meta={**plain.meta, "reasoning": writer})


def other(name: str, names: tuple[str, ...]) -> str:
    return next(n for n in names if n != name)


def shifted(text: str, pattern: str, by: int) -> list[str]:
    """`text` with one number of the last match of `pattern` moved, for each of its groups."""
    match = list(re.finditer(pattern, text))[-1]
    return [
        f"{text[: match.start(i)]}{int(match[i]) + by}{text[match.end(i) :]}" for i in range(1, match.re.groups + 1)
    ]


def spoilt(plain: Example) -> list[str]:
    """Wrong targets: each differs from the right one in one thing that the label says."""
    meta, right = plain.meta, labels.answer(plain)
    cut = [right[:-1].replace(tag, "", 1) for tag in re.findall(r"<[^<>]+>", right)]  # one tag or mask token missing
    match plain.task:
        case "ave":
            event = other(meta["event"], ave.CATEGORIES)
            return [
                *cut,
                right.replace(f"> {meta['event']} <", f"> {event} <"),
                *shifted(right, r"(\d+),(\d+)", 1),
                f"{right} {right}",
                right.replace("<range>", "<range> 0,0 </range><range>"),
                "",
                "Nothing happens.",
                right.replace(f"{meta['start']},{meta['end']}", f"{meta['start']},{meta['end']}.5"),
                right.replace("<event>", "<event><event>"),
                right.replace("</event>", "</events>"),
            ]
        case "avvp":
            tags = re.findall(r"<(?:audio|visual)_event>.*?</\w+>", right)
            wrong = [
                *cut,
                right.replace("_event>", ">"),
                right + " <audio_event> Piano,(0 1) </audio_event>",
                right.replace("(", "(9").replace("none", "Dog,(0 3)"),
                "I hear nothing.",
            ]
            wrong += [right.replace(tag, "", 1) for tag in tags if "none" not in tag and tags.count(tag) == 1]
            if set(map(str, meta["audio"])) != set(map(str, meta["visual"])) and templates.spans_of(
                meta["audio"]
            ) != templates.spans_of(meta["visual"]):
                swap = {"audio": "visual", "visual": "audio"}
                wrong.append(re.sub("(audio|visual)_event", lambda m: f"{swap[m[1]]}_event", right))
            return wrong
        case "avqa":
            return [
                *cut,
                right.replace(f"> {meta['answer']} <", f"> {other(meta['answer'], avqa.ANSWERS)} <"),
                right.replace("<answer>", "<answer> </answer><answer>"),
                "So the answer is unclear.",
            ]
        case "arig":
            return [
                *shifted(right, r"\((\d+),(\d+)\).*?\((\d+),(\d+)\)", 2),
                right.rpartition("and coordinate")[0],
                right.replace(f"is {meta['object']}.", f"is {other(meta['object'], OBJECTS)}."),
                right + "<obj>",
            ]
        case "ref-avs":
            name = other(meta["object"], OBJECTS)
            says = f" is {meta['object']}." if meta["object"] else " does not appear."
            wrong = [
                *cut,
                right.replace(says, f" is {name}."),
                right.replace(MASK, ""),
                _later(plain, right),
                right.replace(MASK, MASK + MASK),
                right.replace(meta["expression"], "the thing"),
            ]
            return wrong + ([right.replace(says, " does not appear.")] if meta["object"] else [])
        case "avcap":
            return [right + " It rains.", right[:-1], right + "<event>"]
        case _:
            stated = " and ".join(meta["objects"])
            fewer = " and ".join(meta["objects"][1:]) or other(meta["objects"][0], OBJECTS)
            return [
                *cut,
                right.replace(f"is {stated}.", f"is {fewer}."),
                right.replace(MASK, ""),
                _later(plain, right),
                right.replace(f"is {stated}.", f"is {stated} and horn."),
                right.replace(MASK, MASK + MASK),
            ]


def _later(plain: Example, right: str) -> str:
    now = ORDINALS[plain.second]
    return right.replace(f" {now} second", f" {ORDINALS[(plain.second + 1) % 10]} second")


@pytest.mark.parametrize("task", STRATEGIES)
def test_whatever_the_label_a_spoilt_target_is_caught_by_its_meaning(task):
    @settings(max_examples=12, deadline=None)
    @given(STRATEGIES[task])
    def check(plain):
        assert verify.problems(by(plain, labels.answer(plain))) == []
        for wrong in spoilt(plain):
            assert verify.problems(by(plain, wrong)), wrong

    check()


@pytest.mark.parametrize("task", STRATEGIES)
def test_no_letter_of_a_written_target_can_change(task):
    @settings(max_examples=12, deadline=None)
    @given(STRATEGIES[task], st.data())
    def check(plain, data):
        written = templates.write(plain, "/nowhere")
        place = data.draw(st.integers(0, len(written.target) - 1))
        letter = data.draw(st.sampled_from(["", "x", "<", "7", " "]))
        changed = written.target[:place] + letter + written.target[place + 1 :]
        assume(changed != written.target)
        assert verify.problems(dataclasses.replace(written, target=changed), "/nowhere"), changed

    check()


@pytest.mark.parametrize("task", sorted(set(ONE_EACH) - {"avcap"}))
def test_no_letter_of_an_llms_answer_can_change(task):
    plain = ONE_EACH[task]
    right = by(plain, templates.write(plain).target, "llm:m")
    assert verify.problems(right) == []
    answer = labels.answer(plain)
    for place in range(len(answer)):
        wrong = answer[:place] + answer[place + 1 :]
        assert verify.problems(by(plain, right.target.removesuffix(answer) + wrong, "llm:m")), wrong


def test_a_coordinate_may_be_one_pixel_off():
    plain = ONE_EACH["arig"]
    right = labels.answer(plain)
    for near in shifted(right, r"\((\d+),(\d+)\).*?\((\d+),(\d+)\)", 1):
        assert verify.problems(by(plain, near)) == []
    assert verify.problems(by(plain, right.replace("(53,", "(55,"))) == ["x1 is 55, the label says 53"]


@pytest.mark.parametrize(
    ("reasoning", "reason"),
    [
        ("", "no reasoning"),
        ("I see it from 2 to 8.", "says 2, which no fact says"),
        ("According to the label the bell rings.", "says 'label'"),
        ("A Truck passes while the Church bell rings.", "names 'Truck'"),
        ("So loud. " * 200, "more than 1500"),
        ("I hear <event> Church bell </event>.", "2 <event> tags"),
    ],
)
def test_an_llm_may_not_add_to_the_facts(reasoning, reason):
    plain = ONE_EACH["ave"]
    answer = by(plain, f"{reasoning} {labels.answer(plain)}".strip(), "llm:m")
    found = verify.problems(answer, vocabulary=ave.CATEGORIES)
    assert any(reason in problem for problem in found), found


def test_a_name_inside_of_another_is_not_a_name():
    plain = example("ave", {"event": "Race car, auto racing", "start": 0, "end": 9})
    text = f"I see a race car, auto racing, from 0 to 9. {labels.answer(plain)}"
    assert verify.problems(by(plain, text, "llm:m"), vocabulary=["Car", "Race car, auto racing"]) == []


def test_the_in_context_examples_keep_the_rules_that_they_teach():
    for shown in prompts.IN_CONTEXT:
        answer = labels.answer(shown.example)
        facts = f"{templates.reasoning(shown.example, shown.places)} {answer}"
        assert verify.problems(by(shown.example, f"{shown.reasoning} {answer}")) == []
        assert verify.invented(shown.example, shown.reasoning, facts, (*OBJECTS, *avvp.CATEGORIES)) == []


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("<audio_event>Dog,(0 10)</audio_event> and <visual_event>Speech,(0 2),(5 6)</visual_event>", True),
        ("<audio_event>Dog,(0 10)</audio_event>", False),  # an event of the label is missing
        ("<audio_event>Dog,(0 10)</audio_event> <visual_event>Speech,(5 5)</visual_event>", False),
        (
            "<audio_event>Dog,(0 10)</audio_event> <visual_event>Speech</visual_event>",
            False,
        ),  # no time, as some released
        ("<audio_event>Dog,(0 10)</audio_event> <visual_event>Car,(0 5)</visual_event>", False),
        ("<audio_event>Dog,(0 11)</audio_event> <visual_event>Speech,(0 5)</visual_event>", False),
    ],
)
def test_a_weak_label_checks_what_it_says(text, ok):
    plain = example("avvp", {"labels": ["Speech", "Dog"]})
    assert (verify.problems(by(plain, text)) == []) is ok


def test_an_unusable_label_is_quarantined_not_raised():
    broken = dataclasses.replace(ONE_EACH["ave"], meta={"event": "Bark"}, target="x")
    good, bad = verify.split([broken, by(ONE_EACH["avqa"], labels.answer(ONE_EACH["avqa"]))])
    assert len(good) == 1 and bad[0][1] == ["the label cannot be used: meta.start missing"]


def test_people_have_the_last_word():
    right, wrong = by(ALL[0], labels.answer(ALL[0])), by(ALL[2], "So the answer is <answer> cello </answer>.")
    assert [[e.id for e in part] for part in (verify.split([right, wrong])[0],)] == [[right.id]]
    good, bad = verify.split([right, wrong], accept={wrong.id}, reject={right.id})
    assert good == [wrong] and bad == [(right, ["rejected by a reviewer"])]
    assert verify.counted(bad)["tasks"] == {right.task: 1}


def test_the_review_page_shows_reasons_and_samples_and_escapes_what_it_shows():
    nasty = by(dataclasses.replace(ALL[0], id='x"><script>alert(1)</script>'), "<script>alert(2)</script>")
    good = [templates.write(one, "/nowhere") for one in ALL]
    page = review_page.page(good, [(nasty, verify.problems(nasty))], "/nowhere")
    assert "alert(1)</script>" not in page and "alert(2)</script>" not in page
    assert "is no tag of ave" in page and "1 are in quarantine" in page
    assert all(f">{one.id}<" in page for one in good)
    assert not re.search(r"(?:src|href)=\"?(?!data:)\w", page)  # needs nothing from outside
    assert json.dumps("Church bell") in page.replace("&quot;", '"')  # the label is there to compare


def test_the_page_says_how_much_it_leaves_out():
    bad = [(dataclasses.replace(ALL[0], id=str(i)), ["is wrong"]) for i in range(50)]
    page = review_page.page([], bad, most=10)
    assert "Quarantined: 10 of 50" in page and page.count("<article>") == 10


def test_the_sample_is_the_same_in_every_run():
    many = [dataclasses.replace(ALL[0], id=str(i)) for i in range(40)]
    assert review_page.sample(many, 3) == review_page.sample(many[::-1], 3) != many[:3]
