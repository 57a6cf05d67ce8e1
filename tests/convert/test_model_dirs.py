"""Model directories as people have them: written by other programs and versions, or of other models."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_import_export import choices, files, imported  # noqa: F401  (fixtures)

from crab_jax.checkpoints import stored
from crab_jax.convert import torch_file, torch_writer
from crab_jax.convert.importing import import_weights
from crab_jax.convert.torch_writer import Tensor
from crab_jax.io.errors import InputError


def directory(source: Path, out: Path, tensors=None, config=None) -> Path:
    """A copy of a model directory with other tensors, {name: array or None}, and other config values."""
    out.mkdir()
    held = dict(torch_file.read_model_dir(source))
    for name, value in (tensors or {}).items():
        held.pop(name, None)
        if value is not None:
            held[name] = value
    torch_writer.save_safetensors(
        out / "model.safetensors",
        {name: Tensor(value.shape, value.dtype, lambda value=value: value) for name, value in held.items()},
    )
    settings = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | (config or {})))
    return out


def same(one, other) -> bool:
    left, right = (stored.load_params(path) for path in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(_leaves(left), _leaves(right), strict=True))


def _leaves(tree):
    return [
        leaf
        for key in sorted(tree)
        for leaf in (_leaves(tree[key]) if isinstance(tree[key], dict) else [np.asarray(tree[key], np.float32)])
    ]


def test_clip_without_its_text_half(files, choices, imported, tmp_path):  # noqa: F811
    """As CLIPVisionModel.save_pretrained writes it: the vision config alone, no `text_config` around."""
    settings = json.loads((files.clip / "config.json").read_text())
    vision = settings.get("vision_config", settings)
    clip = directory(files.clip, tmp_path / "clip")
    (clip / "config.json").write_text(json.dumps(vision | {"model_type": "clip_vision_model"}))
    import_weights(dataclasses.replace(files, clip=clip), tmp_path / "out", choices)
    assert same(tmp_path / "out", imported[0])


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": None},
    ],
    ids=["no-kv-heads", "rope-of-transformers-5", "no-scaling"],
)
def test_configs_of_other_versions(config, files, choices, imported, tmp_path):  # noqa: F811
    llama = directory(files.llama, tmp_path / "llama", config=config)
    import_weights(dataclasses.replace(files, llama=llama), tmp_path / "out", choices)
    assert same(tmp_path / "out", imported[0])


def test_tables_that_older_versions_saved(files, choices, imported, tmp_path):  # noqa: F811
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for layer in (0, 1)}
    llama = directory(files.llama, tmp_path / "llama", tables)
    import_weights(dataclasses.replace(files, llama=llama), tmp_path / "out", choices)
    assert same(tmp_path / "out", imported[0])


def test_two_precisions_in_one_directory(files, choices, tmp_path):  # noqa: F811
    """bfloat16 matrices with float32 norms, as some trainers save them."""
    held = torch_file.read_model_dir(files.llama)
    low = {name: value.astype(ml_dtypes.bfloat16) for name, value in held.items() if "norm" not in name}
    import_weights(
        dataclasses.replace(files, llama=directory(files.llama, tmp_path / "llama", low)), tmp_path / "out", choices
    )
    params = stored.load_params(tmp_path / "out")["llama"]
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(params["norm"]["scale"]), held["model.norm.weight"])


def prefixed(source: Path, change) -> dict[str, np.ndarray | None]:
    held = torch_file.read_model_dir(source)
    return dict.fromkeys(held) | {change(name): value for name, value in held.items()}


@pytest.mark.parametrize(
    ("part", "tensors", "config", "problem"),
    [
        ("llama", lambda source: {"lm_head.weight": None}, {}, "lm_head.weight"),
        ("clip", lambda source: prefixed(source, lambda name: f"vision_tower.{name}"), {}, "vision_tower|vision_model"),
        ("clip", lambda source: prefixed(source, lambda name: name.removeprefix("vision_model.")), {}, "vision_model"),
        ("llama", lambda source: {}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"),
        ("llama", lambda source: {}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope"),
        ("clip", lambda source: {}, {"hidden_act": "gelu"}, "gelu"),
    ],
    ids=["no-lm-head", "vision-tower", "no-prefix", "linear-rope", "linear-rope-5", "clip-with-gelu"],
)
def test_other_models_are_refused_in_one_line(part, tensors, config, problem, files, choices, tmp_path):  # noqa: F811
    source = getattr(files, part)
    settings = json.loads((source / "config.json").read_text())
    if part == "clip" and "vision_config" in settings and config:
        config = {"vision_config": settings["vision_config"] | config}
    changed = directory(source, tmp_path / part, tensors(source), config)
    with pytest.raises(InputError, match=problem) as refused:
        import_weights(dataclasses.replace(files, **{part: changed}), tmp_path / "out", choices)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_with_tokens_of_another_model(files, choices, tmp_path):  # noqa: F811
    """`<pad>` at 32000 takes the number of Crab's first own token."""
    llama = directory(files.llama, tmp_path / "llama")
    for file in files.llama.glob("tokenizer*"):
        (llama / file.name).write_bytes(file.read_bytes())
    size = json.loads((llama / "config.json").read_text())["vocab_size"]
    (llama / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    with pytest.raises(InputError, match="has [0-9]+ tokens, the embedding has [0-9]+ rows"):
        import_weights(dataclasses.replace(files, llama=llama, tokenizer=llama), tmp_path / "out", choices)
