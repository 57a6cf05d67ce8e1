"""The device mesh, and the table that assigns mesh axes to logical axes.

Modules box their parameters with logical axes; activations are pinned by `nn.with_logical_constraint` in the modules,
which has no effect outside `constrained`. Frozen matrices are therefore gathered layer by layer where they are used,
and activations never move to meet a sharded matrix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crab_jax.io.errors import InputError
from crab_jax.parallel import chips, torus

AXES = ("data", "fsdp", "tensor")
SLICES = "slices"  # the first axis of a mesh over several slices, and the only one that crosses between them
ROWS = ("data", "fsdp")  # the axes that the batch rows of a slice are distributed over

# logical axis -> mesh axes. "batch" and "group" (rows that an fsdp group shares) occur in activations only, "embed" in
# parameters and looked-up embeddings, the others in both. LoRA's rank and heads have no logical axis, so they stay
# replicated, like everything outside the language model.
RULES = (
    ("batch", (SLICES, *ROWS)),
    ("group", (SLICES, "data")),
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
    data: int | None = None,
    fsdp: int | None = 1,
    tensor: int | None = 1,
    devices: Any = None,
    state_bytes: int = 0,
    slices: int = 0,
) -> Mesh:
    """Return a mesh over ("data", "fsdp", "tensor"), or over several slices ("slices", "data", "fsdp", "tensor").

    Sizes that are None or 0 are inferred: `tensor` as 1, `fsdp` from the memory of a device and `state_bytes`, the
    bytes of parameters and optimizer state together (see `infer_split`, `most_links`), `data` as what the others leave,
    and `slices` (also 1) as in `slices_of`. `data` counts the groups of all slices; on the mesh it is split into the
    axis "slices", whose neighbours talk over the data centre's network, and the "data" of one slice. Raises InputError
    when the sizes do not multiply to the number of devices, or when fsdp or tensor would cross slices.
    """
    groups = slices_of(list(np.asarray(jax.devices() if devices is None else devices, dtype=object).flat), slices)
    slices, each = len(groups), len(groups[0])
    total = slices * each
    tensor = tensor or 1
    if not fsdp:
        free = max(1, total // (tensor * data) if data else each // tensor)
        least = free if data else infer_split(free, state_bytes // tensor, chips.memory_of(groups[0][0]))
        fsdp = least if data else most_links(groups[0], least, free, tensor)
    data = data or max(1, total // (fsdp * tensor))
    if data * fsdp * tensor != total:
        raise InputError(
            "--config",
            "mesh",
            f"{data} x {fsdp} x {tensor} is not {total} devices",
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to the device count",
        )
    if data % slices:
        raise InputError(
            "--config",
            "mesh",
            f"{data} x {fsdp} x {tensor} does not divide over {slices} slices of {each} devices",
            f"only mesh.data may cross slices: make mesh.fsdp x mesh.tensor a divisor of {each}",
        )
    shape = (data // slices, fsdp, tensor)
    blocks = [torus.arranged(group, *shape) for group in groups]
    if all(block is not None for block in blocks):
        arranged = np.stack(blocks)  # type: ignore[arg-type]  # none of them is None
    elif groups[0][0].platform != "tpu":
        arranged = np.array(groups, dtype=object).reshape(slices, *shape)
    elif slices == 1:  # neighbours in the mesh are neighbours on the torus
        arranged = mesh_utils.create_device_mesh(shape, groups[0], allow_split_physical_axes=True)
    else:
        every = [device for group in groups for device in group]
        arranged = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), every, allow_split_physical_axes=True)
    axes = AXES if slices == 1 else (SLICES, *AXES)
    return Mesh(arranged.reshape([slices, *shape][-len(axes) :]), axes, axis_types=(AxisType.Auto,) * len(axes))


def slices_of(devices: list[Any], wanted: int = 0) -> list[list[Any]]:
    """Return the devices of each slice, slices in their order.

    TPU devices know their slice, and `wanted` can only confirm their number. Other devices are one slice unless more
    are `wanted`: then as many equal runs of them, in the order of their processes. Raises InputError for a number of
    slices that the devices do not have.
    """
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    groups = [found[index] for index in sorted(found)]
    if wanted > 1 and devices[0].platform != "tpu" and len(devices) % wanted == 0:
        each = len(devices) // wanted
        groups = [devices[start : start + each] for start in range(0, len(devices), each)]
    if wanted > 1 and len(groups) != wanted or len({len(group) for group in groups}) > 1:
        sizes = " and ".join(str(len(group)) for group in groups)
        raise InputError(
            "--config",
            "mesh.slices",
            f"is {wanted}, with {len(groups)} slices of {sizes} devices",
            "leave it 0 on TPU; elsewhere give a divisor of the number of devices",
        )
    return groups


def infer_split(devices: int, needed: int, memory: int | None, share: float = STATE_SHARE) -> int:
    """Return the smallest divisor of `devices` for which `needed` bytes take at most `share` of each device's memory.

    Returns 1 when the memory is unknown, and all devices when even they do not suffice.
    """
    if memory is None:
        return 1
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return next((n for n in divisors if needed / n <= share * memory), devices)


def most_links(devices: list[Any], least: int, most: int, tensor: int = 1) -> int:
    """Return over how many devices to split parameters: `least`, or up to 4 times as many that gather them faster.

    A square of four chips has twice the links of a pair. More than `least` chips must be faster by a fifth, because
    each then holds a smaller part; 1 stays 1, which gathers nothing. At most `most`, of which all are divisors.
    """

    def gathering(split: int) -> float:
        lanes = torus.split_lanes(devices, split, tensor)
        return (split - 1) / split / lanes if lanes else math.inf

    if least == 1 or gathering(least) == math.inf:
        return least
    trials = [split for split in (least, 2 * least, 4 * least) if split <= most and most % split == 0]
    best = least
    for split in trials:
        best = split if gathering(split) < 0.8 * gathering(best) else best
    return best


@contextlib.contextmanager
def constrained(mesh: Mesh | None) -> Iterator[None]:
    """Apply the models' logical constraints on `mesh` while tracing within this context (None: no constraints)."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules(mesh)):
        yield


