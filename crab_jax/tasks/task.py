"""Task: all that the code knows about one task, gathered from the one file that defines it.

A task of your own needs its name, prompt, target, parser, statistics, metrics and label, and says which kind of answer
it has; everything else has a default (docs/your_data.md, "A task of your own"). The rest of the code never asks which
task it has before it: it looks at the fields of the Task.
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
FREE = "question"  # the task of a question that is put to the model as it stands
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")  # names are config keys and parts of file names
_EMPTY_WORDS = ("", "null", "none", "nan", "n a", "na", "undefined", "unknown")

Stats = dict[str, Any]  # sufficient statistics of one sample: floats or small arrays
Meta = Mapping[str, Any]  # the label of one sample
Constant = tuple[str, np.ndarray | None]  # an answer: its text and its mask
Breakdown = dict[str, tuple[float, int]]  # class or question type -> its score and on how many samples
Box = tuple[float, float, float, float]  # x1, y1, x2, y2


class Event(NamedTuple):
    """Something that happens from `start` to `end`, in tenths of the clip (seconds of a clip of ten). sense: "heard",
    "seen", "heard and seen", or "" where that is not told."""

    name: str
    start: float
    end: float
    sense: str


class Oddity(NamedTuple):
    """What looks wrong in a label. wrong: whether it would train or score something wrong, or only looks odd. field: of
    `meta`; fix: what to do."""

    wrong: bool
    field: str
    problem: str
    fix: str


class Made(NamedTuple):
    """What a row of a user's table means: the prompt, the arguments of the target, the label that becomes `meta`, and
    the other fields of the Example (windows, second, mask, seg_image)."""

    instruction: str
    arguments: dict[str, Any]
    meta: dict[str, Any]
    fields: dict[str, Any]


class Row(Protocol):
    """One row of a user's table, as `Task.from_row` sees it; crab_jax/tasks/rows.py reads common columns of it.

    media: what the row shows and plays, of "video", "frames", "image" and "audio". seconds: how long its sound is.
    """

    @property
    def values(self) -> Mapping[str, Any]:
        """The cells by the names of their columns; "task" is the task's name."""

    @property
    def media(self) -> frozenset[str]: ...

    @property
    def seconds(self) -> float: ...

    def given(self, field: str) -> Any:
        """Return what a column says, None where it is empty: text, or from JSON any value."""

    def text(self, field: str, fix: str = "") -> str:
        """Return the text of a column. Raises InputError, with `fix`, where it is empty or no text."""

    def text_of(self, field: str, value: Any) -> str:
        """Return `value`, a part of a column, as `text` does."""

    def second(self) -> int | None:
        """Return the column `second`, None where it is empty."""

    def moment(self, empty: bool = False) -> tuple[int, dict[str, Any]]:
        """Return the second, and the fields `second`, `windows`, `mask`, `seg_image` of a question about pixels.

        empty: whether an empty column `mask` means that nothing is to be seen.
        """

    def picture_size(self) -> tuple[int, int]:
        """Return width and height of the row's picture."""

    def error(self, field: str, problem: str, fix: str) -> InputError:
        """Return the error that names the row's file and line."""


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
CLIP_NAME = Field("the name of the clip, or null", lambda value, meta: value is None or isinstance(value, str), "score")


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


def no_constants(metas: Sequence[Meta], gt_masks: Sequence[np.ndarray | None]) -> Sequence[Constant]:
    """Return the `constants` of a task without better ones: an answer that says nothing."""
    return [("", None)]


