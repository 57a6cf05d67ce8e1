"""BEATs audio encoder (Chen et al., ICML 2023; released files: models/beats/BEATs.py, backbone.py)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.models.layers import layer_norm
from crab_jax.models.shapes import Fbank, Tokens

MEL_BINS = 128


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """Sizes of the encoder; the defaults are those of BEATs_iter3+ (AS2M).

    conv_pos: kernel size of the convolution that encodes positions; conv_pos_groups: its groups. num_buckets,
    max_distance: of the relative position bias. dtype: compute dtype.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    embed_dim: int = 512
    patch_size: int = 16
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    dtype: str = "bfloat16"


def relative_bucket(distance: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket, int32, of each relative position (key minus query).

    Half of the buckets are for each sign. Within a half each small distance has a bucket of its own, and larger
    distances share buckets of logarithmic width. Distances on the edge of a bucket follow the float32 arithmetic of
    the released code.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    # The logarithm is rounded from float64 because float32 logarithms differ between platforms in the last bit.
    log = np.log((np.maximum(size, 1).astype(np.float32) / np.float32(exact)).astype(np.float64)).astype(np.float32)
    far = exact + (log / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    buckets: np.ndarray = half * (distance > 0) + np.where(size < exact, size, np.minimum(far, half - 1))
    return buckets.astype(np.int32)


class PositionConv(nn.Module):
    """Grouped convolution over the tokens with weight normalisation, then GELU: x [B,N,C] -> [B,N,C].

    The norm is taken over channels, with one gain per kernel tap (PyTorch's `weight_norm(dim=2)`). Magnitude and
    direction are separate parameters as in the released file: weight_g [k,1,1], weight_v [k,C/groups,C].
    """

    cfg: BeatsConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Map x [B,N,C] to [B,N,C]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        std = math.sqrt(4 / (cfg.conv_pos * cfg.width))
        shape = (cfg.conv_pos, cfg.width // cfg.conv_pos_groups, cfg.width)
        v = self.param("weight_v", nn.initializers.normal(std), shape).astype(jnp.float32)
        gain = nn.initializers.constant(std * math.sqrt(shape[1] * shape[2]))  # the expected norm of v
        g = self.param("weight_g", gain, (cfg.conv_pos, 1, 1)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (cfg.width,)).astype(dtype)
        kernel = v * (g / jnp.linalg.norm(v, axis=(1, 2), keepdims=True))
        # PyTorch pads an even kernel by k/2 on both sides and drops the last output; padding less never computes it.
        pad = (cfg.conv_pos // 2, (cfg.conv_pos - 1) // 2)
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(dtype),
            (1,),
            [pad],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=cfg.conv_pos_groups,
        )
        return nn.gelu(y + bias, approximate=False)


class Attention(nn.Module):
    """Self-attention whose relative position bias is gated by the query."""

    cfg: BeatsConfig

    @nn.compact
    def __call__(self, x: Tokens, bias: jax.Array) -> Tokens:
        """Map x [B,N,C] and the position bias float32[H,N,N] to [B,N,C]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        q, k, v = (
            nn.Dense(cfg.width, dtype=dtype, name=f"{name}_proj")(x).reshape(*x.shape[:-1], cfg.heads, -1)
            for name in "qkv"
        )
        a, b = self._gates(q)
        scale = self.param("grep_a", nn.initializers.ones, (1, cfg.heads, 1, 1)).astype(jnp.float32)
        gate = a * (b * scale - 1) + 2
        y = jax.nn.dot_product_attention(q, k, v, bias=gate * bias).reshape(x.shape)
        return nn.Dense(cfg.width, dtype=dtype, name="out_proj")(y)

    def _gates(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the two gates, float32[B,H,N,1] each, of the unscaled queries [B,N,H,d]."""
        y = nn.Dense(8, dtype=jnp.dtype(self.cfg.dtype), name="grep_linear")(q).astype(jnp.float32)
        gates = nn.sigmoid(y.reshape(*y.shape[:-1], 2, 4).sum(-1)).swapaxes(1, 2)
        return gates[..., :1], gates[..., 1:]


class Layer(nn.Module):
    """Post-norm transformer layer with the residual scaled by DeepNorm's alpha = (2 layers)^(1/4)."""

    cfg: BeatsConfig

    @nn.compact
    def __call__(self, x: Tokens, bias: jax.Array) -> tuple[Tokens, None]:
        """Map x [B,N,C] and the position bias float32[H,N,N] to ([B,N,C], None), the form that `nn.scan` expects."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        alpha = (2 * cfg.layers) ** 0.25
        x = layer_norm("self_attn_layer_norm", dtype)(alpha * x + Attention(cfg, name="self_attn")(x, bias))
        y = nn.gelu(nn.Dense(cfg.mlp_dim, dtype=dtype, name="fc1")(x), approximate=False)
        y = nn.Dense(cfg.width, dtype=dtype, name="fc2")(y)
        return layer_norm("final_layer_norm", dtype)(alpha * x + y), None


class Beats(nn.Module):
    """The encoder: audio tokens from a log-mel filter bank. No token is masked as padding, as in the released code."""

    cfg: BeatsConfig

    @nn.compact
    def __call__(self, fbank: Fbank) -> Tokens:
        """Encode normalised log-mel frames float[B,F,128] to tokens [B, F//patch * 128//patch, C] in `cfg.dtype`.

        Tokens are in time-major order. Frames after the last whole patch are dropped: 98 frames make 6 rows of
        patches, 198 make 12. Raises InputError for another number of mel bins, or fewer frames than one patch.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if fbank.ndim != 3 or fbank.shape[1] < cfg.patch_size or fbank.shape[2] != MEL_BINS:
            raise InputError(
                "Beats",
                "fbank",
                f"shape {fbank.shape} is not [B, at least {cfg.patch_size}, {MEL_BINS}]",
                "give whole windows of log-mel frames",
            )
        patch = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(cfg.embed_dim, patch, patch, "VALID", use_bias=False, dtype=dtype, name="patch_embedding")(
            fbank[..., None].astype(dtype)
        )
        x = layer_norm("layer_norm", dtype)(x.reshape(len(x), -1, cfg.embed_dim))
        if cfg.embed_dim != cfg.width:
            x = nn.Dense(cfg.width, dtype=dtype, name="post_extract_proj")(x)
        x = layer_norm("encoder_layer_norm", dtype)(x + PositionConv(cfg, name="pos_conv")(x))

        # All layers share one table; the released file stores it with layer 0.
        table = nn.Embed(cfg.num_buckets, cfg.heads, dtype=jnp.float32, name="relative_attention_bias")
        steps = np.arange(x.shape[1])
        bias = table(relative_bucket(steps - steps[:, None], cfg.num_buckets, cfg.max_distance)).transpose(2, 0, 1)
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=cfg.layers
        )
        return layers(cfg, name="layers")(x, bias)[0]
