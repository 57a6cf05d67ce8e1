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
from jax.ad_checkpoint import checkpoint_name

from crab_jax.models.dropout import Dropout
from crab_jax.models.layers import head_weights, mix_heads, normal, product, torch_uniform
from crab_jax.models.shapes import DropoutRows

# Names by which a rematerialisation policy keeps the result of a layer, and its product with A and the router's scores.
SAVED, SAVED_LOW = "projection", "low"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Sizes of the LoRA update.

    heads: must match the weights (3 in the released ones). dropout_per_head: draw a dropout mask for every head, as
    the released trainer does, instead of one for all. dropout_bits: one of `dropout.BITS`.
    """

    rank: int = 8
    alpha: float = 16.0
    heads: int = 3
    dropout: float = 0.05
    dropout_per_head: bool = False
    dropout_bits: str = "hash"

    @property
    def scale(self) -> float:
        """Factor of the low-rank update, alpha / rank."""
        return self.alpha / self.rank


def _saved(y: jax.Array) -> jax.Array:
    named: jax.Array = checkpoint_name(y, SAVED)
    return named


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
    def __call__(self, x: jax.Array, dropout_rows: DropoutRows | None = None) -> jax.Array:
        """Map x [B, ..., in] to [B, ..., out] in `dtype`.

        With `dropout_rows`, dropout acts and needs the `dropout` rng.
        """
        x = x.astype(self.dtype)
        width, (in_axis, out_axis) = x.shape[-1], self.axes
        kernel = self._weight("kernel", normal, (width, self.features), (in_axis, out_axis))
        y = product(x, kernel)
        if self.use_bias:
            y = y + self._weight("bias", nn.initializers.zeros, (self.features,), (out_axis,)).astype(self.dtype)
        if self.lora is None:
            return _saved(y)
        rank, heads = self.lora.rank, self.lora.heads
        a = self._weight("lora_A", torch_uniform, (width, rank), (in_axis, None))
        b = self._weight("lora_B", nn.initializers.zeros, (heads, rank, self.features), (None, None, out_axis))
        route = self._weight("lora_route", torch_uniform, (width, heads), (in_axis, None))

        low, scores = (checkpoint_name(part, SAVED_LOW) for part in self._project(self.lora, x, a, route, dropout_rows))
        weights = head_weights(scores)
        if self.is_mutable_collection("router") and not self.is_initializing():
            self.sow("router", "weights", weights)
        y = y + product(mix_heads(low, weights, self.lora.scale), b.reshape(heads * rank, self.features))
        return _saved(y)

    def _weight(
        self, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.Array:
        weight: Any = self.param(name, nn.with_logical_partitioning(init, axes), shape)
        array: jax.Array = weight
        return array

    def _project(
        self, lora: LoraConfig, x: jax.Array, a: jax.Array, route: jax.Array, dropout_rows: DropoutRows | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return dropout(x) A as [..., 1 or heads, rank], and the router scores [..., heads]."""
        if dropout_rows is None or lora.dropout == 0.0:
            low, scores = jnp.split(product(x, jnp.concatenate([a, route], axis=1)), [lora.rank], axis=-1)
            return low[..., None, :], scores
        drop = Dropout(lora.dropout, lora.dropout_bits)
        draws = lora.heads if lora.dropout_per_head else 1
        return jnp.stack([product(drop(x, dropout_rows), a) for _ in range(draws)], axis=-2), product(x, route)
