"""Multi-head ("interaction-aware") LoRA: a linear layer whose low-rank update a router weights over heads per token.

    y = x W + (alpha / rank) * sum_h softmax(x R)_h * (dropout(x) A) B_h

All heads share one A. The router sees x without dropout, and its softmax is in float32. The update depends on the
token, so it cannot be merged into W. Sources: section 3.3 of the paper; released file peft_hyper/tuners/lora.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.models.layers import head_weights, mix_heads, normal, torch_uniform


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Sizes of the LoRA update.

    heads: must match the weights (3 in the released ones). dropout_per_head: draw a dropout mask for every head, as
    the released trainer does, instead of one for all.
    """

    rank: int = 8
    alpha: float = 16.0
    heads: int = 3
    dropout: float = 0.05
    dropout_per_head: bool = False

    @property
    def scale(self) -> float:
        """Factor of the low-rank update, alpha / rank."""
        return self.alpha / self.rank


class LoraDense(nn.Module):
    """Linear layer with an optional multi-head LoRA update.

    Parameters: `kernel` (in, out), `bias` (out,) if `use_bias`, and unless `lora` is None `lora_A` (in, rank),
    `lora_B` (heads, rank, out), `lora_route` (in, heads). `axes` are the logical axes of (in, out).
    When the collection `router` is mutable, router weights float32[..., heads] are sown into it.
    """

    features: int
    lora: LoraConfig | None
    use_bias: bool = False
    dtype: str = "float32"
    axes: tuple[str | None, str | None] = (None, None)

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """Map x [..., in] to [..., out] in `dtype`. Needs the `dropout` rng unless `deterministic`."""
        x = x.astype(self.dtype)
        width, (in_axis, out_axis) = x.shape[-1], self.axes
        kernel = self._weight("kernel", normal, (width, self.features), (in_axis, out_axis))
        y = x @ kernel
        if self.use_bias:
            y = y + self._weight("bias", nn.initializers.zeros, (self.features,), (out_axis,))
        if self.lora is None:
            return y
        rank, heads = self.lora.rank, self.lora.heads
        a = self._weight("lora_A", torch_uniform, (width, rank), (in_axis, None))
        b = self._weight("lora_B", nn.initializers.zeros, (heads, rank, self.features), (None, None, out_axis))
        route = self._weight("lora_route", torch_uniform, (width, heads), (in_axis, None))

        low, scores = self._project(self.lora, x, a, route, deterministic)
        weights = head_weights(scores)
        if self.is_mutable_collection("router") and not self.is_initializing():
            self.sow("router", "weights", weights)
        return y + mix_heads(low, weights, self.lora.scale) @ b.reshape(heads * rank, self.features)

    def _weight(
        self, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.Array:
        weight: Any = self.param(name, nn.with_logical_partitioning(init, axes), shape)
        cast: jax.Array = weight.astype(self.dtype)
        return cast

    def _project(
        self, lora: LoraConfig, x: jax.Array, a: jax.Array, route: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Return dropout(x) A as [..., 1 or heads, rank], and the router scores [..., heads]."""
        if deterministic or lora.dropout == 0.0:
            low, scores = jnp.split(x @ jnp.concatenate([a, route], axis=1), [lora.rank], axis=-1)
            return low[..., None, :], scores
        drop = nn.Dropout(lora.dropout, deterministic=False)
        draws = lora.heads if lora.dropout_per_head else 1
        return jnp.stack([drop(x) @ a for _ in range(draws)], axis=-2), x @ route
