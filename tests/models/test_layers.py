"""Products whose weights' gradients are summed in float32, whatever the dtype of the activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.models.layers import Dense, product


def drawn(dtype=jnp.float32, rows: int = 64):
    keys = jax.random.split(jax.random.key(0), 3)
    x, cotangent = (jax.random.normal(key, (2, rows, 8)).astype(dtype) for key in keys[:2])
    return x, jax.random.normal(keys[2], (8, 8)), cotangent


def test_the_product_and_its_gradients_are_the_plain_ones():
    x, weight, cotangent = drawn()
    found, found_vjp = jax.vjp(product, x, weight)
    wanted, wanted_vjp = jax.vjp(jnp.matmul, x, weight)
    np.testing.assert_array_equal(found, wanted)
    for a, b in zip(found_vjp(cotangent), wanted_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_weight_is_not_rounded_to_bfloat16():
    x, weight, cotangent = drawn(jnp.bfloat16)
    of_x, of_weight = jax.vjp(product, x, weight)[1](cotangent)
    exact = np.einsum("bni,bno->io", x.astype(jnp.float32), cotangent.astype(jnp.float32))
    assert of_x.dtype == jnp.bfloat16 and of_weight.dtype == jnp.float32
    np.testing.assert_allclose(of_weight, exact, rtol=1e-5, atol=1e-5)
    cast = jax.vjp(lambda x, w: x @ w.astype(x.dtype), x, weight)[1](cotangent)[1]
    assert np.abs(cast - exact).max() > 100 * np.abs(of_weight - exact).max()


def test_a_sum_over_256_devices_loses_a_hundredth_of_a_small_gradient_in_bfloat16_and_nothing_in_float32():
    """Each device's gradient has noise ten times the mean, as gradients of few rows have; a ring adds one at a time."""
    rng = np.random.default_rng(0)
    parts = (1 + 10 * rng.normal(size=(256, 4096))).astype(np.float32)
    exact = parts.astype(np.float64).sum(0)

    def ring(dtype):
        total = jax.lax.scan(lambda total, part: (total + part, None), jnp.zeros(4096, dtype), parts.astype(dtype))[0]
        return np.asarray(total, np.float64)

    errors = {dtype: np.linalg.norm(ring(dtype) - exact) / np.linalg.norm(exact) for dtype in ("float32", "bfloat16")}
    assert errors["float32"] < 1e-6 and 0.005 < errors["bfloat16"] < 0.05


@pytest.mark.parametrize("name", ["x", "weight"])
def test_nothing_is_computed_for_an_argument_without_a_gradient(name):
    x, weight, cotangent = drawn()
    of = {"x": lambda: jax.grad(lambda x: (product(x, weight) * cotangent).sum())(x)}
    of["weight"] = lambda: jax.grad(lambda weight: (product(x, weight) * cotangent).sum())(weight)
    shapes = [v.aval.shape for eqn in jax.make_jaxpr(of[name])().eqns for v in eqn.outvars]
    products = str(jax.make_jaxpr(of[name])()).count("dot_general")
    assert shapes[-1] == {"x": x.shape, "weight": weight.shape}[name]
    assert products <= 2 + (name == "weight")


def test_a_dense_layer_is_that_of_linen():
    x = jax.random.normal(jax.random.key(1), (3, 5))
    params = {"kernel": jax.random.normal(jax.random.key(2), (5, 7)), "bias": jnp.arange(7.0)}
    wanted = nn.Dense(7).apply({"params": params}, x)
    np.testing.assert_array_equal(Dense(7, "float32").apply({"params": params}, x), wanted)
    half = Dense(7, "bfloat16").apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), wanted, atol=0.1)
    shapes = {name: leaf.shape for name, leaf in Dense(7, "float32").init(jax.random.key(0), x)["params"].items()}
    assert shapes == {"kernel": (5, 7), "bias": (7,)}
