#!/usr/bin/env python3
r"""Train one stage, or evaluate, on one or several Cloud TPU slices of a GKE cluster, as a JobSet.

    ./launch_gke.py --name=crab --type=v5e:16x16 --slices=2 --spot \
        --image=REGION-docker.pkg.dev/PROJECT/crab/crab:tpu --service-account=crab --cache=gs://bucket/xla \
        --config=configs/finetune.py --config.init_from=gs://bucket/base --config.data.root=gs://bucket/data \
        --config.steps=2000 --workdir=gs://bucket/runs/finetune
    ./launch_gke.py --name=crab --type=v5e:4x4 --image=IMAGE -- evaluate --checkpoint=gs://bucket/runs/finetune \
        --data=gs://bucket/data --out=gs://bucket/results

It prints the manifest; with --apply it is given to `kubectl apply`. The cluster needs JobSet (https://jobset.sigs.k8s.io)
and a node pool of the type per slice. Each slice is a Job with one pod per host; GKE tells the pods of each other, and
JAX reads that. A preempted or failed slice restarts the whole run, which goes on from its folder; wrong input (exit
code 2) ends it. `kubectl delete jobset NAME` ends it after a checkpoint.

JobSet
  --name=NAME [--namespace=NAMESPACE]
  --type=TYPE          v5e:16x16 as in `python -m crab_jax.compile --topology`
  --slices=N           so many slices of this type (1)
  --spot | --reservation=NAME   cheaper and preemptible | from your reservation
  --image=IMAGE        made from the Dockerfile, target tpu, and pushed where the cluster can read
  --service-account=NAME   Kubernetes service account that may read and write the buckets (default)
  --cache=gs://...     folder of compiled programs, shared by hosts and restarts

Run
  --config=FILE --config.key=value ... --workdir=DIR   as for `python -m crab_jax.train`; FILE is in the image, all
                       other paths are gs://bucket/path (or s3://): pods share no disk, and no bucket is mounted
  -- evaluate --checkpoint=DIR --out=DIR ...           last, in place of the line above: as for
                       `python -m crab_jax.evaluate`
  --env=NAME=VALUE     environment of the run (repeatable). The manifest shows it: no passwords
  --env=NAME           the same, from the key NAME of the Kubernetes Secret called as the JobSet: for tokens and keys
  --max-restarts=N     give up after N restarts (100)

Always
  --dry-run            print the manifest (the default)     --apply   give it to kubectl     --help
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax.io.errors import InputError, run_verb

# The flags of a run, which launch_tpu.sh, launch_slurm.sh and this launcher share, and what they mean.
RUN_FLAGS = {
    "--config": "the config file",
    "--config.*": "another value of one of its keys",
    "--workdir": "the folder of the run",
    "--env": "a variable of its environment",
    "--max-restarts": "how often it may be started again",
    "-- evaluate": "evaluate instead, with the rest of the words",
}
JOBSET_FLAGS = (
    "--name",
    "--namespace",
    "--type",
    "--slices",
    "--reservation",
    "--image",
    "--service-account",
    "--cache",
)
SWITCHES = ("--spot", "--dry-run", "--apply", "--debug")


class Nodes(NamedTuple):
    """GKE's name of a TPU, the chips of its hosts in slices of several, and the largest slice of a single host."""

    accelerator: str
    chips_per_host: int
    largest_host: int


# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
NODES = {
    "v4": Nodes("tpu-v4-podslice", 4, 4),
    "v5e": Nodes("tpu-v5-lite-podslice", 4, 8),
    "v5p": Nodes("tpu-v5p-slice", 4, 4),
    "v6e": Nodes("tpu-v6e-slice", 4, 8),
}
GRACE_SECONDS = 300  # for a checkpoint before the end; a spot slice gets less from Google
WRONG_INPUT = 2  # exit code that no restart mends


