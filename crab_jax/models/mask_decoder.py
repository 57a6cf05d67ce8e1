"""The mask branch: six mask-token states and two CLIP feature maps to a binary mask and 71 class maps.

Source: Crab (CVPR 2025) section 3 and models/multimodal_encoder.py (`SegModule`, `MaskDecoderMultiScale`,
`TwoWayTransformer`, `QueryGenerator`). Module names follow the released checkpoints; feature maps are channels-last.
Notation: B samples, D language width, C image width, E decoder width, Q queries, g grid side, N = g * g.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from crab_jax.io.errors import InputError
from crab_jax.models.layers import dense, layer_norm, torch_uniform
from crab_jax.models.shapes import BinaryLogits, MaskStates, SemanticLogits, Tokens

KINDS = ("binary", "semantic")
# PyTorch's default for Linear and Conv kernels: uniform with variance 1 / (3 fan_in).
_EMBED_INIT = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class SegConfig:
    """Sizes of the mask branch.

    llm_dim: D. image_dim: C. grid: g, side of the CLIP patch grid. image_size: side of the output, pixels.
    dim: E. queries: Q. mlp_dim, query_mlp_dim: hidden sizes of the two-way blocks and of the query generator.
    depth: two-way blocks per level. scales, tokens_per_scale: the mask tokens are scales x tokens_per_scale, row-major.
    low_res: side, in pixels, at which the two levels are averaged. classes: semantic classes, background included.
    chain_queries: feed each query-generator layer with the one before it (the paper). False gives every layer the
        learned queries, so that only the last one counts (the released code and its weights).
    dtype: compute dtype; parameters, position encodings and the returned logits are float32.
    """

    llm_dim: int = 4096
    image_dim: int = 1024
    grid: int = 16
    image_size: int = 224
    dim: int = 256
    queries: int = 300
    heads: int = 8
    mlp_dim: int = 2048
    query_layers: int = 2
    query_mlp_dim: int = 2048
    depth: int = 2
    scales: int = 2
    tokens_per_scale: int = 3
    low_res: int = 112
    classes: int = 71
    chain_queries: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.scales != 2:
            raise InputError("SegConfig", "scales", f"is {self.scales}", "the decoder has exactly two levels: use 2")
        if self.dim % (2 * self.heads):
            raise InputError(
                "SegConfig",
                "dim",
                f"{self.dim} is no multiple of 2 * heads = {2 * self.heads}",
                "choose dim and heads so that attention at half width splits evenly",
            )


def _conv(features: int, size: int, dtype: Any, name: str | None, use_bias: bool = False) -> nn.Conv:
    return nn.Conv(
        features, (size, size), padding="SAME", use_bias=use_bias, dtype=dtype, kernel_init=torch_uniform, name=name
    )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Multi-head softmax attention, q [B,Q,E], k and v [B,K,E] -> [B,Q,E]; the softmax is in float32."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores).astype(v.dtype), v)
    return out.reshape(*out.shape[:2], -1)


def resize(x: jax.Array, size: int) -> jax.Array:
    """Bilinear [B,h,w,C] -> [B,size,size,C], half-pixel centres, no antialiasing (`F.interpolate`)."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "bilinear", antialias=False)


def _fold(parts: list[jax.Array]) -> jax.Array:
    """k arrays [B,...] -> [B*k,...], the parts of a sample side by side. Unlike a concatenation this keeps rows that
    are spread over devices where they are (within `sharding.constrained`).
    """
    x = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))


