"""CLIP vision tower with tapped hidden states (Radford et al., 2021; released file: models/multimodal_encoder.py)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from crab_jax.io.errors import InputError
from crab_jax.models.layers import layer_norm, normal
from crab_jax.models.shapes import Pixels, Tokens

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower; the defaults are ViT-L/14.

    taps: hidden states to return; 0 is the embedding after `pre_layrnorm`, i is the output of layer i. Layers above
    the last tap have no effect, so `layers` may be as small as max(taps). Raises InputError when the patches do not
    divide the picture, or a tap names a layer that does not exist.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    taps: tuple[int, ...] = (14, 22, 23)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise InputError(
                "ClipConfig",
                "image_size",
                f"{self.image_size} is not a multiple of {self.patch_size}",
                "choose a multiple of patch_size",
            )
        if not self.taps or min(self.taps) < 0 or max(self.taps) > self.layers:
            raise InputError(
                "ClipConfig", "taps", f"{self.taps} must lie in 0..{self.layers}", "choose existing layers"
            )

    @property
    def patches(self) -> int:
        """Number of tokens per picture, without the class token."""
        return (self.image_size // self.patch_size) ** 2


def normalize(frames: jax.Array) -> jax.Array:
    """Normalise RGB uint8[..., 3] to float32[..., 3] by CLIP's mean and standard deviation (CLIPImageProcessor)."""
    return (frames.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


class Attention(nn.Module):
    """Multi-head self-attention whose projections have a bias; the softmax is in float32."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Map x [B,N,C] to [B,N,C]."""
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, name=f"{name}_proj")(x).reshape(*x.shape[:-1], self.heads, -1)
            for name in "qkv"
        )
        y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(y)


class Mlp(nn.Module):
    """Feed-forward network: linear layer, quick GELU, linear layer."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Map x [B,N,C] to [B,N,C]."""
        y = nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y * nn.sigmoid(1.702 * y))


class Layer(nn.Module):
    """Pre-norm transformer layer that also writes its output into one slot of the buffer of taps."""

    cfg: ClipConfig

    @nn.compact
    def __call__(self, carry: tuple[Tokens, jax.Array], slot: jax.Array) -> tuple[tuple[Tokens, jax.Array], None]:
        """Map (x [B,1+N,C], buffer [taps+1,B,N,C]) to the same of the next layer, in the form that `nn.scan` expects.

        slot: int32[], where in the buffer the output is written, without the class token.
        """
        x, buffer = carry
        dtype = jnp.dtype(self.cfg.dtype)
        x = x + Attention(self.cfg.heads, dtype, name="self_attn")(layer_norm("layer_norm1", dtype)(x))
        x = x + Mlp(self.cfg.mlp_dim, dtype, name="mlp")(layer_norm("layer_norm2", dtype)(x))
        return (x, jax.lax.dynamic_update_index_in_dim(buffer, x[:, 1:], slot, axis=0)), None


class Clip(nn.Module):
    """The vision tower, which returns the hidden states of `taps`, without the tower's final post_layernorm."""

    cfg: ClipConfig

    @nn.compact
    def __call__(self, pixels: Pixels) -> tuple[Tokens, ...]:
        """Encode pixels float[B,H,W,3] from `normalize` to one [B,N,C] in `cfg.dtype` per tap, without the class token.

        Raises InputError when H and W are not `cfg.image_size`.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        if pixels.shape[1:] != (cfg.image_size, cfg.image_size, 3):
            raise InputError(
                "Clip",
                "pixels",
                f"shape {pixels.shape} is not [B,{cfg.image_size},{cfg.image_size},3]",
                "resize the frames to image_size",
            )
        patch = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(cfg.width, patch, patch, "VALID", use_bias=False, dtype=dtype, name="patch_embedding")(
            pixels.astype(dtype)
        )
        x = x.reshape(len(x), cfg.patches, cfg.width)
        token = self.param("class_embedding", normal, (cfg.width,)).astype(dtype)
        positions = self.param("position_embedding", normal, (cfg.patches + 1, cfg.width)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, cfg.width)), x], axis=1) + positions
        x = layer_norm("pre_layrnorm", dtype)(x)

        # The buffer has one slot per tap, and a spare one that all other layers overwrite: the scan keeps no more.
        # Slots start as hidden state 0, so a tap of 0 needs no writing.
        spare = len(cfg.taps)
        slots = [cfg.taps.index(i) if i in cfg.taps else spare for i in range(1, cfg.layers + 1)]
        buffer = jnp.broadcast_to(x[:, 1:], (spare + 1, len(x), cfg.patches, cfg.width))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=cfg.layers)
        (_, buffer), _ = layers(cfg, name="layers")((x, buffer), jnp.array(slots, jnp.int32))
        return tuple(buffer[cfg.taps.index(tap)] for tap in cfg.taps)
