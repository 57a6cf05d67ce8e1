"""Audio-referred image grounding: the box of the sounding object, from the masks of AVSBench's single-source part.

Crab's own `v1s_grounding_samples.json` was not published; as far as it is known it holds the same: one entry per
picture with a mask, the first and the last column and row of its foreground at 224 x 224 (so the far edge is inclusive,
as in the public s4_box.json), and pictures without foreground are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from crab_jax.errors import InputError
from crab_jax.tasks import arig
from data_pipelines import media
from data_pipelines.examples import Example
from data_pipelines.sources.avsbench import Clip, s4_clips, semantic_clips
from data_pipelines.sources.release import Found, Release

Box = tuple[int, int, int, int]


def read(release: Release, split: str, variant: str, part: str = "semantic") -> Iterator[Found]:
    """Examples of task `arig`; meta: object, box, video. part: "semantic" (v1s, as Crab) or "object" (S4)."""
    clips = s4_clips(release, split) if part == "object" else semantic_clips(release, split, "v1s", "labels_semantic")
    for clip, second, found in _boxes(release, clips):
        if isinstance(found, InputError):
            yield found
        elif found and isinstance(clip, Clip):
            name = " and ".join(clip.objects)
            yield Example(
                id=f"{clip.uid}-{second}", task="arig", instruction=arig.instruction(variant),
                target=arig.target(name, found), image=clip.frames[second], audio=clip.audio, second=second,
                windows="one_of_five" if variant == "quick" else "five",
                meta={"object": name, "box": list(found), "video": clip.uid, "row": clip.row.place})


def _boxes(release: Release, clips: Iterable[Clip | InputError]
           ) -> Iterator[tuple[Clip | InputError, int, Box | None | InputError]]:
    """(clip, second, its box) of every mask, in order. The masks are decoded by threads."""
    tasks = [(clip, second) for clip in clips
             for second in range(1 if isinstance(clip, InputError) else len(clip.masks))]

    def box_at(task: tuple[Clip | InputError, int]) -> Box | None | InputError:
        clip, second = task
        if isinstance(clip, InputError):
            return clip
        try:
            release.check(clip.masks[second], clip.row.where, "mask")
            return box_of(media.read_mask(release.root / clip.masks[second], arig.SIZE, "binary"))
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (clip, second), found in zip(tasks, pool.map(box_at, tasks), strict=True):
            yield clip, second, found


def box_of(mask: np.ndarray) -> Box | None:
    """(x1, y1, x2, y2) of the foreground of a mask [H,W], both edges inclusive; None without foreground."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])) if rows.size else None
