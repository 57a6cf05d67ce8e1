"""Run by test_sharding.py in a process with eight virtual devices: how far steps on meshes are from one device's.

Prints {case: relative differences} as JSON on the last line.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny
from crab_jax import optim, runs, sharding, train
from crab_jax.config import model_config
from crab_jax.models.crab import Crab
from data_pipelines.batching import Batch

ROWS, LENGTH = 16, 24
CASES = {
    "data": ((8, 1, 1), 1, "none"), "fsdp": ((1, 8, 1), 1, "none"), "tensor": ((2, 1, 4), 1, "none"),
    "mixed": ((2, 2, 2), 1, "none"), "mixed, 2 micro-batches, remat": ((2, 2, 2), 2, "full"),
    "1 device, 4 micro-batches": ((1, 1, 1), 4, "none"), "1 device, remat dots": ((1, 1, 1), 1, "dots"),
}


def config_of(accumulate: int, remat: str):
    """The tiny model with one layer each, in float32 and without dropout."""
    config = tiny.get_config()
    config.init_from, config.data.batch_size, config.steps, config.optim.accumulate = "", ROWS, 30, accumulate
    config.optim.warmup_share, config.optim.schedule = 0.0, "constant"
    for path, value in (("llama.layers", 2), ("llama.remat", remat), ("clip.layers", 2), ("clip.taps", (1, 2, 2)),
                        ("beats.layers", 1), ("visual.layers", 1), ("audio.layers", 1)):
        module, field = path.split(".")
        config.sizes[module][field] = value
    return config


def batch_of(side: int) -> Batch:
    """Rows of unequal numbers of targets, half of them with a mask, one of them filler."""
    rng = np.random.default_rng(0)
    targets = rng.integers(1, LENGTH - 8, ROWS)
    return Batch(
        tokens=rng.integers(3, 600, (ROWS, LENGTH), np.int32),
        slots=np.where(np.arange(LENGTH) < 5, np.arange(LENGTH), -1).astype(np.int32) * np.ones((ROWS, 1), np.int32),
        text_mask=np.ones((ROWS, LENGTH), bool), loss_mask=np.arange(LENGTH) >= LENGTH - targets[:, None],
        mask_positions=np.broadcast_to(np.arange(10, 16, dtype=np.int32), (ROWS, 1, 6)),
        frames=rng.integers(0, 255, (ROWS, 1, side, side, 3), np.uint8), frame_mask=np.ones((ROWS, 1), bool),
        fbank=rng.normal(size=(ROWS, 1, 98, 128)).astype(np.float32), audio_mask=np.ones((ROWS, 1), bool),
        seg_frame=rng.integers(0, 255, (ROWS, 1, side, side, 3), np.uint8),
        seg_target=rng.integers(0, 2, (ROWS, 1, side, side), np.int32),
        seg_kind=(np.arange(ROWS) % 3).astype(np.int32)[:, None], task=np.arange(ROWS, dtype=np.int32) % 9,
        index=np.where(np.arange(ROWS) == 3, -1, np.arange(ROWS)).astype(np.int32))


def one_step(params, shape: tuple[int, int, int], accumulate: int, remat: str):
    """(metrics, trainable parameters) after two steps from `params`; the first only warms the learning rate up."""
    config = config_of(accumulate, remat)
    model = Crab(model_config(config))
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:np.prod(shape)])
    placed = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, runs.wanted_params(config, model, mesh))
    trainable, frozen = optim.split(placed, config.trainable, config.frozen)
    tx = optim.optimizer(optim.OptimConfig(**config.optim), config.steps)
    state = train.TrainState(jnp.int32(0), trainable, tx.init(trainable))
    state = jax.device_put(state, sharding.state_shardings(state, trainable, mesh))
    step = train.compile_step(config, model, mesh, state)
    batch = jax.device_put(batch_of(model.cfg.clip.image_size), sharding.batch_sharding(mesh))
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
    return jax.device_get(metrics), jax.device_get(state.trainable)


def relative(a, b) -> float:
    """The largest difference of two trees, relative to the largest value of each leaf (at least 1e-3)."""
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def main() -> None:
    """Compare every case with one device and one batch."""
    jax.config.update("jax_default_matmul_precision", "float32")
    config = config_of(1, "none")
    params = jax.device_get(runs.initial_params(config, Crab(model_config(config))))
    metrics, parameters = one_step(params, (1, 1, 1), 1, "none")
    moved = relative(parameters, optim.split(params, config.trainable, config.frozen)[0])
    out = {}
    for name, case in CASES.items():
        seen, updated = one_step(params, *case)
        out[name] = {"moved": moved, "parameters": relative(updated, parameters),
                     **{key: relative(seen[key], metrics[key]) for key in ("loss", "grad_norm")}}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
