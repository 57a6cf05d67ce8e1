"""LLaMA in the layout for generation: the same function as `llama.Llama`, with fewer and larger matrix products.

Projections that share an input (q, k, v; gate, up) are one matrix, which also holds the columns of their LoRA A and
router matrices. Decoding a token reads every weight once and launches a few products per layer; the layout for
training has four per projection. Each layer has its own parameters, so that no step copies a layer out of a stack. The
base matrices may be integers (crab_jax/models/quantize.py). LoRA and router matrices keep the compute dtype, because
the LoRA update depends on the token and cannot be merged. `fuse` makes the parameters, once per loaded model.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.models import quantize
from crab_jax.models.layers import RMSNorm, head_weights, mix_heads
from crab_jax.models.llama import KVCache, LlamaConfig, attend_cache, mask_pads, rope, rotate
from crab_jax.models.lora import LoraConfig
from crab_jax.models.shapes import AttentionMask, CacheSlots, Hidden, Ids, Logits, Positions, Rotation

KINDS = ("float", *quantize.BITS)  # dtypes of base matrices: the compute dtype, or integers
LANES = 64  # columns of a fused matrix are a multiple of this
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_zeros = nn.initializers.zeros


class JointDense(nn.Module):
    """Linear layers that share an input, with their multi-head LoRA, as one matrix product.

    Parameters: `kernel` [in, sum(widths) + columns of LoRA A and router]; for an integer kernel [in, sum(widths)],
    beside it `scale`, and `low` [in, columns of LoRA A and router]; `lora_B_<i>` [heads * rank, width]; `bias`
    [sum(widths)] if `use_bias`.
    """

    widths: tuple[int, ...]
    lora: LoraConfig | None
    kind: str
    dtype: str
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Map x [..., in] to one [..., width] in `dtype` for each of `widths`."""
        x, inputs, out = x.astype(self.dtype), x.shape[-1], sum(self.widths)
        each = 0 if self.lora is None else self.lora.rank + self.lora.heads
        extra = _padded(len(self.widths) * each)
        if self.kind == "float":
            kernel = self.param("kernel", _zeros, (inputs, out + extra), self.dtype)
            y, low = jnp.split(product(x, kernel), [out], axis=-1)
        else:
            y = integer_product(self, x, out, self.kind).astype(self.dtype)
            low = product(x, self.param("low", _zeros, (inputs, extra), self.dtype))
        if self.use_bias:
            y = y + self.param("bias", _zeros, (out,), self.dtype)
        outputs = jnp.split(y, [sum(self.widths[:i]) for i in range(1, len(self.widths))], axis=-1)
        if self.lora is None:
            return outputs
        rank, heads = self.lora.rank, self.lora.heads
        parts = low[..., : len(self.widths) * each].reshape(*low.shape[:-1], len(self.widths), each)
        low = mix_heads(parts[..., None, :rank], head_weights(parts[..., rank:]), self.lora.scale)
        return [
            y + low[..., i, :] @ self.param(f"lora_B_{i}", _zeros, (heads * rank, width), self.dtype)
            for i, (y, width) in enumerate(zip(outputs, self.widths, strict=True))
        ]


