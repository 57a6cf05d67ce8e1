"""Several processes and hosts as one run: start-up, who loads which rows, and one process's error ends all.

A run on one process needs nothing of this. Start the same command once per process (TPU: once per host; GPU: once per
node or once per device); how they find each other is read from the environment, see `launch`.
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
from jax._src.distributed import global_state  # the only way to the key-value store that all processes share

from crab_jax.io.errors import InputError, find_input_error, report
from crab_jax.parallel import peers

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
AGREE_SECONDS = 3600  # how long process 0 may take to say what it works on
STILL_SECONDS = 7 * 24 * 3600  # a process may stand still for so long: JAX's heartbeat would take it for dead
SHUTDOWN_SECONDS = 60
RIDDLE_SECONDS = 5.0  # how long an error waits for the news that it comes from another process's end
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
NUMERIC = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_peers: peers.Peers | None = None  # of this process, once it has met the others


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
    """Whether srun started this process; a batch script has the variables of the job only."""
    return any(name in environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST"))


def _tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Join the processes of this run, if there are several. To be called before JAX touches a device."""
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
            **arguments, heartbeat_timeout_seconds=STILL_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "jax.distributed",
            "",
            f"the processes did not find each other ({str(error).splitlines()[0]})",
            f"check the addresses, or set {', '.join(EXPLICIT)}",
        ) from error
    if global_state.num_processes > 1:  # before a device is touched, which may wait for the others
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
    """Raise InputError where JAX could not listen; it would crash."""
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
    """Whether this process writes logs and descriptions."""
    return jax.process_index() == 0


def say(*words: object) -> None:
    """Print on the primary process."""
    if primary():
        print(*words, flush=True)


def silent() -> str:
    """Which other processes do not answer, and for how long; "" where all do."""
    return _peers.silent() if _peers else ""


def program() -> dict[str, Any]:
    """What a process computes with, for `agree`: the versions of the packages, a hash of our own files, and what is set
    in JAX that changes numbers."""
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
    """Raise InputError where a field of `mine` is not what it is on process 0. Each name once; `mine` is asked only
    where there are others."""
    if global_state.client is None:
        return
    if primary():
        global_state.client.key_value_set(f"crab_jax/{name}", json.dumps(mine()))
        return
    theirs = json.loads(global_state.client.blocking_key_value_get(f"crab_jax/{name}", 1000 * AGREE_SECONDS))
    ours = json.loads(json.dumps(mine()))
    for field in [*theirs, *(field for field in ours if field not in theirs)]:
        if ours.get(field) != theirs.get(field):
            problem = f"is {ours.get(field)!r:.300}, on process 0 it is {theirs.get(field)!r:.300}"
            raise InputError(
                peers.name_of(global_state.process_id),
                field,
                problem,
                "start all processes with the same command, data and versions",
            )


def own_rows(where: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Positions, increasing, of the rows of a global batch that this process's devices hold: int[n].

    Two processes have rows in common where a mesh axis that does not split the batch runs over both.
    """
    slices = where.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in slices]))


@contextmanager
def together(debug: bool = False, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """`start`; while inside, the error or the death of one process ends all of them, each with a line that says whose
    it was; at the end wait for all.

    Without it the others would wait in a collective for ever. A failing process leaves without the usual clean-up,
    which waits for the others.
    """
    start(environ)
    if _peers is None:
        yield
        return
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if find_input_error(error) is None and not isinstance(error, KeyboardInterrupt):
            time.sleep(RIDDLE_SECONDS)  # a connection that broke with another process: the news of that ends this one
        code = report(error, debug)
        _peers.fail(code, (str(error) or type(error).__name__).splitlines()[0])
    _peers.finish()
