"""Whether weights are numbers: counted while they are imported and loaded, so that a broken model never answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from crab_jax.io.errors import InputError

_BLOCK = 2**17  # elements that are looked at together, so that they stay in the processor's cache


class Faults(NamedTuple):
    """How many values of an array are no numbers, and how many are infinite, of how many."""

    nans: int
    infinite: int
    size: int

    def __str__(self) -> str:
        return f"{self.nans + self.infinite:,} of {self.size:,} values not finite ({self.nans:,} NaN)"


def all_finite(array: np.ndarray) -> bool:
    """Whether every value is finite; integers are. Twice the largest of the bits tell, at the speed of memory."""
    dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return True
    if not np.isinf(np.array(np.inf).astype(dtype)):  # a kind without infinity
        return bool(np.isfinite(array).all())
    flat = array.ravel(order="K")
    signed, unsigned = (np.dtype(f"{kind}{dtype.itemsize}") for kind in "iu")
    infinity, negative = np.array(np.inf).astype(dtype), np.array(-np.inf).astype(dtype)
    # What is not finite has the largest exponent: among the largest bits of the positive ones, and of the negative.
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.view(signed).max() >= infinity.view(signed) or block.view(unsigned).max() >= negative.view(unsigned):
            return False
    return True


def faults(array: np.ndarray) -> Faults | None:
    """What is not finite in an array, None when all of it is."""
    if all_finite(array):
        return None
    nans = int(np.isnan(array).sum())
    return Faults(nans, int(array.size - np.isfinite(array).sum()) - nans, array.size)


def check(tree: Any, where: str) -> Any:
    """`tree`, when every leaf is finite. Raises InputError that names the leaves that are not, and how many values.

    Leaves are NumPy or JAX arrays. What lies on accelerators is looked at there, in one program; every process of a
    run comes to the same end.
    """
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    placed = {
        path: leaf
        for path, leaf in flat.items()
        if isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu"
    }
    fine = dict(zip(placed, jax.device_get(_all_finite(tuple(placed.values()))), strict=True)) if placed else {}
    found = {path: fault for path, leaf in flat.items() if not fine.get(path, False) and (fault := _faults(leaf))}
    elsewhere = not all(fine.values())
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in flat.values()):
        elsewhere = bool(multihost_utils.process_allgather(np.array(bool(found))).any())
    refuse(found, where)
    if elsewhere:
        raise InputError(where, "", "some parameters are not finite", "see what the other processes say")
    return tree


@jax.jit
def _all_finite(leaves: tuple[jax.Array, ...]) -> jax.Array:
    """bool[N]: whether each leaf is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _faults(leaf: Any) -> Faults | None:
    """`faults` of a leaf, or of this process's shards of it."""
    if not isinstance(leaf, jax.Array):
        return faults(np.asarray(leaf))
    found = [
        fault
        for shard in leaf.addressable_shards
        if shard.replica_id == 0 and (fault := faults(np.asarray(shard.data)))
    ]
    return Faults(*(sum(column) for column in zip(*found, strict=True))) if found else None


def refuse(found: Mapping[str, Faults], where: str) -> None:
    """Raise InputError for faults, by the name of what has them."""
    if found:
        shown = "; ".join(f"{name} has {fault}" for name, fault in list(found.items())[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            where,
            next(iter(found)),
            f"{len(found)} tensors are not finite: {shown}{more}",
            "fetch or write the weights again; a model with such values answers nothing",
        )
