"""VALOR-32K (Chen et al. 2023, TXH-mercury/VALOR): one audio-visual caption for each clip of AudioSet.

    desc_train.json  desc_val.json  desc_test.json       [{"video_id": "x-2Abohj8VY_30.000_40.000", "desc": "..."}, ...]
    video_data/<video_id>.mp4

Instead of these files Crab's lists are read, `<split>_samples.json` with the same fields, and its
audio_data/<video_id>.mp3.
"""

from __future__ import annotations

from collections.abc import Iterator

from crab_jax.tasks import avcap
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each, sample_lists

FOLDERS = ("video_data", "videos")


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `avcap`; meta: captions, video. The released code evaluates on val."""

    def examples(row: Row) -> Iterator[Example]:
        video, caption = row.name("video_id", "x-2Abohj8VY_30.000_40.000"), row.words("desc")
        yield Example(
            id=video,
            task="avcap",
            instruction=avcap.instruction(variant),
            target=avcap.target(caption),
            video=release.inside(release.pick(f"{video}.mp4", *FOLDERS), row.where, "video_id"),
            audio=release.sound(video),
            meta={"captions": [caption], "video": video, "row": row.place},
        )

    name = release.annotation(f"desc_{split}.json", *sample_lists(split, "valor"))
    return each(release.records(name, "video_id"), examples)