class Mlp(nn.Module):
    """Linear layers with ReLU between them: [..., in] -> [..., sizes[-1]]. `pointwise` stores 1x1 convolutions."""

    sizes: tuple[int, ...]
    dtype: Any
    pointwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., sizes[-1]]."""
        for i, size in enumerate(self.sizes):
            name = f"layers_{i}"
            x = (_conv(size, 1, self.dtype, name, use_bias=True) if self.pointwise else dense(size, name, self.dtype))(
                x
            )
            x = nn.relu(x) if i < len(self.sizes) - 1 else x
        return x


class Upscale2x(nn.Module):
    """Transposed 2x2 convolution, channel LayerNorm, GELU: [B,h,w,C] -> [B,2h,2w,features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,h,w,C] -> [B,2h,2w,features]."""
        x = nn.ConvTranspose(
            self.features,
            (2, 2),
            strides=(2, 2),
            padding="VALID",
            transpose_kernel=True,
            dtype=self.dtype,
            kernel_init=torch_uniform,
            name="conv",
        )(x)
        return nn.gelu(layer_norm("norm", self.dtype, 1e-6)(x), approximate=False)


class FourierPosition(nn.Module):
    """Random Fourier features of the pixel centres of an n x n grid: [n*n, E], sines then cosines, float32.

    The matrix is drawn once and never trained. The released code keeps it as a buffer that no file holds; here it is a
    parameter behind `stop_gradient`, so that checkpoints hold it.
    """

    dim: int

    @nn.compact
    def __call__(self, n: int) -> jax.Array:
        """n -> float32[n*n,E]."""
        matrix = self.param("positional_encoding_gaussian_matrix", _EMBED_INIT, (2, self.dim // 2))
        centres = 2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1
        xy = jnp.stack(jnp.meshgrid(centres, centres), -1).reshape(n * n, 2)
        # Spelled out: a matrix product of two terms would lose bits to reduced precision on accelerators.
        fixed = jax.lax.stop_gradient(matrix)
        angles = 2 * jnp.pi * (xy[:, :1] * fixed[0] + xy[:, 1:] * fixed[1])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class PackedAttention(nn.Module):
    """`nn.MultiheadAttention`: one packed projection. x [B,Q,E], source [B,K,E] -> [B,Q,E]."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array) -> jax.Array:
        """x [B,Q,E], source [B,K,E] -> [B,Q,E]."""
        dim = x.shape[-1]
        in_proj = dense(3 * dim, "in_proj", self.dtype)
        q = in_proj(x)[..., :dim]
        _, k, v = jnp.split(in_proj(source), 3, axis=-1)
        return dense(dim, "out_proj", self.dtype)(_attend(q, k, v, self.heads))


class QueryLayer(nn.Module):
    """One post-norm layer of the query generator: queries [B,Q,E] attend to themselves, then to prompt [B,1,E]."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, queries: jax.Array, prompt: jax.Array) -> jax.Array:
        """queries [B,Q,E], prompt [B,1,E] -> [B,Q,E]."""
        cfg, dtype = self.cfg, self.cfg.dtype
        x = layer_norm("norm1", dtype)(queries + PackedAttention(cfg.heads, dtype, name="self_attn")(queries, queries))
        x = layer_norm("norm2", dtype)(x + PackedAttention(cfg.heads, dtype, name="cross_attn")(x, prompt))
        hidden = nn.gelu(dense(cfg.query_mlp_dim, "ffn_0", dtype)(x), approximate=False)
        return layer_norm("norm3", dtype)(x + dense(cfg.dim, "ffn_2", dtype)(hidden))


class QueryGenerator(nn.Module):
    """Learned queries [B,Q,E] conditioned on one prompt [B,1,E] -> [B,Q,E]; see `SegConfig.chain_queries`."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, queries: jax.Array, prompt: jax.Array) -> jax.Array:
        """queries [B,Q,E], prompt [B,1,E] -> [B,Q,E]."""
        out = queries
        for i in range(self.cfg.query_layers):
            out = QueryLayer(self.cfg, name=f"layers_{i}")(out if self.cfg.chain_queries else queries, prompt)
        return out


