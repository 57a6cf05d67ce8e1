"""Checkpoints of a run, and whole models in one folder. The only file that imports Orbax.

A run's `checkpoints/` holds `frozen/` (written once), one folder per step with `train` (trainable, optimizer, step),
and `manifest.json`. Every process writes and reads its own shards, into one folder that all must see; what was saved on
one mesh restores on another. The position of the input is the step. An imported model is a folder with the Orbax tree
`params/`, written leaf by leaf. A packed model is one with `params.safetensors`: small enough to hand around. Both also
hold `config.json` and the tokenizer, and `--checkpoint` and `init_from` take them like a run.

Each knows itself: digests of every leaf (`leaf_digests`) stand in the metadata of a step, in the manifest.json of a run
for `frozen`, and in that of a model, and what is read is checked against them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from crab_jax import finite, packaged
from crab_jax.convert.torch_file import read_safetensors
from crab_jax.errors import InputError
from crab_jax.files import need_room, replaced, whole, write_whole
from crab_jax.optim import merge
from crab_jax.structured import read_json

# Orbax's threads log what they raise with its traceback, and it is raised in the caller all the same; and it says that
# it replaces what a run that was stopped has left half.
_SAID_ELSEWHERE = (
    "_SignalingThread.run() raised",
    "in background save thread",
    "Save Finalize thread",
    "Removing existing directory since it is not finalized",
)
logging.getLogger("absl").addFilter(lambda record: not any(said in record.getMessage() for said in _SAID_ELSEWHERE))
# After the first error of a read its loop is closed, and each read that is under way still wants to tell it of its own.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _tell_unraisable(told: Any, others: Callable[[Any], Any] = sys.unraisablehook) -> None:
    error = told.exc_value
    late = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
    if not late and not isinstance(getattr(error, "__cause__", None), GeneratorExit):
        others(told)


sys.unraisablehook = _tell_unraisable

FORMAT = 1
PACKED, IMPORTED = "params.safetensors", "params"
MANIFEST = "manifest.json"
STEP_METADATA = "_CHECKPOINT_METADATA"  # of Orbax, within each step; `custom_metadata` in it is ours
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json")  # of a model, with its parameters
COPY_AGAIN = "it is damaged: copy or make it again"
LEAST = 0.6  # of the bytes of a tree that a checkpoint surely takes, compressed
CHUNK = 32 * 2**20  # bytes; what a host reads at once of a large imported leaf, so that it can restore only its shard


def describe_mismatch(wanted: Any, found: Any) -> list[str]:
    """Lines naming every leaf that is missing, extra, of another shape or kind of number between two trees."""
    wanted, found = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, found))
    lines = [
        f"{path}: missing in the checkpoint, the model wants {wanted[path].shape}"
        for path in wanted
        if path not in found
    ]
    lines += [f"{path}: unknown to the model" for path in found if path not in wanted]
    for path in (path for path in wanted if path in found):
        ours, theirs = wanted[path], found[path]
        if tuple(theirs.shape) != tuple(ours.shape):
            lines.append(f"{path}: checkpoint {theirs.shape}, model {ours.shape}")
        elif jnp.issubdtype(theirs.dtype, jnp.floating) != jnp.issubdtype(ours.dtype, jnp.floating):
            lines.append(f"{path}: checkpoint {theirs.dtype}, model {ours.dtype}")
    return lines


def check_match(wanted: Any, found: Any, where: str) -> None:
    """InputError that lists the mismatches of two trees, if any."""
    lines = describe_mismatch(wanted, found)
    if lines:
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise InputError(
            where,
            lines[0].split(":")[0],
            f"{len(lines)} parameters do not fit: {shown}",
            "use the config that the checkpoint was written with",
        )


def tree_hash(tree: Any) -> str:
    """SHA-256 over the paths, shapes, dtypes and checksums of every leaf: the same for any sharding and process count.

    Each process reads its own shards, one at a time.
    """
    return _hash_of(leaf_digests(tree))


def _hash_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(path + digest for path, digest in sorted(digests.items())).encode()).hexdigest()


def leaf_digests(tree: Any) -> dict[str, str]:
    """'/'-joined path -> shape, dtype and checksum of each leaf, as text; the same for any sharding and process count.

    What lies on accelerators is summed there; what lies on hosts, by each process for its own shards.
    """
    flat = dict(sorted(traverse_util.flatten_dict(_plain(tree), sep="/").items()))
    placed = {path: _placed_checksum(leaf) for path, leaf in flat.items() if _is_placed(leaf)}
    here = {path: leaf for path, leaf in flat.items() if path not in placed}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = np.array(list(pool.map(_checksum, here.values())), np.uint32)
    if here and jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    totals = dict(zip(here, sums.tolist(), strict=True)) | {path: int(x) for path, x in jax.device_get(placed).items()}
    return {path: f"{tuple(leaf.shape)}{leaf.dtype}{totals[path]}" for path, leaf in flat.items()}


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu"


@jax.jit
def _placed_checksum(leaf: jax.Array) -> jax.Array:
    """`_checksum` of a whole leaf, on its devices: uint32[]."""
    bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    bits = bits.astype(jnp.uint32)
    for axis in range(leaf.ndim):
        mixed = (jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) + jnp.uint32(axis + 1)) * jnp.uint32(2654435761)
        bits *= (mixed ^ (mixed >> 15)) | 1
    return bits.sum(dtype=jnp.uint32)


def _checksum(leaf: Any) -> int:
    """Sum modulo 2**32, over this process's shards, of each element's bits times an odd number for each of its indices:
    sums of disjoint shards add up to the sum of the leaf, and any one changed element changes it.
    """
    whole = tuple(slice(None) for _ in leaf.shape)
    shards = (
        [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        if isinstance(leaf, jax.Array)
        else [(whole, leaf)]
    )
    return sum(_shard_checksum(index, leaf.shape, data) for index, data in shards) % 2**32


def _shard_checksum(index: Sequence[slice | int], shape: Sequence[int], data: Any) -> int:
    """What the shard `data`, at `index` of a leaf of `shape`, adds to its checksum."""
    factors = []
    for axis, (taken, size) in enumerate(zip(index, shape, strict=True)):
        numbers = np.array([taken], np.uint32) if isinstance(taken, int) else np.arange(size, dtype=np.uint32)[taken]
        mixed = (numbers + np.uint32(axis + 1)) * np.uint32(2654435761)
        factors.append((mixed ^ (mixed >> np.uint32(15))) | np.uint32(1))
    bits = np.ascontiguousarray(data)
    bits = bits.view(np.dtype(f"u{bits.itemsize}")).reshape([len(factor) for factor in factors])
    total = 0
    for odd, part in zip(factors[0], bits, strict=True) if factors else [(1, bits)]:
        folded = part ^ (part >> np.uint64(32)) if part.itemsize == 8 else part
        summed = folded.astype(np.uint32)
        for factor in reversed(factors[1:]):
            summed = summed @ factor
        total += int(summed) * int(odd)
    return total % 2**32


def check_digests(kept: Mapping[str, str], tree: Any, where: str, below: str = "") -> None:
    """InputError that names the leaves of `tree` which are not those that were written. `below`: what precedes their
    paths in `kept`."""
    _refuse_changed([path for path, digest in leaf_digests(tree).items() if kept.get(below + path) != digest], where)


def _digest_here(leaf: np.ndarray) -> str:
    """The digest of a leaf that this host has whole."""
    return f"{tuple(leaf.shape)}{leaf.dtype}{_checksum(leaf)}"


def _refuse_changed(changed: Sequence[str], where: str) -> None:
    if changed:
        raise InputError(where, changed[0], f"{len(changed)} tensors are not those that were written", COPY_AGAIN)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


class RunCheckpoints:
    """The checkpoints of one run: asynchronous, atomic, newest `keep` kept."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = epath.Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        with _unsaid():  # of folders that are no steps
            self._steps = ocp.training.Checkpointer(
                self.folder, preservation_policy=ocp.training.preservation_policies.LatestN(keep)
            )
        self._frozen = ""  # hash of the frozen tree, as far as it is known
        self._saving: Any = None  # a step that is being written

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return max(_steps_of(self.folder), default=None)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was started with. Raises InputError when it cannot be read."""
        return _manifest(self.folder, "copy the folder again, or start anew in another --workdir")

    def note(self, manifest: dict[str, Any]) -> None:
        """Write the manifest."""
        if jax.process_index() == 0:
            write_whole(str(self.folder / MANIFEST), json.dumps(manifest, indent=1))

    def note_description(self) -> None:
        """Note in the manifest what the config and the tokenizer beside the checkpoints are."""
        manifest, files = self.manifest, _hashes_beside(self.folder.parent)
        if manifest.get("files") != files:
            self.note(manifest | {"files": files})

    def save_frozen(self, frozen: Any, manifest: dict[str, Any]) -> None:
        """Write the frozen tree once and the manifest that later restores are checked against."""
        self._set_foreign_aside()
        ocp.save(self.folder / "frozen", frozen, overwrite=True)
        digests = leaf_digests(frozen)
        self._frozen = _hash_of(digests)
        self.note(
            {
                "format": FORMAT,
                "frozen_hash": self._frozen,
                **manifest,
                "frozen": digests,
                "packages": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
            }
        )

    def load_frozen(self, wanted: Any) -> Any:
        """The frozen tree, straight into the dtypes and shards of `wanted`. Raises InputError when it is not what the
        run started with.
        """
        folder = self.folder / "frozen"
        check_match(wanted, _metadata(folder), str(folder))
        frozen = _load_orbax(folder, wanted)
        # Runs of an earlier version have another hash under another name.
        kept, found = self.manifest.get("frozen_hash"), tree_hash(frozen)
        if {kept, self._frozen} - {None, "", found}:
            raise InputError(
                str(folder),
                "frozen_hash",
                "the frozen weights are not those that the run started with",
                "copy the folder again, or start anew in another --workdir",
            )
        self._frozen = found
        return frozen

    def need_room(self, train: Any, frozen: Any = None) -> None:
        """Raise InputError where the disk cannot hold what a run will write: the frozen tree, if it is given, and the
        steps that are kept, with the next beside them. Trees may be abstract."""
        if jax.process_index() == 0:
            steps = max(1, self._keep + 1 - len(_steps_of(self.folder)))
            size = _tree_bytes(frozen or {}) + steps * _tree_bytes(train)
            need_room(
                str(self.folder),
                int(LEAST * size),
                f"a run of this size, with {self._keep} checkpoints and the next,",
                "--workdir",
            )

    def raise_failed(self) -> None:
        """Raise what has stopped the saving of a step, which else would be told when the next is saved."""
        if self._saving is not None:
            with contextlib.suppress(TimeoutError):  # it goes on
                self._saving.result(timeout=0)
                self._saving = None

    def save(self, step: int, train: Any) -> None:
        """Start writing one step in the background, with the digests of what is written and that of the frozen tree.

        Raises InputError for values that are not finite: nothing is written then, and the steps before stay.
        """
        try:
            finite.check(train, str(self.folder / str(step)))
        except InputError as error:
            self.wait()
            before = f"step {self.latest} before it is whole" if self.latest else "there is no step before it"
            raise InputError(
                error.where,
                error.field,
                f"{error.problem}; it is not saved, {before}",
                "start again with a lower optim.lr or larger optim.eps, in another --workdir",
            ) from error
        # Forced: by default Orbax drops a save while the one before is being written.
        self._saving = self._steps.save_checkpointables_async(
            step,
            {"train": train},
            force=True,
            custom_metadata={"step": step, "frozen_hash": self._frozen, "train": leaf_digests(train)},
        )

    def restore(self, train: Any) -> Any:
        """`train` tree of the newest step that is sound, with the shapes, dtypes and shardings of the given one.

        Newer steps that are damaged are set aside, by another name, and said. Raises the InputError of the newest where
        none is sound.
        """
        failed: dict[int, InputError] = {}
        for step in sorted(_steps_of(self.folder), reverse=True):
            try:
                found = self._restore(step, train)
                break
            except InputError as error:
                failed[step] = error
        else:
            raise next(iter(failed.values()))
        for number, error in failed.items():
            aside = self._set_aside(str(number))
            if jax.process_index() == 0:
                print(
                    f"warning: {error.where}: {error.problem}; this step is set aside as {aside}, and the run goes "
                    f"on from step {step}",
                    file=sys.stderr,
                    flush=True,
                )
        self._set_foreign_aside()
        self._steps.reload()
        return found

    def _restore(self, step: int, train: Any) -> Any:
        """One step; every process of a run comes to the same end."""
        folder = self.folder / str(step)
        found, error, kept = None, None, None
        try:
            kept = _step_metadata(folder)
            check_match(_plain(train), _plain(_metadata(folder, "train")), str(folder))
            found = _plainly(folder, lambda: self._steps.load_checkpointables(step, {"train": _abstract(train)}))
        except InputError as problem:
            error = problem
        if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(error is None)).all():
            error = error or InputError(str(folder), "", "cannot be read by another process", "see what it says")
        if error is not None or found is None:
            raise error or InputError(str(folder), "", "holds no train state", COPY_AGAIN)
        if kept:
            check_digests(kept["train"], found["train"], str(folder))
            if kept["step"] != step:
                raise InputError(str(folder), "step", f"is step {kept['step']}", "give the folder its own name")
        else:
            _tell_unverified(str(folder))
        finite.check(found["train"], str(folder))
        self._frozen = kept["frozen_hash"] if kept else ""
        return found["train"]

    def _set_aside(self, name: str) -> str:
        """Give a folder or file among the steps a name that no step has; that name."""
        number, old = 0, self.folder / name
        while (aside := self.folder / (f"{name}.damaged{number or ''}")).exists():
            number += 1
        multihost_utils.sync_global_devices(f"set {name} aside") if jax.process_count() > 1 else None
        if jax.process_index() == 0:
            old.rename(aside)
        multihost_utils.sync_global_devices(f"{name} is set aside") if jax.process_count() > 1 else None
        return aside.name

    def _set_foreign_aside(self) -> None:
        """What has the name of a step and is none would be in the way when that step is saved."""
        steps = _steps_of(self.folder)
        for name in sorted(path.name for path in self.folder.iterdir() if path.name.isdecimal()):
            if name != str(int(name)) or int(name) not in steps:
                aside = self._set_aside(name)
                if jax.process_index() == 0:
                    print(f"warning: {self.folder / name} holds no step; it is set aside as {aside}", file=sys.stderr)

    def wait(self) -> None:
        """Block until everything started is on disk."""
        self._steps.close()


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _plain(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict of its leaves (optimizer states are named tuples)."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        flat["/".join(_key(part) for part in path)] = leaf
    return traverse_util.unflatten_dict(flat, sep="/") if flat else {}


def _key(part: Any) -> str:
    return str(next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name)))


def _steps_of(folder: epath.Path) -> set[int]:
    """The steps in a run's `checkpoints/`, damaged ones among them; not what else has a number for its name."""
    return {
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal()
        and path.name == str(int(path.name))
        and ((path / "train").exists() or (path / STEP_METADATA).exists())
    }


