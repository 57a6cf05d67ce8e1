"""Start-up from the environment; two real processes: training, stopping, failing."""

import json
import os
import re
import shutil
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

from configs import tiny
from crab_jax.checkpoints import digests
from crab_jax.config import resolve
from crab_jax.io import packaged
from crab_jax.io.errors import InputError
from crab_jax.parallel import distributed, peers
from crab_jax.runs import run_folder
from tests.test_train import SMALL

HOST, COUNT, INDEX = distributed.EXPLICIT


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        (
            {HOST: "h:1", COUNT: "4", INDEX: "3"},
            {
                "coordinator_address": "h:1",
                "num_processes": 4,
                "process_id": 3,
                "cluster_detection_method": "deactivate",
            },
        ),
        ({"SLURM_JOB_ID": "7"}, None),  # inside an allocation, but not started by srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        # What a batch script of eight tasks sees, without srun; then what `srun -n 1` in it does.
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_GPUS_ON_NODE": "8",
            },
            None,
        ),
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_STEP_NUM_NODES": "1",
            },
            None,
        ),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1"}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": ""}, None),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}, {}),
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
            {"local_device_ids": [0, 1, 2, 3, 4, 5, 6, 7]},
        ),  # else JAX would use one GPU of each node
        ({"TPU_ML_PLATFORM": "JAX"}, {}),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ],
)
def test_how_processes_find_each_other_is_read_from_the_environment(environ, wanted):
    assert distributed.launch(environ) == wanted


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({HOST: "h:1", COUNT: "2"}, INDEX),
        ({HOST: "h:1", COUNT: "two", INDEX: "0"}, "two"),
        ({HOST: "h:1", COUNT: "2", INDEX: "2"}, "count them from 0"),
        ({HOST: "h", COUNT: "2", INDEX: "1"}, "host:port"),
    ],
)
def test_half_an_explicit_start_is_refused(environ, named):
    with pytest.raises(InputError, match=named):
        distributed.launch(environ)


