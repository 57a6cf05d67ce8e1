"""The training step: one pure function of (state, frozen weights, batch), and the program it compiles to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from crab_jax import losses, optim
from crab_jax.config import RunConfig
from crab_jax.models.crab import CrabOutput
from crab_jax.models.protocol import Model
from crab_jax.parallel import chips, sharding
from crab_jax.tasks import TASKS
from data_pipelines.batching import Batch


@flax.struct.dataclass
class TrainState:
    """Step int32[], trainable parameters float32, and the optimizer state of the trainable parameters."""

    step: jax.Array
    trainable: Any
    opt: Any


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    model: Model,
    tx: optax.GradientTransformation,
    loss_cfg: losses.LossConfig,
    seed: int,
    accumulate: int,
    constrain: Callable[[Any], Any] = lambda grads: grads,
    by_slice: Callable[..., Any] = lambda gradient: gradient,
) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step, and return the new state with the metrics of the step.

    Randomness depends on (seed, step) alone; gradients are computed for trainable parameters only.

    Losses are sums divided by counts of the whole batch, and dropout depends on the number of a row in the batch, so
    that the gradient does not depend on the number of micro-batches, `accumulate`. Micro-batch i takes rows i,
    i + accumulate, ..., so that every device splits its own rows. `constrain` gives gradients the shardings of their
    parameters. `by_slice` has every slice take the gradient of its rows before slices are added (see
    `sharding.by_slice`).

    If the loss, the gradient or a new parameter is not finite, parameters and moments stay unchanged and the metric
    `skipped` is 1; the step and the count of the schedule still increase. `bad_rows` is the number of rows whose loss
    is not finite, and `bad_index` the sum of their `index`. Filler rows affect neither loss nor gradient.
    """
    batch = dataclasses.replace(batch, fbank=jnp.where((batch.index >= 0)[:, None, None, None], batch.fbank, 0))
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    counts = losses.batch_counts(batch.loss_mask, batch.seg_kind, batch.index >= 0)

    def loss_of(
        trainable: Any, frozen: Any, counts: Any, numbered: tuple[Batch, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        micro, numbers = numbered
        variables = {"params": optim.merge(trainable, frozen)}
        out: Any = model.apply(variables, micro, numbers, with_logits=False, rngs={"dropout": rng})
        rows = loss_rows(out, micro, model.apply(variables, method="output_matrix"), model.cfg.vocab_size)
        terms = {name: losses.pool(term) for name, term in rows.items()}
        total = losses.total(terms, loss_cfg, counts)
        by_task = losses.by_task(rows["text"], micro.task, len(TASKS))
        bad = ~finite_rows(rows, len(micro.index))
        return total, {
            "loss": total,
            "terms": terms,
            "by_task": by_task,
            "bad_rows": bad.sum(dtype=jnp.int32),
            "bad_index": jnp.where(bad, micro.index, 0).sum(dtype=jnp.int32),
        }

    def grad_of(params: Any, numbered: tuple[Batch, jax.Array], rng: jax.Array) -> tuple[Any, dict[str, Any]]:
        grads, metrics = jax.grad(loss_of, has_aux=True)(*params, numbered, rng)
        return constrain(grads), metrics

    def gradient(params: Any, numbered: tuple[Batch, jax.Array], rng: jax.Array) -> tuple[Any, dict[str, Any]]:
        if accumulate == 1:
            return grad_of(params, numbered, rng)
        micros = jax.tree.map(
            lambda x: nn.with_logical_constraint(
                x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
                (None, "batch", *(None,) * (x.ndim - 1)),
            ),
            numbered,
        )
        shapes = jax.eval_shape(grad_of, params, jax.tree.map(lambda x: x[0], micros), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, grad_of(params, micro, rng)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, micros)
        return grads, metrics

    numbered = (batch, jnp.arange(len(batch.index)))
    grads, metrics = by_slice(gradient)((state.trainable, frozen, counts), numbered, rng)
    norm = optax.global_norm(grads)
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    trainable, opt, taken = optim.apply(tx, grads, state.opt, state.trainable, sound)
    metrics |= {
        "grad_norm": norm,
        "tokens": batch.text_mask.sum(),
        "slots": batch.text_mask.size,
        "skipped": (~taken).astype(jnp.int32),
    }
    return TrainState(state.step + 1, trainable, opt), metrics


def loss_rows(
    out: CrabOutput, batch: Batch, output_matrix: jax.Array | None = None, vocab_size: int = 0
) -> dict[str, losses.Term]:
    """Return the loss terms of every row ("text") and of every mask group ("bce", "dice", "ce"; with masks only).

    output_matrix: [D,V], from whose first `vocab_size` columns logits are made; needed when `out` has none.
    """
    valid = batch.index >= 0
    target = (batch.tokens, batch.loss_mask, valid)
    if out.logits is not None:
        rows = {"text": losses.text_rows(out.logits, *target)}
    else:
        assert output_matrix is not None
        rows = {"text": losses.text_rows_of(out.hidden, output_matrix, vocab_size, *target)}
    if out.binary is not None and out.semantic is not None:

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        groups = jnp.broadcast_to(valid[:, None], batch.seg_kind.shape)
        rows |= losses.mask_rows(
            flat(out.binary), flat(out.semantic), flat(batch.seg_target), flat(batch.seg_kind), flat(groups)
        )
    return rows


def finite_rows(rows: dict[str, losses.Term], count: int) -> jax.Array:
    """Return bool[count]: whether all losses of each row and of its mask groups are finite."""
    return jnp.stack([jnp.isfinite(term.sum).reshape(count, -1).all(1) for term in rows.values()]).all(0)


def compile_step(
    config: RunConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    tx: optax.GradientTransformation,
    micro_batches: int,
) -> Callable[..., Any]:
    """Return the jitted step (state, frozen, batch) -> (state, metrics), which donates the state.

    Batch rows are sharded over the mesh and taken in `micro_batches` parts one after the other; metrics are replicated.
    """
    constrain = partial(sharding.constrain, specs=jax.tree.map(lambda x: x.sharding.spec, state.trainable))
    by_slice = partial(sharding.by_slice, mesh=mesh, trainable=state.trainable)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        with sharding.constrained(mesh):
            return train_step(
                state,
                frozen,
                batch,
                model=model,
                tx=tx,
                loss_cfg=config.loss,
                seed=config.seed,
                accumulate=micro_batches,
                constrain=constrain,
                by_slice=by_slice,
            )

    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, None, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        compiler_options=chips.compiler_options(mesh.devices.flat[0]),
    )


def learns_nothing(schedule: optax.Schedule, start: int, steps: int) -> bool:
    """Return whether steps remain after `start`, and none of them has a learning rate above 0.

    Every schedule begins at 0, as those of DeepSpeed and Hugging Face do, so a run of a single step learns nothing.
    """
    return start < steps and not any(float(schedule(step)) for step in range(start, min(steps, start + 2)))


def abstract_state(tx: optax.GradientTransformation, trainable: Any, mesh: jax.sharding.Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the train state, from those of the trainable parameters."""
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, trainable, jax.eval_shape(tx.init, trainable))
    placed: TrainState = jax.tree.map(
        lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        state,
        sharding.state_shardings(state, trainable, mesh),
    )
    return placed
