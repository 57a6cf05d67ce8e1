"""Weight-only integers: a frozen matrix as int8 or int4 and float32 scales; activations keep their dtype.

int8 has one scale per output; int4 one per output and group of `GROUP` inputs. Rounding is to the nearest, symmetric
around zero, and a scale is the largest magnitude of what it covers over 127 or 7.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

BITS = {"int8": 8, "int4": 4}
GROUP = 64
OUTPUT = "int8"  # of the output matrix, whose errors no later layer evens out


def group_of(kind: str, width: int) -> int:
    """How many inputs of a matrix with `width` inputs share a scale."""
    return width if kind == "int8" else math.gcd(GROUP, width)


def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """kernel [in, out] -> `kernel` of `kind` [in, out] and `scale` float32 [in / group, out]."""
    width, out = kernel.shape
    grouped = kernel.astype(jnp.float32).reshape(-1, group_of(kind, width), out)
    most = 2 ** (BITS[kind] - 1) - 1
    scale = jnp.max(jnp.abs(grouped), axis=1) / most
    steps = jnp.round(grouped / jnp.where(scale == 0, 1, scale)[:, None])
    return {"kernel": steps.reshape(width, out).astype(kind), "scale": scale}


def dequantize(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 [in, out] that `quantize` stands for."""
    width, out = kernel.shape
    return (kernel.astype(jnp.float32).reshape(len(scale), -1, out) * scale[:, None]).reshape(width, out)


def rounded(llama: Any, kind: str) -> Any:
    """Parameters of `models.llama.Llama` whose matrices are what integers of `kind` stand for ("float": unchanged).

    The output matrix takes int8 at least; embeddings, norms, biases and LoRA are left alone.
    """

    def of(path: Any, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if kind not in BITS or names[-1] != "kernel":
            return leaf
        if "layers" in names:
            return jax.lax.map(lambda layer: dequantize(**quantize(layer, kind)), leaf)
        return dequantize(**quantize(leaf, OUTPUT))

    return jax.tree_util.tree_map_with_path(of, llama)


def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in] times a quantized matrix -> float32 [..., out]. Integers are widened where they are read."""
    if len(scale) == 1:
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32) * scale[0]
    return jnp.matmul(x, dequantize(kernel, scale).astype(x.dtype), preferred_element_type=jnp.float32)
