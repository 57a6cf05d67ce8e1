"""AVVP: every audible and every visible event of a ten-second clip, each with its time spans.

meta: `{"audio": [[name, start, end], ...], "visual": [[name, start, end], ...]}`, whole seconds, end exclusive; a name
may come several times. Prompt: dataset/unified_dataset.py, quick_start_dataset.py. Metrics:
utils/avvp_eval_metrics.py, the same algorithm as YapengTian/AVVP-ECCV20.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks.placeholders import AUDIO, VIDEO
from crab_jax.tasks.rows import CLIP, events_of, only
from crab_jax.tasks.task import (
    AV_REASONER,
    Event,
    Field,
    Made,
    Meta,
    Oddity,
    Published,
    Row,
    Stats,
    Task,
    by_group,
    is_list,
)
from crab_jax.tasks.text import find_tags, normalise
from crab_jax.tasks.times import SECONDS, find_spans, is_event, no_time

# The official order and spelling: class index 0..24.
CATEGORIES = (
    "Speech",
    "Car",
    "Cheering",
    "Dog",
    "Cat",
    "Frying_(food)",
    "Basketball_bounce",
    "Fire_alarm",
    "Chainsaw",
    "Cello",
    "Banjo",
    "Singing",
    "Chicken_rooster",
    "Violin_fiddle",
    "Vacuum_cleaner",
    "Baby_laughter",
    "Accordion",
    "Lawn_mower",
    "Motorcycle",
    "Helicopter",
    "Acoustic_guitar",
    "Telephone_bell_ringing",
    "Baby_cry_infant_cry",
    "Blender",
    "Clapping",
)
LEVELS = ("segment", "event")
_TYPES = ("audio", "visual", "audio_visual")
METRICS = {
    f"{level}_{name}": f"{level}-level F: {what} (AVVP-ECCV20)"
    for level in LEVELS
    for name, what in {
        "audio": "audible events (A)",
        "visual": "visible events (V)",
        "audio_visual": "events both audible and visible (AV)",
        "event_av": "audio and visual counts pooled per class (Event@AV)",
        "type_av": "mean of A, V and AV (Type@AV)",
    }.items()
}
Events = list[list[Any]]  # [[name, start, end], ...]


_EVENTS = Field(
    f"a list of [name, start, end] in whole seconds from 0 to {SECONDS}", lambda value, meta: is_list(value, is_event)
)
LABEL = {"audio": _EVENTS, "visual": _EVENTS}
TAGS = ("audio_event", "visual_event")
_SENSES = {"audio": "heard", "visual": "seen"}
_EVENT = re.compile(r"\s*(.+?)\s*,\s*(\(\d{1,3} \d{1,3}\)(?:\s*,\s*\(\d{1,3} \d{1,3}\))*)\s*", re.DOTALL)
_SPAN = re.compile(r"\((\d+) (\d+)\)")
_SENSE = re.compile(r"(audio|visual)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)

_PROMPT = (
    f"{VIDEO}{AUDIO}Please determine the events that occur based on the visual and audio information in the "
    "video, as well as the start and end times of these events."
)
_QUICK = (
    f"{VIDEO}{AUDIO}Please determine the events that occur based on the visual and audio information, as well as "
    "the start and end time of these events."
)
_INSTRUCTIONS = {"train": _PROMPT, "test": _PROMPT, "quick": _QUICK}


def instruction(variant: str = "train") -> str:
    """Return the prompt; "quick" leaves out "in the video" and says "end time"."""
    return _INSTRUCTIONS[variant]


def target(audio: Sequence[Sequence[Any]], visual: Sequence[Sequence[Any]], reasoning: str = "") -> str:
    """Return `Therefore, visual and audio events are: <visual_event> name,(s e),(s e) </visual_event> and ...`.

    There is one tag per event name. A modality without events says `none`, so that "nothing happens" differs from no
    answer.
    """
    tags = _tags("visual_event", visual) + _tags("audio_event", audio)
    answer = f"Therefore, visual and audio events are: {' and '.join(tags)}."
    return f"{reasoning} {answer}" if reasoning else answer


def _tags(tag: str, events: Sequence[Sequence[Any]]) -> list[str]:
    spans: dict[str, list[str]] = {}
    for name, start, end in events:
        spans.setdefault(name, []).append(f"({start} {end})")
    contents = [f"{name},{','.join(times)}" for name, times in spans.items()] or ["none"]
    return [f"<{tag}> {content} </{tag}>" for content in contents]


def merge_spans(spans: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Merge `(start, end)` spans, cut to the clip, in order; empty and reversed spans are dropped."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((max(0, s), min(SECONDS, e)) for s, e in spans):
        if start < end and merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif start < end:
            merged.append((start, end))
    return merged


def parse(text: str) -> dict[str, Events] | None:
    """Return `{"audio": events, "visual": events}`, or None when no tag holds a word.

    Tags may also be called `<audio>` and `<visual>`, and may hold several names, each with several spans. An event
    without a span, `none`, and a span that cannot be read (crab_jax/tasks/times.py) are left out.
    """
    tags = [
        (name, content)
        for name, content in find_tags(text, ("audio_event", "visual_event", "audio", "visual"))
        if normalise(content)
    ]
    if not tags:
        return None
    events: dict[str, Events] = {"audio": [], "visual": []}
    for tag, content in tags:
        events[tag.removesuffix("_event")] += _read_events(content)
    return events


def _read_events(content: str) -> Events:
    events: Events = []
    name, cursor = "", 0
    for span in find_spans(content):
        words = content[cursor : span.first].strip(" ,;:.\n\t").removeprefix("and ")
        name = words if normalise(words) not in ("", "and") else name
        if normalise(name) and span.read:
            events.append([name, span.start, span.end])
        cursor = span.last
    return events


def occurrence(events: Sequence[Sequence[Any]], classes: Sequence[str]) -> np.ndarray:
    """Return bool[C,10]: the seconds start <= t < end at which each class occurs (names compared by `normalise`).

    Where a span has decimals, a second is active when its middle lies in the span.
    """
    seconds = np.zeros((len(classes), SECONDS), bool)
    for name, start, end in events:
        first, last = (max(0, math.ceil(time - 0.5)) for time in (start, end))
        seconds[classes.index(normalise(name)), first:last] = True
    return seconds


def _mean_f(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur in the answer or the label; 1 when none does. Counts are [C]."""
    total = 2 * tp + fp + fn
    return float(np.mean(2 * tp[total > 0] / total[total > 0])) if np.any(total) else 1.0


