"""Weights, logits and masks that are no numbers: counted and refused, wherever they come from."""

from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from crab_jax.checkpoints import finite, models, orbax, run_steps, stored
from crab_jax.inference import check_finite
from crab_jax.io.errors import InputError
from data_pipelines.examples import Example

FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn]
BAD = [np.nan, -np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([(7,), (3, 5), (2, 3, 4), ()]))
def test_any_bits_are_told_as_numpy_tells_them(dtype, seed, bad, shape):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    array = np.where(rng.random(shape) < 0.3, bits.copy().view(dtype)[..., 0], rng.normal(size=shape).astype(dtype))
    array = array.astype(dtype)
    for one in (array, array.T, array[..., :1] if shape else array):
        assert finite.all_finite(one) == bool(np.isfinite(one.astype(np.float64)).all())
    if array.size:
        array = np.zeros(shape, dtype)
        array[tuple(rng.integers(0, n) for n in shape)] = BAD[bad]
        found = finite.faults(array)
        assert found == ((1, 0, array.size) if np.isnan(array).any() else (0, 1, array.size))


def test_integers_and_nothing_are_finite():
    for array in (np.arange(5), np.array([True]), np.zeros((0, 3), np.float32), np.full(3, -128, np.int8)):
        assert finite.faults(array) is None


def tree():
    rng = np.random.default_rng(0)
    return {
        "llama": {"kernel": rng.normal(size=(2, 300, 500)).astype(np.float32), "n": np.int32([1])},
        "clip": {"scale": rng.normal(size=7).astype(ml_dtypes.bfloat16)},
    }


def packed(folder, params):
    models.save_packed(folder, params, {})


def imported(folder, params):
    orbax.save_streamed(
        folder / models.IMPORTED,
        {
            path: orbax.Streamed(leaf.shape, leaf.dtype, 0, lambda leaf=leaf: [((), leaf)])
            for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
        },
    )


def run(folder, params):
    store = run_steps.RunCheckpoints(folder / "checkpoints")
    store.save_frozen({"clip": params["clip"]}, {})
    store.save(1, {"trainable": {"llama": params["llama"]}})
    store.wait()


@pytest.mark.parametrize("store", [packed, imported, run])
@pytest.mark.parametrize(("place", "value"), [("llama", np.nan), ("clip", -np.inf)])
def test_every_kind_of_checkpoint_is_refused_by_the_name_of_what_is_broken(store, place, value, tmp_path, monkeypatch):
    params = tree()
    leaf = params[place]["kernel" if place == "llama" else "scale"]
    leaf.reshape(-1)[-1] = value
    with monkeypatch.context() as patch:
        patch.setattr(finite, "check", lambda tree, where: tree)  # as a program writes it that does not look
        store(tmp_path, params)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        params,
    )
    name = "llama/kernel" if place == "llama" else "clip/scale"
    kept = stored.stored_params(tmp_path)
    for load in (kept.load, lambda: kept.load(wanted), lambda: kept.some([name])):
        with pytest.raises(InputError, match=rf"\[{name}\]: 1 tensors are not finite: {name} has 1 of"):
            load()
    leaf.reshape(-1)[-1] = 0
    store(tmp_path / "sound", params)
    stored.stored_params(tmp_path / "sound").load(wanted)


def test_a_run_does_not_go_on_from_values_that_are_none(tmp_path, monkeypatch):
    store = run_steps.RunCheckpoints(tmp_path)
    train = {"trainable": {"w": jnp.array([1.0, jnp.nan])}, "step": jnp.int32(1)}
    with monkeypatch.context() as patch:
        patch.setattr(finite, "check", lambda tree, where: tree)  # as an older version wrote it
        store.save(1, train)
        store.wait()
    with pytest.raises(InputError, match="trainable/w.*1 NaN"):
        run_steps.RunCheckpoints(tmp_path).restore(train)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["trainable/w", "opt/mu/w"])
