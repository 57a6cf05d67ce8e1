"""Run by test_sharding.py with eight virtual devices, in one process or two: how far steps on meshes are from one
device's.

    python -m tests.programs.same_step [masks] [CASE ...]

Prints {case: relative differences} as JSON on the last line.

What is compared after two steps, of which the first has a learning rate of 0: loss and gradient norm, Adam's first
moments (which are the clipped gradients) and the parameters. Adam divides every gradient by its own size. So an element
whose gradient is nothing but rounding (the key biases, which a softmax cancels) moves by the learning rate times a
sign that is noise, on any two devices. EPS lies well above that noise, which is below 1e-9 here, and below most
gradients: such elements stay and the others move.
"""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from configs import tiny
from crab_jax import optim
from crab_jax.aot import hlo
from crab_jax.config import resolve
from crab_jax.models.crab import Crab
from crab_jax.parallel import distributed, sharding
from crab_jax.runs import run_params
from crab_jax.training import train_step
from data_pipelines.batching import Batch

ROWS, LENGTH, STEPS, EPS = 16, 24, 2, 1e-6
ONE = ((1, 1, 1), 1, "none")
WRONG = "one target less"  # what has to be seen
CASES = {  # mesh (data, fsdp, tensor, and slices if several), micro-batches, remat
    WRONG: ONE,
    "mixed, 2 micro-batches, remat": ((2, 2, 2), 2, "full"),
    "data": ((8, 1, 1), 1, "none"),
    "fsdp": ((1, 8, 1), 1, "none"),
    "tensor": ((2, 1, 4), 1, "none"),
    "2 slices, 2 micro-batches, remat": ((2, 2, 2, 2), 2, "full"),
    "fsdp, 2 micro-batches": ((1, 8, 1), 2, "none"),
    "1 device, 4 micro-batches": ((1, 1, 1), 4, "none"),
    "1 device, remat dots": ((1, 1, 1), 1, "dots"),
}


def config_of(accumulate: int, remat: str):
    """The tiny model with one or two layers each, in float32, with dropout."""
    config = tiny.get_config()
    config.init_from, config.data.batch_size, config.steps, config.optim.accumulate = "", ROWS, 30, accumulate
    config.optim.warmup_share, config.optim.schedule, config.optim.eps = 0.0, "constant", EPS
    for path, value in (
        ("llama.layers", 2),
        ("llama.remat", remat),
        ("clip.layers", 2),
        ("clip.taps", (1, 2, 2)),
        ("beats.layers", 1),
        ("visual.layers", 1),
        ("audio.layers", 1),
        ("lora.dropout", 0.1),
        ("visual.dropout", 0.1),
    ):
        module, field = path.split(".")
        config.sizes[module][field] = value
    return resolve(config)


def batch_of(side: int, masks: int) -> Batch:
    """Rows of unequal numbers of targets, one of them filler; with a mask group two of three have a mask to draw."""
    rng = np.random.default_rng(0)
    targets = rng.integers(1, LENGTH - 8, ROWS)
    whole = Batch(
        tokens=rng.integers(3, 600, (ROWS, LENGTH), np.int32),
        slots=np.where(np.arange(LENGTH) < 5, np.arange(LENGTH), -1).astype(np.int32) * np.ones((ROWS, 1), np.int32),
        text_mask=np.ones((ROWS, LENGTH), bool),
        loss_mask=np.arange(LENGTH) >= LENGTH - targets[:, None],
        mask_positions=np.broadcast_to(np.arange(10, 16, dtype=np.int32), (ROWS, 1, 6)),
        frames=rng.integers(0, 255, (ROWS, 1, side, side, 3), np.uint8),
        frame_mask=np.ones((ROWS, 1), bool),
        fbank=rng.normal(size=(ROWS, 1, 98, 128)).astype(np.float32),
        audio_mask=np.ones((ROWS, 1), bool),
        seg_frame=rng.integers(0, 255, (ROWS, 1, side, side, 3), np.uint8),
        seg_target=rng.integers(0, 2, (ROWS, 1, side, side), np.int32),
        seg_kind=(np.arange(ROWS) % 3).astype(np.int32)[:, None],
        task=np.arange(ROWS, dtype=np.int32) % 9,
        index=np.where(np.arange(ROWS) == 3, -1, np.arange(ROWS)).astype(np.int32),
    )
    groups = ("mask_positions", "seg_frame", "seg_target", "seg_kind")
    return whole.replace(**{name: getattr(whole, name)[:, :masks] for name in groups})


