"""Rows of a table as Examples, with the prompt, target, windows and label of their tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.rows import NOTHING, columns_of, made_of
from crab_jax.tasks.task import Task, windows_for
from crab_jax.tasks.times import SECONDS
from data_pipelines import media
from data_pipelines.examples import Example
from data_pipelines.media import EMPTY_MASK, INLINE_MASK
from data_pipelines.own.files import Media, facts
from data_pipelines.own.table import COMMON, Row, columns
from data_pipelines.sources.own import pictures
from data_pipelines.sources.release import Release
from data_pipelines.sources.release import Row as Line


@dataclasses.dataclass(frozen=True)
class Asked(Row):
    """A row with its task and its media, which `Task.from_row` reads.

    sources: paths of "video", "frames", "image" and "audio", as far as the row has them. seconds: length of its sound.
    """

    task: Task
    files: Media
    sources: Mapping[str, str]
    seconds: float

    @property
    def media(self) -> frozenset[str]:
        """The kinds of media that the row has, of "video", "frames", "image" and "audio"."""
        return frozenset(self.sources)

    def picture_size(self) -> tuple[int, int]:
        """Return the width and height of the row's picture in pixels. Raises InputError."""
        picture = self.files.root / self.sources["image"]
        try:
            return media.image_size(picture)
        except InputError as error:
            raise self.error("image", f"{picture}: {error.problem}", error.fix) from None

    def moment(self, empty: bool = False) -> tuple[int, dict[str, Any]]:
        """Return (second, fields of the Example) of a question about the pixels of one picture.

        empty: whether an empty column `mask` means that the mask is empty. Raises InputError.
        """
        second, fields = self._place()
        if empty and self.given("mask") is None:
            return second, fields | {"mask": EMPTY_MASK}
        given = self.text("mask", "give the file of the mask, or `nothing` where nothing is to be seen")
        if given.lower() in (*NOTHING, EMPTY_MASK):
            return second, fields | {"mask": EMPTY_MASK}
        mask = given if given.startswith(INLINE_MASK) else self.files.find(self, "mask", given)
        return second, fields | {"mask": mask}

    def _place(self) -> tuple[int, dict[str, Any]]:
        """Return the second asked about, and the fields of the Example for its windows and its picture."""
        one_picture = not self.sources.keys() & {"video", "frames"}
        if (second := self.second()) is None:
            raise self.error(
                "second",
                f"is empty, and {self.task.name} is asked about one second",
                "give the number of the second that the mask is of, counted from 0",
            )
        windows = windows_for(self.task, self.seconds, one_picture)
        if "frames" in self.sources:
            count = len(self.frames())
            if count not in (5, SECONDS):
                raise self.error("frames", f"holds {count} pictures", f"give 5 or {SECONDS}, one a second")
            windows = "five" if count == 5 and "five" in self.task.windows else "ten"
        parts = 5 if windows in ("five", "one_of_five") else SECONDS
        if second >= parts:
            raise self.error(
                "second",
                f"is {second}, but a clip of {self.seconds:.1f} s is asked about in {parts} parts",
                f"count from 0 to {parts - 1}",
            )
        fields: dict[str, Any] = {"second": second, "windows": windows}
        if not one_picture and "image" in self.sources:
            return second, fields | {"seg_image": self.sources["image"], "image": None}
        if "video" in self.sources and not 0.8 * parts <= self.seconds <= 1.2 * parts:
            raise self.error(
                "image",
                f"is empty, and it is not certain which picture of a clip of {self.seconds:.1f} s second {second} "
                "means",
                f"give the picture that the mask was drawn on, or a clip of {parts} seconds",
            )
        if (
            "video" in self.sources and parts != SECONDS
        ):  # the model gets ten frames of a clip, none of them at this second
            fields |= {"seg_image": self.files.moment(self.sources["video"], second, parts)}
        return second, fields

    def frames(self) -> tuple[str, ...]:
        """Return the paths of the pictures of the row's clip, in order."""
        line = Line(self.files.root, self.where, {})
        return tuple(pictures(Release(self.files.root), self.sources["frames"], line))


def example_of(row: Row, files: Media) -> Example:
    """Return the Example of a row, with the prompt, target, windows and label of its task. Raises InputError."""
    asked = _asked(row, files)
    made, task, sources = made_of(asked.task, asked), asked.task, asked.sources
    reasoning = row.text("reasoning") if row.given("reasoning") else ""
    clip = sources.get("video") or sources.get("frames") or sources.get("image") or sources["audio"]
    visual: dict[str, Any] = {field: sources[field] for field in ("video", "image", "audio") if field in sources}
    if "frames" in sources:
        visual["frames"] = asked.frames()
    given = row.given("id")
    return Example(
        **{
            "id": f"{task.name}-{row.number}" if given is None else str(given),
            "task": task.name,
            "instruction": made.instruction,
            "target": task.target(**made.arguments, reasoning=reasoning),
            "mask_kind": task.mask_kind,
            **visual,
            "meta": {**made.meta, "video": clip},
            **made.fields,
        }
    )


def _asked(row: Row, files: Media) -> Asked:
    """Return a row with its task and its media, after checking that they fit together. Raises InputError."""
    given = str(row.given("task") or "").lower()
    name = given if given in TASKS else given.replace("_", "-")
    if name not in TASKS:
        raise row.error("task", f"unknown task {row.given('task')!r}", f"use one of {', '.join(TASKS)}")
    row, task = dataclasses.replace(row, values={**row.values, "task": name}), TASKS[name]
    taken = columns_of(task)
    for column in columns():
        if column not in (*COMMON, *taken) and row.given(column) is not None:
            raise row.error(
                column,
                f"is {row.given(column)!r:.60}, but {name} has no {column}",
                f"leave it empty; {name} takes {', '.join(taken)}",
            )
    sources = files.sources(row)
    if not sources.keys() & {"video", "frames", "image"} and not (task.sound_alone and "audio" in sources):
        raise row.error("media", "is empty", "give a video, or a picture and its sound")
    seconds = _seconds(row, files, sources)
    return Asked(row.where, row.number, row.values, task, files, sources, seconds)


def _seconds(row: Row, files: Media, sources: Mapping[str, str]) -> float:
    """Return the length of a row's sound in seconds. Raises InputError for a row without sound."""
    field = "audio" if "audio" in sources else "video"
    if field not in sources:
        raise row.error("audio", "is empty, and pictures have no sound", "give the file of their sound")
    try:
        seconds, has_sound = facts(str(files.root / sources[field]), field)
    except InputError as error:
        raise row.error(field, f"{sources[field]}: {error.problem}", error.fix) from None
    if not has_sound:
        raise row.error("audio", f"{sources[field]} has no sound", "give the file of its sound in the column audio")
    return seconds
