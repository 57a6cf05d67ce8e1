"""Clips of one dataset's train that another dataset has in val or test.

AVE, LLP, VALOR, AudioCaps, AVSBench and Ref-AVS are all cut from YouTube, some of them from the same videos.

    python -m data_pipelines validate --root R               lists them
    --config.data.exclude_leaks=true                         leaves them out of training

A clip is a video and, where the release tells them, the seconds of it; two clips are one when they are of one video and
their seconds overlap or are not known. AVE, S4 and MS3 do not tell them. Only annotations are read, and what is kept is
names and numbers. MUSIC-AVQA names its videos itself. The users' own Examples take part by `meta.video`, or by the name
of their first file, and with their own val and test by that name as it stands.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from crab_jax.io.errors import InputError
from data_pipelines.datasets import DATASETS, PREPARED, annotated, is_there, media_of, selection
from data_pipelines.examples import Example
from data_pipelines.status import WARNING, Problem

NO_CLIPS = ("lvis", "video_llava")  # pictures and videos of other places
SAME = {"arig": "s4", "arig_object": "s4_object", "avqa_original": "avqa"}  # the same clips in the same splits
PICTURES = ("s4", "ms3", "avss", "ref_avs")  # many Examples of a clip, side by side
OWN = ("own", PREPARED)
_YOUTUBE = re.compile(r"[A-Za-z0-9_-]{11}")
_SPAN = re.compile(r"(.+)_([0-9]+(?:\.[0-9]+)?)_([0-9]+(?:\.[0-9]+)?)")
_NUMBERED = re.compile(r"(.{11})_[0-9]+")  # the second clip of a video
_VGGSOUND = re.compile(r"(.{11})_([0-9]{6})")  # its first second, of ten
_BRACKETS = re.compile(r".*\[([A-Za-z0-9_-]{11})\]")  # as yt-dlp names what it fetches
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,3}$")  # of a file
Span = tuple[float, float]


class Clip(NamedTuple):
    """A stretch of a video. span: (start, end) in seconds of the video, None where that is not told."""

    video: str
    span: Span | None = None


class Held(NamedTuple):
    """The clips of val and test. clips: video -> dataset -> spans. own: names of the users' own clips. unread: why
    annotations could not be read."""

    clips: dict[str, dict[str, set[Span | None]]]
    own: set[str]
    unread: list[InputError]


class Leak(NamedTuple):
    """A clip of train that is (`same`) in val or test of the dataset `other`, or only of a video that is there."""

    clip: Clip
    other: str
    same: bool


def dataset_of(example: Example, name: str = PREPARED) -> str:
    """The dataset that an Example says it is from, or `name` where that is none that is known."""
    said = example.meta.get("dataset")
    return said if isinstance(said, str) and said in DATASETS else name


def clip_of(example: Example, dataset: str) -> Clip | None:
    """The clip that an Example is about, by the names of its dataset; None where they tell no clip."""
    if dataset in NO_CLIPS:
        return None
    if dataset in OWN:
        return _stretch(_ENDING.sub("", PurePosixPath(own_name(example)).name))
    if dataset == "audiocaps":
        named, _, start = example.id.removeprefix("audiocaps-").rpartition("_")
        return Clip(named, (float(start), float(start) + 10)) if named and start.isdecimal() else None
    video = example.meta.get("filename" if dataset == "avvp" else "video")
    if not isinstance(video, str):
        return None
    if dataset in ("s4", "arig"):  # its milliseconds are of the ten seconds that VGGSound took
        found = _SPAN.fullmatch(video)
        return Clip(found[1] if found else video)
    if dataset in ("ms3", "ms3_object"):
        found = _NUMBERED.fullmatch(video)
        return Clip(found[1] if found else video)
    return _stretch(video)


def _stretch(name: str) -> Clip:
    """The clip that a name tells, in the ways of AudioSet, AVSBench (milliseconds), VGGSound and yt-dlp."""
    if _YOUTUBE.fullmatch(name):
        return Clip(name)
    if found := _SPAN.fullmatch(name):
        start, end = float(found[2]), float(found[3])
        unit = 1000 if end - start >= 1000 else 1
        return Clip(found[1], (start / unit, end / unit) if end > start else None)
    if found := _VGGSOUND.fullmatch(name):
        return Clip(found[1], (float(found[2]), float(found[2]) + 10))
    found = _NUMBERED.fullmatch(name) or _BRACKETS.fullmatch(name)
    return Clip(found[1] if found else name)


def own_name(example: Example) -> str:
    """What names a clip of the users' own: `meta.video`, or its first file without the ending."""
    if isinstance(named := example.meta.get("video"), str):
        return named
    path = next((path for _, path in media_of(example)), "")
    return str(PurePosixPath(path).with_suffix("")) if path else ""


def held_out(root: str | Path, split: str = "train", names: Sequence[str] = ()) -> Held:
    """The clips of every val and test of a data root (of the datasets `names`), but for the splits of `split`."""
    held = Held(defaultdict(lambda: defaultdict(set)), set(), [])
    lists = list(_lists(root, names))
    own = any(name in OWN for name, _ in lists)
    for name, part in lists:
        if part == "train" or part in split.split("+") or name == "avqa" and not own:  # MUSIC-AVQA's names are its own
            continue
        for example in _read(root, name, part, held.unread):
            dataset = dataset_of(example, name)
            if dataset in OWN:
                held.own.add(own_name(example))
            if clip := clip_of(example, dataset):
                held.clips[clip.video][dataset].add(clip.span)
    return held


