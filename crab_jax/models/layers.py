"""Layers that several modules share: norms, PyTorch's initialisation, and the mixing of LoRA heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# PyTorch's kaiming_uniform(a=sqrt(5)), the default of its linear and convolution layers: uniform in +-1/sqrt(fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
normal = nn.initializers.normal(0.02)  # of BERT and LLaMA


def layer_norm(name: str, dtype: Any, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Return a LayerNorm over the last axis, with PyTorch's two-pass variance."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def dense(features: int, name: str, dtype: Any, init: Any = torch_uniform) -> nn.Dense:
    """Return a linear layer from [..., in] to [..., features], initialised as in PyTorch unless `init` is given."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


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