def test_a_port_that_is_in_use_is_told_and_not_tried():
    """JAX would end with a segmentation fault."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} here .* in use"):
            distributed.start({HOST: f"localhost:{port}", COUNT: "2", INDEX: "0"})


def test_a_batch_script_without_srun_works_alone_and_says_so(capsys):
    distributed.start({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"})
    assert "8 tasks" in (said := capsys.readouterr().err) and "srun" in said
    distributed.start({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="SLURM_NTASKS.*give a number"):
        distributed.launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "eight", "SLURM_STEP_NUM_NODES": "1"})


@pytest.mark.parametrize(("index", "lr", "fits"), [(0, 1.0, True), (1, 1.0, True), (1, 0.5, False)])
def test_processes_that_differ_are_told_in_what(monkeypatch, index, lr, fits):
    class Store:
        def key_value_set(self, key, value):
            assert (key, json.loads(value)) == ("crab_jax/start", {"optim.lr": 1.0})

        def blocking_key_value_get(self, key, milliseconds):
            return '{"optim.lr": 1.0}'

    monkeypatch.setattr(distributed.global_state, "client", Store())
    monkeypatch.setattr(distributed.global_state, "process_id", index)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    if fits:
        distributed.agree("start", lambda: {"optim.lr": lr})
    else:
        with pytest.raises(InputError, match=r"process 1 on .* \[optim.lr\]: is 0.5, on process 0 it is 1.0; "):
            distributed.agree("start", lambda: {"optim.lr": lr})


def test_what_processes_may_not_differ_in(tmp_path):
    """Seeds, sizes, versions, starting weights; not where a host has its data."""
    config = tiny.get_config()
    config.data.root, config.init_from = "/a", "warm_start"
    base = run_folder.shared(resolve(config))
    config.data.root, config.init_from = "/b", str(shutil.copytree(packaged.located("warm_start"), tmp_path / "copy"))
    assert run_folder.shared(resolve(config)) == base
    (tmp_path / "copy" / "manifest.json").write_bytes(b"{}")
    assert {key for key, value in run_folder.shared(resolve(config)).items() if value != base[key]} == {
        "config.init_from"
    }
    config.seed += 1
    assert "config.seed" in {key for key, value in run_folder.shared(resolve(config)).items() if value != base[key]}
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} < distributed.program().keys()


def test_a_process_loads_the_rows_of_its_devices():
    class Where:  # two of four devices, each of which holds a row block that is also on another one's
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(0, 2),)}

    assert distributed.own_rows(Where(), 8).tolist() == [0, 1, 4, 5]  # type: ignore[arg-type]
    one = NamedSharding(jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), PartitionSpec("x"))
    assert distributed.own_rows(one, 3).tolist() == [0, 1, 2]


def test_strangers_at_the_port_of_the_first_process_are_no_peers(monkeypatch):
    """Only who says the secret and an index is one; who does not come is named."""
    monkeypatch.setattr(peers, "CONNECT_SECONDS", 1.0)
    with peers.listen() as listener:
        address = ("localhost", listener.getsockname()[1])

        def call(line: bytes) -> socket.socket:
            connection = socket.create_connection(address)
            connection.sendall(line)
            return connection

        hellos = (b"GET / HTTP/1.1\r\n\r\n", b'["wrong", 1, "a"]\n', b'["secret", 7, "a"]\n', b'["secret", 1, "b"]\n')
        open_ones = [call(hello) for hello in hellos]
        with pytest.raises(InputError, match="process 2 did not connect within 1 s"):
            peers._accept_all(listener, 3, "secret")
        assert open_ones[-1].recv(100) == b"here \n"
        open_ones += [call(b'["secret", 2, "c"]\n'), call(b'["secret", 1, "b"]\n')]
        assert peers._accept_all(listener, 3, "secret")[2].name == "process 2 on c"
        for connection in open_ones:
            connection.close()


class Processes:
    """`count` processes of one training run with four virtual devices each."""

    def __init__(self, count: int, root: Path, workdir: Path, *options: str, devices: int = 4):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "crab_jax.train",
            "--config=configs/tiny.py",
            "--config.init_from=",
            f"--config.data.root={root}",
            "--config.data.batch_size=8",
            "--config.log_every=1",
            *SMALL,
            f"--workdir={workdir}",
            *options,
        ]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        self.all = []
        for index in range(count):
            environ = os.environ | {
                "XLA_FLAGS": flags,
                "JAX_DEFAULT_MATMUL_PRECISION": "float32",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            }  # they take longer than the steps
            if count > 1:
                environ |= {HOST: address, COUNT: str(count), INDEX: str(index)}
            self.all.append(
                subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )

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
    shutil.copytree(scenes_root / "train", root / "train", copy_function=os.link)
    return root


def last_step(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_two_processes_stop_on_sigterm_together_and_any_mesh_goes_on(questions, tmp_path):
    """2 processes x 4 devices, a slice each, stopped by a signal to one of them; resumed on 4 slices of one process,
    then on one device: what one device gives."""
    steps = ("--config.steps=60", "--config.checkpoint_every=100", "--config.optim.schedule=constant")
    both = Processes(2, questions, tmp_path / "run", *steps, "--config.mesh.fsdp=4", "--config.mesh.slices=2")
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

    last = (f"--config.steps={stopped + 2}", *steps[1:])
    alone = Processes(1, questions, tmp_path / "alone", *last, devices=1).end()
    assert alone[0][0] == 0, alone
    described = tmp_path / "run" / "config.json"  # of a run with fewer steps, to make the test short
    for more, devices, mesh in ((1, 4, ("--config.mesh.slices=4",)), (2, 1, ())):
        described.write_text(json.dumps(json.loads(described.read_text()) | {"steps": stopped + more}))
        words = (f"--config.steps={stopped + more}", *steps[1:], *mesh)
        resumed = Processes(1, questions, tmp_path / "run", *words, devices=devices).end()
        assert resumed[0][0] == 0 and f"resumed from step {stopped + more - 1}" in resumed[0][1], resumed
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=1e-5)


def reach(processes: Processes, workdir: Path, step: int) -> None:
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + 900
    while last_step(workdir) < step:
        assert time.monotonic() < deadline and all(one.poll() is None for one in processes.all), processes.end()
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    """Processes that a process started and that are still there."""
    states = [file.read_text() for file in Path("/proc").glob("[0-9]*/status")]
    return [
        int(found[1])
        for state in states
        if f"PPid:\t{process.pid}\n" in state and (found := re.search(r"^Pid:\t(\d+)", state, re.M))
    ]


@pytest.mark.exhaustive
def test_killed_or_stopped_processes_cost_no_number(questions, tmp_path):
    """Stopped for a while, then killed (each of the two once) and started again: the losses of an undisturbed run."""
    steps = (
        "--config.steps=24",
        "--config.checkpoint_every=3",
        "--config.data.workers=1",
        "--config.watchdog_seconds=1",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [code for code, _, _ in Processes(2, questions, whole, *steps, devices=1).end()] == [0, 0]

    both = Processes(2, questions, run, *steps, devices=1)
    reach(both, run, 2)
    both.all[1].send_signal(signal.SIGSTOP)
    said(both.all[0], "waiting for device step .*process 1 on .* has not answered")
    both.all[1].send_signal(signal.SIGCONT)
    for killed, step in ((1, 5), (0, 10)):
        reach(both, run, step)
        while not any(path.name.isdecimal() for path in (run / "checkpoints").iterdir()):  # which a slow disk delays
            assert all(one.poll() is None for one in both.all), both.end()
            time.sleep(0.02)
        workers = [child for process in both.all for child in children(process)]
        both.all[killed].kill()
        ended = both.end(60)
        code, _, errors = ended[1 - killed]
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 1 and line.startswith(f"error: process {killed} on {socket.gethostname()} is gone")
        time.sleep(5)
        assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
        both = Processes(2, questions, run, *steps, devices=1)
    ended = both.end()
    assert [code for code, _, _ in ended] == [0, 0] and "resumed from step" in ended[0][1], ended
    assert losses(run) == losses(whole)


SCRIPT = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from crab_jax.parallel import distributed
from crab_jax.io.errors import InputError, run_verb
from crab_jax.parallel.watchdog import Watchdog

def main():
    with distributed.together():
        index = jax.process_index()
        distributed.agree("start", lambda: {"seed": int(sys.argv[1]) if index == 1 else 0})
        if "error" in sys.argv and index == 1:
            raise InputError("clip.mp4", "video", "is damaged", "copy it again")
        if "sleep" in sys.argv:
            time.sleep(300)
        where = NamedSharding(jax.make_mesh((jax.process_count(),), ("x",)), PartitionSpec("x"))
        add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(where.mesh, PartitionSpec()))
        total = 0.0
        with Watchdog(1, f"process {index}", silent=distributed.silent) as watchdog:
            while total < 1e6:
                mine = np.full(1, total + index, np.float32)
                with watchdog.waiting("a step"):
                    total = float(add(jax.make_array_from_process_local_data(where, mine, (jax.process_count(),))))
                    total = total / jax.process_count() + 1
                if total < 3:
                    print("works", flush=True)
                time.sleep(0.02)

run_verb(main)
"""


