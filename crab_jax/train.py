"""Train one stage.

    python -m crab_jax.train --config=configs/tiny.py --config.optim.lr=3e-4 --workdir=runs/x

Any config key can be overridden with --config.key=value; an unknown key stops before anything starts. A workdir that
already holds checkpoints of the same config is resumed: bit for bit on the same mesh, to rounding on another. On
several processes or hosts start the same command on each (crab_jax/distributed.py says how they find each other), with
a workdir that all can see. SIGTERM, or Ctrl-C once, ends the run after the current step with a checkpoint and exit
code 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from crab_jax import compile_cache, distributed, layout, locks, losses, optim, runs, sharding
from crab_jax.checkpoints import RunCheckpoints
from crab_jax.config import RunConfig, parse_flags
from crab_jax.errors import InputError, run_verb
from crab_jax.files import append_line, cut_tail, json_object, whole, write_whole
from crab_jax.models.crab import Crab, CrabOutput
from crab_jax.preemption import StopRequest
from crab_jax.tasks import TASKS
from crab_jax.watchdog import Watchdog
from data_pipelines import padding
from data_pipelines.batching import Batch
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.mixture import TrainOrder

RUN_AHEAD = 2  # steps that are dispatched before the result of the first is looked at


@flax.struct.dataclass
class TrainState:
    """step int32[], trainable parameters float32, optimizer state of the trainable tree only."""

    step: jax.Array
    trainable: Any
    opt: Any


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    model: Crab,
    tx: optax.GradientTransformation,
    loss_cfg: losses.LossConfig,
    seed: int,
    accumulate: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step. Randomness comes from (seed, step) alone; gradients exist for trainables only.

    Losses are sums divided once by counts of the whole batch, so `accumulate` micro-batches give the same gradient.
    Micro-batch i takes the rows i, i + accumulate, ..., so that every device splits its own rows.

    A loss, gradient or new parameter that is not finite changes no parameter and no moment and sets the metric
    `skipped` to 1; the step and the schedule's count go on. `bad_rows` is how many rows have a loss that is not finite,
    and `bad_index` the sum of their `index`. What a filler row holds reaches neither loss nor gradient.
    """
    batch = batch.replace(fbank=jnp.where((batch.index >= 0)[:, None, None, None], batch.fbank, 0))
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    counts = losses.batch_counts(batch.loss_mask, batch.seg_kind, batch.index >= 0)

    def loss_of(trainable: Any, micro: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        out: Any = model.apply(
            {"params": optim.merge(trainable, frozen)}, micro, deterministic=False, rngs={"dropout": rng}
        )
        rows = loss_rows(out, micro)
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

    def grad_of(micro: Batch, rng: jax.Array) -> tuple[Any, dict[str, Any]]:
        return jax.grad(loss_of, has_aux=True)(state.trainable, micro, rng)

    if accumulate == 1:
        grads, metrics = grad_of(batch, rng)
    else:
        micros = jax.tree.map(
            lambda x: nn.with_logical_constraint(
                x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
                (None, "batch", *(None,) * (x.ndim - 1)),
            ),
            batch,
        )
        shapes = jax.eval_shape(grad_of, jax.tree.map(lambda x: x[0], micros), rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry, scanned):
            micro, key = scanned
            return jax.tree.map(jnp.add, carry, grad_of(micro, key)), None

        (grads, metrics), _ = jax.lax.scan(add, zeros, (micros, jax.random.split(rng, accumulate)))

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


def loss_rows(out: CrabOutput, batch: Batch) -> dict[str, losses.Term]:
    """Loss terms of every row ("text") and every mask group ("bce", "dice", "ce", when the bucket has masks)."""
    valid = batch.index >= 0
    rows = {"text": losses.text_rows(out.logits, batch.tokens, batch.loss_mask, valid)}
    if out.binary is not None and out.semantic is not None:

        def flat(x: Any) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        groups = jnp.broadcast_to(valid[:, None], batch.seg_kind.shape)
        rows |= losses.mask_rows(
            flat(out.binary), flat(out.semantic), flat(batch.seg_target), flat(batch.seg_kind), flat(groups)
        )
    return rows


def finite_rows(rows: dict[str, losses.Term], count: int) -> jax.Array:
    """bool[count]: whether every loss of a row, and of its mask groups, is finite."""
    return jnp.stack([jnp.isfinite(term.sum).reshape(count, -1).all(1) for term in rows.values()]).all(0)


class Board:
    """Scalars for TensorBoard, on disk when `add` returns. tensorboardX's own SummaryWriter writes in a thread, which a
    full disk ends, and then waits for it for ever."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._event, self._scalar = folder, Event, scalar
        self._file = EventsWriter(str(folder / "events"))
        # Records of later steps are of a run that was stopped: they are not to be shown.
        self._write([Event(step=start + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))])

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step."""
        self._write(
            [
                self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value))
                for name, value in values.items()
            ]
        )

    def _write(self, events: Sequence[Any]) -> None:
        try:
            for event in events:
                self._file.write_event(event)
            self._file.flush()
        except OSError as error:
            error.filename = str(self._folder)  # a write has none
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Logger:
    """metrics.jsonl, TensorBoard and a progress line from windows of device metrics, fetched only when shown.

    Means leave out skipped steps; `skipped` counts those of the window, `skipped_examples` (when examples may be
    skipped) all that the run has listed in skipped.*.jsonl so far.
    """

    def __init__(
        self, workdir: Path, steps: int, start: int, schedule: optax.Schedule, every: int, count_skipped: bool = False
    ):
        self.path, self.steps, self.schedule, self.every = workdir / "metrics.jsonl", steps, schedule, every
        self.workdir, self.count_skipped = workdir, count_skipped
        self.board = Board(workdir / "tensorboard", start)
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
        applied = [v for v in values if not v["skipped"]]
        mean = {k: float(np.mean([v[k] for v in applied])) for k in ("loss", "grad_norm") if applied}
        record = {
            "step": step,
            **mean,
            **part_means(applied),
            "lr": float(self.schedule(step - 1)),
            "tokens_per_s": sum(int(v["tokens"]) for v in values) / seconds,
            "samples_per_s": rows * len(values) / seconds,
            "padding_share": 1 - sum(int(v["tokens"]) for v in values) / sum(int(v["slots"]) for v in values),
            "input_wait_share": sum(w for _, _, w in self.window) / seconds,
            "skipped": len(values) - len(applied),
        }
        if self.count_skipped:
            record["skipped_examples"] = len(runs.skipped_examples(self.workdir))
        self.window = []
        append_line(self.path, record)
        self.board.add(step, {key: value for key, value in record.items() if key != "step"})
        rate = (step - self.first) / (now - self.began)
        eta = (self.steps - step) / rate
        skips = "".join(
            f"  {name.replace('_', ' ')} {record[name]}" for name in ("skipped", "skipped_examples") if record.get(name)
        )
        print(
            f"step {step}/{self.steps}  loss {record.get('loss', np.nan):.4f}  {rate:.2f} step/s  "
            f"eta {eta / 60:.1f} min  {record['tokens_per_s']:.0f} tok/s  padding {record['padding_share']:.0%}  "
            f"input wait {record['input_wait_share']:.0%}{skips}",
            flush=True,
        )

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
    cut_tail(path)
    if path.exists():
        lines = [line for line in path.read_bytes().split(b"\n") if line]
        steps = [(json_object(line) or {}).get("step") for line in lines]
        if damaged := sum(not isinstance(number, int) for number in steps):
            print(f"warning: {path}: {damaged} lines cannot be read; they are left out", file=sys.stderr)
        write_whole(
            path,
            b"".join(
                line + b"\n"
                for line, number in zip(lines, steps, strict=True)
                if isinstance(number, int) and number <= step
            ),
        )


