"""Reader of parameters on disk: checkpoints of a run, imported models and packed models.

A run's `checkpoints/` holds `frozen/` (written once), one folder per step with `train` (trainable, optimizer, step),
and `manifest.json`. Every process writes and reads its own shards in one shared folder; a checkpoint saved on one mesh
restores on another. The position of the input is the step. An imported model is a folder with the Orbax tree `params/`,
written leaf by leaf. A packed model is a folder with `params.safetensors`, small enough to pass on. Both also hold
`config.json` and the tokenizer, and `--checkpoint` and `init_from` take them like a run.

Digests of every leaf (`leaf_digests`) are kept in the metadata of a step, in the manifest.json of a run for `frozen`,
and in the manifest.json of a model; every read is checked against them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from crab_jax.checkpoints import finite
from crab_jax.checkpoints.digests import COPY_AGAIN, check_digests, refuse_changed, tell_unverified
from crab_jax.checkpoints.models import (
    BESIDE,
    IMPORTED,
    MANIFEST,
    PACKED,
    check_beside,
    load_tree,
    model_digests,
    read_manifest,
)
from crab_jax.checkpoints.orbax import in_plain_words, load_orbax, on_host, orbax_path, partial_load, tree_metadata
from crab_jax.checkpoints.run_steps import STEP_METADATA, step_metadata, steps_of
from crab_jax.io import packaged
from crab_jax.io.errors import InputError
from crab_jax.io.stored_tensors import read_safetensors
from crab_jax.optim import merge


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters on disk.

    shapes: ShapeDtypeStructs of the whole tree. read: reads the leaves of its argument straight into their dtypes and
    shardings.
    """

    shapes: Any
    read: Callable[[Any], Any]
    where: str = "checkpoint"

    def load(self, wanted: Any = None) -> Any:
        """Return the leaves of `wanted`; without it all of them, in the stored dtypes, as NumPy arrays.

        Raises InputError for values that are not finite, also if they became so in the dtype of `wanted`.
        """
        if wanted is None:
            return finite.check(jax.tree.map(np.asarray, self.read(on_host(self.shapes))), self.where)
        return finite.check(self.read(wanted), self.where)

    def some(self, paths: Iterable[str]) -> dict[str, Any]:
        """Return the leaves of these '/'-joined paths, in the stored dtypes, in this host's memory."""
        flat = traverse_util.flatten_dict(self.shapes, sep="/")
        wanted = on_host(traverse_util.unflatten_dict({path: flat[path] for path in paths}, sep="/"))
        leaves: dict[str, Any] = traverse_util.flatten_dict(finite.check(self.read(wanted), self.where), sep="/")
        return leaves


def _as_written(
    read: Callable[[Any], Any], shapes: Any, kept: Mapping[str, str] | None, where: str, below: str = ""
) -> Callable[[Any], Any]:
    """Return a version of `read` that checks leaves against their digests before converting them to the wanted dtypes.

    Raises InputError at once when the shapes on disk are not those of the digests.
    """
    if kept is None:
        tell_unverified(where)
        return read
    stored = traverse_util.flatten_dict(shapes, sep="/")
    expected = {path.removeprefix(below): digest for path, digest in kept.items() if path.startswith(below)}
    refuse_changed(
        sorted(expected.keys() ^ stored.keys())
        or [path for path, leaf in stored.items() if not expected[path].startswith(f"{tuple(leaf.shape)}{leaf.dtype}")],
        where,
    )

    def checked(wanted: Any) -> Any:
        flat = traverse_util.flatten_dict(wanted, sep="/")
        loaded = read(
            traverse_util.unflatten_dict(
                {
                    path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype, sharding=leaf.sharding)
                    for path, leaf in flat.items()
                },
                sep="/",
            )
        )
        check_digests(expected, loaded, where)
        loaded = traverse_util.flatten_dict(loaded, sep="/")
        for path, leaf in flat.items():
            if loaded[path].dtype != leaf.dtype:
                loaded[path] = jax.device_put(loaded[path].astype(leaf.dtype), leaf.sharding)
        return traverse_util.unflatten_dict(loaded, sep="/")

    return checked


def _packed(file: Path) -> StoredParams:
    flat, digests = read_safetensors(file), model_digests(file.parent)
    if digests is None:
        tell_unverified(str(file))
    else:
        refuse_changed(sorted(digests.keys() ^ flat.keys()), str(file))
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
        for path, leaf in flat.items()
    }
    return StoredParams(
        traverse_util.unflatten_dict(shapes, sep="/"), partial(load_tree, file, digests=digests), str(file)
    )


