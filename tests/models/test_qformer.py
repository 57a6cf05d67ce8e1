"""The Q-Formers agree with the reference, and their dropout acts only in training."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file
from crab_jax.convert.encoders import QFORMER_IGNORED, qformer_rules
from crab_jax.convert.keymap import from_params, to_params, unread
from crab_jax.io.errors import InputError
from crab_jax.models.qformer import QFormer, QFormerConfig

PREFIX = "base_model.model.model."


@pytest.fixture(scope="module")
def weights(golden):
    return torch_file.read(golden / "weights/crab/finetune_weights.bin")


@pytest.fixture(scope="module")
def manifest(golden):
    return json.loads((golden / "manifest.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "qformer.npz")


def config(manifest, kind):
    sizes, bert = manifest["config"], manifest["config"]["bert"]
    return QFormerConfig(
        in_dim=sizes["clip"]["hidden_size"] if kind == "visual" else sizes["beats"]["encoder_embed_dim"],
        out_dim=sizes["llama"]["hidden_size"],
        width=bert["hidden_size"],
        heads=bert["num_attention_heads"],
        mlp_dim=bert["intermediate_size"],
        layers=sizes["qformer_layers"],
        queries=sizes[f"{kind}_query_token_nums"],
        dtype="float32",
    )


@pytest.fixture(scope="module")
def visual(manifest, weights):
    cfg = config(manifest, "visual")
    return cfg, {"params": to_params(qformer_rules(cfg, PREFIX, "visual"), weights)}


@pytest.fixture(scope="module")
def run(visual):
    cfg, params = visual
    return partial(jax.jit(QFormer(cfg).apply), params)


@pytest.mark.parametrize("name", ["visual_t1", "visual_t3", "audio_3d", "audio_4d"])
def test_outputs_agree_with_the_reference(name, manifest, weights, arrays):
    """Frames and audio windows fold into the batch: [B, T*N, C] or [B, T, N, C] -> [B, T*Q, D]."""
    kind = name.split("_")[0]
    cfg = config(manifest, kind)
    params = {"params": to_params(qformer_rules(cfg, PREFIX, kind), weights)}
    x, expected = arrays[f"{name}.in"], arrays[f"{name}.out"]
    frames = expected.shape[1] // cfg.queries
    output = jax.jit(QFormer(cfg).apply)(params, x.reshape(len(x) * frames, -1, cfg.in_dim))
    recorded = manifest["fp32_noise"][f"qformer.{name}"]
    tolerance = max(10 * recorded["max_abs_err_fp32_vs_fp64"], 1e-6 * recorded["max_abs"])
    np.testing.assert_allclose(output.reshape(expected.shape), expected, rtol=0, atol=tolerance)


def test_rows_do_not_depend_on_their_batch(run, arrays):
    x = arrays["visual_t1.in"]
    alone = np.concatenate([run(row[None]) for row in x])
    np.testing.assert_allclose(run(x), alone, rtol=0, atol=1e-5)


def test_token_order_does_not_matter(run, arrays):
    """There is no position on the attended tokens, so a permutation of them changes nothing."""
    x = arrays["visual_t1.in"]
    np.testing.assert_allclose(run(x[:, ::-1]), run(x), rtol=0, atol=2e-5)


def test_dropout_acts_in_training_only(run, arrays):
    x = arrays["visual_t1.in"]
    draws = [run(x, np.arange(len(x)), rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-2 and np.abs(draws[0] - run(x)).max() > 1e-2


@pytest.mark.parametrize("kind", ["visual", "audio"])
def test_the_key_table_is_total_and_reversible(kind, manifest, weights):
    cfg = config(manifest, kind)
    params = to_params(qformer_rules(cfg, PREFIX, kind), weights)
    model = jax.eval_shape(QFormer(cfg).init, jax.random.key(0), jnp.zeros((1, 3, cfg.in_dim)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model["params"])
    back = from_params(qformer_rules(cfg, PREFIX, kind), params)
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])
    own = [name for name in weights if f"projector.{kind}_" in name]
    assert unread(qformer_rules(cfg, PREFIX, kind), own, QFORMER_IGNORED) == []


def test_gradients_reach_every_parameter(visual, arrays):
    cfg, params = visual
    grads = jax.jit(jax.grad(lambda p: (QFormer(cfg).apply(p, arrays["visual_t1.in"]) ** 2).sum()))(params)
    # A key bias adds the same number to all of a query's logits, which the softmax ignores.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert "['key']['bias']" in name or all(np.abs(layer).max() > 0 for layer in grad), name


def test_compute_dtype_is_the_configs_and_parameters_stay_float32(visual, arrays):
    cfg, _ = visual
    model = QFormer(dataclasses.replace(cfg, dtype="bfloat16"))
    output, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), arrays["visual_t1.in"])
    assert output.dtype == jnp.bfloat16 and output.shape == (2, cfg.queries, cfg.out_dim)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_tokens_of_another_width_are_refused(visual):
    cfg, params = visual
    with pytest.raises(InputError, match="QFormer"):
        QFormer(cfg).apply(params, jnp.zeros((1, 3, cfg.in_dim + 1)))


def test_the_sizes_are_those_of_bert_base_with_two_layers_and_32_queries():
    sizes = {"width": 768, "heads": 12, "mlp_dim": 3072, "layers": 2, "queries": 32, "dropout": 0.1}
    assert dataclasses.asdict(QFormerConfig(in_dim=5, out_dim=7)) == {
        "in_dim": 5, "out_dim": 7, **sizes, "dtype": "bfloat16"}  # fmt: skip


def test_parameters_start_as_the_reference_starts_them():
    """BERT's normal of 0.02, PyTorch's uniform of 1 / sqrt(inputs) for the projection, biases of 0."""
    cfg = QFormerConfig(in_dim=48, out_dim=64, width=64, heads=4, mlp_dim=96, queries=16, dtype="float32")
    params = jax.jit(QFormer(cfg).init)(jax.random.key(0), jnp.ones((1, 3, 48)))["params"]
    layers = params["layers"]
    normal = [layers["attention"][name]["kernel"] for name in ("query", "key", "value", "dense")]
    normal += [layers[name]["kernel"] for name in ("intermediate_query", "output_query")] + [params["query_tokens"]]
    assert all(0.017 < np.std(kernel) < 0.023 for kernel in normal)
    for name in ("proj_0", "proj_2"):
        assert 0.95 / 8 < np.abs(params[name]["kernel"]).max() <= 1 / 8


def test_inputs_that_are_not_folded_are_refused(visual):
    cfg, params = visual
    with pytest.raises(InputError, match="fold"):
        QFormer(cfg).apply(params, jnp.zeros((1, 2, 3, cfg.in_dim)))
