"""The parameters of a run: their shapes, where they start from, and a model loaded with them."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax import optim
from crab_jax.checkpoints.digests import check_match
from crab_jax.checkpoints.stored import stored_params
from crab_jax.config import RunConfig
from crab_jax.io.errors import InputError
from crab_jax.models.protocol import Model
from crab_jax.parallel import sharding
from crab_jax.runs.run_folder import load_config
from data_pipelines.batching import Batch, Bucket, empty_batch
from data_pipelines.tokens import Tokenizer


def init_batch(model: Model) -> Batch:
    """One filler row that reaches every module: a frame, an audio window and a mask group."""
    return empty_batch(Bucket(length=8, frames=1, windows=1, fbank_frames=98, masks=1), 1, model.cfg.image_size)


@functools.lru_cache(maxsize=8)
def abstract_params(model: Model) -> Any:
    """Shapes of all parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda rng: model.init({"params": rng}, init_batch(model))["params"], jax.random.key(0))


def wanted_params(config: RunConfig, model: Model, mesh: jax.sharding.Mesh) -> Any:
    """Every parameter of a run as a ShapeDtypeStruct: trainables float32, the rest in the frozen dtype, with shardings.

    Raises InputError when the trainable and frozen patterns, or the mesh, do not divide the parameters.
    """
    boxed = abstract_params(model)
    trainable, frozen = optim.split(nn.unbox(boxed), config.trainable, config.frozen)
    shapes = optim.merge(_of_dtype(trainable, jnp.float32), _of_dtype(frozen, config.frozen_dtype))
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.param_shardings(boxed, mesh),
    )
    sharding.check_params(wanted, mesh)
    return wanted


def _of_dtype(shapes: Any, dtype: Any) -> Any:
    return jax.eval_shape(lambda tree: optim.cast_floating(tree, jnp.dtype(dtype)), shapes)


def initial_params(config: RunConfig, model: Model, wanted: Any = None) -> Any:
    """Starting parameters: those of `init_from`, checked strictly; leaves named by `fresh` are newly drawn.

    With `wanted` (see `wanted_params`) every leaf is read or drawn straight into its shards and its dtype, so that no
    device and no host holds more than its part; without it the tree is whole on this host, in the stored dtypes.
    """
    shapes = traverse_util.flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    for pattern in config.fresh:
        if not any(re.fullmatch(pattern, path) for path in shapes):
            raise InputError(
                "--config",
                "fresh",
                f"{pattern!r} is no parameter of the model",
                "see the patterns of crab_jax/defaults.py",
            )
    stored = stored_params(config.init_from) if config.init_from else None
    found = traverse_util.flatten_dict(stored.shapes, sep="/") if stored else {}
    missing = sorted(
        path
        for path in shapes
        if path not in found and (not stored or any(re.fullmatch(p, path) for p in config.fresh))
    )
    nested = functools.partial(traverse_util.unflatten_dict, sep="/")
    if stored and (made := load_config(config.init_from).compat) != config.compat:
        print(
            f"warning: {config.init_from} was made with compat={made!r}, this run computes as {config.compat!r}: "
            f"--config.compat={made} goes on as it was",
            file=sys.stderr,
        )
    check_match(nested(shapes), nested(found | {path: shapes[path] for path in missing}), config.init_from)
    places = traverse_util.flatten_dict(wanted, sep="/") if wanted is not None else {}

    def draw(rng: jax.Array) -> dict[str, jax.Array]:
        # What is not missing is never computed.
        flat = traverse_util.flatten_dict(nn.unbox(model.init({"params": rng}, init_batch(model))["params"]), sep="/")
        return {path: flat[path].astype(places[path].dtype) if places else flat[path] for path in missing}

    where = {path: places[path].sharding for path in missing} if places else None
    drawn = jax.jit(draw, out_shardings=where)(jax.random.key(config.seed)) if missing else {}
    loaded = stored.load(nested({path: places[path] for path in found}) if places else None) if stored else {}
    return optim.merge(nested(drawn), loaded)


def count(params: Any) -> int:
    """Number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def parameter_table(trainable: Any, frozen: Any) -> str:
    """Parameters per module, trained and frozen, as text."""
    groups: dict[str, list[int]] = {}
    for column, tree in enumerate((trainable, frozen)):
        for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
            name = "lora" if "/lora_" in path else path.split("/")[0]
            groups.setdefault(name, [0, 0])[column] += int(np.prod(leaf.shape))
    total = [sum(g[column] for g in groups.values()) for column in (0, 1)]
    rows = [f"{name:<14}{a:>15,}{b:>15,}" for name, (a, b) in [*groups.items(), ("total", total)]]
    share = total[0] / max(1, sum(total))
    return "\n".join([f"{'module':<14}{'trainable':>15}{'frozen':>15}", *rows, f"trainable share {share:.2%}"])


def load_model(
    path: str | Path, weights: str = "", mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, Any, RunConfig, Tokenizer]:
    """(model, parameters, config, tokenizer) of a run or a packed model. Raises InputError if they disagree.

    With `weights` (one of `generating.KINDS`) the model is laid out for generation and does nothing else. On a `mesh`
    (see `run_mesh.serving_mesh`) every copy has it so, or, where a copy is split, lies as in training; without one all
    is on the first device.
    """
    config = load_config(path)
    model, stored = config.model.build(), stored_params(path)
    check_match(nn.unbox(abstract_params(model)), stored.shapes, str(path))
    if mesh is not None and mesh.shape["tensor"] > 1:
        return model, stored.load(wanted_params(config, model, mesh)), config, Tokenizer.load(path)
    params, where = stored.load(), sharding.replicated(mesh) if mesh is not None else None
    if weights:
        model, params = model.for_generation(params, weights, where)
    return model, jax.device_put(params, where), config, Tokenizer.load(path)
