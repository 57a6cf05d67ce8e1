"""Every attention kernel computes the plain formula, forward and backward, and is taken where it fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from crab_jax.io.errors import InputError
from crab_jax.models import attention
from crab_jax.parallel import sharding


def drawn(heads: int, kv_heads: int, length: int = 256, width: int = 128, rows: int = 2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, n, length, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_splash_equals_the_formula_and_so_do_its_gradients(heads, kv_heads, on_mesh):
    """In Pallas' interpreter, with as many key heads as queries and with fewer; alone and inside of a mesh."""
    *qkv, weights = drawn(heads, kv_heads)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1]) if on_mesh else None

    def total(kernel):
        def run(q, k, v):
            with sharding.constrained(mesh):
                return (kernel(q, k, v) * weights).sum()

        return jax.jit(jax.value_and_grad(run, (0, 1, 2)))(*qkv)

    (found, found_grads) = total(lambda q, k, v: attention.splash_attention(q, k, v, interpret=True))
    (wanted, wanted_grads) = total(lambda q, k, v: attention.attend(q, k, v, jnp.tril(jnp.ones((1, 256, 256), bool))))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-2)
    for a, b in zip(found_grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_position_sees_itself_and_what_comes_before_it():
    q, k, v, _ = drawn(2, 2, length=8, width=4)
    out = attention.causal(q, k, v, "einsum")
    changed = attention.causal(q, k.at[:, :, 5].add(1), v.at[:, :, 5].add(1), "einsum")
    same = np.isclose(out, changed).all((0, 2))
    assert same[:5].all() and not same[5:].any()
    np.testing.assert_allclose(out[:, 0], v[:, :, 0].reshape(2, -1), rtol=1e-6)


def test_keys_that_are_hidden_change_nothing():
    q, k, v, _ = drawn(2, 2, length=8, width=4)
    visible = jnp.ones((2, 8), bool).at[:, 2].set(False)
    out = attention.causal(q, k, v, "auto", visible)
    changed = attention.causal(q, k.at[:, :, 2].add(1), v.at[:, :, 2].add(1), "auto", visible)
    np.testing.assert_array_equal(out[:, 3:], changed[:, 3:])


@pytest.mark.parametrize(
    ("kind", "platform", "length", "width", "only_causal", "wanted"),
    [
        ("auto", "tpu", 1024, 128, True, "splash"),
        ("auto", "tpu", 1024, 128, False, "einsum"),  # left padding
        ("auto", "tpu", 1000, 128, True, "einsum"),
        ("auto", "tpu", 1024, 64, True, "einsum"),
        ("auto", "gpu", 1024, 128, True, "cudnn"),
        ("auto", "gpu", 1024, 128, False, "einsum"),
        ("auto", "cpu", 1024, 128, True, "einsum"),
        ("auto", "", 1024, 128, True, "einsum"),
        ("einsum", "tpu", 1024, 128, True, "einsum"),
        ("splash", "cpu", 1024, 128, True, "splash"),
        ("cudnn", "cpu", 1000, 64, True, "cudnn"),
    ],
)
def test_the_kernel_is_that_of_the_device_if_the_shapes_suit_it(
    monkeypatch, kind, platform, length, width, only_causal, wanted
):
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, abstract_device=device if platform else None)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.kind_for(kind, length, width, "bfloat16", only_causal) == wanted


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU may have cuDNN")
def test_a_gpu_whose_cudnn_is_not_there_takes_the_formula(monkeypatch):
    """As on a machine that compiles for one ahead of time."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, abstract_device=device)
    assert not attention._has_cudnn()
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.kind_for("auto", 1024, 128, "bfloat16", only_causal=True) == "einsum"
        assert attention.kind_for("auto", 1024, 128, "float32", only_causal=True) == "einsum"


@pytest.mark.parametrize(
    ("kind", "length", "width", "dtype", "only_causal", "problem"),
    [
        ("splash", 1000, 128, "bfloat16", True, "is splash, which cannot attend over 1000 positions of 128 channels"),
        ("splash", 1024, 64, "bfloat16", True, "of 64 channels"),
        ("cudnn", 1024, 128, "bfloat16", False, "with padding to the left"),
        ("cudnn", 1024, 128, "float32", True, "128 channels a head in float32"),
        ("cudnn", 1024, 256, "bfloat16", True, "of 256 channels"),
    ],
)
def test_a_kernel_that_cannot_is_refused_by_name(kind, length, width, dtype, only_causal, problem):
    with pytest.raises(InputError, match=problem) as refused:
        attention.kind_for(kind, length, width, dtype, only_causal)
    assert refused.value.field == "sizes.llama.attention"
