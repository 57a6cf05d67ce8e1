"""A model that was trained on another machine: its cache and its data root have no effect here, and nothing is written
where nobody asked for it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import tiny
from crab_jax import router
from crab_jax.aot import compile_cache
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data
from data_pipelines import decoded, mixture
from data_pipelines.shards import Decoding


@pytest.fixture
def picture(tmp_path):
    """A root with one picture whose name is no UTF-8."""
    (tmp_path / "root").mkdir()
    name = os.fsdecode(b"na\xefve.png")
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tmp_path / "root" / name)
    return tmp_path / "root", name


def files(root, cache):
    return decoded.Files(root, Decoding(8, 2, False), str(cache))


def test_a_cache_takes_any_name_and_is_used(picture, tmp_path):
    root, name = picture
    first = files(root, tmp_path / "cache").picture(name, "image")
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x07")
    again = files(root, tmp_path / "cache").picture(name, "image")
    assert (first == 90).all() and again[-1, -1, -1] == 7


@pytest.mark.parametrize("folder", ["/proc/nothing/here", "/dev/null/x", "{root}/a-file"])
def test_a_cache_that_cannot_be_written_is_done_without_and_said_once(picture, folder, caplog):
    root, name = picture
    (root / "a-file").touch()
    decoded._no_cache.cache_clear()
    for _ in range(2):
        assert (files(root, folder.format(root=root)).picture(name, "image") == 90).all()
    assert len(caplog.records) == 1 and "is not used" in caplog.text


def test_a_full_disk_leaves_no_part_of_a_cached_file(picture, tmp_path, monkeypatch):
    root, name = picture

    def write_bytes(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert (files(root, tmp_path / "cache").picture(name, "image") == 90).all()
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_of_the_training_machine_is_none_here(monkeypatch):
    seen = []
    monkeypatch.setattr(mixture, "eval_batches", lambda e, r, t, config, *rest, **more: seen.append(config) or iter(()))
    config = tiny.get_config()
    config.data.cache_dir = "runs/recipe/cache"
    config = resolve(config)
    run_data.eval_batches([], "", config, None, 1)
    run_data.eval_batches([], "", config, None, 1, cache_dir="asked/for")
    list(router.answered_batches([], "", config, None, 1))
    assert [one.cache_dir for one in seen] == ["", "asked/for", ""]


def test_the_data_root_of_training_is_taken_where_it_is_there(tmp_path):
    config = tiny.get_config()
    config.data.root = str(tmp_path)
    assert run_data.data_root("", resolve(config)) == tmp_path and run_data.data_root("other", resolve(config)) == Path(
        "other"
    )
    for root, said in (
        ("/on/that/machine", "trained on /on/that/machine, which is no folder here; give --data=DIR"),
        ("", "trained without one"),
    ):
        config.data.root = root
        with pytest.raises(InputError, match=said):
            run_data.data_root("", resolve(config))


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({"HOME": "/dev/null"}, False),
        ({"HOME": "/proc/1"}, False),
        ({"HOME": "/dev/null", "XDG_CACHE_HOME": "{tmp}"}, True),
    ],
)
def test_a_home_that_cannot_be_written_keeps_nothing(environ, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    set_to = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.update({name: value}))
    compile_cache.enable()
    assert ("jax_compilation_cache_dir" in set_to) == kept == (not capsys.readouterr().err)
    assert kept == (tmp_path / "crab_jax" / "xla").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights can be tried by root only")
def test_predict_works_in_a_folder_that_may_not_be_written_to(picture, scenes_root, tmp_path):
    """Case w14: the packed model says data.cache_dir = runs/recipe/cache."""
    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    here.chmod(0o555)
    repository = Path(__file__).parent.parent
    done = subprocess.run(
        [
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-all",
            sys.executable,
            "-m",
            "crab_jax.predict",
            "--checkpoint",
            "warm_start",
            "--video",
            next((scenes_root / "test").rglob("clip.mp4")),
            "--question",
            "What is heard?",
            "--max-new-tokens",
            "2",
            "--out",
            out,
        ],
        cwd=here,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository), "HOME": str(here), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["predictions.jsonl"] and not list(here.iterdir())
