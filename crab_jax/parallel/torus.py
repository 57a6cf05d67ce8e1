"""The links between the TPU chips of a slice, and how long collectives take on them.

Chips of v5e and v6e stand in a plane, those of v4 and v5p in a cube, and each has a link to its neighbours. The ends of
an axis are linked as well (it "wraps around") if it is a full 16 on v5e and v6e, and on v4 and v5p if every axis is a
multiple of 4, the side of the cubes that optical switches join. Sources: cloud.google.com/tpu/docs/system-architecture;
the chapter on TPUs of jax-ml.github.io/scaling-book.

A group of chips that forms a block takes part in a collective over the links within the block. What all have to receive
passes the links of its corner: one for every axis along which the block extends, two if it wraps around there. Where
every second chip along an axis belongs to the group, two groups share the links.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

FULL_AXIS = {"TPU v5 lite": 16, "TPU v6 lite": 16}  # device kind: length of an axis that wraps around
CUBE = {"TPU v4": 4, "TPU v5": 4}  # device kind: side of the cubes that are joined

Place = tuple[int, ...]


class Torus(NamedTuple):
    """The sizes of the axes of a slice, and which of them wrap around."""

    sizes: tuple[int, ...]
    wraps: tuple[bool, ...]


def torus_of(devices: list[Any]) -> Torus | None:
    """Return the torus that the chips of a slice fill; None for devices that have no places or do not fill a box."""
    places: list[Any] = [getattr(device, "coords", None) for device in devices]
    if not devices or None in places or devices[0].platform != "tpu":
        return None
    low, high = np.min(places, axis=0), np.max(places, axis=0)
    sizes = tuple(int(size) for size in high - low + 1)
    if math.prod(sizes) != len(devices) or len({tuple(place) for place in places}) != len(devices):
        return None
    kind = devices[0].device_kind
    if kind in CUBE:
        whole = all(size % CUBE[kind] == 0 for size in sizes)
        return Torus(sizes, (whole,) * len(sizes))
    return Torus(sizes, tuple(size == FULL_AXIS.get(kind) for size in sizes))


@functools.lru_cache(maxsize=4096)
def lanes(group: tuple[Place, ...], torus: Torus) -> float:
    """Return how many links bring data to the chip of a group that has the fewest; 1 for a group that is no block."""
    axes = _block(group, torus)
    if axes is None:
        return 1.0
    return sum((2 if ring else 1) / stride for count, stride, ring in axes if count > 1) or 1.0


def _block(group: tuple[Place, ...], torus: Torus) -> list[tuple[int, int, bool]] | None:
    """Return (chips, distance between them, whether they are a ring) along every axis; None for no block."""
    out = []
    for axis, size in enumerate(torus.sizes):
        found = sorted({place[axis] for place in group})
        gaps = {b - a for a, b in itertools.pairwise(found)}
        if len(gaps) > 1:
            return None
        stride = gaps.pop() if gaps else 1
        out.append((len(found), stride, torus.wraps[axis] and len(found) * stride == size))
    return out if math.prod(count for count, _, _ in out) == len(group) else None


def seconds(kind: str, result_bytes: int, group: tuple[Place, ...], torus: Torus, link: float) -> float:
    """Return the seconds of a collective of one group (for a permutation: its pairs, one after the other).

    result_bytes: those of the result on one chip. link: bytes/s of one link in one direction.
    """
    number = len(group)
    if kind == "collective-permute":
        return _most_loaded(group, torus) * result_bytes / link
    if number < 2:
        return 0.0
    if kind in ("all-to-all", "ragged-all-to-all"):
        axes = _block(group, torus) or [(number, 1, False)]
        # Half of the chips along an axis send to the other half, over one link, or over two if it is a ring.
        return max(result_bytes * count * stride / (8 if ring else 4) for count, stride, ring in axes) / link
    whole = result_bytes * number if kind == "reduce-scatter" else result_bytes
    times = 2 if kind == "all-reduce" else 1
    return times * whole * (number - 1) / number / (lanes(group, torus) * link)


@functools.lru_cache(maxsize=4096)
def _most_loaded(pairs: tuple[Place, ...], torus: Torus) -> int:
    """Return how many of the messages between pairs of chips share a link, if all go along one axis after the other."""
    load: Counter[tuple[Place, int, int]] = Counter()
    for start, end in zip(pairs[::2], pairs[1::2], strict=True):
        here = list(start)
        for axis, size in enumerate(torus.sizes):
            way = end[axis] - here[axis]
            if torus.wraps[axis] and abs(way) > size / 2:
                way -= int(math.copysign(size, way))
            step = 1 if way > 0 else -1
            for _ in range(abs(way)):
                load[tuple(here), axis, step] += 1
                here[axis] = (here[axis] + step) % size
    return max(load.values(), default=0)


def arranged(devices: list[Any], data: int, fsdp: int, tensor: int) -> np.ndarray | None:
    """Return the chips of a slice as [data, fsdp, tensor] such that the groups of `tensor` and `fsdp` have most links.

    Each group is a block: four chips are a square, not a line. None where the places of the chips are unknown or no
    blocks of these sizes fill them.
    """
    torus = torus_of(devices)
    if torus is None:
        return None
    found = _blocks(torus, fsdp, tensor)
    if found is None:
        return None
    outer, inner = found
    rest = [size // f // t for size, f, t in zip(torus.sizes, outer, inner, strict=True)]
    low = np.min([device.coords for device in devices], axis=0)
    grid = np.empty(torus.sizes, dtype=object)
    for device in devices:
        grid[tuple(np.asarray(device.coords) - low)] = device
    split = grid.reshape([n for each in zip(rest, outer, inner, strict=True) for n in each])
    axes = len(torus.sizes)
    order = [3 * axis + part for part in range(3) for axis in range(axes)]
    return split.transpose(order).reshape(data, fsdp, tensor)


def split_lanes(devices: list[Any], fsdp: int, tensor: int) -> float | None:
    """Return the `lanes` of the groups of `fsdp` in `arranged`; None where there are none."""
    torus = torus_of(devices)
    found = _blocks(torus, fsdp, tensor) if torus else None
    return _lanes_of(torus, *found)[1] if torus and found else None


@functools.lru_cache(maxsize=256)
def _blocks(torus: Torus, fsdp: int, tensor: int) -> tuple[Place, Place] | None:
    """Return the sizes along the axes of the blocks of `fsdp` and of `tensor` with the most links, `tensor` first.

    Of blocks with as many, the squarest along the first axes, as the chips of a host are.
    """
    trials = [
        (outer, inner)
        for inner in _factors(tensor, torus.sizes)
        for outer in _factors(fsdp, tuple(size // n for size, n in zip(torus.sizes, inner, strict=True)))
    ]
    return max(trials, key=lambda trial: (_lanes_of(torus, *trial), -max(trial[0]), trial), default=None)


def _factors(number: int, sizes: tuple[int, ...]) -> list[Place]:
    """Return the ways to write a number as a product of divisors of `sizes`, one of each."""
    if not sizes:
        return [()] if number == 1 else []
    first = [n for n in range(1, sizes[0] + 1) if sizes[0] % n == 0 and number % n == 0]
    return [(n, *rest) for n in first for rest in _factors(number // n, sizes[1:])]


def _lanes_of(torus: Torus, outer: Place, inner: Place) -> tuple[float, float]:
    """Return the lanes of the groups of `tensor`, whose chips are neighbours, and of `fsdp`.

    A pair that compares as larger has the faster groups.
    """
    near = tuple(itertools.product(*(range(n) for n in inner)))
    far = tuple(itertools.product(*(range(0, n * step, step) for n, step in zip(outer, inner, strict=True))))
    return lanes(near, torus), lanes(far, torus)
