"""GPUs to compile for on a machine that has none.

The CUDA plug-in of JAX compiles without a driver if it is told what the GPU is, in the text form of XLA's
GpuTargetConfigProto. It needs the plug-in (jax-cuda12-plugin, jax-cuda12-pjrt) and ptxas (nvidia-cuda-nvcc-cu12);
kernels are not tuned, because tuning runs them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax.io.errors import InputError
from crab_jax.parallel.chips import NODE, Chip

MISSING = "pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 (the versions of jax)"


class Hardware(NamedTuple):
    """What the compiler asks of a GPU: multiprocessors, L2 cache, clock, memory and compute capability.

    These are what CUDA reports for the SXM models. l2, memory: bytes; clock: GHz.
    """

    cores: int
    l2: int
    clock: float
    memory: int
    major: int


HARDWARE = {
    "h100": Hardware(132, 52_428_800, 1.98, 84_942_979_072, 9),
    "h200": Hardware(132, 52_428_800, 1.98, 151_397_597_184, 9),
    "b200": Hardware(148, 132_644_864, 1.965, 191_514_411_008, 10),
}
# The same for all three: CUDA's limits of a block and of a multiprocessor.
LIMITS = """threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: 128
shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
registers_per_core_limit: 65536 registers_per_block_limit: 65536
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"""


def target_config(chip: Chip) -> str:
    """Return XLA's description of a GPU as a text proto."""
    gpu = HARDWARE[chip.name]
    return f"""gpu_device_info {{
{LIMITS}
core_count: {gpu.cores} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock} device_memory_size: {gpu.memory}
memory_bandwidth: {int(chip.hbm_bandwidth)}
cuda_compute_capability {{ major: {gpu.major} feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kind}"
"""


def devices(chip: Chip, number: int) -> list[Any]:
    """Return `number` GPUs, in nodes of NODE, to compile for. Raises InputError without the plug-in or ptxas."""
    if not installed():
        raise InputError("jax-cuda12-plugin", "", "is not installed", MISSING)
    compiler = importlib.util.find_spec("nvidia")
    for folder in compiler.submodule_search_locations or [] if compiler else []:
        programs = Path(folder) / "cuda_nvcc"
        if (programs / "bin" / "ptxas").exists():  # where XLA looks for ptxas and libdevice
            os.environ["PATH"] = f"{programs / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={programs}".strip()

    from jax.experimental.topologies import get_topology_desc

    shape = f"1x{number // NODE}x{NODE}" if number > NODE else f"1x1x{number}"
    try:
        return list(
            get_topology_desc(
                platform="cuda", topology_name="", target_config=target_config(chip), topology=shape
            ).devices
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError("jax-cuda12-plugin", "", f"cannot make the topology ({reason})", MISSING) from error


def installed() -> bool:
    """Return whether JAX's plug-in for CUDA is here."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{major}") for major in (12, 13)
    )
