"""The watchdog names what is waited for, again and again, and when it is over; never for a short wait."""

import time

from crab_jax.parallel.watchdog import Watchdog


def test_a_long_wait_is_named_when_it_doubles_and_when_it_ends():
    lines: list[str] = []
    with Watchdog(0.2, "process 3", lines.append) as watchdog:
        with watchdog.waiting(lambda: "input of step 7: worker 1 of 2"):
            time.sleep(1.0)
        told = len(lines)
        with watchdog.waiting("nothing for long"):
            pass
        time.sleep(0.3)
    assert all(line.startswith("process 3: waiting for input of step 7: worker 1 of 2, for ") for line in lines[:-1])
    assert 2 <= len(lines) - 1 <= 3 and lines[-1].startswith("process 3: went on after 1 s")
    assert len(lines) == told, "a short wait is not reported"


def test_reports_come_each_time_the_wait_has_doubled(monkeypatch):
    """On a clock of the test's own: every look at it is a second later."""
    now = [0.0]

    class Seconds:
        def wait(self, _: float) -> bool:
            now[0] += 1
            return now[0] > 100

    lines: list[str] = []
    watchdog = Watchdog(10, say=lines.append)
    monkeypatch.setattr("crab_jax.parallel.watchdog.time.monotonic", lambda: now[0])
    watchdog._done = Seconds()
    with watchdog.waiting("a disk"):
        watchdog._watch()
    told = [f"waiting for a disk, for {seconds} s now" for seconds in (10, 20, 40, 80)]
    assert lines == [*told, "went on after 101 s"]


def test_a_long_wait_names_who_does_not_answer():
    lines: list[str] = []
    silent = "process 2 on b has not answered for 9 s"
    with Watchdog(0.1, "process 0", lines.append, lambda: silent) as watchdog, watchdog.waiting("device step 3"):
        while not lines:
            time.sleep(0.05)
    assert lines[0].startswith("process 0: waiting for device step 3, for 0 s now") and lines[0].endswith(f"; {silent}")


def test_zero_seconds_is_off():
    lines: list[str] = []
    with Watchdog(0, say=lines.append) as watchdog, watchdog.waiting("a while"):
        time.sleep(0.05)
    assert lines == []
