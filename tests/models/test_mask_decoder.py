"""The mask branch agrees with the released module, level by level and for both kinds of output."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file
from crab_jax.convert.keymap import from_params, to_params
from crab_jax.convert.mask_decoder import position_rules, seg_rules
from crab_jax.io.errors import InputError
from crab_jax.losses import BINARY, SEMANTIC, LossConfig, Term, mask_losses, total
from crab_jax.models.mask_decoder import FourierPosition, QueryGenerator, SegConfig, SegModule, resize

PREFIX = "base_model.model.model.seg_module."
TASKS = ("s4", "avss", "ms3", "avqa")  # of the four golden samples; everything but avss uses the binary classifier


@pytest.fixture(scope="module")
def cfg(golden) -> SegConfig:
    config = json.loads((golden / "manifest.json").read_text())["config"]
    seg = config["seg"]
    return SegConfig(
        llm_dim=config["llama"]["hidden_size"],
        image_dim=config["clip"]["hidden_size"],
        grid=config["image_size"] // config["patch_size"],
        image_size=config["image_size"],
        dim=seg["prompt_embed_dim"],
        queries=seg["avs_query_num"],
        mlp_dim=seg["mlp_dim"],
        query_layers=seg["query_generator_num_layers"],
        query_mlp_dim=seg["qgen_hidden"],
        depth=seg["mask_decoder_transformer_depth"],
        low_res=seg["low_res_mask_size"],
        chain_queries=False,
    )


@pytest.fixture(scope="module")
def load(golden, cfg):
    buffers = np.load(golden / "weights/crab/unsaved_state.npz")

    def load_state(state: str, cfg: SegConfig = cfg) -> dict:
        tensors = dict(torch_file.read(golden / f"weights/crab/{state}_finetune_weights.bin"))
        for rule in position_rules(PREFIX):
            tensors[rule.source] = buffers[rule.source.replace(PREFIX, f"{state}.seg_module.")]
        return to_params(seg_rules(cfg, PREFIX) + position_rules(PREFIX), tensors)

    return load_state


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "seg.npz")


@pytest.fixture(scope="module")
def inputs(arrays):
    return arrays["pred_embeddings"], (arrays["image_features.0"], arrays["image_features.1"])


@pytest.fixture(scope="module")
def apply(cfg):
    return jax.jit(lambda params, states, features: SegModule(cfg).apply({"params": params}, states, features))


@pytest.fixture(scope="module")
def atol(golden) -> float:
    """Ten times the released module's own float32 error."""
    noise = json.loads((golden / "manifest.json").read_text())["fp32_noise"]
    return 10 * max(noise[f"seg.pred_masks.{i}"]["max_abs_err_fp32_vs_fp64"] for i in (0, 1))


@pytest.mark.parametrize("state", ["avs"])
def test_masks_equal_the_released_module(state, apply, load, arrays, inputs, atol):
    binary, semantic = apply(load(state), *inputs)
    for i, task in enumerate(TASKS):
        if task == "avss":
            np.testing.assert_allclose(semantic[i, ::10], arrays[f"{state}.pred_masks.{i}.ch::10"], atol=atol)
            assert (np.argmax(semantic[i], 0) == arrays[f"{state}.pred_masks.{i}.argmax"]).mean() > 0.999
        else:
            np.testing.assert_allclose(binary[i], arrays[f"{state}.pred_masks.{i}"][0], atol=atol)


@pytest.mark.parametrize("state", ["avs"])
def test_the_released_mask_loss_of_every_mix_of_tasks(state, apply, load, arrays, inputs, golden):
    binary, semantic = apply(load(state), *inputs)
    target = np.stack([arrays[f"gt.{i}"][0] for i in range(4)]).astype(np.int32)
    kind, reference = np.array([BINARY, SEMANTIC, BINARY, 0]), np.load(golden / "losses.npz")
    for name, rows in (
        ("s4", [0]),
        ("avss", [1]),
        ("ms3+s4", [0, 2]),
        ("s4+avss+ms3+avqa", [0, 1, 2, 3]),
        ("avqa", [3]),
    ):
        valid = np.isin(np.arange(4), rows)
        terms = {"text": Term(0.0, 0.0), **mask_losses(binary, semantic, target, kind, valid)}
        np.testing.assert_allclose(
            total(terms, LossConfig(reduction="released")),
            reference[f"{state}.mask_loss.{name}"],
            rtol=1e-5,
            err_msg=name,
        )


