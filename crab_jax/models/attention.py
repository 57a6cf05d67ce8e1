"""Attention over whole sequences, by the kernel that fits the device.

"einsum" is the plain formula, everywhere. "splash" is the TPU kernel that comes with JAX, which never writes the scores
to memory. "cudnn" is NVIDIA's. All compute the same function; "auto" takes the kernel of the mesh's devices if the
shapes suit it, and otherwise "einsum".
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, PartitionSpec

from crab_jax.io.errors import InputError
from crab_jax.models.shapes import AttentionMask

KINDS = ("auto", "splash", "cudnn", "einsum")
MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite
SAVED = "attention"  # name by which a rematerialisation policy keeps the result of attention
_BLOCK = 128  # a splash block is a multiple of it
_LARGEST_BLOCK = 512


def kind_for(kind: str, length: int, head_dim: int, dtype: Any, only_causal: bool) -> str:
    """Return the kernel that `kind` means here: "splash", "cudnn" or "einsum".

    length: of queries and keys. only_causal: no mask but the causal one, which is all that the kernels know. The
    device is that of the mesh that is being traced for; without a mesh, or without cuDNN on a GPU, "auto" is "einsum".
    Raises InputError for a named kernel that cannot take these shapes.
    """
    half = jnp.dtype(dtype).itemsize == 2
    fits = {
        "splash": only_causal and length % _BLOCK == 0 and head_dim % _BLOCK == 0,
        "cudnn": only_causal and half and head_dim % 8 == 0 and head_dim <= 128,
    }
    if kind in fits and not fits[kind]:
        problem = f"is {kind}, which cannot attend over {length} positions of {head_dim} channels a head in {dtype}"
        problem += "" if only_causal else " with padding to the left"
        raise InputError("--config", "sizes.llama.attention", problem, "use auto")
    if kind != "auto":
        return kind
    device = jax.sharding.get_abstract_mesh().abstract_device
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(device.platform if device else "", "einsum")
    return kernel if fits.get(kernel) and (kernel != "cudnn" or _has_cudnn()) else "einsum"


@functools.cache
def _has_cudnn() -> bool:
    """Return whether JAX finds cuDNN, which it does not on a machine that compiles for a GPU without having one."""
    try:
        jax.eval_shape(_cudnn, *[jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)] * 3)
    except RuntimeError:
        return False
    return True


_cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def causal(q: jax.Array, k: jax.Array, v: jax.Array, kind: str, key_mask: jax.Array | None = None) -> jax.Array:
    """Return causal grouped-query attention [B,L,H*hd] of q [B,H,L,hd] to k and v [B,KH,L,hd].

    kind: one of KINDS. key_mask: bool[B,L] keys that may be attended to (all, when None). Raises InputError as
    `kind_for`.
    """
    length, width = q.shape[2:]
    kernel = kind_for(kind, length, width, q.dtype, key_mask is None)
    if kernel == "splash":
        out = splash_attention(q, k, v)
    elif kernel == "cudnn":
        out = _cudnn(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)
    else:
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        out = attend(q, k, v, mask if key_mask is None else mask & key_mask[:, None, :])
    named: jax.Array = checkpoint_name(out.swapaxes(1, 2).reshape(len(q), length, -1), SAVED)
    return named


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask) -> jax.Array:
    """Return grouped-query attention [B,H,L,hd] of q [B,H,L,hd] to k and v [B,KH,N,hd] under mask bool[B,L,N].

    Query head h reads key head h // (H/KH). Grouping the queries avoids repeating the keys.
    """
    width = q.shape[-1]
    grouped = q.reshape(len(q), k.shape[1], -1, *q.shape[2:])
    scores = jnp.einsum("bkgld,bknd->bkgln", grouped, k, preferred_element_type=jnp.float32)
    out: jax.Array = jnp.einsum("bkgln,bknd->bkgld", attention_weights(scores, mask, width).astype(v.dtype), v)
    return out.reshape(q.shape)


def attention_weights(scores: jax.Array, mask: AttentionMask, width: int) -> jax.Array:
    """Return the softmax of scores float32[B,KH,G,L,N] of heads of `width` features, under mask bool[B,L,N]."""
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores * width**-0.5, MASKED))


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Return causal `attend` [B,H,L,hd] by the TPU kernel: every device attends with its own rows and heads."""
    heads, length, width = q.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else _parts(mesh, "heads")
    kernel = _kernel(length, heads // shards, heads // k.shape[1], interpret)

    def own(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attended: jax.Array = jax.vmap(kernel)(q, k, v)
        return attended

    if not mesh.empty:
        spec = nn.logical_to_mesh_axes(("batch", "heads", None, None))
        assert spec is not None
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        own = jax.shard_map(own, in_specs=(spec,) * 3, out_specs=spec, axis_names=free, check_vma=False)
    return own(q * width**-0.5, k, v)


def _parts(mesh: Any, logical: str) -> int:
    """Return over how many devices a logical axis is split."""
    axes = (nn.logical_to_mesh_axes((logical,)) or PartitionSpec(None))[0]
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def _kernel(length: int, heads: int, queries_per_key: int, interpret: bool) -> Any:
    """Return the splash kernel for `heads` query heads of `length` positions, which maps one row [H,L,hd]."""
    block = next(n for n in range(min(_LARGEST_BLOCK, length), 0, -_BLOCK) if length % n == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    mask = splash_mask.CausalMask((length, length))
    each = queries_per_key if queries_per_key > 1 else heads
    make = splash.make_splash_mqa if queries_per_key > 1 else splash.make_splash_mha
    kernel = make(
        splash_mask.MultiHeadMask([mask] * each),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    if queries_per_key == 1:
        return kernel

    def grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Map q [H,L,hd], k and v [KH,L,hd] to [H,L,hd]."""
        out: jax.Array = jax.vmap(kernel)(q.reshape(len(k), -1, *q.shape[1:]), k, v)
        return out.reshape(q.shape)

    return grouped
