"""launch_gke.py: manifests follow the schema of JobSet, wrong words are one line, and all launchers run the same."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests import test_launch
from tests.test_launch import cloud, launch, slurm  # noqa: F401  (fixtures)

REPOSITORY = Path(__file__).parent.parent
SCHEMA = json.loads((REPOSITORY / "tests" / "fixtures" / "jobset_schema.json").read_text())
JOBSET = ["--name=crab", "--type=v5e:16x16", "--image=eu-docker.pkg.dev/p/crab/crab:tpu"]
RUN = ["--config=configs/tiny.py", "--config.seed=3", "--workdir=gs://bucket/runs/x"]
EVALUATE = ["--", "evaluate", "--checkpoint=/a", "--data=/b", "--out=gs://bucket/results"]

spec = importlib.util.spec_from_file_location("launch_gke", REPOSITORY / "launch_gke.py")
launch_gke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch_gke)


def rendered(*words: str) -> dict:
    """The manifest of a command line, checked against the schema."""
    flags, evaluate = launch_gke.words_of(list(words))
    manifest = launch_gke.manifest(flags, launch_gke.run_command(flags, evaluate))
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    return manifest


def job_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]


def command_of(manifest: dict) -> list[str]:
    return pod_of(manifest)["containers"][0]["command"]


@pytest.mark.parametrize(
    ("kind", "slices", "accelerator", "hosts", "chips"),
    [
        ("v5e:16x16", 2, "tpu-v5-lite-podslice", 64, 4),
        ("v5e:2x4", 1, "tpu-v5-lite-podslice", 1, 8),
        ("v5p:4x4x4", 4, "tpu-v5p-slice", 16, 4),
        ("v6e:4x4", 1, "tpu-v6e-slice", 4, 4),
        ("v4:2x2x1", 1, "tpu-v4-podslice", 1, 4),
    ],
)
def test_a_slice_is_a_job_with_a_pod_per_host(kind, slices, accelerator, hosts, chips):
    manifest = rendered(*JOBSET, *RUN, f"--type={kind}", f"--slices={slices}")
    (jobs,), pod = manifest["spec"]["replicatedJobs"], pod_of(manifest)
    assert jobs["replicas"] == slices
    assert job_of(manifest)["parallelism"] == job_of(manifest)["completions"] == hosts
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == kind.partition(":")[2]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    assert "exclusive-topology" in str(manifest["metadata"]["annotations"])


def test_spot_nodes_are_asked_for_and_tolerated_and_a_reservation_is_named():
    spot, reserved = pod_of(rendered(*JOBSET, *RUN, "--spot")), pod_of(rendered(*JOBSET, *RUN, "--reservation=ours"))
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [each["key"] for each in spot["tolerations"]]
    assert reserved["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    assert "cloud.google.com/gke-spot" not in json.dumps(reserved)


def test_no_bucket_is_mounted_and_values_of_secrets_are_not_in_the_manifest(monkeypatch):
    monkeypatch.setenv("TOKEN", "a secret")
    manifest = rendered(*JOBSET, *RUN, "--env=TOKEN", "--env=NOTE=a=b", "--cache=gs://bucket/xla")
    assert pod_of(manifest)["volumes"] == [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    assert pod_of(manifest)["containers"][0]["env"] == [
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/xla"},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "crab", "key": "TOKEN"}}},
        {"name": "NOTE", "value": "a=b"},
    ]
    assert "a secret" not in json.dumps(manifest)


def test_wrong_input_ends_the_run_and_everything_else_restarts_it():
    manifest = rendered(*JOBSET, *RUN, "--max-restarts=7")
    policy, job = manifest["spec"]["failurePolicy"], job_of(manifest)
    assert policy["maxRestarts"] == 7 and job["backoffLimit"] == 0 and pod_of(manifest)["restartPolicy"] == "Never"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert policy["rules"] == [
        {"name": "wrongInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


def test_the_schema_refuses_what_the_server_would():
    manifest = rendered(*JOBSET, *RUN)
    for change in (
        lambda m: m["spec"].update(replicas=2),
        lambda m: job_of(m).update(paralelism=2),
        lambda m: pod_of(m).update(restartPolicy="never"),
        lambda m: pod_of(m)["containers"][0].update(env=[{"value": "a"}]),
    ):
        wrong = json.loads(json.dumps(manifest))
        change(wrong)
        assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(wrong)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([*JOBSET, *RUN, "--name=Crab_1"], "--name"),
        ([*JOBSET, *RUN, "--type=v9:4x4"], "--type"),
        ([*JOBSET, *RUN, "--type=v5e"], "--type"),
        ([*JOBSET, *RUN, "--slices=0"], "--slices"),
        ([*JOBSET, *RUN, "--slices=2", "--type=v5e:2x4"], "joins no slices of one host"),
        ([*JOBSET, *RUN, "--workdir=runs/x"], "--workdir"),
        ([*JOBSET, *RUN, "--workdir=/mnt/x"], "gs://bucket/path"),
        ([*JOBSET, *RUN, "--config=configs/none.py"], "configs/none.py"),
        ([*JOBSET, *RUN, "--wrokdir=gs://b/x"], "--wrokdir"),
        ([*JOBSET, *RUN, "--env=1A=b"], "--env"),
        ([*JOBSET, *RUN, "--max-restarts=soon"], "--max-restarts"),
        ([*JOBSET, *RUN, "--spot", "--reservation=a"], "--spot"),
        ([*JOBSET, *RUN, "--apply", "--dry-run"], "--apply"),
        ([*JOBSET, *RUN, "--image"], "--image"),
        ([*JOBSET[:2], *RUN], "--image"),
        ([*JOBSET, *RUN, *EVALUATE], "--config"),
        ([*JOBSET, "--", "predict"], "--"),
        ([*JOBSET, *EVALUATE[:-1]], "--out"),
        ([*JOBSET, *RUN, "--config.sede=3"], "sede"),
    ],
)
def test_wrong_words_are_one_line_and_render_nothing(words, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch_gke.py", *words])
    with pytest.raises(SystemExit) as ended:
        launch_gke.run_verb(launch_gke.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert named in err and err.startswith("error: ") and err.count("\n") == 1


def test_help_names_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch_gke.py"])
    launch_gke.main()
    text = capsys.readouterr().out
    for flag in (*launch_gke.JOBSET_FLAGS, *launch_gke.SWITCHES[:-1], *launch_gke.RUN_FLAGS):
        assert flag.replace(".*", ".key=") in text, flag


def test_the_commands_of_the_document_render():
    text = (REPOSITORY / "docs" / "training.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\./launch_gke\.py (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        rendered(*shlex.split(command))


def test_a_dry_run_is_the_default_and_what_it_prints_is_yaml(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch_gke.py", *JOBSET, *RUN])
    launch_gke.main()
    assert yaml.safe_load(capsys.readouterr().out) == rendered(*JOBSET, *RUN)


def test_apply_hands_the_manifest_to_kubectl(tmp_path):
    test_launch.script(tmp_path / "kubectl", f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat >{tmp_path}/given\n')
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [REPOSITORY / "launch_gke.py", *JOBSET, *RUN, "--apply"]
    assert subprocess.run(command, env=environ).returncode == 0
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert json.loads((tmp_path / "given").read_text()) == rendered(*JOBSET, *RUN)


def test_an_image_installs_lists_by_hash_and_runs_as_nobody_in_particular():
    text = (REPOSITORY / "Dockerfile").read_text()
    version = re.search(r"^ARG PYTHON=3\.(\d+)$", text, re.MULTILINE)[1]
    for extra in ("", "-tpu", "-cuda12", "-cuda13"):
        assert (REPOSITORY / "constraints" / f"py3{version}{extra}.txt").is_file()
    installs = re.findall(r"pip install (.*)", text)
    assert len(installs) == 3 and all("--require-hashes" in words or "--no-deps" in words for words in installs)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not {"crab_jax", "data_pipelines", "configs", "constraints", "README.md", "LICENSE"} & set(ignored)


# All launchers take the flags of RUN_FLAGS and run the same words with them.

SHARED = {
    "--config": ["--config=configs/tiny.py"],
    "--config.*": ["--config.seed=3"],
    "--workdir": ["--workdir=/mnt/runs/x"],
    "--env": ["--env=NOTE"],
    "--max-restarts": ["--max-restarts=5"],
    "-- evaluate": ["--", "evaluate", "--checkpoint=/a", "--data=/b", "--out=/mnt/results"],
}


@pytest.mark.parametrize("evaluates", [False, True])
def test_all_launchers_run_the_same_with_the_flags_of_a_run(cloud, slurm, evaluates, monkeypatch):  # noqa: F811
    assert SHARED.keys() == launch_gke.RUN_FLAGS.keys()
    training = ("--config", "--config.*", "--workdir")
    chosen = [flag for flag in SHARED if flag not in (training if evaluates else ("-- evaluate",))]
    words = [word for flag in chosen for word in SHARED[flag]]
    wanted = (
        ["crab_jax.evaluate", *words[words.index("--") + 2 :]]
        if evaluates
        else ["crab_jax.train", *(word for flag in training for word in SHARED[flag])]
    )
    monkeypatch.setenv("NOTE", "noted")

    on_gke = command_of(rendered(*JOBSET, *(word.replace("/mnt", "gs://bucket") for word in words)))
    assert [word.replace("gs://bucket", "/mnt") for word in on_gke] == ["python", "-u", "-m", *wanted]

    job = test_launch.sbatch(slurm, *words, CODE="0")
    assert job.wait(timeout=60) == 0, job.stderr.read()
    ran = json.loads((slurm / "srun.json").read_text())
    assert ran[ran.index("py") :] == ["py", "-u", "-m", *wanted]

    place = ["run", *test_launch.SLICE, "--dry-run"]
    done = launch(cloud, *place, *words)
    assert done.returncode == 0 and " ".join(["python", "-u", "-m", *wanted]) in done.stdout, done.stderr
    for text in (REPOSITORY / name for name in ("launch_tpu.sh", "launch_slurm.sh", "launch_gke.py")):
        for flag in launch_gke.RUN_FLAGS:
            assert flag.replace(".*", ".key=value") in text.read_text(), (text, flag)
