"""Processes that survive what their tasks do."""

import os
import subprocess
import sys
import time
from pathlib import Path

from data_pipelines.workers import MEMORY, results


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
        "a": "A", "b": "B", "c": "C", "crash": "ended the process that decoded it (SIGSEGV)",
        "hang": "took more than 0 s", "raise": "bad", "fill": ""}
    assert isinstance(found["fill"], MemoryError)


def test_an_unfinished_round_ends_its_processes():
    running = results(misbehave, ["a", "hang", "b"], 2, lambda task: 60.0)
    next(running)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 5


def test_a_worker_ends_with_the_process_that_started_it():
    """A pool waits for work for ever where the process that gives it was killed."""
    code = ("import concurrent.futures, multiprocessing, os, time\nfrom data_pipelines.workers import end_with_parent\n"
            "pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), end_with_parent)\n"
            "print(pool.submit(os.getpid).result(), flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (found := Path(f"/proc/{worker}/stat")).exists():
        if found.read_text().rpartition(")")[2].split()[0] == "Z":  # dead, and not waited for yet
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
