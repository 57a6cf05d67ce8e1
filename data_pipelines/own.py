"""A table of your own, as the lists of Examples that training and evaluation read.

    python -m data_pipelines own --csv clips.csv --root R
    python -m data_pipelines own --jsonl clips.jsonl --root R --copy

with a line for each question, for example

    task,media,question,answer,events
    avqa,clips/band.mp4,How many instruments are sounding?,two,
    ave,clips/dog.mp4,,,Bark 2-5
    avvp,clips/dog.mp4,,,audio: Speech 0-10; Dog 2-5; visual: Dog 0-10
    avcap,clips/dog.mp4,,A dog barks at a man.,

writes R/train.jsonl (and R/val.jsonl, R/test.jsonl where the column `split` says so) with the prompt, target, windows
and label of each task, and ends by validating them: exit code 3 when anything is bad. docs/your_data.md has every
column. Media are found from the table's folder, or from R, and must lie below R; --copy copies those that do not.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import difflib
import filecmp
import functools
import io
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av

from crab_jax.bounds import PATH, Whole
from crab_jax.errors import CommandLine, InputError, run_verb
from crab_jax.files import out_folder, whole, write_whole
from crab_jax.progress import Progress, on_stderr
from crab_jax.structured import LIST, json_line, read_bytes
from crab_jax.tasks import TASKS, arig, avqa
from crab_jax.tasks.ave import SECONDS
from data_pipelines import media, validate
from data_pipelines.datasets import DATASETS, SPLITS
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.media import EMPTY_MASK, INLINE_MASK
from data_pipelines.sources.audiocaps import PROMPT as SOUND_PROMPT
from data_pipelines.sources.own import PICTURES, pictures
from data_pipelines.sources.release import Release
from data_pipelines.sources.release import Row as Line

COMMON = ("id", "task", "split", "media", "video", "frames", "image", "audio", "reasoning")
# What a row of each task says besides.
FIELDS = {"avqa": ("question", "answer", "type"), "ave": ("events",), "avvp": ("events",), "avcap": ("answer",),
          "arig": ("object", "box", "box_224", "second"), "s4": ("object", "mask", "second"),
          "ms3": ("object", "mask", "second"), "avss": ("object", "mask", "second"),
          "ref-avs": ("expression", "object", "mask", "second", "type")}
COLUMNS = tuple(dict.fromkeys((*COMMON, *(name for names in FIELDS.values() for name in names))))
OTHER_NAMES = {"objects": "object", "event": "events", "caption": "answer", "captions": "answer"}
SPLIT_NAMES = {**{split: split for split in SPLITS}, "training": "train", "validation": "val", "valid": "val",
               "dev": "val", "testing": "test"}
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".au", ".w64")
PHOTOS = (*PICTURES, ".gif", ".tif", ".tiff", ".heic")
NOTHING = ("nothing", "none", "null")  # what an expression refers to, or a mask shows
_SPAN = r"\(?\s*(\d+)(?:\.0+)?\s*s?\s*(?:-|\u2013|\u2014|\bto\b)\s*(\d+)(?:\.0+)?\s*s?\s*\)?"
_EVENT = re.compile(rf"(?P<name>.*?\S)[\s,:]+(?P<spans>{_SPAN}(?:\s*,\s*{_SPAN})*)", re.DOTALL)
_SENSE = re.compile(r"(audio|visual)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: what its columns say, as text or, from JSON, as it is. where: file and line."""

    where: str
    number: int
    values: Mapping[str, Any]

    def error(self, field: str, problem: str, fix: str) -> InputError:
        return InputError(self.where, field, problem, fix)

    def given(self, field: str) -> Any:
        """What a column says, None where it is empty."""
        value = self.values.get(field)
        value = value.strip() if isinstance(value, str) else value
        return None if value in ("", []) else value

    def text(self, field: str, fix: str = "") -> str:
        """Text that must be there."""
        value = self.given(field)
        if value is None:
            raise self.error(field, f"is empty, and {self.values['task']} needs it", fix or f"give the {field}")
        if not isinstance(value, str):
            raise self.error(field, f"is {value!r:.60}, not text", "write it in quotes")
        return " ".join(value.split())

    def second(self) -> int | None:
        """The second, None where it is empty."""
        value = self.given("second")
        if isinstance(value, bool) or value is not None and not re.fullmatch(r"\d{1,4}(?:\.0+)?", str(value)):
            raise self.error("second", f"is {value!r:.60}", "give a whole number, counted from 0")
        return None if value is None else int(float(value))


