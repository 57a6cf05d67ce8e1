"""LLaMA with multi-head LoRA on every projection: one block, scanned over the layers and rematerialised.

Weights keep the Hugging Face layout (half-rotation RoPE, not permuted), so that LLaMA-2/3 and Qwen2 differ in their
LlamaConfig only. Norms, rotations and softmaxes are computed in float32. Source: the released file
models/unified_llama.py, which builds on LlamaModel of transformers. Activations have logical axes, which are bound to
a mesh inside `sharding.constrained` only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.models import attention, lora
from crab_jax.models.attention import MASKED, attention_weights, causal
from crab_jax.models.layers import RMSNorm, normal
from crab_jax.models.lora import LoraConfig, LoraDense
from crab_jax.models.shapes import (
    AttentionMask,
    CacheSlots,
    DropoutRows,
    Hidden,
    Ids,
    KeyMask,
    Logits,
    Positions,
    Rotation,
)

ROWS = 8  # rows of a product that a TPU's matrix unit takes at once
# What of a layer's forward pass is kept for the backward pass, which computes the rest again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
    "attention": jax.checkpoint_policies.save_only_these_names(attention.SAVED),  # and the result of attention
    # the same, and the result of every LoraDense
    "projections": jax.checkpoint_policies.save_only_these_names(attention.SAVED, lora.SAVED, lora.SAVED_LOW),
    # the same, in the memory of the host
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[lora.SAVED_LOW],
        names_which_can_be_offloaded=[attention.SAVED, lora.SAVED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # every product with a weight, also parts of sums
    "none": None,  # everything
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; the defaults are LLaMA-2-7B with Crab's 17 extra tokens.

    remat: one of `REMAT`, or "auto": a run chooses by its memory (runs/run_mesh.py), and the module takes "full".
    attention: one of `attention.KINDS`. dtype: compute dtype.
    """

    vocab_size: int = 32017
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_dim: int = 11008
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    qkv_bias: bool = False
    remat: str = "auto"
    attention: str = "auto"
    dtype: str = "bfloat16"

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and the output matrix: `vocab_size` rounded up to a multiple of 128."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


@flax.struct.dataclass
class KVCache:
    """Rotated keys [layers, B, kv_heads, head_dim, slots] and values [layers, B, kv_heads, slots, head_dim].

    Both have the axis order that attention's products read, so that a decode step transposes nothing.
    `generating.FusedLlama` keeps tuples with one array per layer, so that no layer is copied out of a stack.
    """

    k: Any
    v: Any


def init_cache(cfg: LlamaConfig, batch: int, length: int, dtype: str | None = None) -> KVCache:
    """Return an empty cache for `batch` rows of `length` slots, in `dtype` (the compute dtype by default)."""
    rows = (cfg.layers, batch, cfg.kv_heads)
    return KVCache(
        jnp.zeros((*rows, cfg.head_dim, length), dtype or cfg.dtype),
        jnp.zeros((*rows, length, cfg.head_dim), dtype or cfg.dtype),
    )


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """Return the same cache with `length` more slots, all empty."""

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, length if number == x.ndim + axis else 0) for number in range(x.ndim)])

    return KVCache(jax.tree.map(lambda k: padded(k, -1), cache.k), jax.tree.map(lambda v: padded(v, -2), cache.v))


def admitted(cache: KVCache, others: KVCache, rows: jax.Array) -> KVCache:
    """Return `cache` whose row i begins like row `rows[i]` of `others`, where `rows` int32[B] is not negative.

    `others` has at most as many slots, and all of them are taken, those without content too.
    """

    def begins(cache: jax.Array, other: jax.Array) -> jax.Array:
        chosen = (rows >= 0).reshape(-1, 1, 1, 1)
        there = tuple(slice(0, size) for size in other.shape[-2:])
        taken = jnp.take(other, jnp.maximum(rows, 0), axis=-4)
        return cache.at[..., *there].set(jnp.where(chosen, taken, cache[..., *there]))

    both: KVCache = jax.tree.map(begins, cache, others)
    return both


