"""Example: the record type between a dataset's files and a batch, and its JSONL form."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import write_whole
from crab_jax.io.structured import json_line, read_text
from crab_jax.tasks import FLAG, TASK_NAMES, TASKS
from crab_jax.tasks.task import MASK_KINDS, WINDOWS

__all__ = ["MASK_KINDS", "TASK_NAMES", "WINDOWS", "Example"]  # some names are defined elsewhere and offered here too


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one clip. Paths are relative to the data root or absolute; see docs/architecture.md."""

    id: str
    task: str
    instruction: str
    target: str = ""
    video: str | None = None
    image: str | None = None
    frames: tuple[str, ...] = ()
    audio: str | None = None
    windows: str = "ten"
    second: int | None = None
    seg_image: str | None = None
    mask: str | None = None
    mask_kind: str = "none"
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "task": (str,),
    "instruction": (str,),
    "target": (str,),
    "video": (str, type(None)),
    "image": (str, type(None)),
    "frames": (list, tuple),
    "audio": (str, type(None)),
    "windows": (str,),
    "second": (int, type(None)),
    "seg_image": (str, type(None)),
    "mask": (str, type(None)),
    "mask_kind": (str,),
    "meta": (dict,),
}


def seg_source(example: Example) -> tuple[str, str] | None:
    """Return (field, path) of the picture to segment, or of the video that holds it at `second`; None if not known."""
    for field in ("seg_image", "image"):
        if path := getattr(example, field):
            return field, path
    if example.second is None or example.second < 0:
        return None
    if example.second < len(example.frames):
        return "frames", example.frames[example.second]
    return ("video", example.video) if example.video else None


def from_json(record: Any, where: str) -> Example:
    """Validate one decoded JSON object as an Example.

    where: file and line, for errors. Raises InputError naming `where`, the field and the fix.
    """
    if not isinstance(record, dict):
        raise InputError(where, "", f"expected a JSON object, got {type(record).__name__}", "write one object per line")
    for name in ("id", "task", "instruction"):
        if name not in record:
            raise InputError(where, name, "missing field", f"add {name!r} to the record")
    for name, value in record.items():
        if name not in _TYPES:
            raise InputError(where, name, "unknown field", f"use one of {sorted(_TYPES)}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            wanted = " or ".join(t.__name__ for t in _TYPES[name])
            raise InputError(where, name, f"is {type(value).__name__} {value!r:.60}", f"must be {wanted}")
    for name, allowed in (("task", tuple(TASKS)), ("windows", WINDOWS), ("mask_kind", MASK_KINDS)):
        if name in record and record[name] not in allowed:
            own = f", or name the module of a task of your own with {FLAG}" if name == "task" else ""
            raise InputError(where, name, f"unknown value {record[name]!r}", f"use one of {', '.join(allowed)}{own}")
    if record.get("video") and record.get("frames"):
        raise InputError(where, "frames", "both 'video' and 'frames' are given", "give one clip")
    if any(not isinstance(frame, str) for frame in record.get("frames", ())):
        raise InputError(where, "frames", "holds something that is not a path", "must be a list of paths")
    return Example(**{**record, "frames": tuple(record.get("frames", ()))})


def to_json(example: Example) -> dict[str, Any]:
    """Return the JSON object of an Example, without fields that have their default values."""
    defaults = Example(id="", task="", instruction="")
    record = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in record.items()
        if k in ("id", "task", "instruction") or v != getattr(defaults, k)
    }


def read_jsonl(path: str | Path) -> list[Example]:
    """Read and validate all Examples of a JSONL file. Raises InputError, also for duplicate ids."""
    path = paths.at(path)
    if not path.is_file():
        raise InputError(str(path), "", "no such file", "check --data and the split name")
    examples, seen = [], set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        example = from_json(json_line(line, where), where)
        if example.id in seen:
            raise InputError(where, "id", f"duplicate id {example.id!r}", "ids must be unique in a file")
        seen.add(example.id)
        examples.append(example)
    return examples


def select(examples: Iterable[Example], tasks: Sequence[str] = (), limit: int | None = None) -> list[Example]:
    """Return the first `limit` Examples of each of `tasks` (of all when empty), in order. Raises InputError if none."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError("--tasks", "", f"unknown task {unknown[0]!r}", f"use some of {','.join(TASKS)}")
    taken: Counter[str] = Counter()
    chosen = []
    for example in examples:
        if (not tasks or example.task in tasks) and (limit is None or taken[example.task] < limit):
            taken[example.task] += 1
            chosen.append(example)
    if not chosen:
        raise InputError(
            "--tasks",
            "",
            f"no example of {', '.join(tasks) or 'any task'} in this split",
            "choose other tasks or another split",
        )
    return chosen


def spread(examples: Iterable[Example], count: int) -> list[Example]:
    """Return up to `count` Examples of each task, evenly spread over the list, tasks in their order."""
    chosen, listed = [], list(examples)
    for task in TASKS:
        of_task = [example for example in listed if example.task == task]
        few = len(of_task) <= count
        chosen += of_task if few else [of_task[i * len(of_task) // count] for i in range(count)]
    return chosen


def digest(examples: Iterable[Example]) -> str:
    """Return a hash of a list of Examples, without the content of their media files."""
    state = hashlib.blake2b(digest_size=16)
    for example in examples:
        state.update(json.dumps(to_json(example), sort_keys=True).encode() + b"\n")
    return state.hexdigest()


def learned(examples: Iterable[Example]) -> str:
    """Return a hash of everything in a list of Examples that batches depend on, in order.

    Ids, labels and the root that paths are relative to are left out.
    """
    state = hashlib.blake2b(digest_size=16)
    for e in examples:
        fields = (
            e.task,
            e.instruction,
            e.target,
            e.video or "",
            e.image or "",
            "\1".join(e.frames),
            e.audio or "",
            e.windows,
            str(e.second),
            e.seg_image or "",
            e.mask or "",
            e.mask_kind,
            str(e.meta.get("one_of", "")),
        )
        state.update("\0".join(fields).encode("utf-8", "surrogatepass") + b"\n")
    return state.hexdigest()


def choice(mark: str, count: int, seed: int, epoch: int) -> int:
    """Return which of the `count` Examples that share a value of `one_of` an epoch uses; equal in every process."""
    key = repr((seed, epoch, mark)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % count


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> None:
    """Write Examples, one JSON object per line."""
    write_whole(path, "".join(json.dumps(to_json(example), ensure_ascii=False) + "\n" for example in examples))
