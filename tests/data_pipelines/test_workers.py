"""Processes that survive what their tasks do."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.isolated import MEMORY, results


def misbehave(how):
    """What a decoder may do with a file."""
    if how == "crash":
        os.kill(os.getpid(), 11)
    if how == "hang":
        time.sleep(60)
    if how == "fill":
        return len(bytearray(2 * MEMORY))
    if how == "raise":
        raise ValueError("bad")
    return how.upper()


def test_processes_survive_what_their_tasks_do():
    began = time.monotonic()
    tasks = ["a", "crash", "b", "hang", "raise", "fill", "c"]
    found = dict(results(misbehave, tasks, 2, lambda task: 0.5 if task == "hang" else 30.0))
    assert time.monotonic() - began < 30
    assert {task: str(result) for task, result in found.items()} == {
        "a": "A",
        "b": "B",
        "c": "C",
        "crash": "ended the process that decoded it (SIGSEGV)",
        "hang": "took more than 0 s",
        "raise": "bad",
        "fill": "",
    }
    assert isinstance(found["fill"], MemoryError)


def test_an_unfinished_round_ends_its_processes():
    running = results(misbehave, ["a", "hang", "b"], 2, lambda task: 60.0)
    next(running)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 5


PARENTS = {
    "validate": """
        from data_pipelines.isolated import results
        found = results(slow, [0, 600], 2, lambda task: 600.0)
        next(found)
        """,
    "training": """
        import grain
        from data_pipelines import mixture

        class Order:
            examples, groups, batches = (), {}, grain.MapDataset.range(10**6)

        mixture.BatchLoader = lambda *_: slow
        batches = iter(mixture.train_dataset(Order, "", None, None, workers=2))
        next(batches)
        """,
    "a pool, as in prepare and scenes": """
        import multiprocessing
        from data_pipelines.isolated import end_with_parent
        pool = multiprocessing.get_context("spawn").Pool(2, end_with_parent)
        pool.map(time.sleep, [0.1, 0.1])
        waits = pool.map_async(time.sleep, [600, 600])
        """,
}
SCRIPT = """
import time

def slow(number):
    time.sleep(600 if number == 600 else 0.01)
    return number

if __name__ == "__main__":
{body}
        print("busy", flush=True)
        time.sleep(600)
"""


def descendants(pid: int) -> dict[int, str]:
    """Process id -> start time of all that a process has started, and they."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = re.fullmatch(r"(\d+) \(.*\) (.*)", file.read_text().strip(), re.S).groups()
        except OSError:
            continue
        state, parent, *others = rest.split()
        if state != "Z":
            parents[int(number)] = (int(parent), others[17])
    found, before = {pid: ""}, 0
    while len(found) > before:
        before = len(found)
        found |= {one: since for one, (parent, since) in parents.items() if parent in found and one not in found}
    return {one: since for one, since in found.items() if since}


def still_there(pid: int, since: str) -> bool:
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return state != "Z" and others[18] == since
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes by /proc")
@pytest.mark.parametrize("use", PARENTS)
def test_workers_end_with_a_parent_that_is_killed(use, tmp_path):
    (tmp_path / "parent.py").write_text(SCRIPT.format(body=PARENTS[use]))
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        text=True,
    ) as parent:
        assert parent.stdout.readline() == "busy\n", parent.stderr.read()
        workers = descendants(parent.pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while (left := [pid for pid, since in workers.items() if still_there(pid, since)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, 9)
    assert len(workers) >= 3 and not left
