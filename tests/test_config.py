"""Run configs: every stage file is complete, its patterns partition the 7B model, and its sizes are the paper's."""

import importlib
import os

import flax.linen as nn
import jax
import pytest

from crab_jax import defaults
from crab_jax.config import parse_flags, resolve
from crab_jax.convert.importing import load_run_config
from crab_jax.io.errors import InputError
from crab_jax.models.presets import MODELS
from crab_jax.optim import split
from crab_jax.runs import run_params

STAGES = ("pretrain_visual", "pretrain_audio", "pretrain_seg", "finetune", "finetune_avs", "tiny_pretrain", "tiny")


@pytest.fixture(scope="module")
def shapes():
    """Parameter shapes of the full-size model; nothing is allocated."""
    return nn.unbox(run_params.abstract_params(resolve(defaults.base()).model.build()))


def millions(tree, *parts: str) -> float:
    from flax import traverse_util

    flat = traverse_util.flatten_dict(tree, sep="/")
    return sum(leaf.size for path, leaf in flat.items() if all(part in path for part in parts)) / 1e6


def test_the_7b_modules_have_the_published_sizes(shapes):
    lora = millions(shapes["llama"], "lora_")
    assert round(lora, 2) == 45.16  # n = 3
    new_rows = 2 * (resolve(defaults.base()).model.llama.padded_vocab - 32000) * 4096 / 1e6
    assert round(millions(shapes["llama"]) - lora - new_rows, 1) == 6738.4  # LLaMA-2-7B
    assert round(millions(shapes["clip"])) == 303  # CLIP ViT-L/14
    assert round(millions(shapes["beats"])) == 90


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_valid_and_covers_every_parameter_once(stage, shapes):
    config = importlib.import_module(f"configs.{stage}").get_config()
    resolve(config)
    trainable, frozen = split(shapes, config.trainable, config.frozen)
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(shapes))
    assert not millions(trainable, "positional_encoding"), "the Fourier matrices are saved state, never trained"
    assert not millions(trainable, "clip/") and not millions(trainable, "beats/")
    expected = {
        "pretrain_visual": 39.65,
        "pretrain_audio": 38.86,
        "pretrain_seg": 29.09,
        "finetune": 152.76,
        "finetune_avs": 29.09 + 2 * 32128 * 4096 / 1e6,
        "tiny": 152.76,
        "tiny_pretrain": 107.60,
    }
    assert round(millions(trainable), 1) == round(expected[stage], 1)


def test_stages_change_values_and_never_add_keys():
    def keys(config, prefix=""):
        return {
            key
            for name, value in config.items()
            for key in (keys(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name})
        }

    for stage in STAGES:
        assert keys(importlib.import_module(f"configs.{stage}").get_config()) == keys(defaults.base()), stage


def test_sizes_override_the_named_model_and_presets_set_the_quirks():
    config = defaults.base()
    config.model, config.compat = "tiny", "released"
    config.sizes.llama.layers = 2
    cfg = resolve(config).model
    assert cfg.llama.layers == 2 and cfg.llama.hidden == MODELS["tiny"]().llama.hidden
    assert cfg.seg_taps == (0, 1) and not cfg.seg.chain_queries and cfg.lora.dropout_per_head
    config.compat = "paper"
    assert resolve(config).model.seg_taps == (0, 2) and resolve(config).model.seg.chain_queries


@pytest.mark.parametrize("field", ["caps", "curriculum"])
def test_caps_and_steps_of_a_mixture_are_not_negative(field):
    config = defaults.base()
    config.data[field].avqa = -1
    with pytest.raises(InputError, match=f"data.{field}.avqa.*must be a whole number from 0"):
        resolve(config)


def test_a_key_with_a_hyphen_is_overridden_like_any_other():
    words = ["train", "--config=configs/tiny.py", "--config.data.weights.ref-avs=2.5", "--config.init_from=a-b.c-d=3"]
    config, _ = parse_flags(words, None, workdir=False)
    assert config.mixture.weights["ref-avs"] == 2.5 and config.init_from == "a-b.c-d=3"
    with pytest.raises(InputError, match="ref-av"):
        parse_flags([*words, "--config.data.weights.ref-av=2.5"], None, workdir=False)


@pytest.mark.parametrize("place", ["pipe", "zeros", "folder", "long"])
def test_what_is_no_file_is_no_config(place, tmp_path):
    path = tmp_path / "config.py"
    {
        "pipe": lambda: os.mkfifo(path),
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "long": lambda: path.write_text("#" * (1 << 21)),
    }[place]()
    for read in (lambda: parse_flags(["train", f"--config={path}", "--workdir=w"], ""), lambda: load_run_config(path)):
        with pytest.raises(InputError, match="not a file|of at most"):
            read()


def test_a_config_file_that_cannot_be_run_is_named(tmp_path):
    for text, said in (
        ("def get_config(: pass", "invalid syntax"),
        ("x = 1", "no attribute"),
        ("def get_config(): return {}", "must return a ConfigDict"),
    ):
        (tmp_path / "c.py").write_text(text)
        with pytest.raises(InputError, match=said):
            load_run_config(tmp_path / "c.py")
