"""Checks for usual mistakes in users' own lists of Examples, without opening media files.

A mistake that would be trained on or scored wrongly is malformed: `validate` exits 3, and training refuses the Example
(or leaves it out, with data.on_error=skip). Something that only looks odd is a warning. docs/your_data.md lists them.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from crab_jax.io import paths
from crab_jax.io.errors import InputError, printable
from crab_jax.io.files import json_object
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs import ORDINALS
from crab_jax.tasks.task import Task, odd_names, wrong_fields
from crab_jax.tasks.text import normalise
from crab_jax.tasks.times import SECONDS
from data_pipelines import fbank, labels
from data_pipelines.batching import check_sources
from data_pipelines.datasets import DATASETS, PREPARED, VARIANTS
from data_pipelines.examples import Example, seg_source
from data_pipelines.media import INLINE_MASK
from data_pipelines.status import MALFORMED, WARNING

_log = logging.getLogger(__name__)
PRETRAINING = tuple(name for name, dataset in DATASETS.items() if dataset.stage == "pretrain")
MANY = 10  # number of Examples after which a value that never changes gets a warning
ABOUT_TEN = 8.0, 12.0  # lengths of clips, in seconds, whose tenths are taken as seconds
LONGEST = {
    "ten": 30.0,
    "one": 30.0,
    "five": 15.0,
    "one_of_five": 15.0,
}  # windows -> longest clip in seconds; of longer ones much is not heard
_WRAP = re.compile(
    r"</?s>|<unk>|<pad>|\[/?INST\]|<</?SYS>>|<\|\w+\|>|^\s*(?:USER|ASSISTANT|Human|GPT)\s*:", re.IGNORECASE
)
NOTHING = "nothing"  # name of the object in generated scenes where nothing sounds
# Traces of text that a program wrote wrongly: entities, other encodings, escapes, control characters.
_SPOILT = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|#\w{1,6});|\u00e2\u20ac|\u00c3[\u0080-\u00bf]|\ufffd|\\[nrt\"]|"
    r"[\x00-\x08\x0b-\x1f\x7f\u0080-\u009f\u2028\u2029]",
    re.IGNORECASE,
)
_GAP = re.compile(r"<[A-Za-z]+>|\{\w*\}")  # an unfilled gap of a template
_TEXT_FIELDS = ("question", "expression")  # fields of a prompt that hold text of the user


class Finding(NamedTuple):
    """One mistake in an Example. kind: MALFORMED or WARNING. field: of the Example. fix: what to do about it."""

    kind: str
    field: str
    problem: str
    fix: str


def findings(example: Example, train: bool, seconds: float | None = None) -> Iterator[Finding]:
    """Yield the mistakes in one Example by itself.

    train: whether the Example is for training. seconds: length of the clip, 0 where not known; None when nothing has
    been decoded, and then mistakes that decoding would find are looked for as well, as far as possible.
    """
    if example.meta.get("dataset") in PRETRAINING:
        return  # these are other tasks that use the name of one of the nine
    yield from _text(example, train)
    yield from _prompt(example)
    yield from _meta(example, train)
    if labels.weak(example) or labels.sound(example):
        yield from _oddities(example)
        yield from _times(example, seconds)
        if not _WRAP.search(example.target):
            yield from _target(example)
    yield from _mask(example, train, seconds)
    yield from _windows(example, seconds)


def has_label(example: Example) -> bool:
    """Whether `meta` has any field of a label. Without one, only mistakes that would be read wrongly are reported."""
    return any(name in example.meta for name in (*TASKS[example.task].label, "labels"))


def _text(example: Example, train: bool) -> Iterator[Finding]:
    if train and not example.target.strip():
        yield Finding(MALFORMED, "target", "is empty, so there is nothing to learn", "write the answer")
    for field in ("instruction", "target"):
        if wrap := _WRAP.search(getattr(example, field)):
            yield Finding(
                MALFORMED,
                field,
                f"holds {wrap[0].strip()!r}, a part of the chat wrap, which is added later",
                "leave it out",
            )
        if spoilt := _SPOILT.search(getattr(example, field)):
            yield Finding(
                WARNING, field, f"holds {spoilt[0]!r}, which a program seems to have left there", "correct it"
            )
    if example.target != example.target.strip():
        yield Finding(WARNING, "target", "begins or ends in white space, which would be learnt", "leave it out")
    if not example.id.strip() or re.search(r"[\x00-\x1f]", example.id):
        yield Finding(MALFORMED, "id", f"is {example.id!r:.60}", "give one line of text")


# Prompts.


def _flat(text: str) -> str:
    return " ".join(text.split())


class _Prompt(NamedTuple):
    """The content of an instruction: the tasks whose prompt it is, the second, and the text in the prompt's gap."""

    tasks: frozenset[str]
    second: int | None = None
    filling: str = ""


