"""The mesh and micro-batches of a run or of a model that generates, inferred from memory unless configured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from crab_jax import optim
from crab_jax.config import RunConfig
from crab_jax.io.errors import InputError
from crab_jax.losses import CHUNK
from crab_jax.models import attention, quantize
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import LlamaConfig
from crab_jax.parallel import chips, sharding
from crab_jax.runs import run_params

# Parameters, optimizer state and the temporaries of a micro-batch may take this share of a device's memory.
TRAINING_SHARE = 0.85
# Parameters may take this share of a device that generates; the rest is for the cache and activations.
SERVING_SHARE = 0.6
# Parameters, and all that a batch of answers needs, may take this share of it.
ANSWER_SHARE = 0.85
MOST_ROWS = 64  # of a batch of answers: beyond it, a row waits for the longest answer of too many others
ROWS_UNKNOWN = 16
# Measured ratio of what the compiler allocates for a row of a micro-batch to the sum in `row_bytes`.
MEASURED = 1.1
# What a training step takes however few rows it has: the gathered matrices of the layers at work.
STEP_BYTES = 0.3 * 2**30
# Features of a row's media and its mask, as measured for the 7B model with ten frames, ten windows and a mask.
MEDIA_BYTES = 0.45 * 2**30
# Policies of recomputation that "auto" chooses from, those that compute the least again first.
POLICIES = ("projections", "attention", "full")
# A micro-batch of fewer rows would wait for the matrices that are gathered for it.
LEAST_ROWS = 2


def state_bytes(config: RunConfig) -> int:
    """Return the bytes of all parameters and the optimizer state.

    A trained scalar has a value, a gradient and two moments of 4 bytes each.
    """
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))
    trainable, frozen = optim.split(shapes, config.trainable, config.frozen)
    return run_params.count(frozen) * jax.numpy.dtype(config.frozen_dtype).itemsize + 16 * run_params.count(trainable)


def row_bytes(cfg: CrabConfig, length: int, remat: str = "full", kernel: str = "einsum") -> float:
    """Estimate the bytes of temporaries per batch row of `length` positions in a training step.

    The sum has what the policy `remat` keeps of every layer, one layer's feed-forward and attention scores (which only
    the kernel "einsum" writes), the logits of one chunk of targets, and MEDIA_BYTES.
    """
    llama = cfg.llama
    layers = kept_bytes(llama, length, remat)
    scores = 3 * 4 * llama.heads * length**2 if kernel == "einsum" else 0
    feed_forward = 8 * 2 * length * llama.mlp_dim
    logits = 3 * 4 * min(length, CHUNK) * llama.padded_vocab
    return MEASURED * (layers + scores + feed_forward + logits) + MEDIA_BYTES


def kept_bytes(llama: LlamaConfig, length: int, remat: str) -> int:
    """Return the bytes that a policy keeps of all layers for a row, at least; what it offloads counts too."""
    width, key_width = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    kept = llama.hidden  # values of a position
    if remat not in ("full", "auto"):
        kept += width
    if remat not in ("full", "auto", "attention"):
        kept += width + 2 * key_width + llama.hidden + 2 * llama.mlp_dim
    return 2 * llama.layers * length * kept


def mesh_of(config: RunConfig, devices: Any = None) -> Mesh:
    """Return the mesh of a run over `devices` (all, when None); sizes of 0 are inferred (see `sharding.make_mesh`)."""
    needed = 0 if config.mesh.fsdp else state_bytes(config)
    return sharding.make_mesh(**vars(config.mesh), devices=devices, state_bytes=needed)


def resident_bytes(trainable: Any, frozen: Any) -> int:
    """Return the bytes that parameters, gradients and optimizer state take on the device that has the most of them.

    trainable, frozen: shapes with shardings.
    """

    def size(leaf: Any, placement: Any) -> int:
        return int(math.prod(placement.shard_shape(leaf.shape)) * leaf.dtype.itemsize)

    kept = sum(size(leaf, leaf.sharding) for leaf in jax.tree.leaves(frozen))
    for leaf in jax.tree.leaves(trainable):  # value and gradient, and two moments
        kept += 2 * size(leaf, leaf.sharding) + 2 * size(leaf, sharding.moment_sharding(leaf))
    return kept


def fitted(config: RunConfig, mesh: Mesh) -> tuple[CrabConfig, int]:
    """Return what "auto" and 0 mean on a mesh: (sizes with a policy of recomputation, number of micro-batches).

    For `sizes.llama.remat` "auto" and `optim.accumulate` 0 it is the first of POLICIES, and the fewest micro-batches,
    whose longest rows fit TRAINING_SHARE of a device. Where a device's memory is unknown, layers are computed again and
    the batch is whole. Raises InputError when batch, mesh and micro-batches do not divide.
    """
    accumulate, cfg = config.optim.accumulate, config.model
    remat = cfg.llama.remat
    sharding.check_batch(config.mixture.batch_size, mesh, accumulate or 1)
    memory = chips.memory_of(mesh.devices.flat[0])
    policies = POLICIES if remat == "auto" else (remat,)
    if memory is None or (accumulate and remat != "auto"):
        return with_remat(cfg, policies[-1]), accumulate or 1
    rows = config.mixture.batch_size // sharding.row_groups(mesh)
    length = max(config.data.lengths)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        kernel = attention.kind_for(cfg.llama.attention, length, cfg.llama.head_dim, cfg.dtype, only_causal=True)
    wanted = run_params.wanted_params(config, cfg.build(), mesh)
    resident = resident_bytes(*optim.split(wanted, config.trainable, config.frozen))
    free = TRAINING_SHARE * memory - resident - STEP_BYTES
    for policy in policies:
        fitting = free * mesh.shape["tensor"] / row_bytes(cfg, length, policy, kernel)
        numbers = [accumulate] if accumulate else [n for n in range(1, rows + 1) if rows % n == 0]
        found = next((n for n in numbers if rows / n <= fitting), None)
        if found and rows / found >= min(rows, LEAST_ROWS):
            return with_remat(cfg, policy), found
    return with_remat(cfg, policies[-1]), accumulate or found or rows


def with_remat(cfg: CrabConfig, policy: str) -> CrabConfig:
    """Return the sizes with a policy of recomputation."""
    return dataclasses.replace(cfg, llama=dataclasses.replace(cfg.llama, remat=policy))


def answer_bytes(cfg: CrabConfig, length: int, new: int) -> int:
    """Estimate the bytes of a row whose prompt of `length` positions is answered with `new` tokens.

    The sum has the cache, one layer's attention scores and feed-forward while the prompt is read, and the logits. The
    cache counts twice, because it may be copied from one program to the next.
    """
    llama, width = cfg.llama, jax.numpy.dtype(cfg.llama.dtype).itemsize
    cache = 2 * width * llama.layers * (length + new) * llama.kv_heads * llama.head_dim
    scores = 2 * 4 * llama.heads * length**2
    feed_forward = 2 * width * length * 2 * llama.mlp_dim
    return 2 * cache + scores + feed_forward + 4 * llama.padded_vocab


def answered_rows(config: RunConfig, weights: str, new: int, tensor: int = 0, devices: Any = None) -> int:
    """Return how many rows this process answers at a time: the largest power of two that memory has room for.

    At most MOST_ROWS for each copy of the model; ROWS_UNKNOWN where a device's memory is unknown. `tensor` and
    `devices` are those of `serving_mesh`.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    memory, model = chips.memory_of(devices[0]), config.model.build()
    if memory is None:
        return ROWS_UNKNOWN
    mesh = serving_mesh(config, weights, len(devices), tensor, devices)
    split = mesh.shape["tensor"]
    size = quantize.BITS[weights] / 8 if weights in quantize.BITS else jax.numpy.dtype(model.cfg.dtype).itemsize
    free = ANSWER_SHARE * memory - run_params.count(run_params.abstract_params(model)) * size / split
    fitting = free * split / answer_bytes(config.model, max(config.data.lengths), new)
    copies: int = mesh.shape["data"]
    return copies * min(MOST_ROWS, 1 << int(math.log2(max(1, fitting))))


