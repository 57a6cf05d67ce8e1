"""What a run says while it trains: the records of metrics.jsonl, skipped steps, and what it waits for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from crab_jax import train
from crab_jax.io.errors import InputError
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.tasks import TASK_NAMES
from crab_jax.training import metrics_log, skip_guard
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now.seconds)
    return now


def metrics(loss: float, skipped: int = 0, tokens: int = 30, norm: float = 2.0):
    """The metrics of one step of two rows with 40 places, whose text is of ave and avqa."""
    by_task = np.zeros((2, len(TASK_NAMES)))
    by_task[:, TASK_NAMES.index("ave")] = loss * 3, 3
    by_task[:, TASK_NAMES.index("avqa")] = 8, 1
    return {
        "loss": np.float32(loss),
        "grad_norm": np.float32(norm),
        "skipped": skipped,
        "tokens": tokens,
        "slots": 40,
        "terms": {"text": (loss * 4, 4), "bce": (0.0, 0)},
        "by_task": by_task,
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_holds_the_means_of_a_window_and_its_speed(tmp_path, clock, capsys):
    log = metrics_log.Logger(tmp_path, steps=7, start=2, schedule=lambda step: step / 10, every=2)
    log.add(3, metrics(1.0, tokens=10), rows=2, waited=0.5)
    assert not (tmp_path / "metrics.jsonl").exists()
    clock.seconds = 102.0
    log.add(4, metrics(2.0, norm=4.0), rows=2, waited=0.5)
    (record,) = records(tmp_path)
    assert {key: value for key, value in record.items() if not key.startswith("goodput")} == {
        "step": 4,
        "loss": 1.5,
        "grad_norm": 3.0,
        "loss/text": (4 + 8) / 8,  # sums over counts, not means of means
        "loss/ave": (3 + 6) / 6,
        "loss/avqa": 8.0,
        "lr": 0.3,  # of the step that was taken, which counts from 0
        "tokens_per_s": 20.0,
        "samples_per_s": 2.0,
        "padding_share": 0.5,
        "input_wait_share": 0.5,
        "skipped": 0,
    }
    line = "step 4/7  loss 1.5000  1.00 step/s  eta 0.1 min  20 tok/s  padding 50%  input wait 50%\n"
    assert capsys.readouterr().out == line
    log.close()


def test_skipped_steps_count_in_the_speed_and_in_no_mean(tmp_path, clock, capsys):
    (tmp_path / "skipped.0.jsonl").write_text('{"index": 4}\n{"index": 7}\n{"index": 4}\n')
    log = metrics_log.Logger(tmp_path, 3, 0, lambda step: 0.0, every=2, count_skipped=True)
    for step, value in ((1, metrics(np.nan, skipped=1)), (2, metrics(2.0)), (3, metrics(np.inf, skipped=1))):
        clock.seconds += 1
        log.add(step, value, 2, 0.0)
    first, last = records(tmp_path)
    assert (first["loss"], first["skipped"], first["tokens_per_s"]) == (2.0, 1, 30.0)
    assert first["skipped_examples"] == 2 and "skipped 1  skipped examples 2" in capsys.readouterr().out
    assert last["step"] == 3 and "loss" not in last and "grad_norm" not in last and last["skipped"] == 1
    assert not [key for key in last if key.startswith("loss/")]


def test_an_evaluation_is_a_line_of_its_own_and_costs_no_speed(tmp_path, clock, capsys):
    log = metrics_log.Logger(tmp_path, 4, 0, lambda step: 0.0, every=1)
    assert not log.evaluated(2)
    clock.seconds += 1
    log.add(1, metrics(1.0), 2, 0.0)
    clock.seconds += 50
    log.add_evaluation(1, {"eval/loss": 0.25, "eval/samples": 6.0}, 50.0)
    assert capsys.readouterr().out.endswith("evaluation at step 1/4  loss 0.2500  6 examples  50.0 s\n")
    clock.seconds += 1
    log.add(2, metrics(1.0), 2, 0.0)
    assert records(tmp_path)[1] == {"step": 1, "eval/loss": 0.25, "eval/samples": 6.0}
    assert records(tmp_path)[2]["samples_per_s"] == 2.0 and " 1.00 step/s" in capsys.readouterr().out
    assert log.evaluated(1) and not log.evaluated(2)


def test_what_a_resumed_run_writes_again_is_cut_off(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics_log.keep_until(path, 2)
    assert not path.exists()
    lines = [b'{"step": 1}', b'{"step": 2}', b'{"step": 2, "eval/loss": 1}', b'{"step": 3}', b'{"step": 1, "late": 1}']
    path.write_bytes(b"\n".join(lines) + b"\n" + b'{"step": 2, "brok')
    metrics_log.keep_until(path, 2)
    assert path.read_bytes().splitlines() == [*lines[:3], lines[4]] and "cannot be read" not in capsys.readouterr().err
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[]\n{"step": "2"}\n')
    metrics_log.keep_until(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n' and "3 lines cannot be read" in capsys.readouterr().err


def test_means_of_parts_are_pooled_and_absent_ones_left_out():
    none = np.zeros((2, len(TASK_NAMES)))
    first = {"terms": {"text": (6.0, 2), "dice": (0.0, 0)}, "by_task": none}
    second = {"terms": {"text": (1.0, 8), "dice": (0.5, 1)}, "by_task": none}
    assert metrics_log.part_means([first, second]) == {"loss/text": 0.7, "loss/dice": 0.5}
    assert metrics_log.part_means([]) == {}


# Skipped steps.

EXAMPLES = [Example(id=name, task="ave", instruction="") for name in ("first", "second")]
BATCH = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=0), 2, 8).replace(
    index=np.int32([1, 0])
)


def skip(loss=np.nan, norm=np.inf, rows=1, skipped=1):
    return {"skipped": skipped, "loss": loss, "grad_norm": norm, "bad_rows": rows, "bad_index": 1}


def test_a_skipped_step_is_reported_two_steps_later_with_its_cause(tmp_path, capsys):
    guard = skip_guard.SkipGuard(9, tmp_path, Watchdog(0), EXAMPLES)
    guard.add(1, skip(), BATCH)
    guard.add(2, skip(rows=0), BATCH)
    assert capsys.readouterr().out == "" and len(guard.pending) == 2
    guard.add(3, skip(rows=2), BATCH)
    assert capsys.readouterr().out == "step 1 skipped: loss nan, gradient norm inf; of example 'second' alone\n"
    guard.add(4, skip(loss=1.5, norm=2.0, rows=0), BATCH)
    guard.settle()
    assert capsys.readouterr().out.splitlines() == [
        "step 2 skipped: loss nan, gradient norm inf; the loss of every example is finite",
        "step 3 skipped: loss nan, gradient norm inf; of 2 examples",
        "step 4 skipped: loss 1.5, gradient norm 2.0; the parameters after it would not be finite",
    ]
    assert guard.cause(skip(loss=1.5, rows=0)) == guard.cause(skip(norm=1.0, rows=0))
    assert not (tmp_path / "not_finite").exists()


def test_as_many_skipped_steps_in_a_row_as_allowed_end_the_run(tmp_path):
    guard = skip_guard.SkipGuard(2, tmp_path, Watchdog(0), EXAMPLES)
    for step, skipped in enumerate((1, 0, 1, 0, 0, 1), 1):
        guard.add(step, skip(skipped=skipped), BATCH)
    guard.settle()
    guard.add(7, skip(), BATCH)
    with pytest.raises(InputError, match=r"step7\.process0\.safetensors.*in 2 steps up to 7"):
        guard.settle()


# What a run waits for, as the watchdog reports it.


@pytest.mark.parametrize(("processes", "others"), [(1, ""), (2, ", which all 2 processes must reach")])
def test_the_step_that_is_waited_for_is_named(monkeypatch, processes, others):
    monkeypatch.setattr(skip_guard.jax, "process_count", lambda: processes)
    assert skip_guard.device_wait(7) == f"device step 7{others}"


def test_the_batch_that_is_waited_for_names_its_worker_and_examples():
    examples = [Example(id=f"e{i}", task="ave", instruction="") for i in range(10)]
    order = SimpleNamespace(examples=examples, batches=np.arange(20).reshape(2, 10) % 10)
    shown = "e0, e1, e2, e3, e4, e5, e6, e7"
    said = "input of step 2: {}, on examples {}"
    everything = train.input_wait(order, 2, 0, np.arange(10), workers=0)
    assert everything == said.format("the decoding threads", f"{shown} and 2 more")
    assert train.input_wait(order, 2, 0, np.arange(8), workers=3) == said.format("worker 1 of 3", shown)
    assert train.input_wait(order, 2, 1, np.array([9, 2]), workers=3) == said.format("worker 0 of 3", "e9, e2")
