"""A checkpoint, a model and prepared shards know themselves: flipped bits are found, or change nothing."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import optim
from crab_jax.checkpoints import models, run_steps, stored
from crab_jax.io.errors import InputError
from data_pipelines import datasets, index, prepare, shards
from data_pipelines.tokens import Tokenizer

FLIPS = 100


def flip(
    folder: Path, rng: np.random.Generator, skip: Callable[[Path], bool] = lambda path: False
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
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    )


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
    run = run_steps.RunCheckpoints(folder / "checkpoints")
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
    run = run_steps.RunCheckpoints(workdir / "checkpoints")
    return run.restore(jax.tree.map(jnp.zeros_like, train_tree(0))), run.load_frozen(abstract(FROZEN))


def test_bits_of_a_checkpoint(two_steps, tmp_path, capsys):
    counts: Counter[str] = Counter()
    rng = np.random.default_rng(1)
    for number in range(FLIPS):
        workdir = copy(two_steps, tmp_path / "run")
        file, _ = flip(workdir / "checkpoints", rng, lambda path: "checkpoints/3" in str(path))
        try:
            params = stored.load_params(workdir)
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


def test_bits_of_a_packed_model(tmp_path, golden):
    params = {**FROZEN, "q": {"w": np.float32(train_tree(1)["trainable"]["q"]["w"]), "n": np.int32([3, 4])}}
    tokenizer = Tokenizer.load(golden / "weights/llama")
    models.save_packed(tmp_path, params, {"alpha": 16, "lr": 0.5}, tokenizer=tokenizer)
    rng, found, harmless = np.random.default_rng(2), 0, 0
    whole = stored.load_params(tmp_path)
    for number in range(FLIPS):
        # Half of them in the parameters, which are small beside the tokenizer.
        file, before = flip(tmp_path, rng, lambda path, half=number % 2: half and path.name != models.PACKED)
        try:
            assert same(stored.load_params(tmp_path), whole) and file.name == models.MANIFEST, (number, file)
            harmless += 1
        except InputError as error:
            assert str(tmp_path) in error.where and "\n" not in str(error)
            found += 1
        file.write_bytes(before)
    print({"refused": found, "harmless": harmless})
    assert found > 0.9 * FLIPS


@pytest.fixture(scope="module")
def prepared_scenes(scenes_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "root"
    prepare.run(
        [
            "--root",
            str(scenes_root),
            "--out",
            str(out),
            "--image-size",
            "8",
            "--video-frames",
            "2",
            "--workers",
            "0",
            "--splits",
            "test",
        ]
    )
    return out


def read_prepared(root: Path) -> list:
    """Every Example of the test split and every medium of it."""
    opened = shards.Shards(root)
    examples = datasets.read_jsonl(root, "test")
    found: list = [dataclasses.asdict(example) for example in examples]
    for example in examples:
        for medium in shards.media_of(example, opened.decoding):
            record = opened._record(medium, medium.kind)
            found.append({name: value if isinstance(value, int) else bytes(value) for name, value in record.items()})
    return found


def test_bits_of_prepared_shards(prepared_scenes):
    rng, found, harmless = np.random.default_rng(3), 0, 0
    whole = read_prepared(prepared_scenes)
    read = ("frames", "sounds", "masks")
    for number in range(FLIPS):
        # Half of them in the lists, the index of media and the manifest, which are small beside the shards. The index
        # of Examples is not read here.
        file, before = flip(
            prepared_scenes, rng, lambda path, half=number % 2: path.parent.name in (*read * half, index.FOLDER)
        )
        try:
            shards._opened.cache_clear()
            assert read_prepared(prepared_scenes) == whole, (number, file)
            harmless += 1
        except InputError as error:
            assert str(prepared_scenes) in error.where and "\n" not in str(error)
            found += 1
        file.write_bytes(before)
    print({"refused": found, "harmless": harmless})
    assert found > 0.8 * FLIPS
