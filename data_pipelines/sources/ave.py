"""AVE (Tian et al. 2018, YapengTian/AVE-ECCV18): one audible and visible event in each ten-second clip.

    Annotations.txt  trainSet.txt  valSet.txt  testSet.txt  AVE/<VideoID>.mp4

Split files hold `Category&VideoID&Quality&StartTime&EndTime`, with or without that header. The end second is exclusive.
A video with two events has two rows, sometimes in different splits; a row, not a video, is a sample. Instead of these
files Crab's lists are read, `[valid_]<split>_samples.json` of {event, vid, start_time, end_time}; its
audio_data/<vid>.mp3 is used if it exists.
"""

from __future__ import annotations

from collections.abc import Iterator

from crab_jax.tasks import ave
from crab_jax.tasks.ave import CATEGORIES
from crab_jax.tasks.times import SECONDS
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each, sample_lists

COLUMNS = ("Category", "VideoID", "Quality", "StartTime", "EndTime")
SAMPLE = ("event", "vid", "start_time", "end_time")  # the corresponding fields of Crab's lists
FILES = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `ave`; meta: event, start, end, video."""
    name = release.annotation(FILES[split], *sample_lists(split, "ave_data"))
    listed = name.endswith(".json")
    category, clip, starts, ends = SAMPLE if listed else (*COLUMNS[:2], *COLUMNS[3:])

    def examples(row: Row) -> Iterator[Example]:
        event, video = row.one_of(category, CATEGORIES), row.name(clip, "RUhOCu3LNXM")
        start, end = row.integer(starts, 0, SECONDS), row.integer(ends, 0, SECONDS)
        if row.unended and end == 1:  # no released event lasts one second
            raise row.error(ends, "is 1, and the file ends there without a line end: was it 10?", "copy the file again")
        if start >= end and (start, end) != (0, 0):  # one released row is 0 to 0: background only
            raise row.error(ends, f"the event lasts from {start} to {end}", "the end must come after the start")
        yield Example(
            id=f"{video}-{CATEGORIES.index(event)}",
            task="ave",
            instruction=ave.instruction(variant),
            target=ave.target(event, start, end),
            video=release.inside(f"AVE/{video}.mp4", row.where, clip),
            audio=release.sound(video),
            meta={"event": event, "start": start, "end": end, "video": video, "row": row.place},
        )

    return each(
        release.records(name) if listed else release.table(name, COLUMNS, "&", quoted=False, header=None), examples
    )
