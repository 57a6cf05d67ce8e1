"""Run by test_generate.py with eight virtual devices: generation on meshes equals generation on one device.

    python -m tests.programs.same_generation

Prints {mesh: [share of equal tokens, largest difference of mask states]} as JSON.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.generate import generate
from crab_jax.parallel import sharding
from tests.test_generate import MASKS, OPTIONS, TextOnly, prompts

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2))
ROWS = [[1, 5, 9, 21][: 1 + i % 4] + [20 + i] for i in range(8)]


def main() -> None:
    """Mask tokens are dictated in the middle, so that there are states to compare."""
    model, batch = TextOnly(), prompts(ROWS)
    dictated = jnp.full((8, OPTIONS.max_new_tokens), -1).at[:, 3:9].set(jnp.array(MASKS))
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="full")["params"])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), nn.unbox(boxed))
    alone = jax.jit(generate, static_argnums=(0, 3))(model, params, batch, OPTIONS, None, dictated)
    found = {}
    for shape in MESHES:
        mesh = sharding.make_mesh(*shape)
        rows = sharding.batch_sharding(mesh)

        def run(params, batch, dictated, mesh=mesh):
            with sharding.constrained(mesh):
                return generate(model, params, batch, OPTIONS, None, dictated)

        placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        out = jax.jit(run)(placed, jax.device_put(batch, rows), jax.device_put(dictated, rows))
        found[str(shape)] = [
            float((np.asarray(out.tokens) == np.asarray(alone.tokens)).mean()),
            float(np.abs(np.asarray(out.mask_states) - np.asarray(alone.mask_states)).max()),
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
