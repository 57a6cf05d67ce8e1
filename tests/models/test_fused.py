"""The layout of generation computes what the layout of training does; integers cost what their scales say."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.models import quantize
from crab_jax.models.generating import KINDS, FusedLlama, fuse
from crab_jax.models.llama import Llama, LlamaConfig, init_cache
from crab_jax.models.lora import LoraConfig

TINY = LlamaConfig(
    vocab_size=50, hidden=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, qkv_bias=True, remat="none", dtype="float32"
)
LORA = LoraConfig(rank=4, alpha=10.0, heads=3)
LENGTHS, WIDTH, STEPS = np.array([7, 4, 1]), 8, 3
SHIFT = 2  # of positions over cache slots: rotations are relative, so that it changes no answer
TOKENS = jax.random.randint(jax.random.key(2), (3, WIDTH + STEPS), 0, TINY.vocab_size)


def forward(model, tokens, slots, cache):
    hidden, cache = model(model.embed(tokens), slots + SHIFT, cache=cache, slots=slots)
    return hidden, model.logits(hidden), cache


def random_params(model):
    shapes = jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), TOKENS[:, :1], jnp.zeros((3, 1), jnp.int32), init_cache(TINY, 3, 1), method=forward
        )
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), nn.unbox(shapes["params"])
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def rollout(model, params, tokens=TOKENS, lengths=LENGTHS, width=WIDTH):
    """(hidden, logits) at the end of prompts, right-padded to `width`, and of each of the tokens fed after them."""
    rows = np.arange(len(tokens))
    at = jnp.broadcast_to(jnp.arange(width), (len(tokens), width))
    found, cache = [], init_cache(TINY, len(tokens), WIDTH + STEPS)
    hidden, logits, cache = model.apply({"params": params}, tokens[:, :width], at, cache, method=forward)
    found.append((hidden[rows, lengths - 1], logits[rows, lengths - 1]))
    for step in range(STEPS):
        at = jnp.asarray(lengths + step)[:, None]
        hidden, logits, cache = model.apply(
            {"params": params}, tokens[rows, at[:, 0]][:, None], at, cache, method=forward
        )
        found.append((hidden[:, 0], logits[:, 0]))
    return [jnp.stack(x) for x in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def params():
    return random_params(Llama(TINY, LORA))


@pytest.fixture(scope="module")
def fused_params(params):
    return functools.cache(lambda kind: fuse(params, TINY, LORA, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_layout_of_training(params, fused_params, kind):
    hidden, logits = rollout(Llama(TINY, LORA), quantize.rounded(params, kind))
    fused = fused_params(kind)
    found, found_logits = rollout(FusedLlama(TINY, LORA, kind), fused)
    scale = float(jnp.abs(logits[..., : TINY.vocab_size]).max())
    np.testing.assert_allclose(found, hidden, atol=1e-5)
    np.testing.assert_allclose(found_logits, logits, atol=1e-5 * scale)
    np.testing.assert_array_equal(found_logits.argmax(-1), logits.argmax(-1))
    kernel = fused["layers_0"]["down"]["kernel"]
    assert kernel.dtype == ("float32" if kind == "float" else kind)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_row_is_the_same_alone_in_another_order_and_with_other_padding(fused_params, kind):
    model, fused = FusedLlama(TINY, LORA, kind), fused_params(kind)
    together = rollout(model, fused)
    scale = float(jnp.abs(together[1][..., : TINY.vocab_size]).max())
    backwards = rollout(model, fused, TOKENS[::-1], LENGTHS[::-1])
    for row in range(3):
        alone = rollout(model, fused, TOKENS[row : row + 1], LENGTHS[row : row + 1], WIDTH + STEPS)
        for of, at in ((together, row), (backwards, 2 - row)):
            found = [x[:, at : at + 1] for x in of]
            np.testing.assert_allclose(alone[0], found[0], atol=1e-5)
            np.testing.assert_allclose(alone[1], found[1], atol=1e-5 * scale)
            np.testing.assert_array_equal(alone[1].argmax(-1), found[1].argmax(-1))


@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("int4", 7)])
def test_an_integer_is_at_most_half_a_step_off(kind, most):
    kernel = jax.random.normal(jax.random.key(0), (2 * quantize.GROUP, 5)).at[:, 2].set(0)
    made = quantize.quantize(kernel, kind)
    scale = jnp.repeat(made["scale"], len(kernel) // len(made["scale"]), axis=0)
    assert len(made["scale"]) == (1 if kind == "int8" else 2) and made["kernel"].dtype == kind
    assert (jnp.abs(quantize.dequantize(**made) - kernel) <= 0.5001 * scale).all()
    assert int(jnp.abs(made["kernel"].astype(jnp.int32)).max()) == most
    x = jax.random.normal(jax.random.key(1), (3, len(kernel)))
    np.testing.assert_allclose(quantize.product(x, **made), x @ quantize.dequantize(**made), atol=1e-4)


def test_a_product_of_integers_is_that_of_the_values():
    """Also where a row has one large value, and where it is 0."""
    made = quantize.quantize(jax.random.normal(jax.random.key(0), (256, 40)), "int8")
    x = jax.random.normal(jax.random.key(1), (2, 3, 256)).at[0, 0, 5].set(2000.0).at[1, 2].set(0).astype(jnp.bfloat16)
    found = quantize.integer_product(x, made["kernel"]) * made["scale"][0]
    exact = np.asarray(x, np.float64) @ np.asarray(quantize.dequantize(**made), np.float64)
    largest = np.abs(np.asarray(x, np.float32)).max(-1, keepdims=True)
    assert found.shape == (2, 3, 40) and found.dtype == jnp.float32 and not found[1, 2].any()
    assert (np.abs(found - exact) <= 2.0**-20 * np.abs(exact).max() + 16 * 2.0**-22 * largest * 4).all()
    few, many = jnp.ones((quantize.FEW, 256)), jnp.ones((quantize.FEW + 1, 256))
    for rows, forms in ((few, 2), (many, 1)):
        text = str(jax.make_jaxpr(lambda x: quantize.product(x, **made))(rows))
        assert text.count("dot_general[") == forms, "a TPU multiplies integers in a product of few rows"


def test_a_scale_covers_a_whole_column_in_int8_and_a_group_of_inputs_in_int4():
    assert [quantize.group_of("int8", width) for width in (10, 128)] == [10, 128]
    assert [quantize.group_of("int4", width) for width in (128, 96, 10, 7)] == [64, 32, 2, 1]


def test_quantization_by_hand():
    """Columns of 0; of magnitude 127, which int8 holds exactly; of 254, in steps of 2; int4 in two groups."""
    kernel = jnp.array([[0.0, -127.0, 254.0], [0.0, 3.0, -3.1]])
    with jax.debug_nans(True):  # 0 / 0 becomes 0 on some devices only
        made = quantize.quantize(kernel, "int8")
    assert made["scale"].tolist() == [[0, 1, 2]] and made["scale"].dtype == jnp.float32
    assert made["kernel"].tolist() == [[0, -127, 127], [0, 3, -2]]
    kernel = jnp.zeros((128, 1)).at[3].set(-14.0).at[4].set(3.9).at[100].set(0.7).at[101].set(0.2)
    made = quantize.quantize(kernel.astype(jnp.bfloat16), "int4")
    np.testing.assert_allclose(made["scale"], [[2.0], [0.1]], rtol=0.01)
    np.testing.assert_array_equal(made["kernel"].astype(jnp.int32)[jnp.array([3, 4, 100, 101]), 0], [-7, 2, 7, 2])
    restored = quantize.dequantize(**made)
    assert restored.dtype == jnp.float32
    np.testing.assert_allclose(restored[jnp.array([3, 4, 5, 100, 101]), 0], [-14, 4, 0, 0.7, 0.2], rtol=0.01)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_product_in_half_precision_is_summed_in_float32(kind):
    made = quantize.quantize(jax.random.normal(jax.random.key(0), (2 * quantize.GROUP, 5)), kind)
    x = jax.random.normal(jax.random.key(1), (3, 2 * quantize.GROUP)).astype(jnp.bfloat16)
    found = quantize.product(x, **made)
    assert found.dtype == jnp.float32 and found.shape == (3, 5)
    weights = quantize.dequantize(**made)  # a column's scale is applied after the sum, a group's before it
    weights = weights if kind == "int8" else weights.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(found, x.astype(jnp.float32) @ weights, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_of_the_language_model_are_rounded_and_the_output_to_eight_bits(params, kind):
    rounded = quantize.rounded(params, kind)
    before, after = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (params, rounded))
    for path, leaf in before.items():
        names = [key.key for key in path]
        if kind == "float" or names[-1] != "kernel":
            np.testing.assert_array_equal(after[path], leaf)
        elif "layers" in names:
            for layer, found in zip(leaf, after[path], strict=True):
                wanted = quantize.dequantize(**quantize.quantize(layer, kind))
                np.testing.assert_allclose(found, wanted, atol=1e-6)
        else:
            wanted = quantize.dequantize(**quantize.quantize(leaf, "int8"))
            np.testing.assert_allclose(after[path], wanted, atol=1e-6)