def global_batch(batch: Batch, where: jax.sharding.Sharding, rows: int) -> Batch:
    """This process's rows (`distributed.own_rows`) -> the global batch of `rows` rows on the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x, (rows, *x.shape[1:])), batch)


class SkipGuard:
    """Looks at each step's `skipped` a few steps later, so the device never waits for the host, and ends the run after
    `limit` skipped steps in a row: an InputError, with the last batch saved.
    """

    def __init__(self, limit: int, workdir: Path, watchdog: Watchdog, examples: Sequence[Example]):
        self.limit, self.workdir, self.watchdog, self.examples = limit, workdir, watchdog, examples
        self.pending: deque[tuple[int, dict[str, Any], Batch]] = deque()
        self.in_a_row = 0

    def add(self, step: int, metrics: dict[str, Any], batch: Batch) -> None:
        """Take note of a dispatched step, with this process's rows of its batch."""
        self.pending.append((step, metrics, batch))
        self.settle(RUN_AHEAD)

    def settle(self, ahead: int = 0) -> None:
        """Wait until at most `ahead` dispatched steps are unfinished."""
        while len(self.pending) > ahead:
            step, metrics, batch = self.pending.popleft()
            with self.watchdog.waiting(device_wait(step)):
                skipped = int(metrics["skipped"])
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                distributed.say(
                    f"step {step} skipped: loss {float(metrics['loss'])}, "
                    f"gradient norm {float(metrics['grad_norm'])}{self.cause(metrics)}"
                )
            if self.in_a_row == self.limit:
                file = save_batch(self.workdir, step, batch, self.examples)
                raise InputError(
                    str(file),
                    "loss",
                    "the loss, its gradient or the parameters that it leads to were "
                    f"not finite in {self.limit} steps up to {step}; this is the last one's batch",
                    "look at it with "
                    "safetensors.numpy.load_file (fields: Batch in docs/architecture.md; the examples "
                    "are in the .jsonl beside it), then correct the data or lower optim.lr",
                )

    def cause(self, metrics: dict[str, Any]) -> str:
        """What is known of why a step was skipped, to be added to its line."""
        rows = int(metrics["bad_rows"])
        if rows == 1:
            return f"; of example {self.examples[int(metrics['bad_index'])].id!r} alone"
        if rows:
            return f"; of {rows} examples"
        if np.isfinite(float(metrics["loss"])) and np.isfinite(float(metrics["grad_norm"])):
            return "; the parameters after it would not be finite"
        return "; the loss of every example is finite"


