"""Checkpoints of a run, and whole models in one folder. The only file that imports Orbax.

A run's `checkpoints/` holds `frozen/` (written once), one folder per step with `train` (trainable, optimizer, step),
and `manifest.json`. Every process writes and reads its own shards, into one folder that all must see; what was saved on
one mesh restores on another. The position of the input is the step. An imported model is a folder with the Orbax tree
`params/`, written leaf by leaf. A packed model is one with `params.safetensors`: small enough to hand around. Both also
hold `config.json` and the tokenizer, and `--checkpoint` and `init_from` take them like a run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp_v0
import safetensors.numpy
import tensorstore as ts
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from crab_jax import finite
from crab_jax.convert.torch_file import read_safetensors
from crab_jax.errors import InputError
from crab_jax.files import write_whole
from crab_jax.optim import merge
from crab_jax.structured import read_json

# Orbax's threads log what they raise with its traceback, and it is raised in the caller all the same.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in record.getMessage())

FORMAT = 1
PACKED, IMPORTED = "params.safetensors", "params"
CHUNK = 32 * 2**20  # bytes; what a host reads at once of a large imported leaf, so that it can restore only its shard


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
    """SHA-256 over the paths, shapes, dtypes and checksums of every leaf: the same for any sharding and process count.

    Each process reads its own shards, one at a time.
    """
    flat = sorted(traverse_util.flatten_dict(tree, sep="/").items())
    sums = np.array([_checksum(leaf) for _, leaf in flat], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    digest = hashlib.sha256()
    for (path, leaf), checksum in zip(flat, sums.tolist(), strict=True):
        digest.update(f"{path}{leaf.shape}{leaf.dtype}{checksum}".encode())
    return digest.hexdigest()


def _checksum(leaf: Any) -> int:
    """Sum modulo 2**32, over this process's shards, of each element's bits times an odd number for each of its indices:
    sums of disjoint shards add up to the sum of the leaf, and any one changed element changes it.
    """
    whole = tuple(slice(None) for _ in leaf.shape)
    shards = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0] if isinstance(
        leaf, jax.Array) else [(whole, leaf)]
    total = 0
    for index, data in shards:
        factors = []
        for axis, (taken, size) in enumerate(zip(index, leaf.shape, strict=True)):
            mixed = (np.arange(size, dtype=np.uint32)[taken] + np.uint32(axis + 1)) * np.uint32(2654435761)
            factors.append((mixed ^ (mixed >> np.uint32(15))) | np.uint32(1))
        bits = np.ascontiguousarray(data)
        bits = bits.view(np.dtype(f"u{bits.itemsize}")).reshape(np.shape(data))
        for odd, part in zip(factors[0], bits, strict=True) if factors else [(1, bits)]:
            summed = part.astype(np.uint32)
            for factor in reversed(factors[1:]):
                summed = summed @ factor
            total += int(summed) * int(odd)
    return total % 2**32


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

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was started with. Raises InputError when it cannot be read."""
        return read_json(str(self.folder / "manifest.json"),
                         fix="copy the folder again, or start anew in another --workdir")

    def note(self, manifest: dict[str, Any]) -> None:
        """Write the manifest."""
        if jax.process_index() == 0:
            write_whole(str(self.folder / "manifest.json"), json.dumps(manifest, indent=1))

    def save_frozen(self, frozen: Any, manifest: dict[str, Any]) -> None:
        """Write the frozen tree once and the manifest that later restores are checked against."""
        ocp.save(self.folder / "frozen", frozen, overwrite=True)
        self.note({"format": FORMAT, "frozen_hash": tree_hash(frozen), **manifest, "packages": {
            name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")}})

    def load_frozen(self, wanted: Any) -> Any:
        """The frozen tree, straight into the dtypes and shards of `wanted`. Raises InputError when it is not what the
        run started with.
        """
        folder = self.folder / "frozen"
        check_match(wanted, ocp.metadata(folder).metadata, str(folder))
        frozen = _load_orbax(folder, wanted)
        # Runs of an earlier version have another hash under another name.
        kept = self.manifest.get("frozen_hash")
        if kept and kept != tree_hash(frozen):
            raise InputError(str(folder), "frozen_hash", "the frozen weights are not those that the run started with",
                             "copy the folder again, or start anew in another --workdir")
        return frozen

    def save(self, step: int, train: Any) -> None:
        """Start writing one step in the background."""
        # Forced: by default Orbax drops a save while the one before is being written.
        self._steps.save_checkpointables_async(step, {"train": train}, force=True)

    def restore(self, train: Any) -> Any:
        """Newest `train` tree, with the shapes, dtypes and shardings of the given one."""
        step = self.latest
        found = ocp.metadata(self.folder / str(step), "train").metadata
        check_match(_plain(train), _plain(found), str(self.folder / str(step)))
        return finite.check(self._steps.load_checkpointables(step, {"train": _abstract(train)})["train"],
                            str(self.folder / str(step)))

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
    finite.check(flat, str(file))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(flat, file)


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A leaf that need not fit in memory: `parts()` yields (leading indices, array) and covers it exactly once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: int  # leading axes that the parts index
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]

    def checked(self) -> Iterable[tuple[tuple[int, ...], np.ndarray]]:
        """The parts; ValueError when one does not fit, comes twice or is missing."""
        left = set(np.ndindex(self.shape[:self.stacked]))
        for index, part in self.parts():
            if index not in left or (part.shape, part.dtype) != (self.shape[self.stacked:], self.dtype):
                raise ValueError(f"part {index}: {part.dtype}{part.shape} in a leaf {self.dtype}{self.shape}")
            left.remove(index)
            yield index, np.ascontiguousarray(part)
        if left:
            raise ValueError(f"parts {sorted(left)} are missing in a leaf {self.dtype}{self.shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole leaf."""
        return self.size * self.dtype.itemsize


class _PartByPart(ocp_v0.type_handlers.NumpyHandler):
    """Writes `Streamed` leaves, one part in memory at a time. They restore like any other array."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:  # type: ignore[override]
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._turn:
            if value.nbytes > CHUNK:
                for index, part in value.checked():
                    await store[index].write(part, can_reference_source_data_indefinitely=True)
            else:  # many small writes take longer than one
                whole = np.zeros(value.shape, value.dtype)
                for index, part in value.checked():
                    whole[index] = part
                await store.write(whole)


def save_streamed(folder: str | Path, leaves: Mapping[str, Streamed]) -> None:
    """Write a tree of '/'-joined paths as an Orbax checkpoint, in the leaves' dtypes, chunked by stacked layer."""
    registry = ocp_v0.type_handlers.create_type_handler_registry(
        (Streamed, _PartByPart()), (jax.Array, ocp_v0.type_handlers.ArrayHandler()))
    handler = ocp_v0.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)
    tree = traverse_util.unflatten_dict(dict(leaves), sep="/")
    layout = jax.tree.map(lambda leaf: ocp_v0.SaveArgs() if leaf.nbytes <= CHUNK else ocp_v0.SaveArgs(
        shard_axes=tuple(range(leaf.stacked)), chunk_byte_size=CHUNK), tree)
    with ocp_v0.Checkpointer(handler) as writer:
        writer.save(epath.Path(folder).resolve(), force=True, args=ocp_v0.args.PyTreeSave(
            tree, save_args=layout, ocdbt_target_data_file_size=8 * CHUNK))


def load_tree(file: str | Path, wanted: Any = None) -> Any:
    """The parameter tree of one safetensors file, floating leaves as float32; with `wanted`, those leaves of it in
    their dtypes, each device reading its shard of the mapped file. Raises InputError when it is damaged.
    """
    flat = read_safetensors(file)

    def load(path: str, place: Any) -> Any:
        leaf = flat[path]
        if place is None:
            return leaf.astype(np.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        return jax.make_array_from_callback(leaf.shape, place.sharding, lambda index: leaf[index].astype(place.dtype))

    places = dict.fromkeys(flat) if wanted is None else traverse_util.flatten_dict(wanted, sep="/")
    return traverse_util.unflatten_dict({path: load(path, place) for path, place in places.items()}, sep="/")


def save_packed(folder: str | Path, params: Any, config: dict[str, Any], dtype: Any = None) -> None:
    """Write parameters and config into one folder (the tokenizer saves itself beside them)."""
    save_tree(Path(folder) / PACKED, params, dtype)
    write_whole(Path(folder) / "config.json", json.dumps(config, indent=1))


def _partial_load() -> ocp.Context:
    """Within it, a load may ask for some leaves of a tree only (never for none)."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def _load_orbax(folder: epath.Path, wanted: Any) -> Any:
    """The leaves of a tree that `wanted` has, in its dtypes and shardings. Raises InputError when it is damaged."""
    try:
        with _partial_load():
            return ocp.load(folder, wanted)
    except Exception as error:  # Orbax and TensorStore raise many kinds, the bare Exception among them
        raise InputError(str(folder), "", f"cannot be read ({str(error).splitlines()[0][:200]})",
                         "copy or import it again") from error


def _on_host(tree: Any) -> Any:
    """Abstract leaves placed in this host's memory (on its first device where JAX_PLATFORMS leaves out the CPU)."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters on disk. `shapes`: ShapeDtypeStructs of the whole tree. `read(wanted)` reads the leaves of `wanted`
    straight into its dtypes and shardings.
    """

    shapes: Any
    read: Callable[[Any], Any]
    where: str = "checkpoint"

    def load(self, wanted: Any = None) -> Any:
        """The leaves of `wanted`; without it all of them, in the stored dtypes, as NumPy arrays. Raises InputError for
        values that are not finite, also those that became so in the dtype of `wanted`.
        """
        if wanted is None:
            return finite.check(jax.tree.map(np.asarray, self.read(_on_host(self.shapes))), self.where)
        return finite.check(self.read(wanted), self.where)

    def some(self, paths: Iterable[str]) -> dict[str, Any]:
        """The leaves of these '/'-joined paths, in the stored dtypes, in this host's memory."""
        flat = traverse_util.flatten_dict(self.shapes, sep="/")
        wanted = _on_host(traverse_util.unflatten_dict({path: flat[path] for path in paths}, sep="/"))
        return traverse_util.flatten_dict(finite.check(self.read(wanted), self.where), sep="/")


def _packed(file: Path) -> StoredParams:
    flat = read_safetensors(file)
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating)
                                         else leaf.dtype) for path, leaf in flat.items()}
    return StoredParams(traverse_util.unflatten_dict(shapes, sep="/"), partial(load_tree, file), str(file))


