"""BEATs agrees with the reference at every audio length of the golden set."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert import torch_file
from crab_jax.convert.encoders import BEATS_IGNORED, beats_config, beats_rules
from crab_jax.convert.keymap import from_params, to_params, unread
from crab_jax.io.errors import InputError
from crab_jax.models.beats import Beats, BeatsConfig, PositionConv, relative_bucket


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "beats.npz")


@pytest.fixture(scope="module")
def weights(golden):
    return torch_file.read(next((golden / "weights/beats").glob("*.pt")))


@pytest.fixture(scope="module")
def cfg(weights):
    return beats_config(weights.metadata["cfg"], "float32")


@pytest.fixture(scope="module")
def params(cfg, weights):
    return {"params": to_params(beats_rules(cfg), weights)}


@pytest.fixture(scope="module")
def run(cfg, params):
    return partial(jax.jit(Beats(cfg).apply), params)


def test_outputs_agree_with_the_reference(golden, run, arrays):
    noise = json.loads((golden / "manifest.json").read_text())["fp32_noise"]
    lengths = [name.removesuffix(".fbank") for name in arrays if name.endswith(".fbank")]
    assert len(lengths) >= 4
    for length in lengths:
        recorded = noise[f"beats.{length}"]
        tolerance = max(10 * recorded["max_abs_err_fp32_vs_fp64"], 1e-6 * recorded["max_abs"])
        output = run(arrays[f"{length}.fbank"])
        np.testing.assert_allclose(output, arrays[f"{length}.out"], rtol=0, atol=tolerance, err_msg=length)


def test_relative_buckets_are_the_references_to_the_last_edge(cfg, arrays):
    got = relative_bucket(arrays["rel_positions"], cfg.num_buckets, cfg.max_distance)
    np.testing.assert_array_equal(got, arrays["rel_bucket"])


def test_frames_after_the_last_whole_patch_do_not_count(cfg, run, arrays):
    fbank = arrays["1s.fbank"]
    output = run(fbank)
    assert fbank.shape[1] == 98 and output.shape == (1, 6 * 8, cfg.width)
    changed = fbank.copy()
    changed[:, 96:] = 5.0
    np.testing.assert_array_equal(output, run(changed))


def test_rows_do_not_depend_on_their_batch(run, arrays):
    fbank = arrays["2s.fbank"]
    assert len(fbank) > 1
    alone = np.concatenate([run(row[None]) for row in fbank])
    np.testing.assert_allclose(run(fbank), alone, rtol=0, atol=1e-5)


def test_position_kernel_is_the_references(cfg, params, arrays):
    # A unit impulse reads the kernel back: input channel c at the middle of a long sequence, before bias and GELU.
    conv = dict(params["params"]["pos_conv"])
    kernel = conv["weight_v"] * conv["weight_g"] / np.sqrt((conv["weight_v"] ** 2).sum((1, 2), keepdims=True))
    np.testing.assert_allclose(kernel.transpose(2, 1, 0), arrays["pos_conv.effective_weight"], rtol=0, atol=1e-6)
    x = np.zeros((1, 2 * cfg.conv_pos, cfg.width), np.float32)
    x[0, cfg.conv_pos, 0] = 1
    conv["bias"] = np.zeros_like(conv["bias"])
    taps = cfg.conv_pos + cfg.conv_pos // 2 - np.arange(cfg.conv_pos)
    got = jax.jit(PositionConv(cfg).apply)({"params": conv}, x)[0, taps]
    first_group = cfg.width // cfg.conv_pos_groups
    np.testing.assert_allclose(
        got[:, :first_group], jax.nn.gelu(kernel[:, 0, :first_group], approximate=False), rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(got[:, first_group:], 0)


def test_the_key_table_is_total_and_reversible(cfg, weights, params):
    model = jax.eval_shape(Beats(cfg).init, jax.random.key(0), jnp.zeros((1, 98, 128)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model)
    back = from_params(beats_rules(cfg), params["params"])
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])
    assert unread(beats_rules(cfg), weights, BEATS_IGNORED) == []


def test_copies_of_the_position_table_are_the_same_table(cfg, weights):
    names = [f"model.encoder.layers.{i}.self_attn.relative_attention_bias.weight" for i in range(cfg.layers)]
    for name in names:
        if name in weights:
            np.testing.assert_array_equal(weights[name], weights[names[0]])


def test_compute_dtype_is_the_configs_and_parameters_stay_float32(cfg, params, arrays):
    model = Beats(dataclasses.replace(cfg, dtype="bfloat16"))
    output = jax.jit(model.apply)(params, arrays["1s.fbank"])
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), arrays["1s.out"], rtol=0, atol=0.2)
    variables = jax.eval_shape(model.init, jax.random.key(0), arrays["1s.fbank"])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_the_default_is_the_base_model():
    shapes = jax.eval_shape(Beats(BeatsConfig()).init, jax.random.key(0), jnp.zeros((1, 98, 128)))
    assert 89e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 91e6


def test_short_audio_and_other_encoders_are_refused(cfg, params, weights):
    with pytest.raises(InputError, match="fbank"):
        Beats(cfg).apply(params, jnp.zeros((1, 15, 128)))
    with pytest.raises(InputError, match="deep_norm"):
        beats_config({**weights.metadata["cfg"], "deep_norm": False})
    with pytest.raises(InputError, match="encoder_layers"):
        beats_config({k: v for k, v in weights.metadata["cfg"].items() if k != "encoder_layers"})


def test_the_sizes_are_those_of_iteration_3():
    sizes = {"layers": 12, "width": 768, "heads": 12, "mlp_dim": 3072, "embed_dim": 512, "patch_size": 16}
    positions = {"conv_pos": 128, "conv_pos_groups": 16, "num_buckets": 320, "max_distance": 800}
    assert dataclasses.asdict(BeatsConfig()) == {**sizes, **positions, "dtype": "bfloat16"}


def test_a_filter_bank_of_another_shape_is_refused_and_one_patch_is_enough(cfg, params):
    for shape in ((1, 98, 127), (98, 128), (1, 1, 98, 128)):
        with pytest.raises(InputError, match="fbank"):
            Beats(cfg).apply(params, jnp.zeros(shape))
    assert jax.jit(Beats(cfg).apply)(params, jnp.zeros((1, 16, 128))).shape == (1, 8, cfg.width)


def test_the_position_convolution_starts_as_an_unnormalised_one(cfg):
    """weight_norm starts with the gain that leaves the drawn kernel, of variance 4 / (taps * width), as it is."""
    params = PositionConv(cfg).init(jax.random.key(0), jnp.zeros((1, 9, cfg.width)))["params"]
    deviation = (4 / (cfg.conv_pos * cfg.width)) ** 0.5
    np.testing.assert_allclose(np.std(params["weight_v"]), deviation, rtol=0.1)
    norms = np.sqrt((params["weight_v"] ** 2).sum((1, 2)))
    np.testing.assert_allclose(params["weight_g"][:, 0, 0], np.full(cfg.conv_pos, norms.mean()), rtol=0.1)
    assert not params["bias"].any()


def test_gates_of_the_position_bias_start_at_one(cfg):
    variables = jax.jit(Beats(cfg).init)(jax.random.key(0), jnp.zeros((1, 16, 128)))["params"]
    assert (variables["layers"]["self_attn"]["grep_a"] == 1).all()


def test_an_encoder_as_wide_as_its_embedding_has_no_projection(cfg):
    same = dataclasses.replace(cfg, embed_dim=cfg.width)
    shapes = jax.eval_shape(Beats(same).init, jax.random.key(0), jnp.zeros((1, 98, 128)))["params"]
    assert "post_extract_proj" not in shapes
