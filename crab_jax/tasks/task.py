"""Task: everything that the code knows about one task, which is defined in one file.

A task of your own needs a name, prompt, target, parser, statistics, metrics, label and kind of answer; everything else
has a default (docs/your_data.md, "A task of your own"). The rest of the code never compares the name of a task: it
reads the fields of the Task.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks.text import normalise

ANSWERS = ("text", "events", "box", "mask")
FIELDS = ("question", "expression", "second")
WINDOWS = ("ten", "five", "music_avqa", "one", "one_of_five", "none")
MASK_KINDS = ("none", "binary", "semantic")
HEARD_AND_SEEN = "heard and seen"  # the sense of an event
FREE = "question"  # in place of a task's name: the question is put to the model without the prompt of a task
RESERVED = (FREE, "text", "bce", "dice", "ce", "loss", "samples")  # other names in the logs of a run
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")  # names are config keys and parts of file names
_EMPTY_WORDS = ("", "null", "none", "nan", "n a", "na", "undefined", "unknown")

Stats = dict[str, Any]  # sufficient statistics of one sample: floats or small arrays
Meta = Mapping[str, Any]  # the label of one sample
Constant = tuple[str, np.ndarray | None]  # an answer: its text and its mask
Breakdown = dict[str, tuple[float, int]]  # class or question type -> its score and on how many samples
Box = tuple[float, float, float, float]  # x1, y1, x2, y2


class Event(NamedTuple):
    """Something that happens from `start` to `end`, in tenths of the clip (seconds of a clip of ten seconds).

    sense: "heard", "seen", "heard and seen", or "" where the label does not say.
    """

    name: str
    start: float
    end: float
    sense: str


class Oddity(NamedTuple):
    """Something in a label that looks wrong.

    wrong: True where it would be trained on or scored wrongly, False where it only looks odd. field: the field of
    `meta`. problem: what looks wrong. fix: what to do about it.
    """

    wrong: bool
    field: str
    problem: str
    fix: str


class Made(NamedTuple):
    """What a task makes of a row of a user's table.

    instruction: the prompt. arguments: those of the task's `target`. meta: the label. fields: the other fields of the
    Example (windows, second, mask, seg_image).
    """

    instruction: str
    arguments: dict[str, Any]
    meta: dict[str, Any]
    fields: dict[str, Any]


class Row(Protocol):
    """One row of a user's table, as `Task.from_row` gets it; crab_jax/tasks/rows.py reads columns that tasks share."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The cells by the names of their columns; "task" holds the task's name."""

    @property
    def media(self) -> frozenset[str]:
        """The kinds of media that the row names, of "video", "frames", "image" and "audio"."""

    @property
    def seconds(self) -> float:
        """The length of the row's sound in seconds."""

    def given(self, field: str) -> Any:
        """Return the value of a column: text, or any value where the row is JSON; None where it is empty."""

    def text(self, field: str, fix: str = "") -> str:
        """Return the text of a column. Raises InputError, with `fix`, where it is empty or not text."""

    def text_of(self, field: str, value: Any) -> str:
        """Return `value`, which is a part of a column, checked as `text` checks a whole one."""

    def second(self) -> int | None:
        """Return the column `second`, None where it is empty."""

    def moment(self, empty: bool = False) -> tuple[int, dict[str, Any]]:
        """Return the second, and the fields `second`, `windows`, `mask` and `seg_image` of a question about pixels.

        empty: whether an empty column `mask` means that the mask is empty.
        """

    def picture_size(self) -> tuple[int, int]:
        """Return the width and height of the row's picture in pixels."""

    def error(self, field: str, problem: str, fix: str) -> InputError:
        """Return the error that names the row's file and line."""


class Field(NamedTuple):
    """What one field of a task's `meta` must be: in words, and as a test of its value given the whole label.

    needed: "answer" where the target depends on the field, "score" where only scoring does, "" where the field may be
    left out.
    """

    must_be: str
    holds: Callable[[Any, Meta], bool]
    needed: str = "answer"


def is_text(value: Any) -> bool:
    """Whether a value is text that is not blank and has no angle bracket or line break, which would break a target."""
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
    """Whether a value is a list or tuple of at least `least` items, for all of which `holds` is true."""
    return isinstance(value, list | tuple) and len(value) >= least and all(map(holds, value))


