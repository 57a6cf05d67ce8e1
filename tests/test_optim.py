"""Split, schedules and optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crab_jax import optim
from crab_jax.io.errors import InputError

PARAMS = {"a": {"w": jnp.ones((2, 3)), "lora_A": jnp.zeros(2)}, "b": {"w": jnp.ones(4)}}


def test_split_covers_every_leaf_once_and_merge_inverts_it():
    trainable, frozen = optim.split(PARAMS, ("a/lora_.*",), ("a/w", "b/.*"))
    assert len(jax.tree.leaves(trainable)) == 1 and len(jax.tree.leaves(frozen)) == 2
    merged = optim.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, PARAMS))


@pytest.mark.parametrize(
    "trainable, frozen, named",
    [
        (("a/.*",), (), "b/w"),  # uncovered leaf
        (("a/.*",), (".*",), "a/"),  # doubly covered leaf
        (("a/.*",), ("b/.*", "typo/.*"), "typo/.*"),  # pattern without a leaf
        (("a/lora",), ("a/w", "b/.*", "a/lora_A"), "a/lora"),  # patterns match in full, not a prefix
    ],
)
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


def test_a_larger_gradient_is_scaled_down_to_the_norm_and_a_smaller_one_stays():
    """Seen in the first moments, which are a tenth of the gradient: Adam's first update hides the scale."""
    tx = optim.optimizer(optim.OptimConfig(lr=1e-1, schedule="constant", clip_norm=1.0), 10)
    params = {"w": jnp.zeros(3)}
    for gradient, wanted in (
        ([3e4, 4e4, 0.0], [0.6, 0.8, 0.0]),
        ([0.03, 0.04, 0.0], [0.03, 0.04, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ):
        _, opt = tx.update({"w": jnp.array(gradient)}, tx.init(params), params)
        np.testing.assert_allclose(optax.tree.get(opt, "mu")["w"], 0.1 * np.array(wanted), rtol=1e-5)


TREE = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(4)}


def assert_not_taken(before, after):
    """Parameters and moments are those of before; the schedule goes on."""
    (params, opt), (kept, moved, taken) = before, after
    assert not bool(taken) and jax.tree.all(jax.tree.map(np.array_equal, kept, params))
    for now, old in zip(jax.tree.leaves(moved), jax.tree.leaves(opt), strict=True):
        assert np.array_equal(now, old + (now.dtype == np.int32))


def test_a_step_that_is_not_sound_changes_nothing_but_its_count():
    tx = optim.optimizer(optim.OptimConfig(lr=1.0, schedule="constant", clip_norm=0.0), 10)
    step = jax.jit(lambda opt, sound: optim.apply(tx, TREE, opt, TREE, sound))
    _, opt, taken = step(tx.init(TREE), jnp.bool_(True))
    new, _, again = step(opt, jnp.bool_(True))
    assert bool(taken) and bool(again) and not jax.tree.all(jax.tree.map(np.array_equal, new, TREE))
    assert_not_taken((TREE, opt), step(opt, jnp.bool_(False)))


@pytest.mark.parametrize(
    "name, config, moments, params, grads",
    [
        # An old momentum over a second moment that is gone: the update is infinite, by values that are all in bounds.
        ("eps", {"eps": 1e-30, "b1": 0.999999}, (1e20, 0.0), 1.0, 0.0),
        ("decay", {"lr": 10.0, "weight_decay": 100.0}, (0.0, 0.0), 1e36, 0.0),
        ("rate", {"lr": 10.0}, (-3e38, 0.01), 1.0, 0.0),
        ("norm", {"lr": 1e-3}, (0.0, 0.0), 3e38, 0.0),  # finite parameters that nothing can be computed with
    ],
)
def test_a_step_after_which_a_parameter_would_not_be_finite_is_not_taken(name, config, moments, params, grads):
    tx = optim.optimizer(optim.OptimConfig(**{"schedule": "constant", "clip_norm": 0.0, **config}), 10)
    trainable = {**TREE, "b": jnp.full(4, params)}
    opt = tx.update(jax.tree.map(jnp.zeros_like, TREE), tx.init(trainable), trainable)[1]  # past the rate of 0
    opt = tx.update(jax.tree.map(jnp.zeros_like, TREE), opt, trainable)[1]
    for key, value in zip(("mu", "nu"), moments, strict=True):
        tree = optax.tree.get(opt, key)
        opt = optax.tree.set(opt, **{key: {**tree, "b": jnp.full(4, value)}})
    step = jax.jit(lambda opt, p: optim.apply(tx, jax.tree.map(lambda x: x * 0 + grads, p), opt, p, jnp.bool_(True)))
    assert_not_taken((trainable, opt), step(opt, trainable))


@pytest.mark.parametrize("b1, b2", [(0.9, 0.999), (0.0, 0.0), (0.999999, 0.999999), (0.0, 0.999999), (0.9, 0.0)])
def test_moments_of_gradients_whose_norm_is_finite_are_finite(b1, b2):
    """Why `apply` looks at parameters only: at the largest gradient that has a norm, for many steps."""
    tx = optim.optimizer(optim.OptimConfig(lr=1e-12, b1=b1, b2=b2, clip_norm=0.0), 100)
    params, largest = {"w": jnp.zeros(2)}, {"w": jnp.float32([1.8e19, 0])}
    assert np.isfinite(optax.global_norm(largest)) and not np.isfinite(optax.global_norm({"w": jnp.float32([1.9e19])}))
    step = jax.jit(lambda opt, params, sign: optim.apply(tx, {"w": sign * largest["w"]}, opt, params, jnp.bool_(True)))
    opt = tx.init(params)
    for number in range(50):
        params, opt, taken = step(opt, params, 1.0 - 2 * (number % 3 == 1))
        assert bool(taken) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, opt)))
