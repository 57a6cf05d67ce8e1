"""Digests of parameter trees, and comparisons of a tree with the expected one."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from crab_jax.io.errors import InputError

COPY_AGAIN = "it is damaged: copy or make it again"


def describe_mismatch(wanted: Any, stored: Any) -> list[str]:
    """Return a line for every leaf that is missing, extra, or of another shape or kind of number."""
    wanted, stored = (traverse_util.flatten_dict(tree, sep="/") for tree in (wanted, stored))
    lines = [
        f"{path}: missing in the checkpoint, the model wants {wanted[path].shape}"
        for path in wanted
        if path not in stored
    ]
    lines += [f"{path}: unknown to the model" for path in stored if path not in wanted]
    for path in (path for path in wanted if path in stored):
        expected, leaf = wanted[path], stored[path]
        if tuple(leaf.shape) != tuple(expected.shape):
            lines.append(f"{path}: checkpoint {leaf.shape}, model {expected.shape}")
        elif jnp.issubdtype(leaf.dtype, jnp.floating) != jnp.issubdtype(expected.dtype, jnp.floating):
            lines.append(f"{path}: checkpoint {leaf.dtype}, model {expected.dtype}")
    return lines


def check_match(wanted: Any, stored: Any, where: str) -> None:
    """Raise InputError listing the mismatches of two trees (see `describe_mismatch`), if any."""
    lines = describe_mismatch(wanted, stored)
    if lines:
        shown = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        raise InputError(
            where,
            lines[0].split(":")[0],
            f"{len(lines)} parameters do not fit: {shown}",
            "use the config that the checkpoint was written with",
        )


def tree_hash(tree: Any) -> str:
    """Return the SHA-256 over the paths, shapes, dtypes and checksums of every leaf.

    It is the same for any sharding and process count; each process reads its own shards, one at a time.
    """
    return hash_of(leaf_digests(tree))


def hash_of(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 of a tree from the digests of its leaves."""
    return hashlib.sha256("".join(path + digest for path, digest in sorted(digests.items())).encode()).hexdigest()


def leaf_digests(tree: Any) -> dict[str, str]:
    """Return {'/'-joined path: text of shape, dtype and checksum} of every leaf, the same for any sharding.

    Leaves on accelerators are summed there, leaves on hosts by each process for its own shards.
    """
    flat = dict(sorted(traverse_util.flatten_dict(plain(tree), sep="/").items()))
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
    """Return the `_checksum` of a whole leaf, computed on its devices: uint32[]."""
    bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    bits = bits.astype(jnp.uint32)
    for axis in range(leaf.ndim):
        mixed = (jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) + jnp.uint32(axis + 1)) * jnp.uint32(2654435761)
        bits *= (mixed ^ (mixed >> 15)) | 1
    return bits.sum(dtype=jnp.uint32)


def _checksum(leaf: Any) -> int:
    """Return the checksum of this process's shards of a leaf.

    The sum, modulo 2**32, has each element's bits times an odd number for each of its indices: sums of disjoint shards
    add up to the sum of the leaf, and any one changed element changes it.
    """
    whole = tuple(slice(None) for _ in leaf.shape)
    shards = (
        [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        if isinstance(leaf, jax.Array)
        else [(whole, leaf)]
    )
    return sum(shard_checksum(index, leaf.shape, data) for index, data in shards) % 2**32


def shard_checksum(index: Sequence[slice | int], shape: Sequence[int], data: Any) -> int:
    """Return the contribution of the shard `data`, at `index` of a leaf of `shape`, to the leaf's checksum."""
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
    """Raise InputError naming the leaves of `tree` that differ from those written.

    kept: digests as written. below: precedes the paths of `tree` in `kept`.
    """
    refuse_changed([path for path, digest in leaf_digests(tree).items() if kept.get(below + path) != digest], where)


def host_digest(leaf: np.ndarray) -> str:
    """Return the digest of a leaf that is whole on this host."""
    return f"{tuple(leaf.shape)}{leaf.dtype}{_checksum(leaf)}"


def refuse_changed(changed: Sequence[str], where: str) -> None:
    """Raise InputError naming the changed leaves, if any."""
    if changed:
        raise InputError(where, changed[0], f"{len(changed)} tensors are not those that were written", COPY_AGAIN)


def plain(tree: Any) -> dict[str, Any]:
    """Convert any pytree to a nested dict of its leaves (optimizer states are named tuples)."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        flat["/".join(_key(part) for part in path)] = leaf
    return traverse_util.unflatten_dict(flat, sep="/") if flat else {}


def _key(part: Any) -> str:
    return str(next(getattr(part, name) for name in ("key", "idx", "name") if hasattr(part, name)))


@functools.lru_cache(maxsize=64)
def tell_unverified(where: str) -> None:
    """Print once that a checkpoint has no digests and is not verified."""
    if jax.process_index() == 0:
        print(f"{where} is of an older version and has no digests: it is not verified", file=sys.stderr, flush=True)
