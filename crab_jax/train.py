"""Train one stage.

    python -m crab_jax.train --config=configs/tiny.py --config.optim.lr=3e-4 --workdir=runs/x

Any config key can be overridden with --config.key=value; an unknown key is an error before anything starts. A workdir
that already holds checkpoints of the same config is resumed: with the same bits on the same mesh, and up to rounding on
another mesh. To train on several processes or hosts, start the same command on each, with a workdir that all of them
can see (crab_jax/parallel/distributed.py explains how they find each other). SIGTERM, or Ctrl-C once, ends the run
after the current step with a checkpoint and exit code 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crab_jax import optim
from crab_jax.aot import compile_cache
from crab_jax.checkpoints.run_steps import RunCheckpoints
from crab_jax.config import RunConfig, parse_flags
from crab_jax.evaluation import held_out
from crab_jax.evaluation.held_out import Evaluation
from crab_jax.io import locks
from crab_jax.io.errors import run_verb
from crab_jax.io.files import cut_tail, write_whole
from crab_jax.models.protocol import Model
from crab_jax.parallel import distributed, sharding
from crab_jax.parallel.preemption import StopRequest
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.runs import run_data, run_folder, run_mesh, run_params
from crab_jax.training import goodput
from crab_jax.training.first_step import FirstStep
from crab_jax.training.goodput import Stopwatch
from crab_jax.training.log_writer import module_of, open_writer
from crab_jax.training.metrics_log import Logger
from crab_jax.training.skip_guard import SkipGuard, device_wait
from crab_jax.training.step_programs import StepPrograms, abstract_batch
from crab_jax.training.train_step import TrainState, abstract_state, compile_step, learns_nothing
from data_pipelines import bucket_fill
from data_pipelines.batching import Batch
from data_pipelines.examples import learned
from data_pipelines.mixture import TrainOrder


def start_or_resume(
    config: RunConfig,
    model: Model,
    mesh: jax.sharding.Mesh,
    tx: optax.GradientTransformation,
    checkpoints: RunCheckpoints,
    manifest: dict[str, Any] | None = None,
) -> tuple[TrainState, Any]:
    """Return the train state and the frozen parameters of a run that starts, or that resumes its latest checkpoint.

    Each leaf is read or initialised directly in its shards. `manifest` is stored with the frozen parameters of a run
    that starts.
    """
    wanted = run_params.wanted_params(config, model, mesh)
    trainable, frozen = optim.split(wanted, config.trainable, config.frozen)
    state = abstract_state(tx, trainable, mesh)
    if checkpoints.latest is not None:
        checkpoints.need_room(dataclasses.asdict(state))
        return TrainState(**checkpoints.restore(dataclasses.asdict(state))), checkpoints.load_frozen(frozen)
    checkpoints.need_room(dataclasses.asdict(state), frozen)
    trainable, frozen = optim.split(run_params.initial_params(config, model, wanted), config.trainable, config.frozen)

    def begin(trainable: Any) -> tuple[jax.Array, Any]:
        return jnp.int32(0), tx.init(trainable)

    placement = jax.tree.map(lambda x: x.sharding, (state.step, state.opt))
    step, opt = jax.jit(begin, out_shardings=placement)(trainable)
    checkpoints.save_frozen(frozen, {"lora_heads": model.cfg.lora_heads, **(manifest or {})})
    return TrainState(step, trainable, opt), frozen


def input_wait(order: TrainOrder, step: int, start: int, rows: np.ndarray, workers: int) -> str:
    """Return the description of waiting for the batch of `step`: who decodes it, and which examples.

    The watchdog reports it. `start` is the step at which the run began, `rows` are those of this process.
    """
    worker = f"worker {(step - 1 - start) % workers} of {workers}" if workers else "the decoding threads"
    ids = [order.examples[index].id for index in order.batches[step - 1][rows]]
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return f"input of step {step}: {worker}, on examples {shown}"


def batches_ahead(order: TrainOrder, rows: int, image_size: int, mesh: jax.sharding.Mesh) -> list[Batch]:
    """Return the shapes of the batches whose programs are compiled beside the first steps, the most frequent first.

    rows: of a global batch. There are none on CPU, where compiling takes the cores from the steps.
    """
    if mesh.devices.flat[0].platform == "cpu":
        return []
    drawn = sorted((row for row in order.padding if row.share), key=lambda row: -row.share)
    return [abstract_batch(row.bucket, rows, image_size, sharding.batch_sharding(mesh)) for row in drawn]


def evaluate(
    step: int, evaluation: Evaluation, state: TrainState, frozen: Any, watchdog: Watchdog, logger: Logger | None
) -> None:
    """Evaluate the parameters after the finished `step` and log the result; all processes take part."""
    began = time.monotonic()
    record = evaluation.run(step, state.trainable, frozen, watchdog)
    if logger:
        logger.add_evaluation(step, record, time.monotonic() - began)


def train(config: RunConfig, workdir: Path, started: float | None = None) -> None:
    """Run or resume the stage that `config` describes in `workdir`.

    started: when the process started, in seconds since the epoch, from which its start-up counts; by default now.
    """
    watch = Stopwatch(started)
    if distributed.primary():
        run_folder.claim_workdir(workdir, config)
        module_of(config.log_writer)  # raises for a missing package before anything is loaded
    distributed.agree(
        "start", lambda: distributed.program() | run_folder.shared(config) | {"--workdir": locks.mark(workdir)}
    )
    mesh = run_mesh.mesh_of(config)
    # An indivisible batch size is refused before anything is loaded.
    sizes, micro_batches = run_mesh.fitted(config, mesh)
    tokenizer = run_folder.tokenizer_of(config)
    model = sizes.build()
    schedule, tx = optim.learning_rate(config.optim, config.steps), optim.optimizer(config.optim, config.steps)
    skipped, batch_at = run_data.skipped_file(workdir), sharding.batch_sharding(mesh)
    cut_tail(skipped)
    if distributed.primary():
        cut_tail(workdir / run_data.LEFT_OUT)
    examples = run_data.train_examples(config, skipped)
    trained_on = run_data.data_identity(config, examples)
    chosen = held_out.held_out(config, tokenizer)
    checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep)
    distributed.agree(
        "data",
        lambda: {
            "tokenizer": tokenizer.digest(),
            "step to go on from": checkpoints.latest,
            **{f"data, {name}": value for name, value in trained_on.items()},
            "examples of the evaluation": learned(chosen.examples) if chosen else "",
        },
    )
    resumed = checkpoints.latest is not None
    if resumed and distributed.primary():
        run_data.check_data(checkpoints, trained_on, config)
    order = run_data.train_order(config, tokenizer, skipped, examples)
    name = f"process {jax.process_index()}" if jax.process_count() > 1 else ""
    watchdog = Watchdog(config.watchdog_seconds, name, silent=distributed.silent)
    first = FirstStep()
    with watchdog, StopRequest() as stop, contextlib.ExitStack() as ending:
        state, frozen = start_or_resume(config, model, mesh, tx, checkpoints, {"data": trained_on})
        start = int(state.step)
        if distributed.primary():
            run_folder.save_description(workdir, config, tokenizer)
            checkpoints.note_description()
        if learns_nothing(schedule, start, config.steps):
            distributed.say(
                f"warning: --config: steps: is {config.steps}, and step {start + 1} of it has a learning "
                "rate of 0, where warm-up starts: nothing is learned; take more steps"
            )
        if resumed:
            distributed.say(f"resumed from step {start} of {workdir}")
        distributed.say(run_params.parameter_table(state.trainable, frozen))
        distributed.say(bucket_fill.table(order.padding))

        rows = distributed.own_rows(batch_at, config.mixture.batch_size)
        data: Iterator[Batch] = iter(run_data.train_dataset(config, tokenizer, order, rows, start, skipped))
        step_fn = StepPrograms(
            compile_step(config, model, mesh, state, tx, micro_batches),
            state,
            frozen,
            batches_ahead(order, config.mixture.batch_size, config.data.image_size, mesh)
            if start < config.steps
            else (),
        )
        ending.callback(step_fn.close)
        logger = (
            Logger(
                workdir,
                config.steps,
                start,
                schedule,
                config.log_every,
                config.data.on_error == "skip",
                watch,
                open_writer(config.log_writer, workdir, config.flat()),
            )
            if distributed.primary()
            else None
        )
        guard = SkipGuard(config.max_skipped, workdir, watchdog, order.examples)
        evaluation = None
        if chosen:
            distributed.say(chosen.described())
            with watch.on("evaluation"), watchdog.waiting("the examples of the evaluation"):
                evaluation = held_out.Evaluation(config, model, mesh, tokenizer, chosen, state.trainable, micro_batches)
            # The run may have been stopped after this step's checkpoint and before its evaluation.
            if chosen.due(start) and not distributed.told(logger is not None and logger.evaluated(start)):
                with watch.on("evaluation"):
                    evaluate(start, evaluation, state, frozen, watchdog, logger)
        for step in range(start + 1, config.steps + 1):
            asked = time.monotonic()
            awaited = watchdog.waiting(partial(input_wait, order, step, start, rows, config.mixture.workers))
            with watch.on("input"), awaited:
                own = next(data)
            waited = time.monotonic() - asked
            dispatched = watchdog.waiting(f"step {step} to be dispatched (the first of its bucket is compiled)")
            with watch.compiling(step_fn.used), dispatched:
                batch = distributed.global_batch(own, batch_at, config.mixture.batch_size)
                state, metrics = step_fn(state, frozen, batch)
            if step == start + 1:
                with watchdog.waiting(device_wait(step)):
                    noted = first.done(step, metrics)
                if logger:
                    logger.note(*noted)
            guard.add(step, metrics, own)
            with watchdog.waiting(device_wait(step)):
                if logger:
                    logger.add(step, metrics, config.mixture.batch_size, waited)
            checkpoints.raise_failed()
            stopped = stop.should_stop(step)
            if step % config.checkpoint_every == 0 or step == config.steps or stopped:
                guard.settle()  # so that no step is saved before it was checked
                with watch.on("checkpoint"), watchdog.waiting(f"the checkpoint of step {step}"):
                    checkpoints.save(step, dataclasses.asdict(state))
            if stopped:
                break
            if evaluation and evaluation.chosen.due(step):
                guard.settle()
                with watch.on("evaluation"):
                    evaluate(step, evaluation, state, frozen, watchdog, logger)
        with watch.on("checkpoint"), watchdog.waiting("the last checkpoint"):
            checkpoints.wait()
    if logger:
        logger.close()
        compiled = {"train_step": step_fn.used()}
        compiled |= {"evaluation": evaluation.compilations} if evaluation else {}
        write_whole(workdir / "compilations.json", json.dumps(compiled))
    if int(state.step) < config.steps:
        distributed.say(
            f"stopped on request after step {int(state.step)} of {config.steps}, which is saved: "
            "start the same command again to resume"
        )
    if skipped_records := run_data.skipped_examples(workdir):
        distributed.say(f"{len(skipped_records)} examples were skipped, see {workdir}/skipped.*.jsonl")


def main() -> None:
    """Run the command `python -m crab_jax.train`."""
    config, workdir = parse_flags(sys.argv, __doc__)
    compile_cache.enable()
    with (
        distributed.together("--debug" in sys.argv),
        locks.locked(workdir, "--workdir") if distributed.primary() else contextlib.nullcontext(),
    ):
        train(config, workdir, goodput.process_start())


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
