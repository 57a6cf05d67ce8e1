"""How long the collectives of a compiled program take on the links between the chips of a slice."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from jax.sharding import Mesh

from crab_jax.aot import hlo
from crab_jax.parallel import torus
from crab_jax.parallel.chips import Chip


def seconds(program: list[hlo.Op], mesh: Mesh, chip: Chip, each: int) -> dict[str, float]:
    """Return {kind of collective: seconds per run of the program}, one after the other, of those within a slice.

    each: devices of a slice, or of a node of GPUs. Where the places of the chips are unknown, and on GPUs, a chip
    receives at the sum of its links.
    """
    devices: list[Any] = list(mesh.devices.flat)
    box = torus.torus_of(devices[:each])
    out: dict[str, float] = defaultdict(float)
    for kind, size, op in hlo.moves(program):
        groups = op.groups or (tuple(range(len(devices))),)
        if op.between_slices or any(chip_ // each != group[0] // each for group in groups for chip_ in group):
            continue
        if box is None:
            alone = size * (2 if kind == "all-reduce" else 1) / chip.ici_bandwidth
        else:
            alone = _on_links(kind, size, groups, devices, box, chip.link_bandwidth)
        out[kind] += op.times * alone
    return dict(out)


def _on_links(
    kind: str, size: int, groups: tuple[tuple[int, ...], ...], devices: list[Any], box: torus.Torus, link: float
) -> float:
    """Return the seconds of the slowest group, and of a permutation those of its most loaded link."""
    if kind == "collective-permute":
        pairs = tuple(_place(devices[chip]) for pair in groups for chip in pair)
        return torus.seconds(kind, size, pairs, box, link)
    places = (tuple(sorted(_place(devices[chip]) for chip in group)) for group in groups)
    return max(torus.seconds(kind, size, group, box, link) for group in places)


def _place(device: Any) -> torus.Place:
    return tuple(map(int, device.coords))
