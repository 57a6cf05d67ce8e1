"""Dropout: its bits are as good as random ones, and belong to an element of a row, not to where the row is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.models.dropout import BITS, Dropout, keep

RATE = 0.05
KEY = jax.random.key(3)


def dropped(key=KEY, rows=None, shape=(16, 256), rate=RATE, bits="hash") -> np.ndarray:
    """float64[B, *shape]: 1 where an element is dropped."""
    rows = jnp.arange(64) if rows is None else jnp.asarray(rows)
    return 1.0 - np.asarray(keep(key, rows, shape, rate, bits))


def deviations(samples: np.ndarray, probability: float) -> float:
    """How many standard deviations the share of ones lies from a probability, for independent samples."""
    return (samples.mean() - probability) / np.sqrt(probability * (1 - probability) / samples.size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_rate(rate, bits):
    assert abs(deviations(dropped(rate=rate, bits=bits), rate)) < 4


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    x = jnp.full((8, 4, 512), 2.0)
    y = np.asarray(Dropout(0.25).apply({}, x, jnp.arange(8), rngs={"dropout": KEY}))
    assert set(np.unique(y)) == {0.0, np.float32(2 / 0.75)} and y.mean() == pytest.approx(2, rel=0.02)
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x, None), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, jnp.arange(8)), x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_row_position_and_feature_drops_as_often_as_others(axis):
    """Chi-square over the counts of each index of an axis: its mean is the degrees of freedom n, its deviation 2n."""
    bits = dropped()
    others = tuple(other for other in range(3) if other != axis)
    counts, each = bits.sum(others), bits.size / bits.shape[axis]
    squares = (((counts - RATE * each) ** 2) / (each * RATE * (1 - RATE))).sum()
    freedom = len(counts)
    assert abs(squares - freedom) < 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 1, 1), (2, 4, 8), (8, 0, 128)]
)
def test_neighbours_are_independent(shift):
    """At rate 1/2, where a hash shows its structure best: an element and its neighbour differ half of the time."""
    bits = dropped(rate=0.5)
    other = np.roll(bits, shift, (0, 1, 2))
    assert abs(deviations(bits != other, 0.5)) < 4


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_corners_of_rectangles_are_independent(rate):
    """A place and a feature are hashed apart and then joined, so four corners could be tied to each other."""
    bits = dropped(rate=rate).reshape(-1, 256) - rate
    products = bits[::2, ::2] * bits[1::2, ::2] * bits[::2, 1::2] * bits[1::2, 1::2]
    assert abs(products.mean()) < 4 * (rate * (1 - rate)) ** 2 / np.sqrt(products.size)


def test_pairs_of_elements_are_dropped_together_as_often_as_independent_ones():
    bits = dropped(rate=0.1).reshape(-1, 256)
    together = bits.T @ bits / len(bits)
    pairs = together[np.triu_indices(256, 1)]
    standard = (pairs - 0.01) / np.sqrt(0.01 * 0.99 / len(bits))
    assert abs(standard.mean()) < 0.05 and 0.9 < standard.std() < 1.1 and abs(standard).max() < 6.5


@pytest.mark.parametrize("bits", BITS)
def test_keys_draw_independently(bits):
    """Layers and steps differ by their key only, which may differ in one bit."""
    first = dropped(rate=0.5, bits=bits)
    keys = [jax.random.fold_in(KEY, 1)] + [
        jax.random.wrap_key_data(jax.random.key_data(KEY) ^ jnp.uint32(flip)) for flip in ((1, 0), (0, 1), (0, 2**31))
    ]
    for key in keys:
        assert abs(deviations(first != dropped(key, rate=0.5, bits=bits), 0.5)) < 4


def test_one_rate_drops_what_a_lower_rate_drops():
    """The bits are compared with the rate, so the rate changes nothing else."""
    assert (dropped(rate=0.1) <= dropped(rate=0.2)).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(bits):
    whole = dropped(rows=range(8), bits=bits)
    np.testing.assert_array_equal(dropped(rows=[5, 1], bits=bits), whole[[5, 1]])
    assert (whole[0] != whole[1]).any()


def test_a_vector_per_row_is_dropped_too():
    assert dropped(shape=(256,)).shape == (64, 256)
    assert abs(deviations(dropped(shape=(4096,)), RATE)) < 4


def lowbias32(x: int, last: bool = True) -> int:
    """The finaliser of hash-prospector, in integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16) if last else x


def test_an_element_is_dropped_by_the_hash_of_its_place():
    """Written out in integers: a run that goes on draws what it would have drawn, in every version."""
    first, second = (int(part) for part in jax.random.key_data(KEY))
    found = np.asarray(keep(KEY, jnp.array([0, 7]), (3, 2, 5), 0.3))
    for number, row in enumerate((0, 7)):
        of_row = lowbias32(lowbias32(row ^ first) ^ second)
        for place in range(6):
            of_place = lowbias32(of_row ^ lowbias32((place + first) % 2**32))
            for feature in range(5):
                mixed = lowbias32(of_place ^ lowbias32(feature ^ second), last=False)
                signed = mixed - 2**32 if mixed >= 2**31 else mixed
                assert found[number, place // 2, place % 2, feature] == (signed >= round(0.3 * 2**32) - 2**31)
