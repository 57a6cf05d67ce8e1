"""Orbax without its log noise: sharded loading, writing in parts, and errors as InputError."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import math
import os
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
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from crab_jax.checkpoints.digests import COPY_AGAIN, shard_checksum
from crab_jax.io import paths
from crab_jax.io.errors import InputError

# Orbax's threads log errors with tracebacks, although the caller raises them too. Orbax also logs when it replaces the
# partial step of a stopped run.
_REDUNDANT = (
    "_SignalingThread.run() raised",
    "in background save thread",
    "Save Finalize thread",
    "Removing existing directory since it is not finalized",
)
logging.getLogger("absl").addFilter(lambda record: not any(words in record.getMessage() for words in _REDUNDANT))
# After the first error of a read, Orbax closes the event loop, and pending reads fail to report their own errors to it.
logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def _report_unraisable(event: Any, original: Callable[[Any], Any] = sys.unraisablehook) -> None:
    error = event.exc_value
    late = isinstance(error, RuntimeError) and "Event loop is closed" in str(error)
    if not late and not isinstance(getattr(error, "__cause__", None), GeneratorExit):
        original(event)


sys.unraisablehook = _report_unraisable


_RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "8s"}  # half a minute; by default a quarter hour


def _store_of(folder: str, original: Callable[[str], dict[str, Any]] = gcs_utils.get_kvstore_for_gcs) -> dict[str, Any]:
    """Return TensorStore's specification of a folder in a bucket; the endpoint of S3 comes from the usual variables."""
    if not folder.startswith("s3://"):
        return {**original(folder), "gcs_request_retries": _RETRIES}
    bucket, _, key = folder.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    named: dict[str, Any] = {
        "s3_request_retries": _RETRIES,
        "endpoint": endpoint,
        "aws_region": region or (endpoint and "us-east-1"),
    }
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # TensorStore otherwise looks for files first, and says so
        named["aws_credentials"] = {"type": "environment"}
    return {"driver": "s3", "bucket": bucket, "path": key} | {name: value for name, value in named.items() if value}


# Orbax writes to Google's buckets only; TensorStore, below it, to those of S3 too. These are the three functions in
# which Orbax tells the two kinds of storage apart; tests/test_buckets.py fails if a version of Orbax moves them.
_normal_path = tensorstore_utils._normalize_path
tensorstore_utils._use_gcs_driver = paths.is_remote
tensorstore_utils._normalize_path = lambda path: path.rstrip("/") if paths.is_remote(path) else _normal_path(path)
gcs_utils.get_kvstore_for_gcs = _store_of


COMMIT = "commit_success.txt"  # Orbax's marker


def orbax_path(folder: str | Path) -> epath.Path:
    """Return an absolute path for Orbax."""
    return epath.Path(str(folder) if paths.is_remote(folder) else Path(folder).resolve())


def finishing(folder: str | Path) -> ocp.Context:
    """Return the context for what is in a folder: in a bucket a checkpoint is finished by a marker, never by renaming.

    On a disk it is finished by renaming it.
    """
    context = ocp.Context()
    if paths.is_remote(folder):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return context


def is_finished(folder: Path) -> bool:
    """Return whether a checkpoint is whole; on a disk it has its name only then."""
    return not paths.is_remote(folder) or (folder / COMMIT).is_file()


CHUNK = 32 * 2**20  # bytes; chunk size of large imported leaves, so that a host can read only its shard


def first_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def in_plain_words(folder: Path, read: Callable[[], Any], said: list[str] | None = None) -> Any:
    """Return the result of a function that calls Orbax; `said` collects Orbax's warnings.

    Raises InputError naming the file, if known, or the folder.
    """
    try:
        with quiet(said):
            return read()
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, including bare Exception
        if failure := bucket_failure(folder, error):
            raise failure from error
        raise _unreadable(folder, str(error) or type(error).__name__) from error


# How TensorStore begins to say what says nothing about the files of a checkpoint.
_REFUSED, _SILENT = "PERMISSION_DENIED|UNAUTHENTICATED", "UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"


def bucket_failure(folder: Path, error: BaseException) -> OSError | None:
    """Return an error of Orbax or TensorStore as an OSError, if a bucket refused or did not answer; else None."""
    if not paths.is_remote(folder):
        return None
    if isinstance(error, OSError):
        return None if isinstance(error, FileNotFoundError) else error
    if type(error).__module__.split(".")[0] in ("gcsfs", "aiohttp", "botocore", "aiobotocore"):  # below epath
        from crab_jax.io.buckets import as_os_error  # imported late: runs on local disks need none of it

        return as_os_error(str(folder), error)
    return _failure_in(str(error), folder)


def _failure_in(words: str, folder: Path) -> OSError | None:
    said = " ".join(words.split())[:200]
    if paths.is_remote(folder) and re.search(_REFUSED, words):
        return PermissionError(errno.EACCES, f"The bucket refuses these credentials: {said}", str(folder))
    if paths.is_remote(folder) and re.search(_SILENT, words):
        return OSError(errno.EIO, f"The bucket does not answer: {said}", str(folder))
    return None


