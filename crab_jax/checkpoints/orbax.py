"""Orbax without its noise: trees read straight into their shards, trees written part by part, errors as InputError."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp_v0
import tensorstore as ts
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from crab_jax.checkpoints.digests import COPY_AGAIN, shard_checksum
from crab_jax.io.errors import InputError

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
CHUNK = 32 * 2**20  # bytes; what a host reads at once of a large imported leaf, so that it can restore only its shard


def first_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def in_plain_words(folder: epath.Path, read: Callable[[], Any], said: list[str] | None = None) -> Any:
    """What a function of Orbax gives; `said` gets what it warns of. Raises InputError that names the file, where it is
    known, or the folder."""
    try:
        with quiet(said):
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
def quiet(kept: list[str] | None = None) -> Iterator[None]:
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


def tree_metadata(folder: epath.Path, name: str | None = None) -> Any:
    """Shapes and dtypes of a tree on disk. Raises InputError."""
    said: list[str] = []
    tree = in_plain_words(folder, lambda: (ocp.metadata(folder, name) if name else ocp.metadata(folder)).metadata, said)
    if not isinstance(tree, dict):
        raise _unreadable(folder, " ".join(said).rpartition("Error details:")[2] or "it holds no tree of parameters")
    return tree


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
        self.sums[id(value)] = self.sums.get(id(value), 0) + shard_checksum(whole, value.shape, part)

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


def partial_load() -> ocp.Context:
    """Within it, a load may ask for some leaves of a tree only (never for none)."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def load_orbax(folder: epath.Path, wanted: Any) -> Any:
    """The leaves of a tree that `wanted` has, in its dtypes and shardings. Raises InputError when it is damaged."""

    def load() -> Any:
        with partial_load():
            return ocp.load(folder, wanted)

    return in_plain_words(folder, load)


def on_host(tree: Any) -> Any:
    """Abstract leaves placed in this host's memory (on its first device where JAX_PLATFORMS leaves out the CPU)."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