def words_of(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return ({flag: its values}, words of evaluate) of a command line. Raises InputError."""
    flags: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            if rest[:1] != ["evaluate"]:
                raise InputError(
                    "command line", "--", f"is followed by {' '.join(rest[:1])!r}", "write -- evaluate ..."
                )
            return flags, rest[1:]
        flag, joined, value = word.partition("=")
        if flag in SWITCHES:
            flags[flag] = []
            continue
        if flag not in (*JOBSET_FLAGS, *RUN_FLAGS) and not flag.startswith("--config."):
            raise InputError("command line", flag, "is not a flag", "see --help")
        if not joined:
            if not rest:
                raise InputError("command line", flag, "needs a value", f"write {flag}=VALUE")
            value = rest.pop(0)
        flags.setdefault(flag, []).append(value)
    return flags, []


def run_command(flags: dict[str, list[str]], evaluate: list[str]) -> list[str]:
    """Return the words after `python -u -m` that run the stage or the evaluation. Raises InputError for wrong ones."""
    changes = [f"{flag}={values[-1]}" for flag, values in flags.items() if flag.startswith("--config.")]
    config, workdir = last(flags, "--config"), last(flags, "--workdir")
    if evaluate:
        if config or changes:
            raise InputError("command line", "--config", "cannot be combined with -- evaluate", "choose one")
        out = [
            word.partition("=")[2] or after
            for word, after in zip(evaluate, [*evaluate[1:], ""], strict=True)
            if re.fullmatch("--out(=.*)?", word)
        ]
        shared("--out", out[-1] if out else "")
        return ["crab_jax.evaluate", *evaluate]
    if not config:
        raise InputError("command line", "--config", "is not given", "write --config=configs/finetune.py")
    if not Path(__file__).with_name("configs").parent.joinpath(config).is_file():
        raise InputError(
            "command line", "--config", f"{config} is no file", "give a path from the top of the repository"
        )
    shared("--workdir", workdir)
    return ["crab_jax.train", f"--config={config}", *changes, f"--workdir={workdir}"]


def shared(flag: str, place: str) -> None:
    """Raise InputError for a place that pods do not share."""
    if not re.match(r"(gs|s3)://[^/]+/.", place):
        problem = f"{place!r} would lie on one pod's own disk, which is lost with it"
        raise InputError("command line", flag, problem, "give gs://bucket/path or s3://bucket/path")


def check(command: list[str]) -> None:
    """Find a mistyped override or flag here and not on every pod, if the packages of the project are installed."""
    try:
        if command[0] == "crab_jax.train":
            from crab_jax.config import parse_flags

            parse_flags(command[:-1], None, workdir=False)
        else:
            from crab_jax.evaluate import parse_arguments

            parse_arguments(command[1:])
    except ModuleNotFoundError as error:
        print(f"warning: {error.name} is not installed here, so the flags of the run are not checked", file=sys.stderr)


def last(flags: dict[str, list[str]], flag: str, default: str = "") -> str:
    """Return the last value of a flag."""
    return flags.get(flag, [default])[-1]


def number(flags: dict[str, list[str]], flag: str, default: int, least: int) -> int:
    """Return the whole number that a flag gives."""
    value = last(flags, flag, str(default))
    if not re.fullmatch(r"\d{1,4}", value) or int(value) < least:
        raise InputError("command line", flag, f"is {value!r}", f"give a whole number from {least} to 9999")
    return int(value)


def named(flags: dict[str, list[str]], flag: str, default: str = "") -> str:
    """Return the name of a Kubernetes object that a flag gives."""
    value = last(flags, flag, default)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", value):
        fix = "use at most 40 small letters, digits and dashes, a letter first"
        raise InputError("command line", flag, f"{value!r} is not a name", fix)
    return value


def hosts_of(kind: str, slices: int) -> tuple[Nodes, str, int, int]:
    """Return (nodes, topology, hosts per slice, chips per host) of a type such as v5e:16x16. Raises InputError."""
    generation, _, topology = kind.partition(":")
    if generation not in NODES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        fix = f"write CHIP:SHAPE, like v5e:16x16; chips: {', '.join(NODES)}"
        raise InputError("command line", "--type", f"{kind!r} is unknown", fix)
    nodes, chips = NODES[generation], math.prod(map(int, topology.split("x")))
    if chips <= nodes.largest_host:
        if slices > 1:
            fix = "give a larger type, or --slices=1"
            raise InputError("command line", "--slices", f"GKE joins no slices of one host ({kind})", fix)
        return nodes, topology, 1, chips
    return nodes, topology, chips // nodes.chips_per_host, nodes.chips_per_host


def environment(flags: dict[str, list[str]], name: str) -> list[dict[str, Any]]:
    """Return the variables of the run; those without a value come from the Secret `name`."""
    out: list[dict[str, Any]] = []
    if cache := last(flags, "--cache"):
        shared("--cache", cache)
        out.append({"name": "JAX_COMPILATION_CACHE_DIR", "value": cache})
    for place, word in enumerate(flags.get("--env", []), 1):
        variable, given, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII):
            raise InputError("command line", "--env", f"number {place} has no name", "write --env=NAME=VALUE")
        secret = {"valueFrom": {"secretKeyRef": {"name": name, "key": variable}}}
        out.append({"name": variable, **({"value": value} if given else secret)})
    return out


def manifest(flags: dict[str, list[str]], command: list[str]) -> dict[str, Any]:
    """Return the JobSet that runs `python -u -m COMMAND` on every host of every slice. Raises InputError."""
    name, slices = named(flags, "--name"), number(flags, "--slices", 1, 1)
    nodes, topology, hosts, chips = hosts_of(last(flags, "--type"), slices)
    if not last(flags, "--image"):
        fix = "build the Dockerfile, push the image, write --image=..."
        raise InputError("command line", "--image", "is not given", fix)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": nodes.accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    if "--spot" in flags and "--reservation" in flags:
        raise InputError("command line", "--spot", "cannot be combined with --reservation", "choose one")
    if "--spot" in flags:
        selector["cloud.google.com/gke-spot"] = "true"
    if "--reservation" in flags:
        selector["cloud.google.com/reservation-name"] = named(flags, "--reservation")
    tolerated = ["google.com/tpu", *(["cloud.google.com/gke-spot"] if "--spot" in flags else [])]
    container = {
        "name": "crab",
        "image": last(flags, "--image"),
        "command": ["python", "-u", "-m", *command],
        "env": environment(flags, name),
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],  # of TPU hosts, and of slices to each other
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],  # by which decoding workers hand over batches
    }
    pod = {
        "serviceAccountName": named(flags, "--service-account", "default"),
        "nodeSelector": selector,
        "tolerations": [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in tolerated],
        "hostNetwork": True,  # faster between slices
        "dnsPolicy": "ClusterFirstWithHostNet",
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    ended = {"containerName": "crab", "operator": "In", "values": [WRONG_INPUT]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": ended}]},
        "template": {"spec": pod},
    }
    wrong_input = {"name": "wrongInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    metadata: dict[str, Any] = {
        "name": name,
        # One slice has one node pool for itself.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if "--namespace" in flags:
        metadata["namespace"] = named(flags, "--namespace")
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": number(flags, "--max-restarts", 100, 0), "rules": [wrong_input]},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def main() -> None:
    """Print or apply the manifest, which is JSON and therefore YAML too."""
    argv = sys.argv[1:]
    if not argv or {"--help", "-h"} & set(argv):
        print(__doc__.strip())
        return
    flags, evaluate = words_of(argv)
    if "--apply" in flags and "--dry-run" in flags:
        raise InputError("command line", "--apply", "cannot be combined with --dry-run", "choose one")
    command = run_command(flags, evaluate)
    text = json.dumps(manifest(flags, command), indent=2)
    check(command)
    if "--apply" not in flags:
        print(text)
        return
    if not shutil.which("kubectl"):
        raise InputError("kubectl", "", "is not installed", "install it, and get the credentials of your cluster")
    sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode)


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
