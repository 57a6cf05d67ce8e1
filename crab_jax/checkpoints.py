"""Checkpoints of a run, and whole models in one folder. The only file that imports Orbax.

A run's `checkpoints/` holds `frozen/` (written once), one folder per step with `train` (trainable, optimizer, step)
and `data` (input position), and `manifest.json`. A packed model is a folder with `params.safetensors`, `config.json`
and `tokenizer.json`: small enough to hand around, and what `--checkpoint` and `init_from` also take.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from crab_jax.convert.torch_file import SAFETENSORS_NAMES, read_safetensors
from crab_jax.errors import InputError

FORMAT = 1
PACKED = "params.safetensors"
DTYPES, AS_STORED = "dtypes", "as stored"  # marks a file whose leaves keep their dtypes


def describe_mismatch(wanted: Any, found: Any) -> list[str]:
    """Lines naming every leaf that is missing, extra, or of another shape between two trees."""
    wanted, found = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, found))
    lines = [f"{path}: missing in the checkpoint, the model wants {wanted[path].shape}"
             for path in wanted if path not in found]
    lines += [f"{path}: unknown to the model" for path in found if path not in wanted]
    lines += [f"{path}: checkpoint {found[path].shape}, model {wanted[path].shape}" for path in wanted
              if path in found and tuple(found[path].shape) != tuple(wanted[path].shape)]
    return lines


def check_match(wanted: Any, found: Any, where: str) -> None:
    """InputError that lists the mismatches of two trees, if any."""
    lines = describe_mismatch(wanted, found)
    if lines:
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise InputError(where, lines[0].split(":")[0], f"{len(lines)} parameters do not fit: {shown}",
                         "use the config that the checkpoint was written with")


def tree_hash(tree: Any) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of every leaf."""
    digest = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(tree, sep="/").items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


class RunCheckpoints:
    """The checkpoints of one run: asynchronous, atomic, newest `keep` kept."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = epath.Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._steps = ocp.training.Checkpointer(
            self.folder, preservation_policy=ocp.training.preservation_policies.LatestN(keep))

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return None if self._steps.latest is None else self._steps.latest.step

    def save_frozen(self, frozen: Any, manifest: dict[str, Any]) -> None:
        """Write the frozen tree once and the manifest that later restores are checked against."""
        ocp.save(self.folder / "frozen", frozen, overwrite=True)
        manifest = {"format": FORMAT, "frozen_sha256": tree_hash(frozen), **manifest,
                    "packages": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")}}
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def save(self, step: int, train: Any, data: Any) -> None:
        """Start writing one step in the background. `data` is the Grain iterator."""
        self._steps.save_checkpointables_async(step, {"train": train, "data": data})

    def restore(self, train: Any, data: Any) -> Any:
        """Newest `train` tree, with the shapes, dtypes and shardings of the given one; moves `data` to its position."""
        step = self.latest
        found = ocp.metadata(self.folder / str(step), "train").metadata
        check_match(_plain(train), _plain(found), str(self.folder / str(step)))
        return self._steps.load_checkpointables(step, {"train": _abstract(train), "data": data})["train"]

    def wait(self) -> None:
        """Block until everything started is on disk."""
        self._steps.close()


def _plain(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict of its leaves (optimizer states are named tuples)."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        flat["/".join(_key(part) for part in path)] = leaf
    return traverse_util.unflatten_dict(flat, sep="/") if flat else {}


def _key(part: Any) -> str:
    return str(next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name)))


def save_tree(file: str | Path, params: Any, dtype: Any = None) -> None:
    """Write a parameter tree as one safetensors file; floating leaves in `dtype` when given."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(jax.device_get(leaf))
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        flat[path] = np.ascontiguousarray(array.astype(dtype) if dtype and floating else array)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(flat, file)


def save_tree_by_parts(file: str | Path, leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]],
                       parts: Iterable[tuple[str, tuple[int, ...], np.ndarray]]) -> None:
    """Write a tree that never is in memory: `leaves` gives the shape and dtype of every '/'-joined path, `parts` yields
    (path, leading indices, array). What no part covers is zero. `load_tree` keeps the dtypes of such a file.
    """
    header: dict[str, Any] = {"__metadata__": {DTYPES: AS_STORED}}
    end = 0
    for path, (shape, dtype) in sorted(leaves.items()):
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[path] = {"dtype": SAFETENSORS_NAMES[dtype.name], "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = Path(f"{file}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        start = out.tell()
        out.truncate(start + end)
        for path, index, array in parts:
            shape, dtype = leaves[path]
            if (*shape[:len(index)], *array.shape) != shape or array.dtype != dtype:
                raise ValueError(f"{path}{list(index)}: {array.dtype}{array.shape} in a leaf {dtype}{shape}")
            row = int(np.ravel_multi_index(index, shape[:len(index)])) if index else 0
            out.seek(start + header[path]["data_offsets"][0] + row * array.nbytes)
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    os.replace(unfinished, file)


def load_tree(file: str | Path) -> Any:
    """The parameter tree of one safetensors file, floating leaves as float32, unless it was written by parts: then
    they keep their dtypes and stay in the file, memory-mapped. Raises InputError when it is damaged.
    """
    flat = read_safetensors(file)
    kept = flat.metadata.get(DTYPES) == AS_STORED

    def load(path: str) -> np.ndarray:
        leaf = flat[path]
        return leaf.astype(np.float32) if not kept and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return traverse_util.unflatten_dict({path: load(path) for path in flat}, sep="/")


def save_packed(folder: str | Path, params: Any, config: dict[str, Any], dtype: Any = None) -> None:
    """Write parameters and config into one folder (the tokenizer saves itself beside them)."""
    save_tree(Path(folder) / PACKED, params, dtype)
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


def load_run_params(workdir: str | Path) -> Any:
    """Parameter tree (frozen and newest trainable merged) of a training run."""
    from crab_jax.optim import merge

    folder = epath.Path(workdir).resolve() / "checkpoints"
    with ocp.training.Checkpointer(folder) as steps:
        if steps.latest is None:
            raise InputError(str(folder), "", "holds no finished checkpoint", "train first, or wait for the first save")
        step = steps.latest.step
        abstract = _on_host(ocp.metadata(folder / str(step), "train").metadata["trainable"])
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            trainable = steps.load_checkpointables(step, {"train": {"trainable": abstract}})["train"]["trainable"]
    return merge(trainable, ocp.load(folder / "frozen", _on_host(ocp.metadata(folder / "frozen").metadata)))


def _on_host(tree: Any) -> Any:
    """Abstract leaves placed on this process's first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def load_params(path: str | Path) -> Any:
    """Parameter tree of a run's workdir or of a packed model. Raises InputError when it is neither."""
    path = Path(path)
    if (path / PACKED).is_file():
        return load_tree(path / PACKED)
    if (path / "checkpoints" / "frozen").is_dir():
        return load_run_params(path)
    raise InputError(str(path), "checkpoint", "is neither a training run nor a packed model",
                     f"give a --workdir of train, or a folder with {PACKED}")