# Reading a table.

def read_text(path: Path, flag: str, say: Say) -> str:
    """The text of a file, as programs for tables save it: UTF-8, UTF-16 with its mark, or Western Windows (said)."""
    data = read_bytes(path, flag, LIST, "give a file")
    if data.startswith(b"PK\x03\x04"):
        raise InputError(str(path), flag, "is a workbook, not text", "save it as CSV UTF-8")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings: tuple[str, ...] = ("utf-16",)
    else:
        encodings = ("utf-8-sig",) if b"\0" in data else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        if encoding == "cp1252":
            say(f"{path} is not UTF-8; it is read as Western Windows text (cp1252)")
        return text
    raise InputError(str(path), flag, "is no text of a known encoding", "save it as CSV UTF-8")


def _name(header: str) -> str:
    """The column that a header means."""
    name = re.sub(r"[\s-]+", "_", header.strip().lower())
    return OTHER_NAMES.get(name, name)


def _check_columns(names: Sequence[str], where: str, say: Say) -> None:
    """Raise InputError for columns that come twice or seem misspelt; say which others are not read."""
    for name, times in Counter(name for name in names if name).items():
        if times > 1:
            raise InputError(where, name, "comes twice in the header", "keep one column")
    if "task" not in names:
        raise InputError(where, "task", f"no such column among {', '.join(names)[:80]!r}",
                         f"name the columns in the first line, some of {', '.join(COLUMNS)}")
    others = [name for name in names if name and name not in COLUMNS]
    for name in others:
        if close := difflib.get_close_matches(name, [c for c in COLUMNS if c not in names], 1, 0.8):
            raise InputError(where, name, "no such column", f"did you mean {close[0]!r}? Rename or remove it")
    if others:
        say(f"columns that are not read: {', '.join(others)}")


