"""launch_tpu.sh against a fake gcloud that keeps slices in files and runs `ssh --command` in a folder per worker;
launch_slurm.sh against a fake srun. Nothing here reaches a cloud.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
WORKERS = 2

# One fake of the whole cloud. Its folder holds calls.jsonl (every argv), vm and queue (states; no file = no resource),
# next_queue (states that a queued resource goes through, one per look), fail (a word: calls that hold it fail), and
# worker0, worker1 (homes). A run that finds its slice gone sees ssh fail, as it would.
GCLOUD = r'''
import json, os, subprocess, sys
from pathlib import Path

cloud, argv = Path(os.environ["FAKE_CLOUD"]), sys.argv[1:]
vm, queue, waiting = cloud / "vm", cloud / "queue", cloud / "next_queue"
with open(cloud / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")
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
            codes.append(subprocess.call(["bash", "-c", flags["command"]], cwd=home,
                                         env={**os.environ, "HOME": str(home), "WORKER": str(worker)}))
    sys.exit(next((code for code in codes if code), 0))
else:
    sys.exit(f"ERROR: (gcloud) no such command: {argv}")
'''

# What installs on a worker: a python that records its argv and does what the file `train` in the cloud's folder says.
UV = r'''#!/bin/sh
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin"
    cp "$FAKE_CLOUD/train" "$folder/bin/python"
fi
echo "$WORKER uv $*" >>"$FAKE_CLOUD/installs"
'''
TRAIN = r'''#!PYTHON -S
import json, os, signal, sys, time
from pathlib import Path
cloud, worker = Path(os.environ["FAKE_CLOUD"]), os.environ["WORKER"]
home = Path(os.environ["HOME"])
with open(cloud / f"train{worker}.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("NOTE")]) + "\n")
print("step 1/2 of worker", worker)
BODY
print("step 2/2")
'''


@pytest.fixture
def cloud(tmp_path):
    """The fake cloud's folder, with `gcloud` and `uv` in bin/ and a small repository in repo/."""
    repo, bin_dir = tmp_path / "repo", tmp_path / "bin"
    bin_dir.mkdir()
    (repo / "configs").mkdir(parents=True)
    (repo / "configs" / "tiny.py").write_text("# a config\n")
    for name in ("launch_tpu.sh", "launch_slurm.sh"):
        shutil.copy(REPOSITORY / name, repo / name)
    for words in (["init", "-q"], ["add", "."],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"]):
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
    return {**os.environ, "PATH": path, "FAKE_CLOUD": str(cloud), "PYTHON": "no local check", "TMPDIR": str(cloud),
            **more}


PLACE = ["--name=crab", "--zone=us-west4-a"]
SLICE = [*PLACE, "--type=v5e:4x4", "--poll=0"]
RUN = ["run", *SLICE, "--config=configs/tiny.py", "--workdir=/mnt/runs/x"]


def launch(cloud: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(cloud / "repo" / "launch_tpu.sh"), *words], capture_output=True, text=True, timeout=120,
                          env=environment(cloud, **more), cwd=cloud)


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
    parsed = text[text.index("parse() {"):text.index("number() {")]
    flags = {word.rstrip(")").strip() for line in parsed.splitlines() for word in line.split("|")
             for word in [word.strip().split(")")[0]] if word.startswith("--") and " " not in word}
    assert len(flags) > 12
    for flag in flags - {"--*", "--config.*"}:
        assert flag in done.stdout, flag
    assert "./launch_tpu.sh run --name=" in done.stdout


@pytest.mark.parametrize(("changed", "named"), [
    (["--name=Crab_1"], "--name"), (["--name="], "--name"), (["--zone=moon"], "--zone"), (["--type=v9:4x4"], "--type"),
    (["--type=v5e"], "--type"), (["--type=v5e:4x"], "--type"), (["--config=configs/none.py"], "configs/none.py"),
    (["--config=configs/new.py"], "not in commit"), (["--workdir=runs/x"], "--workdir"), (["--workdir="], "--workdir"),
    (["--wrokdir=/mnt/x"], "--wrokdir"), (["--env=NOTE"], "--env"), (["--poll=soon"], "--poll"), (["tpu"], "tpu"),
    (["--spot", "--reserved"], "--spot"), (["--setup"], "--setup"),
])
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

@pytest.mark.parametrize(("given", "accelerator", "runtime"), [
    ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"), ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base"),
    ("v5p:2x2x4", "v5p-32", "v2-alpha-tpuv5"), ("v5p-32", "v5p-32", "v2-alpha-tpuv5"),
])
def test_types_by_topology_or_by_name(cloud, given, accelerator, runtime):
    """v4 and v5p are named by TensorCores, two per chip; the others by chips (Cloud TPU documentation)."""
    assert launch(cloud, "create", *SLICE, f"--type={given}").returncode == 0
    create = next(argv for argv in calls(cloud) if argv[3] == "create")
    assert f"--accelerator-type={accelerator}" in create and f"--version={runtime}" in create


# --------------------------------------------------------------------------------------------------------------- run

