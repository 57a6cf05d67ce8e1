"""Arithmetic and memory traffic of a program, counted in its jaxpr, and the roofline time on a chip.

A kernel (Pallas) counts with its own cost estimate, or as its body times its grid, as if no block were skipped; it
reads its operands and writes its results once. Inside a `shard_map` the body runs on every device of its axes.

Counting the traced program needs no formula per module and is right for every config: frozen matrices have no weight
gradient in it, and modules before the first trained one have no backward pass. A frozen weight therefore costs 2 FLOP
per token forward and 2 backward (4 N), a trained one 6 N, and rematerialisation counts where it happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from crab_jax.parallel.chips import Chip

Moves = dict[str, dict[str, int]]  # {kind of collective: {"count", "bytes"}}, as `hlo.collectives` returns them


class Work(NamedTuple):
    """FLOPs of all matrix products and convolutions, and the bytes that they read and write.

    Elementwise operations are taken as fused into their neighbours, so both are lower bounds.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def plus(self, other: Work, times: int = 1) -> Work:
        """Return the sum with `times` runs of another program."""
        return Work(self.flops + times * other.flops, self.bytes + times * other.bytes)


class Kernel(NamedTuple):
    """A Pallas kernel as it is called: its name, the shapes of its results on a device, and what one call does.

    work: products, and the operands and results. vector: elements that its other operations compute.
    """

    name: str
    results: tuple[tuple[int, ...], ...]
    work: Work
    vector: float


def count(function: Callable[..., Any], *args: Any) -> Work:
    """Return the work of one call; `args` may be shapes (jax.ShapeDtypeStruct)."""
    return count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def kernels(jaxpr: core.Jaxpr) -> list[Kernel]:
    """Return every kernel that a program calls, once for each place that calls it."""
    out = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            arrays: list[Any] = [v.aval for v in eqn.outvars]
            shapes = tuple(tuple(array.shape) for array in arrays)
            steps = math.prod(_grid(eqn))
            out.append(Kernel(_name(eqn), shapes, _kernel_work(eqn), steps * _vector(eqn.params["jaxpr"])))
        else:
            out += [kernel for part in _inner(eqn) for kernel in kernels(part)]
    return out


def _inner(eqn: Any) -> list[core.Jaxpr]:
    return [
        j.jaxpr if isinstance(j, core.ClosedJaxpr) else j
        for param in eqn.params.values()
        for j in (param if isinstance(param, (tuple, list)) else (param,))
        if isinstance(j, (core.Jaxpr, core.ClosedJaxpr))
    ]


def _name(eqn: Any) -> str:
    """Return the name of a kernel, which ends the names of its instructions."""
    return str(eqn.params.get("name") or str(eqn.source_info.name_stack).rpartition("/")[2])


def _grid(eqn: Any) -> list[int]:
    return [size for size in eqn.params["grid_mapping"].grid if isinstance(size, int)]


def _kernel_work(eqn: Any) -> Work:
    stated = eqn.params.get("cost_estimate")
    arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    touched = sum(a.size * np.dtype(a.dtype).itemsize for a in arrays)
    if stated is not None:
        return Work(stated.flops, stated.bytes_accessed)
    return Work(math.prod(_grid(eqn)) * count_jaxpr(eqn.params["jaxpr"]).flops, touched)


def _vector(jaxpr: core.Jaxpr) -> float:
    """Return the elements of floating numbers that are computed other than by products, in one step of the grid."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [_vector(part) for part in _inner(eqn)]
        if eqn.primitive.name == "cond":
            total += max(inner)
        elif inner:
            total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        elif eqn.primitive.name not in ("dot_general", "get", "swap", "broadcast_in_dim", "reshape", "squeeze"):
            total += sum(
                math.prod(getattr(v.aval, "shape", ()))
                for v in (eqn.invars if eqn.primitive.name.startswith("reduce") else eqn.outvars)
            )
    return total


def count_jaxpr(jaxpr: core.Jaxpr) -> Work:
    """Return the work of a traced program, on all its devices together."""
    total = Work()
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, _inner(eqn)
        if name == "pallas_call":
            total = total.plus(_kernel_work(eqn))
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            parts = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
            total = total.plus(count_jaxpr(eqn.params["jaxpr"]), parts)
        elif name in ("dot_general", "conv_general_dilated"):
            arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            total = total.plus(Work(_product_flops(eqn), sum(a.size * np.dtype(a.dtype).itemsize for a in arrays)))
        elif name == "cond":
            total = total.plus(max(map(count_jaxpr, inner)))
        else:
            for part in inner:
                total = total.plus(count_jaxpr(part), eqn.params["length"] if name == "scan" else 1)
    return total


def _product_flops(eqn: Any) -> float:
    left, right = (v.aval for v in eqn.invars[:2])
    out = eqn.outvars[0].aval
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        flops: float = 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
    else:
        spec = eqn.params["dimension_numbers"].rhs_spec  # (out features, in features, space...)
        flops = 2.0 * out.size * right.size / right.shape[spec[0]]
    return flops


def roofline(
    chip: Chip, work: Work, interconnect: float = 0.0, between_slices: Moves | None = None
) -> dict[str, float]:
    """Return the least seconds that a chip needs: {"compute", "hbm", "interconnect", "step"}.

    `interconnect` are the seconds of the collectives within a slice (`links`), `between_slices` those that cross the
    data centre's network, whose time is "dcn", unless its speed is unknown. The step is the largest, as if they
    overlapped perfectly.
    """
    times = {"compute": work.flops / chip.flops, "hbm": work.bytes / chip.hbm_bandwidth, "interconnect": interconnect}
    if between_slices is not None and chip.dcn_bandwidth:
        times["dcn"] = sent(between_slices) / chip.dcn_bandwidth
    return {**times, "step": max(times.values())}


def sent(collectives: Moves) -> float:
    """Return the bytes that a chip sends at most; an all-reduce sends its bytes twice."""
    return sum((2 if kind == "all-reduce" else 1) * moves["bytes"] for kind, moves in collectives.items())