def _step_metadata(folder: epath.Path) -> dict[str, Any] | None:
    """What `save` noted of a step; None for one of an older version. Raises InputError."""
    try:
        kept = read_json(str(folder / STEP_METADATA)).get("custom_metadata")
        if kept and not (
            isinstance(kept["train"], dict) and isinstance(kept["frozen_hash"], str) and isinstance(kept["step"], int)
        ):
            raise KeyError("train, step or frozen_hash")
        return kept or None
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            str(folder / STEP_METADATA), "", f"cannot be read ({_first_line(error)})", COPY_AGAIN
        ) from error


def _manifest(folder: epath.Path | Path, fix: str) -> dict[str, Any]:
    file = str(folder / MANIFEST)
    try:
        return read_json(file)
    except InputError as error:
        raise InputError(file, "", f"cannot be read ({error.problem})", fix) from error


def _first_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _plainly(folder: epath.Path, read: Callable[[], Any], said: list[str] | None = None) -> Any:
    """What a function of Orbax gives; `said` gets what it warns of. Raises InputError that names the file, where it is
    known, or the folder."""
    try:
        with _unsaid(said):
            return read()
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, the bare Exception among them
        raise _unreadable(folder, str(error) or type(error).__name__) from error


def _unreadable(folder: epath.Path, words: str) -> InputError:
    named = re.findall(re.escape(str(folder)) + r"[^\s\"',;:\]\)]*", words)
    return InputError(
        max(named, key=len).rstrip("./") if named else str(folder),
        "",
        f"cannot be read ({' '.join(words.split())[:200]})",
        COPY_AGAIN,
    )


