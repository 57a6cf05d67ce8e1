"""Device mesh and the one table that says which mesh axis each logical parameter axis takes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crab_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axis. LoRA's rank and heads carry no name, so they stay replicated.
RULES = (("embed", "fsdp"), ("vocab", "tensor"), ("heads", "tensor"), ("kv", "tensor"), ("mlp", "tensor"),
         ("layers", None))


def make_mesh(data: int | None = None, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """Mesh over ("data", "fsdp", "tensor"); `data` fills what the others leave when None or 0.

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    data = data or max(1, devices.size // (fsdp * tensor))
    if data * fsdp * tensor != devices.size:
        raise InputError("--config", "mesh", f"{data} x {fsdp} x {tensor} is not {devices.size} devices",
                         "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to the device count")
    return Mesh(devices.reshape(data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy per device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedSharding per parameter, from the logical axes that `init` boxed it with."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuse a global batch that the data axes cannot divide."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % rows:
        raise InputError("--config", "data.batch_size", f"{batch_size} rows do not divide over {rows} devices",
                         f"use a multiple of {rows}")


def state_shardings(state: Any, trainable: Any, mesh: Mesh) -> Any:
    """Shardings of a train state: optimizer moments lie where their parameters do, scalars everywhere."""
    by_path = {tuple(map(str, path)): leaf.sharding
               for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]}

    def of(path: Any, _: Any) -> NamedSharding:
        path = tuple(map(str, path))
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), replicated(mesh))

    return jax.tree_util.tree_map_with_path(of, state)
