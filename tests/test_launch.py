"""launch_tpu.sh against a fake gcloud that keeps slices in files and runs `ssh --command` in a folder per worker;
launch_slurm.sh against a fake srun. Nothing here reaches a cloud.
"""

import configparser
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
WORKERS = 2

# One fake of the whole cloud. Its folder holds calls.jsonl (every argv), vm and queue (states; no file = no resource),
# next_queue (states that a queued resource goes through, one per look), fail (a word: calls that hold it fail), and
# worker0, worker1 (homes). A run that finds its slice gone sees ssh fail, as it would. As with the real one, the
# workers of --worker=all share one standard input. With a file watch_for, ps becomes a command line of this machine
# that has its text. With a file odd, ssh commands that hold its first line meet its second: cut (input ends), lost
# (the slice is, once) or twice.
GCLOUD = r"""
import json, os, subprocess, sys
from pathlib import Path

cloud, argv = Path(os.environ["FAKE_CLOUD"]), sys.argv[1:]
vm, queue, waiting = cloud / "vm", cloud / "queue", cloud / "next_queue"
with open(cloud / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")
if (cloud / "watch_for").exists():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text()
        except OSError:
            continue
        if (cloud / "watch_for").read_text() in line:
            (cloud / "ps").write_text(line)
odd, how = (cloud / "odd").read_text().split("\n") if (cloud / "odd").exists() else ("no such command", "")
fail = cloud / "fail"
if fail.exists() and fail.read_text().strip() in " ".join(argv):
    sys.exit("ERROR: (gcloud) RESOURCE_EXHAUSTED: there is no more capacity")
assert argv[:2] == ["compute", "tpus"], argv
kind, verb, rest = argv[2], argv[3], argv[4:]
flags = dict(word[2:].split("=", 1) for word in rest if word.startswith("--") and "=" in word)
if (kind, verb) == ("tpu-vm", "create"):
    assert not vm.exists() and flags["zone"] and flags["accelerator-type"] and flags["version"]
    vm.write_text("READY")
elif (kind, verb) == ("queued-resources", "create"):
    assert not queue.exists() and flags["node-id"] and flags["accelerator-type"] and flags["runtime-version"]
    queue.write_text("ACCEPTED")
    waiting.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
elif verb == "describe":
    state = vm if kind == "tpu-vm" else queue
    if kind == "queued-resources" and waiting.exists():
        now, *later = waiting.read_text().split("\n")
        queue.write_text(now)
        waiting.write_text("\n".join(later)) if later else waiting.unlink()
        if now == "ACTIVE":
            vm.write_text("READY")
    if not state.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found")
    print(state.read_text())
elif verb == "delete":
    for state in [vm] if kind == "tpu-vm" else [queue, vm]:
        state.unlink(missing_ok=True)
    for worker in cloud.glob("worker*"):  # the disks go with the machines
        subprocess.run(["rm", "-rf", worker])
elif verb == "start":
    vm.write_text("READY")
elif verb in ("ssh", "scp"):
    if not vm.exists() or vm.read_text() != "READY":
        sys.exit("ERROR: (gcloud) the TPU VM is in state PREEMPTED")
    which = [0, 1] if flags["worker"] == "all" else [int(flags["worker"])]
    codes = []
    for worker in which:
        home = cloud / f"worker{worker}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            source, target = [word for word in rest if not word.startswith("--")]
            codes.append(subprocess.call(["cp", source, home / target.split(":")[1]]))
        else:
            found = how if odd in flags["command"] else ""
            if found == "lost":
                vm.write_text("PREEMPTED")
                (cloud / "odd").unlink()
                sys.exit("ERROR: (gcloud) [/usr/bin/ssh] exited with return code [255].")
            for _ in range(2 if found == "twice" else 1):
                start = sys.stdin.buffer.read()[:20] if found == "cut" else None
                code = subprocess.run(["bash", "-c", flags["command"]], cwd=home, input=start,
                                      env={**os.environ, "HOME": str(home), "WORKER": str(worker)}).returncode
            codes.append(code)
    sys.exit(next((code for code in codes if code), 0))
else:
    sys.exit(f"ERROR: (gcloud) no such command: {argv}")
"""

# What installs on a worker: a python that records its argv and does what the file `train` in the cloud's folder says.
UV = r"""#!/bin/sh
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$FAKE_CLOUD/train" "$folder/bin/python"
fi
echo "$WORKER uv $*" >>"$FAKE_CLOUD/installs"
"""
TRAIN = r"""#!PYTHON -S
import json, os, signal, sys, time
from pathlib import Path
cloud, worker = Path(os.environ["FAKE_CLOUD"]), os.environ["WORKER"]
home = Path(os.environ["HOME"])
with open(cloud / f"train{worker}.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("NOTE")]) + "\n")
print("step 1/2 of worker", worker)
BODY
print("step 2/2")
"""


@pytest.fixture
def cloud(tmp_path):
    """The fake cloud's folder, with `gcloud` and `uv` in bin/ and a small repository in repo/."""
    repo, bin_dir = tmp_path / "repo", tmp_path / "bin"
    bin_dir.mkdir()
    (repo / "configs").mkdir(parents=True)
    (repo / "configs" / "tiny.py").write_text("# a config\n")
    for name in ("launch_tpu.sh", "launch_slurm.sh"):
        shutil.copy(REPOSITORY / name, repo / name)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"],
    ):
        subprocess.run(["git", *words], cwd=repo, check=True)
    (tmp_path / "gcloud.py").write_text(GCLOUD)
    script(bin_dir / "gcloud", f'#!/bin/sh\nexec {sys.executable} -S {tmp_path}/gcloud.py "$@"\n')
    script(bin_dir / "uv", UV)
    train_does(tmp_path, "")
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def train_does(cloud: Path, body: str) -> None:
    """What the run does between its first and last step."""
    script(cloud / "train", TRAIN.replace("PYTHON", sys.executable).replace("BODY", body))


