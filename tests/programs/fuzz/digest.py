"""`python -m tests.programs.fuzz.digest KIND PATH` prints a hash of all that our readers give of a file or folder.

Two files with the same hash are read alike. It refuses as a command does: in one line, with exit code 2.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from crab_jax.checkpoints import stored
from crab_jax.convert import torch_file
from crab_jax.io.errors import run_verb
from data_pipelines import datasets, media, shards
from data_pipelines.av_uie import released


def _film(path: str) -> Any:
    return media.read_video(path, 10, 32), media.hear(path).placed()


def _prepared(path: str) -> Any:
    root = shards.Shards(path)
    found: list[Any] = []
    for split in ("train", "test"):
        for example in datasets.read_jsonl(path, split):
            found.append(repr(dataclasses.asdict(example)))
            for medium in shards.media_of(example, root.decoding):
                record = root._record(medium, medium.kind)
                found += [value if isinstance(value, int) else bytes(value) for value in record.values()]
    return found


def _params(path: str) -> Any:
    return traverse_util.flatten_dict(stored.load_params(path), sep="/")


READ: dict[str, Callable[[str], Any]] = {
    "film": _film,
    "sound": media.read_audio,
    "picture": media.read_picture,
    "binary": lambda path: media.read_mask(path, None, "binary"),
    "semantic": lambda path: media.read_mask(path, None, "semantic"),
    "prepared": _prepared,
    "params": _params,
    "labels": lambda path: released.read(path).texts,
    "torch": torch_file.read,
}


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value):
            digest.update(repr(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for inner in value:
            _add(digest, inner)
    elif isinstance(value, str | bytes | int):
        digest.update(repr(value).encode())
    else:
        array = np.asarray(value)
        digest.update(json.dumps([str(array.dtype), array.shape]).encode() + np.ascontiguousarray(array).tobytes())


def main() -> None:
    """Print the hash."""
    kind, path = sys.argv[1:]
    digest = hashlib.sha256()
    shards._opened.cache_clear()
    _add(digest, READ[kind](str(Path(path))))
    print(digest.hexdigest())


if __name__ == "__main__":
    run_verb(main)