def test_a_step_that_is_not_finite_is_not_saved_and_the_last_good_one_stays(place, value, tmp_path):
    def state(bad: dict[str, float]):
        return traverse_util.unflatten_dict(
            {name: jnp.array([1.0, bad.get(name, 2.0)]) for name in ("trainable/w", "opt/mu/w")}, sep="/"
        )

    store = run_steps.RunCheckpoints(tmp_path)
    with pytest.raises(InputError, match=rf"{place}.*not saved, there is no step before it"):
        store.save(1, state({place: value}))
    store = run_steps.RunCheckpoints(tmp_path)
    store.save(2, state({}))
    with pytest.raises(InputError, match=rf"/3 \[{place}\].*{place} has 1 of 2.*not saved, step 2 before it is whole"):
        store.save(3, state({place: value}))
    again = run_steps.RunCheckpoints(tmp_path)
    assert again.latest == 2
    found = again.restore(state({}))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state({})))


def test_values_beyond_a_narrower_dtype_are_refused_while_they_become_infinite(tmp_path):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    packed(tmp_path / "largest", {"w": np.float32([1.0, -3.4e38])})  # above the largest of bfloat16 too
    with pytest.raises(InputError, match="w has 1 of 2 values not finite"):
        stored.stored_params(tmp_path / "largest").load({"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=here)})
    params = {"w": np.float32([1.0, 70000.0])}
    packed(tmp_path, params)
    wanted = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16, sharding=here)}
    assert np.isfinite(np.asarray(stored.stored_params(tmp_path).load(wanted)["w"], np.float32)).all()
    wanted = {"w": jax.ShapeDtypeStruct((2,), jnp.float16, sharding=here)}
    with pytest.raises(InputError, match="w has 1 of 2 values not finite"):
        stored.stored_params(tmp_path).load(wanted)
    with pytest.raises(InputError, match="w has 1 of 2 values not finite"):
        models.save_packed(tmp_path / "half", params, {}, np.float16)
    assert not (tmp_path / "half" / models.PACKED).exists()


def test_what_lies_on_an_accelerator_is_looked_at_there():
    flags = finite._all_finite((jnp.ones(3), jnp.array([1, jnp.inf]), jnp.int8([1]), jnp.array(jnp.nan, jnp.bfloat16)))
    assert flags.tolist() == [True, False, True, False]


@pytest.mark.parametrize("faulty", [True, False])
def test_what_another_process_finds_stops_this_one_too(faulty, monkeypatch):
    """Shards that are elsewhere: each process looks at its own, and all come to the same result."""
    leaf = mock.Mock(spec=jax.Array, addressable_shards=[], is_fully_addressable=False)
    leaf.devices = lambda: {mock.Mock(platform="cpu")}
    monkeypatch.setattr(finite.multihost_utils, "process_allgather", lambda own: np.array([own, faulty]))
    if not faulty:
        assert finite.check({"w": leaf}, "here") == {"w": leaf}
        return
    with pytest.raises(InputError, match="some parameters are not finite.*the other processes"):
        finite.check({"w": leaf}, "here")


def test_shards_of_one_leaf_are_counted_together_and_copies_once():
    shards = [mock.Mock(data=np.float32([np.nan, 1]), replica_id=0), mock.Mock(data=np.float32([2, 3]), replica_id=0)]
    shards += [mock.Mock(data=np.float32([np.inf, -np.inf]), replica_id=0)]
    shards += [mock.Mock(data=np.float32([np.nan, 1]), replica_id=1)]
    leaf = mock.Mock(spec=jax.Array, addressable_shards=shards)
    assert finite._faults(leaf) == (1, 2, 4)
    assert finite._faults(mock.Mock(spec=jax.Array, addressable_shards=shards[1:2])) is None


def test_many_broken_tensors_are_counted_and_some_are_named():
    broken = {f"w{i}": np.float32([np.nan, 1]) for i in range(5)}
    with pytest.raises(InputError, match=r"5 tensors.*w0 has.*w2 has 1 of 2 values not finite \(1 NaN\); and 2 more"):
        finite.check(broken, "x")


def test_an_answer_of_what_is_no_number_names_its_example():
    example = Example(id="clip 7", task="ave", instruction="?")
    check_finite(example, True)
    for logits, masks, what in ((False, True, "logits"), (True, False, "masks")):
        with pytest.raises(InputError, match=f"example 'clip 7'.*{what} of the model are not finite"):
            check_finite(example, logits, masks)
