"""Leaks: clips in the training split of one dataset that another dataset has in val or test.

AVE, LLP, VALOR, AudioCaps, AVSBench and Ref-AVS are all cut from YouTube, some of them from the same videos.

    python -m data_pipelines validate --root R               lists the leaks
    --config.data.exclude_leaks=true                         leaves them out of training

A clip is a video and, where the release states it, a range of seconds. Two clips are the same when they are of one
video and their seconds overlap or are not known; AVE, S4 and MS3 do not state seconds. Only annotations are read, and
only names and numbers are kept. MUSIC-AVQA is left out, because it has its own names for videos. The users' own
Examples are compared by `meta.video`, or by the name of their first file; among the users' own lists these names must
be equal.
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

NO_CLIPS = ("lvis", "video_llava")  # pictures and videos of other origin
SAME = {"arig": "s4", "arig_object": "s4_object", "avqa_original": "avqa"}  # the same clips in the same splits
PICTURES = ("s4", "ms3", "avss", "ref_avs")  # these have many Examples of a clip in sequence
OWN = ("own", PREPARED)
_YOUTUBE = re.compile(r"[A-Za-z0-9_-]{11}")
_SPAN = re.compile(r"(.+)_([0-9]+(?:\.[0-9]+)?)_([0-9]+(?:\.[0-9]+)?)")
_NUMBERED = re.compile(r"(.{11})_[0-9]+")  # the second clip of a video
_VGGSOUND = re.compile(r"(.{11})_([0-9]{6})")  # the number is the first of ten seconds
_BRACKETS = re.compile(r".*\[([A-Za-z0-9_-]{11})\]")  # names of files that yt-dlp downloads
_ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,3}$")  # file extension
Span = tuple[float, float]


class Clip(NamedTuple):
    """A part of a video. span: (start, end) in seconds of the video, None where the release does not state it."""

    video: str
    span: Span | None = None


class Held(NamedTuple):
    """The clips of val and test.

    clips: video -> dataset -> spans. own: names of the users' own clips. unread: errors of annotation files that could
    not be read.
    """

    clips: dict[str, dict[str, set[Span | None]]]
    own: set[str]
    unread: list[InputError]


class Leak(NamedTuple):
    """A training clip whose video is in val or test of the dataset `other`; same: whether the clip itself is there."""

    clip: Clip
    other: str
    same: bool


def dataset_of(example: Example, name: str = PREPARED) -> str:
    """Return the dataset that `meta` of an Example names, or `name` where it names no known dataset."""
    stated = example.meta.get("dataset")
    return stated if isinstance(stated, str) and stated in DATASETS else name


def clip_of(example: Example, dataset: str) -> Clip | None:
    """Return the clip of an Example, read from the names that its dataset uses; None where they identify no clip."""
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
    if dataset in ("s4", "arig"):  # the milliseconds in its names count within the ten seconds of VGGSound
        match = _SPAN.fullmatch(video)
        return Clip(match[1] if match else video)
    if dataset in ("ms3", "ms3_object"):
        match = _NUMBERED.fullmatch(video)
        return Clip(match[1] if match else video)
    return _stretch(video)


def _stretch(name: str) -> Clip:
    """Return the clip of a name as AudioSet, AVSBench (in milliseconds), VGGSound and yt-dlp write names."""
    if _YOUTUBE.fullmatch(name):
        return Clip(name)
    if match := _SPAN.fullmatch(name):
        start, end = float(match[2]), float(match[3])
        unit = 1000 if end - start >= 1000 else 1
        return Clip(match[1], (start / unit, end / unit) if end > start else None)
    if match := _VGGSOUND.fullmatch(name):
        return Clip(match[1], (float(match[2]), float(match[2]) + 10))
    match = _NUMBERED.fullmatch(name) or _BRACKETS.fullmatch(name)
    return Clip(match[1] if match else name)


def own_name(example: Example) -> str:
    """Return the name of a user's own clip: `meta.video`, or its first file without the extension."""
    if isinstance(named := example.meta.get("video"), str):
        return named
    path = next((path for _, path in media_of(example)), "")
    return str(PurePosixPath(path).with_suffix("")) if path else ""


def held_out(root: str | Path, split: str = "train", names: Sequence[str] = ()) -> Held:
    """Collect the clips of every val and test split of a data root, without the splits that `split` names.

    names: datasets to read; all when empty.
    """
    held = Held(defaultdict(lambda: defaultdict(set)), set(), [])
    lists = list(_lists(root, names))
    own = any(name in OWN for name, _ in lists)
    for name, part in lists:
        if part == "train" or part in split.split("+") or name == "avqa" and not own:  # MUSIC-AVQA has its own names
            continue
        for example in _read(root, name, part, held.unread):
            dataset = dataset_of(example, name)
            if dataset in OWN:
                held.own.add(own_name(example))
            if clip := clip_of(example, dataset):
                held.clips[clip.video][dataset].add(clip.span)
    return held


def all_held_out(roots: Iterable[str | Path], split: str) -> Held:
    """Return what `held_out` collects, of several roots together."""
    held = Held(defaultdict(lambda: defaultdict(set)), set(), [])
    for clips, own, unread in (held_out(root, split) for root in roots):
        for video, by_dataset in clips.items():
            for dataset, spans in by_dataset.items():
                held.clips[video][dataset] |= spans
        held.own.update(own)
        held.unread.extend(unread)
    return held


