"""AudioCaps (Kim et al. 2019, cdjkim/audiocaps): captions of ten-second sounds, for audio alignment.

    dataset/{train,val,test}.csv      audiocap_id,youtube_id,start_time,caption (CRLF), here or in dataset/
    data/<audiocap_id>.wav            any of a clip's ids will do: val and test clips have five captions each

The released code reads `train.json` and `val.json` with the same fields, which no project publishes; they are read too.
"""

from __future__ import annotations

from collections.abc import Iterator

from crab_jax.errors import InputError
from crab_jax.tasks.placeholders import AUDIO
from data_pipelines.examples import Example
from data_pipelines.sources.release import YOUTUBE_ID, Found, Release, Row

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
PROMPT = f"{AUDIO}Please describe this audio."  # dataset/pretrain_dataset.py


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Examples of task `avcap` without pictures, one per clip; meta: captions (the first is the target), video.

    The windows are tenths of the clip: seconds of one of ten seconds.
    """
    clips: dict[tuple[str, int], list[Row]] = {}
    name = release.annotation(f"dataset/{split}.csv", f"{split}.csv", f"{split}.json")
    for row in release.records(name) if name.endswith(".json") else release.table(name, COLUMNS):
        try:
            if isinstance(row, InputError):
                raise row
            if not row.text("caption").strip():
                raise row.error("caption", "is empty", "restore the row from the release")
            row.integer("audiocap_id", 0, 10**9)
            clip = (row.matching("youtube_id", YOUTUBE_ID, "r1nicOVtvkQ")[0], row.integer("start_time", 0, 10**6))
            clips.setdefault(clip, []).append(row)
        except InputError as error:
            yield error
    for (video, start), rows in clips.items():
        names = [f"data/{row.integer('audiocap_id', 0, 10**9)}.wav" for row in rows]
        audio = next((name for name in names if release.kind(name)), names[0])
        captions = [row.text("caption").strip() for row in rows]
        yield Example(
            id=f"{video}_{start}", task="avcap", instruction=PROMPT, target=captions[0],
            audio=release.inside(audio, rows[0].where, "audiocap_id"),
            meta={"captions": captions, "video": video, "row": rows[0].place})
