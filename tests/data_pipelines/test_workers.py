"""Processes that survive what their tasks do."""

import os
import time

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
