"""One row of a table as the Example that it means: prompt, target, windows and label of its task's datasets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS, arig, avqa
from crab_jax.tasks.ave import SECONDS
from crab_jax.tasks.task import windows_for
from data_pipelines import media
from data_pipelines.examples import Example
from data_pipelines.media import EMPTY_MASK, INLINE_MASK
from data_pipelines.own.files import Media, facts
from data_pipelines.own.table import COLUMNS, COMMON, FIELDS, Row
from data_pipelines.sources.audiocaps import PROMPT as SOUND_PROMPT
from data_pipelines.sources.own import pictures
from data_pipelines.sources.release import Release
from data_pipelines.sources.release import Row as Line

NOTHING = ("nothing", "none", "null")  # what an expression refers to, or a mask shows
_SPAN = r"\(?\s*(\d+)(?:\.0+)?\s*s?\s*(?:-|\u2013|\u2014|\bto\b)\s*(\d+)(?:\.0+)?\s*s?\s*\)?"
_BETWEEN = r"(?:[\s,:]|\s[-\u2013\u2014=@]+\s)+(?:(?:from|at|during)\s+)?"  # a name and its spans
_EVENT = re.compile(rf"(?P<name>.*?\S){_BETWEEN}(?P<spans>{_SPAN}(?:\s*,\s*{_SPAN})*)", re.DOTALL)
_SENSE = re.compile(r"(audio|visual)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def example_of(row: Row, files: Media) -> Example:
    """The Example that a row means, with the prompt, target, windows and label that its task's datasets have."""
    task = str(row.given("task") or "").lower().replace("_", "-")
    if task not in FIELDS:
        raise row.error("task", f"unknown task {row.given('task')!r}", f"use one of {', '.join(FIELDS)}")
    row = dataclasses.replace(row, values={**row.values, "task": task})
    for name in COLUMNS:
        if name not in (*COMMON, *FIELDS[task]) and row.given(name) is not None:
            raise row.error(
                name,
                f"is {row.given(name)!r:.60}, but {task} has no {name}",
                f"leave it empty; {task} takes {', '.join(FIELDS[task])}",
            )
    sources = files.sources(row)
    if not sources.keys() & {"video", "frames", "image"} and not (task == "avcap" and "audio" in sources):
        raise row.error("media", "is empty", "give a video, or a picture and its sound")
    seconds = _seconds(row, files, sources)
    made = _MAKE[task](row, files, sources, seconds)
    reasoning = row.text("reasoning") if row.given("reasoning") else ""
    prompt, label, meta, fields = made
    clip = sources.get("video") or sources.get("frames") or sources.get("image") or sources["audio"]
    visual: dict[str, Any] = {field: sources[field] for field in ("video", "image", "audio") if field in sources}
    if "frames" in sources:
        visual["frames"] = _frames(row, files, sources)
    given = row.given("id")
    return Example(
        **{
            "id": f"{task}-{row.number}" if given is None else str(given),
            "task": task,
            "instruction": prompt,
            "target": TASKS[task].target(**label, reasoning=reasoning),
            "mask_kind": TASKS[task].mask_kind,
            **visual,
            "meta": {**meta, "video": clip},
            **fields,
        }
    )


def _frames(row: Row, files: Media, sources: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(pictures(Release(files.root), sources["frames"], Line(files.root, row.where, {})))


def _seconds(row: Row, files: Media, sources: Mapping[str, str]) -> float:
    """How long the sound of a row is, after checking that it has one."""
    field = "audio" if "audio" in sources else "video"
    if field not in sources:
        raise row.error("audio", "is empty, and pictures have no sound", "give the file of their sound")
    try:
        seconds, has_sound = facts(str(files.root / sources[field]), field)
    except InputError as error:
        raise row.error(field, f"{sources[field]}: {error.problem}", error.fix) from None
    if not has_sound:
        raise row.error("audio", f"{sources[field]} has no sound", "give the file of its sound in the column audio")
    return seconds


Made = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]  # prompt, arguments of the target, meta, other fields


def _only(row: Row, sources: Mapping[str, str], *wanted: str) -> None:
    """Raise InputError for visual sources other than one of `wanted`."""
    shown = [field for field in ("video", "frames", "image") if field in sources]
    if len(shown) != 1 or shown[0] not in wanted:
        what = {"video": "a video", "frames": "pictures of a clip", "image": "one picture"}
        asked = " or ".join(what[field] for field in wanted)
        raise row.error(
            "media",
            f"{row.values['task']} is asked about {asked}, not about "
            f"{' and '.join(what[field] for field in shown) or 'sound alone'}",
            "give that",
        )


