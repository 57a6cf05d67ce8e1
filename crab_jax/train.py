"""Train one stage.

    python -m crab_jax.train --config=configs/tiny.py --config.optim.lr=3e-4 --workdir=runs/x

Any config key can be overridden with --config.key=value; an unknown key stops before anything starts. A workdir that
already holds checkpoints of the same config is resumed, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from crab_jax import compile_cache, losses, optim, runs, sharding
from crab_jax.checkpoints import RunCheckpoints, load_params
from crab_jax.config import loss_config, model_config, parse_flags
from crab_jax.errors import run_verb
from crab_jax.models.crab import Crab, CrabOutput
from crab_jax.tasks import TASKS
from data_pipelines.batching import Batch


@flax.struct.dataclass
class TrainState:
    """step int32[], trainable parameters float32, optimizer state of the trainable tree only."""

    step: jax.Array
    trainable: Any
    opt: Any


def train_step(state: TrainState, frozen: Any, batch: Batch, *, model: Crab, tx: optax.GradientTransformation,
               loss_cfg: losses.LossConfig, seed: int, accumulate: int) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step. Randomness comes from (seed, step) alone; gradients exist for trainables only.

    Losses are sums divided once by counts of the whole batch, so `accumulate` micro-batches give the same gradient.
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    counts = losses.batch_counts(batch.loss_mask, batch.seg_kind, batch.index >= 0)

    def loss_of(trainable: Any, micro: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        out: Any = model.apply({"params": optim.merge(trainable, frozen)}, micro, deterministic=False,
                               rngs={"dropout": rng})
        rows = loss_rows(out, micro)
        terms = {name: losses.pool(term) for name, term in rows.items()}
        total = losses.total(terms, loss_cfg, counts)
        by_task = losses.by_task(rows["text"], micro.task, len(TASKS))
        return total, {"loss": total, "terms": terms, "by_task": by_task}

    def grad_of(micro: Batch, rng: jax.Array) -> tuple[Any, dict[str, Any]]:
        return jax.grad(loss_of, has_aux=True)(state.trainable, micro, rng)

    if accumulate == 1:
        grads, metrics = grad_of(batch, rng)
    else:
        micros = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)
        shapes = jax.eval_shape(grad_of, jax.tree.map(lambda x: x[0], micros), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry, scanned):
            micro, key = scanned
            return jax.tree.map(jnp.add, carry, grad_of(micro, key)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, (micros, jax.random.split(rng, accumulate)))

    updates, opt = tx.update(grads, state.opt, state.trainable)
    metrics |= {"grad_norm": optax.global_norm(grads), "tokens": batch.text_mask.sum(), "slots": batch.text_mask.size}
    return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt), metrics


def loss_rows(out: CrabOutput, batch: Batch) -> dict[str, losses.Term]:
    """Loss terms of every row ("text") and every mask group ("bce", "dice", "ce", when the bucket has masks)."""
    valid = batch.index >= 0
    rows = {"text": losses.text_rows(out.logits, batch.tokens, batch.loss_mask, valid)}
    if out.binary is not None and out.semantic is not None:
        def flat(x: Any) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        groups = jnp.broadcast_to(valid[:, None], batch.seg_kind.shape)
        rows |= losses.mask_rows(flat(out.binary), flat(out.semantic), flat(batch.seg_target), flat(batch.seg_kind),
                                 flat(groups))
    return rows


class Logger:
    """metrics.jsonl, TensorBoard and a progress line from windows of device metrics, fetched only when shown."""

    def __init__(self, workdir: Path, steps: int, start: int, schedule: optax.Schedule, every: int):
        from tensorboardX import SummaryWriter

        self.path, self.steps, self.schedule, self.every = workdir / "metrics.jsonl", steps, schedule, every
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        keep_until(self.path, start)
        self.window: list[tuple[int, dict[str, Any], float]] = []
        self.began, self.first = time.monotonic(), start
        self.mark = self.began

    def add(self, step: int, metrics: dict[str, Any], rows: int, waited: float) -> None:
        """Record one step; every `every` steps write the mean of the window."""
        self.window.append((step, metrics, waited))
        if step % self.every and step != self.steps:
            return
        values = jax.device_get([m for _, m, _ in self.window])
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        mean = {k: float(np.mean([v[k] for v in values])) for k in values[0] if k == "loss" or k == "grad_norm"}
        record = {"step": step, **mean, **part_means(values), "lr": float(self.schedule(step - 1)),
                  "tokens_per_s": sum(int(v["tokens"]) for v in values) / seconds,
                  "samples_per_s": rows * len(values) / seconds,
                  "padding_share": 1 - sum(int(v["tokens"]) for v in values) / sum(int(v["slots"]) for v in values),
                  "input_wait_share": sum(w for _, _, w in self.window) / seconds}
        self.window = []
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key != "step":
                self.board.add_scalar(key, value, step)
        rate = (step - self.first) / (now - self.began)
        eta = (self.steps - step) / rate
        print(f"step {step}/{self.steps}  loss {record['loss']:.4f}  {rate:.2f} step/s  eta {eta / 60:.1f} min  "
              f"{record['tokens_per_s']:.0f} tok/s  padding {record['padding_share']:.0%}  "
              f"input wait {record['input_wait_share']:.0%}", flush=True)

    def close(self) -> None:
        """Flush TensorBoard."""
        self.board.close()


def part_means(values: list[dict[str, Any]]) -> dict[str, float]:
    """loss/<part> and (text) loss/<task> of a window: sums over counts, left out where nothing was counted."""
    parts: dict[str, list[float]] = {}
    for value in values:
        named = {**value["terms"], **dict(zip(TASKS, zip(*value["by_task"], strict=True), strict=True))}
        for name, (total, count) in named.items():
            seen = parts.setdefault(f"loss/{name}", [0.0, 0.0])
            seen[0] += float(total)
            seen[1] += float(count)
    return {name: total / count for name, (total, count) in parts.items() if count}


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`, which a resumed run will write again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


def global_batch(batch: Batch, where: jax.sharding.Sharding) -> Batch:
    """This process's rows -> the global batch on the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)


