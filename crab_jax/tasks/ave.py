"""AVE: which event is both audible and visible in a ten-second clip, and from when to when.

meta: `{"event": str, "start": int, "end": int}` in whole seconds, `end` exclusive as in the AVE annotations.
Prompt and target: dataset/unified_dataset.py and the released AV-UIE labels. Metric: accuracy over the ten one-second
segments, background included (YapengTian/AVE-ECCV18, `compute_acc`).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks.placeholders import AUDIO, VIDEO
from crab_jax.tasks.rows import CLIP, events_of, only
from crab_jax.tasks.task import (
    HEARD_AND_SEEN,
    NOTES,
    TEXT,
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
    is_whole,
)
from crab_jax.tasks.text import find_tags, normalise, one_tag
from crab_jax.tasks.times import SECONDS, find_spans, no_time, read_ranges

# The official order: class index 0..27 (28 is background).
CATEGORIES = (
    "Church bell",
    "Male speech, man speaking",
    "Bark",
    "Fixed-wing aircraft, airplane",
    "Race car, auto racing",
    "Female speech, woman speaking",
    "Helicopter",
    "Violin, fiddle",
    "Flute",
    "Ukulele",
    "Frying (food)",
    "Truck",
    "Shofar",
    "Motorcycle",
    "Acoustic guitar",
    "Train horn",
    "Clock",
    "Banjo",
    "Goat",
    "Baby cry, infant cry",
    "Bus",
    "Chainsaw",
    "Cat",
    "Horse",
    "Toilet flush",
    "Rodents, rats, mice",
    "Accordion",
    "Mandolin",
)
METRICS = {
    "accuracy": "one-second segments whose event or background is right, end second exclusive (AVE, compute_acc)",
    "accuracy_inclusive": "the same with the end second counted in, in answer and label (some released scorers)",
    "event_accuracy": "clips whose event is named right, whatever the time range",
}
LABEL = {
    "event": TEXT,
    "start": Field(f"a whole second from 0 to {SECONDS}", lambda value, meta: is_whole(value, 0, SECONDS)),
    "end": Field(
        f"a whole second from `start` to {SECONDS}, the first after the event",
        lambda value, meta: is_whole(value, meta["start"] if is_whole(meta.get("start"), 0, SECONDS) else 0, SECONDS),
    ),
}
_RANGE = re.compile(r"\s*(\d{1,3})\s*,\s*(\d{1,3})\s*")
_PROMPT = f"{VIDEO}{AUDIO}Please describe the events and time range that occurred in the video."
_INSTRUCTIONS = {"train": _PROMPT, "test": _PROMPT, "quick": _PROMPT}


def instruction(variant: str = "train") -> str:
    """Return the prompt; the three variants are the same text."""
    return _INSTRUCTIONS[variant]


def target(event: str, start: int, end: int, reasoning: str = "") -> str:
    """Return `{reasoning} So the audible and visible event in the video is <event> X </event>, and the time ...`."""
    answer = (
        f"So the audible and visible event in the video is <event> {event} </event>, "
        f"and the time range is <range> {start},{end} </range>."
    )
    return f"{reasoning} {answer}" if reasoning else answer


def parse(text: str) -> dict[str, Any] | None:
    """Return `{"event": str, "ranges": [[start, end], ...]}`, or None when the event or every range is missing.

    The last event is the answer, with all ranges after it. `<event> name,(0 8) </event>` and ranges before the event
    are read too. Ranges are in seconds, with decimals as they were written. When a number cannot be read as part of a
    range (crab_jax/tasks/times.py), the whole answer counts as unread.
    """
    tags = find_tags(text, ("event", "range"))
    last = max((i for i, (name, content) in enumerate(tags) if name == "event" and normalise(content)), default=None)
    if last is None:
        return None
    event = tags[last][1]
    inside = find_spans(event)
    after, before = ([read_ranges(c) for name, c in part if name == "range"] for part in (tags[last:], tags[:last]))
    within = [[(span.start, span.end)] if span.read else None for span in inside]
    said = next((source for source in (after, before, within) if any(found != [] for found in source)), [])
    name = (event[: inside[0].first] if inside else event).strip(" ,.;:")
    if None in said or not said or not normalise(name):
        return None
    return {"event": name, "ranges": [[start, end] for found in said if found for start, end in found]}


def active_seconds(ranges: Sequence[Sequence[float]], inclusive: bool = False) -> np.ndarray:
    """Return bool[10]: the seconds t with start <= t < end of any range (t <= end with `inclusive`).

    Where a range has decimals, a second is active when its middle lies in the range.
    """
    seconds = np.arange(SECONDS) + 0.5
    active: np.ndarray = np.any([(start <= seconds) & (seconds < end + inclusive) for start, end in ranges], axis=0)
    return active


def segment_accuracy(
    parsed: Mapping[str, Any] | None, event: str, start: int, end: int, inclusive: bool = False
) -> float:
    """Return the share of the ten seconds whose label (the event or background) is right.

    An answer that was not parsed counts as background throughout. With `inclusive`, the label and the answer both
    include their end second, as in some released scorers.
    """
    truth = active_seconds([(start, end)], inclusive)
    if parsed is None:
        return float(np.mean(~truth))
    answer = active_seconds(parsed["ranges"], inclusive)
    right_event = normalise(parsed["event"]) == normalise(event)
    return float(np.mean(np.where(answer, truth & right_event, ~truth)))


def stats(
    parsed: Mapping[str, Any] | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None
) -> Stats:
    """Return the accuracies of one clip."""
    label = (meta["event"], meta["start"], meta["end"])
    return {
        "accuracy": segment_accuracy(parsed, *label),
        "accuracy_inclusive": segment_accuracy(parsed, *label, inclusive=True),
        "event_accuracy": float(parsed is not None and normalise(parsed["event"]) == normalise(meta["event"])),
    }


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return the means over all clips."""
    return {name: float(np.mean([s[name] for s in samples])) for name in METRICS} if samples else {}


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]) -> list[tuple[str, None]]:
    """Return the three most frequent events over every range of seconds, including the empty range."""
    events = [event for event, _ in Counter(m["event"] for m in metas).most_common(3)]
    ranges = [(0, 0), *itertools.combinations(range(SECONDS + 1), 2)]
    return [(target(event, *span), None) for event, span in itertools.product(events, ranges)]


