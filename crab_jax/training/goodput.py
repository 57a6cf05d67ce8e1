"""Goodput: the share of a run's wall time that trained the model, and what the rest was spent on.

`accounts` is a pure function of windows, the lines of `goodput.jsonl` in the workdir, which every process start of a
run continues. A `Stopwatch` times the main thread of a process; nothing waits for a device.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crab_jax.io.bounds import Real, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.files import append_line, cut_tail, json_object
from crab_jax.io.structured import Each, check

LEDGER = "goodput.jsonl"
PRODUCTIVE = "productive"
# Cause -> what it is.
CAUSES = {
    "start": "from the start of the process to the first step: imports, annotations, weights, a checkpoint",
    "compile": "steps that were the first of their bucket, until they were compiled",
    "input": "waiting for batches",
    "checkpoint": "saving checkpoints, as far as training waits for it",
    "evaluation": "evaluations during training",
    "skipped": "steps that changed nothing, because they were not finite",
    "repeated": "steps that were done again after a restart from an earlier checkpoint",
    "restart": "between the last line of one process and the start of the next: down, or killed with unlogged steps",
}


class Window(NamedTuple):
    """What one process did since its last window.

    session: start of the process, until: end of the window, both in seconds since the epoch. first, step: the last step
    before and of the window. skipped: steps that changed nothing. spent: {cause: seconds}, of the first five.
    """

    session: float
    until: float
    first: int
    step: int
    skipped: int
    spent: Mapping[str, float]


_TIME = Real(0, 1e11)
SCHEMA = {
    "session": _TIME,
    "until": _TIME,
    "first": Whole(),
    "step": Whole(),
    "skipped": Whole(),
    "spent": Each(Text(1, 100), _TIME),
}


def accounts(windows: Sequence[Window]) -> dict[str, float]:
    """Return the seconds of wall time that were productive, and those spent on each of CAUSES.

    Of a window, the time that is not spent otherwise belongs to its steps, in equal shares. Steps after the one that a
    later process went on from are repeated: they count as productive where they are done for the last time.
    """
    seconds = dict.fromkeys((PRODUCTIVE, *CAUSES), 0.0)
    sessions = [list(group) for _, group in itertools.groupby(windows, key=lambda window: window.session)]
    mark = sessions[0][0].session if sessions else 0.0
    for number, session in enumerate(sessions):
        last = min((later[0].first for later in sessions[number + 1 :]), default=session[-1].step)
        seconds["restart"] += max(0.0, session[0].session - mark)
        mark = max(mark, session[0].session)
        for window in session:
            passed, mark = max(0.0, window.until - mark), max(mark, window.until)
            spent = {cause: taken for cause, taken in window.spent.items() if cause in CAUSES}
            total = sum(spent.values())
            scale = min(1.0, passed / total) if total else 1.0
            for cause, taken in spent.items():
                seconds[cause] += scale * taken
            rest, steps = passed - scale * total, window.step - window.first
            if not steps:  # before the first step of a process, or after the last
                seconds["start" if window is session[0] else "checkpoint"] += rest
                continue
            again = min(steps, max(0, window.step - last))
            skipped = min(window.skipped, steps - again)
            for cause, count in (("repeated", again), ("skipped", skipped), (PRODUCTIVE, steps - again - skipped)):
                seconds[cause] += rest * count / steps
    return seconds


def record(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the shares as a record of metrics.jsonl: `goodput`, one share a cause, and the seconds in all."""
    total = sum(seconds.values())
    shares = {f"goodput/{cause}": seconds[cause] / total if total else 0.0 for cause in CAUSES}
    return {"goodput": seconds[PRODUCTIVE] / total if total else 0.0, **shares, "goodput/seconds": total}


def described(seconds: Mapping[str, float], sessions: int) -> str:
    """Return the shares as one line, the largest cause first."""
    total = sum(seconds.values())
    causes = sorted(CAUSES, key=lambda cause: -seconds[cause])
    shown = [f"{cause} {seconds[cause] / total:.1%}" for cause in causes if seconds[cause] >= 0.0005 * total > 0]
    share = f"{seconds[PRODUCTIVE] / total:.1%}" if total else "0 %"
    return f"goodput {share} of {total:.0f} s in {sessions} process starts: {', '.join(shown)}"


class Stopwatch:
    """The time that this process spends on each cause, since it started or since `take` was called last."""

    def __init__(self, session: float | None = None):
        self.session = time.time() if session is None else session
        self._spent: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, cause: str, counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Count the time of the block for a cause, if `counts` says so at its end."""
        began = time.monotonic()
        yield
        if counts():
            self._spent[cause] += time.monotonic() - began

    def compiling(self, programs: Callable[[], int]) -> contextlib.AbstractContextManager[None]:
        """Count the time of the block as compilation if the number of compiled `programs` has grown at its end."""
        before = programs()
        return self.on("compile", lambda: programs() > before)

    def take(self) -> dict[str, float]:
        """Return {cause: seconds} and begin again."""
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent


class Ledger:
    """The windows of a run on disk, of all its process starts; the last belong to this one.

    first: the step that this process goes on from.
    """

    def __init__(self, workdir: Path, watch: Stopwatch, first: int):
        self.path, self.watch, self.step = workdir / LEDGER, watch, first
        cut_tail(self.path)
        self.windows = read_windows(self.path)
        self.add(first)  # the start, so that it counts for a process that is killed before its first window ends

    def add(self, step: int, skipped: int = 0) -> dict[str, float]:
        """Write the window that ends after `step`, and return the `record` of the whole run so far."""
        watch = self.watch
        window = Window(watch.session, time.time(), self.step, step, skipped, watch.take())
        self.step = step
        self.windows.append(window)
        append_line(self.path, window._asdict(), now=True)
        return record(accounts(self.windows))

    def described(self) -> str:
        """Return the line about the whole run."""
        return described(accounts(self.windows), len({window.session for window in self.windows}))


def read_windows(path: Path) -> list[Window]:
    """Return the windows of a run; lines that cannot be read are left out."""
    windows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        value = json_object(line)
        with contextlib.suppress(InputError):
            if value is not None:
                check(value, SCHEMA, str(path))
                windows.append(Window(**{field: value[field] for field in Window._fields}))
    return windows


def process_start() -> float:
    """Return when this process started, in seconds since the epoch; now where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - max(0.0, up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()
