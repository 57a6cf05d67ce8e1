"""LLaMA with multi-head LoRA on every projection: one scanned, rematerialised block.

Weights keep the Hugging Face layout (half-rotation RoPE, not permuted), so LLaMA-2/3 and Qwen2 sizes are configs.
Norms, rotations and softmaxes run in float32. Released file models/unified_llama.py on transformers' LlamaModel.
Activations carry logical axes; they bind to a mesh inside `sharding.constrained` only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crab_jax.models.layers import RMSNorm, normal
from crab_jax.models.lora import LoraConfig, LoraDense
from crab_jax.models.shapes import AttentionMask, CacheSlots, Hidden, Ids, KeyMask, Logits, Positions, Rotation

_MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the default is LLaMA-2-7B with Crab's 17 extra tokens.

    `remat`: "none", "full" (recompute the block), or "dots" (keep the results of weight products).
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
    remat: str = "full"
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

    Both are laid out as the products with them want their operands, so that a decode step reads them as they are.
    `generating.FusedLlama` keeps tuples of layers, so that none is copied out.
    """

    k: Any
    v: Any


def init_cache(cfg: LlamaConfig, batch: int, length: int, dtype: str | None = None) -> KVCache:
    """Empty cache for `batch` rows of up to `length` positions, in `dtype` (the compute dtype by default)."""
    rows = (cfg.layers, batch, cfg.kv_heads)
    return KVCache(
        jnp.zeros((*rows, cfg.head_dim, length), dtype or cfg.dtype),
        jnp.zeros((*rows, length, cfg.head_dim), dtype or cfg.dtype),
    )


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same cache with `length` more slots, all empty."""

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, length if number == x.ndim + axis else 0) for number in range(x.ndim)])

    return KVCache(jax.tree.map(lambda k: padded(k, -1), cache.k), jax.tree.map(lambda v: padded(v, -2), cache.v))


def rope(positions: Positions, head_dim: int, theta: float) -> Rotation:
    """positions int[B,L] -> (cos, sin) float32 [B,L,1,head_dim/2]."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-rotation RoPE in float32: x [B,L,H,hd], feature i pairs with i + hd/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention, q [B,L,H,hd], k and v [B,N,KH,hd], mask bool [B,L,N] -> [B,L,H*hd].

    Query head h reads key head h // (H/KH); grouping the queries avoids repeating the keys.
    """
    b, length, heads, width = q.shape
    # Heads before positions: on CPU the products then take two thirds of the time, backward too.
    grouped = q.reshape(b, length, k.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgld,bknd->bkgln", grouped, k, preferred_element_type=jnp.float32) * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED))
    out = jnp.einsum("bkgln,bknd->bkgld", weights.astype(v.dtype), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, length, heads * width)


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` to one layer of a cache: q [B,L,H,hd], k [B,KH,hd,N], v [B,KH,N,hd], mask bool [B,L,N] -> [B,L,H*hd]."""
    b, length, heads, width = q.shape
    grouped = q.reshape(b, length, k.shape[1], -1, width)
    product = functools.partial(jnp.einsum, "blkgd,bkdn->bkgln", preferred_element_type=jnp.float32)
    # XLA's CPU backend has no batched product of bfloat16 matrices that gives float32.
    scores = jax.lax.platform_dependent(
        grouped, k, cpu=lambda q, k: product(q.astype(jnp.float32), k.astype(jnp.float32)), default=product
    )
    scores = scores * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED))
    return jnp.einsum("bkgln,bknd->blkgd", weights.astype(v.dtype), v).reshape(b, length, heads * width)