def _lists(root: str | Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name, part in selection(root, names):
        if name not in (*NO_CLIPS, *SAME) and is_there(root, name):
            yield name, part


def _read(root: str | Path, name: str, split: str, unread: list[InputError]) -> Iterator[Example]:
    """Yield the Examples of a list, without its bad rows; an error of the whole list is added to `unread`."""
    try:
        yield from (record for record in annotated(root, name, split)[1] if isinstance(record, Example))
    except InputError as error:
        if not error.problem.startswith("no such annotation file"):
            unread.append(error)


def leaks_of(example: Example, held: Held, name: str = PREPARED) -> list[Leak]:
    """Return the leaks of a training Example: the val and test splits that have its clip or its video."""
    dataset = dataset_of(example, name)
    leaks = []
    if dataset in OWN and (own := own_name(example)) in held.own:
        leaks.append(Leak(Clip(own), dataset, True))
    if (clip := clip_of(example, dataset)) is None:
        return leaks
    for other, spans in held.clips.get(clip.video, {}).items():
        if other not in (dataset, SAME.get(dataset)):
            leaks.append(Leak(clip, other, any(_overlap(clip.span, span) for span in spans)))
    return leaks


def _overlap(a: Span | None, b: Span | None) -> bool:
    return a is None or b is None or (a[0] < b[1] and b[0] < a[1])


def counted(leaks: Mapping[str, Iterable[Leak]]) -> list[tuple[str, str, int, int]]:
    """Return (dataset, other, clips in both, videos in both) of the leaks of each dataset."""
    clips: dict[tuple[str, str], set[Clip]] = defaultdict(set)
    videos: dict[tuple[str, str], set[str]] = defaultdict(set)
    for dataset, of_dataset in leaks.items():
        for leak in of_dataset:
            videos[dataset, leak.other].add(leak.clip.video)
            if leak.same:
                clips[dataset, leak.other].add(leak.clip)
    return [(*pair, len(clips[pair]), len(videos[pair])) for pair in videos]


def sentence(counts: Iterable[tuple[str, str, int, int]]) -> str:
    """Return counts in words, such as `ave in avvp 45, valor in s4 20 (23 by video)`."""
    return ", ".join(
        f"{dataset} in {other} {clips}" + (f" ({videos} by video)" if videos != clips else "")
        for dataset, other, clips, videos in counts
        if clips
    )


def leak_problems(root: str | Path, names: Sequence[str] = ()) -> list[Problem]:
    """Return a warning for each pair of datasets with leaks from one to the other, and one for each leaked clip.

    names: datasets to compare; all when empty. Clips in both train and test of the users' own lists are left out,
    because `validate` reports them already.
    """
    held = held_out(root, "train", names)
    leaks: dict[str, set[Leak]] = defaultdict(set)
    clips: list[Problem] = []
    for name in (name for name, part in _lists(root, names) if part == "train"):
        for example in _read(root, name, "train", []):
            dataset = dataset_of(example, name)
            for leak in leaks_of(example, held, name):
                if leak in leaks[dataset] or leak.other == dataset:
                    continue
                leaks[dataset].add(leak)
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
        for dataset, other, shared, videos in counted(leaks)
    ]
    return pairs + clips


def without(
    examples: Sequence[Example], roots: str | Path | Sequence[str | Path], split: str, exclude: bool
) -> tuple[list[Example], str]:
    """Return (the Examples to train on, one line about the leaks among them or "").

    roots: the data roots whose val and test count. exclude: whether to leave out Examples whose clip is in val or test
    of another dataset.
    """
    held = all_held_out([roots] if isinstance(roots, str | Path) else roots, split)
    gone, line = leaking(examples, range(len(examples)), held, split, exclude)
    left_out = set(gone)
    return [example for at, example in enumerate(examples) if at not in left_out], line


def leaking(
    examples: Sequence[Example], positions: Iterable[int], held: Held, split: str, exclude: bool
) -> tuple[list[int], str]:
    """Return (positions of the Examples to leave out, the line of `without`).

    positions: of the Examples to look at (ascending); the others must have no leaks.
    """
    by_dataset: dict[str, set[Leak]] = defaultdict(set)
    gone: list[int] = []
    last: Any = None
    leaks: list[Leak] = []
    for at in positions:
        example = examples[at]
        dataset, video = dataset_of(example), example.meta.get("video")
        if (dataset, video) != last or dataset not in PICTURES:
            last, leaks = (dataset, video), leaks_of(example, held)
        by_dataset[dataset].update(leaks)
        if any(leak.same for leak in leaks):
            gone.append(at)
    pairs = sentence(counted(by_dataset))
    unread = (
        f"; {len(held.unread)} annotation files could not be read for this, the first: {held.unread[0]}"
        if held.unread
        else ""
    )
    if not pairs:
        return [], f"not all clips of train could be compared with val and test{unread}" if unread else ""
    number = len({leak.clip for leaks in by_dataset.values() for leak in leaks if leak.same})
    what = f"{number} clips ({len(gone)} examples) of {split} are in val or test elsewhere: {pairs}"
    if not exclude:
        return [], f"{what}; --config.data.exclude_leaks=true leaves them out{unread}"
    return gone, f"{what}; they are left out (data.exclude_leaks){unread}"