def _lists(root: str | Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name, part in selection(root, names):
        if name not in (*NO_CLIPS, *SAME) and is_there(root, name):
            yield name, part


def _read(root: str | Path, name: str, split: str, unread: list[InputError]) -> Iterator[Example]:
    """The Examples of a list, without what is wrong with its rows; an error of the whole goes into `unread`."""
    try:
        yield from (found for found in annotated(root, name, split)[1] if isinstance(found, Example))
    except InputError as error:
        if not error.problem.startswith("no such annotation file"):
            unread.append(error)


def leaks_of(example: Example, held: Held, name: str = PREPARED) -> list[Leak]:
    """Where else the clip of an Example of train is."""
    dataset = dataset_of(example, name)
    found = []
    if dataset in OWN and (own := own_name(example)) in held.own:
        found.append(Leak(Clip(own), dataset, True))
    if (clip := clip_of(example, dataset)) is None:
        return found
    for other, spans in held.clips.get(clip.video, {}).items():
        if other not in (dataset, SAME.get(dataset)):
            found.append(Leak(clip, other, any(_overlap(clip.span, span) for span in spans)))
    return found


def _overlap(one: Span | None, other: Span | None) -> bool:
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def counted(leaks: Mapping[str, Iterable[Leak]]) -> list[tuple[str, str, int, int]]:
    """(dataset, other, clips in both, videos in both) of the leaks of each dataset's train."""
    clips: dict[tuple[str, str], set[Clip]] = defaultdict(set)
    videos: dict[tuple[str, str], set[str]] = defaultdict(set)
    for dataset, found in leaks.items():
        for leak in found:
            videos[dataset, leak.other].add(leak.clip.video)
            if leak.same:
                clips[dataset, leak.other].add(leak.clip)
    return [(*pair, len(clips[pair]), len(videos[pair])) for pair in videos]


def sentence(counts: Iterable[tuple[str, str, int, int]]) -> str:
    """`ave in avvp 45, valor in s4 20 (23 by video)`."""
    return ", ".join(
        f"{dataset} in {other} {clips}" + (f" ({videos} by video)" if videos != clips else "")
        for dataset, other, clips, videos in counts
        if clips
    )


def leak_problems(root: str | Path, names: Sequence[str] = ()) -> list[Problem]:
    """A warning for each pair of datasets (of `names`, or all) of which one has in train what the other has in val or
    test, and one for each such clip. What the users' own train and test share is a problem of `validate` already."""
    held = held_out(root, "train", names)
    found: dict[str, set[Leak]] = defaultdict(set)
    clips: list[Problem] = []
    for name in (name for name, part in _lists(root, names) if part == "train"):
        for example in _read(root, name, "train", []):
            dataset = dataset_of(example, name)
            for leak in leaks_of(example, held, name):
                if leak in found[dataset] or leak.other == dataset:
                    continue
                found[dataset].add(leak)
                if leak.same:
                    path = next((path for _, path in media_of(example)), "")
                    named = "dataset" in example.meta or name in OWN
                    clips.append(
                        Problem(
                            name,
                            "train",
                            example.id if named else f"{name}-{example.id}",
                            path,
                            "video",
                            f"{WARNING}: its clip is in val or test of {leak.other} too",
                        )
                    )
    pairs = [
        Problem(
            dataset,
            "train",
            dataset,
            "",
            "video",
            f"{WARNING}: {shared} clips are in val or test of {other} too ({videos} by video); "
            "data.exclude_leaks=true leaves them out of training",
        )
        for dataset, other, shared, videos in counted(found)
    ]
    return pairs + clips


def without(examples: Sequence[Example], root: str | Path, split: str, exclude: bool) -> tuple[list[Example], str]:
    """(the Examples to train on, one line about the leaks among them, "" for none).

    exclude: leave those out whose clip is in val or test of another dataset of the root.
    """
    held = held_out(root, split)
    found: dict[str, set[Leak]] = defaultdict(set)
    kept: list[Example] = []
    last: Any = None
    leaks: list[Leak] = []
    for example in examples:
        dataset, video = dataset_of(example), example.meta.get("video")
        if (dataset, video) != last or dataset not in PICTURES:
            last, leaks = (dataset, video), leaks_of(example, held)
        found[dataset].update(leaks)
        if not any(leak.same for leak in leaks):
            kept.append(example)
    said = sentence(counted(found))
    unread = (
        f"; {len(held.unread)} annotation files could not be read for this, the first: {held.unread[0]}"
        if held.unread
        else ""
    )
    if not said:
        return list(examples), f"clips of train were not all looked for in val and test{unread}" if unread else ""
    number = len({leak.clip for leaks in found.values() for leak in leaks if leak.same})
    what = f"{number} clips ({len(examples) - len(kept)} examples) of {split} are in val or test elsewhere: {said}"
    if not exclude:
        return list(examples), f"{what}; --config.data.exclude_leaks=true leaves them out{unread}"
    return kept, f"{what}; they are left out (data.exclude_leaks){unread}"