@contextlib.contextmanager
def _unsaid(kept: list[str] | None = None) -> Iterator[None]:
    """While inside, what Orbax warns of, tracebacks among it, goes to `kept` and is not shown: we say what is wrong."""

    def keep(record: logging.LogRecord) -> bool:
        if kept is not None:
            kept.append(record.getMessage())
        return False

    logger = logging.getLogger("absl")
    logger.filters.insert(0, keep)  # of several, the innermost hears it
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _metadata(folder: epath.Path, name: str | None = None) -> Any:
    """Shapes and dtypes of a tree on disk. Raises InputError."""
    said: list[str] = []
    tree = _plainly(folder, lambda: (ocp.metadata(folder, name) if name else ocp.metadata(folder)).metadata, said)
    if not isinstance(tree, dict):
        raise _unreadable(folder, " ".join(said).rpartition("Error details:")[2] or "it holds no tree of parameters")
    return tree


def _flat(params: Any, dtype: Any) -> dict[str, np.ndarray]:
    """Leaves by path, on this host; floating ones in `dtype` when given."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        array = np.asarray(jax.device_get(leaf))
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        flat[path] = np.ascontiguousarray(array.astype(dtype) if dtype and floating else array)
    return flat


def save_tree(file: str | Path, params: Any, dtype: Any = None) -> None:
    """Write a parameter tree as one safetensors file, whole or not at all; floating leaves in `dtype` when given."""
    _save_flat(Path(file), finite.check(_flat(params, dtype), str(file)))


def _save_flat(file: Path, flat: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    need_room(file.parent, sum(leaf.nbytes for leaf in flat.values()), file.name)
    with whole(file) as partial_file:
        safetensors.numpy.save_file(dict(flat), partial_file)


def note_model(folder: str | Path, digests: Mapping[str, str]) -> None:
    """Write the manifest.json of an imported or packed model: the digests of its leaves and of the files beside."""
    described = {"format": FORMAT, "params": dict(digests), "files": _hashes_beside(Path(folder))}
    write_whole(Path(folder) / MANIFEST, json.dumps(described, indent=1))


def _hashes_beside(folder: Path | epath.Path) -> dict[str, str]:
    """SHA-256 of the config and the tokenizer in a folder, by name."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in BESIDE if (folder / name).is_file()
    }


