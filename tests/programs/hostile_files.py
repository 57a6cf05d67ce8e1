"""Every kind of structured file, sound, and what may be found in its place: hostile contents, hostile fields.

`python -m tests.programs.hostile_files` puts all of it before the readers and prints how many were tried and held, per
kind.
One holds when it is refused with an InputError of one line that names the file, within ten seconds; where a file may
also be read (a field that nobody needs was changed), reading it without any other exception holds, too.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gzip
import json
import os
import pickle
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax import compare
from crab_jax.checkpoints.run_steps import RunCheckpoints
from crab_jax.convert import torch_file
from crab_jax.convert.encoders import clip_config
from crab_jax.convert.llama import llama_config
from crab_jax.evaluation import results
from crab_jax.evaluation.predictions import read_all, read_rows
from crab_jax.io import packaged, stored_tensors, structured
from crab_jax.io.errors import InputError
from crab_jax.questions import read_samples
from crab_jax.runs import run_folder
from data_pipelines import parts, prepare, shards
from data_pipelines.av_uie import annotate, released
from data_pipelines.datasets import records
from data_pipelines.examples import read_jsonl
from data_pipelines.sources import scene_graph, scenes
from data_pipelines.tokens import Tokenizer

REPO = Path(__file__).parents[2]
SECONDS = 10


class Kind(NamedTuple):
    """One kind of file. sound: a value that is read; read: what reads it, from the file; lines: it is JSONL.
    lenient: hostile contents (by name) that this kind reads for a reason."""

    name: str
    sound: Any
    read: Callable[[Path], Any]
    lines: bool = False
    lenient: tuple[str, ...] = ()


def _tokenizer_config(path: Path) -> Any:
    if not (path.parent / "tokenizer.json").exists():
        (path.parent / "tokenizer.json").write_bytes((packaged.located(packaged.TOKENIZER)).read_bytes())
    return Tokenizer.load(path.parent)


def _prepared(path: Path) -> Any:
    for shard in (1, 2):
        (path.parent / "frames").mkdir(exist_ok=True)
        (path.parent / f"frames/{shard}").write_bytes(b"x" * shard)
    (path.parent / shards.INDEX).write_bytes(b"")
    return shards.Shards(path.parent)


def _prepared_list(path: Path) -> Any:
    root = path.parents[1]
    (root / shards.MANIFEST).write_text(json.dumps({**PREPARED, "shards": []}))
    (root / shards.INDEX).write_bytes(b"")
    return _all(shards.Shards(root).records("ave", "train", "train"))


def _all(found: Iterator[Any]) -> list[Any]:
    """Rows of annotations; the first that is wrong is raised."""
    rows = list(found)
    for row in rows:
        if isinstance(row, InputError):
            raise row
    return rows


def _plan(path: Path) -> Any:
    settings = prepare.Settings("/r", shards.Decoding(64, 10, False), ("train",), 1000)
    return prepare.claim(path.parent, settings, [])


def _part(path: Path) -> Any:
    return parts.agreed(path.parents[1], "0" * 32, {"compress": False})


def _journal(path: Path) -> Any:
    journal = annotate.Journal(path)
    journal.close()
    return journal.answers


def _index(path: Path) -> Any:
    import numpy as np
    import safetensors.numpy

    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, path.parent / "a.safetensors")
    return torch_file.read_model_dir(path.parent)


def _annotations(name: str, path: Path) -> Any:
    root = path.parents[2]
    (path.parents[1] / "videos").mkdir(exist_ok=True)
    (path.parents[1] / "videos/v.mp4").touch()
    return _all(records(root, name, "train"))


def _one(path: Path) -> Any:
    return read_rows(path), read_all(path.parent)


_EXAMPLE = {
    "id": "a",
    "task": "avqa",
    "instruction": "<video>?",
    "target": "x",
    "video": "v.mp4",
    "meta": {"answer": "x", "type": ["Audio"]},
}
_DECODING = {"image_size": 64, "video_frames": 10, "pad_short_audio": False, "clock": "shown"}
PREPARED = {
    "format": shards.FORMAT,
    "root": "/r",
    "decoding": _DECODING,
    "variants": ["train"],
    "records": 0,
    "datasets": {"ave": {"train": 1}},
    "lists": {},
    "shards": [{"file": f"frames/{n}", "records": n, "bytes": n, "sha256": "0" * 64} for n in (1, 2)],
}
_TINY = json.loads((packaged.located(packaged.TOKENIZER)).read_bytes())
_SCENE = {
    "split": "train",
    "index": 0,
    "seed": 1,
    "things": [
        {
            "kind": next(iter(scene_graph.KINDS)),
            "slot": "left",
            "x": 0.5,
            "y": 0.5,
            "size": 0.3,
            "visible": [0, 9],
            "sounding": None,
            "loudness": 0.0,
            "pitch": 0.1,
            "phase": 0.2,
            "boxes": [[1, 2, 3, 4], *[None] * 9],
        }
    ],
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
_CLIP = {
    "vision_config": {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 64,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "quick_gelu",
    }
}
_ANSWER = {
    "id": "a",
    "request": "0" * 64,
    "model": "m",
    "text": "x",
    "tokens_in": 1,
    "tokens_out": 2,
    "estimated": False,
}
_SCORES = {"accuracy": 0.5, "n": 4, "n_unparsed": 1, "n_no_mask": 0, "intervals": {"accuracy": [0.1, 0.9]}}
_QUESTION = {
    "video_id": "v",
    "question_id": 1,
    "type": '["Audio", "Counting"]',
    "question_content": "How many?",
    "templ_values": "[]",
    "anser": "two",
}
KINDS = (
    Kind(
        "config.json",
        json.loads((packaged.located(packaged.WARM_START) / "config.json").read_bytes()),
        lambda path: run_folder.load_config(path.parent),
    ),
    Kind("tokenizer.json", _TINY, Tokenizer.load),
    Kind(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizer", "legacy": None},
        _tokenizer_config,
        lenient=("an empty object",),
    ),
    Kind("llama/config.json", _LLAMA, lambda path: llama_config(structured.read_json(path), str(path))),
    Kind(
        "clip/config.json",
        _CLIP,
        lambda path: clip_config(structured.read_json(path), (14, 22, 23), "float32", str(path)),
    ),
    Kind("model.safetensors.index.json", {"weight_map": {"w": "a.safetensors"}}, _index),
    Kind(
        "checkpoints/manifest.json",
        {"format": 1, "frozen_hash": "0" * 64, "packages": {}},
        lambda path: RunCheckpoints(path.parent).manifest,
        lenient=("an empty object",),
    ),
    Kind("prepared.json", PREPARED, _prepared),
    Kind(
        "plan.json",
        {
            "root": "/r",
            **_DECODING,
            "variants": ["train"],
            "shard_bytes": 1000,
            "compress": False,
            "lists": [["ave", "train"]],
        },
        _plan,
    ),
    Kind(
        "parts/0-of-1.json",
        {"part": 0, "of": 1, "plan": "0" * 32, "root": "/r", "settings": {"compress": False}, "versions": {"av": "1"}},
        _part,
    ),
    Kind(
        "examples/ave-train-train.jsonl",
        [
            _EXAMPLE,
            {"error": {"where": "x:1", "field": "f", "problem": "p", "fix": "x", "missing": False}, "whole": False},
        ][:1],
        _prepared_list,
        lines=True,
    ),
    Kind("train.jsonl", [_EXAMPLE, {**_EXAMPLE, "id": "b"}], read_jsonl, lines=True),
    Kind(
        "predictions.jsonl",
        [{"id": "a", "task": "avqa", "text": "x", "parsed": None, "mask": None, "label": {}}],
        _one,
        lines=True,
        lenient=("half", "an empty object", "zeros"),
    ),
    Kind(
        "evaluation.json",
        {"data": "d", "split": "test", "identity": {}},
        lambda path: structured.read_json(path, compare.EVALUATION),
    ),
    Kind("results.json", {"tasks": {"avqa": _SCORES}, "baselines": {"empty": {"avqa": _SCORES}}}, results.read_results),
    Kind(
        "metrics.jsonl",
        [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}],
        lambda path: list(structured.read_lines(path, results.METRICS, constants=True)),
        lines=True,
        lenient=("NaN", "Infinity", "1e400", "an empty object"),
    ),
    Kind("samples.json", [{"task": "ave", "video_path": "v.mp4", "second": 1}], read_samples, lenient=("a list",)),
    Kind("scene.json", _SCENE, scene_graph.load),
    Kind(
        "scenes.json",
        {"format": 1, "seed": 0, "counts": {"train": 0}, "complete": True},
        lambda path: scenes.load_split(path.parent, "train"),
    ),
    Kind(
        "answers.journal",
        [_ANSWER, {"id": "b", "request": "1", "lost": "timed out"}],
        _journal,
        lines=True,
        lenient=("half", "empty", "blank", "zeros"),
    ),
    Kind(
        "music_avqa/json_update/avqa-train.json",
        [_QUESTION],
        functools.partial(_annotations, "avqa"),
        lenient=("NaN", "Infinity", "1e400"),
    ),
)

_DEEP = 100_000
# name -> what is in the file instead, made from a sound text.
CONTENTS: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "blank": lambda text: b" \n \n",
    "zeros": lambda text: bytes(4096),
    "null": lambda text: b"null",
    "a list": lambda text: b"[1]",
    "a number": lambda text: b"5",
    "a text": lambda text: b'"text"',
    "true": lambda text: b"true",
    "an empty object": lambda text: b"{}",
    "half": lambda text: text[: len(text) // 2].encode(),
    "garbage behind": lambda text: (text + "}{").encode(),
    "two values": lambda text: (text.strip() + text.strip()).encode(),
    "lists in lists": lambda text: b"[" * _DEEP,
    "closed lists": lambda text: b"[" * _DEEP + b"]" * _DEEP,
    "objects in objects": lambda text: b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "lists as deep as Python": lambda text: b"[" * 900 + b"]" * 900,
    "not UTF-8": lambda text: text.replace('"', '"\xff', 1).encode("latin-1", "replace"),
    "latin-1": lambda text: text.replace('{"', '{"\xe9": 1, "', 1).encode("latin-1", "replace"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-16 big": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "a key twice": lambda text: text.replace('{"', '{"twice": 1, "twice": 2, "', 1).encode(),
    "NaN": lambda text: _with(text, "NaN"),
    "Infinity": lambda text: _with(text, "-Infinity"),
    "1e400": lambda text: _with(text, "1e400"),
    "a number of 10^5 digits": lambda text: _with(text, "9" * 100_000),
    "a number of 500 digits": lambda text: _with(text, "-" + "9" * 500),
    "half a pair": lambda text: _with(text, '"\\ud83d"'),
    "single quotes": lambda text: text.replace('"', "'").encode(),
    "a comment": lambda text: b"// settings\n" + text.encode(),
    "a list 1000 deep in a field": lambda text: _with(text, "[" * 1000 + "]" * 1000),
    "a list 70 deep in a field": lambda text: _with(text, "[" * 70 + "]" * 70),
    "a control character": lambda text: text.replace('"', '"\x01', 1).encode(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "a pickle": lambda text: pickle.dumps({"a": 1}),
    "a PNG": lambda text: b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a zip": lambda text: b"PK\x03\x04" + bytes(64),
    "a page": lambda text: b"<!doctype html><html>",
    "a Git LFS pointer": lambda text: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"
    ),
}


def _with(text: str, value: str) -> bytes:
    return text.replace('{"', f'{{"zz": {value}, "', 1).encode()


# What there is instead of a file.
def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)


PLACES: dict[str, Callable[[Path], None]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": _pipe,
    "a sparse file of 3 GB": _sparse,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("/nonexistent/x"),
    "a link to itself": lambda path: path.symlink_to(path),
}

# What a field may hold instead.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**64,
    -(10**300),
    0.5,
    1e308,
    "",
    "x" * 10_000,
    "a\0b",
    "../../etc",
    [],
    {},
    [[]],
    [None],
    {"a": {"b": 1}},
    [1, 2, 3, 4, 5],
    "9" * 40,
)


def text_of(kind: Kind, value: Any = None) -> str:
    """A file of a kind, as text."""
    value = kind.sound if value is None else value
    return "".join(json.dumps(line) + "\n" for line in value) if kind.lines else json.dumps(value)


def places(value: Any, at: tuple[Any, ...] = (), most: int = 3) -> Iterator[tuple[Any, ...]]:
    """Where the fields of a value are: the first `most` of each list, and of an object of very many."""
    if at:
        yield at
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in inside[: most if len(inside) > 40 or isinstance(value, list) else 40]:
        yield from places(inner, (*at, key), most)


def changed(value: Any, at: tuple[Any, ...], new: Any = None, remove: bool = False) -> Any:
    """`value` with another value at one place, or without it."""
    value = copy.deepcopy(value) if len(str(value)) < 100_000 else json.loads(json.dumps(value))
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


def file_of(kind: Kind, folder: Path) -> Path:
    """The path of a new file of a kind, in a folder of its own."""
    path = Path(tempfile.mkdtemp(dir=folder)) / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def verdict(read: Callable[[Path], Any], path: Path, may_be_read: bool = False) -> str:
    """ "" when what lies at the path is refused as it should be, otherwise what happened instead."""
    start = time.monotonic()
    try:
        read(path)
        said = "" if may_be_read else "was read"
    except InputError as error:
        said = "" if "\n" not in str(error) else f"says {str(error)!r:.200}"
    except BaseException as error:
        said = f"{type(error).__name__}: {error!r:.150}"
    return said or ("" if time.monotonic() - start < SECONDS else f"took {time.monotonic() - start:.0f} s")


class Tally:
    """How many were tried and held, per kind."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.failed: dict[str, list[str]] = {}

    def add(self, kind: str, what: str, said: str) -> None:
        self.tried[kind] = self.tried.get(kind, 0) + 1
        if said:
            self.failed.setdefault(kind, []).append(f"{kind}, {what}: {said}")

    def __str__(self) -> str:
        rows = [f"| {kind} | {n} | {n - len(self.failed.get(kind, ()))} |" for kind, n in self.tried.items()]
        total = sum(self.tried.values())
        held = total - sum(map(len, self.failed.values()))
        return "\n".join(["| kind | tried | held |", "|---|---|---|", *rows, f"| all | {total} | {held} |"])


