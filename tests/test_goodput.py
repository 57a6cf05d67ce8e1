"""Goodput: every second of a run's wall time is counted once, over all its restarts; and the writer beside it."""

import json
import sys
import types

import pytest

from crab_jax.io.errors import InputError
from crab_jax.reports import run_page
from crab_jax.training import goodput
from crab_jax.training.goodput import CAUSES, PRODUCTIVE, Ledger, Stopwatch, Window, accounts
from crab_jax.training.log_writer import open_writer
from crab_jax.training.metrics_log import Logger


def nonzero(windows):
    return {cause: seconds for cause, seconds in accounts(windows).items() if seconds}


def test_the_time_of_a_window_is_what_its_steps_were_not_spent_on():
    windows = [
        Window(100, 130, 0, 0, 0, {}),
        Window(100, 230, 0, 10, 1, {"compile": 30, "input": 10, "checkpoint": 5, "evaluation": 5}),
        Window(100, 240, 10, 10, 0, {"checkpoint": 4}),
    ]
    assert nonzero(windows) == {
        "start": 30,
        "compile": 30,
        "input": 10,
        "checkpoint": 15,  # what is left of a process after its last step, too
        "evaluation": 5,
        "skipped": 5,
        PRODUCTIVE: 45,
    }


def test_steps_after_the_checkpoint_that_a_restart_goes_on_from_are_repeated():
    first = [Window(0, 10, 0, 0, 0, {}), Window(0, 110, 0, 10, 0, {}), Window(0, 210, 10, 20, 2, {})]
    second = [Window(250, 260, 15, 15, 0, {}), Window(250, 310, 15, 20, 0, {})]
    # Of the second window, 5 of 10 steps are done again; the two that were skipped are among the others.
    seen = nonzero(first + second)
    assert seen == {"start": 20, "restart": 40, "repeated": 50, "skipped": 20, PRODUCTIVE: 100 + 30 + 50}
    third = [Window(400, 401, 5, 5, 0, {}), Window(400, 431, 5, 20, 0, {"input": 1})]
    seen = nonzero(first + second + third)
    assert seen["repeated"] == 50 + 100 + 50, "of every process before, all after step 5"
    assert seen[PRODUCTIVE] == 50 + 29 and seen["restart"] == 40 + 90
    assert sum(seen.values()) == 431, "from the start of the first process to the end of the last"


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [Window(5, 5, 0, 0, 0, {})],
        [Window(0, 10, 0, 5, 9, {"input": 99, "later": 3})],  # timed by two clocks; a cause of another version
        [Window(0, 10, 0, 5, 0, {}), Window(4, 6, 0, 2, 0, {})],  # clocks of two hosts
        [Window(0, 10, 0, 5, 0, {}), Window(20, 15, 9, 9, 0, {})],
    ],
)
def test_no_second_is_counted_twice_or_below_zero(windows):
    seconds = accounts(windows)
    assert all(value >= 0 for value in seconds.values())
    ends = [window.until for window in windows] + [window.session for window in windows]
    assert sum(seconds.values()) == pytest.approx(max(ends) - windows[0].session if windows else 0)
    shares = goodput.record(seconds)
    assert 0 <= shares["goodput"] <= 1 and shares.keys() >= {f"goodput/{cause}" for cause in CAUSES}
    assert "goodput" in goodput.described(seconds, 1)


def test_a_restart_goes_on_with_the_same_ledger(tmp_path):
    Ledger(tmp_path, Stopwatch(1e9), 0).add(4, 1)
    with open(tmp_path / goodput.LEDGER, "a") as file:
        file.write('{"session": "x"}\n{"session": NaN}\n[]\n{"sess')  # not ours, and cut off by a kill
    watch = Stopwatch(2e9)
    with watch.on("input"), watch.compiling(lambda: 0):
        pass
    programs = iter((1, 2))
    with watch.compiling(lambda: next(programs)):
        pass
    ledger = Ledger(tmp_path, watch, 2)
    assert [(w.first, w.step, w.skipped) for w in ledger.windows] == [(0, 0, 0), (0, 4, 1), (2, 2, 0)]
    assert ledger.windows[-1].spent.keys() == {"input", "compile"} and not watch.take()
    assert ledger.add(3)["goodput/repeated"] > 0
    assert goodput.read_windows(tmp_path / goodput.LEDGER) == ledger.windows
    assert "in 2 process starts" in ledger.described()


