"""Specifications of TPU chips and GPUs, used for mesh inference and estimates of time.

Sources: the "key chip specifications" tables of cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (peak bf16 compute, HBM
bandwidth, inter-chip interconnect summed over a chip's links, one way); `hbm_bytes` is what the TPU compiler leaves to
a program according to its own out-of-memory errors, a little less than the nominal 32, 16, 95 and 32 GB. The data
centre's network: "data center network bandwidth per Pod" of v5e (6.4 Tbit/s) and v6e (25.6 Tbit/s) over the pod's 256
chips, and "DCN bandwidth per chip" of v5p (50 Gbit/s); Google gives no figure for v4. The bandwidth of one link is that
of the chapter on TPUs of jax-ml.github.io/scaling-book. GPUs: NVIDIA's data sheets of H100 SXM, H200 SXM and B200
(dense bf16 compute, NVLink in one direction, one 400 Gbit/s network card for each GPU).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from crab_jax.io.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of a chip; those of a GPU have no clock, and their links are those of NVLink together.

    kind: JAX's `device_kind`. flops: peak bf16 FLOP/s. hbm_bytes: usable memory in bytes. Bandwidths are in bytes/s:
    of the memory, of the interconnect within a slice (ICI), and of the network between slices (DCN; None: unknown).
    link_bandwidth: bytes/s of one link of the interconnect in one direction, as it is reached. clock: Hz of the cores,
    at which the matrix units reach `flops`. vector_ops: operations per second on 32-bit numbers outside of the matrix
    units (TPU: 4 x 8 x 128 lanes a core; GPU: 128 a multiprocessor). options: for the compiler, with which the training
    step is fastest by the compiler's own estimate (docs/benchmarks.md, "Options of the compiler").
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
    options: tuple[tuple[str, str], ...] = ()


_WIDE = (("xla_tpu_scoped_vmem_limit_kib", "65536"),)  # larger tiles in the fusions of products
CHIPS = (
    Chip("v4", "TPU v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, None, 45e9, 1.05e9, 8.6e12),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, 45e9, 1.5e9, 6.1e12, _WIDE),
    Chip("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9, 90e9, 1.75e9, 14.3e12),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1640e9, 448e9, 12.5e9, 90e9, 1.75e9, 7.2e12),
)


NODE = 8  # GPUs that NVLink joins
GPUS = (
    Chip("h100", "NVIDIA H100", 989e12, int(79 * GIB), 3352e9, 450e9, 50e9, 450e9, 0.0, 33e12),
    Chip("h200", "NVIDIA H200", 989e12, int(139 * GIB), 4800e9, 450e9, 50e9, 450e9, 0.0, 33e12),
    Chip("b200", "NVIDIA B200", 2250e12, int(178 * GIB), 7672e9, 900e9, 50e9, 900e9, 0.0, 37e12),
)


def chip_of(device: Any) -> Chip | None:
    """Return the specification of a JAX device (real, or of an ahead-of-time topology); None if it is not listed."""
    named = device.device_kind
    gpu = next((chip for chip in GPUS if f"{named} ".startswith(f"{chip.kind} ")), None)
    return next((chip for chip in CHIPS if chip.kind == named), gpu)


def compiler_options(device: Any) -> dict[str, str]:
    """Return the options with which a training step is compiled for a device; none where nothing was measured."""
    chip = chip_of(device)
    return dict(chip.options) if chip else {}


def chips_of(topology: str) -> tuple[str, int]:
    """Return (name of the chip, number of chips) of a topology such as v5e:16x16 or h200:8. Raises InputError."""
    name, _, shape = topology.partition(":")
    gpus = [gpu.name for gpu in GPUS]
    sizes = [shape] if name in gpus else shape.split("x")
    known = [chip.name for chip in CHIPS] + gpus
    if name not in known or not all(n.isdecimal() and len(n) < 6 and int(n) for n in sizes):
        raise InputError(
            "command line",
            "--topology",
            f"{topology!r:.80} is unknown",
            f"write CHIP:SHAPE, like v5e:16x16 or h200:8; chips: {', '.join(known)}",
        )
    if name in gpus and int(shape) > NODE and int(shape) % NODE:
        raise InputError("command line", "--topology", f"{topology!r} is no number of nodes", f"of {NODE} GPUs each")
    return name, math.prod(map(int, sizes))


def memory_of(device: Any) -> int | None:
    """Return the bytes of memory a program may use on a device; None where unknown (CPU).

    A GPU is asked what JAX may take of it, by the process of the device or by any other, whose own GPU has as much;
    those of an ahead-of-time topology cannot be asked.
    """
    chip = chip_of(device)
    abstract = type(getattr(device, "client", None)).__name__ == "CompileOnlyPyClient"
    if chip is not None and (chip in CHIPS or abstract):
        return chip.hbm_bytes
    if device.platform == "cpu":
        return None
    stats = jax.local_devices(backend=device.platform)[0].memory_stats() or {}
    return stats.get("bytes_limit")