def no_oddities(meta: Meta) -> Iterable[Oddity]:
    """Return the `oddities` of a task whose label can hold none beyond wrong fields."""
    return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One task; every field is a pure function or a constant. Those without a default are what every task needs.

    name: lower-case letters, digits, "-" and "_".
    instruction: `(variant="train", **fields) -> str`, the prompt with placeholders; variants "train", "test", "quick".
    target: `(**arguments, reasoning="") -> str`, the answer a model is trained to write.
    parse: `text -> what it says`, tolerant; None when the answer cannot be read.
    stats: `(parsed, mask, meta, gt_mask) -> Stats` of one sample; `parsed` and `mask` are None when absent, `gt_mask`
        when the task has no masks. A mask is float[H,W] scores in [0, 1] or bool[H,W] (binary), or int[H,W] class ids
        (semantic).
    reduce: `Sequence[Stats] -> {metric: float}` of any multiset of samples, in [0, 1] unless documented.
    headline: the main metric.
    metrics: what each metric of `reduce` is, in one line, with whose convention it follows.
    label: the fields of `meta` that the target and the score rest on; others may stand beside them.

    What an answer is, and what is drawn of it:
    answer: its kind. "text"; "events" on the time line of the clip; a "box" in a picture; a "mask" of a picture.
    mask_kind: "binary" or "semantic" (the 71 classes of AVSBench), for masks.
    events: `what parse returns, or meta -> [Event]`, for events. Seconds of the label are tenths of the clip.
    box: `what parse returns, or meta -> (x1, y1, x2, y2)` in the 224 x 224 picture, or None, for boxes.
    drawn: what the picture of an answer shows, in a few words.
    shown: `meta -> str`, the label in a few words; by default its fields.

    How it is asked:
    fields: what a prompt needs of "question", "expression" and "second".
    unasked: field -> what `predict --all-tasks` asks where none is given; without an entry it asks nothing.
    windows: the audio windows (docs/architecture.md) that suit the task, the usual ones first; `windows_for` chooses.
    own_words: whether people ask it in words of their own.
    test_second: the second that the prompts of "test" ask about, whatever `second` is.

    How answers are judged:
    constants: `(metas, gt_masks) -> [(text, mask or None)]`, candidate constant answers built from a set of labels;
        the best-scoring one is the "constant" baseline.
    ranked_by: the metric that ranks single samples; "" is the headline.
    rank: `metrics of one sample -> float`, where `ranked_by` alone does not rank it; the higher the better.
    breakdown: `(stats, metas) -> {class or question type: (score, samples)}`, for plots; breakdown_of: what the score
        is, by default the headline.
    published: rows of the paper's table and of tables that cite it, as far as they are known.

    How a label is checked:
    arguments: `(meta, second) -> arguments of target`, less `reasoning`, of a sound label; by default the fields of
        `label` that an answer needs, text stripped. Raises InputError for what no target can say.
    weak: `meta -> str`, why a label says too little for a target, "" where it says enough.
    names: `meta -> names` of the things and events in a sound or weak label; name_field: the field that holds them, by
        default the first; known: the names that the benchmark has.
    tags: the tags of a target, None for a task whose targets are not looked at for others.
    disagreements: `(target, arguments, meta, second) -> [problem]`, what in a target is not as its label says; the
        arguments are empty for a weak label. By default the parser must read what it reads in the label's own target.
    oddities: `meta -> [Oddity]`, what people get wrong in a label whose fields are sound.
    several: whether a question about a clip may have several right answers.
    answer_start: how the answer begins; what stands before it in a target is the reasoning.

    A user's table (docs/your_data.md):
    columns: those of a row, beside the media; by default `fields`, and the fields of `label`.
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

        named = isinstance(self.name, str) and bool(_NAME.fullmatch(self.name)) and self.name != FREE
        check("name", named, f"use lower-case letters, digits, '-' and '_', and not {FREE!r}")
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
        """Whether the task is asked about one picture, of a clip or alone, and answered by a place in it."""
        return self.answer in ("box", "mask")


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


def arguments_of(task: Task, meta: Meta, second: int = 0) -> dict[str, Any]:
    """Return the arguments of a task's target, less `reasoning`, from a sound label (see `wrong_fields`).

    Raises InputError, naming the field, for a label that no target can say.
    """
    if task.arguments:
        return task.arguments(meta, second)
    needed = [name for name, field in task.label.items() if field.needed == "answer" and name in meta]
    return {name: value.strip() if isinstance(value := meta[name], str) else value for name in needed}


def shown_label(task: Task, meta: Meta) -> str:
    """Return what a label says in a few words, for pages."""
    return task.shown(meta) if task.shown else ", ".join(str(meta[name]) for name in task.label if name in meta)


def disagreements_of(task: Task, target: str, arguments: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return what in a target is not as its label says; `arguments` are empty for a weak label."""
    if task.disagreements:
        return task.disagreements(target, arguments, meta, second)
    said, truth = task.parse(target), task.parse(task.target(**arguments)) if arguments else None
    if said is None:
        return [f"cannot be read as an answer to {task.name}"]
    return [] if truth is None or said == truth else [f"says {said!r:.60}, the label says {truth!r:.60}"]


def odd_names(names: Iterable[str], field: str) -> Iterator[Oddity]:
    """Yield what is wrong with names of things or events: words for "no value", and numbers."""
    for name in names:
        if says_nothing(name):
            yield Oddity(True, field, f"is {name!r}, which stands for no value", "give the name")
        elif re.fullmatch(r"[0-9.]+", name):
            yield Oddity(True, field, f"is {name!r}, a number", "give the name, not the number of a class")


def says_nothing(text: str) -> bool:
    """Whether a text is one of the words that programs write for no value."""
    return normalise(text) in _EMPTY_WORDS


def sample_metric(task: Task) -> str:
    """Return what ranks the samples of a task: its headline, where that says something about one sample alone."""
    return task.ranked_by or task.headline


def sample_score(task: Task, stats: Stats) -> float:
    """Return the place of one sample among others of its task; the higher the better."""
    metrics = task.reduce([stats])
    return task.rank(metrics) if task.rank else metrics[sample_metric(task)]


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
