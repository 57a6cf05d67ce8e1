"""Split into trainable and frozen parameters, learning-rate schedules and the optimizer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from crab_jax.io import bounds
from crab_jax.io.bounds import Choice, Real, Whole
from crab_jax.io.errors import InputError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule (released recipe: lr 1e-4, no weight decay, betas 0.9/0.999, clip 1.0, warm-up 3 %).

    schedule: "cosine" (linear warm-up, cosine to zero), "warmup_decay" (the released DeepSpeed WarmupDecayLR:
    logarithmic warm-up, linear decay to zero), or "constant" (linear warm-up, then constant). clip_norm: the largest
    norm of the whole gradient, which is scaled down to it; 0 = no clipping. accumulate: micro-batches per step; the
    batch is split, gradients are summed and divided once by the global counts. 0 infers it from the memory of a device
    (crab_jax/runs/run_mesh.py).
    """

    lr: float = 1e-4
    schedule: str = "cosine"
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        bounds.check("optim", vars(self), BOUNDS)


SCHEDULES = ("cosine", "warmup_decay", "constant")
# Limits exclude values without a meaning (a rate above 10, a float32 that rounds to 0), not unwise ones.
BOUNDS = {
    "lr": Real(1e-12, 10),
    "schedule": Choice(SCHEDULES),
    "warmup_share": Real(0, 1),
    "weight_decay": Real(1e-12, 100, zero=True),
    "b1": Real(0, 0.999999),
    "b2": Real(0, 0.999999),
    "eps": Real(1e-30, 1),
    "clip_norm": Real(1e-12, 1e30, zero=True, note="0 = off"),
    "accumulate": Whole(0, 2**24, note="0 = inferred"),
}


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Return the schedule (step -> learning rate) of a run of `steps` steps."""
    warmup = max(2, math.ceil(cfg.warmup_share * steps))
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, cfg.lr, warmup, max(steps, warmup + 1), 0.0)
    if cfg.schedule == "constant":
        return optax.linear_schedule(0.0, cfg.lr, warmup)

    def decay(step: Any) -> Any:
        rising = jnp.log(step + 1.0) / math.log(warmup)
        falling = (steps - step) / max(1, steps - warmup)
        return cfg.lr * jnp.where(step < warmup, jnp.minimum(rising, 1.0), jnp.maximum(falling, 0.0))

    return decay


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return gradient clipping (none where `clip_norm` is 0) followed by AdamW, for the trainable tree only."""
    return optax.chain(
        # Either transformation has a state, so that checkpoints have the same tree.
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(learning_rate(cfg, steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay),
    )


def apply(
    tx: optax.GradientTransformation, grads: Params, opt: Any, trainable: Params, sound: jax.Array
) -> tuple[Params, Any, jax.Array]:
    """Take one optimizer step and return (parameters, optimizer state, bool[]: whether the step was taken).

    The step is skipped when `sound` is false (bool[]: loss and norm of the gradient are finite) or when the norm of the
    new parameters is not finite. A skipped step keeps the former parameters and optimizer state, except for its counts.

    Moments need no check: they are means of gradients and of their squares, which add up to a finite norm. Parameters
    are checked through their norm because XLA computes a square root once, whereas it copies a conjunction of
    `isfinite` over all leaves into the computation of each leaf, which takes three times as long to compile.
    """
    updates, new_opt = tx.update(grads, opt, trainable)
    new = optax.apply_updates(trainable, updates)
    taken = sound & jnp.isfinite(optax.global_norm(new))

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(taken, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return *jax.tree.map(kept, (new, new_opt), (trainable, opt)), taken


def split(params: Params, trainable: Sequence[str], frozen: Sequence[str]) -> tuple[Params, Params]:
    """Return the (trainable, frozen) trees of the leaves whose '/'-joined path fully matches a pattern of each list.

    Raises InputError unless every leaf matches exactly one list and every pattern at least one leaf.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    used: set[str] = set()

    def matches(path: str, patterns: Sequence[str]) -> bool:
        hits = [p for p in patterns if re.fullmatch(p, path)]
        used.update(hits)
        return bool(hits)

    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in flat.items():
        trains, freezes = matches(path, trainable), matches(path, frozen)
        if trains == freezes:
            matched = "matched by both" if trains else "matched by neither of"
            raise InputError(
                "--config",
                path,
                f"parameter is {matched} trainable and frozen patterns",
                "make each parameter match exactly one list",
            )
        parts[0 if trains else 1][path] = leaf
    for pattern in (*trainable, *frozen):
        if pattern not in used:
            raise InputError("--config", pattern, "pattern matches no parameter", "correct or remove it")
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in parts)


def merge(trainable: Params, frozen: Params) -> Params:
    """Return the full tree of two disjoint trees: the inverse of `split`."""
    out = dict(frozen)
    for key, value in trainable.items():
        out[key] = merge(value, out[key]) if key in out else value
    return out


def cast_floating(params: Params, dtype: Any) -> Params:
    """Return the tree with its floating leaves in `dtype`."""
    cast: Params = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    return cast
