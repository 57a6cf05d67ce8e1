"""The generated audio-visual scenes: their contents, and how a scene is drawn from a seed.

A scene is ten seconds with one to three musical instruments of different kinds. Each may be seen in one interval and
heard in another; some are seen but silent, some are heard but never seen, and which visible instrument sounds is
random, so that neither sight nor hearing alone answers the questions about it. The names exist both in the
AVSBench-semantic palette and in the MUSIC-AVQA answer list, so the generated clips suit the real tasks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.io.bounds import Choice, Real, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.files import write_whole
from crab_jax.io.structured import Null, read_json

KINDS = ("piano", "drum", "violin", "flute", "accordion", "trumpet")
CLASS_IDS = dict(zip(KINDS, (47, 19, 68, 24, 1, 63), strict=True))  # AVSBench-semantic
SPLITS = ("train", "val", "test")
SLOTS = ("left", "middle", "right")
LEVELS = {1.0: "loud", 0.45: "medium", 0.2: "quiet"}  # about 7 dB apart, clearly distinguishable
SECONDS = 10
SIZE = 128  # pixels of a side of the picture
BOX_SPACE = 224  # boxes are written in the pixels of a 224 x 224 picture, as in AV-UIE
_SLOT_X = (0.19, 0.5, 0.81)
_SIZES = {1: (0.30, 0.45), 2: (0.28, 0.42), 3: (0.25, 0.36)}  # by number of visible things, which overlap only slightly
_SOUNDING = {
    1: (0.22, 0.78),
    2: (0.14, 0.51, 0.35),
    3: (0.05, 0.45, 0.30, 0.20),
}  # by number of visible things: P(number of them that sound)

Interval = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Thing:
    """One instrument of a scene.

    visible, sounding: [first, last) in whole seconds, None = never. slot: its position, None = never visible. x, y:
    centre, size: side, all as fractions of the picture. loudness: a key of LEVELS, 0 when silent. pitch, phase: in [0,
    1), the note it plays and the start of its motion. boxes: per second (x1, y1, x2, y2) of its uncovered pixels in
    BOX_SPACE, far edge exclusive, None when not seen.
    """

    kind: str
    slot: str | None
    x: float
    y: float
    size: float
    visible: Interval | None
    sounding: Interval | None
    loudness: float
    pitch: float
    phase: float
    boxes: tuple[Box | None, ...] = (None,) * SECONDS

    def seen(self, second: int) -> bool:
        """Return whether the thing is visible in a second."""
        return self.visible is not None and self.visible[0] <= second < self.visible[1]

    def heard(self, second: int) -> bool:
        """Return whether the thing sounds in a second."""
        return self.sounding is not None and self.sounding[0] <= second < self.sounding[1]

    @property
    def onset(self) -> int:
        """Return the first second in which a sounding thing is heard."""
        assert self.sounding is not None
        return self.sounding[0]

    @property
    def both(self) -> Interval | None:
        """Return the interval in which it is both seen and heard, or None."""
        return _overlap(self.visible, self.sounding)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Ten seconds with instruments. `things` are in drawing order: later ones cover earlier ones."""

    split: str
    index: int
    seed: int
    things: tuple[Thing, ...]

    @property
    def id(self) -> str:
        """Return the index as six digits."""
        return f"{self.index:06d}"

    @property
    def folder(self) -> str:
        """Return the folder of the scene relative to the data root."""
        return f"{self.split}/{self.id}"

    def rng(self, purpose: str) -> np.random.Generator:
        """Return random numbers of this scene for one purpose, independent of all other scenes and purposes."""
        return _rng(self.seed, self.split, self.index, purpose)

    @property
    def visible(self) -> list[Thing]:
        """Return the things that are seen at some time, from left to right."""
        return sorted((t for t in self.things if t.visible), key=lambda t: t.x)

    @property
    def sounding(self) -> list[Thing]:
        """Return the things that are heard at some time, by their first second."""
        return sorted((t for t in self.things if t.sounding), key=lambda t: (t.onset, KINDS.index(t.kind)))

    def sources(self, second: int) -> list[Thing]:
        """Return the things that are seen and heard at `second`, from left to right."""
        return [t for t in self.visible if t.seen(second) and t.heard(second)]


