"""The mesh and micro-batches of a run or of a model that generates, inferred from memory unless configured."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from crab_jax import optim
from crab_jax.config import RunConfig
from crab_jax.io.errors import InputError
from crab_jax.models import quantize
from crab_jax.models.crab import CrabConfig
from crab_jax.parallel import chips, sharding
from crab_jax.runs import run_params

# The temporaries of a micro-batch, as estimated by `row_bytes`, may take this share of a device's memory.
ACTIVATION_SHARE = 0.35
# Parameters may take this share of a device that generates; the rest is for the cache and activations.
SERVING_SHARE = 0.6
# Parameters, and all that a batch of answers needs, may take this share of it.
ANSWER_SHARE = 0.85
MOST_ROWS = 64  # of a batch of answers: beyond it, a row waits for the longest answer of too many others
ROWS_UNKNOWN = 16
# Measured ratio of the compiler's allocation for a row and the sum in `row_bytes`.
MEASURED = 1.5


def state_bytes(config: RunConfig) -> int:
    """Return the bytes of all parameters and the optimizer state.

    A trained scalar has a value, a gradient and two moments of 4 bytes each.
    """
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))
    trainable, frozen = optim.split(shapes, config.trainable, config.frozen)
    return run_params.count(frozen) * jax.numpy.dtype(config.frozen_dtype).itemsize + 16 * run_params.count(trainable)


def row_bytes(cfg: CrabConfig, length: int) -> int:
    """Estimate the bytes of temporaries per batch row of `length` positions, in a training step with `remat="full"`.

    The sum has the layers' inputs, one layer's attention scores and feed-forward, and the logits, each with its
    gradient.
    """
    llama = cfg.llama
    inputs = 2 * llama.layers * length * llama.hidden
    scores = 3 * 4 * llama.heads * length**2
    feed_forward = 8 * 2 * length * llama.mlp_dim
    logits = 3 * 4 * length * llama.padded_vocab
    return int(MEASURED * (inputs + scores + feed_forward + logits))


def mesh_of(config: RunConfig, devices: Any = None) -> Mesh:
    """Return the mesh of a run over `devices` (all, when None); sizes of 0 are inferred (see `sharding.make_mesh`)."""
    needed = 0 if config.mesh.fsdp else state_bytes(config)
    return sharding.make_mesh(**vars(config.mesh), devices=devices, state_bytes=needed)


def micro_batches(config: RunConfig, mesh: Mesh) -> int:
    """Return `optim.accumulate`, or for 0 the fewest micro-batches whose longest rows fit ACTIVATION_SHARE of a device.

    1 where a device's memory is unknown. Raises InputError when batch, mesh and micro-batches do not divide.
    """
    accumulate = config.optim.accumulate
    sharding.check_batch(config.mixture.batch_size, mesh, accumulate or 1)
    memory = chips.memory_of(mesh.devices.flat[0])
    if accumulate or memory is None:
        return accumulate or 1
    rows = config.mixture.batch_size // sharding.row_groups(mesh)
    each = row_bytes(config.model, max(config.data.lengths)) / mesh.shape["tensor"]
    fitting = ACTIVATION_SHARE * memory / each
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows / n <= fitting or n == rows))


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
