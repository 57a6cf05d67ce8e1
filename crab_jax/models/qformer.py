"""Q-Former projector: learned queries read an encoder's tokens (released files: models/Qformer.py,
models/multimodal_encoder.py `VLProjector`, `ALProjector`)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.io.errors import InputError


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """in_dim: encoder width; out_dim: language model width; the rest are the BERT sizes."""

    in_dim: int
    out_dim: int
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    layers: int = 2
    queries: int = 32
    dropout: float = 0.1
    dtype: str = "bfloat16"


def _norm(name: str, dtype: jnp.dtype, epsilon: float = 1e-12) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


def _dense(features: int, name: str, dtype: jnp.dtype) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class Attention(nn.Module):
    """BERT attention block: LN(x + dropout(dense(attend(x, keys)))). Softmax in float32.

    x [B,Q,C] queries, keys [B,N,K] attended tokens -> [B,Q,C].
    """

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array, deterministic: bool) -> jax.Array:
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        dropout = nn.Dropout(cfg.dropout, deterministic=deterministic)
        q, k, v = (
            _dense(cfg.width, name, dtype)(y).reshape(*y.shape[:-1], cfg.heads, -1)
            for name, y in (("query", x), ("key", keys), ("value", keys))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = dropout(nn.softmax(logits)).astype(dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return _norm("LayerNorm", dtype)(x + dropout(_dense(cfg.width, "dense", dtype)(y)))


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the tokens, then the queries' own feed-forward."""

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, tokens: jax.Array, deterministic: bool):
        """x [B,Q,C], tokens [B,N,in_dim]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = Attention(cfg, name="attention")(x, x, deterministic)
        x = Attention(cfg, name="crossattention")(x, tokens, deterministic)
        y = nn.gelu(_dense(cfg.mlp_dim, "intermediate_query", dtype)(x), approximate=False)
        y = nn.Dropout(cfg.dropout, deterministic=deterministic)(_dense(cfg.width, "output_query", dtype)(y))
        return _norm("output_query_norm", dtype)(x + y), None


class QFormer(nn.Module):
    """Fixed number of language-model tokens from any number of encoder tokens.

    One frame or one audio window per row: fold those axes into the batch before the call.
    """

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        """x [B,N,in_dim] -> [B,queries,out_dim] in `cfg.dtype`. Needs the `dropout` rng unless deterministic."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if x.ndim != 3 or x.shape[-1] != cfg.in_dim:
            raise InputError("QFormer", "x", f"shape {x.shape} is not [B,N,{cfg.in_dim}]", "fold frames into the batch")
        tokens = _norm("ln", dtype, epsilon=1e-5)(x)
        # Queries carry no position and no type embedding.
        queries = self.param("query_tokens", nn.initializers.normal(0.02), (1, cfg.queries, cfg.width))
        y = _norm("embeddings_norm", dtype)(jnp.broadcast_to(queries, (len(x), cfg.queries, cfg.width)))
        y = nn.Dropout(cfg.dropout, deterministic=deterministic)(y)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        y, _ = layers(cfg, name="layers")(y, tokens, deterministic)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's default for a linear layer
        y = nn.gelu(nn.Dense(cfg.out_dim, dtype=dtype, kernel_init=init, name="proj_0")(y), approximate=False)
        return nn.Dense(cfg.out_dim, dtype=dtype, kernel_init=init, name="proj_2")(y)