@functools.cache
def _fixed_prompts(known: tuple[str, ...]) -> dict[str, _Prompt]:
    """Return {text: prompt} of every prompt without a gap, of the tasks `known`."""
    tasks_of: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    for name, variant in itertools.product(known, VARIANTS):
        task = TASKS[name]
        if "second" in task.fields and not set(_TEXT_FIELDS) & set(task.fields):
            for second in range(len(ORDINALS)):
                text = _flat(task.instruction(variant=variant, second=second))
                asked = [number for number, word in enumerate(ORDINALS) if f" {word} second" in text]
                tasks_of[text, asked[0] if asked else None].add(name)
        elif not task.fields:
            tasks_of[_flat(task.instruction(variant=variant)), None].add(name)
    return {text: _Prompt(frozenset(tasks), second) for (text, second), tasks in tasks_of.items()}


@functools.cache
def _open_prompts(known: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    """Return (task, pattern) of every prompt with a gap, of the tasks `known`; the gap of a question may be empty."""
    patterns = []
    for name in known:
        task = TASKS[name]
        texts = {field: f"0{field}0" for field in task.fields if field in _TEXT_FIELDS}
        for variant in VARIANTS if texts else ():
            fields = texts | ({"second": 0} if "second" in task.fields else {})
            pattern = re.escape(_flat(task.instruction(variant=variant, **fields)))
            pattern = pattern.replace(r"\ 0question0", r"\s*(?P<question>.*)")
            pattern = pattern.replace("0expression0", "(?P<expression>.+)")
            if "second" in task.fields:
                pattern = pattern.replace(r"\ first\ ", r"\ (?P<second>\w+)\ ")
            patterns.append((name, re.compile(pattern)))
    return patterns


def read_prompt(instruction: str, own: str = "") -> _Prompt | None:
    """Return the content of an instruction, None when it is no prompt of any task.

    own: the task whose reading is preferred when the instruction is a prompt of several tasks.
    """
    text, known = _flat(instruction), tuple(TASKS)
    if fixed := _fixed_prompts(known).get(text):
        return fixed
    matches = [(name, match) for name, pattern in _open_prompts(known) if (match := pattern.fullmatch(text))]
    if not matches:
        return None
    groups = next((match for name, match in matches if name == own), matches[0][1]).groupdict()
    word, filling = groups.get("second"), next(groups[field] for field in _TEXT_FIELDS if field in groups)
    second = ORDINALS.index(word) if word in ORDINALS else None
    return _Prompt(frozenset(name for name, _ in matches), second, filling.strip())


def _prompt(example: Example) -> Iterator[Finding]:
    has_clip = bool(example.video or example.frames)
    for shown, placeholder, field in ((has_clip, "<video>", "video"), (bool(example.image), "<image>", "image")):
        other = "<image>" if placeholder == "<video>" else "<video>"
        if shown and placeholder not in example.instruction and other in example.instruction:
            yield Finding(
                MALFORMED,
                "instruction",
                f"says {other}, but the example has {field!r}",
                f"put {placeholder} where the pictures go",
            )
    prompt, task = read_prompt(example.instruction, example.task), TASKS[example.task]
    if prompt is None:
        if not task.own_words and has_label(example):
            yield Finding(
                WARNING,
                "instruction",
                f"is no prompt that {example.task} is trained with",
                f"use crab_jax.tasks.TASKS[{example.task!r}].instruction(...)",
            )
        return
    if example.task not in prompt.tasks:
        yield Finding(
            MALFORMED,
            "instruction",
            f"is the prompt of {' and '.join(sorted(prompt.tasks))}, but the task is {example.task}",
            "correct one of them",
        )
        return
    if prompt.second is not None and prompt.second != example.second:
        released = prompt.second == task.test_second and example.second is not None
        yield Finding(
            WARNING if released else MALFORMED,
            "second",
            f"is {example.second}, but the prompt asks about the {ORDINALS[prompt.second]} "
            f"second, which is {prompt.second}",
            "count seconds from 0 in `second`",
        )
    what = next((field for field in _TEXT_FIELDS if field in task.fields), "")
    if what and not prompt.filling:
        yield Finding(MALFORMED, "instruction", f"asks no {what}", "write it behind the prompt")
    if gap := _GAP.search(prompt.filling):
        yield Finding(WARNING, "instruction", f"asks about {gap[0]!r}, the gap of a template", "fill it in")
    stated = example.meta.get(what)
    if isinstance(stated, str) and normalise(stated) != normalise(prompt.filling):
        yield Finding(
            MALFORMED if what == "expression" else WARNING,
            "instruction",
            f"asks {prompt.filling!r:.60}, but meta.{what} is {stated!r:.60}",
            "correct one of them",
        )


# The label, and the target beside it.


def _meta(example: Example, train: bool) -> Iterator[Finding]:
    task = TASKS[example.task]
    if not example.meta.keys() - {"row", "dataset", "one_of"}:
        if task.own_words or (task.mask_kind != "none" and not train):
            return  # it may only be answered or decoded; `evaluate` refuses to score it
        yield Finding(
            WARNING,
            "meta",
            "is empty, so the target cannot be compared with a label, nor an answer scored",
            f"give {', '.join(name for name, field in task.label.items() if field.needed)}",
        )
    elif not labels.weak(example) or not train:
        for name, problem, must_be in wrong_fields(task, example.meta):
            lacking = problem == "missing"
            if lacking and not train and not example.target:
                continue  # it may only be answered or decoded
            others = [key for key in example.meta if key not in task.label]
            close = difflib.get_close_matches(name, others, 1) if lacking else []
            only_score = lacking and task.label[name].needed == "score"
            yield Finding(
                WARNING if train and only_score else MALFORMED,
                f"meta.{name}",
                problem + (f" (there is {close[0]!r})" if close else ""),
                f"must be {must_be}",
            )


def _target(example: Example) -> Iterator[Finding]:
    try:
        problems = labels.disagreements(example)
    except InputError as error:  # the label cannot be put into a target
        yield Finding(MALFORMED, error.field, error.problem, error.fix)
        return
    for problem in problems:
        yield Finding(
            MALFORMED,
            "target",
            problem,
            f"write it with crab_jax.tasks.TASKS[{example.task!r}].target(...), or correct meta",
        )


def _name_field(task: Task) -> str:
    return task.name_field or next(iter(task.label), "")


def _oddities(example: Example) -> Iterator[Finding]:
    """Yield usual mistakes in a label whose fields are valid."""
    task = TASKS[example.task]
    odd = odd_names(labels.names(example), _name_field(task))
    for wrong, field, problem, fix in itertools.chain(odd, task.oddities(example.meta)):
        yield Finding(MALFORMED if wrong else WARNING, f"meta.{field}" if field else "meta", problem, fix)


def _times(example: Example, seconds: float | None) -> Iterator[Finding]:
    if not (events := _events(example)):
        return
    last = max(end for _, _, end in events)
    if seconds and last > seconds + 0.5:
        yield Finding(
            MALFORMED,
            "meta",
            f"has an event until {last}, but the clip lasts {seconds:.1f} s",
            f"cut clips of {SECONDS} seconds",
        )
    elif seconds and not ABOUT_TEN[0] <= seconds <= ABOUT_TEN[1]:
        yield Finding(
            WARNING,
            "meta",
            f"counts {SECONDS} seconds, but the clip lasts {seconds:.1f} s, whose tenths they are taken as",
            f"cut clips of {SECONDS} seconds",
        )


def _events(example: Example) -> list[tuple[str, float, float]]:
    """Return (name, start, end) of every event of a label with times."""
    return [event[:3] for event in TASKS[example.task].events(example.meta)] if TASKS[example.task].timed else []


# Masks, seconds and windows.


def _mask(example: Example, train: bool, seconds: float | None) -> Iterator[Finding]:
    wanted = TASKS[example.task].mask_kind
    # An Example without mask and mask tokens trains the text alone, which is only odd.
    kind = MALFORMED if example.mask or "<mask_" in example.target else WARNING
    if not train and not example.target and not example.mask and example.mask_kind == "none":
        return  # it may only be answered
    if example.mask_kind != wanted:
        yield Finding(
            kind,
            "mask_kind",
            f"is {example.mask_kind!r}, but {example.task} has {'no mask' if wanted == 'none' else f'{wanted} masks'}",
            f"must be {wanted!r}",
        )
    elif wanted != "none" and example.mask and example.mask in (example.image, example.seg_image, *example.frames):
        yield Finding(MALFORMED, "mask", f"{example.mask} is the picture itself", "give the file of its mask")
    elif wanted == "none" and example.mask:
        yield Finding(WARNING, "mask", f"is given, but {example.task} has none", "leave it out")
    elif wanted != "none" and not example.mask:
        yield Finding(kind, "mask", "is missing", "give the mask file, or rle:empty where nothing is to be seen")
    elif wanted != "none" and seconds is None and seg_source(example) is None:
        yield Finding(
            MALFORMED,
            "second",
            f"is {example.second}, which is no picture of the example",
            "give the number of a picture, or the picture in 'seg_image'",
        )
    if wanted != "none" and example.windows == "five" and seg_source(example) == ("video", example.video):
        yield Finding(
            MALFORMED,
            "windows",
            "count fifths of the clip, but its picture is the one at `second` tenths",
            "give the picture in 'seg_image', or windows 'ten'",
        )


def _windows(example: Example, seconds: float | None) -> Iterator[Finding]:
    task, windows = TASKS[example.task], example.windows
    if task.timed and example.frames and len(example.frames) < 5:
        yield Finding(
            WARNING,
            "frames",
            f"are {len(example.frames)}, and {example.task} is asked about {SECONDS} seconds",
            "give a picture of each second",
        )
    if windows not in task.windows and (task.timed and windows != "none" or has_label(example)):
        kind, how = (WARNING, "without sound") if windows == "none" else (MALFORMED if task.timed else WARNING, "so")
        yield Finding(
            kind,
            "windows",
            f"are {windows!r}, but {example.task} is not asked {how}",
            f"use {' or '.join(task.windows)}",
        )
    parts = 5 if windows in ("five", "one_of_five") else 10
    if (
        example.second is not None
        and (windows not in fbank.SINGLE or seconds is None)
        and not (0 <= example.second < parts)
    ):
        yield Finding(
            MALFORMED,
            "second",
            f"is {example.second}, but windows {windows!r} have {parts} seconds",
            f"count from 0 to {parts - 1}",
        )
    elif example.second is None and windows in fbank.SINGLE and seconds is None:
        yield Finding(
            MALFORMED,
            "second",
            f"is missing, and windows {windows!r} read one of {parts}",
            f"give a number from 0 to {parts - 1}",
        )
    if seconds and not task.timed:
        frame_of_video = task.mask_kind != "none" and seg_source(example) == ("video", example.video)
        if (
            seconds > LONGEST.get(windows, seconds)
            or (frame_of_video and not (ABOUT_TEN[0] <= seconds <= ABOUT_TEN[1]))
            or (windows == "music_avqa" and seconds < 15)
        ):
            yield Finding(
                WARNING,
                "windows",
                f"are {windows!r}, but the clip lasts {seconds:.1f} s",
                "cut clips of ten seconds" if windows != "music_avqa" else "use ten",
            )


# Mistakes that only a whole list shows.


class Mistakes:
    """Finds the mistakes in the Examples of one list, given one after the other, in a few numbers of memory each.

    train: whether the list is for training.
    """

    def __init__(self, train: bool):
        self.train = train
        self.answers: dict[int, tuple[int, str]] = {}  # question about a clip -> (answer, id)
        self.reported: set[tuple[str, str]] = set()  # (task, unknown name) that have been reported
        self.first: dict[str, str] = {}  # task -> its first answer
        self.other: set[str] = set()  # tasks with more than one answer
        self.count: Counter[str] = Counter()
        self.times: dict[str, list[tuple[float, float]]] = defaultdict(
            list
        )  # task -> (start, end) of its first MANY events
        self.pictures: dict[str, Any] = {}  # mask -> its picture
        self.videos: dict[str, str] = {}  # sound -> its video
        self.stems: dict[str, str] = {}  # name of a clip -> its path

    def of(self, example: Example, seconds: float | None = None) -> list[Finding]:
        """Return the mistakes in an Example, by itself and compared with those before it."""
        mistakes = [*findings(example, self.train, seconds)]
        if not has_label(example):
            return mistakes
        if not any(finding.kind == MALFORMED for finding in mistakes):
            mistakes += [*self._again(example), *self._alike(example), *self._counted_from(example)]
        return mistakes + list(self._sound_and_mask(example))

    def unknown_names(self, example: Example) -> Iterator[Finding]:
        """Yield each name that the benchmark does not have, once per list: it may be misspelt, or the user's own."""
        known = TASKS[example.task].known
        if not known or not (labels.weak(example) or labels.sound(example)):
            return
        for name in labels.names(example):
            if name not in known and name != NOTHING and (example.task, name) not in self.reported:
                self.reported.add((example.task, name))
                same = [other for other in known if normalise(other) == normalise(name)]
                close = same or difflib.get_close_matches(name, known, 1, 0.75)
                yield Finding(
                    WARNING,
                    f"meta.{_name_field(TASKS[example.task])}",
                    f"{name!r:.60} is none of the {len(known)} names of {example.task}",
                    f"did you mean {close[0]!r}?" if close else "leave it where it is a name of your own",
                )

    def _again(self, example: Example) -> Iterator[Finding]:
        media = (example.video, example.image, example.frames, example.audio, example.seg_image)
        key = hash((example.task, media, example.second, _flat(example.instruction)))
        label = {name: example.meta.get(name) for name in TASKS[example.task].label}
        answer = json.dumps(label, sort_keys=True, default=str) + example.target + str(example.mask)
        before, id = self.answers.setdefault(key, (hash(answer), example.id))
        if id == example.id:
            return
        if before == hash(answer):
            yield Finding(WARNING, "id", f"asks and answers the same as {id!r}", "leave one of them out")
        elif not TASKS[example.task].own_words:
            released = example.meta.get("dataset", "own") != "own"  # some releases repeat a question
            yield Finding(
                WARNING if released or TASKS[example.task].several else MALFORMED,
                "target",
                f"answers the same question about the same clip otherwise than {id!r}",
                "keep one of them",
            )

    def _alike(self, example: Example) -> Iterator[Finding]:
        """Yield a warning when the first MANY Examples of a task have the same answer."""
        task = example.task
        if TASKS[task].answer == "mask" or not example.target:
            return
        self.count[task] += 1
        if self.first.setdefault(task, example.target) != example.target:
            self.other.add(task)
        if self.count[task] == MANY and task not in self.other:
            yield Finding(
                WARNING,
                "target",
                f"is the same in the first {MANY} examples of {task}",
                "check the column that it was made from",
            )

    def _counted_from(self, example: Example) -> Iterator[Finding]:
        """Yield a warning for seconds that seem to count from 1, and for ends that seem to be inclusive."""
        times = self.times[example.task]
        if len(times) >= MANY or not example.meta or not labels.sound(example):
            return
        times += [(start, end) for _, start, end in _events(example)]
        if len(times) >= MANY:
            if min(start for start, _ in times) == 1:
                yield Finding(
                    WARNING,
                    "meta",
                    f"no event of the first {len(times)} of {example.task} starts at 0",
                    "count seconds from 0",
                )
            if max(end for _, end in times) == SECONDS - 1:
                yield Finding(
                    WARNING,
                    "meta",
                    f"no event of the first {len(times)} of {example.task} ends at {SECONDS}",
                    "the end is the first second after the event",
                )

    def _sound_and_mask(self, example: Example) -> Iterator[Finding]:
        """Yield a warning for a mask or sound that belongs to another clip."""
        nothing = example.meta.get("object") == "" or example.meta.get("objects") == [NOTHING]
        if example.mask and not example.mask.startswith(INLINE_MASK) and not nothing:
            source = (seg_source(example), example.second)
            if self.pictures.setdefault(example.mask, source) != source:
                yield Finding(
                    WARNING,
                    "mask",
                    f"{example.mask} belongs to another picture in an earlier example",
                    "check the path",
                )
        if not example.video:
            return
        self.stems.setdefault(PurePosixPath(example.video).stem, example.video)
        if example.audio:
            stem = PurePosixPath(example.audio).stem
            owner = self.videos.setdefault(example.audio, example.video)
            named = self.stems.get(stem, example.video) if stem != PurePosixPath(example.video).stem else example.video
            if other := next((video for video in (owner, named) if video != example.video), None):
                yield Finding(WARNING, "audio", f"{example.audio} seems to be the sound of {other}", "check the path")


class Lists:
    """Finds mistakes in the users' own lists of a data root, for `validate`; every list is checked by itself."""

    def __init__(self) -> None:
        self.lists: dict[tuple[str, str], Mistakes] = {}

    def look(self, dataset: str, split: str, example: Example, seconds: float) -> Iterator[tuple[str, str, str]]:
        """Yield (field, path, text) as `status.Look` does; nothing for a release, whose labels its reader makes."""
        if dataset in ("own", PREPARED):
            mistakes = self.lists.setdefault((dataset, split), Mistakes(split == "train"))
            for kind, field, problem, fix in (*mistakes.of(example, seconds), *mistakes.unknown_names(example)):
                yield field, "", f"{kind}: {problem}; {fix}"


class TrainingLabels:
    """Refuses Examples of a user's own list that have a wrong label or target, and counts those that look odd."""

    def __init__(self, root: str | Path, split: str):
        self.file = paths.at(root) / f"{split}.jsonl"
        self.is_list, self.mistakes = self.file.is_file(), Mistakes(train=True)
        self.odd = 0
        self.first_odd = self.last_odd = ""

    def check(self, example: Example) -> None:
        """Raise InputError, naming file and line, for an Example that would be trained on wrongly."""
        if not self.is_list and example.meta.get("dataset") != "own":
            return
        mistakes = self.mistakes.of(example)
        for kind, field, problem, fix in mistakes:
            if kind == MALFORMED:
                raise InputError(self.where(example), field, problem, fix)
        try:
            check_sources(example)
        except InputError as error:
            raise InputError(self.where(example), error.field, error.problem, error.fix) from None
        if mistakes:
            self.odd += 1
            self.last_odd = f"{self.where(example)} [{mistakes[0].field}]: {mistakes[0].problem}"
            self.first_odd = self.first_odd or self.last_odd

    def warn(self) -> None:
        """Log how many Examples looked odd, and the first of them."""
        if self.odd:
            _log.warning(
                "%d examples look odd, the first: %s; `python -m data_pipelines validate` lists them",
                self.odd,
                printable(self.first_odd),
            )

    def where(self, example: Example) -> str:
        """Return file and line of an Example."""
        if "row" in example.meta:
            return str(self.file.parent / "own" / example.meta["row"])
        line = self._lines.get(example.id)
        return f"{self.file}:{line}" if line else str(self.file)

    @functools.cached_property
    def _lines(self) -> dict[str, int]:
        """The line of every Example of the list, by its id; the first where an id comes twice."""
        lines: dict[str, int] = {}
        for number, line in enumerate(self.file.read_text(encoding="utf-8-sig").split("\n"), 1):
            if isinstance(id := (json_object(line) or {}).get("id"), str):
                lines.setdefault(id, number)
        return lines