@contextlib.contextmanager
def telling_of_buckets(folder: Path) -> Iterator[None]:
    """Raise what a bucket fails to do in the context as an OSError that names the folder."""
    try:
        yield
    except Exception as error:
        if (failure := bucket_failure(folder, error)) and failure is not error:
            raise failure from error
        raise


def _unreadable(folder: Path, words: str) -> InputError:
    paths = re.findall(re.escape(str(folder)) + r"[^\s\"',;:\]\)]*", words)
    return InputError(
        max(paths, key=len).rstrip("./") if paths else str(folder),
        "",
        f"cannot be read ({' '.join(words.split())[:200]})",
        COPY_AGAIN,
    )


@contextlib.contextmanager
def quiet(kept: list[str] | None = None) -> Iterator[None]:
    """Hide Orbax's warnings and tracebacks within the context, and append them to `kept`; the caller reports errors."""

    def keep(record: logging.LogRecord) -> bool:
        if kept is not None:
            kept.append(record.getMessage())
        return False

    logger = logging.getLogger("absl")
    logger.filters.insert(0, keep)  # the innermost of nested contexts receives it
    try:
        yield
    finally:
        logger.removeFilter(keep)


def tree_metadata(folder: Path, name: str | None = None) -> Any:
    """Return the shapes and dtypes of a tree on disk. Raises InputError."""
    warnings: list[str] = []
    place = orbax_path(folder)
    tree = in_plain_words(
        folder, lambda: (ocp.metadata(place, name) if name else ocp.metadata(place)).metadata, warnings
    )
    if not isinstance(tree, dict):
        words = " ".join(warnings).rpartition("Error details:")[2] or "it holds no tree of parameters"
        raise _failure_in(words, folder) or _unreadable(folder, words)
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A leaf that need not fit in memory: `parts()` yields (leading indices, array) and covers it exactly once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: int  # leading axes that the parts index
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]

    def checked(self) -> Iterable[tuple[tuple[int, ...], np.ndarray]]:
        """Yield the parts. Raises ValueError when one has another shape or dtype, is repeated or is missing."""
        missing = set(np.ndindex(self.shape[: self.stacked]))
        for index, part in self.parts():
            if index not in missing or (part.shape, part.dtype) != (self.shape[self.stacked :], self.dtype):
                raise ValueError(f"part {index}: {part.dtype}{part.shape} in a leaf {self.dtype}{self.shape}")
            missing.remove(index)
            yield index, np.ascontiguousarray(part)
        if missing:
            raise ValueError(f"parts {sorted(missing)} are missing in a leaf {self.dtype}{self.shape}")

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size of the whole leaf in bytes."""
        return self.size * self.dtype.itemsize


class _PartByPart(ocp_v0.type_handlers.NumpyHandler):  # type: ignore[misc]  # Orbax ships no types
    """Writes `Streamed` leaves with one part in memory at a time. They can be restored like any other array."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()
        self.sums: dict[int, int] = {}  # id of a leaf -> checksum

    def digest(self, value: Streamed, index: tuple[int, ...], part: np.ndarray) -> None:
        """Add a part's contribution to the checksum of its leaf."""
        whole: list[slice | int] = [*index, *(slice(None) for _ in part.shape)]
        self.sums[id(value)] = self.sums.get(id(value), 0) + shard_checksum(whole, value.shape, part)

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        async with self._turn:
            if value.nbytes > CHUNK:
                for index, part in value.checked():
                    self.digest(value, index, part)
                    await store[index].write(part, can_reference_source_data_indefinitely=True)
            else:  # one write is faster than many small ones
                whole = np.zeros(value.shape, value.dtype)
                for index, part in value.checked():
                    self.digest(value, index, part)
                    whole[index] = part
                await store.write(whole)


def save_streamed(folder: str | Path, leaves: Mapping[str, Streamed]) -> dict[str, str]:
    """Write a tree of '/'-joined paths as an Orbax checkpoint and return the digests of its leaves.

    Leaves keep their dtypes and are chunked by stacked layer.
    """
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
    marker = ocp_v0.options.AtomicityOptions(mode=ocp_v0.options.AtomicityMode.COMMIT_FILE)
    with ocp_v0.Checkpointer(handler, atomicity_options=marker if paths.is_remote(folder) else None) as writer:
        writer.save(
            orbax_path(folder),
            force=True,
            args=ocp_v0.args.PyTreeSave(tree, save_args=layout, ocdbt_target_data_file_size=8 * CHUNK),
        )
    return {
        path: f"{tuple(leaf.shape)}{leaf.dtype}{parts.sums.get(id(leaf), 0) % 2**32}" for path, leaf in leaves.items()
    }


def partial_load(folder: Path) -> ocp.Context:
    """Return the context of a folder in which a load may request only some leaves of a tree (never none)."""
    context = finishing(folder)
    context.pytree.loading.partial_load = True
    return context


def load_orbax(folder: Path, wanted: Any) -> Any:
    """Return the leaves of a tree that `wanted` has, in its dtypes and shardings. Raises InputError for damage."""

    def load() -> Any:
        with partial_load(folder):
            return ocp.load(orbax_path(folder), wanted)

    return in_plain_words(folder, load)


def on_host(tree: Any) -> Any:
    """Return abstract leaves placed in this host's memory, or on its first device if JAX_PLATFORMS excludes the CPU."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