def _rng(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    streams = ("graph", "pictures", "sound", "questions", "expressions", "seconds")
    return np.random.default_rng([seed, SPLITS.index(split), index, streams.index(purpose)])


def _overlap(a: Interval | None, b: Interval | None) -> Interval | None:
    if a is None or b is None:
        return None
    start, end = max(a[0], b[0]), min(a[1], b[1])
    return (start, end) if start < end else None


def _too_apart(visible: Interval | None, sounding: Interval) -> bool:
    """Return whether a visible thing is seen and heard together for less than two seconds."""
    return visible is not None and min(visible[1], sounding[1]) - max(visible[0], sounding[0]) < 2


def _interval(rng: np.random.Generator, whole: float, shortest: int) -> Interval:
    """Return the whole clip with probability `whole`, else a random interval of at least `shortest` seconds."""
    if rng.random() < whole:
        return 0, SECONDS
    length = int(rng.integers(shortest, SECONDS))
    start = int(rng.integers(0, SECONDS - length + 1))
    return start, start + length


def sample(seed: int, split: str, index: int) -> Scene:
    """Return the scene of (seed, split, index); its boxes are filled in when it is drawn."""
    rng = _rng(seed, split, index, "graph")
    seen = int(rng.choice([1, 2, 3], p=[0.25, 0.45, 0.30]))
    loud = int(rng.choice(seen + 1, p=_SOUNDING[seen]))  # number of visible things that sound
    unseen = int(seen < 3 and rng.random() < (0.35 if loud else 0.65))  # heard, never seen
    kinds = rng.permutation(len(KINDS))[: seen + unseen]
    sounds = np.concatenate([rng.permutation(np.arange(seen) < loud), np.ones(unseen, bool)])
    levels = iter(rng.permutation(list(LEVELS)))
    slots = rng.permutation(len(SLOTS))[:seen]
    things: list[Thing] = []
    starts: list[int] = []  # mostly different, so that "first" has a meaning
    for i, kind in enumerate(kinds):
        visible = _interval(rng, 0.45, 4) if i < seen else None
        sounding = _interval(rng, 0.35, 2) if sounds[i] else None
        while sounding and (_too_apart(visible, sounding) or (sounding[0] in starts and rng.random() < 0.7)):
            sounding = _interval(rng, 0.35, 2)
        starts += [sounding[0]] if sounding else []
        size = rng.uniform(*_SIZES[seen])
        margin = size / 2 + 0.03
        x = float(np.clip(_SLOT_X[slots[i]] + rng.uniform(-0.04, 0.04), margin, 1 - margin)) if visible else 0.0
        things.append(
            Thing(
                kind=KINDS[kind],
                slot=SLOTS[slots[i]] if visible else None,
                x=round(x, 4),
                y=round(float(rng.uniform(0.36, 0.64)), 4) if visible else 0.0,
                size=round(float(size), 4) if visible else 0.0,
                visible=visible,
                sounding=sounding,
                loudness=float(next(levels)) if sounding else 0.0,
                pitch=round(float(rng.random()), 4),
                phase=round(float(rng.random()), 4),
            )
        )
    return Scene(split, index, seed, tuple(things))


def save(path: Path, scene: Scene) -> None:
    """Write scene.json: the scene, with flags per second for other readers."""
    things = [
        {
            **dataclasses.asdict(t),
            "class_id": CLASS_IDS[t.kind],
            "seen": [t.seen(k) for k in range(SECONDS)],
            "heard": [t.heard(k) for k in range(SECONDS)],
        }
        for t in scene.things
    ]
    record = {"split": scene.split, "index": scene.index, "seed": scene.seed, "things": things}
    write_whole(path, json.dumps(record) + "\n")  # it appears only when the scene is complete


_NUMBER, _INTERVAL = Real(-1e6, 1e6), Null((Whole(0, SECONDS), Whole(0, SECONDS)))
_THING = {
    "kind": Choice(tuple(KINDS)),
    "slot": Null(Text()),
    "visible": _INTERVAL,
    "sounding": _INTERVAL,
    **dict.fromkeys(("x", "y", "size", "loudness", "pitch", "phase"), _NUMBER),
    "boxes": (Null((_NUMBER,) * 4),) * SECONDS,
}
SCENE = {"split": Choice(SPLITS), "index": Whole(), "seed": Whole(), "things": [_THING]}


def load(path: str | Path) -> Scene:
    """Return the Scene of a scene.json file. Raises InputError when it is missing or malformed."""
    fix = "write the scenes again with `python -m data_pipelines.sources.scenes`"
    try:
        record = read_json(path, SCENE, fix=fix)
        return Scene(record["split"], record["index"], record["seed"], tuple(map(_thing, record["things"])))
    except InputError as error:
        raise InputError(error.where, error.field, f"not a scene ({error.problem})", fix) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(str(path), "", f"not a scene ({error!r:.80})", fix) from None


def _thing(record: dict[str, Any]) -> Thing:
    fields = {f.name: record[f.name] for f in dataclasses.fields(Thing)}
    for name in ("visible", "sounding"):
        fields[name] = tuple(fields[name]) if fields[name] else None
    fields["boxes"] = tuple(tuple(box) if box else None for box in fields["boxes"])
    return Thing(**fields)


def scene_table(scene: Scene) -> dict[str, np.ndarray]:
    """Return the scene as arrays, columns in KINDS order.

    visible bool[10,6], sounding bool[10,6], loudness float32[10,6] (0 when silent) and box float32[10,6,4] in BOX_SPACE
    (0 when not visible).
    """
    visible, sounding = np.zeros((2, SECONDS, len(KINDS)), bool)
    loudness = np.zeros((SECONDS, len(KINDS)), np.float32)
    box = np.zeros((SECONDS, len(KINDS), 4), np.float32)
    for thing in scene.things:
        column = KINDS.index(thing.kind)
        for second in range(SECONDS):
            visible[second, column] = thing.seen(second)
            sounding[second, column] = thing.heard(second)
            loudness[second, column] = thing.loudness * thing.heard(second)
            if thing.boxes[second]:
                box[second, column] = thing.boxes[second]
    return {"visible": visible, "sounding": sounding, "loudness": loudness, "box": box}
