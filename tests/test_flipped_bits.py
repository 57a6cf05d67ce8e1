"""A checkpoint, a model and prepared shards know themselves: flipped bits are found, or change nothing."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import checkpoints, optim
from crab_jax.errors import InputError

FLIPS = 100
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flip(folder: Path, rng: np.random.Generator, skip: Callable[[Path], bool] = lambda path: False
         ) -> tuple[Path, bytes]:
    """Flip one bit, drawn evenly over the bytes of all files below `folder`; the file, and what it held."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and not skip(path))
    sizes = np.array([path.stat().st_size for path in files])
    at = int(rng.integers(sizes.sum()))
    number = int(np.searchsorted(np.cumsum(sizes), at, "right"))
    file, place = files[number], at - int(sizes[:number].sum())
    before = file.read_bytes()
    changed = bytearray(before)
    changed[place] ^= 1 << int(rng.integers(8))
    file.write_bytes(changed)
    return file, before


def same(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


def train_tree(step: int):
    rng = np.random.default_rng(step)
    trainable = {"q": {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "b": jnp.ones(7)}}
    opt = optim.optimizer(optim.OptimConfig(), 10).init(trainable)
    return {"step": jnp.int32(step), "trainable": trainable, "opt": jax.tree.map(lambda x: x + step, opt)}


FROZEN = {"llama": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(30, 20)), jnp.bfloat16)}}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A workdir with steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    run = checkpoints.RunCheckpoints(folder / "checkpoints")
    run.save_frozen(FROZEN, {"lora_heads": 3})
    for step in (3, 6):
        run.save(step, train_tree(step))
    run.wait()
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def resume(workdir: Path):
    """(train state, frozen) as training takes them up."""
    run = checkpoints.RunCheckpoints(workdir / "checkpoints")
    return run.restore(jax.tree.map(jnp.zeros_like, train_tree(0))), run.load_frozen(abstract(FROZEN))


def test_bits_of_a_checkpoint(two_steps, tmp_path, capsys):
    counts: Counter[str] = Counter()
    rng = np.random.default_rng(1)
    for number in range(FLIPS):
        workdir = copy(two_steps, tmp_path / "run")
        file, _ = flip(workdir / "checkpoints", rng, lambda path: "checkpoints/3" in str(path))
        try:
            params = checkpoints.load_params(workdir)
            assert same(params, jax.device_get(optim.merge(train_tree(6)["trainable"], FROZEN))), (number, file)
        except InputError as error:
            assert str(workdir) in error.where and "\n" not in str(error)
            counts["evaluation refused"] += 1
        try:
            state, frozen = resume(workdir)
            step = int(state["step"])
            assert same(state, train_tree(step)) and same(frozen, FROZEN), (number, file)
            counts["harmless" if step == 6 else "fell back"] += 1
            assert step == 6 or "checkpoints/6" in capsys.readouterr().err
        except InputError as error:
            assert str(workdir) in error.where and "\n" not in str(error)
            counts["refused"] += 1
    print(dict(counts))
    assert counts["fell back"] > FLIPS // 3 and counts["refused"]
