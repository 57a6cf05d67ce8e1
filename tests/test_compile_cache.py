"""Compiled programs in a bucket: hosts and restarts share them, and a bucket that does not answer costs one line."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from crab_jax.aot import compile_cache
from crab_jax.io.errors import InputError

# A process of a run, which sees the folder of its first argument as gs:// and takes a first step.
PROCESS = """
import json, sys
import fsspec, jax
from fsspec.implementations.local import LocalFileSystem
from crab_jax.aot import compile_cache
from crab_jax.training.first_step import FirstStep

class Bucket(LocalFileSystem):
    protocol = "gs"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", sys.argv[1] + "/"))

for name in ("gs", "gcs"):
    fsspec.register_implementation(name, Bucket, clobber=True)
compile_cache.enable()
first = FirstStep()
out = jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))
print(json.dumps(first.done(1, out)))
"""


def first_step(bucket: Path, monkeypatch) -> tuple[dict[str, float], str]:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://crab/xla")
    done = subprocess.run([sys.executable, "-c", PROCESS, str(bucket)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_restart_takes_its_programs_from_the_bucket_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "crab").mkdir()
    cold, line = first_step(tmp_path, monkeypatch)
    assert cold["programs_compiled"] > 0 == cold["programs_from_cache"] and "(cold: " in line
    kept = list((tmp_path / "crab" / "xla").iterdir())
    assert len(kept) == cold["programs_compiled"]
    warm, line = first_step(tmp_path, monkeypatch)
    assert warm["programs_compiled"] == 0 and warm["programs_from_cache"] == cold["programs_compiled"]
    assert line.startswith(f"step 1 was done {warm['first_step_s']:.1f} s after the process started (warm: ")
    assert 0 < warm["first_step_s"] < 600


@pytest.fixture
def set_to(monkeypatch) -> dict:
    """What `enable` sets."""
    values: dict = {}
    monkeypatch.setattr(compile_cache.jax.config, "update", lambda name, value: values.update({name: value}))
    return values


@pytest.mark.parametrize(("place", "said"), [("gs://crab/xla", "gcsfs is not installed"), ("ftp://a/b", "gs://bucket")])
def test_a_place_that_nothing_can_open_is_refused_by_name(place, said, set_to, monkeypatch):
    def missing(scheme):
        raise ImportError

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(InputError, match=f"JAX_COMPILATION_CACHE_DIR.*{said}"):
        compile_cache.enable()
    assert not set_to


def test_a_bucket_that_does_not_answer_costs_one_line(set_to, monkeypatch, capsys):
    def refuse(place):
        raise OSError("Anonymous caller does not have storage.objects.get access")

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://not-ours/xla")
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: object)
    monkeypatch.setattr(compile_cache.epath, "Path", refuse)
    compile_cache.enable()
    assert set_to == {"jax_enable_compilation_cache": False}
    assert "gs://not-ours/xla cannot be written (Anonymous caller" in capsys.readouterr().err
