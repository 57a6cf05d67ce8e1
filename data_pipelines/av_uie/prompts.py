"""Requests that ask an LLM for one explicit-reasoning target: rules, in-context examples, and the facts of a label.

The facts are the sentences of the template writer, so the LLM sees what the label, the mask and the question imply and
nothing else. It rewrites them into fluent reasoning that ends in the answer, which verify.py then compares with the
label. The messages of a task begin alike, so providers that cache prompt prefixes charge the examples once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax.tasks.placeholders import AUDIO, IMAGE, VIDEO
from data_pipelines.av_uie import labels, templates
from data_pipelines.av_uie.labels import Place
from data_pipelines.examples import Example

Messages = list[dict[str, str]]

RULES = """\
You write training texts for a model that watches a video and listens to its sound. You are given the task that the \
model was set, facts about the clip, and the closing sentence. Write what the model thinks, as it watches and listens, \
and then the closing sentence.
- Two to five plain sentences. Say what is heard, what is seen, and how the two together lead to the closing sentence.
- Use only the facts. Do not add objects, times, numbers, colours or places that they do not say.
- Never mention labels, annotations, facts or these rules: the model knows only the clip.
- No headings, lists, tags or quotation marks before the closing sentence.
- End with the closing sentence, copied character for character, its tags and spaces included."""


class Shown(NamedTuple):
    """An in-context example: an Example with its label, the places of its object, and the reasoning to imitate."""

    example: Example
    places: templates.Places
    reasoning: str


def _shown(
    task: str,
    question: str,
    meta: dict[str, Any],
    reasoning: str,
    places: templates.Places = None,
    second: int | None = None,
) -> Shown:
    return Shown(
        Example(id=f"shown-{task}", task=task, instruction=question, meta=meta, second=second), places, reasoning
    )


_DOG = Place((53, 59, 153, 177), (100.0, 115.0), 0.14)
_GUITAR = Place((120, 40, 210, 190), (165.0, 112.0), 0.18)
_AVS_QUESTION = (
    "Please recognize the category of object making sound in the video, and then segment out the object "
    "that makes the sound at the second second of the video."
)
IN_CONTEXT: tuple[Shown, ...] = (
    _shown(
        "ave",
        "Please describe the events and time range that occurred in the video.",
        {"event": "Church bell", "start": 3, "end": 8},
        "Before 3 I do not see and hear a Church bell together. From 3 to 8 it is in the picture and I hear it at "
        "the same time, for 5 seconds in all. After 8 the two no longer come together.",
    ),
    _shown(
        "ave",
        "Please describe the events and time range that occurred in the video.",
        {"event": "Violin, fiddle", "start": 0, "end": 10},
        "The sound of the Violin, fiddle is there right away, and I see it too. Picture and sound stay together "
        "from 0 to 10, the whole clip.",
    ),
    _shown(
        "avvp",
        "Please determine the events that occur based on the visual and audio information in the video, as "
        "well as the start and end times of these events.",
        {"audio": [["Speech", 0, 4], ["Dog", 2, 3], ["Dog", 6, 10]], "visual": [["Dog", 0, 10]]},
        "I hear Speech from 0 to 4, and the Dog from 2 to 3 and again from 6 to 10. In the picture the Dog is there "
        "from 0 to 10, so it is both heard and seen from 2 to 3 and from 6 to 10. The Speech comes from someone who "
        "is never seen.",
    ),
    _shown(
        "avqa",
        "Please answer this question: What is the left instrument of the first sounding instrument?",
        {"answer": "saxophone", "type": ["Audio-Visual", "Location"]},
        "This needs my eyes and my ears. I listen for the instrument that sounds first, then find it in the picture "
        "and look to its left. The instrument that stands there is the saxophone.",
    ),
    _shown(
        "avqa",
        "Please answer this question: Is the violin louder than the cello?",
        {"answer": "no", "type": ["Audio", "Comparative"]},
        "I only have to listen. I compare how loud the violin and the cello are, and the violin is not louder than "
        "the cello.",
    ),
    _shown(
        "arig",
        "Please recognize the category of object that makes the sound and then output its location coordinates.",
        {"object": "dog", "box": [53, 59, 153, 177]},
        "I hear a dog. In the picture there is a dog in the middle, which reaches from (53,59) to (153,177), so the "
        "sound comes from there.",
        (labels.box_place((53, 59, 153, 177)),),
    ),
    _shown(
        "s4",
        _AVS_QUESTION,
        {"objects": ["dog"]},
        "I hear a dog. At the second second I find it in the middle of the picture, between (53,59) and (153,177), "
        "where it fills about 14 % of the picture.",
        (_DOG,),
        1,
    ),
    _shown(
        "ms3",
        _AVS_QUESTION,
        {"objects": ["guitar", "man"]},
        "Two things sound together, the guitar and the man. At the second second both are on the right of the "
        "picture, between (120,40) and (210,190), and cover 18 % of it.",
        (_GUITAR,),
        1,
    ),
    _shown(
        "ref-avs",
        "Please segment out the object making the loudest sound at the second second in the video.",
        {"expression": "the object making the loudest sound", "object": "guitar", "split": "seen"},
        "I have to compare how loud the sounds are and what makes them. The guitar fits. At the second second it is "
        "on the right of the picture, between (120,40) and (210,190), and fills 18 % of it.",
        (_GUITAR,),
        1,
    ),
    _shown(
        "ref-avs",
        "Please segment out the silent object on the left at the second second in the video.",
        {"expression": "the silent object on the left", "object": "", "split": "null"},
        "I listen to what makes a sound and look at what is on the left. Nothing in the video fits both.",
        None,
        1,
    ),
)
_LIKE = {"avss": "ms3"}  # tasks that use the in-context examples of another


def _request(example: Example, places: templates.Places) -> str:
    question = example.instruction
    for block in (VIDEO, AUDIO, IMAGE):
        question = question.replace(block, "")
    facts = templates.reasoning(example, places) or "none beyond the closing sentence"
    return f"Task: {question.strip()}\nFacts: {facts}\nClosing sentence: {labels.answer(example)}"


def messages(example: Example, root: str | Path | None = None) -> Messages:
    """Return the chat messages that ask for the target of an Example; masks are read below `root`.

    Raises InputError for a label from which no target can be built (see labels.label).
    """
    turns: Messages = [{"role": "system", "content": RULES}]
    for shown in IN_CONTEXT:
        if shown.example.task == _LIKE.get(example.task, example.task):
            target = f"{shown.reasoning} {labels.answer(shown.example)}"
            turns += [
                {"role": "user", "content": _request(shown.example, shown.places)},
                {"role": "assistant", "content": target},
            ]
    return [*turns, {"role": "user", "content": _request(example, labels.places(example, root))}]


def correction(previous: Messages, text: str, problems: Sequence[str]) -> Messages:
    """Return the messages that ask again after an answer that disagrees with its label."""
    asked = "This does not agree with the facts: " + "; ".join(problems) + ". Write it again."
    return [*previous, {"role": "assistant", "content": text}, {"role": "user", "content": asked}]