def _check_beside(folder: Path | epath.Path, kept: Any, manifest: Path | epath.Path) -> None:
    """Raise InputError unless the config and the tokenizer in a folder are those that were written."""
    if not isinstance(kept, dict):
        raise InputError(str(manifest), "files", "is no object", COPY_AGAIN)
    found = _hashes_beside(folder)
    for name in BESIDE:
        if name in kept and kept[name] != found.get(name):
            problem = "is not what was written with this model" if name in found else "is missing"
            raise InputError(
                str(folder / name),
                "",
                problem,
                f"{COPY_AGAIN}; if you changed it on purpose, remove files from {manifest}",
            )


def _model_digests(folder: Path) -> dict[str, str] | None:
    """Digests of the leaves of an imported or packed model, whose other files are checked; None for one of an older
    version. Raises InputError."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = _manifest(folder, COPY_AGAIN)
    if "params" not in manifest:  # of another program
        return None
    if not isinstance(params := manifest["params"], dict):
        raise InputError(str(folder / MANIFEST), "params", "is no object", COPY_AGAIN)
    _check_beside(folder, manifest.get("files", {}), folder / MANIFEST)
    return params


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A leaf that need not fit in memory: `parts()` yields (leading indices, array) and covers it exactly once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: int  # leading axes that the parts index
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]

    def checked(self) -> Iterable[tuple[tuple[int, ...], np.ndarray]]:
        """The parts; ValueError when one does not fit, comes twice or is missing."""
        left = set(np.ndindex(self.shape[: self.stacked]))
        for index, part in self.parts():
            if index not in left or (part.shape, part.dtype) != (self.shape[self.stacked :], self.dtype):
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
        self.sums: dict[int, int] = {}  # by the id of a leaf

    def digest(self, value: Streamed, index: tuple[int, ...], part: np.ndarray) -> None:
        """Add what a part of a leaf adds to its checksum."""
        whole: list[slice | int] = [*index, *(slice(None) for _ in part.shape)]
        self.sums[id(value)] = self.sums.get(id(value), 0) + _shard_checksum(whole, value.shape, part)

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:  # type: ignore[override]
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._turn:
            if value.nbytes > CHUNK:
                for index, part in value.checked():
                    self.digest(value, index, part)
                    await store[index].write(part, can_reference_source_data_indefinitely=True)
            else:  # many small writes take longer than one
                whole = np.zeros(value.shape, value.dtype)
                for index, part in value.checked():
                    self.digest(value, index, part)
                    whole[index] = part
                await store.write(whole)


def save_streamed(folder: str | Path, leaves: Mapping[str, Streamed]) -> dict[str, str]:
    """Write a tree of '/'-joined paths as an Orbax checkpoint, in the leaves' dtypes, chunked by stacked layer; the
    digests of its leaves."""
    parts = _PartByPart()
    registry = ocp_v0.type_handlers.create_type_handler_registry(
        (Streamed, parts), (jax.Array, ocp_v0.type_handlers.ArrayHandler())
    )
    handler = ocp_v0.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)
    tree = traverse_util.unflatten_dict(dict(leaves), sep="/")
    layout = jax.tree.map(
        lambda leaf: (
            ocp_v0.SaveArgs()
            if leaf.nbytes <= CHUNK
            else ocp_v0.SaveArgs(shard_axes=tuple(range(leaf.stacked)), chunk_byte_size=CHUNK)
        ),
        tree,
    )
    with ocp_v0.Checkpointer(handler) as writer:
        writer.save(
            epath.Path(folder).resolve(),
            force=True,
            args=ocp_v0.args.PyTreeSave(tree, save_args=layout, ocdbt_target_data_file_size=8 * CHUNK),
        )
    return {
        path: f"{tuple(leaf.shape)}{leaf.dtype}{parts.sums.get(id(leaf), 0) % 2**32}" for path, leaf in leaves.items()
    }


def load_tree(file: str | Path, wanted: Any = None, digests: Mapping[str, str] | None = None) -> Any:
    """The parameter tree of one safetensors file, floating leaves as float32; with `wanted`, those leaves of it in
    their dtypes, each device reading its shard of the mapped file. Raises InputError when it is damaged, also by
    `digests`.
    """
    flat = read_safetensors(file)
    places = dict.fromkeys(flat) if wanted is None else traverse_util.flatten_dict(wanted, sep="/")
    if digests is not None:
        ours = {path: flat[path] for path in places}  # each process looks at the whole file
        _refuse_changed([path for path, leaf in ours.items() if digests.get(path) != _digest_here(leaf)], str(file))

    def load(path: str, place: Any) -> Any:
        leaf = flat[path]
        if place is None:
            return leaf.astype(np.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        return jax.make_array_from_callback(leaf.shape, place.sharding, lambda index: leaf[index].astype(place.dtype))

    return traverse_util.unflatten_dict({path: load(path, place) for path, place in places.items()}, sep="/")


def save_packed(
    folder: str | Path, params: Any, config: dict[str, Any], dtype: Any = None, tokenizer: Any = None
) -> None:
    """Write parameters, config and tokenizer into one folder: all of them are there, or what was there before."""
    flat = finite.check(_flat(params, dtype), str(Path(folder) / PACKED))
    with replaced(folder) as new:
        _save_flat(new / PACKED, flat)
        write_whole(new / "config.json", json.dumps(config, indent=1))
        if tokenizer is not None:
            tokenizer.save(new)
        note_model(new, {path: _digest_here(leaf) for path, leaf in flat.items()})


def _partial_load() -> ocp.Context:
    """Within it, a load may ask for some leaves of a tree only (never for none)."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def _load_orbax(folder: epath.Path, wanted: Any) -> Any:
    """The leaves of a tree that `wanted` has, in its dtypes and shardings. Raises InputError when it is damaged."""

    def load() -> Any:
        with _partial_load():
            return ocp.load(folder, wanted)

    return _plainly(folder, load)


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


