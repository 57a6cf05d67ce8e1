"""Folders that are locked while they are written, files that are there whole or not at all, disks that are full."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crab_jax.io import files, locks
from crab_jax.io.errors import InputError, run_verb

HOLD = """
import sys, time
from crab_jax.io import locks
from crab_jax.io.errors import run_verb
def main():
    with locks.locked(sys.argv[1], "--workdir", use=sys.argv[2], share=int(sys.argv[3])):
        print("mine", flush=True)
        time.sleep(float(sys.argv[4]))
run_verb(main)
"""


def holder(folder: Path, use: str = "", share: int = 0, seconds: float = 60) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), use, str(share), str(seconds)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def held(tmp_path):
    """A folder and the process that has locked it."""
    process = holder(tmp_path / "run")
    assert process.stdout.readline() == "mine\n"
    yield tmp_path / "run", process
    process.kill()
    process.communicate()


def test_a_second_comer_is_told_who_has_the_folder(held):
    folder, process = held
    second = holder(folder)
    said = second.communicate(timeout=60)[1].splitlines()
    assert second.returncode == 2 and len(said) == 1
    host = os.uname().nodename
    assert f"[--workdir]: is in use by process {process.pid} on {host} since 2" in said[0], said


def test_a_lock_is_given_free_at_the_end_and_after_an_error(tmp_path):
    for _ in range(2):
        with contextlib.suppress(KeyError), locks.locked(tmp_path):
            assert (tmp_path / ".lock.0").is_file()
            raise KeyError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_replaced_at_once(held, capsys):
    folder, process = held
    process.kill()  # it is not waited for: a zombie holds nothing
    time.sleep(0.2)
    began = time.monotonic()
    with locks.locked(folder):
        assert time.monotonic() - began < 2
    assert f"process {process.pid}" in capsys.readouterr().err


def test_a_new_process_with_the_old_ones_id_is_another_one(tmp_path):
    with locks.locked(tmp_path):
        owner = json.loads((tmp_path / ".lock.0").read_text())
    (tmp_path / ".lock.0").write_text(json.dumps(owner | {"started": "1"}))  # this process's id, another start
    with locks.locked(tmp_path):
        pass


def of_another_machine(folder: Path) -> Path:
    """A lock that was left by a process of another machine, just now."""
    with locks.locked(folder):
        owner = json.loads((folder / ".lock.0").read_text())
    lock = folder / ".lock.0"
    lock.write_text(json.dumps(owner | {"host": "node7", "machine": "node7 x y", "pid": 1}))
    return lock


def test_a_requeued_job_waits_until_the_lock_of_another_machine_is_stale(tmp_path, monkeypatch, capsys):
    of_another_machine(tmp_path)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)
    began = time.monotonic()
    with locks.locked(tmp_path):
        assert 0.9 < time.monotonic() - began < 5
    said = capsys.readouterr().err
    assert "process 1 on node7" in said and "waiting up to 1 s" in said


def test_a_lock_of_another_machine_that_is_refreshed_is_in_use(tmp_path, monkeypatch):
    lock = of_another_machine(tmp_path)
    monkeypatch.setattr(locks, "STALE_SECONDS", 5.0)
    threading.Timer(0.7, os.utime, (lock,)).start()
    with pytest.raises(InputError, match="in use by process 1 on node7"), locks.locked(tmp_path):
        pass
    assert json.loads(lock.read_text())["pid"] == 1, "the lock stays"
    os.utime(lock, (time.time() - 6, time.time() - 6))
    with locks.locked(tmp_path):
        pass


def test_a_lock_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with locks.locked(tmp_path):
        lock = tmp_path / ".lock.0"
        os.utime(lock, (0, 0))
        time.sleep(0.5)
        assert lock.stat().st_mtime > 1
        lock.unlink()  # a person cleaned up: it comes back
        time.sleep(0.5)
        assert lock.is_file()
    assert not lock.exists()


def test_a_process_whose_folder_was_taken_over_while_it_slept_ends(tmp_path):
    slow = HOLD.replace("def main", "locks.BEAT_SECONDS = 0.5\ndef main")
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(tmp_path), "", "0", "60"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "mine\n"
    owner = json.loads((tmp_path / ".lock.0").read_text())
    (tmp_path / ".lock.0").write_text(json.dumps(owner | {"pid": os.getpid(), "host": "node8"}))
    assert "taken over by" in process.communicate(timeout=30)[1] and process.returncode == 2
    assert "node8" in (tmp_path / ".lock.0").read_text()


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("left", [False, True], ids=["free", "left over"])
def test_of_many_that_start_at_once_one_passes(tmp_path, links, left):
    folder = tmp_path / "run"
    folder.mkdir()
    if left:
        with locks.locked(folder):
            owner = json.loads((folder / ".lock.0").read_text())
        (folder / ".lock.0").write_text(json.dumps(owner | {"started": "1"}))
    code = (
        ("" if links else "def link(*a):\n    raise OSError(95, 'no')\nimport os\nos.link = link\n")
        + """
import sys, time
from pathlib import Path
from crab_jax.io import locks
from crab_jax.io.errors import run_verb
def wait_for(name):
    while not Path(name).exists():
        time.sleep(0.001)
