"""The mask branch: a binary mask and 71 class maps from six mask-token states and two CLIP feature maps.

Sources: section 3 of the paper (Crab, CVPR 2025); released file models/multimodal_encoder.py (`SegModule`,
`MaskDecoderMultiScale`, `TwoWayTransformer`, `QueryGenerator`). Modules are named as in the released checkpoints;
feature maps are channels-last.
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
_EMBED_INIT = nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class SegConfig:
    """Sizes of the mask branch.

    llm_dim: D. image_dim: C. grid: g, side of the CLIP patch grid. image_size: side of the output, pixels.
    dim: E. queries: Q. mlp_dim, query_mlp_dim: hidden sizes of the two-way blocks and of the query generator.
    depth: two-way blocks per level. scales, tokens_per_scale: levels, and mask tokens of each, in row-major order.
    low_res: side, in pixels, at which the two levels are averaged. classes: semantic classes, background included.
    chain_queries: each layer of the query generator reads the output of the layer before it (the paper). If False,
        every layer reads the learned queries, so that only the last one counts (the released code and its weights).
    dtype: compute dtype; parameters, position encodings and the returned logits are float32.

    Raises InputError unless `scales` is 2 and `dim` is a multiple of 2 * heads.
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
                f"{self.dim} is not a multiple of 2 * heads = {2 * self.heads}",
                "choose dim and heads so that attention at half width splits evenly",
            )


def _conv(features: int, size: int, dtype: Any, name: str | None, use_bias: bool = False) -> nn.Conv:
    return nn.Conv(
        features, (size, size), padding="SAME", use_bias=use_bias, dtype=dtype, kernel_init=torch_uniform, name=name
    )


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Return multi-head attention [B,Q,E] of q [B,Q,E] to k and v [B,K,E]; the softmax is in float32."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    out = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores).astype(v.dtype), v)
    return out.reshape(*out.shape[:2], -1)


def resize(x: jax.Array, size: int) -> jax.Array:
    """Resize [B,h,w,C] to [B,size,size,C] as `F.interpolate` does: bilinear, half-pixel centres, no antialiasing."""
    resized: jax.Array = jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "bilinear", antialias=False)
    return resized


def _fold(parts: list[jax.Array]) -> jax.Array:
    """Fold k arrays [B,...] into one [B*k,...], the parts of a sample side by side.

    Unlike a concatenation this leaves sharded rows on their devices (within `sharding.constrained`).
    """
    x = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    folded: jax.Array = nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))
    return folded


