"""Key tables convert both ways and refuse files that do not fill them."""

import numpy as np
import pytest

from crab_jax.convert.keymap import Rule, from_params, to_params, unread
from crab_jax.io.errors import InputError

RULES = [
    Rule("layers.0.w.weight", "a/layers[0]/w/kernel", "linear"),
    Rule("layers.1.w.weight", "a/layers[1]/w/kernel", "linear"),
    Rule("conv.weight", "conv/kernel", "conv2d"),
    Rule("up.weight", "up/kernel", "conv_transpose2d"),
    Rule("position.weight", "position/kernel", "conv1d"),
    Rule("norm.weight", "norm/scale"),
]


def tensors():
    rng = np.random.default_rng(0)
    shapes = [(3, 2), (3, 2), (5, 4, 2, 3), (4, 5, 2, 2), (6, 2, 7), (8,)]
    return {rule.source: rng.normal(size=shape) for rule, shape in zip(RULES, shapes, strict=True)}


def test_layouts_and_stacks():
    source = tensors()
    params = to_params(RULES, source)
    assert params["a"]["layers"]["w"]["kernel"].shape == (2, 2, 3)
    np.testing.assert_array_equal(params["a"]["layers"]["w"]["kernel"][1], source["layers.1.w.weight"].T)
    assert params["conv"]["kernel"].shape == (2, 3, 4, 5)  # kH, kW, in, out
    assert params["up"]["kernel"].shape == (2, 2, 5, 4)  # kH, kW, out, in
    assert params["position"]["kernel"].shape == (7, 2, 6)  # k, in, out


def test_export_inverts_import():
    back = from_params(RULES, to_params(RULES, tensors()))
    assert list(back) == [rule.source for rule in RULES]
    for name, value in tensors().items():
        np.testing.assert_array_equal(back[name], value)
        assert back[name].flags.c_contiguous


def test_missing_keys_are_counted_and_named():
    source = tensors()
    del source["conv.weight"], source["norm.weight"]
    with pytest.raises(InputError, match="weights.bin.*2 expected keys.*norm.weight"):
        to_params(RULES, source, "weights.bin")


def test_a_table_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="a/layers/w/kernel"):
        to_params(RULES[1:], tensors())


@pytest.mark.parametrize("odd", [np.zeros((4, 2)), np.zeros((3, 2), np.float32)])
def test_layers_must_be_alike(odd):
    with pytest.raises(InputError, match="layers.1.w.weight.*siblings"):
        to_params(RULES, {**tensors(), "layers.1.w.weight": odd})


def test_one_leaf_can_be_stacked_twice():
    rules = [Rule(f"{i}.B{j}", f"layers[{i}]/B[{j}]", "linear") for i in range(2) for j in range(3)]
    source = {rule.source: np.full((5, 4), float(n)) for n, rule in enumerate(rules)}
    params = to_params(rules, source)
    assert params["layers"]["B"].shape == (2, 3, 4, 5) and params["layers"]["B"][1, 2, 0, 0] == 5
    assert all((from_params(rules, params)[name] == value).all() for name, value in source.items())


def test_unread_names_are_those_without_a_rule_or_an_excuse():
    names = ["conv.weight", "head.weight", "head.bias", "extra"]
    assert unread(RULES, names, [r"head\..*"]) == ["extra"]