def _as_written(
    read: Callable[[Any], Any], shapes: Any, kept: Mapping[str, str] | None, where: str, below: str = ""
) -> Callable[[Any], Any]:
    """`read`, whose leaves are checked against their digests before they take the dtypes that are asked for.

    Raises InputError at once when the shapes on disk are not those of the digests.
    """
    if kept is None:
        _tell_unverified(where)
        return read
    stored = traverse_util.flatten_dict(shapes, sep="/")
    ours = {path.removeprefix(below): digest for path, digest in kept.items() if path.startswith(below)}
    _refuse_changed(
        sorted(ours.keys() ^ stored.keys())
        or [path for path, leaf in stored.items() if not ours[path].startswith(f"{tuple(leaf.shape)}{leaf.dtype}")],
        where,
    )

    def checked(wanted: Any) -> Any:
        flat = traverse_util.flatten_dict(wanted, sep="/")
        found = read(
            traverse_util.unflatten_dict(
                {
                    path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype, sharding=leaf.sharding)
                    for path, leaf in flat.items()
                },
                sep="/",
            )
        )
        check_digests(ours, found, where)
        found = traverse_util.flatten_dict(found, sep="/")
        for path, leaf in flat.items():
            if found[path].dtype != leaf.dtype:
                found[path] = jax.device_put(found[path].astype(leaf.dtype), leaf.sharding)
        return traverse_util.unflatten_dict(found, sep="/")

    return checked


