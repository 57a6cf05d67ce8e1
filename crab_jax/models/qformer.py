"""Q-Former projector: learned queries that attend to the tokens of an encoder.

Sources: released files models/Qformer.py and models/multimodal_encoder.py (`VLProjector`, `ALProjector`).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.io.errors import InputError
from crab_jax.models.dropout import Dropout
from crab_jax.models.layers import dense, layer_norm, normal
from crab_jax.models.shapes import DropoutRows, Tokens

_EPSILON = 1e-12  # of the norms in BERT


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the projector.

    in_dim: width of the encoder. out_dim: width of the language model. The others are the sizes of BERT.
    """

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
    """BERT attention block: LN(x + dropout(dense(attend(x, keys)))); the softmax is in float32."""

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, keys: Tokens, dropout_rows: DropoutRows | None) -> jax.Array:
        """Attend from the queries x [B,Q,C] to the tokens keys [B,N,K]: [B,Q,C]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        dropout = Dropout(cfg.dropout)
        q, k, v = (
            dense(cfg.width, name, dtype, normal)(y).reshape(*y.shape[:-1], cfg.heads, -1)
            for name, y in (("query", x), ("key", keys), ("value", keys))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
        weights = dropout(nn.softmax(logits), dropout_rows).astype(dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        out: jax.Array = layer_norm("LayerNorm", dtype, _EPSILON)(
            x + dropout(dense(cfg.width, "dense", dtype, normal)(y), dropout_rows)
        )
        return out


class Layer(nn.Module):
    """Self-attention among the queries, cross-attention to the tokens, then the feed-forward network of the queries."""

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, tokens: Tokens, dropout_rows: DropoutRows | None) -> tuple[jax.Array, None]:
        """Map queries x [B,Q,C] and tokens [B,N,in_dim] to ([B,Q,C], None), the form that `nn.scan` expects."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        x = Attention(cfg, name="attention")(x, x, dropout_rows)
        x = Attention(cfg, name="crossattention")(x, tokens, dropout_rows)
        y = nn.gelu(dense(cfg.mlp_dim, "intermediate_query", dtype, normal)(x), approximate=False)
        y = Dropout(cfg.dropout)(dense(cfg.width, "output_query", dtype, normal)(y), dropout_rows)
        return layer_norm("output_query_norm", dtype, _EPSILON)(x + y), None


class QFormer(nn.Module):
    """The projector: a fixed number of feature rows for the language model from any number of encoder tokens.

    A row holds one frame or one audio window: fold those axes into the batch before the call.
    """

    cfg: QFormerConfig

    @nn.compact
    def __call__(self, x: Tokens, dropout_rows: DropoutRows | None = None) -> jax.Array:
        """Map x [B,N,in_dim] to [B,queries,out_dim] in `cfg.dtype`.

        With `dropout_rows`, dropout acts and needs the `dropout` rng. Raises InputError for another shape.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if x.ndim != 3 or x.shape[-1] != cfg.in_dim:
            raise InputError("QFormer", "x", f"shape {x.shape} is not [B,N,{cfg.in_dim}]", "fold frames into the batch")
        tokens = layer_norm("ln", dtype)(x)
        # The queries have neither position nor type embeddings.
        queries = self.param("query_tokens", normal, (1, cfg.queries, cfg.width))
        y = layer_norm("embeddings_norm", dtype, _EPSILON)(jnp.broadcast_to(queries, (len(x), cfg.queries, cfg.width)))
        y = Dropout(cfg.dropout)(y, dropout_rows)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=cfg.layers,
        )
        y, _ = layers(cfg, name="layers")(y, tokens, dropout_rows)
        y = nn.gelu(dense(cfg.out_dim, "proj_0", dtype)(y), approximate=False)
        return dense(cfg.out_dim, "proj_2", dtype)(y)
