"""The users' own data: `<split>.jsonl`, one Example a line (docs/architecture.md), paths relative to the file's folder.

Beyond what an Example holds, `frames` may name a folder: its pictures in the order of the numbers in their names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from crab_jax.errors import InputError
from data_pipelines.examples import Example, from_json, json_line
from data_pipelines.media import INLINE_MASK
from data_pipelines.sources.release import Found, MissingFile, Release, Row

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_OTHERS = {".json": "write one JSON object a line, and name the file .jsonl", ".jsonl.txt": "rename it",
           ".JSONL": "rename it", ".csv": "make the list with python -m data_pipelines own --csv"}
PATHS = ("video", "image", "audio", "seg_image", "mask")


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """The Examples as they are written; they hold their prompts, so `variant` changes nothing."""
    name = f"{split}.jsonl"
    if release.kind(name) != "file":
        for other, fix in _OTHERS.items():
            if release.kind(split + other) == "file":
                raise InputError(str(release.base / name), "", f"is not there, but {split}{other} is", fix)
    name = release.annotation(name)
    for number, line in enumerate(release.lines(name), 1):
        if line.strip():
            try:
                yield _example(release, line, Row(release.base, f"{name}:{number}", {}))
            except InputError as error:
                yield error


def _example(release: Release, line: str, row: Row) -> Example:
    record = json_line(line, row.where)
    if isinstance(record, dict) and isinstance(record.get("frames"), str):
        record = {**record, "frames": pictures(release, record["frames"], row)}
    example = from_json(record, row.where)
    paths: dict[str, Any] = {
        field: release.inside(path, row.where, field)
        for field in PATHS if (path := getattr(example, field)) and not path.startswith(INLINE_MASK)}
    frames = tuple(release.inside(path, row.where, "frames") for path in example.frames)
    return dataclasses.replace(example, **paths, frames=frames, meta={**example.meta, "row": row.place})


def pictures(release: Release, folder: str, row: Row) -> list[str]:
    """The pictures of a folder; frame2.jpg comes before frame10.jpg."""
    release.inside(folder, row.where, "frames")
    folder = folder.rstrip("/")
    if (kind := release.kind(folder)) != "folder":
        problem = f"{folder} is a link out of the data root" if kind == "outside" else f"{folder} is no folder"
        raise (InputError if kind == "outside" else MissingFile)(
            row.where, "frames", problem, "give a folder of pictures, or a list of them")
    found = [name for name in release.names(folder) if name.lower().endswith(PICTURES)]
    if not found:
        raise MissingFile(row.where, "frames", f"{folder} holds no pictures",
                          f"put files that end in {', '.join(PICTURES)} there")
    return [f"{folder}/{name}" for name in sorted(found, key=_natural)]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key by which numbers inside of names are compared as numbers."""
    return [(not part.isascii() or not part.isdigit(), int(part) if part.isascii() and part.isdigit() else 0, part)
            for part in re.split(r"([0-9]+)", name)]