def _imported(folder: Path, digests: Mapping[str, str] | None) -> StoredParams:
    shapes = tree_metadata(folder)
    return StoredParams(shapes, _as_written(partial(load_orbax, folder), shapes, digests, str(folder)), str(folder))


def _of_run(folder: Path) -> StoredParams:
    """Return the frozen and newest trainable parameters of a run's `checkpoints/`, as one tree.

    Raises InputError when that step is damaged: only training falls back to the previous one.
    """
    steps = sorted(steps_of(folder))
    if not steps:
        raise InputError(str(folder), "", "holds no finished checkpoint", "train first, or wait for the first save")
    step = folder / str(steps[-1])
    fallback = f"step {steps[-2]}, the one before" if steps[1:] else "another step"

    def plainly(read: Callable[[], Any]) -> Any:
        try:
            return in_plain_words(step, read)
        except InputError as error:
            raise InputError(
                error.where,
                error.field,
                error.problem,
                f"this step is damaged: give its folder another "
                f"name to take {fallback}, or start train again, which does so and goes on",
            ) from error

    kept = plainly(lambda: step_metadata(step))
    trained = plainly(lambda: tree_metadata(step, "train")["trainable"])

    def load(wanted: Any) -> Any:
        with partial_load(folder), ocp.training.Checkpointer(orbax_path(folder)) as saved:
            return saved.load_checkpointables(steps[-1], {"train": {"trainable": wanted}})["train"]["trainable"]

    read_trained = plainly(lambda: _as_written(load, trained, kept and kept["train"], str(step), "trainable/"))
    manifest = read_manifest(folder, COPY_AGAIN) if (folder / MANIFEST).exists() else {}
    check_beside(folder.parent, manifest.get("files", {}), folder / MANIFEST)
    digests = manifest.get("frozen")
    if digests is not None and not isinstance(digests, dict):
        raise InputError(str(folder / MANIFEST), "frozen", "is no object", COPY_AGAIN)
    frozen = _imported(folder / "frozen", digests)
    in_trained = set(traverse_util.flatten_dict(trained))

    def read(wanted: Any) -> Any:
        flat = traverse_util.flatten_dict(wanted)
        trained_wanted, frozen_wanted = (
            traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if (path in in_trained) == kind})
            for kind in (True, False)
        )
        loaded = plainly(lambda: read_trained(trained_wanted)) if trained_wanted else {}
        return merge(loaded, frozen.read(frozen_wanted) if frozen_wanted else {})

    return StoredParams(merge(trained, frozen.shapes), read, str(step))


def stored_params(path: str | Path) -> StoredParams:
    """Return the parameters of a run's workdir, an imported or a packed model. Raises InputError for other folders."""
    path = packaged.located(path)
    if (path / PACKED).is_file():
        return _packed(path / PACKED)
    if (path / IMPORTED).is_dir():
        return _imported(path.resolve() / IMPORTED, model_digests(path))
    if (path / "checkpoints" / "frozen").is_dir():
        return _of_run(path.resolve() / "checkpoints")
    raise InputError(
        str(path),
        "checkpoint",
        "is neither a training run nor an imported or packed model",
        f"give a --workdir of train, the --out of an import, or a folder with {PACKED}",
    )


def identity(path: str | Path) -> str:
    """Return a hash that identifies a checkpoint, the same for a copy elsewhere; for a run, of its newest step.

    It covers the digests that the checkpoint holds, and the names, sizes and samples of its files.
    """
    folder, digest = packaged.located(path), hashlib.blake2b(digest_size=16)
    run = folder / "checkpoints"
    steps = steps_of(run)
    newest = [run / str(max(steps))] if steps else []
    trees = [folder / PACKED, folder / IMPORTED, run / "frozen", *newest]
    files = [file for tree in trees for file in (tree.rglob("*") if tree.is_dir() else [tree]) if file.is_file()]
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as content:  # checkpoints of older versions hold no digests
            for part in range(16):
                content.seek(size * part // 16)
                digest.update(content.read(4096))
    for file in (
        *(folder / name for name in (*BESIDE, MANIFEST)),
        run / MANIFEST,
        *(file for file in files if file.name == STEP_METADATA),
    ):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def load_params(path: str | Path) -> Any:
    """Return the whole parameter tree behind `stored_params`, as NumPy arrays."""
    return stored_params(path).load()