def serving_mesh(config: RunConfig, weights: str, batch_size: int, tensor: int = 0, devices: Any = None) -> Mesh:
    """Return the mesh on which this process answers batches of `batch_size` rows: copies of the model.

    Each copy is distributed over `tensor` of the local devices (or of `devices`). `tensor` 0 is inferred: the fewest
    devices whose SERVING_SHARE holds the parameters; integer `weights` are never split. The number of copies is the
    largest that divides both the devices and the batch. Raises InputError when `tensor` does not divide the devices, or
    is to split integers.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    model, integers = config.model.build(), weights in quantize.BITS
    if tensor > 1 and integers:
        raise InputError(
            "command line",
            "--tensor",
            f"{weights} matrices are not split over devices",
            "use --weights float, or --tensor 1",
        )
    if tensor and len(devices) % tensor:
        raise InputError(
            "command line", "--tensor", f"{tensor} does not divide the {len(devices)} devices here", "give a divisor"
        )
    if not tensor:
        needed = run_params.count(run_params.abstract_params(model)) * jax.numpy.dtype(model.cfg.dtype).itemsize
        memory = chips.memory_of(devices[0])
        tensor = 1 if integers else sharding.infer_split(len(devices), needed, memory, SERVING_SHARE)
    free = len(devices) // tensor
    copies = max(n for n in range(1, free + 1) if free % n == 0 and batch_size % n == 0)
    return sharding.make_mesh(copies, 1, tensor, devices[: copies * tensor])
