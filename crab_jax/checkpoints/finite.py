"""Checks that weights are finite when they are imported, loaded and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from crab_jax.io.errors import InputError

_BLOCK = 2**17  # elements checked together, so that they stay in the processor's cache


class Faults(NamedTuple):
    """The numbers of NaN and infinite values in an array, and its size."""

    nans: int
    infinite: int
    size: int

    def __str__(self) -> str:
        return f"{self.nans + self.infinite:,} of {self.size:,} values not finite ({self.nans:,} NaN)"


def all_finite(array: np.ndarray) -> bool:
    """Return whether every value is finite (always, for integers), from the maxima of the bits, at memory speed."""
    dtype = array.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return True
    if not np.isinf(np.array(np.inf).astype(dtype)):  # a dtype without infinity
        return bool(np.isfinite(array).all())
    flat = array.ravel(order="K")
    signed, unsigned = (np.dtype(f"{kind}{dtype.itemsize}") for kind in "iu")
    infinity, negative = np.array(np.inf).astype(dtype), np.array(-np.inf).astype(dtype)
    # Non-finite values have the largest exponent: their bits are the largest of the positive or the negative numbers.
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.view(signed).max() >= infinity.view(signed) or block.view(unsigned).max() >= negative.view(unsigned):
            return False
    return True


def faults(array: np.ndarray) -> Faults | None:
    """Return the faults of an array; None when it is finite."""
    if all_finite(array):
        return None
    nans = int(np.isnan(array).sum())
    return Faults(nans, int(array.size - np.isfinite(array).sum()) - nans, array.size)


def check(tree: Any, where: str) -> Any:
    """Return `tree` if every leaf is finite. Raises InputError naming the other leaves and the number of bad values.

    Leaves are NumPy or JAX arrays. Leaves on accelerators are checked there, in one program; all processes of a run
    come to the same result.
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
    faulty = {path: fault for path, leaf in flat.items() if not fine.get(path, False) and (fault := _faults(leaf))}
    elsewhere = not all(fine.values())
    if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in flat.values()):
        elsewhere = bool(multihost_utils.process_allgather(np.array(bool(faulty))).any())
    refuse(faulty, where)
    if elsewhere:
        raise InputError(where, "", "some parameters are not finite", "read the output of the other processes")
    return tree


@jax.jit
def _all_finite(leaves: tuple[jax.Array, ...]) -> jax.Array:
    """Return bool[N]: whether each leaf is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _faults(leaf: Any) -> Faults | None:
    """Return the `faults` of a leaf, or of this process's shards of it."""
    if not isinstance(leaf, jax.Array):
        return faults(np.asarray(leaf))
    faulty = [
        fault
        for shard in leaf.addressable_shards
        if shard.replica_id == 0 and (fault := faults(np.asarray(shard.data)))
    ]
    return Faults(*(sum(column) for column in zip(*faulty, strict=True))) if faulty else None


def refuse(faulty: Mapping[str, Faults], where: str) -> None:
    """Raise InputError listing the faults by tensor name, if there are any."""
    if faulty:
        shown = "; ".join(f"{name} has {fault}" for name, fault in list(faulty.items())[:3])
        more = f"; and {len(faulty) - 3} more" if len(faulty) > 3 else ""
        raise InputError(
            where,
            next(iter(faulty)),
            f"{len(faulty)} tensors are not finite: {shown}{more}",
            "fetch or write the weights again; a model with such values answers nothing",
        )
