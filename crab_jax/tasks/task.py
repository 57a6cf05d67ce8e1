"""Task: the functions that make one benchmark task, gathered from the one file that defines it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Stats = dict[str, Any]  # sufficient statistics of one sample: floats or small arrays
Meta = Mapping[str, Any]  # the label of one sample
Constant = tuple[str, np.ndarray | None]  # an answer: its text and its mask
Breakdown = dict[str, tuple[float, int]]  # class or question type -> its score and on how many samples


class Field(NamedTuple):
    """What one field of a task's `meta` must be: in words, and as a test of its value beside the whole label.

    needed: "answer" without it no target can be written; "score" only scoring needs it; "" it may be left out.
    """

    must_be: str
    holds: Callable[[Any, Meta], bool]
    needed: str = "answer"


def is_text(value: Any) -> bool:
    """Whether a value is text that says something, and nothing that a tag or a line of a target could hide."""
    return isinstance(value, str) and bool(value.strip()) and not any(mark in value for mark in "<>\n")


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number in [low, high]; neither 3.0 nor True is one."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a finite number in [low, high]."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value <= high
        and (math.isfinite(value))
    )


def is_list(value: Any, holds: Callable[[Any], bool], least: int = 0) -> bool:
    """Whether a value is a list of at least so many items that all hold."""
    return isinstance(value, list | tuple) and len(value) >= least and all(map(holds, value))


TEXT = Field("text, without angle brackets", lambda value, meta: is_text(value))
TEXTS = Field(
    "a list of at least one text",
    lambda value, meta: is_list(value, lambda text: isinstance(text, str) and bool(text.strip()), 1),
)
CLIP = Field("the name of the clip, or null", lambda value, meta: value is None or isinstance(value, str), "score")


class Published(NamedTuple):
    """A row of a published table: the model, its scores by our metric names (fractions), and where they were read."""

    model: str
    scores: Mapping[str, float]
    source: str


# Where the numbers of `published` were read. The body of the paper was not; what no source states is left out.
NOTES = "public notes on arXiv 2503.13068"
AV_REASONER = "result tables of AV-Reasoner, which cite the models"


def no_breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
    """The `breakdown` of a task without classes or types."""
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark task; every field is a pure function or a constant.

    instruction: `(variant="train", **fields) -> str`, the prompt with placeholders; variants "train", "test", "quick".
    target: `(**label fields, reasoning="") -> str`, the answer a model is trained to write.
    parse: `text -> label | None`, tolerant; None when the answer cannot be read.
    stats: `(parsed, mask, meta, gt_mask) -> Stats` of one sample; `parsed`/`mask` None when absent, `gt_mask`
        when the task has no masks. Masks are
        bool[H,W] (binary) or int[H,W] class ids (avss); `mask_scores` float[H,W] in [0,1] may replace a binary mask.
    reduce: `Sequence[Stats] -> {metric: float}` of any multiset of samples, in [0, 1] unless documented.
    constants: `(metas, gt_masks) -> [(text, mask or None)]`, candidate constant answers built from a set of labels;
        the best-scoring one is the "constant" baseline.
    metrics: what each metric of `reduce` is, in one line, with whose convention it follows.
    breakdown: `(stats, metas) -> {class or question type: (score, samples)}`, for plots.
    published: rows of the paper's table and of tables that cite it, as far as they are known.
    label: the fields of `meta` that the target and the score rest on; others may stand beside them.
    windows: the audio windows (docs/architecture.md) that suit the task, the usual ones first; `windows_for` chooses.
    timed: whether the label has seconds, which are tenths of the clip.
    """

    name: str
    instruction: Callable[..., str]
    target: Callable[..., str]
    parse: Callable[[str], Any]
    stats: Callable[[Any, np.ndarray | None, Mapping[str, Any], Any], Stats]
    reduce: Callable[[Sequence[Stats]], dict[str, float]]
    constants: Callable[[Sequence[Mapping[str, Any]], Sequence[np.ndarray | None]], Sequence[Constant]]
    headline: str
    metrics: Mapping[str, str]
    label: Mapping[str, Field]
    breakdown: Callable[[Sequence[Stats], Sequence[Meta]], Breakdown] = no_breakdown
    published: Sequence[Published] = ()
    mask_kind: str = "none"  # none | binary | semantic
    modalities: tuple[str, ...] = ("audio", "video")  # what the task cannot be answered without
    windows: tuple[str, ...] = ("ten",)
    timed: bool = False


SHORT, LONG = 7.5, 30.0  # seconds: clips of AVSBench's first parts have 5, those of MUSIC-AVQA 60, all others 10


def windows_for(task: Task, seconds: float, one_window: bool = False) -> str:
    """The audio windows, of those that suit a task, for a clip of so many seconds: all of them, or the one of the
    moment that is asked about, where the task knows that."""
    whole = "ten"
    if "music_avqa" in task.windows and seconds > LONG:
        whole = "music_avqa"
    elif task.windows[0] == "five" and seconds < SHORT:
        whole = "five"
    one = {"five": "one_of_five", "ten": "one"}.get(whole)
    return one if one_window and one in task.windows else whole


def wrong_fields(task: Task, meta: Meta, needed: Sequence[str] = ("answer", "score")) -> Iterator[tuple[str, str, str]]:
    """(field, problem, what it must be) of every field of a label that is wrong, or missing where it is needed."""
    for name, field in task.label.items():
        if name not in meta:
            if field.needed in needed:
                yield name, "missing", field.must_be
        elif not field.holds(meta[name], meta):
            yield name, f"is {meta[name]!r:.60}", field.must_be


def by_group(
    groups: Callable[[Meta], Iterable[str]], reduce: Callable[[Sequence[Stats]], dict[str, float]], metric: str
) -> Callable[[Sequence[Stats], Sequence[Meta]], Breakdown]:
    """A `breakdown`: `metric` over the samples of each of `groups(meta)`, in alphabetical order."""

    def breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
        found: dict[str, list[Stats]] = {}
        for sample, meta in zip(samples, metas, strict=True):
            for name in groups(meta):
                found.setdefault(name, []).append(sample)
        return {name: (reduce(found[name])[metric], len(found[name])) for name in sorted(found)}

    return breakdown
