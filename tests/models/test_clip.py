"""The CLIP tower agrees with the reference, tap by tap."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crab_jax.convert.encoders import CLIP_IGNORED, clip_config, clip_rules
from crab_jax.convert.keymap import from_params, to_params, unread
from crab_jax.convert.torch_file import read_model_dir
from crab_jax.io.errors import InputError
from crab_jax.models.clip import Clip, ClipConfig, normalize


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "clip.npz")


@pytest.fixture(scope="module")
def noise(golden):
    return json.loads((golden / "manifest.json").read_text())["fp32_noise"]


@pytest.fixture(scope="module")
def weights(golden):
    return read_model_dir(golden / "weights/clip")


@pytest.fixture(scope="module")
def cfg(golden):
    taps = json.loads((golden / "manifest.json").read_text())["config"]["select_layer_list"]
    return clip_config(json.loads((golden / "weights/clip/config.json").read_text()), taps, "float32")


@pytest.fixture(scope="module")
def params(cfg, weights):
    return {"params": to_params(clip_rules(cfg), weights)}


@pytest.fixture(scope="module")
def pixels(arrays):
    return arrays["pixel_values"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def run(cfg, params):
    return partial(jax.jit(Clip(cfg).apply), params)


def test_taps_agree_with_the_reference(cfg, run, pixels, arrays, noise):
    outputs = run(pixels)
    assert len(outputs) == len(cfg.taps)
    for tap, output in zip(cfg.taps, outputs, strict=True):
        assert output.shape == (len(pixels), cfg.patches, cfg.width)
        expected = arrays[f"tap.{tap}"].reshape(output.shape)
        recorded = noise[f"clip.tap.{tap}"]
        tolerance = max(10 * recorded["max_abs_err_fp32_vs_fp64"], 1e-6 * recorded["max_abs"])
        np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance)


def test_every_hidden_state_can_be_tapped_in_any_order(cfg, params, pixels, arrays):
    taps = (*range(cfg.layers, -1, -1), 0)
    outputs = jax.jit(Clip(dataclasses.replace(cfg, taps=taps)).apply)(params, pixels)
    for tap, output in zip(taps, outputs, strict=True):
        np.testing.assert_allclose(output, arrays[f"hidden_states.{tap}"][:, 1:], rtol=0, atol=5e-5)


def test_layers_above_the_last_tap_are_not_needed(cfg, weights, pixels, arrays):
    short = dataclasses.replace(cfg, taps=(1,), layers=1)
    (got,) = jax.jit(Clip(short).apply)({"params": to_params(clip_rules(short), weights)}, pixels)
    np.testing.assert_allclose(got, arrays["hidden_states.1"][:, 1:], rtol=0, atol=5e-5)


def test_rows_do_not_depend_on_their_batch(run, pixels):
    together = run(pixels)
    for row, alone in enumerate(pixels):
        for a, b in zip(run(alone[None]), together, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=0, atol=2e-5)


def test_normalize_is_the_image_processor(golden):
    settings = json.loads((golden / "weights/clip/preprocessor_config.json").read_text())
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    expected = (frames / 255.0 - settings["image_mean"]) / settings["image_std"]
    got = normalize(jnp.asarray(frames))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_the_key_table_is_total_and_reversible(cfg, weights, params):
    model = jax.eval_shape(Clip(cfg).init, jax.random.key(0), jnp.zeros((1, cfg.image_size, cfg.image_size, 3)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model)
    back = from_params(clip_rules(cfg), params["params"])
    for name, value in back.items():
        np.testing.assert_array_equal(value, weights[name])
    assert unread(clip_rules(cfg), weights, CLIP_IGNORED) == []


def test_compute_dtype_is_the_configs_and_parameters_stay_float32(cfg, pixels):
    model = Clip(dataclasses.replace(cfg, dtype="bfloat16"))
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), pixels)
    assert all(output.dtype == jnp.bfloat16 for output in outputs)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_the_default_is_vit_l_14():
    shapes = jax.eval_shape(Clip(ClipConfig()).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == 303_179_776 - 2 * 1024  # the published tower without its unused post_layernorm


@pytest.mark.parametrize("change", [{"taps": (1, 25)}, {"taps": ()}, {"image_size": 225}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(InputError):
        ClipConfig(**change)


def test_frames_of_another_size_and_other_towers_are_refused(cfg, params):
    with pytest.raises(InputError, match="resize"):
        Clip(cfg).apply(params, jnp.zeros((1, cfg.image_size + 1, cfg.image_size, 3)))
    with pytest.raises(InputError, match="hidden_act"):
        clip_config({"hidden_act": "gelu"}, (1,))
    with pytest.raises(InputError, match="hidden_size"):
        clip_config({"image_size": 224, "patch_size": 14}, (1,))


def test_the_sizes_are_those_of_vit_l_14_and_of_the_paper():
    vit = {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp_dim": 4096}
    assert dataclasses.asdict(ClipConfig()) == {**vit, "taps": (14, 22, 23), "dtype": "bfloat16"}
    assert ClipConfig().patches == 256


@pytest.mark.parametrize("taps", [(0,), (24,), (0, 24)])
def test_the_embedding_and_the_last_layer_can_be_tapped(taps):
    assert ClipConfig(taps=taps).taps == taps
    with pytest.raises(InputError, match="taps"):
        ClipConfig(taps=(-1, *taps))


def test_pictures_of_another_height_or_of_other_channels_are_refused(cfg, params):
    side = cfg.image_size
    for shape in ((1, side, side + 1, 3), (1, side, side, 4), (side, side, 3)):
        with pytest.raises(InputError, match="resize"):
            Clip(cfg).apply(params, jnp.zeros(shape))


def test_embeddings_start_with_a_deviation_of_two_hundredths():
    cfg = ClipConfig(image_size=42, width=512, layers=1, heads=2, mlp_dim=8, taps=(1,))
    params = jax.jit(Clip(cfg).init)(jax.random.key(0), jnp.zeros((1, 42, 42, 3)))
    for name in ("class_embedding", "position_embedding"):
        assert 0.018 < np.std(params["params"][name]) < 0.022