def constrain(tree: Any, specs: Any) -> Any:
    """Return the arrays of `tree` with the PartitionSpecs of `specs`, on the mesh of `constrained`.

    Without it, gradients are spread like the optimizer's moments already inside the loop over layers, where every layer
    of a scan then exchanges its part with all others.
    """
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def by_slice(gradient: Callable[..., Any], mesh: Mesh, trainable: Any) -> Callable[..., Any]:
    """Return `gradient(params, batch, rng) -> (grads, metrics)`, taken by each slice of its rows and added over slices.

    Left to itself, the compiler adds gradients over slices once per layer and micro-batch, and several devices of a
    slice send the same part. So each device sends its own part of the gradient once per step, and nothing else crosses
    slices but the metrics. `trainable` gives the shardings of gradients. A mesh of one slice leaves `gradient` as it
    is.
    """
    if SLICES not in mesh.shape:
        return gradient

    def of_slice(params: Any, batch: Any, rng: jax.Array) -> Any:
        own = tuple((name, _without(axes)) for name, axes in rules(mesh))
        with nn.logical_axis_rules(own):
            grads, metrics = gradient(params, batch, rng)
        parts = jax.tree.map(
            lambda grad, leaf: jax.lax.with_sharding_constraint(grad, _in_parts(leaf, mesh)), grads, trainable
        )
        return jax.lax.psum((parts, metrics), SLICES)

    return jax.shard_map(
        of_slice,
        mesh=mesh.abstract_mesh,
        in_specs=(PartitionSpec(), PartitionSpec(SLICES), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={SLICES},
        check_vma=False,
    )


def _in_parts(leaf: Any, mesh: Mesh) -> PartitionSpec:
    """Return the spec of a leaf that is split over all axes of a slice, as far as they fit."""
    spec = [_tuple(axes) for axes in leaf.sharding.spec] + [()] * (len(leaf.shape) - len(leaf.sharding.spec))
    for axis in AXES:
        if not any(axis in axes for axes in spec):
            rest = [size // _parts(axes, mesh) for size, axes in zip(leaf.shape, spec, strict=True)]
            fitting = [(size, number) for number, size in enumerate(rest) if size % mesh.shape[axis] == 0]
            if fitting:
                largest = max(fitting)[1]
                spec[largest] = (*spec[largest], axis)
    return PartitionSpec(*(axes or None for axes in spec))


def _parts(axes: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _tuple(axes: Any) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _without(axes: Any) -> Any:
    return tuple(axis for axis in axes if axis != SLICES) if isinstance(axes, tuple) else axes


def rules(mesh: Mesh) -> tuple[tuple[str, Any], ...]:
    """Return RULES with the axes that the mesh has."""
    return tuple((logical, _present(axes, mesh) if isinstance(axes, tuple) else axes) for logical, axes in RULES)


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes that batch rows are distributed over."""
    return _present((SLICES, *ROWS), mesh)


def row_groups(mesh: Mesh) -> int:
    """Return the number of groups of devices that batch rows are distributed over."""
    return _parts(row_axes(mesh), mesh)


def _present(axes: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in mesh.shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batch rows over slices, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding with one copy per device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Return a NamedSharding per parameter, from the logical axes that `init` boxed it with."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules(mesh))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise InputError if the data axes and micro-batches do not divide the global batch."""
    rows = row_groups(mesh)
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

    Moments of replicated parameters are distributed over the devices of a slice all the same, each of which then
    updates its own part (ZeRO stage 1). Every slice has all of them, so that no updated parameter crosses slices.
    """
    by_path = {tuple(map(str, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trainable)[0]}

    def of(path: Any, _: Any) -> NamedSharding:
        path = tuple(map(str, path))
        leaf = next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), None)
        if leaf is None:
            return replicated(mesh)
        return moment_sharding(leaf) if path[0] == ".opt" else leaf.sharding

    return jax.tree_util.tree_map_with_path(of, state)


def moment_sharding(leaf: Any) -> NamedSharding:
    """Return the sharding of a leaf; if it is replicated, its largest divisible axis is split over data and fsdp."""
    own: NamedSharding = leaf.sharding
    mesh = own.mesh
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = all(axis is None or mesh.shape[axis] == 1 for axis in own.spec)
    fitting = [(size, number) for number, size in enumerate(leaf.shape) if size % rows == 0]
    if rows == 1 or not whole or not fitting or leaf.size < SPREAD_FROM:
        return own
    axis = max(fitting)[1]
    return NamedSharding(mesh, PartitionSpec(*(ROWS if number == axis else None for number in range(len(leaf.shape)))))