def _imported(folder: epath.Path) -> StoredParams:
    try:
        shapes = ocp.metadata(folder).metadata
    except (ValueError, OSError, KeyError) as error:
        raise InputError(str(folder), "", f"cannot be read ({str(error).splitlines()[0][:200]})",
                         "copy or import it again") from error
    return StoredParams(shapes, partial(_load_orbax, folder), str(folder))


def _of_run(folder: epath.Path) -> StoredParams:
    """Frozen and newest trainable parameters of a run's `checkpoints/`, as one tree."""
    with ocp.training.Checkpointer(folder) as steps:
        if steps.latest is None:
            raise InputError(str(folder), "", "holds no finished checkpoint", "train first, or wait for the first save")
        step = steps.latest.step
    trained = ocp.metadata(folder / str(step), "train").metadata["trainable"]
    frozen = _imported(folder / "frozen")
    in_trained = set(traverse_util.flatten_dict(trained))

    def read(wanted: Any) -> Any:
        flat = traverse_util.flatten_dict(wanted)
        ours, theirs = (traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items()
                                                      if (path in in_trained) == kind}) for kind in (True, False))
        loaded = {}
        if ours:
            with _partial_load(), ocp.training.Checkpointer(folder) as steps:
                loaded = steps.load_checkpointables(step, {"train": {"trainable": ours}})["train"]["trainable"]
        return merge(loaded, frozen.read(theirs) if theirs else {})

    return StoredParams(merge(trained, frozen.shapes), read, str(folder / str(step)))


def stored_params(path: str | Path) -> StoredParams:
    """The parameters of a run's workdir, an imported or a packed model. Raises InputError when it is none of them."""
    path = Path(path)
    if (path / PACKED).is_file():
        return _packed(path / PACKED)
    if (path / IMPORTED).is_dir():
        return _imported(epath.Path(path).resolve() / IMPORTED)
    if (path / "checkpoints" / "frozen").is_dir():
        return _of_run(epath.Path(path).resolve() / "checkpoints")
    raise InputError(str(path), "checkpoint", "is neither a training run nor an imported or packed model",
                     f"give a --workdir of train, the --out of an import, or a folder with {PACKED}")


def load_params(path: str | Path) -> Any:
    """The whole parameter tree behind `stored_params`, as NumPy arrays."""
    return stored_params(path).load()
