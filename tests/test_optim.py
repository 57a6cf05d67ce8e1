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
    ("trainable", "frozen", "named"),
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


@pytest.mark.parametrize(("share", "steps", "warmup"), [(0.1, 100, 10), (0.03, 101, 4), (0.0, 50, 2)])
def test_every_rate_of_a_run(share, steps, warmup):
    """A linear warm-up of the share rounded up, of at least two steps, then half a cosine wave to zero, or flat."""
    cosine, constant = (
        optim.learning_rate(optim.OptimConfig(lr=2.0, schedule=name, warmup_share=share), steps)
        for name in ("cosine", "constant")
    )
    for t in range(steps + 1):
        falling = 1 + np.cos(np.pi * (t - warmup) / (steps - warmup))
        assert np.isclose(cosine(t), 2 * t / warmup if t < warmup else falling, atol=1e-5), t
        assert np.isclose(constant(t), 2 * min(t / warmup, 1), atol=1e-6), t


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_shorter_than_its_warmup_has_rates(schedule, steps):
    rate = optim.learning_rate(optim.OptimConfig(lr=2.0, schedule=schedule, warmup_share=1.0), steps)
    rates = [float(rate(t)) for t in range(steps + 2)]
    assert rates[0] == 0 and all(0 <= value <= 2 for value in rates) and max(rates) > 0


def test_a_cosine_that_is_all_warmup_ends_one_step_after_its_peak():
    rate = optim.learning_rate(optim.OptimConfig(lr=2.0, schedule="cosine", warmup_share=1.0), 3)
    assert [round(float(rate(t)), 5) for t in (2, 3, 4)] == [1.33333, 2, 0]


@pytest.mark.parametrize(
    ("trainable", "said"), [(("a/.*",), "matched by neither of trainable"), (("a/.*", "b/.*"), "matched by both")]
)
def test_what_is_wrong_with_the_patterns_is_said(trainable, said):
    with pytest.raises(InputError, match=f"parameter is {said}"):
        optim.split(PARAMS, trainable, ("b/.*",) if "both" in said else ("b/x",))


def test_the_decay_ends_at_zero_and_stays_there():
    rate = optim.learning_rate(optim.OptimConfig(lr=2.0, schedule="warmup_decay", warmup_share=0.5), 4)
    assert [float(rate(t)) for t in (2, 3, 4, 5)] == [2.0, 1.0, 0.0, 0.0]


def test_the_default_is_the_released_recipe():
    released = {"lr": 1e-4, "weight_decay": 0.0, "b1": 0.9, "b2": 0.999, "clip_norm": 1.0, "warmup_share": 0.03}
    assert vars(optim.OptimConfig()) == {**released, "schedule": "cosine", "eps": 1e-8, "accumulate": 1}


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("lr", (1e-12, 10.0), (0.0, 1e-13, 10.1)),
        ("warmup_share", (0.0, 1.0), (-0.1, 1.1)),
        ("weight_decay", (0.0, 1e-12, 100.0), (1e-13, -1.0, 100.1)),
        ("b1", (0.0, 0.999999), (-0.1, 0.9999999, 1.0)),
        ("b2", (0.0, 0.999999), (-0.1, 0.9999999, 1.0)),
        ("eps", (1e-30, 1.0), (0.0, 1e-31, 1.1)),
        ("clip_norm", (0.0, 1e-12, 1e30), (1e-13, 1.1e30, -1.0)),
        ("accumulate", (0, 2**24), (-1, 2**24 + 1, 1.5)),
        ("schedule", optim.SCHEDULES, ("", "linear")),
    ],
)
def test_values_at_the_bounds_are_taken_and_those_beyond_are_refused(field, allowed, refused):
    for value in allowed:
        assert getattr(optim.OptimConfig(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(InputError, match=field) as error:
            optim.OptimConfig(**{field: value})
        assert error.value.field == f"optim.{field}"


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


def test_steps_are_those_of_adamw():
    """Loshchilov and Hutter, Algorithm 2, with bias correction and a decay that is scaled by the rate."""
    cfg = optim.OptimConfig(
        lr=0.5, schedule="constant", warmup_share=0.0, b1=0.8, b2=0.6, eps=0.01, weight_decay=0.1, clip_norm=0.0
    )
    tx, rng = optim.optimizer(cfg, 10), np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    opt, wanted, m, v = tx.init(params), np.asarray(params["w"], np.float64), np.zeros(3), np.zeros(3)
    for t in range(1, 5):
        gradient, rate = rng.normal(size=3), 0.5 * min((t - 1) / 2, 1)
        m, v = 0.8 * m + 0.2 * gradient, 0.6 * v + 0.4 * gradient**2
        step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.6**t)) + 0.01)
        wanted = wanted - rate * (step + 0.1 * wanted)
        params, opt, _ = optim.apply(tx, {"w": jnp.float32(gradient)}, opt, params, jnp.bool_(True))
        np.testing.assert_allclose(params["w"], wanted, rtol=1e-5)


def test_clipping_may_be_off_and_checkpoints_have_the_same_tree():
    trees = [optim.optimizer(optim.OptimConfig(clip_norm=norm), 10).init(PARAMS) for norm in (0.0, 1.0)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    tx = optim.optimizer(optim.OptimConfig(clip_norm=0.0), 10)
    _, opt = tx.update({"w": jnp.full(2, 1e6)}, tx.init({"w": jnp.zeros(2)}), {"w": jnp.zeros(2)})
    np.testing.assert_allclose(optax.tree.get(opt, "mu")["w"], 1e5, rtol=1e-5)


def test_merge_joins_folders_that_both_trees_have_and_keeps_its_inputs():
    left, right = {"a": {"b": {"x": 1}}, "c": 2}, {"a": {"b": {"y": 3}, "d": 4}}
    assert optim.merge(left, right) == {"a": {"b": {"x": 1, "y": 3}, "d": 4}, "c": 2}
    assert right == {"a": {"b": {"y": 3}, "d": 4}}


def test_only_floating_leaves_are_cast():
    cast = optim.cast_floating({"w": jnp.ones(2), "half": jnp.ones(2, jnp.float16), "n": jnp.arange(3)}, jnp.bfloat16)
    assert [cast[name].dtype for name in ("w", "half", "n")] == [jnp.bfloat16, jnp.bfloat16, jnp.int32]


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
    ("name", "config", "moments", "params", "grads"),
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


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.0, 0.0), (0.999999, 0.999999), (0.0, 0.999999), (0.9, 0.0)])
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
