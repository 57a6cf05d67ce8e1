"""The device mesh, and the table that assigns mesh axes to logical axes.

Modules box their parameters with logical axes; activations are pinned by `nn.with_logical_constraint` in the modules,
which has no effect outside `constrained`. Frozen matrices are therefore gathered layer by layer where they are used,
and activations never move to meet a sharded matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crab_jax.io.errors import InputError
from crab_jax.parallel import chips

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that batch rows are distributed over

# logical axis -> mesh axis. "batch" and "group" (rows that an fsdp group shares) occur in activations only, "embed" in
# parameters and looked-up embeddings, the others in both. LoRA's rank and heads have no logical axis, so they stay
# replicated, like everything outside the language model.
RULES = (
    ("batch", ROWS),
    ("group", "data"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)

# Parameters and optimizer state may take this share of a chip; the rest is for activations.
STATE_SHARE = 0.25
# Smaller optimizer moments are not worth a collective.
SPREAD_FROM = 2**16


def make_mesh(
    data: int | None = None, fsdp: int | None = 1, tensor: int | None = 1, devices: Any = None, state_bytes: int = 0
) -> Mesh:
    """Return a mesh over ("data", "fsdp", "tensor"); sizes that are None or 0 are inferred.

    `tensor` is inferred as 1, `fsdp` from the memory of a device and `state_bytes`, the bytes of parameters and
    optimizer state together (see `infer_split`), and `data` fills what the others leave. Raises InputError when the
    sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    tensor = tensor or 1
    if not fsdp:
        free = max(1, devices.size // (tensor * (data or 1)))
        fsdp = free if data else infer_split(free, state_bytes // tensor, chips.memory_of(devices.flat[0]))
    data = data or max(1, devices.size // (fsdp * tensor))
    if data * fsdp * tensor != devices.size:
        raise InputError(
            "--config",
            "mesh",
            f"{data} x {fsdp} x {tensor} is not {devices.size} devices",
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to the device count",
        )
    shape = (data, fsdp, tensor)
    if devices.flat[0].platform == "tpu":  # neighbours in the mesh are neighbours on the torus
        arranged = mesh_utils.create_device_mesh(shape, list(devices.flat), allow_split_physical_axes=True)
    else:
        arranged = devices.reshape(shape)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def infer_split(devices: int, needed: int, memory: int | None, share: float = STATE_SHARE) -> int:
    """Return the smallest divisor of `devices` for which `needed` bytes take at most `share` of each device's memory.

    Returns 1 when the memory is unknown, and all devices when even they do not suffice.
    """
    if memory is None:
        return 1
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return next((n for n in divisors if needed / n <= share * memory), devices)


@contextlib.contextmanager
def constrained(mesh: Mesh | None) -> Iterator[None]:
    """Apply the models' logical constraints on `mesh` while tracing within this context (None: no constraints)."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batch rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with one copy per device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding per parameter, from the logical axes that `init` boxed it with."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise InputError if the data axes and micro-batches do not divide the global batch."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (rows * accumulate):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            "--config",
            "data.batch_size",
            f"{batch_size} rows do not divide over {rows} devices{micro}",
            f"use a multiple of {rows * accumulate}",
        )


def check_params(abstract: Any, mesh: Mesh) -> None:
    """Raise InputError naming the first parameter that the mesh cannot divide.

    abstract: shapes with shardings.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        for size, axis in zip(leaf.shape, leaf.sharding.spec, strict=False):
            parts = 1 if axis is None else mesh.shape[axis]
            if size % parts:
                name = "/".join(str(key.key) for key in path)
                raise InputError(
                    "--config",
                    f"mesh.{axis}",
                    f"{parts} does not divide {size} of {name} {leaf.shape}",
                    f"use a divisor of {size}",
                )


def state_shardings(state: Any, trainable: Any, mesh: Mesh) -> Any:
    """Return the shardings of a train state: moments like their parameters, scalars replicated.

    Moments of replicated parameters are distributed over the devices all the same, each of which then updates its own
    part (ZeRO stage 1).
    """
    by_path = {tuple(map(str, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]}

    def of(path: Any, _: Any) -> NamedSharding:
        path = tuple(map(str, path))
        leaf = next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), None)
        if leaf is None:
            return replicated(mesh)
        return _spread(leaf, mesh) if path[0] == ".opt" else leaf.sharding

    return jax.tree_util.tree_map_with_path(of, state)


def _spread(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a leaf; if it is replicated, its largest divisible axis is split over data and fsdp."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    own: NamedSharding = leaf.sharding
    whole = all(axis is None or mesh.shape[axis] == 1 for axis in own.spec)
    fitting = [(size, number) for number, size in enumerate(leaf.shape) if size % rows == 0]
    if rows == 1 or not whole or not fitting or leaf.size < SPREAD_FROM:
        return own
    axis = max(fitting)[1]
    return NamedSharding(mesh, PartitionSpec(*(ROWS if number == axis else None for number in range(len(leaf.shape)))))