def rope(positions: Positions, head_dim: int, theta: float) -> Rotation:
    """Return the rotation (cos, sin), float32[B,L,1,head_dim/2] each, of positions int[B,L]."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [...,hd] by half-rotation RoPE, in float32: feature i pairs with feature i + hd/2.

    cos, sin: [...,hd/2], with axes that broadcast to those of x.
    """
    width = x.shape[-1]
    # -x[i + hd/2] for the first half and x[i - hd/2] for the second, as a product: exact, and on TPU several times as
    # fast as moving half a row of lanes.
    turn = np.roll(np.eye(width, dtype=np.float32), width // 2, axis=1) * np.repeat([-1.0, 1.0], width // 2)
    turned = jnp.matmul(x, turn.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Return `attend` [B,L,H*hd] to one layer of a cache.

    q: [B,L,H,hd]. k: [B,KH,hd,N]. v: [B,KH,N,hd]. mask: bool[B,L,N].
    """
    b, length, heads, width = q.shape
    q = q.reshape(b, length, k.shape[1], -1, width)
    out: jax.Array = jax.lax.platform_dependent(
        q, k, v, mask, cpu=_attend_cache_on_cpu, tpu=_attend_cache_on_tpu, default=_attend_cache
    )
    return out.reshape(b, length, heads * width)


def _attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Return [B,L,KH,G,hd] for q [B,L,KH,G,hd]."""
    scores = jnp.einsum("blkgd,bkdn->bkgln", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bkgln,bknd->blkgd", attention_weights(scores, mask, q.shape[-1]).astype(v.dtype), v)


def _attend_cache_on_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    # XLA's CPU backend has no batched product of bfloat16 matrices that gives float32.
    scores = jnp.einsum("blkgd,bkdn->bkgln", q.astype(jnp.float32), k.astype(jnp.float32))
    return jnp.einsum("bkgln,bknd->blkgd", attention_weights(scores, mask, q.shape[-1]).astype(v.dtype), v)


def _attend_cache_on_tpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Return `_attend_cache`, with queries padded to the rows that the matrix unit takes at once.

    XLA would make a product of fewer rows a sum on the vector unit, which takes 3 times as long. It lays out a cache
    that a loop writes to as [B,N,KH,hd], so the transpositions move nothing.
    """
    group = q.shape[3]
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, max(0, ROWS - q.shape[1] * group)), (0, 0)])
    scores = jnp.einsum("blkgd,bnkd->bkgln", q, k.transpose(0, 3, 1, 2), preferred_element_type=jnp.float32)
    weights = attention_weights(scores, mask, q.shape[-1]).astype(v.dtype)
    return jnp.einsum("bkgln,bnkd->blkgd", weights, v.transpose(0, 2, 1, 3))[:, :, :, :group]


def mask_pads(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Return the logits [..., padded_vocab] with those past `vocab_size` set to -1e30."""
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, MASKED)


class Attention(nn.Module):
    """Self-attention, with a cache or without.

    With a cache it writes the new keys and values into `slots` of layer `layer`, then attends to the slots that are
    `visible` bool[B,L,slots]. Without one it is causal, and sees the keys that are `visible` bool[B,L], or all.
    """

    cfg: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        cache: KVCache | None,
        layer: jax.Array,
        slots: CacheSlots | None,
        rotation: Rotation,
        visible: AttentionMask | KeyMask | None,
        dropout_rows: DropoutRows | None,
    ) -> tuple[Hidden, KVCache | None]:
        """Map x [B,L,D] and the cache, if any, to ([B,L,D], cache); `layer` int32[] is the index of this layer."""
        cfg = self.cfg
        dense = functools.partial(LoraDense, lora=self.lora, dtype=cfg.dtype)

        def heads(name: str, count: int, axis: str) -> jax.Array:
            layer = dense(count * cfg.head_dim, use_bias=cfg.qkv_bias, axes=("embed", axis), name=name)
            y = layer(x, dropout_rows).reshape(*x.shape[:2], count, cfg.head_dim)
            split: jax.Array = nn.with_logical_constraint(y, ("batch", None, axis, None))
            return split

        q = heads("q_proj", cfg.heads, "heads")
        k = heads("k_proj", cfg.kv_heads, "kv")
        v = heads("v_proj", cfg.kv_heads, "kv")
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            # Heads before positions, as attention's products read them.
            q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
            out = causal(q, k, v, cfg.attention, visible)
        else:
            assert visible is not None
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KVCache(
                cache.k.at[layer, rows, :, :, slots].set(k.astype(cache.k.dtype)),
                cache.v.at[layer, rows, :, slots].set(v.astype(cache.v.dtype)),
            )
            out = attend_cache(q, cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype), visible)
        return dense(cfg.hidden, axes=("heads", "embed"), name="o_proj")(out, dropout_rows), cache


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    cfg: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x: Hidden, dropout_rows: DropoutRows | None) -> Hidden:
        """Map x [B,L,D] to [B,L,D]."""
        dense = functools.partial(LoraDense, lora=self.lora, dtype=self.cfg.dtype)
        gate = dense(self.cfg.mlp_dim, axes=("embed", "mlp"), name="gate_proj")(x, dropout_rows)
        up = dense(self.cfg.mlp_dim, axes=("embed", "mlp"), name="up_proj")(x, dropout_rows)
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", None, "mlp"))
        return dense(self.cfg.hidden, axes=("mlp", "embed"), name="down_proj")(y, dropout_rows)