HARD = ["--config.data.root=/mnt/it's \"my\" data", "--config.tokenizer=$HOME/`x`; rm *", "--config.fresh=('a b', 'c')",
        "--config.init_from="]


def test_run_creates_installs_and_runs_on_all_workers(cloud):
    done = launch(cloud, *RUN, *HARD, "--setup=mkdir -p 'a b' && echo \"$WORKER\" >'a b/it'", "--env=NOTE=two 'words'",
                  "--spot", "--project=p", "--create-flag=--network=tpus", "--ssh-flag=--internal-ip")
    assert done.returncode == 0, done.stderr
    create = next(argv for argv in calls(cloud) if argv[3] == "create")
    assert {"--spot", "--project=p", "--network=tpus", "--zone=us-west4-a"} <= set(create)
    assert all("--internal-ip" in argv and "--project=p" in argv for argv in calls(cloud) if argv[3] in ("ssh", "scp"))
    for worker in range(WORKERS):
        (argv, where, note), = runs_of(cloud, worker)
        assert argv == ["-u", "-m", "crab_jax.train", "--config=configs/tiny.py", *HARD, "--workdir=/mnt/runs/x"]
        assert note == "two 'words'"
        assert (Path(where) / "configs" / "tiny.py").read_text() == "# a config\n"
        assert (cloud / f"worker{worker}" / "a b" / "it").read_text() == f"{worker}\n"
    assert "step 1/2 of worker 0\nstep 2/2\n" in done.stdout  # the log of worker 0, whole
    assert "[tpu]" in (cloud / "installs").read_text()


def test_buckets_are_mounted_and_named_by_their_mount(cloud):
    for tool, status in (("sudo", 0), ("mountpoint", 1), ("gcsfuse", 0)):
        script(cloud / "bin" / tool, f'#!/bin/sh\necho "$WORKER {tool} $*" >>"$FAKE_CLOUD/mounts"\nexit {status}\n')
    done = launch(cloud, *RUN, "--config.data.root=gs://media/av", "--config.init_from=gs://crab-1/base",
                  "--workdir=gs://crab-1/runs/x")
    assert done.returncode == 0, done.stderr
    assert runs_of(cloud, 1)[0][0][-3:] == ["--config.data.root=/mnt/gs/media/av",
                                            "--config.init_from=/mnt/gs/crab-1/base", "--workdir=/mnt/gs/crab-1/runs/x"]
    mounted = [line.split()[0] + " " + line.split()[-1] for line in (cloud / "mounts").read_text().splitlines()
               if line.split()[1] == "gcsfuse"]
    assert sorted(mounted) == ["0 /mnt/gs/crab-1", "0 /mnt/gs/media", "1 /mnt/gs/crab-1", "1 /mnt/gs/media"]


EVALUATE = ["run", *SLICE, "--", "evaluate", "--checkpoint=/mnt/runs/x"]


@pytest.mark.parametrize("out", [["--out=gs://crab-1/test"], ["--out", "gs://crab-1/test"]])
def test_evaluate_runs_on_all_workers(cloud, out):
    for tool in ("sudo", "mountpoint", "gcsfuse"):
        script(cloud / "bin" / tool, "#!/bin/sh\n")
    done = launch(cloud, *EVALUATE, "--data", "gs://media/av", "--mute-audio", *out)
    assert done.returncode == 0, done.stderr
    assert "done: /mnt/gs/crab-1/test" in done.stderr
    for worker in range(WORKERS):
        (argv, _, _), = runs_of(cloud, worker)
        mounted = [word.replace("gs://", "/mnt/gs/") for word in out]
        assert argv == ["-u", "-m", "crab_jax.evaluate", "--checkpoint=/mnt/runs/x", "--data", "/mnt/gs/media/av",
                        "--mute-audio", *mounted]


@pytest.mark.parametrize(("words", "named"), [
    (EVALUATE, "--out"), ([*EVALUATE, "--out=runs/x"], "--out"), ([*SLICE, "--", "train"], "'train' follows --"),
    ([*RUN[1:], "--", "evaluate", "--out=/mnt/x"], "--config"), ([*SLICE, "--"], "--")])
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


def test_a_bucket_without_gcsfuse_says_what_to_do(cloud):
    if shutil.which("gcsfuse"):
        pytest.skip("gcsfuse is installed here")
    done = launch(cloud, *RUN[:-1], "--workdir=gs://crab/runs/x")
    assert done.returncode == 1 and "install it in --setup" in done.stderr and not runs_of(cloud, 0)


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
    train_does(cloud, PREEMPTED_ONCE.replace('(cloud / "vm").write_text("PREEMPTED")', "pass").replace(
        "sys.exit(CODE)", end))
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
    process = subprocess.Popen([str(cloud / "repo" / "launch_tpu.sh"), *RUN], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=environment(cloud), cwd=cloud)
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
    again = subprocess.Popen([str(cloud / "repo" / "launch_tpu.sh"), *RUN], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env=environment(cloud), cwd=cloud)
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
    words = [*RUN, *HARD, "--setup=echo \"it's\" >done", "--env=NOTE=a b"]
    printed = launch(cloud, *words, "--dry-run")
    assert printed.returncode == 0 and not calls(cloud)
    pasted = subprocess.run(["bash"], input=printed.stdout, capture_output=True, text=True, cwd=cloud / "repo",
                            env=environment(cloud), timeout=120)
    by_hand = [argv[2:] for argv in calls(cloud)]
    (argv, _, note), = runs_of(cloud, 1)
    assert argv[3:] == ["--config=configs/tiny.py", *HARD, "--workdir=/mnt/runs/x"] and note == "a b", pasted.stderr
    assert (cloud / "worker1" / "done").read_text() == "it's\n"

    launch(cloud, "delete", *PLACE)
    (cloud / "calls.jsonl").unlink()
    assert launch(cloud, *words).returncode == 0
    assert [argv[2:] for argv in calls(cloud)] == by_hand