def small_run(count: int, *arguments: str) -> list[subprocess.Popen]:
    """`count` processes that do nothing but meet, agree and add numbers up, until they are ended."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *(arguments or ("0",))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {HOST: address, COUNT: str(count), INDEX: str(index), "XLA_FLAGS": ""},
        )
        for index in range(count)
    ]


def errors_of(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, list[str]]]:
    """(exit code, lines on stderr of ours) of each process, which end within `seconds`."""
    try:
        return [
            (process.returncode, [line for line in errors.splitlines() if line.startswith("error: ")])
            for process in processes
            for errors in [process.communicate(timeout=seconds)[1]]
        ]
    finally:
        for process in processes:
            process.kill()


def said(process: subprocess.Popen, pattern: str) -> str:
    """The first line on stderr that has the pattern."""
    for line in process.stderr:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"never said {pattern}")


def works(processes: list[subprocess.Popen]) -> None:
    """Wait until all have added up once."""
    for process in processes:
        assert any(line == "works\n" for line in process.stdout), process.communicate()[1]


@pytest.mark.slow
def test_one_that_stands_still_is_named_and_goes_on_and_one_that_is_killed_ends_all():
    processes = small_run(3)
    works(processes)
    processes[2].send_signal(signal.SIGSTOP)
    for other in processes[:2]:
        assert re.match(
            rf"process \d: waiting for a step, for \d+ s now; process 2 on {socket.gethostname()} has not "
            r"answered for \d+ s$",
            said(other, "not answered"),
        )
    processes[2].send_signal(signal.SIGCONT)
    for other in processes[:2]:
        said(other, "went on after")
    processes[1].kill()
    (code0, errors0), _, (code2, errors2) = errors_of(processes, 30)
    wanted = f"error: process 1 on {socket.gethostname()} is gone (it was killed, or ended without a word)"
    assert code0 == code2 == 1 and len(errors0) == len(errors2) == 1
    assert errors0[0].startswith(wanted) and errors2[0].startswith(wanted)


@pytest.mark.slow
def test_the_death_of_the_first_process_ends_all_with_its_name():
    processes = small_run(3)
    works(processes)
    processes[0].kill()
    processes[0].wait()
    said = [process.communicate(timeout=30)[1].splitlines() for process in processes[1:]]
    assert [process.returncode for process in processes[1:]] == [1, 1]
    wanted = f"error: process 0 on {socket.gethostname()} is gone (it was killed"
    for lines in said:  # C++ may have the word before
        assert [line[: len(wanted)] for line in lines if line.startswith("error:")] == [wanted], lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "own", "others"),
    [
        (("0", "error", "sleep"), "clip.mp4 [video]: is damaged; copy it again", "clip.mp4 [video]: is damaged"),
        (("5", "sleep"), f"process 1 on {socket.gethostname()} [seed]: is 5, on process 0 it is 0", "[seed]: is 5"),
    ],
)
def test_an_error_of_one_process_ends_the_other_with_its_reason(arguments, own, others):
    (code0, errors0), (code1, errors1) = errors_of(small_run(2, *arguments))
    assert (code0, code1) == (2, 2)
    assert len(errors0) == 1 and others in errors0[0]
    assert errors0[0].startswith(f"error: stopped with the others: process 1 on {socket.gethostname()}: ")
    assert len(errors1) == 1 and errors1[0].startswith(f"error: {own}")


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
    assert digests._checksum(Leaf()) == digests._checksum(whole) != digests._checksum(whole[:, ::-1])
