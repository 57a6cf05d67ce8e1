"""Evaluation by real programs on the committed model: killed with SIGKILL, two at a time in one folder, on a mesh."""

import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent


def start(root, out, *flags, devices=1):
    """One program that evaluates a few tasks of a few scenes."""
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "crab_jax.evaluate",
            "--checkpoint",
            "warm_start",
            "--data",
            root,
            "--tasks",
            "ave,avqa,s4",
            "--limit",
            "6",
            "--batch-size",
            "2",
            "--max-new-tokens",
            "120",
            "--out",
            out,
            *flags,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "XLA_FLAGS": xla},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def finish(program):
    said, _ = program.communicate()
    assert program.returncode == 0, said[-3000:]
    return said


def same_masks(found, expected):
    """Rows that were batched differently may differ in a mask's grey by one level, never in where it is."""
    names = [name for name in found if name.endswith(".png")]
    assert names
    for name in names:
        levels = [np.array(Image.open(io.BytesIO(of[name]))).astype(int) for of in (found, expected)]
        assert np.abs(levels[0] - levels[1]).max() <= 1
        np.testing.assert_array_equal(levels[0] > 127, levels[1] > 127)


@pytest.fixture(scope="module")
def whole(scenes_root, tmp_path_factory):
    """(files of an evaluation that nothing stopped, seconds that it took)."""
    out, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    finish(start(scenes_root, out))
    return files(out), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("as_one_run", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_processes_that_differ_are_refused_before_they_load_a_model(scenes_root, tmp_path, monkeypatch, as_one_run):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{probe.getsockname()[1]}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    programs = []
    for index in (0, 1):
        monkeypatch.setenv("JAX_PROCESS_ID", str(index))
        programs.append(
            start(
                scenes_root, tmp_path, "--limit", str(6 + index), *([] if as_one_run else ["--process", f"{index}/2"])
            )
        )
    # Of two that are started alone the first to come does not know of the other: it waits for it.
    refused = programs if as_one_run else []
    while not refused:
        refused = [program for program in programs if program.poll() is not None]
        time.sleep(0.1)
    for program in refused:
        said, _ = program.communicate(timeout=120)
        assert program.returncode == 2 and "[--limit]: is " in said, said
    for program in programs:
        program.kill()


@pytest.mark.exhaustive
def test_killed_five_times_at_random_the_files_are_the_same(scenes_root, whole, tmp_path):
    expected, seconds = whole
    draw, answered = random.Random(3), []
    for _ in range(5):
        program = start(scenes_root, tmp_path)
        time.sleep(draw.uniform(0.1, 1.0) * seconds)
        program.kill()
        program.communicate()
        lines = tmp_path / "predictions.jsonl"
        answered.append(len(lines.read_bytes().splitlines()) if lines.is_file() else 0)
    finish(start(scenes_root, tmp_path))
    print(f"answers on disk at each kill: {answered}")
    assert files(tmp_path) == expected


@pytest.mark.exhaustive
def test_two_programs_at_once_leave_the_files_of_one(scenes_root, whole, tmp_path):
    programs = [start(scenes_root, tmp_path, "--process", f"{index}/2") for index in (0, 1)]
    said = [finish(program) for program in programs]
    found, expected = files(tmp_path), whole[0]
    assert found.keys() == expected.keys() and found["predictions.jsonl"] == expected["predictions.jsonl"]
    same_masks(found, expected)
    ids = [json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) >= 10 and "process 1 has answered" in said[1]


@pytest.mark.exhaustive
def test_evaluated_again_in_other_batches_the_scores_are_the_same(scenes_root, whole, tmp_path):
    finish(start(scenes_root, tmp_path, "--batch-size", "5"))
    again, expected = files(tmp_path), whole[0]
    assert again["predictions.jsonl"] == expected["predictions.jsonl"]
    tasks = json.loads(again["results.json"])["tasks"]
    for task, scores in json.loads(expected["results.json"])["tasks"].items():
        found = tasks[task]
        assert found.pop("intervals") == {
            name: pytest.approx(pair, abs=1e-3) for name, pair in scores.pop("intervals").items()
        }
        assert found == pytest.approx(scores, abs=1e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("flags", "copies"), [((), 8), (("--tensor", "2"), 4)], ids=["copies", "split"])
def test_on_eight_devices_the_answers_are_the_same(scenes_root, whole, tmp_path, flags, copies):
    said = finish(start(scenes_root, tmp_path, "--batch-size", "8", *flags, devices=8))
    assert f"{copies} copies of the model on 8 devices" in said
    found, expected = files(tmp_path), whole[0]
    assert found.keys() == expected.keys() and found["predictions.jsonl"] == expected["predictions.jsonl"]
    same_masks(found, expected)
