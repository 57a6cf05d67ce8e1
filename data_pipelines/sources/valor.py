"""VALOR-32K (Chen et al. 2023, TXH-mercury/VALOR): one caption of what is seen and heard in each clip of AudioSet.

    desc_train.json  desc_val.json  desc_test.json       [{"video_id": "x-2Abohj8VY_30.000_40.000", "desc": "..."}, ...]
    video_data/<video_id>.mp4
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from crab_jax.tasks import avcap
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each

FOLDERS = ("video_data", "videos")
_VIDEO = re.compile(r"[A-Za-z0-9_-]{11}_[0-9]+\.[0-9]{3}_[0-9]+\.[0-9]{3}")


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Examples of task `avcap`; meta: captions, video. The released code evaluates on val."""

    def examples(row: Row) -> Iterator[Example]:
        video = row.matching("video_id", _VIDEO, "x-2Abohj8VY_30.000_40.000")[0]
        caption = row.text("desc").strip()
        if not caption:
            raise row.error("desc", "is empty", "restore the caption from the release")
        yield Example(
            id=video, task="avcap", instruction=avcap.instruction(variant), target=avcap.target(caption),
            video=release.inside(release.pick(f"{video}.mp4", *FOLDERS), row.where, "video_id"),
            meta={"captions": [caption], "video": video, "row": row.place})

    return each(release.records(release.annotation(f"desc_{split}.json")), examples)