def device_wait(step: int) -> str:
    """What a process waits for that waits for its devices."""
    processes = jax.process_count()
    others = f", which all {processes} processes must reach" if processes > 1 else ""
    return f"device step {step}{others}"


def save_batch(workdir: Path, step: int, batch: Batch, examples: Sequence[Example]) -> Path:
    """One process's rows of a batch as not_finite/step<step>.process<i>.safetensors, and its Examples as .jsonl beside
    it; returns the first.
    """
    file = workdir / "not_finite" / f"step{step}.process{jax.process_index()}.safetensors"
    arrays = {field.name: np.ascontiguousarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    with whole(file) as partial:
        safetensors.numpy.save_file(arrays, partial)
    write_jsonl(file.with_suffix(".jsonl"), [examples[int(index)] for index in batch.index])
    return file


def compile_step(config: RunConfig, model: Crab, mesh: jax.sharding.Mesh, state: TrainState) -> Callable[..., Any]:
    """The jitted step: donated state, batch rows over the mesh."""
    accumulate = layout.micro_batches(config, mesh)

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        with sharding.constrained(mesh):
            return train_step(
                state,
                frozen,
                batch,
                model=model,
                tx=optim.optimizer(config.optim, config.steps),
                loss_cfg=config.loss,
                seed=config.seed,
                accumulate=accumulate,
            )

    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_shardings, None, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )


def learns_nothing(schedule: optax.Schedule, start: int, steps: int) -> bool:
    """Whether no step after `start` has a learning rate above 0. Every schedule begins with 0, as those of
    DeepSpeed and Hugging Face do, so a run of a single step learns nothing."""
    return start < steps and not any(float(schedule(step)) for step in range(start, min(steps, start + 2)))


