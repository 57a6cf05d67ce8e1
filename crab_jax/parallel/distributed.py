"""Runs of several processes and hosts: start-up, agreement on the input, rows per process, and failure of a process.

A run on one process needs none of this. Start the same command once per process (TPU: once per host; GPU: once per node
or once per device); the environment tells the processes how to connect, see `launch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # no public API gives access to the shared key-value store
from jax.experimental import multihost_utils

from crab_jax.io.errors import InputError, find_input_error, report
from crab_jax.parallel import peers

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
AGREE_SECONDS = 3600  # how long process 0 may take to publish its values
HEARTBEAT_SECONDS = 7 * 24 * 3600  # JAX's heartbeat timeout, longer than any suspended process
SHUTDOWN_SECONDS = 60
CAUSE_SECONDS = 5.0  # how long to wait for news that another process's end caused an error
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
NUMERIC = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_peers: peers.Peers | None = None  # set once this process is connected to the others


def launch(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments for `jax.distributed.initialize`, or None for a single process.

    - `JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i`: as given;
    - a SLURM step of several tasks: JAX reads the step's variables. A node's only task takes all its GPUs, several
      tasks take one each, by their local number. A process started by the batch script without srun runs alone;
    - a Cloud TPU VM: JAX asks the metadata server, or reads TPU_WORKER_HOSTNAMES on Kubernetes.

    Raises InputError when only some of the explicit variables are set, or one is not a number.
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
        if not address.rpartition(":")[2].isdecimal():
            raise InputError("environment", EXPLICIT[0], f"is {address!r}", "give host:port, of process 0")
        return {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(index),
            "cluster_detection_method": "deactivate",
        }
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
    """Return whether srun started this process; a batch script has only the variables of the job."""
    return any(name in environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"))


def _tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Join the processes of this run, if there are several. Call it before JAX touches a device."""
    arguments = launch(environ)
    if arguments is None:
        if "SLURM_PROCID" in environ and not _in_step(environ) and _tasks(environ) > 1:
            print(
                f"SLURM has {_tasks(environ)} tasks for this job, but this process was not started by srun: it works "
                "alone",
                file=sys.stderr,
                flush=True,
            )
        return
    if arguments.get("process_id") == 0:
        _check_port(int(arguments["coordinator_address"].rpartition(":")[2]))
    try:
        jax.distributed.initialize(
            **arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "jax.distributed",
            "",
            f"the processes did not find each other ({str(error).splitlines()[0]})",
            f"check the addresses, or set {', '.join(EXPLICIT)}",
        ) from error
    if global_state.num_processes > 1:  # before touching a device, which may wait for the others
        global _peers
        client: Any = global_state.client
        _peers = peers.meet(
            global_state.process_id,
            global_state.num_processes,
            str(global_state.coordinator_address),
            client.key_value_set,
            client.blocking_key_value_get,
        )
    say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def _check_port(port: int) -> None:
    """Raise InputError if process 0 cannot listen on the coordinator's port; JAX would crash."""
    try:
        peers.listen(port).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            "environment",
            EXPLICIT[0],
            f"process 0 cannot listen on port {port} here ({getattr(error, 'strerror', None) or error})",
            "give another port, or end what uses it; process 0 runs on the host that is named",
        ) from error


def primary() -> bool:
    """Return whether this process writes logs and descriptions (process 0)."""
    return jax.process_index() == 0


def say(*words: object) -> None:
    """Print on the primary process only."""
    if primary():
        print(*words, flush=True)


def silent() -> str:
    """Return which other processes do not answer, and for how long; "" if all do."""
    return _peers.silent() if _peers else ""


def program() -> dict[str, Any]:
    """Return what determines a process's computation, for `agree`.

    These are the package versions, a hash of this project's source files, and the JAX settings that change numbers.
    """
    code = hashlib.blake2b(digest_size=8)
    top = Path(__file__).parents[2]
    for file in sorted((*top.glob("crab_jax/**/*.py"), *top.glob("data_pipelines/**/*.py"))):
        code.update(file.relative_to(top).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return {
        "number of processes": global_state.num_processes,
        "code of crab_jax": code.hexdigest(),
        **{name: version(name) for name in PACKAGES},
        **{name: getattr(jax.config, name) for name in NUMERIC},
    }


def agree(name: str, mine: Callable[[], Mapping[str, Any]]) -> None:
    """Raise InputError if a field of `mine` differs from process 0. Use each name once.

    `mine` is called only when there are several processes.
    """
    if global_state.client is None:
        return
    if primary():
        global_state.client.key_value_set(f"crab_jax/{name}", json.dumps(mine()))
        return
    primary_values = json.loads(global_state.client.blocking_key_value_get(f"crab_jax/{name}", 1000 * AGREE_SECONDS))
    own_values = json.loads(json.dumps(mine()))
    for field in [*primary_values, *(field for field in own_values if field not in primary_values)]:
        if own_values.get(field) != primary_values.get(field):
            problem = f"is {own_values.get(field)!r:.300}, on process 0 it is {primary_values.get(field)!r:.300}"
            raise InputError(
                peers.name_of(global_state.process_id),
                field,
                problem,
                "start all processes with the same command, data and versions",
            )


def told(mine: bool) -> bool:
    """Return on every process what `mine` is on the primary one."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def own_rows(batch_sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Return the sorted positions of the rows of a global batch that this process's devices hold: int[n].

    Two processes share rows where a mesh axis that does not split the batch spans both.
    """
    slices = batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices if rows is not None]))


def global_batch(batch: Any, where: jax.sharding.Sharding, rows: int) -> Any:
    """Return the global arrays [rows, ...] on the mesh of a tree whose arrays hold this process's rows (`own_rows`)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x, (rows, *x.shape[1:])), batch)


@contextmanager
def together(debug: bool = False, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Call `start`; within the context, the error or death of one process ends all of them.

    Each process prints which one failed; without this the others would wait in a collective for ever. A failing process
    exits without the usual clean-up, which would wait for the others. At the end of the context, wait for all.
    """
    start(environ)
    if _peers is None:
        yield
        return
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if find_input_error(error) is None and not isinstance(error, KeyboardInterrupt):
            time.sleep(CAUSE_SECONDS)  # if another process's death caused it, `peers` ends this one meanwhile
        code = report(error, debug)
        _peers.fail(code, (str(error) or type(error).__name__).splitlines()[0])
    _peers.finish()
