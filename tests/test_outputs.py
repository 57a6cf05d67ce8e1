"""What verbs write: where it cannot be, they say so in one line before any work; a disk that is full, at whatever
moment, costs what was not written yet and nothing else."""

import json
import os
import resource
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.aot import compile_cache
from crab_jax.checkpoints import run_steps
from crab_jax.io import files
from crab_jax.io.errors import InputError, find_input_error
from crab_jax.training import metrics_log
from tests.programs import kills
from tests.test_bounds import COMMANDS, run
from tests.test_flipped_bits import FROZEN, abstract, same, train_tree

OUT = {name: command for name, command in COMMANDS.items() if any("OUT" in word for word in command[1])} | {
    "train": ("crab_jax.train", ["--config=configs/tiny.py", "--workdir=OUT"]),
    "compare": ("crab_jax.compare", ["nowhere", "nowhere", "--out", "OUT/x"]),
    "recipe": ("crab_jax.recipe", ["--out", "OUT"]),
    "stages": ("crab_jax.stages", ["--out", "OUT"]),
    "demo": ("crab_jax.demo", ["--out", "OUT"]),
    "pack": ("crab_jax.recipe", ["--out", "ELSEWHERE", "--pack", "OUT"]),
    "own": ("data_pipelines.__main__", ["own", "--csv", "TABLE", "--root", "OUT", "--copy"]),
    "status": ("data_pipelines.__main__", ["status", "--root", "nowhere", "--json", "OUT/x"]),
    "validate": ("data_pipelines.__main__", ["validate", "--root", "nowhere", "--json", "OUT/x"]),
    "annotate journal": (
        "data_pipelines.av_uie.__main__",
        [
            "annotate",
            "--examples",
            "LIST",
            "--url",
            "http://h/v1",
            "--model",
            "m",
            "--out",
            "ELSEWHERE/x",
            "--journal",
            "OUT/x",
        ],
    ),
}
OUT |= {"scenes": ("data_pipelines.sources.scenes", ["--out", "OUT"])}  # all else of it is right
PLACES = {
    "a file": "is no folder",
    "below a file": "Not a directory",
    "a dangling link": "is a link to",
    "/": "folder of the system",
    "/proc": "folder of the system",
    "/proc/self": "folder of the system",
    "/sys/x": "folder of the system",
    "/dev": "folder of the system",
    "a link to /dev": "folder of the system",
    "a read-only disk": "Read-only file system",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders that nothing can be written to, by their kinds."""
    base = tmp_path_factory.mktemp("places")
    (base / "file").write_text("mine")
    (base / "dangling").symlink_to(base / "nowhere")
    (base / "linked").symlink_to("/dev")
    found = {
        "a file": base / "file",
        "below a file": base / "file" / "x",
        "a dangling link": base / "dangling",
        "a link to /dev": base / "linked",
    }
    try:
        with kills.small_disk(base / "disk", 1 << 20) as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            yield found | {"a read-only disk": disk}
    except PermissionError:
        yield found
    assert (base / "file").read_text() == "mine" and not (base / "nowhere").exists()


@pytest.mark.parametrize("name", OUT)
def test_no_verb_begins_where_it_cannot_write(name, places, tmp_path, monkeypatch, capsys):
    module, words = OUT[name]
    (tmp_path / "list").write_text('{"id": "a", "task": "ave", "instruction": "?", "target": "x"}\n')
    (tmp_path / "table").write_text("task,media,question,answer\navqa,x.mp4,How many?,two\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inside = any("OUT/x" in word for word in words)  # a file in a folder: / may have one
    for kind, problem in PLACES.items():
        place = places.get(kind, kind if kind.startswith("/") else None)
        if place is None or inside and kind == "/":
            continue
        given = [
            word.replace("OUT", str(place))
            .replace("ELSEWHERE", str(tmp_path / "else"))
            .replace("LIST", str(tmp_path / "list"))
            .replace("TABLE", str(tmp_path / "table"))
            for word in words
        ]
        code, said = run(module, given, monkeypatch, capsys)
        assert (code, len(said)) == (2, 1), (kind, said)
        assert problem in said[0] and str(place) in said[0], (kind, said)


def test_a_file_that_is_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", "/dev/stdout"):
        with pytest.raises(InputError, match="device|folder of the system"):
            files.out_file(path)


# Files.


@pytest.fixture
def short_files():
    """No file of this process may be longer than 8 KB, as on a disk that is full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, short_files):
    path = tmp_path / "metrics.jsonl"
    for number in range(3):
        files.append_line(path, {"n": number, "text": "x" * 3000})
        if number == 1:
            before = path.read_bytes()
            with pytest.raises(OSError) as error:
                files.append_line(path, {"text": "y" * 3000})
            assert str(path) in str(find_input_error(error.value)) and path.read_bytes() == before
            break
    files.append_line(path, {"short": True})
    assert [json.loads(line).get("n") for line in path.read_text().splitlines()] == [0, 1, None]