class Block(nn.Module):
    """One pre-norm layer in the form that `nn.scan` expects.

    The whole cache is part of the carry, instead of being scanned over, so that a decode step updates it in place.
    """

    cfg: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(
        self,
        carry: tuple[Hidden, KVCache | None],
        layer: jax.Array,
        slots: CacheSlots | None,
        rotation: Rotation,
        visible: AttentionMask | KeyMask | None,
        dropout_rows: DropoutRows | None,
    ) -> tuple[tuple[Hidden, KVCache | None], None]:
        """Map (x [B,L,D], cache) to ((x, cache), None) after this layer, whose index is `layer` int32[]."""
        x, cache = carry
        y = RMSNorm(self.cfg.rms_eps, name="input_layernorm")(x)
        y, cache = Attention(self.cfg, self.lora, name="self_attn")(
            y, cache, layer, slots, rotation, visible, dropout_rows
        )
        x = nn.with_logical_constraint(x + y, ("batch", None, None))
        y = RMSNorm(self.cfg.rms_eps, name="post_attention_layernorm")(x)
        x = x + MLP(self.cfg, self.lora, name="mlp")(y, dropout_rows)
        x = nn.with_logical_constraint(x, ("batch", None, None))
        if not self.is_initializing():
            self.sow("intermediates", "hidden", x)
        return (x, cache), None


def _layers(cfg: LlamaConfig, lora: LoraConfig | None) -> nn.Module:
    block = (
        Block
        if cfg.remat == "none"
        else nn.remat(Block, policy=REMAT["full" if cfg.remat == "auto" else cfg.remat], prevent_cse=False)
    )
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "router": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
        length=cfg.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(cfg, lora)


class Llama(nn.Module):
    """Decoder that takes embeddings.

    Parameters have the released names: `embed_tokens/embedding`, `layers/self_attn/q_proj/kernel` (with a leading axis
    over layers), `norm/scale`, `lm_head/kernel`. When the collection `intermediates` is mutable, its `layers/hidden` is
    the output of every layer as [layers,B,L,D], before the final norm. When `router` is mutable, it holds the router
    weights of every projection.
    """

    cfg: LlamaConfig
    lora: LoraConfig | None = None

    def setup(self) -> None:
        """Create the modules; linen calls this."""
        cfg = self.cfg
        self.embed_tokens = nn.Embed(
            cfg.padded_vocab,
            cfg.hidden,
            dtype=cfg.dtype,
            embedding_init=nn.with_logical_partitioning(normal, ("vocab", "embed")),
        )
        self.layers = _layers(cfg, self.lora)
        self.norm = RMSNorm(cfg.rms_eps)
        self.lm_head = nn.Dense(
            cfg.padded_vocab,
            use_bias=False,
            dtype=cfg.dtype,
            kernel_init=nn.with_logical_partitioning(normal, ("embed", "vocab")),
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
        )

    def embed(self, tokens: Ids) -> Hidden:
        """Look up the embeddings [B,...,D] of token ids int32[B,...].

        The table is sharded over its features. Each device looks up its features for the rows of its whole fsdp group,
        then the devices exchange features for rows: tokens and embeddings are communicated, the table is not.
        """
        inner = (None,) * (tokens.ndim - 1)
        embeddings = self.embed_tokens(nn.with_logical_constraint(tokens, ("group", *inner)))
        embeddings = nn.with_logical_constraint(embeddings, ("group", *inner, "embed"))
        spread: jax.Array = nn.with_logical_constraint(embeddings, ("batch", *inner, None))
        return spread

    def __call__(
        self,
        x: Hidden,
        positions: Positions,
        key_mask: KeyMask | None = None,
        cache: KVCache | None = None,
        slots: CacheSlots | None = None,
        dropout_rows: DropoutRows | None = None,
    ) -> tuple[Hidden, Any]:
        """Map embeddings [B,L,D] at `positions` int32[B,L] to (hidden [B,L,D] after the final norm, cache).

        `positions` rotate queries and keys; `slots` int32[B,L], required with a cache, are where the cache stores keys
        and values. Without a cache, attention is causal over the L inputs, and `key_mask` bool[B,L] also hides inputs
        that are False (left padding). With a cache, an input attends to the slots up to its own. A right-padded prompt
        therefore needs no mask: its padding lies in later slots, which decoding overwrites before it reads them.
        Raises ValueError for a cache without slots or with a key mask.
        """
        cfg = self.cfg
        if cache is None:
            visible = key_mask
        elif key_mask is None and slots is not None:
            visible = jnp.arange(cache.k.shape[-1]) <= slots[..., None]
        else:
            raise ValueError("a cache needs slots, and no key_mask: an input attends to the slots up to its own")
        rotation = rope(positions, cfg.head_dim, cfg.rope_theta)
        carry = (nn.with_logical_constraint(x.astype(cfg.dtype), ("batch", None, None)), cache)
        (x, cache), _ = self.layers(carry, jnp.arange(cfg.layers), slots, rotation, visible, dropout_rows)
        return self.norm(x), cache

    def output_matrix(self) -> jax.Array:
        """Return the output matrix [D,padded_vocab], gathered from the devices that share it."""
        kernel: Any = self.lm_head.variables["params"]["kernel"]
        gathered: jax.Array = nn.with_logical_constraint(kernel, (None, "vocab"))
        return gathered

    def logits(self, hidden: Hidden) -> Logits:
        """Map hidden [...,D] to logits float32[...,padded_vocab]; those past `vocab_size` are -1e30."""
        logits = mask_pads(self.lm_head(hidden), self.cfg.vocab_size)
        spread: Logits = nn.with_logical_constraint(logits, ("batch", *(None,) * (logits.ndim - 2), "vocab"))
        return spread
