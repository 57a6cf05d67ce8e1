"""Q-Former projector: learned queries read an encoder's tokens (released files: models/Qformer.py,
models/multimodal_encoder.py `VLProjector`, `ALProjector`)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.io.errors import InputError
from crab_jax.models.layers import dense, layer_norm, normal
from crab_jax.models.shapes import Tokens

_EPSILON = 1e-12  # of BERT's norms


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


class Attention(nn.Module):
    """BERT attention block: LN(x + dropout(dense(attend(x, keys)))). Softmax in float32.

    x [B,Q,C] queries, keys [B,N,K] attended tokens -> [B,Q,C].
    """

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, keys: Tokens, deterministic: bool) -> jax.Array:
        """x [B,Q,C], keys [B,N,K] -> [B,Q,C]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        dropout = nn.Dropout(cfg.dropout, deterministic=deterministic)
        q, k, v = (
            dense(cfg.width, name, dtype, normal)(y).reshape(*y.shape[:-1], cfg.heads, -1)
            for name, y in (("query", x), ("key", keys), ("value", keys))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = dropout(nn.softmax(logits)).astype(dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        return layer_norm("LayerNorm", dtype, _EPSILON)(x + dropout(dense(cfg.width, "dense", dtype, normal)(y)))


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the tokens, then the queries' own feed-forward."""

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, tokens: Tokens, deterministic: bool) -> tuple[jax.Array, None]:
        """x [B,Q,C], tokens [B,N,in_dim] -> ([B,Q,C], None), as `nn.scan` wants it."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = Attention(cfg, name="attention")(x, x, deterministic)
        x = Attention(cfg, name="crossattention")(x, tokens, deterministic)
        y = nn.gelu(dense(cfg.mlp_dim, "intermediate_query", dtype, normal)(x), approximate=False)
        y = nn.Dropout(cfg.dropout, deterministic=deterministic)(dense(cfg.width, "output_query", dtype, normal)(y))
        return layer_norm("output_query_norm", dtype, _EPSILON)(x + y), None


class QFormer(nn.Module):
    """Fixed number of language-model tokens from any number of encoder tokens.

    One frame or one audio window per row: fold those axes into the batch before the call.
    """

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: Tokens, deterministic: bool = True) -> jax.Array:
        """x [B,N,in_dim] -> [B,queries,out_dim] in `cfg.dtype`. Needs the `dropout` rng unless deterministic."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if x.ndim != 3 or x.shape[-1] != cfg.in_dim:
            raise InputError("QFormer", "x", f"shape {x.shape} is not [B,N,{cfg.in_dim}]", "fold frames into the batch")
        tokens = layer_norm("ln", dtype)(x)
        # Queries carry no position and no type embedding.
        queries = self.param("query_tokens", normal, (1, cfg.queries, cfg.width))
        y = layer_norm("embeddings_norm", dtype, _EPSILON)(jnp.broadcast_to(queries, (len(x), cfg.queries, cfg.width)))
        y = nn.Dropout(cfg.dropout, deterministic=deterministic)(y)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        y, _ = layers(cfg, name="layers")(y, tokens, deterministic)
        y = nn.gelu(dense(cfg.out_dim, "proj_0", dtype)(y), approximate=False)
        return dense(cfg.out_dim, "proj_2", dtype)(y)