def mask_pads(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits [..., padded_vocab] with those past `vocab_size` at -1e30."""
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, _MASKED)


class Attention(nn.Module):
    """Self-attention; with a cache it writes new keys and values into `slots` of layer `layer`, then reads them all."""

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
        mask: AttentionMask,
        deterministic: bool,
    ) -> tuple[Hidden, KVCache | None]:
        """x [B,L,D], layer int32[] -> ([B,L,D], cache)."""
        cfg = self.cfg
        dense = functools.partial(LoraDense, lora=self.lora, dtype=cfg.dtype)

        def heads(name: str, count: int, axis: str) -> jax.Array:
            layer = dense(count * cfg.head_dim, use_bias=cfg.qkv_bias, axes=("embed", axis), name=name)
            y = layer(x, deterministic).reshape(*x.shape[:2], count, cfg.head_dim)
            return nn.with_logical_constraint(y, ("batch", None, axis, None))

        q = heads("q_proj", cfg.heads, "heads")
        k = heads("k_proj", cfg.kv_heads, "kv")
        v = heads("v_proj", cfg.kv_heads, "kv")
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            out = attend(q, k, v, mask)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KVCache(
                cache.k.at[layer, rows, :, :, slots].set(k.astype(cache.k.dtype)),
                cache.v.at[layer, rows, :, slots].set(v.astype(cache.v.dtype)),
            )
            out = attend_cache(q, cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype), mask)
        return dense(cfg.hidden, axes=("heads", "embed"), name="o_proj")(out, deterministic), cache


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    cfg: LlamaConfig
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x: Hidden, deterministic: bool) -> Hidden:
        """x [B,L,D] -> [B,L,D]."""
        dense = functools.partial(LoraDense, lora=self.lora, dtype=self.cfg.dtype)
        gate = dense(self.cfg.mlp_dim, axes=("embed", "mlp"), name="gate_proj")(x, deterministic)
        up = dense(self.cfg.mlp_dim, axes=("embed", "mlp"), name="up_proj")(x, deterministic)
        y = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", None, "mlp"))
        return dense(self.cfg.hidden, axes=("mlp", "embed"), name="down_proj")(y, deterministic)


class Block(nn.Module):
    """One pre-norm layer in the form `nn.scan` wants: ((x, cache), layer, ...) -> ((x, cache), None).

    The cache is carried whole, not scanned over, so that a decode step updates it in place.
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
        mask: AttentionMask,
        deterministic: bool,
    ) -> tuple[tuple[Hidden, KVCache | None], None]:
        """carry (x [B,L,D], cache), layer int32[] -> the same of the next layer."""
        x, cache = carry
        y = RMSNorm(self.cfg.rms_eps, name="input_layernorm")(x)
        y, cache = Attention(self.cfg, self.lora, name="self_attn")(
            y, cache, layer, slots, rotation, mask, deterministic
        )
        x = nn.with_logical_constraint(x + y, ("batch", None, None))
        y = RMSNorm(self.cfg.rms_eps, name="post_attention_layernorm")(x)
        x = x + MLP(self.cfg, self.lora, name="mlp")(y, deterministic)
        x = nn.with_logical_constraint(x, ("batch", None, None))
        if not self.is_initializing():
            self.sow("intermediates", "hidden", x)
        return (x, cache), None


def _layers(cfg: LlamaConfig, lora: LoraConfig | None) -> nn.Module:
    policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    block = Block
    if cfg.remat != "none":
        block = nn.remat(Block, policy=policy[cfg.remat], prevent_cse=False, static_argnums=(6,))
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
    """Decoder over embeddings. Parameters follow the released names: `embed_tokens/embedding`,
    `layers/self_attn/q_proj/kernel` (leading layer axis), `norm/scale`, `lm_head/kernel`.

    Making the collection `intermediates` mutable returns every layer's output in `layers/hidden` as [layers,B,L,D]
    (before the final norm); making `router` mutable returns every projection's routing.
    """

    cfg: LlamaConfig
    lora: LoraConfig | None = None

    def setup(self) -> None:
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
        """int32[B,...] -> [B,...,D]. A device looks up its features for the rows of its whole fsdp group, then features
        are exchanged for rows: tokens and results travel, the table does not.
        """
        inner = (None,) * (tokens.ndim - 1)
        found = self.embed_tokens(nn.with_logical_constraint(tokens, ("group", *inner)))
        found = nn.with_logical_constraint(found, ("group", *inner, "embed"))
        return nn.with_logical_constraint(found, ("batch", *inner, None))

    def __call__(
        self,
        x: Hidden,
        positions: Positions,
        key_mask: KeyMask | None = None,
        cache: KVCache | None = None,
        deterministic: bool = True,
        slots: CacheSlots | None = None,
    ) -> tuple[Hidden, Any]:
        """Embeddings [B,L,D] and their positions int32[B,L] -> (hidden [B,L,D] after the final norm, cache).

        `positions` turn queries and keys; `slots` int32[B,L], needed with a cache, say where keys and values are kept.
        Without a cache attention is causal over the L inputs; `key_mask` bool[B,L] also hides inputs (left padding).
        With a cache an input attends to the slots up to its own, so a right-padded prompt needs no mask: its pads lie
        in later slots, which decoding overwrites before reading.
        """
        cfg = self.cfg
        if cache is None:
            length = x.shape[1]
            mask = jnp.tril(jnp.ones((1, length, length), bool))
            if key_mask is not None:
                mask = mask & key_mask[:, None, :]
        elif key_mask is None and slots is not None:
            mask = jnp.arange(cache.k.shape[-1]) <= slots[..., None]
        else:
            raise ValueError("a cache needs slots, and no key_mask: an input attends to the slots up to its own")
        rotation = rope(positions, cfg.head_dim, cfg.rope_theta)
        carry = (nn.with_logical_constraint(x.astype(cfg.dtype), ("batch", None, None)), cache)
        (x, cache), _ = self.layers(carry, jnp.arange(cfg.layers), slots, rotation, mask, deterministic)
        return self.norm(x), cache

    def logits(self, hidden: Hidden) -> Logits:
        """hidden [...,D] -> float32 [...,padded_vocab]; rows past `vocab_size` are -1e30."""
        logits = mask_pads(self.lm_head(hidden), self.cfg.vocab_size)
        return nn.with_logical_constraint(logits, ("batch", *(None,) * (logits.ndim - 2), "vocab"))
