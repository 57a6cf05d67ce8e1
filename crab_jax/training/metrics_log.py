"""Metrics of a run in metrics.jsonl and TensorBoard, written without waiting for the device after every step."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from crab_jax.io import paths
from crab_jax.io.files import append_line, cut_tail, json_object, write_whole
from crab_jax.runs import run_data
from crab_jax.tasks import TASKS
from crab_jax.training.goodput import Ledger, Stopwatch
from crab_jax.training.log_writer import LogWriter

LARGEST = 2**20  # bytes of a TensorBoard file in a bucket


class Board:
    """Scalars for TensorBoard, which are on disk when `add` returns.

    The SummaryWriter of tensorboardX writes in a thread; a full disk ends the thread, and the writer then waits for it
    for ever. Raises OSError with the name of the folder.

    For a folder in a bucket the file is on this machine's disk, and written to the bucket as a whole after each `add`;
    a new file begins after LARGEST bytes, so that little is written again.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._remote = paths.in_bucket(folder) if paths.is_remote(folder) else None
        self._own = tempfile.TemporaryDirectory() if self._remote else contextlib.nullcontext(folder)
        self._local = Path(self._own.__enter__())
        self._local.mkdir(parents=True, exist_ok=True)
        self._folder, self._event, self._scalar = folder, Event, scalar
        self._writer: Any = EventsWriter
        self._file, self._parts = self._begin(0), 0
        # Records of later steps are those of an interrupted run; this event makes TensorBoard discard them.
        self._write([Event(step=start + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))])

    def _begin(self, part: int) -> Any:
        return self._writer(str(self._local / f"events{f'.part{part}' if part else ''}"))

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
            if self._remote:
                self._put()
        except OSError as error:
            error.filename = str(self._folder)  # the error of a write names no file
            raise

    def _put(self) -> None:
        """Write the newest file to the bucket, and begin another one when it is large."""
        newest = max(self._local.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert self._remote is not None
        (self._remote / newest.name).put(newest)
        if newest.stat().st_size > LARGEST:
            self._file.close()
            newest.unlink()
            self._parts += 1
            self._file = self._begin(self._parts)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._own.__exit__(None, None, None)


class Logger:
    """Log of a run: metrics.jsonl, TensorBoard, the writer of `log_writer`, goodput.jsonl, and a progress line.

    Metrics stay on the device until a window of `every` steps is complete. Means leave out skipped steps. `skipped`
    counts the skipped steps of the window, and `skipped_examples` (when examples may be skipped) all that the run has
    listed in skipped.*.jsonl so far. watch: times what this process does.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        start: int,
        schedule: optax.Schedule,
        every: int,
        count_skipped: bool = False,
        watch: Stopwatch | None = None,
        writer: LogWriter | None = None,
    ):
        self.path, self.steps, self.schedule, self.every = workdir / "metrics.jsonl", steps, schedule, every
        self.workdir, self.count_skipped = workdir, count_skipped
        self.board = Board(workdir / "tensorboard", start)
        self.writer = writer or LogWriter(None)
        self.ledger = Ledger(workdir, watch or Stopwatch(), start)
        keep_until(self.path, start)
        self.window: list[tuple[int, dict[str, Any], float]] = []
        self.noted: dict[str, float] = {}
        self.began, self.first = time.monotonic(), start
        self.mark = self.began

    def note(self, values: Mapping[str, float], line: str) -> None:
        """Print a line, and add values to the record of the next window."""
        self.noted |= values
        print(line, flush=True)

    def add(self, step: int, metrics: dict[str, Any], rows: int, waited: float) -> None:
        """Record one step of `rows` rows; after every `every` steps write the means of the window.

        waited: seconds for which the step waited for its input.
        """
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
            **self.noted,
            **self.ledger.add(step, len(values) - len(applied)),
        }
        self.noted = {}
        if self.count_skipped:
            record["skipped_examples"] = len(run_data.skipped_examples(self.workdir))
        self.window = []
        self._write(step, record)
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

    def evaluated(self, step: int) -> bool:
        """Return whether the log holds an evaluation at `step`."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        records = [record for line in lines if (record := json_object(line)) is not None]
        return any(record.get("step") == step and "eval/loss" in record for record in records)

    def add_evaluation(self, step: int, record: Mapping[str, float], seconds: float) -> None:
        """Write the record of an evaluation as a line of its own.

        The `seconds` that it took do not count in the speed of training.
        """
        self._write(step, {"step": step, **record})
        self.mark += seconds
        self.began += seconds
        print(
            f"evaluation at step {step}/{self.steps}  loss {record['eval/loss']:.4f}  "
            f"{record['eval/samples']:.0f} examples  {seconds:.1f} s",
            flush=True,
        )

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        append_line(self.path, record, now=True)
        values = {key: value for key, value in record.items() if key != "step"}
        self.board.add(step, values)
        self.writer.add(step, values)

    def close(self) -> None:
        """Close the files, and print how much of the time of the whole run was productive."""
        self.ledger.add(self.window[-1][0] if self.window else self.ledger.step)
        print(self.ledger.described(), flush=True)
        self.board.close()
        self.writer.close()


def part_means(values: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means loss/<term> and, of the text loss, loss/<task> of a window.

    A mean is a sum divided by a count; those whose count is 0 are left out.
    """
    parts: dict[str, list[float]] = {}
    for value in values:
        named = {**value["terms"], **dict(zip(TASKS, zip(*value["by_task"], strict=True), strict=True))}
        for name, (total, count) in named.items():
            pooled = parts.setdefault(f"loss/{name}", [0.0, 0.0])
            pooled[0] += float(total)
            pooled[1] += float(count)
    return {name: total / count for name, (total, count) in parts.items() if count}


def keep_until(path: Path, step: int) -> None:
    """Delete the records after `step`, which a resumed run writes again, and warn of lines that cannot be read."""
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