class Attention(nn.Module):
    """Attention with separate projections to an inner width: q [B,Q,E], k and v [B,K,E] -> [B,Q,E]."""

    inner: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [B,Q,E], k and v [B,K,E] -> [B,Q,E]."""
        q_in, k_in, v_in = (
            dense(self.inner, f"{name}_proj", self.dtype)(x) for name, x in zip("qkv", (q, k, v), strict=True)
        )
        out = _attend(q_in, k_in, v_in, self.heads)
        return dense(q.shape[-1], "out_proj", self.dtype)(out)


class TwoWayBlock(nn.Module):
    """One block of the two-way transformer: tokens and image update each other.

    `first`: the block whose self-attention has neither position encoding nor residual.
    """

    cfg: SegConfig
    first: bool

    @nn.compact
    def __call__(
        self, tokens: jax.Array, image: jax.Array, token_pe: jax.Array, image_pe: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """tokens and token_pe [B,Q,E], image [B,n*n,E], image_pe [n*n,E] -> updated (tokens, image)."""
        cfg, dtype = self.cfg, self.cfg.dtype
        self_attn = Attention(cfg.dim, cfg.heads, dtype, name="self_attn")
        if self.first:
            tokens = self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self_attn(q, q, tokens)
        tokens = layer_norm("norm1", dtype)(tokens)
        to_image = Attention(cfg.dim // 2, cfg.heads, dtype, name="cross_attn_token_to_image")
        tokens = layer_norm("norm2", dtype)(tokens + to_image(tokens + token_pe, image + image_pe, image))
        hidden = nn.relu(dense(cfg.mlp_dim, "lin1", dtype)(tokens))
        tokens = layer_norm("norm3", dtype)(tokens + dense(cfg.dim, "lin2", dtype)(hidden))
        to_token = Attention(cfg.dim // 2, cfg.heads, dtype, name="cross_attn_image_to_token")
        image = layer_norm("norm4", dtype)(image + to_token(image + image_pe, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """tokens [B,Q,E], image [B,n*n,E], image_pe [n*n,E] -> updated (tokens, image); tokens are their own encoding."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, image: jax.Array, image_pe: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens [B,Q,E], image [B,n*n,E], image_pe [n*n,E] -> updated (tokens, image)."""
        cfg, token_pe = self.cfg, tokens
        for i in range(cfg.depth):
            tokens, image = TwoWayBlock(cfg, first=i == 0, name=f"layers_{i}")(tokens, image, token_pe, image_pe)
        final = Attention(cfg.dim // 2, cfg.heads, cfg.dtype, name="final_attn_token_to_image")
        tokens = tokens + final(tokens + token_pe, image + image_pe, image)
        return layer_norm("norm_final_attn", cfg.dtype)(tokens), image


class MaskDecoder(nn.Module):
    """Prompts [B,2,E], neck features [B,2,g,g,E] and the level-0 position encoding -> per-level logits of each kind."""

    cfg: SegConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.avs_query_tokens = self.param("avs_query_tokens", _EMBED_INIT, (cfg.queries, cfg.dim))
        self.level_embed = self.param("level_embed", _EMBED_INIT, (cfg.scales, cfg.dim))
        self.query_generator = QueryGenerator(cfg)
        self.transformer = [TwoWayTransformer(cfg) for _ in range(cfg.scales)]
        self.pe1 = FourierPosition(cfg.dim)
        self.upsample_2x = Upscale2x(cfg.dim, cfg.dtype)
        self.output_upscaling = Upscale2x(cfg.dim // 8, cfg.dtype)
        self.hyper_mlp = Mlp((cfg.dim, cfg.dim, cfg.dim // 8), cfg.dtype)
        self.hyper_mlp_out = Mlp((cfg.dim, cfg.dim, cfg.dim // 8), cfg.dtype, pointwise=True)
        self.ms3_s4_classifier = _conv(1, 1, cfg.dtype, None)
        self.avss_classifier = _conv(cfg.classes, 1, cfg.dtype, None)

    def _embed_pixels(self, level: int, prompt: jax.Array, image: jax.Array, image_pe: jax.Array) -> jax.Array:
        """prompt [B,E], image [B,n,n,E], image_pe [n*n,E] -> what both classifiers read: [B,2n,2n,E/8]."""
        batch, n = image.shape[:2]
        queries = jnp.broadcast_to(self.avs_query_tokens.astype(image.dtype), (batch, *self.avs_query_tokens.shape))
        tokens = self.query_generator(queries, prompt[:, None]) + self.level_embed[level].astype(image.dtype)
        tokens, image = self.transformer[level](tokens, image.reshape(batch, n * n, -1), image_pe.astype(image.dtype))
        pixels = self.output_upscaling(image.reshape(batch, n, n, -1))
        return self.hyper_mlp_out(jnp.einsum("bqc,bhwc->bhwq", self.hyper_mlp(tokens), pixels))

    def __call__(
        self, prompts: jax.Array, neck: jax.Array, image_pe: jax.Array, no_mask: jax.Array, kinds: tuple[str, ...]
    ) -> dict[str, list[jax.Array]]:
        """prompts [B,2,E], neck [B,2,g,g,E], image_pe [g*g,E], no_mask [E] -> logits per kind, coarse to fine:
        {kind: [[B,2g,2g,K], [B,4g,4g,K]]} with K 1 or the number of classes."""
        classifiers = {"binary": self.ms3_s4_classifier, "semantic": self.avss_classifier}
        pixels = self._embed_pixels(0, prompts[:, 0], neck[:, 0] + no_mask, image_pe)
        coarse = [classifiers[kind](pixels) for kind in kinds]
        # The fine level looks where the coarse level of the same kind found something: the kinds part here and run as
        # one batch, the kinds of a sample side by side, so that a batch spread over devices stays where it is.
        attention = _fold([nn.sigmoid(x.astype(jnp.float32).mean(-1, keepdims=True)) + 1 for x in coarse])
        repeat = lambda x: _fold([x] * len(kinds))  # noqa: E731
        image = attention.astype(neck.dtype) * repeat(self.upsample_2x(neck[:, 1])) + no_mask
        pixels = self._embed_pixels(1, repeat(prompts[:, 1]), image, self.pe1(2 * self.cfg.grid))
        pixels = pixels.reshape(-1, len(kinds), *pixels.shape[1:])
        fine = [classifiers[kind](pixels[:, number]) for number, kind in enumerate(kinds)]
        return {kind: list(levels) for kind, *levels in zip(kinds, coarse, fine, strict=True)}


class Neck(nn.Module):
    """1x1 then 3x3 convolution, each with a channel LayerNorm: [B,g,g,C] -> [B,g,g,E]."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B,g,g,C] -> [B,g,g,E]."""
        dim, dtype = self.cfg.dim, self.cfg.dtype
        x = layer_norm("norm_1", dtype, 1e-6)(_conv(dim, 1, dtype, "conv_0")(x))
        return layer_norm("norm_3", dtype, 1e-6)(_conv(dim, 3, dtype, "conv_2")(x))


class SegModule(nn.Module):
    """Mask logits of one object per sample.

    states [B,6,D]: language states that predict `<mask_0>`..`<mask_5>`; the first three prompt the coarse level.
    features: two [B,N,C] CLIP feature maps without class token, coarse level first (layers 14 and 22 as released).
    kinds: static; which of "binary" and "semantic" to compute (they part at the fine level, which each runs).
    Returns (binary [B,H,W], semantic [B,classes,H,W]) float32 logits, None for a kind not asked for.
    """

    cfg: SegConfig

    @nn.compact
    def __call__(
        self, states: MaskStates, features: tuple[Tokens, ...], kinds: tuple[str, ...] = KINDS
    ) -> tuple[BinaryLogits | None, SemanticLogits | None]:
        """states [B,6,D], features two [B,N,C] -> (float32[B,P,P], float32[B,classes,P,P]); see the class."""
        cfg = self.cfg
        batch = states.shape[0]
        prompts = Mlp((cfg.llm_dim, cfg.dim), cfg.dtype, name="text_hidden_fcs")(states)
        prompts = prompts.reshape(batch, cfg.scales, cfg.tokens_per_scale, cfg.dim).mean(2)
        maps = jnp.stack(features, 1).reshape(batch * cfg.scales, cfg.grid, cfg.grid, cfg.image_dim)
        neck = Neck(cfg, name="image_feature_neck")(maps).reshape(batch, cfg.scales, cfg.grid, cfg.grid, cfg.dim)
        no_mask = self.param("no_mask_embed", _EMBED_INIT, (1, cfg.dim))[0].astype(neck.dtype)
        image_pe = FourierPosition(cfg.dim, name="pe_layer")(cfg.grid)
        logits = MaskDecoder(cfg, name="mask_decoder")(prompts, neck, image_pe, no_mask, kinds)

        def full_size(levels: list[jax.Array]) -> jax.Array:
            coarse, fine = (resize(level.astype(jnp.float32), cfg.low_res) for level in levels)
            return resize((coarse + fine) / cfg.scales, cfg.image_size)

        binary = full_size(logits["binary"])[..., 0] if "binary" in kinds else None
        semantic = jnp.moveaxis(full_size(logits["semantic"]), -1, 1) if "semantic" in kinds else None
        return binary, semantic