def test_the_start_of_this_process_is_known():
    import time

    assert time.time() - 3600 * 24 < goodput.process_start() <= time.time()


def test_the_page_of_a_run_shows_what_its_time_was_spent_on(tmp_path):
    windows = [Window(0, 25, 0, 0, 0, {}), Window(0, 100, 0, 10, 0, {"input": 25})]
    run_page.write(tmp_path / "r.html", run_page.ReportData("run", windows=windows))
    text = (tmp_path / "r.html").read_text()
    assert "<td>productive</td><td>50.0%</td><td>50</td>" in text and "<td>input</td><td>25.0%</td>" in text


# The writer.


@pytest.fixture
def fake(monkeypatch):
    """A module with the shape of wandb that keeps what it is told."""
    module = types.ModuleType("fake_writer")
    module.told = []
    module.init = lambda id=None, dir=None, **options: module.told.append(("init", {"id": id, "dir": dir, **options}))
    module.log = lambda values, step: module.told.append(("log", step, values))
    module.finish = lambda: module.told.append(("finish",))
    monkeypatch.setitem(sys.modules, "fake_writer", module)
    return module


def test_a_writer_is_told_what_the_board_is(fake, tmp_path):
    run = tmp_path / "run"
    logger = Logger(run, 10, 0, lambda step: 0.1, 1, writer=open_writer("fake_writer:crab-av", run, {"steps": 10}))
    logger.add_evaluation(3, {"eval/loss": 2.0, "eval/samples": 3.0}, 1.0)
    logger.close()
    begun, logged, ended = fake.told
    assert begun[1]["dir"] == str(run)
    assert begun[1].items() >= {"project": "crab-av", "name": "run", "config": {"steps": 10}, "resume": "allow"}.items()
    assert logged == ("log", 3, {"eval/loss": 2.0, "eval/samples": 3.0}) and ended == ("finish",)
    again = open_writer("fake_writer", run, {})
    assert fake.told[-1][1]["id"] == begun[1]["id"] and fake.told[-1][1]["project"] == "crab_jax", again
    fake.init = lambda project, name, config, resume: fake.told.append(project)  # one that knows no ids
    open_writer("fake_writer", run, {})
    assert fake.told[-1] == "crab_jax"


def test_a_writer_that_fails_warns_once_and_stops_nothing(fake, tmp_path, capsys):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    writer = open_writer("fake_writer", tmp_path, {})
    fake.log = fake.finish = fail
    writer.add(1, {}), writer.add(2, {}), writer.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: log_writer fake_writer: no route to host; training goes on")
    fake.init = fail
    writer = open_writer("fake_writer", tmp_path, {})
    writer.add(1, {}), writer.close()
    assert len(capsys.readouterr().err.splitlines()) == 1, "what did not begin is not written to"
    open_writer("", tmp_path, {}).add(1, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_writer", r"\[log_writer\]: no_such_writer is not installed; pip install no_such_writer"),
        ("json", r"\[log_writer\]: json has no init\(\)"),
    ],
)
def test_a_writer_that_is_not_there_is_named(spec, message, tmp_path, monkeypatch):
    (tmp_path / "no_such_writer").mkdir()  # which Python imports as a package without anything
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        open_writer(spec, tmp_path, {})


def test_records_of_a_window_hold_the_shares(tmp_path):
    import numpy as np

    from crab_jax.tasks import TASKS

    metrics = {"skipped": 0, "loss": 1.0, "grad_norm": 1.0, "tokens": 4, "slots": 8, "terms": {}, "by_task": [[], []]}
    metrics["by_task"] = [np.zeros(len(TASKS)), np.zeros(len(TASKS))]
    logger = Logger(tmp_path, 4, 0, lambda step: 0.1, 2, watch=Stopwatch())
    for step in (1, 2, 3):
        logger.add(step, metrics, 2, 0.0)
    logger.close()  # stopped in the middle of a window
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 < record["goodput"] <= 1 and record["goodput/seconds"] > 0
    assert [(w.first, w.step) for w in goodput.read_windows(tmp_path / goodput.LEDGER)] == [(0, 0), (0, 2), (2, 3)]