def main():
    print("ready", flush=True)
    wait_for(sys.argv[2] + "/go")
    with locks.locked(sys.argv[1]):
        wait_for(sys.argv[2] + "/end")
run_verb(main)
"""
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(tmp_path)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 6
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "end").touch()
    said = [process.communicate(timeout=60)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2, 2, 2, 2, 2], said
    assert not list(folder.iterdir())


def test_shares_of_one_use_go_together_and_others_do_not(tmp_path):
    with locks.locked(tmp_path, use="2 x", share=0):
        beside = holder(tmp_path, "2 x", 1, 0)
        assert beside.communicate(timeout=60)[0] == "mine\n" and beside.returncode == 0
        for use, share in (("2 y", 1), ("3 x", 2), ("", 0), ("2 x", 0), ("", 1)):
            other = holder(tmp_path, use, share, 0)
            assert "is in use by" in other.communicate(timeout=60)[1] and other.returncode == 2, (use, share)
    with locks.locked(tmp_path, use="2 y", share=1):
        pass


def test_one_that_is_to_share_and_differs_is_told_in_what(tmp_path):
    """As the processes of one evaluation, whose uses are objects."""
    told = rf"share {tmp_path} \[--limit\]: is 4, of process {os.getpid()} on .* it is 3; start all with the same"
    with (
        locks.locked(tmp_path, use='{"processes": 2, "--limit": 3}', share=0),
        pytest.raises(InputError, match=told),
        locks.locked(tmp_path, use='{"processes": 2, "--limit": 4}', share=1),
    ):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"pid": 1}', b"\xff\xfe"])
def test_a_lock_that_cannot_be_read_is_waited_for_and_then_left_over(tmp_path, monkeypatch, content):
    (tmp_path / ".lock.0").write_bytes(content)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.3)
    with locks.locked(tmp_path):
        pass


def test_sigterm_leaves_a_lock_that_the_next_process_replaces(held):
    folder, process = held
    process.send_signal(signal.SIGTERM)
    process.wait()
    with locks.locked(folder):
        pass


# Disks and consoles.

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_writes(monkeypatch, error: OSError = FULL) -> None:
    def write_bytes(self, data):
        self.touch()  # a full disk makes the file and takes nothing
        raise error

    def fsync(descriptor):
        raise error  # or says so when it is asked to keep what it took

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_told_before_the_work_and_leaves_nothing(tmp_path, monkeypatch):
    refuse_writes(monkeypatch)
    for make in (files.out_folder, lambda out: locks.locked(out).__enter__()):
        with pytest.raises(InputError, match=r"\[--out\]: cannot be written \(No space left on device\); make room"):
            make(tmp_path)
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "x.json", "{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights can be tried by root only")
def test_a_folder_that_exists_and_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o555)
    code = (
        "import sys\nfrom crab_jax.io import locks\nfrom crab_jax.io.errors import run_verb\n"
        "run_verb(lambda: locks.locked(sys.argv[1]).__enter__())"
    )
    done = subprocess.run(
        [
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-all",
            sys.executable,
            "-c",
            code,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "cannot be written (Permission denied)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device; make room"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x/\xff"), "Permission denied; check the path"),
        (
            ValueError("RESOURCE_EXHAUSTED: No space left on device [source locations]"),
            "the disk: No space left on device",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a file: Disk quota exceeded; make room"),
    ],
)
def test_what_a_disk_does_is_one_line(error, said, capsys):
    def main():
        raise RuntimeError("a library's own words") from error

    with pytest.raises(SystemExit) as stop:
        run_verb(main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_a_mistake_in_the_program_stays_a_traceback(capsys):
    def main():
        try:
            Path("/nowhere/at/all").read_text()
        except OSError:
            {}["x"]

    with pytest.raises(SystemExit) as stop:
        run_verb(main)
    assert stop.value.code == 1 and "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_console_that_cannot_show_a_name_escapes_it(encoding):
    code = "from crab_jax.io.errors import run_verb\nrun_verb(lambda: print('crab \\U0001f980 \\udcff', flush=True))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0 and done.stdout == b"crab \\U0001f980 \\udcff\n", done.stderr


def test_output_that_nobody_reads_ends_quietly():
    code = "from crab_jax.io.errors import run_verb\nrun_verb(lambda: [print('x' * 1000) for _ in range(10000)])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_a_log_on_a_full_disk_is_one_line():
    code = "from crab_jax.io.errors import run_verb\nrun_verb(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: a file: No space left on device; make room, then start again"
    ]


def test_streams_without_an_encoding_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        run_verb(lambda: print("\U0001f980"))
    assert stop.value.code == 0 and sys.stdout.getvalue() == "\U0001f980\n"


def test_a_file_may_be_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    order, held = [], threading.Event()

    def first():
        with locks.locked_file(tmp_path / "plan.json"):
            held.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with pytest.raises(InputError, match="is in use by process"), locks.locked_file(tmp_path / "plan.json"):
        pass
    with locks.locked_file(tmp_path / "plan.json", wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"] and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("waiting for process") == 1