def product(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """Return x [..., in] times kernel [in, out] in `dtype`, by default that of both.

    On a TPU a single row is multiplied twice, because the product of one row with a matrix is a sum on the vector unit,
    which takes 3 times as long as the matrix unit takes for a few rows.
    """
    plain = partial(jnp.matmul, preferred_element_type=dtype)
    if math.prod(x.shape[:-1]) > 1:
        return plain(x, kernel)
    once: jax.Array = jax.lax.platform_dependent(
        x, kernel, tpu=lambda x, kernel: plain(jnp.concatenate([x, x]), kernel)[:1], default=plain
    )
    return once


def integer_product(module: nn.Module, x: jax.Array, out: int, kind: str) -> jax.Array:
    """Return x [..., in] times the integer parameters `kernel` and `scale` of `module`: float32 [..., out]."""
    width = x.shape[-1]
    scales = width // quantize.group_of(kind, width)
    return quantize.product(
        x, module.param("kernel", _zeros, (width, out), kind), module.param("scale", _zeros, (scales, out), jnp.float32)
    )


def _padded(columns: int) -> int:
    return -(-columns // LANES) * LANES


class FusedBlock(nn.Module):
    """One pre-norm layer with its own cache."""

    cfg: LlamaConfig
    lora: LoraConfig | None
    kind: str

    @nn.compact
    def __call__(
        self, x: Hidden, cache: KVCache, slots: CacheSlots, rotation: Rotation, mask: AttentionMask
    ) -> tuple[Hidden, KVCache]:
        """Map x [B,L,D] and the cache of this layer to (x [B,L,D], cache) after the layer."""
        cfg = self.cfg

        def dense(name: str, *widths: int, use_bias: bool = False) -> JointDense:
            return JointDense(widths, self.lora, self.kind, cfg.dtype, use_bias, name=name)

        b, length = slots.shape
        y = RMSNorm(cfg.rms_eps, name="input_layernorm")(x)
        kv = cfg.kv_heads * cfg.head_dim
        q, k, v = (
            y.reshape(b, length, -1, cfg.head_dim) for y in dense("qkv", cfg.hidden, kv, kv, use_bias=cfg.qkv_bias)(y)
        )
        q, k = jnp.split(rotate(jnp.concatenate([q, k], axis=2), *rotation), [cfg.heads], axis=2)
        rows = jnp.arange(b)[:, None]
        cache = KVCache(
            cache.k.at[rows, :, :, slots].set(k.astype(cache.k.dtype)),
            cache.v.at[rows, :, slots].set(v.astype(cache.v.dtype)),
        )
        x = x + dense("o", cfg.hidden)(attend_cache(q, cache.k.astype(q.dtype), cache.v.astype(q.dtype), mask))[0]
        y = RMSNorm(cfg.rms_eps, name="post_attention_layernorm")(x)
        gate, up = dense("gate_up", cfg.mlp_dim, cfg.mlp_dim)(y)
        return x + dense("down", cfg.hidden)(nn.silu(gate) * up)[0], cache


class Output(nn.Module):
    """The output matrix; unless `kind` is "float" its integers are those of `quantize.OUTPUT`."""

    cfg: LlamaConfig
    kind: str

    @nn.compact
    def __call__(self, hidden: Hidden) -> Logits:
        """Map hidden [..., D] to float32[..., padded_vocab]."""
        hidden, out = hidden.astype(self.cfg.dtype), self.cfg.padded_vocab
        if self.kind == "float":
            kernel = self.param("kernel", _zeros, (hidden.shape[-1], out), self.cfg.dtype)
            return product(hidden, kernel, jnp.float32)
        return integer_product(self, hidden, out, quantize.OUTPUT)


class FusedLlama(nn.Module):
    """`llama.Llama` with a cache, on the parameters that `fuse` makes.

    Its cache holds tuples with one array per layer.
    """

    cfg: LlamaConfig
    lora: LoraConfig | None = None
    kind: str = "float"

    def setup(self) -> None:
        """Create the modules; linen calls this."""
        cfg = self.cfg
        self.embed_tokens = nn.Embed(cfg.padded_vocab, cfg.hidden, dtype=cfg.dtype, param_dtype=cfg.dtype)
        self.layers = [FusedBlock(cfg, self.lora, self.kind) for _ in range(cfg.layers)]
        self.norm = RMSNorm(cfg.rms_eps)
        self.lm_head = Output(cfg, self.kind)

    def embed(self, tokens: Ids) -> Hidden:
        """Look up the embeddings [..., D] of token ids int32[...]."""
        return self.embed_tokens(tokens)

    def __call__(self, x: Hidden, positions: Positions, cache: KVCache, slots: CacheSlots) -> tuple[Hidden, KVCache]:
        """Map embeddings [B,L,D] at `positions` int32[B,L] to (hidden [B,L,D] after the final norm, cache).

        See `Llama.__call__` for the arguments. The cache comes from `init_cache` or from an earlier call.
        """
        mask = jnp.arange(cache.v[0].shape[-2]) <= slots[..., None]
        rotation = rope(positions, self.cfg.head_dim, self.cfg.rope_theta)
        x, filled = x.astype(self.cfg.dtype), []
        for number, layer in enumerate(self.layers):
            x, kept = layer(x, KVCache(cache.k[number], cache.v[number]), slots, rotation, mask)
            filled.append(kept)
        return self.norm(x), KVCache(tuple(kept.k for kept in filled), tuple(kept.v for kept in filled))

    def logits(self, hidden: Hidden) -> Logits:
        """Map hidden [...,D] to logits float32[...,padded_vocab]; those past `vocab_size` are -1e30."""
        return mask_pads(self.lm_head(hidden), self.cfg.vocab_size)


def by_layer(cache: KVCache) -> KVCache:
    """Return a cache of `FusedLlama` with the contents of one of `Llama`."""
    return KVCache(tuple(cache.k), tuple(cache.v))


def fuse(params: Any, cfg: LlamaConfig, lora: LoraConfig | None, kind: str, placement: Any = None) -> Any:
    """Return parameters of `FusedLlama(cfg, lora, kind)` from those of `Llama(cfg, lora)`, sharded as `placement`.

    Layers are fused one at a time: when `params` are NumPy arrays, a device holds only the result and one layer.
    """

    def outer(embed_tokens: Any, norm: Any, lm_head: Any) -> Any:
        plain = {"embed_tokens": embed_tokens, "norm": norm} | ({"lm_head": lm_head} if kind == "float" else {})
        cast = jax.tree.map(lambda leaf: leaf.astype(cfg.dtype), plain)
        return cast | ({} if kind == "float" else {"lm_head": _base(lm_head["kernel"], quantize.OUTPUT)})

    fused = jax.jit(outer, out_shardings=placement)(params["embed_tokens"], params["norm"], params["lm_head"])
    block = jax.jit(lambda layer: _fuse_block(layer, cfg, lora, kind), out_shardings=placement)
    for number in range(cfg.layers):
        fused[f"layers_{number}"] = block(jax.tree.map(lambda leaf, n=number: leaf[n], params["layers"]))
    return fused


def _fuse_block(layer: Any, cfg: LlamaConfig, lora: LoraConfig | None, kind: str) -> Any:
    attention, mlp = layer["self_attn"], layer["mlp"]
    joint = {
        "qkv": [attention[name] for name in _QKV],
        "o": [attention["o_proj"]],
        "gate_up": [mlp[name] for name in _GATE_UP],
        "down": [mlp["down_proj"]],
    }
    norms = {name: layer[name] for name in ("input_layernorm", "post_attention_layernorm")}
    return jax.tree.map(lambda leaf: leaf.astype(cfg.dtype), norms) | {
        name: _fuse_dense(dense, cfg.dtype, lora, kind) for name, dense in joint.items()
    }


def _fuse_dense(dense: list[Any], dtype: str, lora: LoraConfig | None, kind: str) -> dict[str, jax.Array]:
    """Return the parameters of a JointDense from those of the LoraDense layers that it joins."""
    kernel = jnp.concatenate([p["kernel"] for p in dense], axis=1)
    columns = (
        [jnp.zeros((len(kernel), 0))]
        if lora is None
        else [jnp.concatenate([p["lora_A"], p["lora_route"]], axis=1) for p in dense]
    )
    low = jnp.concatenate(columns, axis=1)
    low = jnp.pad(low, [(0, 0), (0, _padded(low.shape[1]) - low.shape[1])]).astype(dtype)
    fused: dict[str, jax.Array] = {}
    if kind == "float":
        fused["kernel"] = jnp.concatenate([kernel.astype(dtype), low], axis=1)
    else:
        fused |= {**_base(kernel, kind), "low": low}
    if lora is not None:
        fused |= {
            f"lora_B_{i}": p["lora_B"].reshape(-1, p["lora_B"].shape[-1]).astype(dtype) for i, p in enumerate(dense)
        }
    if "bias" in dense[0]:
        fused["bias"] = jnp.concatenate([p["bias"] for p in dense]).astype(dtype)
    return fused


def _base(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    return {"kernel": kernel} if kind == "float" else quantize.quantize(kernel, kind)