def test_the_binary_kind_alone_equals_the_released_module_at_every_step(cfg, load, arrays, inputs, atol):
    states, features = inputs[0][:1], tuple(f[:1] for f in inputs[1])
    (binary, none), sown = SegModule(cfg).apply(
        {"params": load("avs")}, states, features, ("binary",), capture_intermediates=True, mutable=["intermediates"]
    )
    found = sown["intermediates"]
    decoder = found["mask_decoder"]

    def same(ours, name, channels_last=True):
        theirs = arrays[f"sample0.{name}"]
        theirs = np.moveaxis(theirs, 1, -1) if channels_last else theirs
        np.testing.assert_allclose(ours, theirs, atol=5e-4, err_msg=name)

    same(found["text_hidden_fcs"]["__call__"][0][0], "text_hidden", channels_last=False)
    same(found["image_feature_neck"]["__call__"][0], "neck")
    same(decoder["upsample_2x"]["__call__"][0], "upsample_2x.level1")
    for level in (0, 1):
        for name in ("query_generator", "hyper_mlp"):
            same(decoder[name]["__call__"][level], f"mask_decoder.{name}.level{level}", channels_last=False)
        for name in ("output_upscaling", "hyper_mlp_out"):
            same(decoder[name]["__call__"][level], f"mask_decoder.{name}.level{level}")
        same(decoder["ms3_s4_classifier"]["__call__"][level], f"mask_decoder.level{level}")
    np.testing.assert_allclose(binary[0], arrays["avs.pred_masks.0"][0], atol=atol)
    assert none is None


def test_position_encodings_equal_the_released_ones(cfg, load, arrays):
    params = load("avs")
    for name, tree, n in (
        ("dense_pe", params["pe_layer"], cfg.grid),
        ("pe1_level1", params["mask_decoder"]["pe1"], 2 * cfg.grid),
    ):
        ours = FourierPosition(cfg.dim).apply({"params": tree}, n).reshape(n, n, cfg.dim)
        np.testing.assert_allclose(np.moveaxis(ours, -1, 0), arrays[name].reshape(cfg.dim, n, n), atol=1e-5)


def test_conversion_covers_every_parameter_and_every_saved_key(cfg, load, golden):
    params, tensors = load("avs"), torch_file.read(golden / "weights/crab/avs_finetune_weights.bin")
    states, feature = jnp.zeros((1, 6, cfg.llm_dim)), jnp.zeros((1, cfg.grid**2, cfg.image_dim))
    shapes = jax.eval_shape(SegModule(cfg).init, jax.random.key(0), states, (feature, feature))["params"]
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(np.shape, params)
    back = from_params(seg_rules(cfg, PREFIX), params)
    assert set(back) == {key for key in tensors if "seg_module" in key}
    assert all(np.array_equal(back[key], tensors[key]) for key in back)


def test_the_pretraining_file_converts_with_its_own_prefix(cfg, golden):
    saved = torch_file.read(golden / "weights/crab/avs_finetune_weights.bin")  # the same module under another prefix
    tensors = {key.removeprefix("base_model.model."): value for key, value in saved.items() if "seg_module" in key}
    rules = seg_rules(cfg, "model.seg_module.", at="seg_module/")
    assert set(to_params(rules, tensors)) == {"seg_module"} and {r.source for r in rules} == set(tensors)


def test_a_sample_does_not_depend_on_its_batch(apply, load, inputs, atol):
    params, (states, features) = load("avs"), inputs
    for ours, reference in zip(
        apply(
            params,
            states[::-1] * [[[1]], [[9]], [[9]], [[1]]],
            tuple(f[::-1] * [[[1]], [[-9]], [[0]], [[1]]] for f in features),
        ),
        apply(params, states, features),
        strict=True,
    ):
        np.testing.assert_allclose(ours[0], reference[3], atol=atol)
        np.testing.assert_allclose(ours[3], reference[0], atol=atol)