def csv_rows(path: Path, say: Say = on_stderr) -> Iterator[Row]:
    """The rows of a table with commas, semicolons or tabs between its cells; empty ones are passed over."""
    text = read_text(path, "--csv", say)
    skipped = 0
    if found := re.match(r"sep=(.)\r?\n", text):
        text, skipped = text[found.end():], 1
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = found[1] if found else max(",;\t|", key=lambda mark: sum(_name(cell) in COLUMNS for cell in
                                                                         first.replace('"', "").split(mark)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        while True:
            number = reader.line_num + skipped + 1
            cells = next(reader, None)
            if cells is None:
                break
            where = f"{path}:{number}"
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [_name(cell) for cell in cells]
                _check_columns(names, where, say)
                continue
            if any(cell.strip() for cell in cells[len(names):]):
                raise InputError(where, "", f"has {len(cells)} cells, but the header {len(names)}",
                                 f"put text that holds {delimiter!r} in double quotes")
            yield Row(where, number, dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num + skipped}", "", f"cannot be read as CSV ({error})",
                         "look for a double quote that is not closed") from None
    if not names:
        raise InputError(str(path), "--csv", "is empty", "name the columns in its first line")


def jsonl_rows(path: Path, say: Say = on_stderr) -> Iterator[Row]:
    """The objects of a file with one on each line."""
    for number, line in enumerate(read_text(path, "--jsonl", say).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            value = json_line(line, where)
            if not isinstance(value, dict):
                raise InputError(where, "", f"is {type(value).__name__}, not an object", "write one object a line")
            values = {_name(key): inside for key, inside in value.items()}
            _check_columns(list(values), where, say)
            yield Row(where, number, values)


# Media.

@dataclasses.dataclass(frozen=True)
class Media:
    """Finds the files that a table names, below the data root."""

    root: Path
    folder: Path  # of the table
    copy: bool = False
    overwrite: bool = False
    moments: dict[str, tuple[str, int, int]] = dataclasses.field(default_factory=dict)  # pictures to be written

    def moment(self, video: str, second: int, parts: int) -> str:
        """The path of the picture at a second of a video, which `write_moments` writes."""
        path = f"media/{video.replace('/', '_')}_{second}.png"
        self.moments[path] = video, second, parts
        return path

    def write_moments(self) -> None:
        """Write the pictures that rows are about and that only their videos hold."""
        for path, (video, second, parts) in self.moments.items():
            png = io.BytesIO()
            media.moment_picture(self.root / video, second, parts).save(png, "PNG")
            write_whole(self.root / path, png.getvalue())

    def find(self, row: Row, field: str, given: Any) -> str:
        """The path of a file relative to the root, copied there where that is wanted. Raises InputError."""
        if not isinstance(given, str):
            raise row.error(field, f"is {given!r:.60}, not a path", "write it in quotes")
        if "://" in given:
            raise row.error(field, f"is the address {given!r:.80}", "download the file, and give its path")
        kinds = [given.strip(), given.strip().replace("\\", "/")]
        found = next((path for text in kinds for base in (self.folder, self.root)
                      if os.path.exists(path := os.path.join(base, text))), None)
        if found is None:
            raise row.error(field, f"no such file {given!r:.120}",
                            f"give its path from the folder of the table ({self.folder}) or from --root")
        if field != "frames" and not os.path.isfile(found):
            raise row.error(field, f"{given!r:.120} is a folder", "give a file" + (
                ", or the folder in the column `frames`" if field in ("media", "video") else ""))
        real, root = os.path.realpath(found), os.path.realpath(self.root)
        for path, base in ((os.path.abspath(found), os.path.abspath(self.root)), (real, root)):
            if real.startswith(root + os.sep) and path.startswith(base + os.sep):
                return os.path.relpath(path, base).replace(os.sep, "/")
        if not self.copy:
            raise row.error(field, f"{given!r:.120} lies outside of --root {self.root}",
                            "put it there, or give --copy to have it copied")
        return self._copied(row, field, found, kinds[1])

    def _copied(self, row: Row, field: str, found: str, given: str) -> str:
        parts = [part for part in re.split(r"[/\\]|^[A-Za-z]:", given) if part not in ("", ".", "..", "~")]
        inside = "/".join(("media", *parts))
        target = self.root / inside
        if os.path.isdir(found):
            for name in sorted(os.listdir(found)):
                if name.lower().endswith(PICTURES):
                    self._copied(row, field, os.path.join(found, name), f"{given.rstrip('/')}/{name}")
            return inside
        if target.is_file() and not filecmp.cmp(found, target, shallow=False) and not self.overwrite:
            raise row.error(field, f"{target} is another file", "give --overwrite to replace it")
        if not target.is_file() or not filecmp.cmp(found, target, shallow=False):
            with whole(target) as partial:
                shutil.copyfile(found, partial)
        return inside

    def sources(self, row: Row) -> dict[str, str]:
        """video, frames, image and audio of a row: those of its columns, and those in `media` by their kinds."""
        named = [(field, row.given(field)) for field in ("video", "frames", "image", "audio") if row.given(field)]
        several = row.given("media")
        for path in several if isinstance(several, list) else re.split(r"\s*[;|\n]\s*", several) if isinstance(
                several, str) else [several] if several is not None else []:
            suffix = os.path.splitext(path)[1].lower() if isinstance(path, str) else ""
            named.append(("image" if suffix in PHOTOS else "audio" if suffix in SOUNDS else "video", path))
        found: dict[str, str] = {}
        for field, path in named:
            if field in found:
                raise row.error(field, f"is given twice, {found[field]!r:.60} and {path!r:.60}", "keep one")
            found[field] = self.find(row, field, path)
        if "video" in found and "frames" in found:
            raise row.error("frames", "are given beside a video", "give one clip")
        return found


@functools.lru_cache(1 << 16)
def facts(path: str, field: str) -> tuple[float, bool]:
    """(seconds, whether there is sound) of a film or a sound. Raises InputError."""
    if field == "video":
        clip = media.timing(path)
        return clip.seconds, clip.sound is not None
    with media.opened(path, field) as container:
        stated, has_sound = (container.duration or 0) / av.time_base, media.sound_of(container) is not None
    return stated or (len(media.read_audio(path)) / media.SAMPLE_RATE if has_sound else 0.0), has_sound


# One Example of a row.

def example_of(row: Row, files: Media) -> Example:
    """The Example that a row means, with the prompt, target, windows and label that its task's datasets have."""
    task = str(row.given("task") or "").lower().replace("_", "-")
    if task not in FIELDS:
        raise row.error("task", f"unknown task {row.given('task')!r}", f"use one of {', '.join(FIELDS)}")
    row = dataclasses.replace(row, values={**row.values, "task": task})
    for name in COLUMNS:
        if name not in (*COMMON, *FIELDS[task]) and row.given(name) is not None:
            raise row.error(name, f"is {row.given(name)!r:.60}, but {task} has no {name}",
                            f"leave it empty; {task} takes {', '.join(FIELDS[task])}")
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
    return Example(**{
        "id": f"{task}-{row.number}" if given is None else str(given), "task": task, "instruction": prompt,
        "target": TASKS[task].target(**label, reasoning=reasoning), "mask_kind": TASKS[task].mask_kind, **visual,
        "meta": {**meta, "video": clip}, **fields})


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


def windows_for(task: str, seconds: float, one_picture: bool) -> str:
    """The audio windows with which a task's datasets ask about a clip of so many seconds, or about one picture."""
    if one_picture and task not in ("ref-avs", "arig"):
        return "one_of_five" if task in ("s4", "ms3") and seconds < 7.5 else "one"
    if task == "avqa" and seconds > 30:
        return "music_avqa"
    return "five" if task in ("s4", "ms3", "arig") and seconds < 7.5 else "ten"


Made = tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]  # prompt, arguments of the target, meta, other fields


def _only(row: Row, sources: Mapping[str, str], *wanted: str) -> None:
    """Raise InputError for visual sources other than one of `wanted`."""
    shown = [field for field in ("video", "frames", "image") if field in sources]
    if len(shown) != 1 or shown[0] not in wanted:
        what = {"video": "a video", "frames": "pictures of a clip", "image": "one picture"}
        asked = " or ".join(what[field] for field in wanted)
        raise row.error("media", f"{row.values['task']} is asked about {asked}, not about "
                        f"{' and '.join(what[field] for field in shown) or 'sound alone'}", "give that")


def _avqa(row: Row, files: Media, sources: Mapping[str, str], seconds: float) -> Made:
    _only(row, sources, "video", "frames")
    question, label = row.text("question"), {"answer": row.text("answer")}
    kind = row.given("type")
    kinds = [part.strip() for part in re.split(r"[/,]", kind)] if isinstance(kind, str) else kind
    if kinds is not None and not TASKS["avqa"].label["type"].holds(kinds, {"type": kinds}):
        raise row.error("type", f"is {kind!r:.60}", f"use modality/kind, as in Audio-Visual/Counting, of "
                        f"{', '.join(avqa.SUBTYPES)}, or leave it empty")
    meta = {**label, "question": question} | ({"type": kinds} if kinds else {})
    return (TASKS["avqa"].instruction(question=question), label, meta,
            {"windows": windows_for("avqa", seconds, False)})


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
        given = {sense: [] if [p.lower() for p in parts] == ["none"] else "; ".join(parts) or None
                 for sense, parts in by_sense.items()}
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
            found += [[match["name"].strip(" ,:"), int(start), int(end)]
                      for start, end in re.findall(_SPAN, match["spans"])]
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
    return (TASKS["arig"].instruction(), label, label,
            {"windows": windows_for("arig", seconds, True), "second": row.second()})


def _box(row: Row, picture: Path) -> list[int]:
    """The box of a row in the 224 x 224 picture, from pixels of the picture (`box`) or of that one (`box_224`)."""
    pixels, scaled = row.given("box"), row.given("box_224")
    if (pixels is None) == (scaled is None):
        raise row.error("box", "is empty, and so is box_224" if pixels is None else "is given beside box_224",
                        "give x1, y1, x2, y2 in pixels of the picture in `box`, or of the 224 x 224 one in `box_224`")
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
        raise row.error("second", f"is empty, and {task} is asked about one second",
                        "give the number of the second that the mask is of, counted from 0")
    windows = windows_for(task, seconds, one_picture)
    if "frames" in sources:
        count = len(_frames(row, files, sources))
        if count not in (5, SECONDS):
            raise row.error("frames", f"holds {count} pictures", f"give 5 or {SECONDS}, one a second")
        windows = "five" if count == 5 and task != "ref-avs" else "ten"
    parts = 5 if windows in ("five", "one_of_five") else SECONDS
    if second >= parts:
        raise row.error("second", f"is {second}, but a clip of {seconds:.1f} s is asked about in {parts} parts",
                        f"count from 0 to {parts - 1}")
    fields: dict[str, Any] = {"second": second, "windows": windows}
    if not one_picture and "image" in sources:
        fields |= {"seg_image": sources["image"], "image": None}
    elif "video" in sources and not 0.8 * parts <= seconds <= 1.2 * parts:
        raise row.error("image", f"is empty, and it is not certain which picture of a clip of {seconds:.1f} s second "
                        f"{second} means", "give the picture that the mask was drawn on, or a clip of "
                        f"{parts} seconds")
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
    return (TASKS[task].instruction(variant=variant, second=second), {"objects": names, "second": second},
            {"objects": names}, fields)


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
    return (TASKS["ref-avs"].instruction(variant, expression, second), label,
            {"expression": expression, "object": name, "split": kind}, fields)


_MAKE: dict[str, Callable[[Row, Media, Mapping[str, str], float], Made]] = {
    "avqa": _avqa, "ave": _ave, "avvp": _avvp, "avcap": _avcap, "arig": _arig, "s4": _avs, "ms3": _avs, "avss": _avs,
    "ref-avs": _ref_avs}


# The verb.

def split_of(row: Row, default: str) -> str:
    """The split of a row."""
    said = row.given("split")
    name = default if said is None else SPLIT_NAMES.get(str(said).lower())
    if name is None:
        raise row.error("split", f"unknown split {said!r}", f"use one of {', '.join(SPLITS)}")
    return name


def build(rows: Sequence[Row], files: Media, split: str, progress: Callable[[str], None] | None = None
          ) -> dict[str, list[Example]]:
    """split -> the Examples of its rows, in order. Raises the first InputError, with how many more rows are wrong."""
    examples: dict[str, list[Example]] = {}
    seen: dict[tuple[str, str], int] = {}
    wrong: list[InputError] = []
    pace = Progress("rows", len(rows), progress)
    for done, row in enumerate(rows):
        pace.to(done)
        try:
            example = example_of(row, files)
            key = (split_of(row, split), example.id)
            if key in seen:
                raise row.error("id", f"{example.id!r:.60} is that of line {seen[key]} too", "give each row its own")
            seen[key] = row.number
            examples.setdefault(key[0], []).append(example)
        except InputError as error:
            wrong.append(error)
    if wrong:
        first = wrong[0]
        more = f" ({len(wrong) - 1} more rows are wrong)" if wrong[1:] else ""
        raise InputError(first.where, first.field, f"{first.problem}{more}", first.fix)
    return examples


def _check_root(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise InputError(str(root), "--root", "is no folder", "give a folder")
    if releases := [d.folder for name, d in DATASETS.items() if name != "own" and (root / d.folder).is_dir()]:
        raise InputError(str(root), "--root", f"holds {releases[0]}/, which a list of examples beside it would hide",
                         f"give --root {root / 'own'}, which is read as the dataset `own`")


def run(argv: Sequence[str]) -> bool:
    """Write the lists and validate them; whether anything is bad."""
    parser = CommandLine(__doc__, "python -m data_pipelines own")
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--csv", type=PATH, help="table with the columns named in its first line")
    tables.add_argument("--jsonl", type=PATH, help="the same fields as one JSON object a line")
    parser.add_argument("--root", type=PATH, required=True, help="data root to write to")
    parser.add_argument("--split", default="train", choices=SPLITS, help="of rows that do not say theirs (%(default)s)")
    parser.add_argument("--copy", action="store_true", help="copy media that lie elsewhere to R/media")
    parser.add_argument("--overwrite", action="store_true", help="replace lists and copies that are there")
    parser.add_argument("--workers", type=Whole(0, 1024), default=0,
                        help="processes that validate (default: one per core)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments: argparse.Namespace = parser.parse_args(argv)
    table, root = Path(arguments.csv or arguments.jsonl), Path(arguments.root)
    _check_root(root)
    notes: dict[str, None] = {}  # what is odd about a table, said when it can be used
    rows = list((csv_rows if arguments.csv else jsonl_rows)(table, notes.setdefault))
    if not rows:
        raise InputError(str(table), "", "holds no row", "write a line for each question")
    lists = {split: root / f"{split}.jsonl" for split in dict.fromkeys(split_of(row, arguments.split) for row in rows)}
    for path in lists.values():
        if path.exists() and not arguments.overwrite:
            raise InputError(str(path), "", "is there already", "give --overwrite to replace it, or another --root")
    if arguments.copy or root.exists():  # a table that is wrong makes no folder
        out_folder(root, "--root")
    files = Media(root, table.parent, arguments.copy, arguments.overwrite)
    examples = build(rows, files, arguments.split, on_stderr)
    for note in notes:
        on_stderr(note)
    out_folder(root, "--root")
    files.write_moments()
    for split, path in lists.items():
        write_jsonl(path, examples[split])
        tasks = Counter(example.task for example in examples[split])
        print(f"{path}: {len(examples[split])} examples ({', '.join(f'{n} {task}' for task, n in tasks.items())})")
    return validate.run(["--root", str(root), "--workers", str(arguments.workers)])


def main(argv: Sequence[str]) -> None:
    """Entry point of `python -m data_pipelines own`."""
    run_verb(lambda: sys.exit(validate.BAD) if run(argv) else None, "--debug" in argv)