@functools.lru_cache(maxsize=64)
def _tell_unverified(where: str) -> None:
    if jax.process_index() == 0:
        print(f"{where} is of an older version and has no digests: it is not verified", file=sys.stderr, flush=True)


def _packed(file: Path) -> StoredParams:
    flat, digests = read_safetensors(file), _model_digests(file.parent)
    if digests is None:
        _tell_unverified(str(file))
    else:
        _refuse_changed(sorted(digests.keys() ^ flat.keys()), str(file))
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
        for path, leaf in flat.items()
    }
    return StoredParams(
        traverse_util.unflatten_dict(shapes, sep="/"), partial(load_tree, file, digests=digests), str(file)
    )


def _imported(folder: epath.Path, digests: Mapping[str, str] | None) -> StoredParams:
    shapes = _metadata(folder)
    return StoredParams(shapes, _as_written(partial(_load_orbax, folder), shapes, digests, str(folder)), str(folder))


def _of_run(folder: epath.Path) -> StoredParams:
    """Frozen and newest trainable parameters of a run's `checkpoints/`, as one tree. Raises InputError when that step
    is damaged: only training goes back to the one before."""
    steps = sorted(_steps_of(folder))
    if not steps:
        raise InputError(str(folder), "", "holds no finished checkpoint", "train first, or wait for the first save")
    step = folder / str(steps[-1])
    before = f"step {steps[-2]}, the one before" if steps[1:] else "another step"

    def plainly(read: Callable[[], Any]) -> Any:
        try:
            return _plainly(step, read)
        except InputError as error:
            raise InputError(
                error.where,
                error.field,
                error.problem,
                f"this step is damaged: give its folder another "
                f"name to take {before}, or start train again, which does so and goes on",
            ) from error

    kept = plainly(lambda: _step_metadata(step))
    trained = plainly(lambda: _metadata(step, "train")["trainable"])

    def load(wanted: Any) -> Any:
        with _partial_load(), ocp.training.Checkpointer(folder) as saved:
            return saved.load_checkpointables(steps[-1], {"train": {"trainable": wanted}})["train"]["trainable"]

    read_trained = plainly(lambda: _as_written(load, trained, kept and kept["train"], str(step), "trainable/"))
    manifest = _manifest(folder, COPY_AGAIN) if (folder / MANIFEST).exists() else {}
    _check_beside(folder.parent, manifest.get("files", {}), folder / MANIFEST)
    digests = manifest.get("frozen")
    if digests is not None and not isinstance(digests, dict):
        raise InputError(str(folder / MANIFEST), "frozen", "is no object", COPY_AGAIN)
    frozen = _imported(folder / "frozen", digests)
    in_trained = set(traverse_util.flatten_dict(trained))

    def read(wanted: Any) -> Any:
        flat = traverse_util.flatten_dict(wanted)
        ours, theirs = (
            traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if (path in in_trained) == kind})
            for kind in (True, False)
        )
        loaded = plainly(lambda: read_trained(ours)) if ours else {}
        return merge(loaded, frozen.read(theirs) if theirs else {})

    return StoredParams(merge(trained, frozen.shapes), read, str(step))


