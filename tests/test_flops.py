"""Counted arithmetic against closed forms: 2 N per token forwards, 4 N with a frozen matrix, 6 N with a trained one."""

import jax
import jax.numpy as jnp
import pytest

from crab_jax.aot import flops
from crab_jax.parallel import chips

TOKENS, WIDTH, LAYERS = 32, 16, 5
X, W = jnp.ones((TOKENS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
N = LAYERS * WIDTH * WIDTH


def network(bias, weights, x):
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x + bias, weights)[0].sum()


def test_a_forward_pass_costs_two_flops_per_weight_and_token():
    assert flops.count(network, 0.0, W, X).flops == 2 * N * TOKENS


def test_frozen_weights_cost_four_and_trained_ones_six():
    assert flops.count(jax.grad(network, argnums=0), 0.0, W, X).flops == 4 * N * TOKENS
    assert flops.count(jax.grad(network, argnums=(0, 1)), 0.0, W, X).flops == 6 * N * TOKENS


def test_rematerialisation_adds_a_forward_pass():
    def again(bias, weights, x):
        layer = jax.checkpoint(lambda y, w: (jnp.tanh(jnp.tanh(y @ w) @ w), None))
        return jax.lax.scan(layer, x + bias, weights)[0].sum()

    plain = 4 * 2 * N * TOKENS
    assert plain < flops.count(jax.grad(again), 0.0, W, X).flops <= plain * 1.5


def test_convolutions_and_bytes():
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 7), jnp.float32)
    work = flops.count(conv, x, k)
    assert work.flops == 2 * (2 * 6 * 6 * 7) * (3 * 3 * 3)
    assert work.bytes == 4 * (x.size + k.size + 2 * 6 * 6 * 7)


def test_the_roofline_takes_the_slowest():
    chip = chips.CHIPS[0]
    times = flops.roofline(chip, flops.Work(2 * chip.flops, chip.hbm_bandwidth), 3.0)
    assert times == pytest.approx({"compute": 2.0, "hbm": 1.0, "interconnect": 3.0, "step": 3.0})


def test_the_network_between_slices_has_its_own_time_where_its_speed_is_known():
    moves = {"all-reduce": {"count": 1, "bytes": 3.125e9}}  # which a chip sends twice
    by_name = {chip.name: chip for chip in chips.CHIPS}
    times = flops.roofline(by_name["v5e"], flops.Work(), 0.0, moves)
    assert times == pytest.approx({"compute": 0, "hbm": 0, "interconnect": 0, "dcn": 2.0, "step": 2.0})
    assert "dcn" not in flops.roofline(by_name["v4"], flops.Work(), 0.0, moves)