def _avqa(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    _only(row, sources, "video", "frames")
    question, label = row.text("question"), {"answer": row.text("answer")}
    kind = row.given("type")
    kinds = [part.strip() for part in re.split(r"[/,]", kind)] if isinstance(kind, str) else kind
    if kinds is not None and not TASKS["avqa"].label["type"].holds(kinds, {"type": kinds}):
        raise row.error(
            "type",
            f"is {kind!r:.60}",
            f"use modality/kind, as in Audio-Visual/Counting, of {', '.join(avqa.SUBTYPES)}, or leave it empty",
        )
    meta = {**label, "question": question} | ({"type": kinds} if kinds else {})
    return (TASKS["avqa"].instruction(question=question), label, meta, {"windows": windows_for(TASKS["avqa"], seconds)})


def _ave(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    _only(row, sources, "video", "frames")
    found = _events(row, row.given("events"))
    if len(found) != 1:
        raise row.error("events", f"holds {len(found)} events, and ave asks about one", "write a row for each")
    label = dict(zip(("event", "start", "end"), found[0], strict=True))
    return TASKS["ave"].instruction(), label, label, {"windows": "ten"}


def _avvp(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    _only(row, sources, "video", "frames")
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
    label = {sense: _events(row, given[sense]) if given[sense] != [] else [] for sense in ("audio", "visual")}
    return TASKS["avvp"].instruction(), label, label, {"windows": "ten"}


def _events(row: Row, given: Any) -> list[list[Any]]:
    """[[name, start, end], ...] of text such as `Dog 2-5, 7-9; Speech 0-10`, or of such a list."""
    form = f"write name start-end in whole seconds from 0 to {SECONDS}, the end exclusive, as in `Dog 2-5; Speech 0-10`"
    if given is None:
        raise row.error("events", f"is empty, and {row.values['task']} needs it", form)
    found: list[list[Any]] = []
    for part in re.split(r"\s*[;|\n]\s*", given.strip(" ;|\n")) if isinstance(given, str) else given:
        if isinstance(part, str):
            match = _EVENT.fullmatch(part.strip())
            if not match:
                raise row.error("events", f"cannot be read: {part!r:.60}", form)
            if re.search(_SPAN, match["name"]):  # a comma may be part of a name
                raise row.error("events", f"holds two events without a `;` between: {part!r:.60}", form)
            found += [
                [match["name"].strip(" ,:"), int(start), int(end)] for start, end in re.findall(_SPAN, match["spans"])
            ]
        else:
            found.append(list(part) if isinstance(part, list | tuple) else [part])
    for event in found:
        if not TASKS["avvp"].label["audio"].holds([event], {}) or event[1] >= event[2] and event[1:] != [0, 0]:
            raise row.error("events", f"holds {event!r:.60}", form)
    return found


def _avcap(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    captions = row.given("answer")
    captions = [captions] if not isinstance(captions, list) else captions
    texts = [dataclasses.replace(row, values={**row.values, "answer": text}).text("answer") for text in captions]
    if "audio" in sources and len(sources) == 1:
        prompt = SOUND_PROMPT
    else:
        _only(row, sources, "video", "frames")
        prompt = TASKS["avcap"].instruction()
    return prompt, {"caption": texts[0]}, {"captions": texts}, {"windows": "ten"}


def _arig(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    _only(row, sources, "image")
    label = {"object": _one_name(row), "box": _box(row, files.root / sources["image"])}
    return (
        TASKS["arig"].instruction(),
        label,
        label,
        {"windows": windows_for(TASKS["arig"], seconds), "second": row.second()},
    )


def _box(row: Row, picture: Path) -> list[int]:
    """The box of a row in the 224 x 224 picture, from pixels of the picture (`box`) or of that one (`box_224`)."""
    pixels, scaled = row.given("box"), row.given("box_224")
    if (pixels is None) == (scaled is None):
        raise row.error(
            "box",
            "is empty, and so is box_224" if pixels is None else "is given beside box_224",
            "give x1, y1, x2, y2 in pixels of the picture in `box`, or of the 224 x 224 one in `box_224`",
        )
    field, given = ("box", pixels) if scaled is None else ("box_224", scaled)
    form = "give x1, y1, x2, y2: the corners at the upper left and lower right"
    numbers = given if isinstance(given, list) else [float(text) for text in _NUMBER.findall(str(given))]
    left = _NUMBER.sub("", str(given)).strip("[]() ,;\t")
    if len(numbers) != 4 or left.strip(" ,;") or not all(isinstance(n, int | float) for n in numbers):
        raise row.error(field, f"is {given!r:.60}", form)
    try:
        width, height = media.image_size(picture) if field == "box" else (arig.SIZE, arig.SIZE)
    except InputError as error:
        raise row.error("image", f"{picture}: {error.problem}", error.fix) from None
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise row.error(field, f"is {given!r:.60}, whose corners are not in order", f"{form}, not its width and height")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise row.error(field, f"is {given!r:.60}, which leaves the picture of {width} x {height}", form)
    if max(numbers) <= 1:
        raise row.error(field, f"is {given!r:.60}, which seem to be shares of the picture", "give pixels")
    sides = (width, height) * 2
    return [round(value * arig.SIZE / side) for value, side in zip(numbers, sides, strict=True)]


def _name_list(row: Row) -> list[str]:
    given = row.given("object")
    names = given if isinstance(given, list) else re.split(r"\s*[;|]\s*|\s+and\s+", row.text("object"))
    return [dataclasses.replace(row, values={**row.values, "object": name}).text("object") for name in names]


def _one_name(row: Row) -> str:
    return " and ".join(_name_list(row))


def _moment(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> tuple[int, dict[str, Any]]:
    """(second, windows, mask and picture) of a question about the pixels of one picture."""
    task, one_picture = str(row.values["task"]), not sources.keys() & {"video", "frames"}
    if (second := row.second()) is None:
        raise row.error(
            "second",
            f"is empty, and {task} is asked about one second",
            "give the number of the second that the mask is of, counted from 0",
        )
    windows = windows_for(TASKS[task], seconds, one_picture)
    if "frames" in sources:
        count = len(_frames(row, files, sources))
        if count not in (5, SECONDS):
            raise row.error("frames", f"holds {count} pictures", f"give 5 or {SECONDS}, one a second")
        windows = "five" if count == 5 and task != "ref-avs" else "ten"
    parts = 5 if windows in ("five", "one_of_five") else SECONDS
    if second >= parts:
        raise row.error(
            "second",
            f"is {second}, but a clip of {seconds:.1f} s is asked about in {parts} parts",
            f"count from 0 to {parts - 1}",
        )
    fields: dict[str, Any] = {"second": second, "windows": windows}
    if not one_picture and "image" in sources:
        fields |= {"seg_image": sources["image"], "image": None}
    elif "video" in sources and not 0.8 * parts <= seconds <= 1.2 * parts:
        raise row.error(
            "image",
            f"is empty, and it is not certain which picture of a clip of {seconds:.1f} s second {second} means",
            f"give the picture that the mask was drawn on, or a clip of {parts} seconds",
        )
    elif "video" in sources and parts != SECONDS:  # ten frames are taken of a clip, so none is that of its second
        fields |= {"seg_image": files.moment(sources["video"], second, parts)}
    given = row.text("mask", "give the file of the mask, or `nothing` where nothing is to be seen")
    if given.lower() in (*NOTHING, EMPTY_MASK):
        return second, fields | {"mask": EMPTY_MASK}
    return second, fields | {"mask": given if given.startswith(INLINE_MASK) else files.find(row, "mask", given)}


def _avs(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    task = str(row.values["task"])
    second, fields = _moment(row, files, sources, seconds)
    names = _name_list(row)
    clip = sources.keys() & {"video", "frames"}
    variant = "train" if clip else "test" if task == "avss" else "quick"  # what each is asked about one picture
    return (
        TASKS[task].instruction(variant=variant, second=second),
        {"objects": names, "second": second},
        {"objects": names},
        fields,
    )


def _ref_avs(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    expression, name = row.text("expression"), row.text("object", "give the name, or `nothing` where nothing fits")
    name = "" if name.lower() in NOTHING else name
    kind = str(row.given("type") or "seen").lower() if name else "null"
    if kind not in ("seen", "unseen", "null"):
        raise row.error("type", f"is {kind!r}", "use seen or unseen")
    if not name and row.given("mask") is None:
        row = dataclasses.replace(row, values={**row.values, "mask": EMPTY_MASK})
    second, fields = _moment(row, files, sources, seconds)
    variant = "train" if sources.keys() & {"video", "frames"} else "quick"
    label = {"expression": expression, "object": name, "second": second}
    return (
        TASKS["ref-avs"].instruction(variant, expression, second),
        label,
        {"expression": expression, "object": name, "split": kind},
        fields,
    )


_MAKE: dict[str, Callable[[Row, Media, Mapping[str, str], float], Made]] = {
    "avqa": _avqa,
    "ave": _ave,
    "avvp": _avvp,
    "avcap": _avcap,
    "arig": _arig,
    "s4": _avs,
    "ms3": _avs,
    "avss": _avs,
    "ref-avs": _ref_avs,
}