def stored_params(path: str | Path) -> StoredParams:
    """The parameters of a run's workdir, an imported or a packed model. Raises InputError when it is none of them."""
    path = packaged.located(path)
    if (path / PACKED).is_file():
        return _packed(path / PACKED)
    if (path / IMPORTED).is_dir():
        return _imported(epath.Path(path).resolve() / IMPORTED, _model_digests(path))
    if (path / "checkpoints" / "frozen").is_dir():
        return _of_run(epath.Path(path).resolve() / "checkpoints")
    raise InputError(
        str(path),
        "checkpoint",
        "is neither a training run nor an imported or packed model",
        f"give a --workdir of train, the --out of an import, or a folder with {PACKED}",
    )


def identity(path: str | Path) -> str:
    """A hash of what a checkpoint is, from the digests that it holds and the names, sizes and samples of its files: the
    same for a copy elsewhere. Of a run it is that of the newest step."""
    folder, found = packaged.located(path), hashlib.blake2b(digest_size=16)
    run = folder / "checkpoints"
    steps = _steps_of(epath.Path(run)) if run.is_dir() else set()
    newest = [run / str(max(steps))] if steps else []
    trees = [folder / PACKED, folder / IMPORTED, run / "frozen", *newest]
    files = [file for tree in trees for file in (tree.rglob("*") if tree.is_dir() else [tree]) if file.is_file()]
    for file in sorted(files):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with open(file, "rb") as content:  # those of older versions hold no digests
            for part in range(16):
                content.seek(size * part // 16)
                found.update(content.read(4096))
    for file in (
        *(folder / name for name in (*BESIDE, MANIFEST)),
        run / MANIFEST,
        *(file for file in files if file.name == STEP_METADATA),
    ):
        found.update(file.read_bytes() if file.is_file() else b"")
    return found.hexdigest()


def load_params(path: str | Path) -> Any:
    """The whole parameter tree behind `stored_params`, as NumPy arrays."""
    return stored_params(path).load()
