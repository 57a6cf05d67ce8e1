"""Multi-head LoRA: the reference's numbers, the formula, dropout, and what a caller can see of the router."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.models.lora import LoraConfig, LoraDense


def relative_tolerance(golden) -> float:
    """Ten times the reference's own float32 error on the LLaMA logits, relative to their size."""
    noise = json.loads((golden / "manifest.json").read_text())["fp32_noise"]["llama.lora.logits(row 0)"]
    return 10 * noise["max_abs_err_fp32_vs_fp64"] / noise["max_abs"]


def weights(rng, width: int, features: int, lora: LoraConfig) -> dict[str, np.ndarray]:
    """Random parameters with a non-zero B."""
    return {
        "kernel": rng.normal(size=(width, features)),
        "lora_A": rng.normal(size=(width, lora.rank)),
        "lora_B": rng.normal(size=(lora.heads, lora.rank, features)),
        "lora_route": rng.normal(size=(width, lora.heads)),
    }


def as_float32(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def formula(x, p, lora: LoraConfig):
    """The update written out in float64."""
    scores = x @ p["lora_route"]
    route = np.exp(scores - scores.max(-1, keepdims=True))
    route /= route.sum(-1, keepdims=True)
    update = np.einsum("...h,...r,hrd->...d", route, x @ p["lora_A"], p["lora_B"])
    return x @ p["kernel"] + lora.alpha / lora.rank * update, route


def test_matches_the_reference(golden):
    z = np.load(golden / "lora.npz")
    heads, rank = z["w.lora_route.weight"].shape[0], z["w.lora_A.weight"].shape[0]
    lora = LoraConfig(rank=rank, alpha=float(z["scaling"]) * rank, heads=heads)
    params = as_float32(
        {
            "kernel": z["w.weight"].T,
            "lora_A": z["w.lora_A.weight"].T,
            "lora_route": z["w.lora_route.weight"].T,
            "lora_B": np.stack([z[f"w.lora_B{i}.weight"].T for i in range(heads)]),
        }
    )
    layer = LoraDense(z["y"].shape[-1], lora)
    y, state = layer.apply({"params": params}, z["x"], mutable=["router"])
    tolerance = relative_tolerance(golden)
    np.testing.assert_allclose(y, z["y"], rtol=0, atol=tolerance * np.abs(z["y"]).max())
    np.testing.assert_allclose(state["router"]["weights"][0], z["route_weight"], rtol=0, atol=tolerance)
    base = LoraDense(z["y"].shape[-1], None).apply({"params": {"kernel": params["kernel"]}}, z["x"])
    np.testing.assert_allclose(base, z["base_only"], rtol=0, atol=tolerance * np.abs(z["base_only"]).max())
    assert np.abs(z["y"] - z["base_only"]).max() > 0.1  # the update is not negligible in this file


@pytest.mark.parametrize("heads", [1, 3, 5])
@pytest.mark.parametrize("dropout_rows", [None, np.arange(2)])
def test_is_the_written_out_formula(heads, dropout_rows):
    """alpha differs from rank, B is not zero; without dropout the fused and the training path agree."""
    rng = np.random.default_rng(heads)
    lora = LoraConfig(rank=4, alpha=10.0, heads=heads, dropout=0.0 if dropout_rows is None else 1e-12)
    p, x = weights(rng, 12, 7, lora), rng.normal(size=(2, 3, 12))
    y, state = LoraDense(7, lora).apply(
        {"params": as_float32(p)}, x, dropout_rows, mutable=["router"], rngs={"dropout": jax.random.key(0)}
    )
    expected, route = formula(x, p, lora)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state["router"]["weights"][0], route, atol=1e-6)
    assert state["router"]["weights"][0].dtype == jnp.float32


