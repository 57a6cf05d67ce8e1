"""AudioCaps (Kim et al. 2019, cdjkim/audiocaps): captions of ten-second sounds, for audio alignment.

    dataset/{train,val,test}.csv      audiocap_id,youtube_id,start_time,caption (CRLF), here or in dataset/
    data/<audiocap_id>.wav            any of a clip's ids: val and test clips have five captions each

Also read are the `train.json` and `val.json` of Crab's released code, which have these fields except youtube_id, but
which nobody publishes. Without youtube_id each caption counts as a clip, as in that code. It trains on both: split
"train+val".
"""

from __future__ import annotations

from collections.abc import Iterator

from crab_jax.io.errors import InputError
from crab_jax.tasks.avcap import SOUND_PROMPT
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `avcap` without pictures, one per clip; meta: captions (the first is the target), video.

    The windows are tenths of the clip: seconds of a ten-second clip.
    """
    clips: dict[str, list[Row]] = {}
    seen: set[int] = set()
    name = release.annotation(f"dataset/{split}.csv", f"{split}.csv", f"{split}.json")
    listed = name.endswith(".json")
    for row in release.records(name, "audiocap_id") if listed else release.table(name, COLUMNS):
        try:
            if isinstance(row, InputError):
                raise row
            row.words("caption")
            if (number := row.integer("audiocap_id", 0, 10**9)) in seen:
                raise row.error("audiocap_id", f"duplicate id {number}", "keep one of the rows")
            seen.add(number)
            clips.setdefault(_clip(row, listed), []).append(row)
        except InputError as error:
            yield error
    for clip, rows in clips.items():
        names = [f"data/{row.integer('audiocap_id', 0, 10**9)}.wav" for row in rows]
        audio = next((name for name in names if release.kind(name)), names[0])
        captions = [row.words("caption") for row in rows]
        yield Example(
            id=clip,
            task="avcap",
            instruction=SOUND_PROMPT,
            target=captions[0],
            audio=release.inside(audio, rows[0].where, "audiocap_id"),
            meta={"captions": captions, "video": _video(rows[0], listed) or clip, "row": rows[0].place},
        )


def _video(row: Row, listed: bool) -> str:
    """Return the YouTube id; "" where a list of Crab's has none."""
    return "" if listed and row.values.get("youtube_id") is None else row.name("youtube_id", "r1nicOVtvkQ")


def _clip(row: Row, listed: bool) -> str:
    """Return a name of a row's clip: its video and start."""
    if not (video := _video(row, listed)):
        return str(row.integer("audiocap_id", 0, 10**9))
    return f"{video}_{row.integer('start_time', 0, 10**6)}"
