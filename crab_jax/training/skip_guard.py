"""Guard against skipped steps: a run ends after too many in a row, with the last batch saved."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from crab_jax.io.errors import InputError
from crab_jax.io.files import whole
from crab_jax.parallel import distributed
from crab_jax.parallel.watchdog import Watchdog
from data_pipelines.batching import Batch
from data_pipelines.examples import Example, write_jsonl

RUN_AHEAD = 2  # steps that may be dispatched before the metrics of an earlier one are read


class SkipGuard:
    """Counter of skipped steps, which ends the run after `limit` of them in a row.

    It reads the metrics of a step a few steps later, so that the device never waits for the host. At the limit it saves
    the last batch and raises InputError naming its file.
    """

    def __init__(self, limit: int, workdir: Path, watchdog: Watchdog, examples: Sequence[Example]):
        self.limit, self.workdir, self.watchdog, self.examples = limit, workdir, watchdog, examples
        self.pending: deque[tuple[int, dict[str, Any], Batch]] = deque()
        self.in_a_row = 0

    def add(self, step: int, metrics: dict[str, Any], batch: Batch) -> None:
        """Add a dispatched step, with its metrics on the device and this process's rows of its batch."""
        self.pending.append((step, metrics, batch))
        self.settle(RUN_AHEAD)

    def settle(self, ahead: int = 0) -> None:
        """Wait until at most `ahead` dispatched steps are unfinished, and report those that were skipped.

        Raises InputError after `limit` skipped steps in a row.
        """
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
        """Return why a step was skipped, as far as its metrics tell, for the end of its message."""
        rows = int(metrics["bad_rows"])
        if rows == 1:
            return f"; of example {self.examples[int(metrics['bad_index'])].id!r} alone"
        if rows:
            return f"; of {rows} examples"
        if np.isfinite(float(metrics["loss"])) and np.isfinite(float(metrics["grad_norm"])):
            return "; the parameters after it would not be finite"
        return "; the loss of every example is finite"


def device_wait(step: int) -> str:
    """Return the description of waiting for the devices to finish `step`, which the watchdog reports."""
    processes = jax.process_count()
    others = f", which all {processes} processes must reach" if processes > 1 else ""
    return f"device step {step}{others}"


def save_batch(workdir: Path, step: int, batch: Batch, examples: Sequence[Example]) -> Path:
    """Save this process's rows of a batch, and return the file.

    The arrays are in <workdir>/not_finite/step<step>.process<i>.safetensors, the Examples beside it in a .jsonl file.
    """
    file = workdir / "not_finite" / f"step{step}.process{jax.process_index()}.safetensors"
    arrays = {field.name: np.ascontiguousarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    with whole(file) as partial:
        safetensors.numpy.save_file(arrays, partial)
    write_jsonl(file.with_suffix(".jsonl"), [examples[int(index)] for index in batch.index])
    return file
