"""Layers that several modules share: norms, PyTorch's initialisation, and the mixing of LoRA heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# PyTorch's kaiming_uniform(a=sqrt(5)), the default of its linear and convolution layers: uniform in +-1/sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
normal = nn.initializers.normal(0.02)  # of BERT and LLaMA


def layer_norm(name: str, dtype: Any, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Return a LayerNorm over the last axis, with PyTorch's two-pass variance."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def dense(features: int, name: str, dtype: Any, init: Any = torch_uniform) -> Dense:
    """Return a linear layer from [..., in] to [..., features], initialised as in PyTorch unless `init` is given."""
    return Dense(features, dtype, init, name=name)


@jax.custom_vjp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x [..., in] times weight [in, out] in the dtype of x; the weight's gradient has the weight's dtype.

    A weight that is cast before the product gets its gradient in the dtype of x instead: in bfloat16 it would be
    rounded on every device before it is added over devices and micro-batches.
    """
    return x @ weight.astype(x.dtype)


def _product_forward(x: Any, weight: Any) -> tuple[jax.Array, Any]:
    kept = x.value if weight.perturbed else None  # a frozen weight needs no gradient
    return product(x.value, weight.value), (kept, weight.value)


def _product_backward(kept: Any, cotangent: Any) -> tuple[jax.Array | None, jax.Array | None]:
    x, weight = kept
    if isinstance(cotangent, SymbolicZero):
        return None, None
    of_x = cotangent @ weight.astype(cotangent.dtype).T
    if x is None:
        return of_x, None
    flat = (x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1]))
    of_weight = jnp.einsum("ni,no->io", *flat, preferred_element_type=jnp.float32)
    return of_x, of_weight.astype(weight.dtype)


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Dense(nn.Module):
    """Linear layer with a bias, in `dtype`; parameters `kernel` [in, features] and `bias` [features]."""

    features: int
    dtype: Any
    kernel_init: Any = torch_uniform

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., in] to [..., features] in `dtype`."""
        kernel: jax.Array = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias: jax.Array = self.param("bias", nn.initializers.zeros, (self.features,))
        y = product(x.astype(self.dtype), kernel)
        return (y.astype(jnp.promote_types(self.dtype, jnp.float32)) + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale; the statistic is in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D] in the dtype of x."""
        scale: Any = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scaled: jax.Array = wide.astype(x.dtype) * scale.astype(x.dtype)
        return scaled


def head_weights(scores: jax.Array) -> jax.Array:
    """Return the weights of the LoRA heads, float32[..., heads], from router scores [..., heads]: their softmax."""
    return jax.nn.softmax(scores.astype(jnp.float32))


def mix_heads(low: jax.Array, weights: jax.Array, scale: float) -> jax.Array:
    """Return the low-rank projection weighted for every head, [..., heads * rank] in the dtype of `low`.

    low: [..., heads or 1, rank]. weights: float32[..., heads]. scale: alpha / rank. Weighting before the product with B
    makes the sum over heads a single product with the stacked matrices B [heads * rank, out].
    """
    mixed = (weights * scale).astype(low.dtype)[..., None] * low
    return mixed.reshape(*mixed.shape[:-2], mixed.shape[-2] * mixed.shape[-1])
