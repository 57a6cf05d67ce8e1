"""Checkpoints restore exactly, and refuse what does not fit."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import checkpoints, optim
from crab_jax.errors import InputError

TRAINABLE = {"q": {"w": jnp.arange(6.0).reshape(2, 3)}}
FROZEN = {"llama": {"w": jnp.ones(3, jnp.bfloat16)}}


def dataset():
    source = grain.MapDataset.range(50).seed(3).shuffle().repeat().batch(2)
    return source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


def train_tree():
    tx = optim.optimizer(optim.OptimConfig(), 10)
    return {"step": jnp.int32(7), "trainable": TRAINABLE, "opt": tx.init(TRAINABLE)}


@pytest.fixture
def saved(tmp_path):
    run = checkpoints.RunCheckpoints(tmp_path / "checkpoints")
    data = iter(dataset())
    for _ in range(4):
        next(data)
    run.save_frozen(FROZEN, {"lora_heads": 3})
    run.save(7, train_tree(), data)
    upcoming = [next(data) for _ in range(3)]
    run.wait()
    return tmp_path, upcoming


def test_restore_gives_the_state_and_the_next_batches(saved):
    folder, upcoming = saved
    run, data = checkpoints.RunCheckpoints(folder / "checkpoints"), iter(dataset())
    assert run.latest == 7
    blank = jax.tree.map(jnp.zeros_like, train_tree())
    restored = run.restore(blank, data)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, train_tree()))
    np.testing.assert_array_equal([next(data) for _ in range(3)], upcoming)


def test_load_params_merges_frozen_and_trainable_with_their_dtypes(saved):
    params = checkpoints.load_params(saved[0])
    assert params["llama"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["q"]["w"], TRAINABLE["q"]["w"])


def test_another_shape_is_refused_by_name(saved):
    run = checkpoints.RunCheckpoints(saved[0] / "checkpoints")
    wrong = train_tree()
    wrong["trainable"] = {"q": {"w": jnp.zeros((2, 4))}}
    with pytest.raises(InputError, match=r"trainable/q/w.*\(2, 3\).*\(2, 4\)"):
        run.restore(wrong, iter(dataset()))


def test_mismatch_lists_both_directions():
    lines = checkpoints.describe_mismatch({"a": np.zeros(2), "b": np.zeros(1)}, {"b": np.zeros(3), "c": np.zeros(1)})
    assert len(lines) == 3 and "a: missing" in lines[0] and "c: unknown" in lines[1] and "(3,)" in lines[2]


def test_packed_round_trip_and_damage(tmp_path):
    checkpoints.save_packed(tmp_path, {"a": {"w": np.float32([0.5, 2])}, "n": np.int32([3])}, {"model": "tiny"},
                            np.float16)
    tree = checkpoints.load_params(tmp_path)
    assert tree["a"]["w"].dtype == np.float32 and tree["n"].dtype == np.int32
    np.testing.assert_array_equal(tree["a"]["w"], [0.5, 2])
    file = tmp_path / checkpoints.PACKED
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.load_params(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a training run nor a packed model"):
        checkpoints.load_params(tmp_path)


def test_hash_sees_names_values_and_dtypes():
    base = checkpoints.tree_hash({"a": np.zeros(2, np.float32)})
    assert base == checkpoints.tree_hash({"a": jnp.zeros(2)})
    others = [{"b": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.int32)}]
    assert all(base != checkpoints.tree_hash(tree) for tree in others)