def environment(cloud: Path, **more: str) -> dict[str, str]:
    path = f"{cloud / 'bin'}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "FAKE_CLOUD": str(cloud),
        "PYTHON": "no local check",
        "TMPDIR": str(cloud),
        **more,
    }


PLACE = ["--name=crab", "--zone=us-west4-a"]
SLICE = [*PLACE, "--type=v5e:4x4", "--poll=0"]
RUN = ["run", *SLICE, "--config=configs/tiny.py", "--workdir=/mnt/runs/x"]


def launch(cloud: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(cloud / "repo" / "launch_tpu.sh"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(cloud, **more),
        cwd=cloud,
    )


def calls(cloud: Path) -> list[list[str]]:
    file = cloud / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def verbs(cloud: Path) -> list[str]:
    """The gcloud commands that change something, in order."""
    return [" ".join(argv[2:4]) for argv in calls(cloud) if argv[3] not in ("describe", "ssh", "scp")]


def runs_of(cloud: Path, worker: int) -> list[list]:
    """[argv, working directory, $NOTE] of every run that a worker started."""
    file = cloud / f"train{worker}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ------------------------------------------------------------------------------------------------------------- input


def test_help_shows_an_example_and_every_flag(cloud):
    done = launch(cloud, "--help")
    assert done.returncode == 0
    text = (REPOSITORY / "launch_tpu.sh").read_text()
    parsed = text[text.index("parse() {") : text.index("number() {")]
    flags = {
        word.rstrip(")").strip()
        for line in parsed.splitlines()
        for word in line.split("|")
        for word in [word.strip().split(")")[0]]
        if word.startswith("--") and " " not in word
    }
    assert len(flags) > 12
    for flag in flags - {"--*", "--config.*"}:
        assert flag in done.stdout, flag
    assert "./launch_tpu.sh run --name=" in done.stdout


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--name=Crab_1"], "--name"),
        (["--name="], "--name"),
        (["--zone=moon"], "--zone"),
        (["--type=v9:4x4"], "--type"),
        (["--type=v5e"], "--type"),
        (["--type=v5e:4x"], "--type"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/new.py"], "not in commit"),
        (["--workdir=runs/x"], "--workdir"),
        (["--workdir="], "--workdir"),
        (["--wrokdir=/mnt/x"], "--wrokdir"),
        (["--env=NOTE"], "--env"),
        (["--poll=soon"], "--poll"),
        (["tpu"], "tpu"),
        (["--spot", "--reserved"], "--spot"),
        (["--setup"], "--setup"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_created(cloud, changed, named):
    (cloud / "repo" / "configs" / "new.py").write_text("# not committed\n")
    done = launch(cloud, *RUN, *changed)
    assert done.returncode == 2
    assert named in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not calls(cloud)


def test_an_unknown_command_is_refused(cloud):
    done = launch(cloud, "go", *PLACE)
    assert done.returncode == 2 and "'go'" in done.stderr


def test_without_gcloud_the_error_says_how_to_get_it(cloud):
    tools = cloud / "tools"
    tools.mkdir()
    for name in ("bash", "env", "git", "dirname", "mktemp", "rm", "wc"):
        (tools / name).symlink_to(shutil.which(name))
    done = launch(cloud, *RUN, PATH=str(tools))
    assert done.returncode == 2 and "gcloud: is not installed; install" in done.stderr


def test_uncommitted_changes_are_warned_about(cloud):
    (cloud / "repo" / "configs" / "tiny.py").write_text("# changed\n")
    done = launch(cloud, *RUN, "--dry-run")
    assert done.returncode == 0 and done.stderr.startswith("warning: 1 changed files are not committed")


def test_a_mistyped_override_is_found_before_anything_is_created(cloud):
    repo = cloud / "repo"
    for name in ("crab_jax", "data_pipelines", "configs/__init__.py", "configs/common.py"):
        (repo / name).symlink_to(REPOSITORY / name)
    shutil.copy(REPOSITORY / "configs" / "tiny.py", repo / "configs" / "tiny.py")
    done = launch(cloud, *RUN, "--config.optim.lrr=1", PYTHON=sys.executable)
    assert done.returncode == 2 and "lrr" in done.stderr and "Traceback" not in done.stderr
    assert not calls(cloud)


# ------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("given", "accelerator", "runtime"),
    [
        ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"),
        ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base"),
        ("v5p:2x2x4", "v5p-32", "v2-alpha-tpuv5"),
        ("v5p-32", "v5p-32", "v2-alpha-tpuv5"),
    ],
)
def test_types_by_topology_or_by_name(cloud, given, accelerator, runtime):
    """v4 and v5p are named by TensorCores, two per chip; the others by chips (Cloud TPU documentation)."""
    assert launch(cloud, "create", *SLICE, f"--type={given}").returncode == 0
    create = next(argv for argv in calls(cloud) if argv[3] == "create")
    assert f"--accelerator-type={accelerator}" in create and f"--version={runtime}" in create


# --------------------------------------------------------------------------------------------------------------- run

HARD = [
    '--config.data.root=/mnt/it\'s "my" data',
    "--config.tokenizer=$HOME/`x`; rm *",
    "--config.fresh=('a b', 'c')",
    "--config.init_from=",
]


def test_run_creates_installs_and_runs_on_all_workers(cloud):
    done = launch(
        cloud,
        *RUN,
        *HARD,
        "--setup=mkdir -p 'a b' && echo \"$WORKER\" >'a b/it'",
        "--env=NOTE=two 'words'",
        "--spot",
        "--project=p",
        "--create-flag=--network=tpus",
        "--ssh-flag=--internal-ip",
    )
    assert done.returncode == 0, done.stderr
    create = next(argv for argv in calls(cloud) if argv[3] == "create")
    assert {"--spot", "--project=p", "--network=tpus", "--zone=us-west4-a"} <= set(create)
    assert all("--internal-ip" in argv and "--project=p" in argv for argv in calls(cloud) if argv[3] in ("ssh", "scp"))
    for worker in range(WORKERS):
        ((argv, where, note),) = runs_of(cloud, worker)
        assert argv == ["-u", "-m", "crab_jax.train", "--config=configs/tiny.py", *HARD, "--workdir=/mnt/runs/x"]
        assert note == "two 'words'"
        assert (Path(where) / "configs" / "tiny.py").read_text() == "# a config\n"
        assert (cloud / f"worker{worker}" / "a b" / "it").read_text() == f"{worker}\n"
    assert "step 1/2 of worker 0\nstep 2/2\n" in done.stdout  # the log of worker 0, whole
    assert "[tpu]" in (cloud / "installs").read_text()


def test_buckets_are_named_to_the_run_and_not_mounted(cloud):
    words = ["--config.data.root=gs://media/av", "--config.init_from=s3://crab-1/base", "--workdir=gs://crab-1/runs/x"]
    done = launch(cloud, *RUN, *words)
    assert done.returncode == 0, done.stderr
    assert runs_of(cloud, 1)[0][0][-3:] == words
    assert not [call for call in calls(cloud) if "fuse" in str(call)]


EVALUATE = ["run", *SLICE, "--", "evaluate", "--checkpoint=/mnt/runs/x"]


@pytest.mark.parametrize("out", [["--out=gs://crab-1/test"], ["--out", "gs://crab-1/test"]])
def test_evaluate_runs_on_all_workers(cloud, out):
    done = launch(cloud, *EVALUATE, "--data", "gs://media/av", "--mute-audio", *out)
    assert done.returncode == 0, done.stderr
    assert "done: gs://crab-1/test" in done.stderr
    for worker in range(WORKERS):
        ((argv, _, _),) = runs_of(cloud, worker)
        assert argv == [
            "-u",
            "-m",
            "crab_jax.evaluate",
            "--checkpoint=/mnt/runs/x",
            "--data",
            "gs://media/av",
            "--mute-audio",
            *out,
        ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (EVALUATE, "--out"),
        ([*EVALUATE, "--out=runs/x"], "--out"),
        ([*SLICE, "--", "train"], "'train' follows --"),
        ([*RUN[1:], "--", "evaluate", "--out=/mnt/x"], "--config"),
        ([*SLICE, "--"], "--"),
    ],
)
def test_evaluate_with_bad_input_is_one_line_before_anything_is_created(cloud, words, named):
    done = launch(cloud, *(words if words[0] == "run" else ["run", *words]))
    assert done.returncode == 2
    assert named in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not calls(cloud)


def test_a_mistyped_flag_of_evaluate_is_found_before_anything_is_created(cloud):
    for name in ("crab_jax", "data_pipelines", "configs/__init__.py", "configs/common.py"):
        (cloud / "repo" / name).symlink_to(REPOSITORY / name)
    done = launch(cloud, *EVALUATE, "--out=/mnt/x", "--mute-sound", PYTHON=sys.executable)
    assert done.returncode == 2 and "--mute-sound" in done.stderr and "Traceback" not in done.stderr
    assert not calls(cloud)


def test_separate_values_are_read_like_joined_ones(cloud):
    words = [part for word in RUN[1:] for part in word.split("=", 1)]
    assert launch(cloud, "run", *words).returncode == 0
    assert runs_of(cloud, 1)[0][0][-2:] == ["--config=configs/tiny.py", "--workdir=/mnt/runs/x"]


def test_a_slice_that_exists_is_reused(cloud):
    (cloud / "vm").write_text("READY")
    assert launch(cloud, *RUN).returncode == 0
    assert verbs(cloud) == [] and len(runs_of(cloud, 0)) == 1


def test_a_stopped_slice_is_started(cloud):
    (cloud / "vm").write_text("STOPPED")
    assert launch(cloud, *RUN).returncode == 0
    assert verbs(cloud) == ["tpu-vm start"]


def test_a_queued_resource_is_waited_for(cloud):
    done = launch(cloud, *RUN, "--queued")
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["queued-resources create"] and len(runs_of(cloud, 1)) == 1
    assert "WAITING_FOR_RESOURCES" in done.stderr


def test_what_an_earlier_preemption_left_is_replaced(cloud):
    (cloud / "queue").write_text("SUSPENDED")
    assert launch(cloud, *RUN, "--queued").returncode == 0
    assert verbs(cloud) == ["queued-resources delete", "queued-resources create"]


PREEMPTED_ONCE = """
if len((cloud / f"train{worker}.jsonl").read_text().splitlines()) == 1:
    time.sleep(0.5)
    (cloud / "vm").write_text("PREEMPTED")
    sys.exit(CODE)
"""


# What crab_jax/train.py prints when it ends early on a signal, with exit code 0.
ON_REQUEST = "stopped on request after step"


@pytest.mark.parametrize(("queued", "end"), [(False, "1"), (True, f'print("{ON_REQUEST} 1 of 2") or 0')])
def test_a_preempted_run_is_restarted_on_a_new_slice(cloud, queued, end):
    train_does(cloud, PREEMPTED_ONCE.replace("CODE", end))
    done = launch(cloud, *RUN, *(["--queued"] if queued else []))
    assert done.returncode == 0, done.stderr
    kind = "queued-resources" if queued else "tpu-vm"
    assert verbs(cloud) == [f"{kind} create", f"{kind} delete", f"{kind} create"]
    first, second = runs_of(cloud, 0)
    assert first == second  # the same command: train resumes from the workdir
    assert "restart 1 of at most 100" in done.stderr


@pytest.mark.parametrize("end", [f'print("{ON_REQUEST} 1 of 2"); sys.exit(0)', "os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_interrupted_run_goes_on_where_the_slice_stays(cloud, end):
    """Maintenance ends the processes and keeps the slice."""
    assert ON_REQUEST in (REPOSITORY / "crab_jax" / "train.py").read_text()
    train_does(
        cloud, PREEMPTED_ONCE.replace('(cloud / "vm").write_text("PREEMPTED")', "pass").replace("sys.exit(CODE)", end)
    )
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["tpu-vm create"] and len(runs_of(cloud, 0)) == 2


def test_restarts_have_an_end(cloud):
    train_does(cloud, '(cloud / "vm").write_text("PREEMPTED"); sys.exit(1)')
    done = launch(cloud, *RUN, "--max-restarts=2")
    assert done.returncode == 1 and "gave up after 2 restarts" in done.stderr
    assert len(runs_of(cloud, 0)) == 3


@pytest.mark.parametrize(("code", "ours"), [(1, 1), (2, 2), (3, 1)])
def test_a_failing_run_is_not_restarted(cloud, code, ours):
    train_does(cloud, f'print("error: bad thing of", worker, file=sys.stderr); sys.exit({code})')
    done = launch(cloud, *RUN)
    assert done.returncode == ours and len(runs_of(cloud, 0)) == 1
    assert "bad thing of 0" in done.stderr and "bad thing of 1" in done.stderr  # the log's end, of every worker
    assert f"exit code {code}" in done.stderr
    assert verbs(cloud) == ["tpu-vm create"]  # the slice stays, to look at


@pytest.mark.parametrize(("word", "created"), [("create", False), ("--command=set -e; mkdir", True), ("scp", True)])
def test_what_gcloud_refuses_ends_with_its_message(cloud, word, created):
    (cloud / "fail").write_text(word)
    done = launch(cloud, *RUN)
    assert done.returncode == 1 and "RESOURCE_EXHAUSTED" in done.stderr
    assert (cloud / "vm").exists() == created and not runs_of(cloud, 0)


def test_a_describe_that_fails_creates_nothing(cloud):
    (cloud / "fail").write_text("describe")
    done = launch(cloud, *RUN)
    assert done.returncode == 1 and "RESOURCE_EXHAUSTED" in done.stderr and not verbs(cloud)


def test_workers_that_ssh_cannot_reach_are_reported(cloud):
    (cloud / "fail").write_text(" ssh ")
    done = launch(cloud, *RUN)
    assert done.returncode == 1 and "cannot be reached by ssh" in done.stderr


# ---------------------------------------------------------------------------------------------- attach, stop, delete

UNTIL_TERM = """
print("going", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("ON_REQUEST 1 of 2", flush=True), sys.exit(0)))
while True: time.sleep(0.1)
"""


@pytest.fixture
def running(cloud):
    """(cloud, the launcher of a run that goes on until it is stopped)."""
    train_does(cloud, UNTIL_TERM.replace("ON_REQUEST", ON_REQUEST))
    process = subprocess.Popen(
        [str(cloud / "repo" / "launch_tpu.sh"), *RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cloud),
        cwd=cloud,
    )
    wait_for(lambda: "going" in log_of(cloud, 0) and "going" in log_of(cloud, 1), process)
    yield cloud, process
    if process.poll() is None:
        launch(cloud, "stop", *PLACE)
        process.wait(timeout=60)


def log_of(cloud: Path, worker: int) -> str:
    file = cloud / f"worker{worker}" / "crab_jax" / "log"
    return file.read_text() if file.exists() else ""


def wait_for(condition, process) -> None:
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise TimeoutError


def test_stop_lets_the_run_end_and_keeps_the_slice(running):
    cloud, process = running
    done = launch(cloud, "stop", *PLACE)
    assert done.returncode == 0 and ON_REQUEST in done.stdout
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; the same command resumes it" in err, err
    assert ON_REQUEST in log_of(cloud, 1) and (cloud / "vm").read_text() == "READY"
    assert launch(cloud, "stop", *PLACE).returncode == 1  # there is nothing left to stop


def test_a_lost_launcher_leaves_the_run_and_finds_it_again(running):
    cloud, process = running
    process.send_signal(signal.SIGKILL)
    process.wait()
    other = launch(cloud, *RUN, "--config.steps=3")
    assert other.returncode == 2 and "another run is on it" in other.stderr
    again = subprocess.Popen(
        [str(cloud / "repo" / "launch_tpu.sh"), *RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cloud),
        cwd=cloud,
    )
    assert "step 1/2 of worker 0" in again.stdout.readline()
    launch(cloud, "stop", *PLACE)
    again.communicate(timeout=60)
    assert again.returncode == 0 and len(runs_of(cloud, 0)) == 1


def test_logs_of_one_worker(cloud):
    assert launch(cloud, *RUN).returncode == 0
    done = launch(cloud, "logs", *PLACE, "--worker=1")
    assert done.returncode == 0 and done.stdout == "step 1/2 of worker 1\nstep 2/2\n"


@pytest.mark.parametrize(("flags", "verb"), [([], "tpu-vm delete"), (["--queued"], "queued-resources delete")])
def test_delete(cloud, flags, verb):
    (cloud / "vm").write_text("READY")
    assert launch(cloud, "delete", *PLACE, *flags).returncode == 0
    assert verbs(cloud) == [verb] and not (cloud / "vm").exists()


# ----------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_prints_commands_that_can_be_pasted(cloud):
    """The printed text, run by a shell, does what the run itself would have done."""
    words = [*RUN, *HARD, '--setup=echo "it\'s" >done', f"--env=NOTE={SECRET}"]
    printed = launch(cloud, *words, "--dry-run")
    assert printed.returncode == 0 and not calls(cloud)
    assert PIECE not in printed.stdout + printed.stderr and "NOTE=***" in printed.stdout
    without = paste(cloud, printed.stdout)  # the value is not printed, so whoever pastes has to have it
    assert "export it first" in without.stderr and not runs_of(cloud, 0)
    (cloud / "vm").unlink()
    (cloud / "calls.jsonl").unlink()
    pasted = paste(cloud, printed.stdout, NOTE=SECRET)
    by_hand = [scratched(argv[2:]) for argv in calls(cloud)]
    ((argv, _, note),) = runs_of(cloud, 1)
    assert argv[3:] == ["--config=configs/tiny.py", *HARD, "--workdir=/mnt/runs/x"] and note == SECRET, pasted.stderr
    assert (cloud / "worker1" / "done").read_text() == "it's\n"

    launch(cloud, "delete", *PLACE)
    (cloud / "calls.jsonl").unlink()
    assert launch(cloud, *words).returncode == 0
    ours = [scratched(argv[2:]) for argv in calls(cloud)]
    assert sorted(ours) == sorted(by_hand) and ours[-1] == by_hand[-1]  # values are handed over to all at once


def paste(cloud: Path, text: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash"],
        input=text,
        capture_output=True,
        text=True,
        cwd=cloud / "repo",
        env=environment(cloud, **more),
        timeout=120,
    )


def scratched(argv: list[str]) -> list[str]:
    """Without the part of names that mktemp draws."""
    return [re.sub(r"crab_jax\.\w{10}", "SCRATCH", word) for word in argv]


def test_dry_run_of_a_queued_run_needs_no_gcloud(cloud):
    (cloud / "bin" / "gcloud").unlink()
    done = launch(cloud, *RUN, "--queued", "--dry-run", "--spot")
    words = shlex.split(done.stdout, comments=True)
    create = words.index("create")
    assert done.returncode == 0 and words[create - 4 : create] == ["gcloud", "compute", "tpus", "queued-resources"]
    assert {"--spot", "--node-id=crab"} <= set(words[create : create + 8])


# ----------------------------------------------------------------------------------------------------------- secrets

PIECE = "hunter2"
SECRET = f"{PIECE} 'q' \"d\" $HOME `x` \\ * \nsecond line=end\nß  "
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()

# What the run saw of its environment, and how its files lie there.
LOOK = """
import hashlib
token = os.environ.get("TOKEN", "")
for process in Path("/proc").glob("[0-9]*"):
    try:
        line = (process / "cmdline").read_text()
    except OSError:
        continue
    if "hunter" + "2" in line: (cloud / "ps").write_text(line)
mask = os.umask(0)
(cloud / f"seen{worker}").write_text(json.dumps([hashlib.sha256(token.encode()).hexdigest(),
    oct((home / "crab_jax").stat().st_mode & 0o777), oct((home / "crab_jax" / "environment").stat().st_mode & 0o777),
    (home / "crab_jax" / "environment").is_symlink(), oct(mask)]))
os.umask(mask)
"""


def holding(folder: Path, text: str) -> dict[str, str]:
    """The files below a folder, links not followed, that hold a text, with their modes."""
    return {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    }


def assert_nowhere(cloud: Path, *done: subprocess.CompletedProcess) -> None:
    """No file, recorded command line (calls.jsonl, ps) or output holds the secret."""
    (cloud / "watch_for").unlink(missing_ok=True)
    assert holding(cloud, PIECE) == {}
    for one in done:
        assert PIECE not in one.stdout + one.stderr


def own_mask() -> str:
    mask = os.umask(0o022)
    os.umask(mask)
    return oct(mask)


@pytest.mark.parametrize(
    ("words", "outside"),
    [
        ([f"--env=TOKEN={SECRET}"], {}),
        (["--env", f"TOKEN={SECRET}"], {"TOKEN": "another"}),
        (["--env=TOKEN"], {"TOKEN": SECRET}),
        (["--env", "TOKEN"], {"TOKEN": SECRET}),
        ([f"--env=TOKEN={PIECE}", f"--env=TOKEN={SECRET}", "--env=PATH=/none"], {}),
    ],
)
def test_values_of_env_reach_every_worker_and_stand_nowhere(cloud, words, outside):
    """Neither on a command line of gcloud or of any process, nor in an output, nor in a file that stays."""
    (cloud / "watch_for").write_text(PIECE)
    train_does(cloud, LOOK)
    done = launch(cloud, *RUN, *words, **outside)
    assert done.returncode == 0 and "TOKEN=***" in done.stderr, done.stderr
    for worker in range(WORKERS):
        digest, folder, file, link, mask = json.loads((cloud / f"seen{worker}").read_text())
        assert digest == DIGEST and (folder, file, link) == ("0o700", "0o600", False)
        assert mask == own_mask(), "what the run writes is as readable as before"
    assert_nowhere(cloud, done)


def test_while_a_run_goes_on_its_values_lie_in_one_private_file_per_worker(cloud):
    train_does(cloud, UNTIL_TERM.replace("ON_REQUEST", ON_REQUEST))
    token = [f"--env=TOKEN={SECRET}"]
    process = subprocess.Popen(
        [str(cloud / "repo" / "launch_tpu.sh"), *RUN, *token],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cloud),
        cwd=cloud,
    )
    wait_for(lambda: "going" in log_of(cloud, 0) and "going" in log_of(cloud, 1), process)
    try:
        assert holding(cloud, PIECE) == {f"worker{number}/crab_jax/environment": "0o600" for number in range(WORKERS)}
        shown = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert "--env=TOKEN" in shown and PIECE not in " ".join(shown)

        other = launch(cloud, *RUN, "--config.steps=3")  # what another person is told
        assert other.returncode == 2 and "another run is on it: python -u -m crab_jax.train" in other.stderr
        changed = launch(cloud, *RUN, f"--env=TOKEN={PIECE} is another")
        assert changed.returncode == 2 and "is on it: the same, with other values of --env" in changed.stderr
        less = launch(cloud, *RUN)
        assert less.returncode == 2 and "with other values" in less.stderr
        for done in (other, changed, less):
            assert PIECE not in done.stdout + done.stderr and done.stderr.count("\n") <= 2
        again = subprocess.Popen(
            [str(cloud / "repo" / "launch_tpu.sh"), *RUN, "--env=TOKEN"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(cloud, TOKEN=SECRET),
            cwd=cloud,
        )
        assert "step 1/2 of worker 0" in again.stdout.readline()
    finally:
        stopped = launch(cloud, "stop", *PLACE)
    out, err = process.communicate(timeout=60)
    out2, err2 = again.communicate(timeout=60)
    assert process.returncode == again.returncode == 0 and PIECE not in out + err + out2 + err2
    assert_nowhere(cloud, stopped)


@pytest.mark.parametrize("same", [False, True])
def test_a_run_of_an_older_launcher_is_known_and_its_values_are_not_told(cloud, same):
    """They stood in its file `command`."""
    home = cloud / "worker0" / "crab_jax"
    home.mkdir(parents=True)
    (cloud / "vm").write_text("READY")
    (home / "command").write_text(
        f"env 'TOKEN={PIECE} x' ../venv/bin/python -u -m crab_jax.train "
        "--config=configs/tiny.py --workdir=/mnt/runs/x\n"
    )
    (home / "log").write_text("step 1\n")
    with subprocess.Popen(["sleep", "60"]) as old:
        (home / "pid").write_text(str(old.pid))
        command = [str(cloud / "repo" / "launch_tpu.sh"), *RUN, f"--env=TOKEN={PIECE} {'x' if same else 'y'}"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cloud, env=environment(cloud)
        ) as ours:
            said = ours.stdout.readline()
            while said and "on the slice already" not in said and "another run is on it" not in said:
                said = ours.stdout.readline()
            ours.kill()
        old.kill()
    assert PIECE not in said
    assert ("on the slice already" in said) == same
    assert same or "another run is on it: python -u -m crab_jax.train" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([f"--env={PIECE}"], "--env: number 1"),
        (["--env=A=1", f"--env=={PIECE}"], "--env: number 2"),
        ([f"--env=1A={PIECE}"], "--env"),
        ([f"--env=A B={PIECE}"], "--env"),
        ([f"-env=TOKEN={PIECE}"], "'-env'"),
        ([f"TOKEN={PIECE}"], "'TOKEN'"),
        ([f"--evn=TOKEN={PIECE}"], "--evn is not a flag"),
        (["--env"], "--env"),
    ],
)
def test_a_mistyped_env_is_named_without_its_value(cloud, words, named):
    done = launch(cloud, *RUN, *words)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
    assert not calls(cloud)
    assert_nowhere(cloud, done)


def test_values_that_did_not_arrive_whole_start_nothing(cloud):
    (cloud / "odd").write_text("mktemp environment\ncut")
    done = launch(cloud, *RUN, f"--env=TOKEN={SECRET}")
    assert done.returncode == 1 and "the values of --env did not arrive" in done.stderr
    assert not runs_of(cloud, 0) and not runs_of(cloud, 1)
    assert_nowhere(cloud, done)


@pytest.mark.parametrize("word", ["set -e; mkdir", "echo set up", "mktemp environment", "setsid"])
def test_a_slice_that_is_lost_on_the_way_to_the_start_is_replaced(cloud, word):
    """At installing, setting up, handing over and starting."""
    (cloud / "odd").write_text(f"{word}\nlost")
    train_does(cloud, LOOK)
    done = launch(cloud, *RUN, f"--env=TOKEN={SECRET}", "--setup=echo set up")
    assert done.returncode == 0 and "restart 1 of" in done.stderr, done.stderr
    for worker in range(WORKERS):
        assert json.loads((cloud / f"seen{worker}").read_text())[0] == DIGEST
    assert_nowhere(cloud, done)


def test_a_start_that_gcloud_repeats_starts_one_run(cloud):
    """It repeats a command whose connection broke."""
    train_does(cloud, "time.sleep(2)")
    (cloud / "odd").write_text("setsid\ntwice")
    done = launch(cloud, *RUN, f"--env=TOKEN={SECRET}")
    assert done.returncode == 0 and len(runs_of(cloud, 0)) == len(runs_of(cloud, 1)) == 1, done.stderr


def test_links_that_wait_in_the_temporary_folder_are_not_followed(cloud):
    """A folder that others can write to, with links of the names that could be guessed."""
    commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=cloud / "repo", text=True).strip()
    (cloud / "tmp").mkdir()
    (cloud / "victim").write_text("precious")
    planted = [f"crab_jax-{commit}.tar.gz", "crab_jax", "environment", "errors"]
    for name in planted:
        (cloud / "tmp" / name).symlink_to(cloud / "victim")
    done = launch(cloud, *RUN, f"--env=TOKEN={SECRET}", TMPDIR=str(cloud / "tmp"))
    assert done.returncode == 0, done.stderr
    assert (cloud / "victim").read_text() == "precious"
    assert sorted(path.name for path in (cloud / "tmp").iterdir()) == sorted(planted)  # and nothing of ours stays


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_launcher_that_is_ended_leaves_no_temporary_files(cloud, sent):
    train_does(cloud, "time.sleep(3)")
    (cloud / "tmp").mkdir()
    process = subprocess.Popen(
        [str(cloud / "repo" / "launch_tpu.sh"), *RUN, f"--env=TOKEN={SECRET}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(cloud, TMPDIR=str(cloud / "tmp")),
        cwd=cloud,
    )
    wait_for(lambda: "step 1" in log_of(cloud, 0), process)
    assert len(list((cloud / "tmp").iterdir())) == 1
    os.killpg(process.pid, sent)
    process.communicate(timeout=60)
    assert list((cloud / "tmp").iterdir()) == []
    launch(cloud, "stop", *PLACE)


def test_a_temporary_folder_that_cannot_be_written_is_one_line(cloud):
    done = launch(cloud, *RUN, TMPDIR=str(cloud / "none"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {cloud}/none: no folder can be made")
    assert not calls(cloud)


# ---------------------------------------------------------------------------------------------- the same all through


def test_a_restart_installs_the_commit_that_the_run_began_with(cloud):
    """Work goes on in the checkout while a run is followed."""
    change = """
import subprocess
if len((cloud / f"train{worker}.jsonl").read_text().splitlines()) == 1 and worker == "0":
    (cloud / "repo" / "configs" / "tiny.py").write_text("# another\\n")
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "two"], cwd=cloud / "repo")
    (cloud / "vm").write_text("PREEMPTED"); sys.exit(1)
elif len((cloud / f"train{worker}.jsonl").read_text().splitlines()) == 1:
    time.sleep(1); sys.exit(1)
(cloud / f"config{worker}").write_text(Path("configs/tiny.py").read_text())
"""
    train_does(cloud, change)
    done = launch(cloud, *RUN)
    assert done.returncode == 0, done.stderr
    first, second = runs_of(cloud, 0)
    assert first == second and (cloud / "config0").read_text() == "# a config\n"


def test_workers_install_what_the_lists_name_by_hash(cloud):
    """A slice that replaces a preempted one has the same versions."""
    assert launch(cloud, *RUN).returncode == 0
    installs = [line.split(" ", 2) for line in (cloud / "installs").read_text().splitlines()]
    pip = [words for worker, _, words in installs if worker == "0" and words.startswith("pip ")]
    assert all("--require-hashes" in words or "--no-deps" in words for words in pip)
    assert any("/py311.txt" in words and "/py311-tpu.txt" in words for words in pip)
    lists = {word.rpartition("/")[2] for words in pip for word in words.split() if word.endswith(".txt")}
    assert all((REPOSITORY / "constraints" / name).exists() for name in lists) and len(lists) == 3


def pinned(path: Path) -> dict[str, str]:
    """Package -> version of a list in constraints/; each has a hash, and nothing names where to get them."""
    found: dict[str, str] = {}
    text = path.read_text()
    assert "make lock" in text.split("\n")[1] and "://" not in text and "--index" not in text, path
    for entry in re.sub(r"^#.*\n|\\\n", "", text, flags=re.MULTILINE).splitlines():
        requirement, *hashes = entry.split()
        hashes = [word for word in hashes if word.startswith("--hash=")]
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in hashes), (path, entry)
        name, _, version = requirement.partition("==")
        found[canonicalize_name(name.partition("[")[0])] = version
    return found


@pytest.mark.parametrize("python", ["py311", "py312", "py313"])
def test_lists_of_versions_satisfy_what_the_project_asks_for(python):
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    asked = [
        line
        for text in (setup["options"]["install_requires"], setup["options.extras_require"]["dev"])
        for line in text.splitlines()
        if line
    ]
    versions = pinned(REPOSITORY / "constraints" / f"{python}.txt")
    for requirement in map(Requirement, asked):
        assert canonicalize_name(requirement.name) in versions, f"{requirement} is new: make lock"
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    for extra in ("tpu", "cuda12", "cuda13"):
        added = pinned(REPOSITORY / "constraints" / f"{python}-{extra}.txt")
        assert all(versions.get(name, version) == version for name, version in added.items())
        assert added["jax"] == versions["jax"] and added.keys() - versions.keys()
    docs = pinned(REPOSITORY / "constraints" / f"{python}-docs.txt")
    assert all(versions.get(name, version) == version for name, version in docs.items())
    for requirement in map(Requirement, setup["options.extras_require"]["docs"].split()):
        assert requirement.specifier.contains(docs[canonicalize_name(requirement.name)]), f"{requirement}: make lock"
    assert pinned(REPOSITORY / "constraints" / "build.txt").keys() == {"setuptools"}
    assert pinned(REPOSITORY / "constraints" / "uv.txt").keys() == {"uv"}


def test_nothing_tells_to_install_a_name_that_is_not_ours():
    """`crab_jax` on a package index would be somebody else's."""
    files = [
        path
        for path in REPOSITORY.rglob("*")
        if path.suffix in (".md", ".py", ".sh", ".cfg", ".toml")
        and not path.is_relative_to(REPOSITORY / ".venv")
        and "runs" not in path.parts
    ]
    wrong = re.compile(r"(pip|uv)3? +install[^\n`;]*[ '\"]crab[_-]jax(\[|['\"` ]|$)", re.MULTILINE)
    assert len(files) > 50
    assert not [path for path in files if wrong.search(path.read_text())]


# ------------------------------------------------------------------------------------------------------------- SLURM

SRUN = r"""
import json, os, signal, sys, time
from pathlib import Path
cloud = Path(os.environ["FAKE_CLOUD"])
signal.signal(signal.SIGTERM, lambda *_: ((cloud / "srun_ended").touch(), sys.exit(int(os.environ.get("CODE", 0)))))
(cloud / "srun.json").write_text(json.dumps(sys.argv[1:]))
(cloud / "srun.env").write_text(os.environ.get("TOKEN", ""))
while os.environ.get("GO_ON"): time.sleep(0.1)
sys.exit(int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def slurm(cloud):
    """The fake of a SLURM cluster: srun records its arguments, scancel signals it, scontrol records."""
    (cloud / "srun.py").write_text(SRUN)
    script(
        cloud / "bin" / "srun", f'#!/bin/sh\necho $$ >{cloud}/srun.pid\nexec {sys.executable} -S {cloud}/srun.py "$@"\n'
    )
    script(cloud / "bin" / "scancel", f'#!/bin/sh\necho "$@" >>{cloud}/scancel\nkill -TERM "$(cat {cloud}/srun.pid)"\n')
    script(cloud / "bin" / "scontrol", f'#!/bin/sh\nls {cloud}/srun_ended && echo "$@" >{cloud}/scontrol\n')
    return cloud


def sbatch(slurm: Path, *words: str, **more: str) -> subprocess.Popen:
    words = words or ("--config=configs/tiny.py", *HARD)
    return subprocess.Popen(
        ["bash", "launch_slurm.sh", *words],
        cwd=slurm / "repo",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(slurm, SLURM_JOB_ID="17", PYTHON="py", **more),
    )


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_runs_train_once_per_task(slurm, code):
    assert sbatch(slurm, CODE=str(code)).wait(timeout=60) == code
    words = json.loads((slurm / "srun.json").read_text())
    train = words[words.index("py") :]
    assert train == ["py", "-u", "-m", "crab_jax.train", "--config=configs/tiny.py", *HARD]
    assert "--gpu-bind=none" in words  # JAX picks the GPU of the local rank among all of the node
    assert not (slurm / "scontrol").exists()


def test_slurm_runs_evaluate_too(slurm):
    assert sbatch(slurm, "evaluate", "--checkpoint", "a b", CODE="0").wait(timeout=60) == 0
    words = json.loads((slurm / "srun.json").read_text())
    assert words[words.index("py") :] == ["py", "-u", "-m", "crab_jax.evaluate", "--checkpoint", "a b"]


@pytest.mark.parametrize(
    "words", [[f"--env=TOKEN={PIECE}"], ["--env", f"TOKEN={PIECE}"], ["evaluate", f"--env=TOKEN={PIECE}"]]
)
def test_slurm_refuses_values_among_the_arguments_of_a_job(slurm, words):
    """scontrol shows these to every user; the environment of sbatch is handed over instead."""
    job = sbatch(slurm, *words)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 2 and err.startswith("error: --env: ") and err.count("\n") == 1
    assert PIECE not in out + err and not (slurm / "srun.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--env=NOT_EXPORTED"], "--env: names a variable that is not set"),
        (["--max-restarts=soon"], "--max-restarts"),
        (["--", "predict"], "predict"),
    ],
)
def test_slurm_refuses_wrong_flags_of_a_run(slurm, words, named):
    job = sbatch(slurm, *words)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2 and named in err and err.count("\n") == 1 and not (slurm / "srun.json").exists()


def test_slurm_hands_the_environment_on(slurm):
    job = sbatch(slurm, CODE="0", TOKEN=SECRET)
    out, err = job.communicate(timeout=60)
    assert (slurm / "srun.env").read_text() == SECRET
    assert PIECE not in out + err + (slurm / "srun.json").read_text()


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_requeues_after_the_run_ended_on_a_signal(slurm, sent):
    """At the time limit the batch shell gets USR1, at a preemption TERM; train gets TERM and time to save."""
    job = sbatch(slurm, GO_ON="yes", CODE="143")
    wait_for((slurm / "srun.json").exists, job)
    job.send_signal(sent)
    assert job.wait(timeout=60) == 143
    assert (slurm / "scancel").read_text() == "--signal=TERM 17\n"
    assert (slurm / "scontrol").read_text() == "requeue 17\n"  # after srun had ended, or the fake would refuse


def test_slurm_gives_up_after_so_many_restarts(slurm):
    words = ("--config=configs/tiny.py", *HARD, "--max-restarts=3")
    job = sbatch(slurm, *words, GO_ON="yes", CODE="143", SLURM_RESTART_COUNT="3")
    wait_for((slurm / "srun.json").exists, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 143 and not (slurm / "scontrol").exists()
    assert "--max-restarts=3" not in json.loads((slurm / "srun.json").read_text())


def test_slurm_asks_for_as_many_tasks_as_gpus_and_for_a_warning():
    options = dict(
        line[len("#SBATCH --") :].strip().partition("=")[::2]
        for line in (REPOSITORY / "launch_slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("B:USR1@") and "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize("name", ["launch_tpu.sh", "launch_slurm.sh"])
def test_scripts_are_well_formed(name):
    assert subprocess.run(["bash", "-n", REPOSITORY / name]).returncode == 0
    assert os.access(REPOSITORY / name, os.X_OK)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck:
        found = subprocess.run([shellcheck, REPOSITORY / name], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
