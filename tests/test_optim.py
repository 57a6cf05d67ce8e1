"""Split, schedules and optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax import optim
from crab_jax.errors import InputError

PARAMS = {"a": {"w": jnp.ones((2, 3)), "lora_A": jnp.zeros(2)}, "b": {"w": jnp.ones(4)}}


def test_split_covers_every_leaf_once_and_merge_inverts_it():
    trainable, frozen = optim.split(PARAMS, ("a/lora_.*",), ("a/w", "b/.*"))
    assert len(jax.tree.leaves(trainable)) == 1 and len(jax.tree.leaves(frozen)) == 2
    merged = optim.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, PARAMS))


@pytest.mark.parametrize("trainable, frozen, named", [
    (("a/.*",), (), "b/w"),  # uncovered leaf
    (("a/.*",), (".*",), "a/"),  # doubly covered leaf
    (("a/.*",), ("b/.*", "typo/.*"), "typo/.*"),  # pattern without a leaf
    (("a/lora",), ("a/w", "b/.*", "a/lora_A"), "a/lora"),  # patterns match in full, not a prefix
])
def test_patterns_that_do_not_partition_are_refused_by_name(trainable, frozen, named):
    with pytest.raises(InputError, match=named.replace("*", r"\*").replace(".", r"\.")):
        optim.split(PARAMS, trainable, frozen)


def test_cosine_rises_to_the_peak_and_falls_to_zero():
    schedule = optim.learning_rate(optim.OptimConfig(lr=2.0, schedule="cosine", warmup_share=0.1), 100)
    assert schedule(0) == 0 and np.isclose(schedule(10), 2.0) and np.isclose(schedule(100), 0, atol=1e-6)


def test_warmup_decay_is_deepspeeds():
    """lr ln(t+1)/ln(W) up to W, then lr (T-t)/(T-W): DeepSpeed 0.12.6 WarmupDecayLR with its default log warm-up."""
    schedule = optim.learning_rate(optim.OptimConfig(lr=1.0, schedule="warmup_decay", warmup_share=0.1), 100)
    warmup = 10
    for t in range(101):
        wanted = np.log(t + 1) / np.log(warmup) if t < warmup else (100 - t) / 90
        assert np.isclose(float(schedule(t)), min(wanted, 1.0), atol=1e-6), t


def test_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="cosine"):
        optim.learning_rate(optim.OptimConfig(schedule="cosnie"), 10)


def test_clipping_bounds_the_first_update_direction():
    tx = optim.optimizer(optim.OptimConfig(lr=1e-1, schedule="constant", clip_norm=1.0), 10)
    params = {"w": jnp.zeros(3)}
    big, _ = tx.update({"w": jnp.array([3e4, 4e4, 0.0])}, tx.init(params), params)
    unit, _ = tx.update({"w": jnp.array([0.6, 0.8, 0.0])}, tx.init(params), params)
    np.testing.assert_allclose(big["w"], unit["w"], rtol=1e-5)


def test_a_step_that_is_not_sound_changes_nothing_but_its_count():
    tx = optim.optimizer(optim.OptimConfig(lr=1.0, schedule="constant", clip_norm=0.0), 10)
    params = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(4)}
    step = jax.jit(lambda opt, sound: optim.apply(tx, params, opt, params, sound))
    new, opt = step(tx.init(params), jnp.bool_(True))
    assert not jax.tree.all(jax.tree.map(np.array_equal, step(opt, jnp.bool_(True))[0], params))
    kept, after = step(opt, jnp.bool_(False))
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, params))
    for now, old in zip(jax.tree.leaves(after), jax.tree.leaves(opt), strict=True):
        assert np.array_equal(now, old + (now.dtype == np.int32)), "moments stay, the schedule goes on"
