"""Whole models in one folder: packed as one safetensors file or imported as an Orbax tree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from crab_jax.checkpoints import finite
from crab_jax.checkpoints.digests import COPY_AGAIN, host_digest, refuse_changed
from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import need_room, replaced, whole, write_whole
from crab_jax.io.stored_tensors import read_safetensors
from crab_jax.io.structured import read_json

FORMAT = 1
PACKED, IMPORTED = "params.safetensors", "params"
MANIFEST = "manifest.json"
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json")  # the files of a model beside its parameters


def read_manifest(folder: Path, fix: str) -> dict[str, Any]:
    """Return the manifest.json of a folder. Raises InputError with the given fix."""
    file = str(folder / MANIFEST)
    try:
        manifest: dict[str, Any] = read_json(file)
        return manifest
    except InputError as error:
        raise InputError(file, "", f"cannot be read ({error.problem})", fix) from error


def _flat(params: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Return the leaves by path, on this host; floating ones in `dtype` if given."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(jax.device_get(leaf))
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        flat[path] = np.ascontiguousarray(array.astype(dtype) if dtype and floating else array)
    return flat


def save_tree(file: str | Path, params: Any, dtype: Any = None) -> None:
    """Write a parameter tree atomically as one safetensors file; floating leaves in `dtype` if given."""
    _save_flat(paths.at(file), finite.check(_flat(params, dtype), str(file)))


def _save_flat(file: Path, flat: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    need_room(file.parent, sum(leaf.nbytes for leaf in flat.values()), file.name)
    with whole(file) as partial_file:
        safetensors.numpy.save_file(dict(flat), partial_file)


def note_model(folder: str | Path, digests: Mapping[str, str]) -> None:
    """Write the manifest.json of an imported or packed model: digests of its leaves and of the files beside them."""
    described = {"format": FORMAT, "params": dict(digests), "files": hashes_beside(paths.at(folder))}
    write_whole(paths.at(folder) / MANIFEST, json.dumps(described, indent=1))


def hashes_beside(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of the config and the tokenizer in a folder."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in BESIDE if (folder / name).is_file()
    }


def check_beside(folder: Path, kept: Any, manifest: Path) -> None:
    """Raise InputError unless the config and the tokenizer in a folder are those that were written."""
    if not isinstance(kept, dict):
        raise InputError(str(manifest), "files", "is no object", COPY_AGAIN)
    current = hashes_beside(folder)
    for name in BESIDE:
        if name in kept and kept[name] != current.get(name):
            problem = "is not what was written with this model" if name in current else "is missing"
            raise InputError(
                str(folder / name),
                "",
                problem,
                f"{COPY_AGAIN}; if you changed it on purpose, remove files from {manifest}",
            )


def model_digests(folder: Path) -> dict[str, str] | None:
    """Return the digests of the leaves of an imported or packed model; None for one of an older version.

    Its other files are checked. Raises InputError.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder, COPY_AGAIN)
    if "params" not in manifest:  # written by another program
        return None
    if not isinstance(params := manifest["params"], dict):
        raise InputError(str(folder / MANIFEST), "params", "is no object", COPY_AGAIN)
    check_beside(folder, manifest.get("files", {}), folder / MANIFEST)
    return params


def load_tree(file: str | Path, wanted: Any = None, digests: Mapping[str, str] | None = None) -> Any:
    """Return the parameter tree of one safetensors file, floating leaves as float32.

    wanted: load only these leaves, in their dtypes, each device reading its shard of the mapped file. Raises InputError
    when the file is damaged or differs from `digests`.
    """
    flat = read_safetensors(file)
    places = dict.fromkeys(flat) if wanted is None else traverse_util.flatten_dict(wanted, sep="/")
    if digests is not None:
        loaded = {path: flat[path] for path in places}  # each process reads the whole file
        refuse_changed([path for path, leaf in loaded.items() if digests.get(path) != host_digest(leaf)], str(file))

    def load(path: str, place: Any) -> Any:
        leaf = flat[path]
        if place is None:
            return leaf.astype(np.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        return jax.make_array_from_callback(leaf.shape, place.sharding, lambda index: leaf[index].astype(place.dtype))

    return traverse_util.unflatten_dict({path: load(path, place) for path, place in places.items()}, sep="/")


def save_packed(
    folder: str | Path, params: Any, config: dict[str, Any], dtype: Any = None, tokenizer: Any = None
) -> None:
    """Write parameters, config and tokenizer into one folder, which then has all the new files or all the old ones."""
    flat = finite.check(_flat(params, dtype), str(paths.at(folder) / PACKED))
    with replaced(folder) as new:
        _save_flat(new / PACKED, flat)
        write_whole(new / "config.json", json.dumps(config, indent=1))
        if tokenizer is not None:
            tokenizer.save(new)
        note_model(new, {path: host_digest(leaf) for path, leaf in flat.items()})