def try_contents(kind: Kind, folder: Path, tally: Tally) -> None:
    """Each of CONTENTS and PLACES as a file of this kind."""
    for name, make in CONTENTS.items():
        path = file_of(kind, folder)
        content = make(text_of(kind))
        path.write_bytes(content + b"\n" if kind.lines and name not in ("zeros", "half") else content)
        # A list of no lines is empty, which is for the verb to say; so is one that is cut off between two lines.
        lenient = name in kind.lenient or kind.lines and name in ("empty", "blank", "half")
        tally.add(kind.name, name, verdict(kind.read, path, lenient))
    try_places(kind, folder, tally)


def try_places(kind: Kind, folder: Path, tally: Tally) -> None:
    """What stands where a file should, and is none."""
    for name, place in PLACES.items():
        path = file_of(kind, folder)
        place(path)
        tally.add(kind.name, name, verdict(kind.read, path))
        if path.is_file() and not path.is_symlink():
            path.unlink()


def try_fields(kind: Kind, folder: Path, tally: Tally, most: int = 10**9) -> None:
    """Each field of a sound file with each of VALUES, and without it."""
    path, tried = file_of(kind, folder), 0
    for at in list(places(kind.sound)):
        for new in (*VALUES, ...):
            tried += 1
            if tried > most:
                return
            value = changed(kind.sound, at, new, remove=new is ...)
            path.write_text(text_of(kind, value))
            tally.add(kind.name, f"{at} = {new!r:.30}", verdict(kind.read, path, may_be_read=True))


