"""Start-up from the environment; two real processes: training, stopping, failing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crab_jax import checkpoints, distributed
from crab_jax.errors import InputError
from tests.test_train import SMALL

HOST, COUNT, INDEX = distributed.EXPLICIT


@pytest.mark.parametrize("environ, wanted", [
    ({}, None),
    ({HOST: "h:1", COUNT: "4", INDEX: "3"}, {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3,
                                              "cluster_detection_method": "deactivate"}),
    ({"SLURM_JOB_ID": "7"}, None),  # inside an allocation, but not started by srun
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
    # What a batch script of eight tasks sees, without srun; then what `srun -n 1` in it does.
    ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2",
      "SLURM_GPUS_ON_NODE": "8"}, None),
    ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1",
      "SLURM_STEP_NUM_NODES": "1"}, None),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, {}),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": ""}, None),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}, {}),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
     {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]}),  # else JAX would use one GPU of each node
    ({"TPU_ML_PLATFORM": "JAX"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
])
def test_how_processes_find_each_other_is_read_from_the_environment(environ, wanted):
    assert distributed.launch(environ) == wanted


@pytest.mark.parametrize("environ, named", [
    ({HOST: "h:1", COUNT: "2"}, INDEX), ({HOST: "h:1", COUNT: "two", INDEX: "0"}, "two"),
    ({HOST: "h:1", COUNT: "2", INDEX: "2"}, "count them from 0")])
def test_half_an_explicit_start_is_refused(environ, named):
    with pytest.raises(InputError, match=named):
        distributed.launch(environ)


def test_a_batch_script_without_srun_works_alone_and_says_so(capsys):
    distributed.start({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"})
    assert "8 tasks" in (said := capsys.readouterr().err) and "srun" in said
    distributed.start({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="SLURM_NTASKS.*give a number"):
        distributed.launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "eight", "SLURM_STEP_NUM_NODES": "1"})


@pytest.mark.parametrize("index, value, fits", [(0, "a", True), (1, "a", True), (1, "b", False)])
def test_processes_that_read_other_data_are_told_which(monkeypatch, index, value, fits):
    class Store:
        def key_value_set(self, key, value):
            assert (key, value) == ("crab_jax/examples", "a")

        def blocking_key_value_get(self, key, milliseconds):
            return "a"

    monkeypatch.setattr(distributed.global_state, "client", Store())
    monkeypatch.setattr(jax, "process_index", lambda: index)
    if fits:
        distributed.agree("examples", value, "its Examples")
    else:
        with pytest.raises(InputError, match="process 1 .*its Examples.*not those of process 0"):
            distributed.agree("examples", value, "its Examples")


def test_a_process_loads_the_rows_of_its_devices():
    class Where:  # two of four devices, each of which holds a row block that is also on another one's
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(0, 2),)}

    assert distributed.own_rows(Where(), 8).tolist() == [0, 1, 4, 5]  # type: ignore[arg-type]
    one = NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), PartitionSpec("x"))
    assert distributed.own_rows(one, 3).tolist() == [0, 1, 2]


class Processes:
    """`count` processes of one training run with four virtual devices each."""

    def __init__(self, count: int, root: Path, workdir: Path, *options: str, devices: int = 4):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "crab_jax.train", "--config=configs/tiny.py", "--config.init_from=",
                   f"--config.data.root={root}", "--config.data.batch_size=8", "--config.log_every=1", *SMALL,
                   f"--workdir={workdir}", *options]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.all = []
        for index in range(count):
            environ = os.environ | {"XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "float32"}
            if count > 1:
                environ |= {HOST: address, COUNT: str(count), INDEX: str(index)}
            self.all.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                             text=True))

    def end(self, timeout: float = 900) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each."""
        try:
            written = [process.communicate(timeout=timeout) for process in self.all]
            return [(process.returncode, *both) for process, both in zip(self.all, written, strict=True)]
        finally:
            for process in self.all:
                process.kill()


@pytest.fixture
def questions(scenes_root, tmp_path) -> Path:
    """The data root of one task, so that there is little to compile."""
    lines = (scenes_root / "train.jsonl").read_text().splitlines(True)
    root = tmp_path / "questions"
    root.mkdir()
    (root / "train.jsonl").write_text("".join(line for line in lines if json.loads(line)["task"] == "avqa"))
    (root / "train").symlink_to(scenes_root / "train")
    return root


def last_step(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_two_processes_stop_on_sigterm_together_and_any_mesh_goes_on(questions, tmp_path):
    """2 processes x 4 devices, stopped by a signal to one of them, resumed on one device: what one device gives."""
    steps = ("--config.steps=60", "--config.checkpoint_every=100", "--config.optim.schedule=constant")
    both = Processes(2, questions, tmp_path / "run", *steps, "--config.mesh.fsdp=4")
    deadline = time.monotonic() + 900
    while last_step(tmp_path / "run") < 2 and time.monotonic() < deadline and both.all[0].poll() is None:
        time.sleep(0.05)
    both.all[1].send_signal(signal.SIGTERM)
    ended = both.end()
    assert [code for code, _, _ in ended] == [0, 0], ended
    stopped = last_step(tmp_path / "run")
    assert f"stopped on request after step {stopped} of 60" in ended[0][1]
    assert not re.search(r"^step |^stopped", ended[1][1], re.M), "only process 0 writes"
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()

    steps = (f"--config.steps={stopped + 2}", *steps[1:])
    alone = Processes(1, questions, tmp_path / "alone", *steps, devices=1).end()
    assert alone[0][0] == 0, alone
    described = tmp_path / "run" / "config.json"  # of a run with fewer steps, to make the test short
    described.write_text(json.dumps(json.loads(described.read_text()) | {"steps": stopped + 2}))
    resumed = Processes(1, questions, tmp_path / "run", *steps, devices=1).end()
    assert resumed[0][0] == 0 and f"resumed from step {stopped}" in resumed[0][1], resumed
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other_with_its_reason():
    script = (
        "import sys, time, jax\n"
        "from crab_jax import distributed\n"
        "from crab_jax.errors import InputError\n"
        "distributed.start()\n"
        "with distributed.errors_end_all():\n"
        "    if jax.process_index() == 1:\n"
        "        raise InputError('clip.mp4', 'video', 'is damaged', 'copy it again')\n"
        "    time.sleep(300)\n")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    began = time.monotonic()
    both = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=os.environ | {
        HOST: address, COUNT: "2", INDEX: str(index)}) for index in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2] and time.monotonic() - began < 200
    assert "error: stopped with the others: process 1: clip.mp4 [video]: is damaged" in errors[0]
    assert "error: clip.mp4 [video]: is damaged; copy it again" in errors[1]


def test_the_hash_adds_over_shards(monkeypatch):
    """What processes that hold parts of a leaf add up to is what one that holds it all finds."""
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    class Part:
        def __init__(self, index):
            self.index, self.data, self.replica_id = index, whole[index], 0

    class Leaf(jax.Array):
        shape, dtype = whole.shape, whole.dtype
        addressable_shards = [Part(index) for index in (np.s_[0:2, 0:1, 2:4], np.s_[:, :, 0:2], np.s_[0:2, 1:3, 2:4])]

    Leaf.__abstractmethods__ = frozenset()
    assert checkpoints._checksum(Leaf()) == checkpoints._checksum(whole) != checkpoints._checksum(whole[:, ::-1])
