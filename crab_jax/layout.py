"""How a run lies on its devices: mesh and micro-batches, inferred from memory where the config leaves them at 0."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crab_jax import chips, optim, runs, sharding
from crab_jax.config import model_config
from crab_jax.models.crab import Crab, CrabConfig

# The temporaries of a micro-batch may take this share of a device's memory, as `row_bytes` estimates them.
ACTIVATION_SHARE = 0.35
# What the compiler allocates for a row over what `row_bytes` adds up by hand.
MEASURED = 1.5


def state_bytes(config: ConfigDict) -> int:
    """Bytes of all parameters and of the optimizer state: a trained scalar has a value, a gradient and two moments."""
    shapes = nn.unbox(runs.abstract_params(Crab(model_config(config))))
    trainable, frozen = optim.split(shapes, config.trainable, config.frozen)
    return runs.count(frozen) * jax.numpy.dtype(config.frozen_dtype).itemsize + 16 * runs.count(trainable)


def row_bytes(cfg: CrabConfig, length: int) -> int:
    """Estimated bytes of temporaries per batch row of `length` positions, in a training step with `remat="full"`:
    the layers' inputs, one layer's attention scores and feed-forward, and the logits, each with its gradient."""
    llama = cfg.llama
    inputs = 2 * llama.layers * length * llama.hidden
    scores = 3 * 4 * llama.heads * length**2
    feed_forward = 8 * 2 * length * llama.mlp_dim
    logits = 3 * 4 * length * llama.padded_vocab
    return int(MEASURED * (inputs + scores + feed_forward + logits))


def mesh_of(config: ConfigDict, devices: Any = None) -> Mesh:
    """The mesh of a run config over `devices` (all, when None); sizes of 0 are inferred (see `sharding.make_mesh`)."""
    needed = 0 if config.mesh.fsdp else state_bytes(config)
    return sharding.make_mesh(**config.mesh, devices=devices, state_bytes=needed)


def micro_batches(config: ConfigDict, mesh: Mesh) -> int:
    """`optim.accumulate`; 0 stands for the fewest micro-batches whose longest rows fit ACTIVATION_SHARE of a device.

    1 where a device's memory is unknown. Raises InputError when batch, mesh and micro-batches do not divide.
    """
    accumulate = config.optim.accumulate
    sharding.check_batch(config.data.batch_size, mesh, accumulate or 1)
    memory = chips.memory_of(mesh.devices.flat[0])
    if accumulate or memory is None:
        return accumulate or 1
    rows = config.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    each = row_bytes(model_config(config), max(config.data.lengths)) / mesh.shape["tensor"]
    fitting = ACTIVATION_SHARE * memory / each
    return next(n for n in range(1, rows + 1) if rows % n == 0 and (rows / n <= fitting or n == rows))
