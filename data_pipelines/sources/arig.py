"""Audio-referred image grounding: the box of the sounding object, from the masks of AVSBench's single-source part.

Crab's own `v1s_grounding_samples.json` was not published; as far as is known its content is the same: one entry per
picture with a mask, with the first and last column and row of its foreground at 224 x 224 (so the far edge is
inclusive, as in the public s4_box.json), without pictures that have no foreground. If that file exists in place of
metadata.csv, its boxes are read.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks import arig
from crab_jax.tasks.segmentation import SIZE
from data_pipelines import media
from data_pipelines.examples import Example
from data_pipelines.sources.avsbench import SPLITS, Clip, object_names, s4_clips, semantic_clips
from data_pipelines.sources.release import Found, Release, Row, each, safe_name

Box = tuple[int, int, int, int]
LIST, NOWHERE = "v1s_grounding_samples.json", 1000
_FRAME = re.compile(r"(?:^|/)v1s/([^/]+)/frames/([0-4])\.jpg$")  # after a folder of another machine


def read(release: Release, split: str, variant: str, part: str = "semantic") -> Iterator[Found]:
    """Yield Examples of task `arig`; meta: object, box, video. part: "semantic" (v1s, as Crab) or "object" (S4)."""
    if part == "semantic" and release.kind(LIST) and not release.kind("metadata.csv"):
        yield from each(release.records(LIST), lambda row: _listed(release, row, split, variant))
        return
    clips = s4_clips(release, split) if part == "object" else semantic_clips(release, split, "v1s", "labels_semantic")
    for clip, second, box in _boxes(release, clips):
        if isinstance(box, InputError):
            yield box
        elif box and isinstance(clip, Clip):
            yield _example(clip, second, box, variant)


def _example(clip: Clip, second: int, box: Box, variant: str) -> Example:
    name = " and ".join(clip.objects)
    return Example(
        id=f"{clip.uid}-{second}",
        task="arig",
        instruction=arig.instruction(variant),
        target=arig.target(name, box) if name else "",
        image=clip.frames[second],
        audio=clip.audio,
        second=second,
        windows="one_of_five" if variant == "quick" else "five",
        meta={"object": name, "box": list(box), "video": clip.uid, "row": clip.row.place},
    )


def _listed(release: Release, row: Row, split: str, variant: str) -> Iterator[Example]:
    """Yield the Example of one entry of Crab's list, if it is in `split` and has foreground (else its x1 is 1000)."""
    if row.one_of("split", SPLITS) != split:
        return
    match = _FRAME.search(row.text("frame_path"))
    if not match or not safe_name(match[1]):
        raise row.error("frame_path", f"is {row.text('frame_path')!r:.80}", "must end in v1s/<uid>/frames/<0..4>.jpg")
    corners: list[Any] = [row.values.get(field) for field in ("top_left", "bottom_right")]
    if not all(isinstance(corner, list) and len(corner) == 2 for corner in corners):
        raise row.error("top_left", f"is {corners[0]!r:.40}", "must be [x, y], as bottom_right")
    places = Row(row.base, row.place, dict(zip(("x1", "y1", "x2", "y2"), corners[0] + corners[1], strict=True)))
    if places.values["x1"] == NOWHERE:
        return
    x1, y1, x2, y2 = (places.integer(field, 0, SIZE) for field in places.values)
    if x1 > x2 or y1 > y2:
        raise row.error("bottom_right", f"is {corners[1]}, before {corners[0]}", "give the corners in order")
    folder = release.inside(f"v1s/{match[1]}", row.where, "frame_path")
    if not (objects := object_names(row.values.get("a_obj"))):
        release.note(row.where, "a_obj", f"is {row.values.get('a_obj')!r:.60}, which names no known object")
    frames = tuple(f"{folder}/frames/{k}.jpg" for k in range(5))
    clip = Clip(match[1], objects, frames, (), f"{folder}/audio.wav", row)
    yield _example(clip, int(match[2]), (x1, y1, x2, y2), variant)


def _boxes(
    release: Release, clips: Iterable[Clip | InputError]
) -> Iterator[tuple[Clip | InputError, int, Box | None | InputError]]:
    """Yield (clip, second, box) of every mask, in order; threads decode the masks."""
    tasks = [
        (clip, second) for clip in clips for second in range(1 if isinstance(clip, InputError) else len(clip.masks))
    ]

    def box_at(task: tuple[Clip | InputError, int]) -> Box | None | InputError:
        clip, second = task
        if isinstance(clip, InputError):
            return clip
        try:
            release.check(clip.masks[second], clip.row.where, "mask")
            picture = release.root / clip.frames[second]
            size = media.image_size(picture) if picture.is_file() else None
            for path in (clip.masks[second], clip.frames[second]):
                release.use(posixpath.relpath(path, release.folder or "."))
            return box_of(media.read_mask(release.root / clip.masks[second], SIZE, "binary", size))
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (clip, second), box in zip(tasks, pool.map(box_at, tasks), strict=True):
            yield clip, second, box


def box_of(mask: np.ndarray) -> Box | None:
    """Return (x1, y1, x2, y2) of the foreground of a mask [H,W], both edges inclusive; None without foreground."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])) if rows.size else None
