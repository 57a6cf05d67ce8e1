"""Lines of progress: how far, how fast, when it ends; not too many of them, and none where nobody listens."""

import time

import pytest

from crab_jax.io.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_has_share_rate_and_time_left(clock):
    lines = []
    progress = Progress("scenes", 40, lines.append)
    clock[0] += 5
    progress.add(10, "  so far")
    assert lines == ["scenes 10/40  2/s  eta 15 s  so far"]


def test_lines_are_seconds_apart_and_the_last_one_is_told(clock):
    lines = []
    for _ in Progress("clips", 10, lines.append, every=3).over(range(10)):
        clock[0] += 1
    assert [line.split()[1] for line in lines] == ["3/10", "6/10", "9/10", "10/10"]


def test_what_was_done_before_does_not_count_as_speed(clock):
    lines = []
    progress = Progress("examples", 100, lines.append, done=90)
    clock[0] += 10
    progress.to(95)
    assert lines == ["examples 95/100  0.5/s  eta 10 s"]


def test_without_a_total_there_is_no_time_left(clock):
    lines = []
    progress = Progress("records", say=lines.append)
    clock[0] += 4
    progress.add(8)
    assert lines == ["records 8  2/s"]


def test_bytes_are_told_in_their_unit_on_stderr(clock, capsys):
    progress = Progress("a.bin", 4e9, unit="GB", scale=1e9)
    clock[0] += 4
    progress.add(1e9)
    said = capsys.readouterr()
    assert said.err == "a.bin 1.0/4.0 GB  0.25 GB/s  eta 12 s\n" and not said.out


def test_nobody_listens(clock, capsys):
    progress = Progress("files", 1, None)
    clock[0] += 9
    progress.add()
    assert capsys.readouterr() == ("", "")