def compile_step(config: Any, model: Crab, mesh: jax.sharding.Mesh, state: TrainState) -> Callable[..., Any]:
    """The jitted step: donated state, batch rows over the mesh."""
    optim_cfg = optim.OptimConfig(**config.optim)
    step = partial(train_step, model=model, tx=optim.optimizer(optim_cfg, config.steps),
                   loss_cfg=loss_config(config), seed=config.seed, accumulate=optim_cfg.accumulate)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, in_shardings=(state_shardings, None, sharding.batch_sharding(mesh)),
                   out_shardings=(state_shardings, sharding.replicated(mesh)))


def train(config: Any, workdir: Path) -> None:
    """Run (or resume) the stage that `config` describes in `workdir`."""
    runs.claim_workdir(workdir, config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.data.batch_size, mesh)
    tokenizer = runs.tokenizer_of(config)
    model = Crab(model_config(config))
    dataset = runs.train_dataset(config, tokenizer)
    checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep)

    resumed = checkpoints.latest is not None
    params = load_params(workdir) if resumed else runs.initial_params(config, model)
    runs.save_description(workdir, config, tokenizer)
    trainable, frozen = runs.split_params(config, params, mesh)
    optim_cfg = optim.OptimConfig(**config.optim)
    tx = optim.optimizer(optim_cfg, config.steps)
    state = TrainState(jnp.int32(0), trainable, tx.init(trainable))
    state = jax.device_put(state, sharding.state_shardings(state, trainable, mesh))
    data: Iterator[Batch] = iter(dataset)
    if resumed:
        state = TrainState(**checkpoints.restore(dataclasses.asdict(state), data))
        print(f"resumed from step {int(state.step)} of {workdir}", flush=True)
    else:
        checkpoints.save_frozen(frozen, {"lora_heads": model.cfg.lora.heads})
    print(runs.parameter_table(trainable, frozen), flush=True)

    start = int(state.step)
    step_fn = compile_step(config, model, mesh, state)
    logger = Logger(workdir, config.steps, start, optim.learning_rate(optim_cfg, config.steps), config.log_every)
    for step in range(start + 1, config.steps + 1):
        asked = time.monotonic()
        batch = global_batch(next(data), sharding.batch_sharding(mesh))
        waited = time.monotonic() - asked
        state, metrics = step_fn(state, frozen, batch)
        logger.add(step, metrics, config.data.batch_size, waited)
        if step % config.checkpoint_every == 0 or step == config.steps:
            checkpoints.save(step, dataclasses.asdict(state), data)
    checkpoints.wait()
    logger.close()
    (workdir / "compilations.json").write_text(json.dumps({"train_step": step_fn._cache_size()}))


def main() -> None:
    """Entry point of `python -m crab_jax.train`."""
    config, workdir = parse_flags(sys.argv, __doc__)
    compile_cache.enable()
    train(config, workdir)


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
