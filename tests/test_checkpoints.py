"""Checkpoints restore exactly, and refuse what does not fit."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import checkpoints, optim
from crab_jax.errors import InputError

TRAINABLE = {"q": {"w": jnp.arange(6.0).reshape(2, 3)}}
FROZEN = {"llama": {"w": jnp.ones(3, jnp.bfloat16)}}


def train_tree():
    tx = optim.optimizer(optim.OptimConfig(), 10)
    return {"step": jnp.int32(7), "trainable": TRAINABLE, "opt": tx.init(TRAINABLE)}


@pytest.fixture
def saved(tmp_path):
    run = checkpoints.RunCheckpoints(tmp_path / "checkpoints")
    run.save_frozen(FROZEN, {"lora_heads": 3})
    run.save(7, train_tree())
    run.wait()
    return tmp_path


def test_restore_gives_the_state(saved):
    run = checkpoints.RunCheckpoints(saved / "checkpoints")
    assert run.latest == 7
    restored = run.restore(jax.tree.map(jnp.zeros_like, train_tree()))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, train_tree()))


def test_frozen_weights_that_are_not_those_of_the_start_are_refused(saved):
    run = checkpoints.RunCheckpoints(saved / "checkpoints")
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), FROZEN)
    assert jax.tree.all(jax.tree.map(np.array_equal, run.load_frozen(wanted), FROZEN))
    other = checkpoints.RunCheckpoints(saved / "other")
    other.save_frozen({"llama": {"w": jnp.zeros(3, jnp.bfloat16)}}, {})
    (saved / "checkpoints" / "frozen").rename(saved / "away")
    (saved / "other" / "frozen").rename(saved / "checkpoints" / "frozen")
    with pytest.raises(InputError, match="not those that the run started with"):
        run.load_frozen(wanted)


@pytest.mark.parametrize("kind", ["run", "packed"])
def test_parameters_are_read_into_the_wanted_dtypes_and_shardings_and_only_those(saved, kind):
    if kind == "packed":
        checkpoints.save_packed(saved / "packed", TRAINABLE | {"llama": {"w": np.ones(3, np.float32)}}, {})
    stored = checkpoints.stored_params(saved if kind == "run" else saved / "packed")
    assert jax.tree.map(lambda x: x.shape, stored.shapes) == {"q": {"w": (2, 3)}, "llama": {"w": (3,)}}
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    read = stored.load({"q": {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16, sharding=where)}})
    assert read["q"]["w"].sharding == where and read["q"]["w"].dtype == jnp.bfloat16 and "llama" not in read
    np.testing.assert_array_equal(read["q"]["w"], TRAINABLE["q"]["w"])


def test_load_params_merges_frozen_and_trainable_with_their_dtypes(saved):
    params = checkpoints.load_params(saved)
    assert params["llama"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["q"]["w"], TRAINABLE["q"]["w"])


def test_another_shape_is_refused_by_name(saved):
    run = checkpoints.RunCheckpoints(saved / "checkpoints")
    wrong = train_tree()
    wrong["trainable"] = {"q": {"w": jnp.zeros((2, 4))}}
    with pytest.raises(InputError, match=r"trainable/q/w.*\(2, 3\).*\(2, 4\)"):
        run.restore(wrong)


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


def streamed(array, stacked):
    indices = list(np.ndindex(array.shape[:stacked]))
    return checkpoints.Streamed(array.shape, array.dtype, stacked, lambda: ((i, array[i]) for i in indices[::-1]))


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A tree written part by part, in chunks far smaller than its leaves."""
    monkeypatch.setattr(checkpoints, "CHUNK", 2**12)
    rng = np.random.default_rng(0)
    tree = {"kernel": rng.normal(size=(3, 64, 80)).astype(jnp.bfloat16), "b": {"head": rng.normal(size=(2, 3, 32, 40)),
            "n": np.int32([3])}}
    checkpoints.save_streamed(tmp_path / checkpoints.IMPORTED, {
        "kernel": streamed(tree["kernel"], 1), "b/head": streamed(tree["b"]["head"].astype(np.float16), 2),
        "b/n": streamed(tree["b"]["n"], 0)})
    tree["b"]["head"] = tree["b"]["head"].astype(np.float16)
    return tmp_path, tree


def test_a_streamed_tree_restores_bit_for_bit(imported):
    folder, tree = imported
    assert checkpoints.tree_hash(checkpoints.load_params(folder)) == checkpoints.tree_hash(tree)


def test_a_streamed_leaf_is_stored_in_chunks_that_a_shard_can_be_read_from(imported):
    folder, _ = imported
    found = checkpoints.ocp.metadata(checkpoints.epath.Path(folder) / checkpoints.IMPORTED).metadata
    for leaf, stacked in ((found["kernel"], 1), (found["b"]["head"], 2)):
        chunk = leaf.storage_metadata.chunk_shape
        assert chunk[:stacked] == (1,) * stacked and np.prod(chunk) * leaf.dtype.itemsize <= checkpoints.CHUNK


def test_only_one_part_of_a_large_leaf_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK", 2**20)
    parts, side = 16, 1024

    def measured():
        for i in range(parts):
            assert tracemalloc.get_traced_memory()[0] < 4 * side**2 * 4, "parts pile up"
            yield (i,), np.full((side, side), i, np.float32)

    tracemalloc.start()
    try:
        checkpoints.save_streamed(tmp_path / checkpoints.IMPORTED, {
            "w": checkpoints.Streamed((parts, side, side), np.dtype(np.float32), 1, measured)})
    finally:
        tracemalloc.stop()
    assert checkpoints.load_params(tmp_path)["w"][:, 0, 0].tolist() == list(range(parts))


@pytest.mark.parametrize("parts, problem", [
    ([((0,), np.zeros(2, np.float32))], "missing"),
    ([((0,), np.zeros(2, np.float32))] * 2, "part"),
    ([((0,), np.zeros(3, np.float32)), ((1,), np.zeros(2, np.float32))], r"part \(0,\)"),
    ([((0,), np.zeros(2, np.float16)), ((1,), np.zeros(2, np.float32))], "float16"),
])
def test_parts_that_do_not_make_the_leaf_leave_no_checkpoint(parts, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        checkpoints.save_streamed(tmp_path / checkpoints.IMPORTED, {
            "w": checkpoints.Streamed((2, 2), np.dtype(np.float32), 1, lambda: parts)})
    with pytest.raises(InputError, match="neither"):
        checkpoints.load_params(tmp_path)


def test_a_damaged_imported_model_is_named(imported):
    folder, _ = imported
    for file in folder.rglob("ocdbt.process_0/d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match="params.*cannot be read"):
        checkpoints.load_params(folder)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a training run nor an imported or packed model"):
        checkpoints.load_params(tmp_path)


def test_hash_sees_names_values_and_dtypes():
    base = checkpoints.tree_hash({"a": np.zeros(2, np.float32)})
    assert base == checkpoints.tree_hash({"a": jnp.zeros(2)})
    others = [{"b": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.int32)}]
    assert all(base != checkpoints.tree_hash(tree) for tree in others)


def test_saves_in_quick_succession_are_all_kept(tmp_path):
    """A save that comes while the one before is being written waits for it; it is not dropped."""
    run = checkpoints.RunCheckpoints(tmp_path / "checkpoints", keep=4)
    for step in (1, 2, 3):
        run.save(step, {"step": jnp.int32(step), "trainable": {"kernel": jnp.full((4096, 1024), step, float)}})
    run.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"1", "2", "3"}
