"""Dropout whose bits are a hash of where an element stands, so that a step depends on neither mesh nor micro-batches.

An element is dropped by the number of its row in the batch, its place in the row, and the key of its layer and step.
Every device computes the bits of its own elements, where they are used, and computes them again in the backward pass.
Threefry, JAX's generator, costs several times as much and was a fifth of a training step on TPU; JAX's "rbg" gives
every device of a mesh the bits of all devices. The hash is the finaliser "lowbias32" of C. Wellons' hash-prospector.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.models.shapes import DropoutRows

BITS = ("hash", "threefry")


class Dropout(nn.Module):
    """Zero elements with probability `rate`, and divide the others by 1 - rate.

    bits: "hash" (see above), or "threefry": JAX's generator with a key for every row.
    """

    rate: float
    bits: str = "hash"

    @nn.compact
    def __call__(self, x: jax.Array, rows: DropoutRows | None) -> jax.Array:
        """Map x [B,...] to the same shape and dtype; without `rows` nothing is dropped.

        Needs the `dropout` rng unless `rows` is None or the rate 0.
        """
        if rows is None or self.rate == 0:
            return x
        with jax.named_scope("dropout_bits"):  # the name under which `compile --thorough` counts them
            kept = keep(self.make_rng("dropout"), rows, x.shape[1:], self.rate, self.bits)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


def keep(key: jax.Array, rows: DropoutRows, shape: tuple[int, ...], rate: float, bits: str = "hash") -> jax.Array:
    """Return bool[B, *shape]: whether each element is kept, which has probability 1 - rate.

    key: of `jax.random.key`. rows: the number of each row in its batch, int32[B].
    """
    if bits == "threefry":
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return jax.vmap(lambda own: jax.random.bernoulli(own, 1 - rate, shape))(keys)
    first, second = jax.random.key_data(key).reshape(-1)[:2].astype(jnp.uint32)
    *outer, width = shape or (1,)
    places = jnp.arange(math.prod(outer), dtype=jnp.uint32)
    of_row = _mixed(_mixed(rows.astype(jnp.uint32) ^ first) ^ second)
    of_place = _mixed(of_row[:, None] ^ _mixed(places + first))  # [B, elements of all axes but the last]
    of_feature = _mixed(jnp.arange(width, dtype=jnp.uint32) ^ second)
    mixed = _mixed(of_place[..., None] ^ of_feature, last=False).astype(jnp.int32)
    # Both sides are shifted by 2**31, because a comparison of signed integers is one instruction on a TPU.
    kept: jax.Array = mixed >= round(rate * 2**32) - 2**31
    return kept.reshape(len(rows), *shape)


def _mixed(x: jax.Array, last: bool = True) -> jax.Array:
    """Return uint32[...] whose bits each depend on all bits of x uint32[...]; a bijection.

    Without the `last` step this is true of the upper bits only, which decide a comparison.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16) if last else x