# Weights: the header, and what it says of the data.


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `length`: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(first: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [first, end]}


_TWO = {"a": _tensor(), "b": _tensor(8, 16)}
WEIGHTS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "eight bytes": lambda: bytes(8),
    "a header of exabytes": lambda: safetensors(_TWO, bytes(16), 2**63),
    "a header of 2^64 - 1 bytes": lambda: safetensors(_TWO, bytes(16), 2**64 - 1),
    "a header longer than the file": lambda: safetensors(_TWO, bytes(16), 1000),
    "a header cut off": lambda: safetensors(_TWO, bytes(16), 20),
    "no JSON": lambda: safetensors(b"{'a': 1}"),
    "not UTF-8": lambda: safetensors(b'{"\xff": 1}'),
    "a list": lambda: safetensors([1]),
    "a number": lambda: safetensors(5),
    "null": lambda: safetensors(None),
    "deep lists": lambda: safetensors(b"[" * _DEEP),
    "a deep tensor": lambda: safetensors(b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    "a tensor twice": lambda: safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(_tensor()).encode(),) * 2), bytes(8)),
    "10^6 tensors": lambda: safetensors(b"{" + b",".join(b'"%d":{"dtype":"F32"}' % n for n in range(10**6)) + b"}"),
    "200,000 tensors": lambda: safetensors(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(200_000)) + b"}"
    ),
    "a shape of 10^6 ones": lambda: safetensors({"a": _tensor(0, 4, [1] * 10**6)}, bytes(4)),
    "a shape of 33 ones": lambda: safetensors({"a": _tensor(0, 4, [1] * 33)}, bytes(4)),
    "overlapping tensors": lambda: safetensors({"a": _tensor(), "b": _tensor(4, 12)}, bytes(12)),
    "one tensor inside another": lambda: safetensors({"a": _tensor(0, 16, (4,)), "b": _tensor(4, 12)}, bytes(16)),
    "two tensors of the same bytes": lambda: safetensors({"a": _tensor(), "b": _tensor()}, bytes(8)),
    "a hole": lambda: safetensors({"a": _tensor(), "b": _tensor(12, 20)}, bytes(20)),
    "a hole at the start": lambda: safetensors({"a": _tensor(8, 16)}, bytes(16)),
    "bytes behind": lambda: safetensors(_TWO, bytes(17)),
    "bytes missing": lambda: safetensors(_TWO, bytes(15)),
    "no tensor but bytes": lambda: safetensors({}, bytes(4)),
    "offsets beyond the file": lambda: safetensors({"a": _tensor(2**40, 2**40 + 8)}, bytes(8)),
    "offsets of 2^64": lambda: safetensors({"a": _tensor(2**64, 2**64 + 8)}, bytes(8)),
    "offsets below zero": lambda: safetensors({"a": _tensor(-8, 0)}, bytes(8)),
    "offsets reversed": lambda: safetensors({"a": _tensor(8, 0)}, bytes(8)),
    "one offset": lambda: safetensors({"a": {**_tensor(), "data_offsets": [0]}}, bytes(8)),
    "offsets as text": lambda: safetensors({"a": {**_tensor(), "data_offsets": ["0", "8"]}}, bytes(8)),
    "offsets as fractions": lambda: safetensors({"a": {**_tensor(), "data_offsets": [0.0, 8.0]}}, bytes(8)),
    "offsets true and false": lambda: safetensors({"a": _tensor(False, True, (1,), "U8")}, bytes(1)),
    "an unknown dtype": lambda: safetensors({"a": _tensor(dtype="F7")}, bytes(8)),
    "a dtype that is a list": lambda: safetensors({"a": _tensor(dtype=["F32"])}, bytes(8)),
    "no dtype": lambda: safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no shape": lambda: safetensors({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "a shape that is a number": lambda: safetensors({"a": _tensor(shape=2)}, bytes(8)),
    "a shape below zero": lambda: safetensors({"a": _tensor(shape=(-1, -2))}, bytes(8)),
    "a shape of a product of 2^64": lambda: safetensors({"a": _tensor(0, 0, (2**32, 2**32))}),
    "a shape of 10^300": lambda: safetensors({"a": _tensor(0, 8, (10**300,))}, bytes(8)),
    "a shape of halves": lambda: safetensors({"a": _tensor(shape=(0.5, 4))}, bytes(8)),
    "a shape of null": lambda: safetensors({"a": _tensor(shape=None)}, bytes(8)),
    "a tensor that is a number": lambda: safetensors({"a": 5}, bytes(8)),
    "a tensor that is null": lambda: safetensors({"a": None}, bytes(8)),
    "metadata that are a list": lambda: safetensors({"__metadata__": [1], "a": _tensor()}, bytes(8)),
    "metadata that are numbers": lambda: safetensors({"__metadata__": {"a": 1}, "a": _tensor()}, bytes(8)),
    "a page": lambda: b"<!doctype html><html>",
    "a Git LFS pointer": lambda: CONTENTS["a Git LFS pointer"](""),
    "a zip": lambda: b"PK\x03\x04" + bytes(64),
    "zeros": lambda: bytes(4096),
    "a gzip": lambda: gzip.compress(b"x" * 99),
}