@pytest.mark.parametrize("old", [b"", b"old"])
def test_what_is_not_written_to_its_end_leaves_what_was_there(old, tmp_path, short_files):
    path = tmp_path / "page.html"
    path.write_bytes(old)
    with pytest.raises(OSError) as error:
        files.write_whole(path, "x" * 10_000)
    assert str(find_input_error(error.value)) == f"{path}: File too large; make room, then start again"
    with pytest.raises(OSError) as error, files.whole(path) as partial:
        (tmp_path / "source").write_bytes(b"z")
        os.rename(tmp_path / "none", partial)
    assert ".partial" not in str(find_input_error(error.value))
    assert path.read_bytes() == old and sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "source"]


def test_what_killed_processes_left_of_a_large_file_goes_when_it_is_old(tmp_path):
    old, new = (tmp_path / f".model.{number}.partial.bin" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * 3600))
    with files.whole(tmp_path / "model.bin") as partial:
        partial.write_bytes(b"all")
    assert sorted(p.name for p in tmp_path.iterdir()) == [new.name, "model.bin"]


def test_room_is_looked_for_before_the_work(tmp_path, monkeypatch):
    files.need_room(tmp_path, 1 << 10, "the model")
    with pytest.raises(InputError, match=r"\[--out\]: its disk has .* free, the model takes at least 1152921\.5 TB"):
        files.need_room(tmp_path, 1 << 60, "the model")
    free = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))  # a disk that does not say its size
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    files.need_room(tmp_path, 1 << 60, "the model")


# Checkpoints.


def test_a_step_that_did_not_fit_ends_the_run_at_once_and_the_one_before_is_restored(tmp_path, capfd):
    saved = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    saved.save_frozen(FROZEN, {})
    saved.save(3, train_tree(3))
    saved.wait()
    saved = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = train_tree(6)
    large["trainable"]["q"]["w"] = jnp.asarray(np.random.default_rng(0).normal(size=(400, 300)), jnp.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        saved.save(6, large)
        deadline = time.monotonic() + 60
        with pytest.raises(Exception) as error:
            while time.monotonic() < deadline:
                saved.raise_failed()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = str(find_input_error(error.value))
    assert f"{tmp_path}/checkpoints/6" in found and "File too large; make room, then start again" in found
    assert "Traceback" not in capfd.readouterr().err
    again = run_steps.RunCheckpoints(tmp_path / "checkpoints")
    assert again.latest == 3 and same(again.restore(abstract(train_tree(0))), train_tree(3))
    assert same(again.load_frozen(abstract(FROZEN)), FROZEN)
    again.save(6, train_tree(6))
    again.wait()
    assert run_steps.RunCheckpoints(tmp_path / "checkpoints").latest == 6


def test_tensorboard_on_a_full_disk_is_an_error_and_no_endless_wait(tmp_path):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom crab_jax.io.errors import run_verb\n"
        "from crab_jax.training.metrics_log import Board\nboard = Board(Path(sys.argv[1]), 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000,) * 2)\n"
        "run_verb(lambda: [board.add(step, {f'{n}': 0.5 for n in range(20)}) for step in range(1000)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2 and "File too large" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    board = metrics_log.Board(tmp_path, 4)
    board.add(5, {"loss": 1.5})
    board.close()
    data, events = next(tmp_path.iterdir()).read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events] == [0, 5, 5]
    assert events[1].session_log.status == 1 and events[2].summary.value[0].tag == "loss"


# Verbs.


@pytest.fixture(scope="module")
def battery(tmp_path_factory):
    """Verbs that are disturbed (tests/programs/kills.py; docs/reliability.md has the figures of all)."""
    battery = kills.Battery(tmp_path_factory.mktemp("kills"), seed=1)
    kills.make_base(battery.base, "http://127.0.0.1:9/v1")
    return battery


@pytest.mark.slow
def test_a_verb_that_was_killed_comes_to_the_same_result(battery):
    times, good = battery.kill("prepare", first=1, most=2)
    assert times and good, battery.failed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "av_uie verify"])
def test_a_verb_whose_disk_was_full_says_so_and_comes_to_the_same_result(name, battery, tmp_path):
    try:
        with kills.small_disk(tmp_path / "disk"):
            pass
    except PermissionError as error:
        pytest.skip(str(error))
    assert battery.full(name, 1), battery.failed


@pytest.mark.parametrize(
    "words",
    [
        'RESOURCE_EXHAUSTED: Failed writing: "/a/6/x": No space left on device',
        "write() failed: No space left on device; writing /a/6/x; at byte 0; at record 0",
    ],
)
def test_the_file_that_a_library_could_not_write_is_named(words):
    assert str(find_input_error(ValueError(words))) == "/a/6/x: No space left on device; make room, then start again"


def test_what_is_compiled_is_kept_whole_or_not_at_all_and_half_of_it_is_replaced(tmp_path, short_files, capsys):
    cache = types.SimpleNamespace(path=tmp_path, eviction_enabled=False)
    (tmp_path / "jit_a-cache").write_bytes(b"half")
    compile_cache._put(cache, "jit_a", b"whole")
    for key in ("jit_b", "jit_c"):
        compile_cache._put(cache, key, bytes(10_000))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"jit_a-cache": b"whole"}
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1 and f"{tmp_path} cannot be written (File too large): compiled programs are not kept" in said[0]
    )
