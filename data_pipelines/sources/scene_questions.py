"""Questions and expressions about generated scenes, in the forms of MUSIC-AVQA and Ref-AVS.

Questions use the templates of MUSIC-AVQA (its nine types, its spelling, full-width question mark and trailing spaces)
and answers of its 42-word list. A question that is ill-defined for a scene is not asked. Among the others, the type is
drawn first, then the template, the answer, and the values of the slots, so that the wording reveals little about the
answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.sources.scene_graph import KINDS, SECONDS, SLOTS, Scene, Thing

_RARE = {
    ("Audio", "Comparative"): 2.5,
    ("Audio-Visual", "Comparative"): 2.0,
    ("Audio-Visual", "Location"): 2.5,
    ("Audio-Visual", "Temporal"): 2.5,
}  # weights of types that few scenes allow
_YES_NO = 0.5  # weight of a template answered by yes or no, which six of the nine types have
_SLOT_OR_KIND = re.compile(rf"\b({'|'.join((*KINDS, *SLOTS))})\b")
_COUNTS = ("zero", "one", "two", "three")
_ORDINALS = ("first", "second", "third")
_NULLS = 0.2  # share of expressions that refer to nothing in the picture, outside the test split


@dataclasses.dataclass(frozen=True)
class Question:
    """A MUSIC-AVQA question; type is (modality, kind) as in the release."""

    type: tuple[str, str]
    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Expression:
    """A Ref-AVS expression and the object it refers to in second `second`: a kind, or "" when nothing fits.

    split: "seen", "unseen" (an object that expressions of the train and val splits never refer to) or "null".
    """

    split: str
    text: str
    object: str
    second: int


def _only(things: Sequence[Thing]) -> Thing | None:
    return things[0] if len(things) == 1 else None


def _first_last(things: Sequence[Thing]) -> tuple[Thing | None, Thing | None]:
    """Return the thing that starts to sound before all others, and the one after all others; None on a tie."""
    starts = [t.onset for t in things]
    return (
        (_only([t for t in things if t.onset == min(starts)]), _only([t for t in things if t.onset == max(starts)]))
        if len(things) > 1
        else (None, None)
    )


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _audio(scene: Scene) -> Iterator[tuple[str, str, str]]:
    heard = scene.sounding
    names = {t.kind for t in heard}
    yield "Counting", "How many musical instruments were heard throughout the video?", _COUNTS[len(heard)]
    for kind in KINDS:
        yield "Counting", f"Is there a {kind} sound?", _yes(kind in names)
    for a, b in itertools.permutations(KINDS, 2):
        if a in names or b in names:
            yield "Counting", f"Are there {a} and {b} sound? ", _yes({a, b} <= names)
    for one, other in itertools.permutations(heard, 2):
        yield "Comparative", f"Is the {one.kind} louder than the {other.kind}?", _yes(one.loudness > other.loudness)
        longer = sum(one.heard(k) - other.heard(k) for k in range(SECONDS))
        if abs(longer) > 1:
            yield "Comparative", f"Is the {one.kind} playing longer than the {other.kind}?", _yes(longer > 0)


def _visual(scene: Scene) -> Iterator[tuple[str, str, str]]:
    seen = scene.visible
    names = {t.kind for t in seen}
    yield "Counting", "How many types of musical instruments appeared in the entire video?", _COUNTS[len(seen)]
    for kind in KINDS:
        yield "Counting", f"How many {kind} are in the entire video?", _COUNTS[kind in names]
        yield "Counting", f"Is there a {kind} in the entire video?", _yes(kind in names)
    for a, b in itertools.permutations(KINDS, 2):
        if a in names or b in names:
            yield "Counting", f"Are there {a} and {b} instruments in the video?", _yes({a, b} <= names)
    if only := _only(seen):
        yield "Location", "What kind of musical instrument is it?", only.kind
        return
    for side, place in (("left", 0), ("right", -1)):
        yield "Location", f"What kind of instrument is the {side}est instrument? ", seen[place].kind
        for thing in seen:
            if neighbour := _only(_beside(scene, thing, side)):
                yield "Location", f"What is the instrument on the {side} of {thing.kind}?", neighbour.kind


def _beside(scene: Scene, thing: Thing, side: str) -> list[Thing]:
    """Return the visible things on the left or right of a visible thing."""
    return [t for t in scene.visible if (t.x < thing.x if side == "left" else t.x > thing.x)]


def _audio_visual(scene: Scene) -> Iterator[tuple[str, str, str]]:
    seen, heard = scene.visible, scene.sounding
    if only := _only(heard):
        yield "Existential", "Is this sound from the instrument in the video?", _yes(only.visible is not None)
    if heard:
        yield "Existential", "Is there a voiceover?", _yes(any(not t.visible for t in heard))
    for thing in seen:
        if thing.sounding:
            always = _yes(thing.sounding == (0, SECONDS))
            yield "Existential", f"Is the {thing.kind} in the video always playing?", always
        yield "Counting", f"How many sounding {thing.kind} in the video？", _COUNTS[thing.sounding is not None]
    silent = sum(not t.sounding for t in seen)
    yield "Counting", "How many instruments in the video did not sound from beginning to end?", _COUNTS[silent]
    yield "Counting", "How many instruments are sounding in the video?", _COUNTS[len(seen) - silent]
    yield from _audio_visual_comparative(seen)
    if len(heard) > 1:
        yield from _audio_visual_order(scene, heard)


def _audio_visual_comparative(seen: Sequence[Thing]) -> Iterator[tuple[str, str, str]]:
    for a, b in itertools.permutations(seen, 2):
        if a.sounding or b.sounding:
            for one, other in (("instrument", "instrument"), (a.kind, b.kind)):
                yield (
                    "Comparative",
                    f"Is the {one} on the {a.slot} louder than the {other} on the {b.slot}?",
                    _yes(a.loudness > b.loudness),
                )


def _audio_visual_order(scene: Scene, heard: Sequence[Thing]) -> Iterator[tuple[str, str, str]]:
    """Yield questions about which of several sounding things is first, last, loudest or lowest, and where."""
    by_level = sorted(heard, key=lambda t: t.loudness)
    for word, thing in (("loudest", by_level[-1]), ("lowest", by_level[0])):
        if thing.visible and thing.slot:
            yield "Location", f"Where is the {word} instrument?", thing.slot
    for word, alone in zip(("first", "last"), _first_last(heard), strict=True):
        if alone and alone.visible and alone.slot:
            yield "Temporal", f"Where is the {word} sounding instrument?", alone.slot
            for other in scene.visible:
                yield (
                    "Location",
                    f"Is the {word} sound coming from the {other.slot} instrument?",
                    _yes(other is alone),
                )
            for side in ("left", "right"):
                if neighbour := _only(_beside(scene, alone, side)):
                    text = f"What is the {side} instrument of the {word} sounding instrument?"
                    yield "Location", text, neighbour.kind
    starts = [t.onset for t in heard]
    if len(set(starts)) == 1:
        yield "Temporal", "What is the first instrument that comes in?", "simultaneously"
    if len(set(starts)) == len(starts):
        for word, thing in zip(_ORDINALS, heard, strict=False):
            yield "Temporal", f"What is the {word} instrument that comes in?", thing.kind
    for thing in heard:
        others = [t for t in heard if t is not thing]
        together = [t for t in others if any(t.heard(k) and thing.heard(k) for k in range(SECONDS))]
        if only := _only(together):
            text = f"Which is the musical instrument that sounds at the same time as the {thing.kind}?"
            yield "Location", text, only.kind
        if only := _only([t for t in others if t.onset < thing.onset]):
            yield "Temporal", f"Which instrument makes sounds before the {thing.kind}?", only.kind
        if only := _only([t for t in others if t.onset > thing.onset]):
            yield "Temporal", f"Which instrument makes sounds after the {thing.kind}?", only.kind


def questions(scene: Scene, count: int) -> list[Question]:
    """Return up to `count` questions of different types about a scene, the same ones for every call."""
    rng = scene.rng("questions")
    pool: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}  # type -> template -> answer -> questions
    for modality, source in (("Audio", _audio), ("Visual", _visual), ("Audio-Visual", _audio_visual)):
        for kind, text, answer in source(scene):
            templates = pool.setdefault((modality, kind), {})
            templates.setdefault(_SLOT_OR_KIND.sub("", text), {}).setdefault(answer, []).append(text)
    types = list(pool)
    # A type with a single possible template is asked less, because the scene alone determines its wording.
    weights = np.array([_RARE.get(t, 1.0) * min(len(pool[t]), 3) for t in types])
    chosen = []
    for position in rng.choice(len(types), len(types), replace=False, p=weights / weights.sum())[:count]:
        options = list(pool[types[position]].values())
        likely = np.array([_YES_NO if {"yes", "no"} & set(answers) else 1.0 for answers in options])
        answers = options[rng.choice(len(options), p=likely / likely.sum())]
        answer = str(rng.choice(sorted(answers)))
        chosen.append(Question(types[position], str(rng.choice(answers[answer])), answer))
    return chosen


def _expressions(scene: Scene) -> Iterator[tuple[str, str, Thing | None]]:
    """Yield every (template, expression, thing it refers to or None) of a scene.

    In most templates only the sound tells which of the visible things is meant; "kind" names the thing, "beside" its
    neighbour.
    """
    seen, heard = scene.visible, scene.sounding
    things = {t.kind: t for t in scene.things}
    silent, playing = [t for t in seen if not t.sounding], [t for t in seen if t.sounding]

    def if_seen(thing: Thing) -> Thing | None:
        return thing if thing.visible else None

    if len(heard) > 1:
        by_level = sorted(heard, key=lambda t: t.loudness)
        for word, thing in (("loudest", by_level[-1]), ("quietest", by_level[0])):
            yield word, f"the object making the {word} sound", if_seen(thing)
        for word, alone in zip(("first", "last"), _first_last(heard), strict=True):
            if alone:
                yield word, f"the object that starts sounding {word}", if_seen(alone)
    for word, text, group in (
        ("sounding", "the object that is making a sound", playing),
        ("silent", "the silent object", silent),
    ):
        if not group or (len(group) == 1 and len(seen) > 1):
            yield word, text, _only(group)
    for kind in KINDS:
        named = things.get(kind)
        for word, group in (("making a sound", playing), ("silent", silent)):
            if named not in group or len(seen) > 1:
                yield "kind", f"the {kind} that is {word}", named if named in group else None
    for thing in seen:
        for side in ("left", "right"):
            beside = _beside(scene, thing, side)
            if len(beside) < 2:
                yield "beside", f"the object on the {side} of the {thing.kind}", _only(beside)


_WEIGHTS = {"sounding": 3.0, "kind": 0.1, "beside": 0.1}  # relative frequency of templates; 1 for the others
_UNSEEN = "piano"  # the kind that no expression of the train and val splits refers to


def expressions(scene: Scene, count: int) -> list[Expression]:
    """Return up to `count` expressions about a scene, the same ones for every call.

    The test split has seen ones, unseen ones (as in Ref-AVS: a class that never occurs in training) and null ones in
    turn; the others have seen ones and some null ones. The object is visible in the chosen second, and heard then if it
    sounds while visible.
    """
    rng = scene.rng("expressions")
    pool: dict[str, dict[str, list[tuple[str, Thing | None]]]] = {"seen": {}, "unseen": {}, "null": {}}
    for template, text, thing in _expressions(scene):
        split = "null" if thing is None else "unseen" if thing.kind == _UNSEEN else "seen"
        pool[split].setdefault(template, []).append((text, thing))
    if scene.split == "test":
        order = rng.permutation([split for split in pool if pool[split]]).tolist()
        splits = [order[i % len(order)] for i in range(count)]
    else:
        splits = ["seen" if pool["seen"] and rng.random() >= _NULLS else "null" for _ in range(count)]
    chosen: dict[str, Expression] = {}
    for split in splits:
        likely = np.array([_WEIGHTS.get(template, 1.0) for template in pool[split]])
        options = list(pool[split].values())[rng.choice(len(likely), p=likely / likely.sum())]
        text, thing = options[rng.integers(len(options))]
        seconds = [k for k in range(SECONDS) if thing is None or (thing.seen(k) and (thing.heard(k) or not thing.both))]
        second = int(rng.choice(seconds))
        chosen.setdefault(text, Expression(split, text, thing.kind if thing else "", second))
    return list(chosen.values())