TEXT = Field("text, without angle brackets", lambda value, meta: is_text(value))
TEXTS = Field(
    "a list of at least one text",
    lambda value, meta: is_list(value, lambda text: isinstance(text, str) and bool(text.strip()), 1),
)
CLIP_NAME = Field("the name of the clip, or null", lambda value, meta: value is None or isinstance(value, str), "score")


class Published(NamedTuple):
    """A row of a published table: the model, its scores under our metric names (as fractions), and the source."""

    model: str
    scores: Mapping[str, float]
    source: str


# The sources of the numbers in `published`. The paper itself was not read; what no source states is left out.
NOTES = "public notes on arXiv 2503.13068"
AV_REASONER = "result tables of AV-Reasoner, which cite the models"


def no_breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
    """Return an empty `breakdown`, for a task without classes or types."""
    return {}


def no_constants(metas: Sequence[Meta], gt_masks: Sequence[np.ndarray | None]) -> Sequence[Constant]:
    """Return one empty answer, the `constants` of a task that defines none."""
    return [("", None)]


def no_oddities(meta: Meta) -> Iterable[Oddity]:
    """Return no `oddities`, for a task whose labels are checked field by field only."""
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One task. Every field is a pure function or a constant; the fields without a default are required.

    name: lower-case letters, digits, "-" and "_".
    instruction: `(variant="train", **fields) -> str`, the prompt with placeholders; variants "train", "test", "quick".
    target: `(**arguments, reasoning="") -> str`, the answer a model is trained to write.
    parse: `text -> parsed answer`, tolerant of badly written text; None when the answer cannot be read.
    stats: `(parsed, mask, meta, gt_mask) -> Stats` of one sample; `parsed` and `mask` are None when absent, `gt_mask`
        when the task has no masks. A mask is float[H,W] scores in [0, 1] or bool[H,W] (binary), or int[H,W] class ids
        (semantic).
    reduce: `Sequence[Stats] -> {metric: float}` of any multiset of samples, in [0, 1] unless documented.
    headline: the main metric.
    metrics: what each metric of `reduce` is, in one line, with whose convention it follows.
    label: the fields of `meta` that the target and the score depend on; `meta` may have others.

    The kind of answer, and how it is drawn:
    answer: "text"; "events" on the time line of the clip; a "box" in a picture; a "mask" of a picture.
    mask_kind: for masks, "binary" or "semantic" (the 71 classes of AVSBench).
    events: for events, `parsed answer or meta -> [Event]`. Seconds of the label are tenths of the clip.
    box: for boxes, `parsed answer or meta -> (x1, y1, x2, y2)` in the 224 x 224 picture, or None.
    drawn: what the picture of an answer shows, in a few words.
    shown: `meta -> str`, the label in a few words; by default its fields.

    The question:
    fields: the arguments of `instruction`, of "question", "expression" and "second".
    unasked: field -> the texts that `predict --all-tasks` asks when the user gives none; a task whose field has no
        entry is then left out.
    windows: the audio windows (docs/architecture.md) that suit the task, the usual ones first; `windows_for` chooses.
    own_words: whether people ask the task in words of their own.
    test_second: the second that the prompts of "test" ask about, whatever `second` is.

    Scoring:
    constants: `(metas, gt_masks) -> [(text, mask or None)]`, candidate constant answers built from a set of labels;
        the best-scoring one is the "constant" baseline.
    ranked_by: the metric that ranks single samples; "" is the headline.
    rank: `metrics of one sample -> float`, where one metric cannot rank every sample; higher is better.
    breakdown: `(stats, metas) -> {class or question type: (score, samples)}`, for plots.
    breakdown_of: the metric of the breakdown, by default the headline.
    published: rows of the paper's table and of tables that cite it, as far as they are known.

    Checks of a label and its target:
    arguments: `(meta, second) -> arguments of target`, without `reasoning`, of a valid label; by default the fields of
        `label` that an answer needs, text stripped. Raises InputError for a label that cannot be put into a target.
    weak: `meta -> str`, why a label is too incomplete for a target, "" where it is complete.
    names: `meta -> names` of the things and events in a valid or weak label.
    name_field: the field that holds the names, by default the first.
    known: the names that the benchmark has.
    tags: the tags of a target; None for a task whose targets are not checked for unknown tags.
    disagreements: `(target, arguments, meta, second) -> [problem]`, how a target differs from its label; `arguments`
        is empty for a weak label. By default the parser must read the same from the target as from the target that the
        label gives.
    oddities: `meta -> [Oddity]`, usual mistakes in a label whose fields are valid.
    several: whether a question about a clip may have several right answers.
    answer_start: how the answer begins; the text before it in a target is the reasoning.

    A user's table (docs/your_data.md):
    columns: the columns of a row, besides the media; by default `fields` and the fields of `label`.
    from_row: `Row -> Made`; by default each field of the label is a column, as text or as JSON.
    sound_alone: whether a row may have a sound and no picture.
    """

    name: str
    instruction: Callable[..., str]
    target: Callable[..., str]
    parse: Callable[[str], Any]
    stats: Callable[[Any, np.ndarray | None, Mapping[str, Any], Any], Stats]
    reduce: Callable[[Sequence[Stats]], dict[str, float]]
    headline: str
    metrics: Mapping[str, str]
    label: Mapping[str, Field]

    answer: str = "text"
    mask_kind: str = "none"
    events: Callable[[Any], Sequence[Event]] = lambda said: ()
    box: Callable[[Any], Box | None] = lambda said: None
    drawn: str = ""
    shown: Callable[[Meta], str] | None = None

    fields: tuple[str, ...] = ()
    unasked: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    windows: tuple[str, ...] = ("ten",)
    own_words: bool = False
    test_second: int | None = None

    constants: Callable[[Sequence[Meta], Sequence[np.ndarray | None]], Sequence[Constant]] = no_constants
    ranked_by: str = ""
    rank: Callable[[Mapping[str, float]], float] | None = None
    breakdown: Callable[[Sequence[Stats], Sequence[Meta]], Breakdown] = no_breakdown
    breakdown_of: str = ""
    published: Sequence[Published] = ()

    arguments: Callable[[Meta, int], dict[str, Any]] | None = None
    weak: Callable[[Meta], str] = lambda meta: ""
    names: Callable[[Meta], tuple[str, ...]] = lambda meta: ()
    name_field: str = ""
    known: tuple[str, ...] = ()
    tags: tuple[str, ...] | None = None
    disagreements: Callable[[str, Mapping[str, Any], Meta, int], list[str]] | None = None
    oddities: Callable[[Meta], Iterable[Oddity]] = no_oddities
    several: bool = False
    answer_start: str = ""

    columns: tuple[str, ...] | None = None
    from_row: Callable[[Row], Made] | None = None
    sound_alone: bool = False

    def __post_init__(self) -> None:
        where = f"task {self.name!r:.60}"

        def check(field: str, holds: bool, fix: str) -> None:
            if not holds:
                raise InputError(where, field, f"is {getattr(self, field)!r:.80}", fix)

        named = isinstance(self.name, str) and bool(_NAME.fullmatch(self.name)) and self.name not in RESERVED
        check("name", named, f"use lower-case letters, digits, '-' and '_', and none of {', '.join(RESERVED)}")
        check("answer", self.answer in ANSWERS, f"use one of {', '.join(ANSWERS)}")
        kinds = MASK_KINDS[1:] if self.answer == "mask" else MASK_KINDS[:1]
        check("mask_kind", self.mask_kind in kinds, f"use {' or '.join(map(repr, kinds))} for answers of this kind")
        check("fields", set(self.fields) <= set(FIELDS), f"use some of {', '.join(FIELDS)}")
        check("windows", bool(self.windows) and set(self.windows) <= set(WINDOWS), f"use some of {', '.join(WINDOWS)}")
        check("headline", self.headline in self.metrics, f"use one of the metrics, {', '.join(self.metrics)}")
        check("ranked_by", self.ranked_by in ("", *self.metrics), f"use one of the metrics, {', '.join(self.metrics)}")

    @property
    def timed(self) -> bool:
        """Whether the label has seconds, which are tenths of the clip."""
        return self.answer == "events"

    @property
    def about_picture(self) -> bool:
        """Whether the question is about one picture, of a clip or alone, and the answer is a place in that picture."""
        return self.answer in ("box", "mask")


SHORT, LONG = 7.5, 30.0  # seconds; clips of S4 and MS3 last 5, those of MUSIC-AVQA 60, all others 10


def windows_for(task: Task, seconds: float, one_window: bool = False) -> str:
    """Return the kind of audio windows that suits a task, for a clip of `seconds`.

    one_window: choose the kind that has only the window of the second asked about, where the task has such a kind.
    """
    whole = "ten"
    if "music_avqa" in task.windows and seconds > LONG:
        whole = "music_avqa"
    elif task.windows[0] == "five" and seconds < SHORT:
        whole = "five"
    one = {"five": "one_of_five", "ten": "one"}.get(whole)
    return one if one_window and one in task.windows else whole


def wrong_fields(task: Task, meta: Meta, needed: Sequence[str] = ("answer", "score")) -> Iterator[tuple[str, str, str]]:
    """Yield (field, problem, what it must be) of every field of a label that is wrong, or missing though needed."""
    for name, field in task.label.items():
        if name not in meta:
            if field.needed in needed:
                yield name, "missing", field.must_be
        elif not field.holds(meta[name], meta):
            yield name, f"is {meta[name]!r:.60}", field.must_be


def arguments_of(task: Task, meta: Meta, second: int = 0) -> dict[str, Any]:
    """Return the arguments of a task's target, without `reasoning`, from a valid label (see `wrong_fields`).

    Raises InputError, naming the field, for a label that cannot be put into a target.
    """
    if task.arguments:
        return task.arguments(meta, second)
    needed = [name for name, field in task.label.items() if field.needed == "answer" and name in meta]
    return {name: value.strip() if isinstance(value := meta[name], str) else value for name in needed}


def shown_label(task: Task, meta: Meta) -> str:
    """Return a label in a few words, for pages."""
    return task.shown(meta) if task.shown else ", ".join(str(meta[name]) for name in task.label if name in meta)


def disagreements_of(task: Task, target: str, arguments: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label, in words; `arguments` is empty for a weak label."""
    if task.disagreements:
        return task.disagreements(target, arguments, meta, second)
    said, truth = task.parse(target), task.parse(task.target(**arguments)) if arguments else None
    if said is None:
        return [f"cannot be read as an answer to {task.name}"]
    return [] if truth is None or said == truth else [f"says {said!r:.60}, the label says {truth!r:.60}"]


