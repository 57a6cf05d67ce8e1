"""Arithmetic and memory traffic of a program, counted in its jaxpr, and the roofline time on a chip.

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


def count(function: Callable[..., Any], *args: Any) -> Work:
    """Return the work of one call; `args` may be shapes (jax.ShapeDtypeStruct)."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> Work:
    total = Work()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = [
            j.jaxpr if isinstance(j, core.ClosedJaxpr) else j
            for param in eqn.params.values()
            for j in (param if isinstance(param, (tuple, list)) else (param,))
            if isinstance(j, (core.Jaxpr, core.ClosedJaxpr))
        ]
        if name in ("dot_general", "conv_general_dilated"):
            arrays: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            total = total.plus(Work(_product_flops(eqn), sum(a.size * np.dtype(a.dtype).itemsize for a in arrays)))
        elif name == "cond":
            total = total.plus(max(map(_count, inner)))
        else:
            for part in inner:
                total = total.plus(_count(part), eqn.params["length"] if name == "scan" else 1)
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


def roofline(chip: Chip, work: Work, collectives: Moves, between_slices: Moves | None = None) -> dict[str, float]:
    """Return the least seconds that a chip needs: {"compute", "hbm", "interconnect", "step"}.

    `collectives` are those within a slice, `between_slices` those that cross the data centre's network, whose
    time is "dcn", unless its speed is unknown. The step is the largest, as if they overlapped perfectly.
    """
    times = {
        "compute": work.flops / chip.flops,
        "hbm": work.bytes / chip.hbm_bandwidth,
        "interconnect": sent(collectives) / chip.ici_bandwidth,
    }
    if between_slices is not None and chip.dcn_bandwidth:
        times["dcn"] = sent(between_slices) / chip.dcn_bandwidth
    return {**times, "step": max(times.values())}


def sent(collectives: Moves) -> float:
    """Return the bytes that a chip sends at most; an all-reduce sends its bytes twice."""
    return sum((2 if kind == "all-reduce" else 1) * moves["bytes"] for kind, moves in collectives.items())