class Mlp(nn.Module):
    """Linear layers with ReLU between them; with `pointwise` their parameters are those of 1x1 convolutions."""

    sizes: tuple[int, ...]
    dtype: Any
    pointwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., in] to [..., sizes[-1]]."""
        for i, size in enumerate(self.sizes):
            name = f"layers_{i}"
            x = (_conv(size, 1, self.dtype, name, use_bias=True) if self.pointwise else dense(size, name, self.dtype))(
                x
            )
            x = nn.relu(x) if i < len(self.sizes) - 1 else x
        return x


class Upscale2x(nn.Module):
    """Transposed 2x2 convolution, LayerNorm over channels, GELU."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B,h,w,C] to [B,2h,2w,features]."""
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
    """Random Fourier features of the pixel centres of a square grid: sines, then cosines.

    The matrix is drawn once and never trained. The released code registers it as a buffer that no file stores; here it
    is a parameter behind `stop_gradient`, so that checkpoints store it.
    """

    dim: int

    @nn.compact
    def __call__(self, n: int) -> jax.Array:
        """Return the features float32[n*n,E] of an n x n grid."""
        matrix = self.param("positional_encoding_gaussian_matrix", _EMBED_INIT, (2, self.dim // 2))
        centres = 2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1
        xy = jnp.stack(jnp.meshgrid(centres, centres), -1).reshape(n * n, 2)
        # Written as a sum: accelerators compute a matrix product in reduced precision, which would lose bits here.
        fixed = jax.lax.stop_gradient(matrix)
        angles = 2 * jnp.pi * (xy[:, :1] * fixed[0] + xy[:, 1:] * fixed[1])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class PackedAttention(nn.Module):
    """Attention with one projection for queries, keys and values, as PyTorch's `nn.MultiheadAttention`."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array) -> jax.Array:
        """Attend from x [B,Q,E] to source [B,K,E]: [B,Q,E]."""
        dim = x.shape[-1]
        in_proj = dense(3 * dim, "in_proj", self.dtype)
        q = in_proj(x)[..., :dim]
        _, k, v = jnp.split(in_proj(source), 3, axis=-1)
        return dense(dim, "out_proj", self.dtype)(_attend(q, k, v, self.heads))


class QueryLayer(nn.Module):
    """One post-norm layer of the query generator: queries attend to themselves, then to the prompt."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, queries: jax.Array, prompt: jax.Array) -> jax.Array:
        """Map queries [B,Q,E] and prompt [B,1,E] to queries [B,Q,E]."""
        cfg, dtype = self.cfg, self.cfg.dtype
        x = layer_norm("norm1", dtype)(queries + PackedAttention(cfg.heads, dtype, name="self_attn")(queries, queries))
        x = layer_norm("norm2", dtype)(x + PackedAttention(cfg.heads, dtype, name="cross_attn")(x, prompt))
        hidden = nn.gelu(dense(cfg.query_mlp_dim, "ffn_0", dtype)(x), approximate=False)
        out: jax.Array = layer_norm("norm3", dtype)(x + dense(cfg.dim, "ffn_2", dtype)(hidden))
        return out


class QueryGenerator(nn.Module):
    """Learned queries conditioned on one prompt; see `SegConfig.chain_queries`."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, queries: jax.Array, prompt: jax.Array) -> jax.Array:
        """Map queries [B,Q,E] and prompt [B,1,E] to queries [B,Q,E]."""
        out = queries
        for i in range(self.cfg.query_layers):
            out = QueryLayer(self.cfg, name=f"layers_{i}")(out if self.cfg.chain_queries else queries, prompt)
        return out


class Attention(nn.Module):
    """Attention with separate projections to the width `inner`."""

    inner: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attend from q [B,Q,E] to k and v [B,K,E]: [B,Q,E]."""
        q_in, k_in, v_in = (
            dense(self.inner, f"{name}_proj", self.dtype)(x) for name, x in zip("qkv", (q, k, v), strict=True)
        )
        out = _attend(q_in, k_in, v_in, self.heads)
        return dense(q.shape[-1], "out_proj", self.dtype)(out)


class TwoWayBlock(nn.Module):
    """One block of the two-way transformer, in which tokens and image update each other.

    first: whether this is the first block, whose self-attention has neither position encoding nor residual.
    """

    cfg: SegConfig
    first: bool

    @nn.compact
    def __call__(
        self, tokens: jax.Array, image: jax.Array, token_pe: jax.Array, image_pe: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Update tokens [B,Q,E] and image [B,n*n,E] by their encodings token_pe [B,Q,E] and image_pe [n*n,E]."""
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
    """The two-way blocks and a final attention; the initial tokens serve as their own position encoding."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, image: jax.Array, image_pe: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Update tokens [B,Q,E] and image [B,n*n,E], whose position encoding is image_pe [n*n,E]."""
        cfg, token_pe = self.cfg, tokens
        for i in range(cfg.depth):
            tokens, image = TwoWayBlock(cfg, first=i == 0, name=f"layers_{i}")(tokens, image, token_pe, image_pe)
        final = Attention(cfg.dim // 2, cfg.heads, cfg.dtype, name="final_attn_token_to_image")
        tokens = tokens + final(tokens + token_pe, image + image_pe, image)
        return layer_norm("norm_final_attn", cfg.dtype)(tokens), image


class MaskDecoder(nn.Module):
    """Mask logits of both levels from prompts and neck features, for each kind of mask."""

    cfg: SegConfig

    def setup(self) -> None:
        """Create the parameters and modules; linen calls this."""
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
        """Map prompt [B,E], image [B,n,n,E] and image_pe [n*n,E] to the classifiers' input [B,2n,2n,E/8]."""
        batch, n = image.shape[:2]
        queries = jnp.broadcast_to(self.avs_query_tokens.astype(image.dtype), (batch, *self.avs_query_tokens.shape))
        tokens = self.query_generator(queries, prompt[:, None]) + self.level_embed[level].astype(image.dtype)
        tokens, image = self.transformer[level](tokens, image.reshape(batch, n * n, -1), image_pe.astype(image.dtype))
        pixels = self.output_upscaling(image.reshape(batch, n, n, -1))
        return self.hyper_mlp_out(jnp.einsum("bqc,bhwc->bhwq", self.hyper_mlp(tokens), pixels))

    def __call__(
        self, prompts: jax.Array, neck: jax.Array, image_pe: jax.Array, no_mask: jax.Array, kinds: tuple[str, ...]
    ) -> dict[str, list[jax.Array]]:
        """Return the logits of each kind, coarse to fine: {kind: [[B,2g,2g,K], [B,4g,4g,K]]}.

        K is 1 (binary) or the number of classes (semantic). prompts: [B,2,E], one per level. neck: [B,2,g,g,E].
        image_pe: position encoding of the coarse level, [g*g,E]. no_mask: [E], stands for the absent input mask.
        """
        classifiers = {"binary": self.ms3_s4_classifier, "semantic": self.avss_classifier}
        pixels = self._embed_pixels(0, prompts[:, 0], neck[:, 0] + no_mask, image_pe)
        coarse = [classifiers[kind](pixels) for kind in kinds]
        # The coarse logits of a kind weight the pixels of its fine level, so that the kinds differ from here on. They
        # run as one batch, the kinds of a sample side by side, so that sharded rows stay on their devices.
        attention = _fold([nn.sigmoid(x.astype(jnp.float32).mean(-1, keepdims=True)) + 1 for x in coarse])

        def repeat(x: jax.Array) -> jax.Array:
            return _fold([x] * len(kinds))

        image = attention.astype(neck.dtype) * repeat(self.upsample_2x(neck[:, 1])) + no_mask
        pixels = self._embed_pixels(1, repeat(prompts[:, 1]), image, self.pe1(2 * self.cfg.grid))
        pixels = pixels.reshape(-1, len(kinds), *pixels.shape[1:])
        fine = [classifiers[kind](pixels[:, number]) for number, kind in enumerate(kinds)]
        return {kind: list(levels) for kind, *levels in zip(kinds, coarse, fine, strict=True)}


class Neck(nn.Module):
    """A 1x1 and a 3x3 convolution, each followed by a LayerNorm over channels."""

    cfg: SegConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B,g,g,C] to [B,g,g,E]."""
        dim, dtype = self.cfg.dim, self.cfg.dtype
        x = layer_norm("norm_1", dtype, 1e-6)(_conv(dim, 1, dtype, "conv_0")(x))
        out: jax.Array = layer_norm("norm_3", dtype, 1e-6)(_conv(dim, 3, dtype, "conv_2")(x))
        return out


class SegModule(nn.Module):
    """The mask branch: mask logits of one object per sample."""

    cfg: SegConfig

    @nn.compact
    def __call__(
        self, states: MaskStates, features: tuple[Tokens, ...], kinds: tuple[str, ...] = KINDS
    ) -> tuple[BinaryLogits | None, SemanticLogits | None]:
        """Return float32 logits (binary [B,P,P], semantic [B,classes,P,P]), None for a kind that is not in `kinds`.

        states: [B,6,D], states of the language model that predict `<mask_0>` to `<mask_5>`; the first three prompt the
        coarse level. features: two CLIP feature maps [B,N,C] without class token, coarse level first (in the released
        model of layers 14 and 22). kinds: static; which of `KINDS` to compute, each with its own fine level.
        """
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