def test_dry_run_of_a_queued_run_needs_no_gcloud(cloud):
    (cloud / "bin" / "gcloud").unlink()
    done = launch(cloud, *RUN, "--queued", "--dry-run", "--spot")
    words = shlex.split(done.stdout, comments=True)
    create = words.index("create")
    assert done.returncode == 0 and words[create - 4:create] == ["gcloud", "compute", "tpus", "queued-resources"]
    assert {"--spot", "--node-id=crab"} <= set(words[create:create + 8])


# ------------------------------------------------------------------------------------------------------------- SLURM

SRUN = r'''
import json, os, signal, sys, time
from pathlib import Path
cloud = Path(os.environ["FAKE_CLOUD"])
signal.signal(signal.SIGTERM, lambda *_: ((cloud / "srun_ended").touch(), sys.exit(int(os.environ.get("CODE", 0)))))
(cloud / "srun.json").write_text(json.dumps(sys.argv[1:]))
while os.environ.get("GO_ON"): time.sleep(0.1)
sys.exit(int(os.environ.get("CODE", 0)))
'''


@pytest.fixture
def slurm(cloud):
    """The fake of a SLURM cluster: srun records its arguments, scancel signals it, scontrol records."""
    (cloud / "srun.py").write_text(SRUN)
    script(cloud / "bin" / "srun", f"#!/bin/sh\necho $$ >{cloud}/srun.pid\n"
                                   f'exec {sys.executable} -S {cloud}/srun.py "$@"\n')
    script(cloud / "bin" / "scancel", f'#!/bin/sh\necho "$@" >>{cloud}/scancel\nkill -TERM "$(cat {cloud}/srun.pid)"\n')
    script(cloud / "bin" / "scontrol", f'#!/bin/sh\nls {cloud}/srun_ended && echo "$@" >{cloud}/scontrol\n')
    return cloud


def sbatch(slurm: Path, *words: str, **more: str) -> subprocess.Popen:
    words = words or ("--config=configs/tiny.py", *HARD)
    return subprocess.Popen(["bash", "launch_slurm.sh", *words], cwd=slurm / "repo",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment(slurm, SLURM_JOB_ID="17", PYTHON="py", **more))


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_runs_train_once_per_task(slurm, code):
    assert sbatch(slurm, CODE=str(code)).wait(timeout=60) == code
    words = json.loads((slurm / "srun.json").read_text())
    train = words[words.index("py"):]
    assert train == ["py", "-u", "-m", "crab_jax.train", "--config=configs/tiny.py", *HARD]
    assert "--gpu-bind=none" in words  # JAX picks the GPU of the local rank among all of the node
    assert not (slurm / "scontrol").exists()


def test_slurm_runs_evaluate_too(slurm):
    assert sbatch(slurm, "evaluate", "--checkpoint", "a b", CODE="0").wait(timeout=60) == 0
    words = json.loads((slurm / "srun.json").read_text())
    assert words[words.index("py"):] == ["py", "-u", "-m", "crab_jax.evaluate", "--checkpoint", "a b"]


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_requeues_after_the_run_ended_on_a_signal(slurm, sent):
    """At the time limit the batch shell gets USR1, at a preemption TERM; train gets TERM and time to save."""
    job = sbatch(slurm, GO_ON="yes", CODE="143")
    wait_for((slurm / "srun.json").exists, job)
    job.send_signal(sent)
    assert job.wait(timeout=60) == 143
    assert (slurm / "scancel").read_text() == "--signal=TERM 17\n"
    assert (slurm / "scontrol").read_text() == "requeue 17\n"  # after srun had ended, or the fake would refuse


def test_slurm_asks_for_as_many_tasks_as_gpus_and_for_a_warning():
    options = dict(line[len("#SBATCH --"):].strip().partition("=")[::2]
                   for line in (REPOSITORY / "launch_slurm.sh").read_text().splitlines() if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("B:USR1@") and "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize("name", ["launch_tpu.sh", "launch_slurm.sh"])
def test_scripts_are_well_formed(name):
    assert subprocess.run(["bash", "-n", REPOSITORY / name]).returncode == 0
    assert os.access(REPOSITORY / name, os.X_OK)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", REPOSITORY / name], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
