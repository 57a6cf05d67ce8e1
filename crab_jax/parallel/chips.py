"""Specifications of TPU chips, used for mesh inference and roofline estimates.

Sources: the "key chip specifications" tables of cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (peak bf16 compute, HBM
bandwidth, inter-chip interconnect summed over a chip's links, one way); `hbm_bytes` is what the TPU compiler leaves to
a program according to its own out-of-memory errors, a little less than the nominal 32, 16, 95 and 32 GB. The data
centre's network: "data center network bandwidth per Pod" of v5e (6.4 Tbit/s) and v6e (25.6 Tbit/s) over the pod's 256
chips, and "DCN bandwidth per chip" of v5p (50 Gbit/s); Google gives no figure for v4. The bandwidth of one link is that
of the chapter on TPUs of jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from crab_jax.io.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of a chip.

    kind: JAX's `device_kind`. flops: peak bf16 FLOP/s. hbm_bytes: usable memory in bytes. Bandwidths are in bytes/s:
    of the memory, of the interconnect within a slice (ICI), and of the network between slices (DCN; None: unknown).
    link_bandwidth: bytes/s of one link of the interconnect in one direction, as it is reached. clock: Hz of the cores,
    at which the matrix units reach `flops`. vector_ops: float32 operations per second of the vector units (4 x 8 x 128
    lanes a core).
    """

    name: str
    kind: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float | None
    link_bandwidth: float
    clock: float
    vector_ops: float


CHIPS = (
    Chip("v4", "TPU v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, None, 45e9, 1.05e9, 8.6e12),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, 45e9, 1.5e9, 6.1e12),
    Chip("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9, 90e9, 1.75e9, 14.3e12),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1640e9, 448e9, 12.5e9, 90e9, 1.75e9, 7.2e12),
)


def chip_of(device: Any) -> Chip | None:
    """Return the specification of a JAX device (real, or of an ahead-of-time topology); None if it is not listed."""
    return next((chip for chip in CHIPS if chip.kind == device.device_kind), None)


def chips_of(topology: str) -> tuple[str, int]:
    """Return (name of the chip, number of chips) of a topology such as v5e:16x16. Raises InputError."""
    name, _, shape = topology.partition(":")
    sizes = shape.split("x")
    known = [chip.name for chip in CHIPS]
    if name not in known or not all(n.isdecimal() and len(n) < 6 and int(n) for n in sizes):
        raise InputError(
            "command line",
            "--topology",
            f"{topology!r:.80} is unknown",
            f"write CHIP:SHAPE, like v5e:16x16; chips: {', '.join(known)}",
        )
    return name, math.prod(map(int, sizes))


def memory_of(device: Any) -> int | None:
    """Return the bytes of memory a program may use on a device; None where unknown (CPU)."""
    chip = chip_of(device)
    if chip is not None:
        return chip.hbm_bytes
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")