@pytest.mark.parametrize("per_head", [False, True])
def test_dropout_is_drawn_once_unless_asked_per_head_and_never_for_the_router(per_head):
    lora = LoraConfig(rank=4, heads=3, dropout=0.5, dropout_per_head=per_head)
    rng = np.random.default_rng(0)
    p, x = weights(rng, 16, 12, lora), rng.normal(size=(6, 16))
    blocks = np.zeros((3, 4, 12))  # head h writes its A output to columns 4h .. 4h + 3
    for head in range(3):
        blocks[head, :, 4 * head : 4 * head + 4] = np.eye(4)
    params = as_float32({**p, "kernel": np.zeros((16, 12)), "lora_B": blocks})
    y, state = LoraDense(12, lora).apply(
        {"params": params}, x, jnp.arange(6), mutable=["router"], rngs={"dropout": jax.random.key(1)}
    )
    route = formula(x, p, lora)[1]
    np.testing.assert_allclose(state["router"]["weights"][0], route, atol=1e-5)
    per_head_input = np.asarray(y).reshape(6, 3, 4) / route[..., None] / lora.scale
    same = np.allclose(per_head_input[:, 0], per_head_input[:, 1], atol=1e-3)
    assert same != per_head
    assert not np.allclose(per_head_input[:, 0], x @ p["lora_A"], atol=1e-3)


def test_parameters_start_as_the_reference_starts_them():
    lora = LoraConfig()
    variables = LoraDense(300, lora, use_bias=True, axes=("embed", "mlp")).init(jax.random.key(0), jnp.ones((1, 400)))
    assert set(variables) == {"params"}  # no router output is kept by init
    params = nn.unbox(variables["params"])
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "kernel": (400, 300),
        "bias": (300,),
        "lora_A": (400, 8),
        "lora_B": (3, 8, 300),
        "lora_route": (400, 3),
    }
    bound = 400**-0.5
    for name in ("lora_A", "lora_route"):
        assert 0.95 * bound < np.abs(params[name]).max() <= bound
    assert not params["lora_B"].any()
    names = nn.get_partition_spec(variables)["params"]
    assert tuple(names["kernel"]) == ("embed", "mlp")
    assert tuple(names["lora_B"]) == (None, None, "mlp")


def test_boxed_and_plain_parameters_give_the_same():
    layer = LoraDense(5, LoraConfig(), axes=("embed", "mlp"))
    x = jnp.ones((2, 6))
    boxed = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(layer.apply(boxed, x), layer.apply(nn.unbox(boxed), x))


def test_bfloat16_layer_routes_in_float32():
    layer = LoraDense(5, LoraConfig(), dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (2, 6))
    y, state = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["router"])
    assert y.dtype == jnp.bfloat16
    assert state["router"]["weights"][0].dtype == jnp.float32
    np.testing.assert_allclose(state["router"]["weights"][0].sum(-1), 1, atol=1e-6)


def test_the_defaults_are_those_of_the_release():
    assert vars(LoraConfig()) == {
        "rank": 8,
        "alpha": 16.0,
        "heads": 3,
        "dropout": 0.05,
        "dropout_per_head": False,
        "dropout_bits": "hash",
    }
    assert LoraConfig().scale == 2.0


def test_a_layer_without_lora_has_no_lora_and_starts_with_a_deviation_of_two_hundredths():
    params = nn.unbox(LoraDense(300, None).init(jax.random.key(0), jnp.ones((1, 400))))["params"]
    assert set(params) == {"kernel"} and 0.019 < np.std(params["kernel"]) < 0.021
    biased = nn.unbox(LoraDense(3, None, use_bias=True).init(jax.random.key(0), jnp.ones((1, 4))))["params"]
    assert not biased["bias"].any()
    x = jax.random.normal(jax.random.key(1), (2, 4))
    shifted = LoraDense(3, None, use_bias=True).apply({"params": biased | {"bias": jnp.arange(3.0)}}, x)
    np.testing.assert_allclose(shifted, x @ biased["kernel"] + jnp.arange(3.0), rtol=1e-5, atol=1e-6)


def test_the_axes_of_a_layer_are_those_of_its_inputs_and_outputs():
    variables = LoraDense(7, LoraConfig(), True, axes=("embed", "mlp")).init(jax.random.key(0), jnp.ones((1, 5)))
    names = {name: tuple(spec) for name, spec in nn.get_partition_spec(variables)["params"].items()}
    assert names == {
        "kernel": ("embed", "mlp"),
        "bias": ("mlp",),
        "lora_A": ("embed", None),
        "lora_B": (None, None, "mlp"),
        "lora_route": ("embed", None),
    }