def events(said: Mapping[str, Any]) -> list[Event]:
    """Return the event of a label, or the events of a parsed answer."""
    ranges = said["ranges"] if "ranges" in said else [(said["start"], said["end"])]
    return [Event(said["event"], start, end, HEARD_AND_SEEN) for start, end in ranges]


def names(meta: Meta) -> tuple[str, ...]:
    """Return the name of the event."""
    return (meta["event"].strip(),)


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {"event": meta["event"].strip(), "start": meta["start"], "end": meta["end"]}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: its event, its range, or the range that the parser reads."""
    event, found = one_tag(text, "event")
    span, more = one_tag(text, "range")
    found += more
    if event and normalise(event) != normalise(values["event"]):
        found.append(f"the event is {event!r}, the label says {values['event']!r}")
    numbers = _RANGE.fullmatch(span)
    if not numbers:
        found.append(f"the range {span!r} is not `start,end`")
    elif (said := tuple(map(int, numbers.groups()))) != (values["start"], values["end"]):
        found.append(f"the range is {said[0]},{said[1]}, the label says {values['start']},{values['end']}")
    parsed = parse(text)
    if not found and (parsed is None or parsed["ranges"] != [[values["start"], values["end"]]]):
        found.append("the parser of the task reads another range")
    return found


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield a range without duration; 0,0 is allowed, since it says that nothing happens."""
    if (meta["start"], meta["end"]) != (0, 0):
        yield from no_time(events(meta))


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a clip and its one event."""
    only(row, *CLIP)
    found = events_of(row, row.given("events"))
    if len(found) != 1:
        raise row.error("events", f"holds {len(found)} events, and ave asks about one", "write a row for each")
    label = dict(zip(("event", "start", "end"), found[0], strict=True))
    return Made(instruction(), label, label, {"windows": "ten"})


AVE = Task(
    name="ave",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="accuracy",
    metrics=METRICS,
    label=LABEL,
    answer="events",
    events=events,
    shown=lambda meta: f"{meta['event']} {meta['start']}-{meta['end']}",
    arguments=arguments,
    names=names,
    known=CATEGORIES,
    tags=("event", "range"),
    disagreements=disagreements,
    oddities=oddities,
    several=True,  # a clip may have two events
    answer_start="So the audible and visible event",
    columns=("events",),
    from_row=from_row,
    breakdown=by_group(lambda meta: [str(meta["event"])], reduce, "accuracy"),
    published=[Published("Crab", {"accuracy": 0.8015}, NOTES), Published("MM-Pyramid", {"accuracy": 0.7780}, NOTES)],
)