def try_weights(folder: Path, tally: Tally) -> None:
    """WEIGHTS and PLACES as model.safetensors, alone and in a folder."""
    kind = Kind("model.safetensors", None, stored_tensors.read_safetensors)
    for name, make in WEIGHTS.items():
        path = file_of(kind, folder)
        path.write_bytes(make())
        tally.add(kind.name, name, verdict(kind.read, path))
    try_places(kind, folder, tally)


# Indices: the files that they name.


def try_indices(folder: Path, tally: Tally) -> None:
    """An index of shards that names what is not a file of its own folder."""
    kind = next(kind for kind in KINDS if kind.name == "model.safetensors.index.json")
    outside = Path(tempfile.mkdtemp(dir=folder)) / "a.safetensors"
    outside.write_bytes(safetensors({"w": _tensor()}, bytes(8)))
    for name in (
        "../a.safetensors",
        str(outside),
        "/dev/zero",
        "/dev/stdin",
        "link",
        "zero",
        "pipe",
        "sub/a",
        ".",
        "..",
        "",
        "a\0b",
        "a" * 300,
        "a\nb",
        "missing.safetensors",
        "folder",
        "C:\\a",
        "~/a",
        "loop",
    ):
        for suffix in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            path = file_of(kind, folder).with_name(suffix)
            (path.parent / "link").symlink_to(outside)
            (path.parent / "zero").symlink_to("/dev/zero")
            (path.parent / "loop").symlink_to("loop")
            (path.parent / "folder").mkdir()
            os.mkfifo(path.parent / "pipe")
            path.write_text(json.dumps({"weight_map": {"w": name}}))
            tally.add("index of shards", name, verdict(lambda path: torch_file.read_model_dir(path.parent), path))


