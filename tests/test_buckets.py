"""Runs, data and results in buckets, against real servers of S3 and Google Cloud Storage on this machine."""

import asyncio
import importlib.util
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.checkpoints import orbax, run_steps
from crab_jax.checkpoints.orbax import COMMIT
from crab_jax.io import buckets, files, locks, paths
from crab_jax.io.errors import InputError, find_input_error
from crab_jax.tasks import TASKS
from data_pipelines import shards
from data_pipelines.tokens import Tokenizer
from tests.test_train import command

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def google(bucket):
    if bucket.kind != "gs":
        pytest.skip("the server that fails on demand speaks the API of Google")
    return bucket


def verb(*words: str, code: int = 0) -> str:
    """Run a verb to its end, and return what it says on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def steps_of_log(content: bytes) -> list[int]:
    return [json.loads(line)["step"] for line in content.splitlines()]


def steps(run) -> list[int]:
    return steps_of_log((run / "metrics.jsonl").read_bytes())


def test_a_path_in_a_bucket_has_the_methods_of_a_path(bucket):
    folder = bucket.at("paths")
    file = folder / "a" / "b.txt"
    assert not folder.exists() and list(folder.iterdir()) == [] and list(folder.glob("*")) == []
    files.write_whole(file, "hello world")
    assert (file.read_bytes(), file.read_text(), file.stat().st_size) == (b"hello world", "hello world", 11)
    assert (folder.is_dir(), file.is_file(), file.is_dir(), (folder / "a" / "b").exists()) == (True, True, False, False)
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert list(folder.glob("*/*.txt")) == list(folder.rglob("*.txt")) == [file]
    assert file.relative_to(folder).as_posix() == "a/b.txt" and pickle.loads(pickle.dumps(file)) == file
    assert (
        str(file.resolve()) == str(file.absolute()) == str(paths.at(str(file))) == f"{bucket.kind}://crab/paths/a/b.txt"
    )
    assert file.read_range(6, 100) == b"world"
    with file.open("rb") as opened:
        assert opened.read(5) == b"hello"
    with pytest.raises(FileNotFoundError) as missing:
        (folder / "none").read_bytes()
    assert missing.value.filename == f"{bucket.kind}://crab/paths/none"
    with pytest.raises(OSError, match="cannot be renamed"):
        file.rename(folder / "c")
    paths.in_bucket(folder / "a").move(paths.in_bucket(folder / "moved"))
    assert not file.exists() and (folder / "moved" / "b.txt").is_file()
    paths.in_bucket(folder).rmtree()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a#1", "a [b]", "a?b", "a*", "a%20b"])
def test_a_name_is_no_pattern_and_no_address(bucket, name):
    """Clients take such names for patterns, versions and escapes: `rm` of `a*` would delete all that begins with a."""
    folder, other = bucket.at(f"names/{name}"), bucket.at("names/ab/kept")
    file, moved = folder / f"{name}.mp4", bucket.at("names/moved")
    other.write_bytes(b"another folder")
    file.write_bytes(b"film")
    assert file.read_bytes() == paths.local(file).read_bytes() == b"film" and list(folder.rglob("*")) == [file]
    paths.in_bucket(folder).move(paths.in_bucket(moved))
    assert (moved / file.name).read_bytes() == b"film" and not folder.exists()
    file.write_bytes(b"film")
    paths.in_bucket(folder).rmtree()
    assert not folder.exists() and other.exists()


def test_one_of_several_writers_creates_an_object(bucket):
    file = bucket.at("created")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: paths.in_bucket(file).create(b"%d" % n), range(8))) == 1


def test_a_folder_in_a_bucket_is_locked(bucket, monkeypatch):
    folder = bucket.at("locked")
    with locks.locked(folder, "--workdir"):
        with pytest.raises(InputError, match=r"\[--workdir\]: is in use by process"), locks.locked(folder, "--workdir"):
            pass
        assert "the folder of process" in locks.mark(folder)
    assert not list(folder.iterdir())
    elsewhere = locks._me("", 0)._replace(machine="another")
    (folder / ".lock.0").write_bytes(json.dumps(elsewhere._asdict()).encode())
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    with locks.locked(folder, "--workdir"):  # its owner has given no sign of life
        pass


def test_lines_are_in_the_bucket_at_once_or_when_they_are_read(bucket, monkeypatch):
    file = bucket.at("log.jsonl")
    files.append_line(file, {"step": 1}, now=True)
    files.append_line(file, {"step": 2})
    assert bucket.content("log.jsonl") == b'{"step": 1}\n', "it is written again within seconds"
    assert file.read_bytes() == b'{"step": 1}\n{"step": 2}\n' == bucket.content("log.jsonl")
    files.append_line(file, {"step": 3})
    paths.settle()
    assert bucket.content("log.jsonl").endswith(b'{"step": 3}\n')
    files.write_whole(file, b'{"step": 1}\nhalf')
    files.cut_tail(file)
    files.append_line(file, {"step": 2}, now=True)
    assert steps_of_log(bucket.content("log.jsonl")) == [1, 2]


def test_a_large_file_is_written_whole_or_not_at_all(bucket):
    file = bucket.at("large.bin")
    with pytest.raises(ZeroDivisionError), files.whole(file) as partial:
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert not file.exists()
    with files.whole(file) as partial:
        partial.write_bytes(b"x" * 12_000_000)
    assert file.stat().st_size == 12_000_000


def test_a_model_in_a_bucket_is_replaced_manifest_first(bucket):
    folder = bucket.at("model")
    for text in ("old", "new"):
        with files.replaced(folder) as new:
            (new / "manifest.json").write_text(text)
            (new / "params").mkdir()
            (new / "params" / "x").write_text(text)
    assert (folder / "params" / "x").read_text() == (folder / "manifest.json").read_text() == "new"


def test_the_cache_of_objects_is_bounded_and_knows_another_content(bucket, monkeypatch):
    monkeypatch.setenv("CRAB_JAX_OBJECT_CACHE_GB", "0.003")
    monkeypatch.setattr(buckets, "_free", 0.0)  # as in a process that has just started
    names = [bucket.at(f"cached/{number}.bin") for number in range(4)]
    for number, file in enumerate(names):
        file.write_bytes(bytes([number]) * 10**6)
    copies = [paths.local(file) for file in names]
    assert [copy.is_file() for copy in copies] == [False, True, True, True] and copies[3].name == "3.bin"
    assert paths.local(names[0]).read_bytes()[:1] == b"\0"
    names[3].write_bytes(b"other")
    buckets._known.cache_clear()  # as another process
    assert paths.local(names[3]).read_bytes() == b"other"


def test_checkpoints_are_finished_by_a_marker_and_kept_by_number(bucket):
    run = run_steps.RunCheckpoints(bucket.at("steps") / "checkpoints", keep=2)
    train = {"step": jnp.int32(0), "trainable": {"w": jnp.arange(10.0)}}
    run.save_frozen({"a": jnp.ones((3, 3))}, {})
    for step in (1, 2, 3):
        run.save(step, {**train, "step": jnp.int32(step)})
    run.wait()
    assert run_steps.steps_of(run.folder) == {2, 3}
    assert sorted(path.name for path in run.folder.iterdir()) == ["2", "3", "frozen", "manifest.json"]
    (run.folder / "3" / COMMIT).unlink()
    (run.folder / "7" / "train" / "half").write_bytes(b"a save that was killed")
    assert run_steps.steps_of(run.folder) == {2}, "a half-written step is none"
    again = run_steps.RunCheckpoints(run.folder, keep=2)
    restored = again.restore(train)
    assert int(restored["step"]) == 2 and again.load_frozen({"a": jnp.ones((3, 3))})["a"].sum() == 9
    assert sorted(path.name for path in run.folder.iterdir()) == ["2", "frozen", "manifest.json"]


def test_a_run_that_was_copied_into_a_bucket_keeps_its_steps_and_goes_on(bucket, tmp_path):
    """On a disk, or through a mount, checkpoints are finished by renaming; they have the marker as well."""
    train = {"step": jnp.int32(0), "trainable": {"w": jnp.arange(10.0)}}
    before = run_steps.RunCheckpoints(tmp_path / "checkpoints", keep=2)
    before.save_frozen({"a": jnp.ones((3, 3))}, {})
    for step in (1, 2):
        before.save(step, {**train, "step": jnp.int32(step)})
    before.wait()
    folder = bucket.at("copied") / "checkpoints"
    for file in (file for file in before.folder.rglob("*") if file.is_file()):
        (folder / file.relative_to(before.folder).as_posix()).write_bytes(file.read_bytes())
    assert run_steps.steps_of(folder) == {1, 2}
    run = run_steps.RunCheckpoints(folder, keep=2)
    assert int(run.restore(train)["step"]) == 2 and run.load_frozen({"a": jnp.ones((3, 3))})["a"].sum() == 9
    run.save(3, {**train, "step": jnp.int32(3)})
    run.wait()
    assert run_steps.steps_of(folder) == {2, 3}


def test_the_tokenizer_of_a_llama_directory_in_a_bucket(bucket, golden):
    directory, text = golden / "weights/llama", "a  dog barks <mask_0> twice"
    for file in directory.glob("*token*"):
        (bucket.at("llama") / file.name).write_bytes(file.read_bytes())
    assert Tokenizer.load(str(bucket.at("llama"))).ids(text) == Tokenizer.load(directory).ids(text)


def test_prepared_shards_are_read_by_ranges_or_from_the_cache(bucket, monkeypatch):
    """Records as long as several blocks of the file, which have headers between their bytes."""
    content, places = _riegeli()
    bucket.at("blocks").write_bytes(content)
    file = paths.in_bucket(bucket.at("blocks"))
    for at, data in places:
        raw = file.read_range(at, len(data) + shards.headers_in(at, len(data)))
        assert shards.without_headers(raw, at, len(data)) == data


def _riegeli() -> tuple[bytes, list[tuple[int, bytes]]]:
    rng = np.random.default_rng(0)
    content, places = bytearray(b"H" * shards.BLOCK_HEADER), []
    for length in (10, 70_000, 65_512, 1, 200_000, 65_536):
        data, places = rng.bytes(length), [*places, (len(content), b"")]
        for byte_at in range(0, length):
            if len(content) % shards.BLOCK == 0:
                content += b"H" * shards.BLOCK_HEADER
                if byte_at == 0:
                    places[-1] = (len(content), b"")
            content.append(data[byte_at])
        places[-1] = (places[-1][0], data)
    return bytes(content), places


class TestFailures:
    """What a bucket does not give ends in another attempt, or in one line that names it."""

    def test_a_missing_bucket(self, bucket):
        place = f"{bucket.kind}://nowhere/run"
        with pytest.raises(InputError, match=rf"{place} \[--workdir\]: cannot be written \(No such bucket\)"):
            files.out_folder(place, "--workdir")
        assert "is no folder" in verb("data_pipelines", "prepare", "--root", place, "--out", bucket.at("x"), code=2)

    def test_a_missing_package(self, bucket, monkeypatch):
        monkeypatch.setitem(sys.modules, buckets.PACKAGES[bucket.kind], None)
        package = buckets.PACKAGES[bucket.kind]
        with pytest.raises(InputError, match=rf"needs the package {package} .*pip install {package}"):
            bucket.at("x").exists()

    @pytest.mark.parametrize("fault", ["403", "503", "truncated"])
    def test_an_answer_that_fails_once_or_always(self, fault, google, monkeypatch):
        monkeypatch.setattr("asyncio.sleep", lambda seconds, result=None, sleep=asyncio.sleep: sleep(0, result))
        google.at("kept").write_bytes(b"content" * 1000)
        left = [1]

        def fails(method: str, path: str) -> str | None:
            left[0] -= 1
            return fault if left[0] >= 0 else None

        google.server.fault = fails
        if fault != "403":
            assert google.at("kept").read_bytes() == b"content" * 1000, "it is asked for again"
        left[0] = 1000
        with pytest.raises(OSError) as failed:
            google.at("kept").read_bytes()
        said = str(find_input_error(failed.value))
        google.server.fault = lambda method, path: None
        expected = "refuses these credentials" if fault == "403" else "does not answer"
        assert said.startswith("gs://crab/kept: ") and expected in said and "docs/training.md" in said
        assert "\n" not in said

    @pytest.mark.parametrize(
        ("status", "said"), [(503, "The bucket does not answer"), (403, "The bucket refuses these credentials")]
    )
    def test_an_s3_that_always_fails(self, bucket, status, said, monkeypatch):
        if bucket.kind != "s3":
            pytest.skip("Google's is above")
        monkeypatch.setattr("asyncio.sleep", lambda seconds, result=None, sleep=asyncio.sleep: sleep(0, result))
        asked = []

        class Failing(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_PUT = do_GET  # noqa: N815

            def log_message(self, *arguments) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
            importlib.import_module("s3fs").S3FileSystem.clear_instance_cache()
            with pytest.raises(OSError) as failed:
                bucket.at("x").read_bytes()
            server.shutdown()
        importlib.import_module("s3fs").S3FileSystem.clear_instance_cache()
        line = str(find_input_error(failed.value))
        assert line.startswith("s3://crab/x: ") and said in line and "\n" not in line
        assert (len(asked) > 3) == (status == 503), "only what may pass is asked for again"

    @pytest.mark.parametrize("fault", ["403", "503", "truncated"])
    def test_a_checkpoint_of_a_bucket_that_fails_once_is_repeated_and_never_called_damaged(
        self, fault, google, monkeypatch, capsys
    ):
        """By TensorStore and gcsfs, which both read it: the steps are all there when the bucket answers again."""
        monkeypatch.setattr("asyncio.sleep", lambda seconds, result=None, sleep=asyncio.sleep: sleep(0, result))
        monkeypatch.setitem(orbax._RETRIES, "max_retries", 2)
        folder, left = google.at(f"failing-{fault}") / "checkpoints", [0]
        train = {"step": jnp.int32(0), "trainable": {"w": jnp.arange(10.0)}}

        def fails(method: str, path: str) -> str | None:
            left[0] -= 1
            return fault if left[0] >= 0 and f"failing-{fault}" in path else None

        monkeypatch.setattr(google.server, "fault", fails)
        run = run_steps.RunCheckpoints(folder, keep=3)
        run.save_frozen({"a": jnp.ones((3, 3))}, {})
        for step in (1, 2):
            left[0] = 0 if fault == "403" else 1  # a refusal is final
            run.save(step, train | {"step": jnp.int32(step)})
        run.wait()
        assert run_steps.steps_of(folder) == {1, 2}
        for part in ("ocdbt", "/d/", "metadata"):
            again = run_steps.RunCheckpoints(folder, keep=3)
            left[0] = 10**6
            always = lambda method, path, part=part: fails(method, path) if part in path.lower() else None  # noqa: E731
            monkeypatch.setattr(google.server, "fault", always)
            with pytest.raises(OSError) as failed:
                again.restore(train), again.load_frozen({"a": jnp.ones((3, 3))})
            line = str(find_input_error(failed.value))
            assert "damaged" not in line and "\n" not in line and f"gs://crab/failing-{fault}" in line
            assert ("refuses these credentials" if fault == "403" else "does not answer") in line
        monkeypatch.setattr(google.server, "fault", fails)
        left[0] = 0 if fault == "403" else 1
        assert int(run_steps.RunCheckpoints(folder, keep=3).restore(train)["step"]) == 2
        assert "set aside" not in capsys.readouterr().err


@pytest.mark.exhaustive  # eight starts of programs, minutes on two cores
def test_the_whole_way_on_a_bucket(bucket, scenes_root):
    raw, data, run = bucket.upload(scenes_root, "raw"), bucket.at("prepared"), bucket.at("run")
    prepare = ("data_pipelines", "prepare", "--root", raw, "--out", data, "--workers", "0", "--image-size", "64")
    assert f"{data}: " in verb(*prepare)

    one_bucket = (
        "--config.data.lengths=(272,)",
        *(f"--config.data.weights.{name}=0.0" for name in TASKS if name != "ave"),
    )
    options = ("--config.steps=9", "--config.log_every=1", "--config.checkpoint_every=3", "--config.data.workers=1")
    train = command(data, run, *options, *one_bucket)
    killed = subprocess.Popen(train, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 200
        while not (run / "checkpoints" / "3" / COMMIT).is_file():
            assert killed.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (run / "checkpoints" / "8" / "train" / "d" / "half").write_bytes(b"a save that was killed")
    before = steps(run)
    assert {1, 2, 3} <= set(before), "every window is in the bucket when it is over"
    assert "resumed from step" in verb(*train[2:])
    assert steps(run) == list(range(1, 10)) and run_steps.steps_of(run / "checkpoints") == {6, 9}
    assert not (run / "checkpoints" / "8").exists() and list((run / "tensorboard").iterdir())

    evaluate = ("crab_jax.evaluate", f"--checkpoint={run}", f"--out={bucket.at('eval')}", "--limit=1", "--tasks=ave")
    verb(*evaluate, "--max-new-tokens=8")
    assert "are answered already" in verb(*evaluate, "--max-new-tokens=8")
    verb(*evaluate, "--max-new-tokens=4")
    assert (bucket.at("eval") / "previous" / "predictions.jsonl").is_file()
    assert json.loads((bucket.at("eval") / "results.json").read_bytes())["tasks"]
    assert "| ave " in verb("crab_jax.compare", bucket.at("eval"), bucket.at("eval"), f"--data={raw}")

    film = next(raw.rglob("*.mp4"))
    answers = bucket.at("answers")
    asked = ("--task=ave", f"--video={film}", "--max-new-tokens=4")
    verb("crab_jax.predict", f"--checkpoint={run}", f"--out={answers}", *asked)
    assert len((answers / "predictions.jsonl").read_bytes().splitlines()) == 1
    assert not [path for path in REPOSITORY.iterdir() if path.name in ("gs:", "s3:")]
