"""Several processes and hosts as one run: start-up, who loads which rows, and one process's error ends all.

A run on one process needs nothing of this. Start the same command once per process (TPU: once per host; GPU: once per
node or once per device); how they find each other is read from the environment, see `launch`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state  # the only way to the key-value store that all processes share

from crab_jax import locks
from crab_jax.errors import InputError, report

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FAILED = "crab_jax/failed"  # key under which a process that fails says so
POLL_SECONDS = 1.0
BARRIER_SECONDS = 600


def launch(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be called with, or None for a single process.

    - `JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i`: as said;
    - a SLURM step of several tasks: JAX reads the step's variables. A lone task of a node takes all its GPUs, several
      take one each, by their local number. What runs in the batch script itself, without srun, is a single process;
    - a Cloud TPU VM: JAX asks the metadata server, or reads TPU_WORKER_HOSTNAMES on Kubernetes.

    Raises InputError when only some of the explicit variables are set, or one is no number.
    """
    given = [name for name in EXPLICIT if environ.get(name)]
    if given:
        for name in EXPLICIT:
            if name not in given:
                raise InputError("environment", name, f"is missing, {given[0]} is set", f"set {', '.join(EXPLICIT)}")
            if name != EXPLICIT[0] and not environ[name].isdecimal():
                raise InputError("environment", name, f"is {environ[name]!r}", "give a number")
        address, count, index = (environ[name] for name in EXPLICIT)
        if int(index) >= int(count):
            raise InputError("environment", EXPLICIT[2], f"is {index}, of {count} processes", "count them from 0")
        return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index),
                "cluster_detection_method": "deactivate"}
    if "SLURM_PROCID" in environ and _in_step(environ) and _tasks(environ) > 1:
        alone = str(_tasks(environ)) == environ.get("SLURM_STEP_NUM_NODES")
        gpus = _number(environ, "SLURM_GPUS_ON_NODE", 0)
        return {"local_device_ids": list(range(gpus))} if alone and gpus else {}
    # JAX sets this on a TPU VM when it is imported.
    on_tpu = environ.get("TPU_ML_PLATFORM") == "JAX" and "tpu" in environ.get("JAX_PLATFORMS", "tpu")
    known = "TPU_SKIP_MDS_QUERY" not in environ or "TPU_WORKER_HOSTNAMES" in environ
    return {} if on_tpu and known else None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not value.isdecimal():
        raise InputError("environment", name, f"is {value!r}", "give a number, or unset it")
    return int(value)


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has the variables of the job only."""
    return any(name in environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"))


def _tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Join the processes of this run, if there are several. To be called before JAX touches a device."""
    arguments = launch(environ)
    if arguments is None:
        if "SLURM_PROCID" in environ and not _in_step(environ) and _tasks(environ) > 1:
            print(f"SLURM has {_tasks(environ)} tasks for this job, but this process was not started by srun: it works "
                  "alone", file=sys.stderr, flush=True)
        return
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise InputError("jax.distributed", "", f"the processes did not find each other ({str(error).splitlines()[0]})",
                         f"check the addresses, or set {', '.join(EXPLICIT)}") from error
    say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def primary() -> bool:
    """Whether this process writes logs and descriptions."""
    return jax.process_index() == 0


def say(*words: object) -> None:
    """Print on the primary process."""
    if primary():
        print(*words, flush=True)


def barrier(name: str) -> None:
    """Wait for all processes; not on the devices, whose collectives may give up after seconds. Each name once."""
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"crab_jax/{name}", 1000 * BARRIER_SECONDS)


def agree(name: str, value: str, what: str) -> None:
    """Raise InputError where `value` is not that of the primary process. Each name once."""
    if global_state.client is None:
        return
    if primary():
        global_state.client.key_value_set(f"crab_jax/{name}", value)
    elif global_state.client.blocking_key_value_get(f"crab_jax/{name}", 1000 * BARRIER_SECONDS) != value:
        raise InputError(f"process {jax.process_index()}", what, "are not those of process 0",
                         "give all hosts the same, or a disk that all of them see")


def own_rows(where: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Positions, increasing, of the rows of a global batch that this process's devices hold: int[n].

    Two processes have rows in common where a mesh axis that does not split the batch runs over both.
    """
    slices = where.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in slices]))


@contextmanager
def errors_end_all(debug: bool = False) -> Iterator[None]:
    """While inside, an exception of one process ends all of them, within seconds, each with a line that says why.

    Without it the others would wait in a collective until their heartbeat fails. A failing process does not wait for
    the others either, so it leaves without the usual clean-up.
    """
    if jax.process_count() == 1:
        yield
        return
    store: Any = global_state.client
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            if message := _read(store):
                if primary():  # the store goes with this process, and the one that failed must not miss it
                    time.sleep(5 * POLL_SECONDS)
                _leave(message)

    threading.Thread(target=watch, daemon=True, name="peers").start()
    try:
        yield
        done.set()
    except (KeyboardInterrupt, Exception) as error:
        done.set()
        if message := _read(store):  # another was first; what this one met is likely a broken connection
            _leave(message)
        code = report(error, debug)
        line = (str(error) or type(error).__name__).splitlines()[0]
        try:
            store.key_value_set(FAILED, f"{code} process {jax.process_index()}: {line}")
        except Exception:  # the store is gone with process 0, or another was first after all
            pass
        time.sleep(3 * POLL_SECONDS)  # the store lives in process 0: the others must have read it
        _leave(str(code))


def _read(store: Any) -> str | None:
    try:
        return store.key_value_try_get(FAILED)
    except Exception:  # not set, or the store is gone
        return None


def _leave(message: str) -> NoReturn:
    """End this process at once, by "<exit code> <why>"."""
    code, _, why = message.partition(" ")
    locks.release_all()
    if why:
        print(f"error: stopped with the others: {why}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))