def drawn(model: Crab):
    """Parameters as small as initial ones, but none of them zero, as LoRA's B is at the start of a run."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.02 * rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + noise if path[-1].key == "scale" else noise

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(run_params.abstract_params(model)))


def steps(params, masks: int, shape: tuple[int, ...], accumulate: int, remat: str, less: int = 0):
    """What is compared, by name, after STEPS steps from `params` on a mesh; `less` targets left out of the batch."""
    config = config_of(accumulate, remat)
    model = config.model.build()
    devices = jax.devices() if np.prod(shape[:3]) > 1 else jax.local_devices()[:1]
    mesh = sharding.make_mesh(*shape[:3], devices=devices, slices=sum(shape[3:]))
    placed = jax.tree.map(
        lambda x, to: jax.make_array_from_callback(x.shape, to.sharding, lambda index: x[index]),
        params,
        run_params.wanted_params(config, model, mesh),
    )
    trainable, frozen = optim.split(placed, config.trainable, config.frozen)
    tx = optim.optimizer(config.optim, config.steps)
    where = train_step.abstract_state(tx, trainable, mesh)
    state = jax.jit(
        lambda params: train_step.TrainState(jnp.int32(0), params, tx.init(params)),
        out_shardings=jax.tree.map(lambda x: x.sharding, where),
    )(trainable)
    step = train_step.compile_step(config, model, mesh, state, tx, accumulate)
    slices = mesh.shape.get(sharding.SLICES, 1)
    batch, batch_at = batch_of(model.cfg.clip.image_size, masks), sharding.batch_sharding(mesh)
    batch.loss_mask[0, LENGTH - 1 :] &= not less
    rows = distributed.own_rows(batch_at, ROWS)
    batch = distributed.global_batch(jax.tree.map(lambda x: x[rows], batch), batch_at, ROWS)
    if slices > 1:
        step = step.lower(state, frozen, batch).compile()
        check_crossings(hlo.by_network(hlo.ops(step.as_text()), mesh.size // slices)["dcn"], trainable, mesh, masks)
    seen = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        seen.append(jax.device_get({name: metrics[name] for name in ("loss", "grad_norm")}))
    return {
        "loss": [m["loss"] for m in seen],
        "grad_norm": [m["grad_norm"] for m in seen],
        "moments": whole(optax.tree.get(state.opt, "mu")),
        "parameters": whole(state.trainable),
    }


def check_crossings(between_slices, trainable, mesh, masks: int) -> None:
    """Nothing crosses slices but each device's part of the gradient, once, and metrics of less than a hundredth of it:
    nothing frozen or updated is gathered, and layers and micro-batches do not add to it.
    """
    with_gradient = {name: tree for name, tree in trainable.items() if masks or name != "seg_module"}
    parts = [
        NamedSharding(mesh, sharding._in_parts(leaf, mesh)).shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(with_gradient)
    ]
    size = sum(4 * int(np.prod(shape)) for shape in parts)
    devices = mesh.size // mesh.shape[sharding.SLICES]
    assert size * devices < 1.1 * sum(4 * leaf.size for leaf in jax.tree.leaves(with_gradient))
    assert set(between_slices) == {"all-reduce"}, between_slices
    assert size <= between_slices["all-reduce"]["bytes"] <= 1.01 * size, (between_slices, size)


def whole(tree):
    """A tree of global arrays on this host."""
    return jax.tree.map(
        lambda x: np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True), tree
    )


def relative(a, b) -> float:
    """The largest difference of two trees, relative to the largest value of its leaf, which counts as at least 1e-5 of
    the tree's largest: what is zero but for rounding has no scale of its own.
    """
    least = 1e-5 * max(float(np.abs(y).max()) for y in jax.tree.leaves(b))
    return max(
        float(np.abs(x - y).max() / max(np.abs(y).max(), least))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def main(names: list[str]) -> None:
    """Compare the named cases (all, when none is named) with one device and one batch; "masks" adds the mask branch."""
    jax.config.update("jax_default_matmul_precision", "float32")
    distributed.start()
    masks = int("masks" in names)
    config = config_of(1, "none")
    params = drawn(config.model.build())
    wanted = steps(params, masks, *ONE)
    trained, _ = optim.split(params, config.trainable, config.frozen)
    moved = min(
        float(np.abs(x - y).max())
        for x, y in zip(*(jax.tree.leaves(tree["llama"]) for tree in (wanted["parameters"], trained)), strict=True)
    )
    out = {}
    for name in [name for name in names if name != "masks"] or CASES:
        seen = steps(params, masks, *CASES[name], less=int(name == WRONG))
        out[name] = {"moved": moved, **{key: relative(seen[key], wanted[key]) for key in wanted}}
        print(f"{name}: {out[name]}", file=sys.stderr, flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main(sys.argv[1:])