def _segment_counts(answer: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return int[3,C]: the TP, FP and FN seconds per class, from two bool[C,T]."""
    return np.stack([(answer & truth).sum(1), (answer & ~truth).sum(1), (~answer & truth).sum(1)])


def _runs(row: np.ndarray) -> list[tuple[int, int]]:
    """Return `(start, end)` of each run of True in bool[T], end exclusive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _overlaps(run: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    """Whether any other run has an intersection over union of at least 0.5 with `run`."""
    return any(
        2 * max(0, min(run[1], e) - max(run[0], s))
        >= (run[1] - run[0]) + (e - s) - max(0, min(run[1], e) - max(run[0], s))
        for s, e in others
    )


def _event_counts(answer: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return int[3,C]: the TP, FP and FN events per class; one labelled event may match several answered ones."""
    counts = []
    for row, true_row in zip(answer, truth, strict=True):
        runs, true_runs = _runs(row), _runs(true_row)
        right = sum(_overlaps(run, true_runs) for run in runs)
        missed = sum(not _overlaps(run, runs) for run in true_runs)
        counts.append((right, len(runs) - right, missed))
    return np.array(counts, int).reshape(-1, 3).T


def f_scores(
    level: str, answer_a: np.ndarray, answer_v: np.ndarray, truth_a: np.ndarray, truth_v: np.ndarray
) -> dict[str, float]:
    """Return the F-scores of one clip at `level` from bool[C,10] arrays (utils/avvp_eval_metrics.py).

    level: "segment" or "event". The scores are "audio" and "visual" for one modality, "audio_visual" for events that
    are both audible and visible, and "event_av" for audio and visual counts pooled per class before the F-score. Each
    is a mean over the classes that occur.
    """
    counts = {"segment": _segment_counts, "event": _event_counts}[level]
    audio, visual = counts(answer_a, truth_a), counts(answer_v, truth_v)
    both = counts(answer_a & answer_v, truth_a & truth_v)
    return {
        "audio": _mean_f(*audio),
        "visual": _mean_f(*visual),
        "audio_visual": _mean_f(*both),
        "event_av": _mean_f(*(audio + visual)),
    }


def stats(
    parsed: Mapping[str, Events] | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None
) -> Stats:
    """Return the eight F-scores of one clip; an unreadable answer counts as an empty one.

    A name that the label does not have is a further class, so invented events cost precision.
    """
    answer = parsed or {"audio": [], "visual": []}
    classes = sorted(
        {normalise(name) for events in (*answer.values(), meta["audio"], meta["visual"]) for name, *_ in events}
    )
    arrays = [occurrence(label[modality], classes) for label in (answer, meta) for modality in ("audio", "visual")]
    return {f"{level}_{name}": value for level in LEVELS for name, value in f_scores(level, *arrays).items()}


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return means over clips; `type_av` is the mean of audio, visual and audio_visual at its level."""
    if not samples:
        return {}
    metrics = {name: float(np.mean([s[name] for s in samples])) for name in samples[0]}
    return metrics | {
        f"{level}_type_av": float(np.mean([metrics[f"{level}_{kind}"] for kind in _TYPES])) for level in LEVELS
    }


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]) -> list[tuple[str, None]]:
    """Return all pairs of candidates for audio and visual events.

    The candidates of a modality are no event, and the one to three most frequent events over the whole clip or over
    their median spans.
    """

    def candidates(modality: str) -> list[Events]:
        spans: dict[str, list[tuple[int, int]]] = {}
        for name, start, end in (event for meta in metas for event in meta[modality]):
            spans.setdefault(name, []).append((start, end))
        names = sorted(spans, key=lambda name: (-len(spans[name]), name))[:3]
        whole = [[name, 0, SECONDS] for name in names]
        median = [[name, *np.median(spans[name], axis=0).astype(int).tolist()] for name in names]
        return [[]] + [events[:k] for events in (whole, median) for k in range(1, len(names) + 1)]

    pairs = itertools.product(candidates("audio"), candidates("visual"))
    return [(text, None) for text in dict.fromkeys(target(audio, visual) for audio, visual in pairs)]


def events(said: Mapping[str, Any]) -> list[Event]:
    """Return the events of a label with times, or of a parsed answer: first those heard, then those seen."""
    return [
        Event(name, start, end, sense) for kind, sense in _SENSES.items() for name, start, end in said.get(kind, ())
    ]


def spans_of(events: Sequence[Sequence[Any]]) -> dict[str, list[tuple[int, int]]]:
    """Return {name: merged spans} of `[[name, start, end], ...]`, by first second, without names that have no span."""
    spans: dict[str, list[Sequence[int]]] = {}
    for name, *span in events:
        spans.setdefault(name, []).append(span)
    merged = {name: merge_spans(found) for name, found in spans.items()}
    return dict(sorted(((n, s) for n, s in merged.items() if s), key=lambda item: (item[1][0], item[0])))


def weak(meta: Meta) -> str:
    """Return why a label is weak, "" if it is not: training clips of LLP name events without times and senses."""
    return "names events without their times" if "labels" in meta and "audio" not in meta else ""


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {
        sense: [[name.strip(), *span] for name, spans in spans_of(meta[sense]).items() for span in spans]
        for sense in ("audio", "visual")
    }


def names(meta: Meta) -> tuple[str, ...]:
    """Return the names of the events."""
    if weak(meta):
        return tuple(meta["labels"])
    values = arguments(meta, 0)
    return tuple(dict.fromkeys(name for name, *_ in (*values["audio"], *values["visual"])))


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: other events, missing events, or other times."""
    by_sense: dict[str, Events] = {"audio": [], "visual": []}
    tags, found = find_tags(text, TAGS), []
    for tag, content in tags:
        sense, event = tag.removesuffix("_event"), _EVENT.fullmatch(content)
        if event is None:
            if normalise(content) != "none":
                found.append(f"the {sense} event {content!r} is not `name,(start end),...`")
            continue
        spans = [(int(start), int(end)) for start, end in _SPAN.findall(event[2])]
        found += [
            f"the {sense} event {event[1]!r} has the impossible time ({start} {end})"
            for start, end in spans
            if not 0 <= start < end <= SECONDS
        ]
        by_sense[sense] += [[event[1], *span] for span in spans]
    if not tags:
        found.append("holds no event tag")
    said = by_sense["audio"] + by_sense["visual"]
    known = {normalise(name): name for name in names(meta)}
    found += [
        f"the event {name!r} is not in the label"
        for name in dict.fromkeys(name for name, *_ in said)
        if normalise(name) not in known
    ]
    if weak(meta):
        heard_or_seen = {normalise(name) for name, *_ in said}
        found += [
            f"the event {name!r} of the label is missing" for key, name in known.items() if key not in heard_or_seen
        ]
    elif not found:
        classes = list(known)
        for sense, answered in by_sense.items():
            differ = occurrence(answered, classes) != occurrence(values[sense], classes)
            found += [
                f"the {sense} times of {known[classes[k]]!r} differ from the label"
                for k in np.flatnonzero(differ.any(axis=1))
            ]
    return found


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield the spans without duration, and the spans of one event that overlap."""
    if weak(meta):
        return
    yield from no_time(events(meta))
    for sense in ("audio", "visual") if events(meta) else ():
        for (one, _, end), (other, start, _) in itertools.pairwise(sorted(map(tuple, meta[sense]))):
            if one == other and start < end:
                yield Oddity(False, sense, f"spans of {one!r:.60} overlap", "join them")


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a clip, and what is heard and seen in it."""
    only(row, *CLIP)
    given = row.given("events")
    form = "write audio: Speech 0-10; Dog 2-5; visual: Dog 0-10, with `none` for a sense that has no event"
    if isinstance(given, str):
        by_sense: dict[str, list[str]] = {}
        sense = ""
        for part in re.split(r"\s*[;|\n]\s*", given.strip(" ;|\n")):
            if match := _SENSE.fullmatch(part):
                sense, part = match[1].lower(), match[2]
                if sense in by_sense:
                    raise row.error("events", f"says {sense}: twice", form)
                by_sense[sense] = []
            if not sense:
                raise row.error("events", f"does not say whether {part!r:.40} is heard or seen", form)
            by_sense[sense] += [part] if part.strip() else []
        given = {
            sense: [] if [p.lower() for p in parts] == ["none"] else "; ".join(parts) or None
            for sense, parts in by_sense.items()
        }
    if not isinstance(given, dict) or given.keys() != {"audio", "visual"}:
        says = "does not say what is heard and what is seen"
        raise row.error("events", "is empty" if given is None else says, form)
    label = {sense: events_of(row, given[sense]) if given[sense] != [] else [] for sense in ("audio", "visual")}
    return Made(instruction(), label, label, {"windows": "ten"})


AVVP = Task(
    name="avvp",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="segment_type_av",
    metrics=METRICS,
    label=LABEL,
    answer="events",
    events=events,
    shown=lambda meta: "; ".join(f"{e.name} {e.start}-{e.end} ({e.sense})" for e in events(meta)) or "nothing",
    arguments=arguments,
    weak=weak,
    names=names,
    known=CATEGORIES,
    tags=TAGS,
    disagreements=disagreements,
    oddities=oddities,
    answer_start="Therefore, visual and audio events are",
    columns=("events",),
    from_row=from_row,
    breakdown=by_group(
        lambda meta: {str(name) for name, *_ in (*meta["audio"], *meta["visual"])}, reduce, "segment_type_av"
    ),
    published=[  # the sources do not say whether they mean Type@AV or Event@AV
        Published("Crab", {"segment_type_av": 0.5900, "event_type_av": 0.5444}, AV_REASONER),
        Published("MEERKAT", {"segment_type_av": 0.5496}, AV_REASONER),
        Published("AV-Reasoner", {"segment_type_av": 0.6240, "event_type_av": 0.5940}, AV_REASONER),
        Published("AV-Reasoner, thinking", {"segment_type_av": 0.6470, "event_type_av": 0.6200}, AV_REASONER),
    ],
)