def odd_names(names: Iterable[str], field: str) -> Iterator[Oddity]:
    """Yield the names of things or events that are words for "no value" or numbers."""
    for name in names:
        if says_nothing(name):
            yield Oddity(True, field, f"is {name!r}, which stands for no value", "give the name")
        elif re.fullmatch(r"[0-9.]+", name):
            yield Oddity(True, field, f"is {name!r}, a number", "give the name, not the number of a class")


def says_nothing(text: str) -> bool:
    """Whether a text is one of the words that programs write where a value is missing, such as "nan"."""
    return normalise(text) in _EMPTY_WORDS


def sample_metric(task: Task) -> str:
    """Return the name of the metric that ranks the samples of a task: `ranked_by`, or the headline."""
    return task.ranked_by or task.headline


def sample_score(task: Task, stats: Stats) -> float:
    """Return the score that ranks one sample among others of its task; higher is better."""
    metrics = task.reduce([stats])
    return task.rank(metrics) if task.rank else metrics[sample_metric(task)]


def by_group(
    groups: Callable[[Meta], Iterable[str]], reduce: Callable[[Sequence[Stats]], dict[str, float]], metric: str
) -> Callable[[Sequence[Stats], Sequence[Meta]], Breakdown]:
    """Return a function `breakdown` that gives `metric` over the samples of each group, in alphabetical order.

    groups: `meta -> names of the groups` that a sample belongs to.
    """

    def breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
        found: dict[str, list[Stats]] = {}
        for sample, meta in zip(samples, metas, strict=True):
            for name in groups(meta):
                found.setdefault(name, []).append(sample)
        return {name: (reduce(found[name])[metric], len(found[name])) for name in sorted(found)}

    return breakdown