def abstract_state(config: RunConfig, trainable: Any, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state, from those of the trainable parameters."""
    tx = optim.optimizer(config.optim, config.steps)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, trainable, jax.eval_shape(tx.init, trainable))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        sharding.state_shardings(state, trainable, mesh),
    )


def start_or_resume(
    config: RunConfig,
    model: Crab,
    mesh: jax.sharding.Mesh,
    checkpoints: RunCheckpoints,
    manifest: dict[str, Any] | None = None,
) -> tuple[TrainState, Any]:
    """(train state, frozen parameters), each leaf read or drawn straight into its shards; `manifest`: what to note of a
    run that starts."""
    wanted = runs.wanted_params(config, model, mesh)
    trainable, frozen = optim.split(wanted, config.trainable, config.frozen)
    state = abstract_state(config, trainable, mesh)
    if checkpoints.latest is not None:
        checkpoints.need_room(dataclasses.asdict(state))
        return TrainState(**checkpoints.restore(dataclasses.asdict(state))), checkpoints.load_frozen(frozen)
    checkpoints.need_room(dataclasses.asdict(state), frozen)
    trainable, frozen = optim.split(runs.initial_params(config, model, wanted), config.trainable, config.frozen)
    tx = optim.optimizer(config.optim, config.steps)

    def begin(trainable: Any) -> tuple[jax.Array, Any]:
        return jnp.int32(0), tx.init(trainable)

    where = jax.tree.map(lambda x: x.sharding, (state.step, state.opt))
    step, opt = jax.jit(begin, out_shardings=where)(trainable)
    checkpoints.save_frozen(frozen, {"lora_heads": model.cfg.lora.heads, **(manifest or {})})
    return TrainState(step, trainable, opt), frozen


def input_wait(order: TrainOrder, step: int, start: int, rows: np.ndarray, workers: int) -> str:
    """What a process waits for that waits for the batch of `step`: who decodes it, and which examples."""
    worker = f"worker {(step - 1 - start) % workers} of {workers}" if workers else "the decoding threads"
    ids = [order.examples[index].id for index in order.batches[step - 1][rows]]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"input of step {step}: {worker}, on examples {shown}"


def train(config: RunConfig, workdir: Path) -> None:
    """Run (or resume) the stage that `config` describes in `workdir`."""
    if distributed.primary():
        runs.claim_workdir(workdir, config)
    distributed.agree("start", lambda: distributed.program() | runs.shared(config) | {"--workdir": locks.mark(workdir)})
    mesh = layout.mesh_of(config)
    layout.micro_batches(config, mesh)  # refuses a batch that does not divide, before anything is loaded
    tokenizer = runs.tokenizer_of(config)
    model = Crab(config.model)
    skipped, batch_at = runs.skipped_file(workdir), sharding.batch_sharding(mesh)
    cut_tail(skipped)
    if distributed.primary():
        cut_tail(workdir / runs.LEFT_OUT)
    examples = runs.train_examples(config, skipped)
    trained_on = runs.data_identity(config, examples)
    checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep)
    distributed.agree(
        "data",
        lambda: {
            "tokenizer": tokenizer.digest(),
            "step to go on from": checkpoints.latest,
            **{f"data, {name}": value for name, value in trained_on.items()},
        },
    )
    resumed = checkpoints.latest is not None
    if resumed and distributed.primary():
        runs.check_data(checkpoints, trained_on, config)
    order = runs.train_order(config, tokenizer, skipped, examples)
    name = f"process {jax.process_index()}" if jax.process_count() > 1 else ""
    watchdog = Watchdog(config.watchdog_seconds, name, silent=distributed.silent)
    with watchdog, StopRequest() as stop:
        state, frozen = start_or_resume(config, model, mesh, checkpoints, {"data": trained_on})
        start = int(state.step)
        schedule = optim.learning_rate(config.optim, config.steps)
        if distributed.primary():
            runs.save_description(workdir, config, tokenizer)
            checkpoints.note_description()
        if learns_nothing(schedule, start, config.steps):
            distributed.say(
                f"warning: --config: steps: is {config.steps}, and step {start + 1} of it has a learning "
                "rate of 0, where warm-up starts: nothing is learned; take more steps"
            )
        if resumed:
            distributed.say(f"resumed from step {start} of {workdir}")
        distributed.say(runs.parameter_table(state.trainable, frozen))
        distributed.say(padding.table(order.padding))

        rows = distributed.own_rows(batch_at, config.mixture.batch_size)
        data: Iterator[Batch] = iter(runs.train_dataset(config, tokenizer, order, rows, start, skipped))
        step_fn = compile_step(config, model, mesh, state)
        logger = (
            Logger(workdir, config.steps, start, schedule, config.log_every, config.data.on_error == "skip")
            if distributed.primary()
            else None
        )
        guard = SkipGuard(config.max_skipped, workdir, watchdog, order.examples)
        for step in range(start + 1, config.steps + 1):
            asked = time.monotonic()
            with watchdog.waiting(lambda step=step: input_wait(order, step, start, rows, config.mixture.workers)):
                own = next(data)
            waited = time.monotonic() - asked
            with watchdog.waiting(f"step {step} to be dispatched (the first of its bucket is compiled)"):
                state, metrics = step_fn(state, frozen, global_batch(own, batch_at, config.mixture.batch_size))
            guard.add(step, metrics, own)
            with watchdog.waiting(device_wait(step)):
                if logger:
                    logger.add(step, metrics, config.mixture.batch_size, waited)
            checkpoints.raise_failed()
            stopped = stop.reached(step)
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                guard.settle()  # what is saved has been looked at
                with watchdog.waiting(f"the checkpoint of step {step}"):
                    checkpoints.save(step, dataclasses.asdict(state))
            if stopped:
                break
        with watchdog.waiting("the last checkpoint"):
            checkpoints.wait()
    if logger:
        logger.close()
        write_whole(workdir / "compilations.json", json.dumps({"train_step": step_fn._cache_size()}))
    if int(state.step) < config.steps:
        distributed.say(
            f"stopped on request after step {int(state.step)} of {config.steps}, which is saved: "
            "start the same command again to resume"
        )
    if found := runs.skipped_examples(workdir):
        distributed.say(f"{len(found)} examples were skipped, see {workdir}/skipped.*.jsonl")


def main() -> None:
    """Entry point of `python -m crab_jax.train`."""
    config, workdir = parse_flags(sys.argv, __doc__)
    compile_cache.enable()
    with distributed.together("--debug" in sys.argv):
        with locks.locked(workdir, "--workdir") if distributed.primary() else contextlib.nullcontext():
            train(config, workdir)


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