def test_the_semantic_kind_alone_has_the_semantic_shape(cfg, inputs):
    none, semantic = jax.eval_shape(
        lambda: SegModule(cfg).init_with_output(jax.random.key(0), *inputs, kinds=("semantic",))[0]
    )
    assert none is None and semantic.shape == (4, cfg.classes, cfg.image_size, cfg.image_size)


def test_gradients_are_finite_and_reach_all_but_the_fixed_and_the_unchained(cfg, load, inputs):
    shallow = dataclasses.replace(cfg, depth=1)
    loss = lambda p: sum((x**2).mean() for x in SegModule(shallow).apply({"params": p}, *inputs))  # noqa: E731
    tree = jax.jit(jax.grad(loss))(load("avs", shallow))
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert all(np.isfinite(g).all() for g in leaves.values())
    fixed = {name for name in leaves if name.endswith("positional_encoding_gaussian_matrix")}
    unchained = {name for name in leaves if "query_generator/layers_0/" in name}
    assert len(fixed) == 2 and {name for name, g in leaves.items() if not np.any(g)} == fixed | unchained


def test_chained_queries_feed_each_layer_with_the_one_before(cfg, load):
    params = load("avs")["mask_decoder"]["query_generator"]
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.normal(size=(2, cfg.queries, cfg.dim)), jnp.float32)
    prompt = jnp.asarray(rng.normal(size=(2, 1, cfg.dim)), jnp.float32)
    one = dataclasses.replace(cfg, query_layers=1)
    layer = lambda i, x: QueryGenerator(one).apply({"params": {"layers_0": params[f"layers_{i}"]}}, x, prompt)  # noqa: E731
    chaining = QueryGenerator(dataclasses.replace(cfg, chain_queries=True))
    chained = chaining.apply({"params": params}, queries, prompt)
    released = QueryGenerator(cfg).apply({"params": params}, queries, prompt)
    np.testing.assert_allclose(chained, layer(1, layer(0, queries)), atol=1e-5)
    np.testing.assert_allclose(released, layer(1, queries), atol=1e-5)


@pytest.mark.parametrize(("n", "size"), [(8, 28), (16, 28), (28, 56), (64, 28)])
def test_resize_is_bilinear_with_half_pixel_centres_and_no_antialiasing(n, size):
    x = np.random.default_rng(n).normal(size=(1, n, n, 2)).astype(np.float32)
    source = np.maximum((np.arange(size) + 0.5) * n / size - 0.5, 0)
    low = np.minimum(source.astype(int), n - 1)
    weights = np.zeros((size, n))
    weights[np.arange(size), low] += 1 - (source - low)
    weights[np.arange(size), np.minimum(low + 1, n - 1)] += source - low
    np.testing.assert_allclose(resize(x, size), np.einsum("ij,bjkc,lk->bilc", weights, x, weights), atol=5e-5)


def test_bfloat16_returns_float32_close_to_float32(cfg, load, inputs, arrays):
    states, features = inputs[0][:1], tuple(f[:1] for f in inputs[1])
    module = SegModule(dataclasses.replace(cfg, dtype=jnp.bfloat16))
    binary, _ = jax.jit(lambda p: module.apply({"params": p}, states, features, ("binary",)))(load("avs"))
    exact = arrays["avs.pred_masks.0"][0]
    assert binary.dtype == jnp.float32 and np.abs(binary[0] - exact).max() < 0.05 * np.abs(exact).max()


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="dim"):
        SegConfig(dim=40, heads=8)
    with pytest.raises(InputError, match="two levels"):
        SegConfig(scales=3)


def test_the_default_sizes_are_those_of_the_release():
    inputs = {"llm_dim": 4096, "image_dim": 1024, "grid": 16, "image_size": 224}
    decoder = {"dim": 256, "queries": 300, "heads": 8, "mlp_dim": 2048, "query_layers": 2, "query_mlp_dim": 2048}
    masks = {"depth": 2, "scales": 2, "tokens_per_scale": 3, "low_res": 112, "classes": 71, "chain_queries": True}
    assert dataclasses.asdict(SegConfig()) == {**inputs, **decoder, **masks, "dtype": "float32"}


def test_a_decoder_of_other_than_two_levels_is_refused():
    for scales in (1, 3):
        with pytest.raises(InputError, match="scales"):
            SegConfig(scales=scales)
    assert SegConfig(dim=48, heads=3).dim == 48