# Zips of labels.


def _zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _twice(path: Path) -> None:
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for text in ("one", "two"):
            archive.writestr("converted_label/a.txt", text)


def _flipped(path: Path) -> None:
    _zip(path, {"converted_label/a.txt": b"some label text " * 9}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    _zip(path, {"converted_label/a.txt": b"text"})
    path.write_bytes(path.read_bytes()[:-10])


_LABEL = "converted_label/a.txt"
ZIPS: dict[str, Callable[[Path], None]] = {
    "no member": lambda path: _zip(path, {}),
    "cut off": _cut,
    "a flipped bit": _flipped,
    "a member twice": _twice,
    "a bomb": lambda path: _zip(path, {_LABEL: bytes(50_000_000)}),
    "a member of zeros": lambda path: _zip(path, {_LABEL: bytes(90_000)}),
    "an absolute name": lambda path: _zip(path, {"/etc/converted_label/a.txt": b"x"}),
    "a climbing name": lambda path: _zip(path, {"../../converted_label/a.txt": b"x"}),
    "a name with backslashes": lambda path: _zip(path, {"..\\converted_label\\a.txt": b"x"}),
    "another folder": lambda path: _zip(path, {"label/a.txt": b"x"}),
    "no text": lambda path: _zip(path, {"converted_label/a.exe": b"x"}),
    "an empty text": lambda path: _zip(path, {_LABEL: b""}),
    "not UTF-8": lambda path: _zip(path, {_LABEL: b"\xff\xfe"}),
    "no zip": lambda path: path.write_bytes(b"no zip") and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "zeros": lambda path: path.write_bytes(bytes(4096)) and None,
    "an end without a beginning": lambda path: path.write_bytes(b"PK\x05\x06" + b"\xff" * 18) and None,
    **PLACES,
}
ZIPS.pop("a folder")  # an unpacked zip is read


def try_zips(folder: Path, tally: Tally) -> None:
    """ZIPS as released labels."""
    for name, make in ZIPS.items():
        path = Path(tempfile.mkdtemp(dir=folder)) / f"ave{released.SUFFIX}.zip"
        make(path)
        said = verdict(released.read, path)
        tally.add("zip of labels", name, said)
        if path.is_file() and not path.is_symlink():
            path.unlink()


def try_all(folder: Path, most: int = 400) -> Tally:
    """All of it; `most` changed fields of a kind."""
    tally = Tally()
    for kind in KINDS:
        try_contents(kind, folder, tally)
        try_fields(kind, folder, tally, most)
    try_weights(folder, tally)
    try_indices(folder, tally)
    try_zips(folder, tally)
    return tally


def main() -> None:
    """Print the table, and what did not hold."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = try_all(Path(folder))
    print(tally)
    print("\n".join(line for lines in tally.failed.values() for line in lines))


if __name__ == "__main__":
    main()
