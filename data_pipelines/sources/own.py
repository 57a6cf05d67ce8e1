"""The users' own data: `<split>.jsonl`, one Example per line (docs/architecture.md), with paths relative to its folder.

In addition to the format of Examples, `frames` may name a folder of pictures, which are sorted by the numbers in their
names.

Instead, a list of samples like that of Crab's quick start is read, `<split>.json` or for test `samples.json`: [{"task",
"video_path" or "image_path", "audio_path", "question", "exp", "idx", "mask_path"}, ...]. Its prompts are those of the
quick start, and it has no answers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.io.structured import json_line
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import windows_for
from data_pipelines.examples import Example, from_json
from data_pipelines.media import INLINE_MASK
from data_pipelines.sources.release import Found, MissingFile, Release, Row, each

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_OTHERS = {
    ".jsonl.txt": "rename it",
    ".JSONL": "rename it",
    ".csv": "make the list with python -m data_pipelines own --csv",
}
PATHS = ("video", "image", "audio", "seg_image", "mask")
SAMPLES = "samples.json"
_SECONDS = {"avqa": 60, "arig": 5, "s4": 5, "ms3": 5}  # length of the quick start's clips; 10 for other tasks


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield the Examples as written; they contain their prompts, so `variant` has no effect."""
    if not any(release.kind(name) == "file" for name in files(split)):
        for other, fix in _OTHERS.items():
            if release.kind(split + other) == "file":
                raise InputError(str(release.base / f"{split}.jsonl"), "", f"is not there, but {split}{other} is", fix)
    name = release.annotation(*files(split))
    if name.endswith(".json"):
        yield from each(release.records(name), lambda row: _sample(release, row))
        return
    for number, line in enumerate(release.lines(name), 1):
        if line.strip():
            try:
                release.check_line(name, number, line)
                yield _example(release, line, Row(release.base, f"{name}:{number}", {}))
            except InputError as error:
                yield error


def files(split: str) -> tuple[str, ...]:
    """Return the possible files of a split; the first that exists is read."""
    return (f"{split}.jsonl", f"{split}.json", *((SAMPLES,) if split == "test" else ()))


def _example(release: Release, line: str, row: Row) -> Example:
    record = json_line(line, row.where)
    if isinstance(record, dict) and isinstance(record.get("frames"), str):
        record = {**record, "frames": pictures(release, record["frames"], row)}
    example = from_json(record, row.where)
    paths: dict[str, Any] = {
        field: release.inside(path, row.where, field)
        for field in PATHS
        if (path := getattr(example, field)) and not path.startswith(INLINE_MASK)
    }
    frames = tuple(release.inside(path, row.where, "frames") for path in example.frames)
    if not isinstance(example.meta.get("one_of", ""), str):
        raise row.error("meta", f"one_of is {example.meta['one_of']!r:.40}", "must be text, the same in all of a group")
    return dataclasses.replace(example, **paths, frames=frames, meta={**example.meta, "row": row.place})


def _sample(release: Release, row: Row) -> Iterator[Example]:
    """Yield the Example of one entry of a quick-start list: its prompt, without a target."""
    task = TASKS[row.one_of("task", tuple(TASKS))]
    paths: dict[str, Any] = {}
    for field in ("video", "image", "audio", "mask"):
        if row.values.get(f"{field}_path") is not None:
            paths[field] = release.inside(row.text(f"{field}_path"), row.where, f"{field}_path")
    asked: dict[str, Any] = {}
    for field, named in (("question", "question"), ("expression", "exp")):
        if field in task.fields:
            asked[field] = row.words(named)
    second = None
    if "image" in paths:
        stem = PurePosixPath(paths["image"]).stem
        second = row.integer("idx", 0, 9) if row.values.get("idx") is not None else int(stem) if stem.isdecimal() else 0
    if "second" in task.fields:
        asked["second"] = second or 0
    source = paths.get("video") or paths.get("image")
    if not source:
        raise row.error("video_path", "is missing, and image_path too", "give one of them")
    yield Example(
        id=row.place.rpartition(" ")[2],
        task=task.name,
        instruction=task.instruction(variant="quick", **asked),
        second=second,
        windows=windows_for(task, _SECONDS.get(task.name, 10), one_window=True),
        mask_kind=task.mask_kind if "mask" in paths else "none",
        meta={**{k: v for k, v in asked.items() if k != "second"}, "row": row.place},
        **paths,
    )


def pictures(release: Release, folder: str, row: Row) -> list[str]:
    """Return the pictures of a folder in natural order (frame2.jpg before frame10.jpg). Raises InputError."""
    release.inside(folder, row.where, "frames")
    folder = folder.rstrip("/")
    if (kind := release.kind(folder)) != "folder":
        problem = f"{folder} is a link out of the data root" if kind == "outside" else f"{folder} is no folder"
        raise (InputError if kind == "outside" else MissingFile)(
            row.where, "frames", problem, "give a folder of pictures, or a list of them"
        )
    names = [name for name in release.names(folder) if name.lower().endswith(PICTURES)]
    if not names:
        raise MissingFile(
            row.where, "frames", f"{folder} holds no pictures", f"put files that end in {', '.join(PICTURES)} there"
        )
    return [f"{folder}/{name}" for name in sorted(names, key=_natural)]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that compares numbers inside names as numbers."""
    return [
        (not part.isascii() or not part.isdigit(), int(part) if part.isascii() and part.isdigit() else 0, part)
        for part in re.split(r"([0-9]+)", name)
    ]
