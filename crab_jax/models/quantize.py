"""Weight-only quantisation: a frozen matrix as int8 or int4 with float32 scales; activations keep their dtype.

int8 has one scale per output, int4 one per output and group of `GROUP` inputs. Quantisation is symmetric around zero
and rounds to the nearest integer. A scale is the largest magnitude among its values, divided by 127 or 7.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

BITS = {"int8": 8, "int4": 4}
GROUP = 64
FEW = 64  # rows of a product whose time is that of reading the matrix, even if every row is three
OUTPUT = "int8"  # kind of the output matrix, whose errors no later layer evens out


def group_of(kind: str, width: int) -> int:
    """Return how many inputs share a scale in a matrix with `width` inputs."""
    return width if kind == "int8" else math.gcd(GROUP, width)


def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """Quantise kernel [in, out] to `kernel` [in, out] of dtype `kind`, and `scale` float32[in / group, out]."""
    width, out = kernel.shape
    grouped = kernel.astype(jnp.float32).reshape(-1, group_of(kind, width), out)
    most = 2 ** (BITS[kind] - 1) - 1
    scale = jnp.max(jnp.abs(grouped), axis=1) / most
    steps = jnp.round(grouped / jnp.where(scale == 0, 1, scale)[:, None])
    return {"kernel": steps.reshape(width, out).astype(kind), "scale": scale}


def dequantize(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the float32[in, out] that a quantised matrix represents."""
    width, out = kernel.shape
    return (kernel.astype(jnp.float32).reshape(len(scale), -1, out) * scale[:, None]).reshape(width, out)


def rounded(llama: Any, kind: str) -> Any:
    """Return parameters of `models.llama.Llama` with their matrices rounded as `kind` does ("float": unchanged).

    The output matrix is rounded as `OUTPUT`; embeddings, norms, biases and LoRA are unchanged.
    """

    def of(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if kind not in BITS or names[-1] != "kernel":
            return leaf
        if "layers" in names:
            layers: jax.Array = jax.lax.map(lambda layer: dequantize(**quantize(layer, kind)), leaf)
            return layers
        return dequantize(**quantize(leaf, OUTPUT))

    return jax.tree_util.tree_map_with_path(of, llama)


def integer_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x [..., in] times an int8 matrix [in, out], float32[..., out], as a product of integers.

    Every row of x becomes three of int8, the digits of its values as multiples of the row's largest magnitude / 127,
    in base 128. They represent a value to 2^-22 of that magnitude, so that values down to 2^-13 of it keep the
    precision of bfloat16.
    """
    wide = x.astype(jnp.float32)
    unit = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    rest, digits = wide / jnp.where(unit == 0, 1, unit), []
    for _ in range(3):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 128
    rows = jnp.stack(digits).astype(jnp.int8)
    high, middle, low = jnp.matmul(rows, kernel, preferred_element_type=jnp.int32).astype(jnp.float32)
    value: jax.Array = (high + (middle + low / 128) / 128) * unit
    return value


def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """Return x [..., in] times a quantised matrix, float32[..., out].

    Integers are converted as they are read, except on a TPU in a product of few rows (`integer_product`): there the
    conversion takes longer than reading.
    """

    def converting(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    if len(scale) == 1:
        few = math.prod(x.shape[:-1]) <= FEW
        tpu = integer_product if few else converting
        of_integers: jax.Array = jax.lax.platform_dependent(x, kernel, tpu=tpu, default=converting)
        return of_integers * scale[0]
    return jnp.matmul(x, dequantize(kernel, scale).astype(x.dtype), preferred_element_type=jnp.float32)
