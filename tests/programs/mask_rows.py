"""Run by test_sharding.py with four virtual devices: the sizes that occur in the mask decoder as one device runs it.

    python -m tests.programs.mask_rows

Prints them as JSON on the last line; every device has ROWS rows.
"""

import json

import jax
import jax.numpy as jnp

from crab_jax.aot import hlo
from crab_jax.models.mask_decoder import SegModule
from crab_jax.models.presets import tiny
from crab_jax.parallel import sharding

ROWS = 7  # no other size of the tiny model is 7, 14, 28 or 56


def sizes() -> list[int]:
    """Every axis length of every array of the compiled forward pass."""
    cfg, devices = tiny().seg, jax.device_count()
    mesh, model = sharding.make_mesh(devices), SegModule(cfg)

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices * ROWS, *shape), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def apply(params, *inputs):
        with sharding.constrained(mesh):
            return model.apply(params, *inputs)

    inputs = rows(6, cfg.llm_dim), (rows(cfg.grid**2, cfg.image_dim),) * 2
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    program = hlo.ops(jax.jit(apply).lower(params, *inputs).compile().as_text())
    return sorted({size for op in program for array in op.results for size in array.shape})


if __name__ == "__main__":
    print(json.dumps(sizes()))
