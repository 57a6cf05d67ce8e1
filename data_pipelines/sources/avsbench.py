"""AVSBench (Zhou et al. 2022 and 2023, OpenNLPLab/AVSBench): which pixels make the sound, in its two releases.

Semantic release (used by Crab for all three tasks):

    metadata.csv  label2idx.json
    v1s/<uid>/{audio.wav, frames/0..4.jpg, labels_semantic/0..4.png, labels_rgb/0..4.png}     one source: S4
    v1m/<uid>/...                                                                             several sources: MS3
    v2/<uid>/... (0..9)                                                                       AVSS

Object release (used by most AVS papers for S4 and MS3; its masks differ, most of all on MS3):

    Single-source/s4_meta_data.csv    Single-source/s4_data/{audio_wav,visual_frames,gt_masks}/<split>/<category>/...
    Multi-sources/ms3_meta_data.csv   Multi-sources/ms3_data/{audio_wav,gt_masks}/<split>/..., visual_frames/...

Both have one picture per second; in the train split of S4 only the first one has a mask. The pixel value of a semantic
mask is the class id 0..70, which is the number in label2idx.json minus one. Instead of metadata.csv Crab's lists are
read, `{s4,ms3,avss}_samples.json` of {uid, a_obj, split, label}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each

S4_CATEGORIES = (
    "baby_laughter",
    "female_singing",
    "male_speech",
    "dog_barking",
    "cat_meowing",
    "lions_roaring",
    "horse_clip-clop",
    "coyote_howling",
    "mynah_bird_singing",
    "playing_acoustic_guitar",
    "playing_tabla",
    "playing_violin",
    "playing_piano",
    "playing_ukulele",
    "playing_glockenspiel",
    "helicopter",
    "race_car",
    "driving_buses",
    "ambulance_siren",
    "typing_on_computer_keyboard",
    "chainsawing_trees",
    "cap_gun_shooting",
    "lawn_mowing",
)
SPLITS = ("train", "val", "test")
SECONDS = {"v1s": 5, "v1m": 5, "v2": 10}
PARTS = {"s4": "v1s", "ms3": "v1m", "avss": "v2"}  # of the semantic release; Crab reads AVSS from v2 alone
LISTS = {part: task for task, part in PARTS.items()}
_WORDS = re.compile(r"[^a-z0-9]+")
# words of an object's name -> the name
_OBJECTS = {tuple(_WORDS.split(name)): name for name in (*(name.replace("_", " ") for name in S4_CATEGORIES), *CLASSES)}
_WINDOWS = {5: ("five", "one_of_five"), 10: ("ten", "one")}  # seconds -> (windows of the whole clip, of one picture)


class Clip(NamedTuple):
    """One clip: a picture per second, and masks of the first len(masks) pictures. Paths are relative to the data root.

    objects: empty where the annotation does not name them.
    """

    uid: str
    objects: list[str]
    frames: tuple[str, ...]
    masks: tuple[str, ...]
    audio: str
    row: Row


def read(release: Release, split: str, variant: str, task: str) -> Iterator[Found]:
    """Yield Examples of task `s4`, `ms3` or `avss` from the semantic release, one per picture with a mask.

    meta: objects, video, and for `avss` one_of: the pictures of a clip share it, so that an epoch can take one of them.
    """
    masks = "labels_rgb" if task == "avss" else "labels_semantic"  # as the released loader does
    return _examples(semantic_clips(release, split, PARTS[task], masks), task, variant)


def read_object(release: Release, split: str, variant: str, task: str) -> Iterator[Found]:
    """Yield Examples of task `s4` or `ms3` from the object release; meta: objects, video.

    MS3 does not name the sounding objects: its objects are empty and its Examples have no target.
    """
    clips = s4_clips if task == "s4" else ms3_clips
    return _examples(clips(release, split), task, variant)


def _examples(clips: Iterable[Clip | InputError], task: str, variant: str) -> Iterator[Found]:
    for clip in clips:
        if isinstance(clip, InputError):
            yield clip
            continue
        whole, single = _WINDOWS[len(clip.frames)]
        for second, mask in enumerate(clip.masks):
            text = TASKS[task].instruction(variant=variant, second=second)
            in_video = "<video>" in text
            meta = {"objects": clip.objects, "video": clip.uid, "row": clip.row.place}
            yield Example(
                id=f"{clip.uid}-{second}",
                task=task,
                instruction=text,
                target=TASKS[task].target(clip.objects, second) if clip.objects else "",
                frames=clip.frames if in_video else (),
                image=None if in_video else clip.frames[second],
                audio=clip.audio,
                windows=whole if in_video else single,
                second=second,
                mask=mask,
                mask_kind=TASKS[task].mask_kind,
                meta=meta | ({"one_of": clip.uid} if task == "avss" else {}),
            )


def semantic_clips(release: Release, split: str, part: str, masks: str) -> Iterator[Clip | InputError]:
    """Yield the clips of one part (v1s, v1m, v2) of the semantic release, with the masks of one folder."""
    check_classes(release)

    def clips(row: Row) -> Iterator[Clip]:
        # Both are checked in every row, so that a misspelt value cannot silently drop a row from its split.
        if (row.one_of("split", SPLITS), row.one_of("label", tuple(SECONDS))) == (split, part):
            uid = row.name("uid", "_4R3qHn1n50_0_5000")
            if not (objects := object_names(row.values.get("a_obj"))):
                problem = f"is {row.values.get('a_obj')!r:.60}, which names no known object"
                release.note(row.where, "a_obj", f"{problem}: the clip has masks and no answer to learn")
            seconds = range(SECONDS[part])
            labelled = range(1) if part == "v1s" and split == "train" else seconds
            at = release.inside(f"{part}/{uid}", row.where, "uid")
            yield Clip(
                uid,
                objects,
                tuple(f"{at}/frames/{k}.jpg" for k in seconds),
                tuple(f"{at}/{masks}/{k}.png" for k in labelled),
                f"{at}/audio.wav",
                row,
            )

    name = release.annotation("metadata.csv", f"{LISTS[part]}_samples.json")
    yield from each(
        release.records(name, "uid")
        if name.endswith(".json")
        else release.table(name, ("uid", "a_obj", "split", "label")),
        clips,
    )


def object_names(value: Any) -> list[str]:
    """Return the sounding objects of an `a_obj`: names of classes or S4 categories, joined by any signs.

    The result is empty if any part is another word, a number or nothing.
    """
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str):
        return []
    words = tuple(word for word in _WORDS.split(text.lower()) if word and word != "and")
    names: list[str] = []
    while words:
        length = next((n for n in range(min(5, len(words)), 0, -1) if words[:n] in _OBJECTS), 0)
        if not length:
            return []
        names.append(_OBJECTS[words[:length]])
        words = words[length:]
    return names


def check_classes(release: Release) -> None:
    """Raise InputError if label2idx.json exists and numbers the classes differently (one-based, background 1)."""
    if release.kind("label2idx.json") == "file":
        stored, wanted = release.json("label2idx.json"), {name: i for i, name in enumerate(CLASSES, 1)}
        if stored != wanted:
            odd = next(
                (k for k in wanted if not isinstance(stored, dict) or stored.get(k) != wanted[k]), "more classes"
            )
            raise InputError(
                str(release.base / "label2idx.json"),
                odd,
                "is not the released numbering of the classes",
                "copy the file of AVSBench-semantic",
            )


def s4_clips(release: Release, split: str) -> Iterator[Clip | InputError]:
    """Yield the clips of the single-source part of the object release; the category is the name of the object."""
    name = release.annotation("Single-source/s4_meta_data.csv")

    def clips(row: Row) -> Iterator[Clip]:
        if row.one_of("split", SPLITS) == split:
            clip, category = row.name("name", "-_wznbUu3DY"), row.one_of("category", S4_CATEGORIES)
            yield _object_clip(
                release,
                row,
                clip,
                category.replace("_", " "),
                "Single-source/s4_data",
                f"{split}/{category}/",
                f"{split}/{category}/",
                clip,
                1 if split == "train" else 5,
            )

    yield from each(release.table(name, ("name", "start", "category", "split")), clips)


def ms3_clips(release: Release, split: str) -> Iterator[Clip | InputError]:
    """Yield the clips of the multi-source part.

    Its pictures are in no split's folder and are named <video_id>.mp4_<n>.png.
    """
    name = release.annotation("Multi-sources/ms3_meta_data.csv")

    def clips(row: Row) -> Iterator[Clip]:
        if row.one_of("split", SPLITS) == split:
            clip = row.name("video_id", "3vheOi4y540_1")
            yield _object_clip(release, row, clip, "", "Multi-sources/ms3_data", f"{split}/", "", f"{clip}.mp4", 5)

    yield from each(release.table(name, ("video_id", "split")), clips)


def _object_clip(
    release: Release, row: Row, clip: str, name: str, data: str, labels: str, pictures: str, stem: str, masks: int
) -> Clip:
    at = release.inside(data, row.where, "")
    return Clip(
        clip,
        [name] if name else [],
        tuple(f"{at}/visual_frames/{pictures}{clip}/{stem}_{k}.png" for k in range(1, 6)),
        tuple(f"{at}/gt_masks/{labels}{clip}/{clip}_{k}.png" for k in range(1, masks + 1)),
        f"{at}/audio_wav/{labels}{clip}.wav",
        row,
    )
