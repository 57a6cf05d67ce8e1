"""Key tables of the frozen encoders and the Q-Formers, and their configs as read from the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from crab_jax.convert.keymap import Rule
from crab_jax.io.bounds import Whole
from crab_jax.io.errors import InputError
from crab_jax.io.structured import check
from crab_jax.models.beats import BeatsConfig
from crab_jax.models.clip import ClipConfig
from crab_jax.models.qformer import QFormerConfig

# Tensors of the released files that the model does not use: regular expression (full match) -> reason.
CLIP_IGNORED = {
    r"(text_model|text_projection|visual_projection)\..*|logit_scale": "text tower and contrastive heads",
    r"(.*\.)?position_ids": "a constant index",
    r"vision_model\.post_layernorm\..*": "after the last tap",
}
BEATS_IGNORED = {
    r"model\.predictor\..*": "classifier of the audio events",
    r"model\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight": "copies of layer 0's table",
}
QFORMER_IGNORED = {
    r".*_Qformer\.cls\..*": "masked-language head of BERT",
    r".*_Qformer\.bert\.embeddings\.word_embeddings\.weight": "dead word embeddings of BERT",
    r".*_Qformer\.bert\.embeddings\.(position_embeddings\.weight|position_ids)": "queries have no positions",
    r".*_Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*": "feed-forward of BERT's text branch",
}


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", "linear"), Rule(f"{source}.bias", f"{target}/bias")]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def clip_rules(cfg: ClipConfig, at: str = "") -> list[Rule]:
    """Return the rules from a `CLIPModel` or `CLIPVisionModel` file to the parameters of `Clip`.

    at: path of the module in the parameter tree, with its slash.
    """
    embeddings = "vision_model.embeddings"
    rules = [
        Rule(f"{embeddings}.class_embedding", "class_embedding"),
        Rule(f"{embeddings}.patch_embedding.weight", "patch_embedding/kernel", "conv2d"),
        Rule(f"{embeddings}.position_embedding.weight", "position_embedding"),
        *_norm("vision_model.pre_layrnorm", "pre_layrnorm"),
    ]
    for i in range(cfg.layers):
        source, target = f"vision_model.encoder.layers.{i}", f"layers[{i}]"
        for name in ("layer_norm1", "layer_norm2"):
            rules += _norm(f"{source}.{name}", f"{target}/{name}")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rules += _linear(f"{source}.self_attn.{name}", f"{target}/self_attn/{name}")
        for name in ("fc1", "fc2"):
            rules += _linear(f"{source}.mlp.{name}", f"{target}/mlp/{name}")
    return [rule._replace(target=at + rule.target) for rule in rules]


def beats_rules(cfg: BeatsConfig, at: str = "") -> list[Rule]:
    """Return the rules from a BEATs file `{'cfg', 'model'}` to the parameters of `Beats`.

    at: path of the module in the parameter tree, with its slash.
    """
    rules = [
        Rule("model.patch_embedding.weight", "patch_embedding/kernel", "conv2d"),
        *_norm("model.layer_norm", "layer_norm"),
        *(_linear("model.post_extract_proj", "post_extract_proj") if cfg.embed_dim != cfg.width else []),
        Rule("model.encoder.pos_conv.0.weight_g", "pos_conv/weight_g", "conv1d"),
        Rule("model.encoder.pos_conv.0.weight_v", "pos_conv/weight_v", "conv1d"),
        Rule("model.encoder.pos_conv.0.bias", "pos_conv/bias"),
        *_norm("model.encoder.layer_norm", "encoder_layer_norm"),
        Rule("model.encoder.layers.0.self_attn.relative_attention_bias.weight", "relative_attention_bias/embedding"),
    ]
    for i in range(cfg.layers):
        source, target = f"model.encoder.layers.{i}", f"layers[{i}]"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "grep_linear"):
            rules += _linear(f"{source}.self_attn.{name}", f"{target}/self_attn/{name}")
        rules.append(Rule(f"{source}.self_attn.grep_a", f"{target}/self_attn/grep_a"))
        for name in ("fc1", "fc2"):
            rules += _linear(f"{source}.{name}", f"{target}/{name}")
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            rules += _norm(f"{source}.{name}", f"{target}/{name}")
    return [rule._replace(target=at + rule.target) for rule in rules]


def qformer_rules(cfg: QFormerConfig, prefix: str, kind: str, at: str = "") -> list[Rule]:
    """Return the rules from released weights to the parameters of one `QFormer`.

    prefix: precedes `vl_projector` or `al_projector`: 'model.' in the pre-training files, 'base_model.model.model.' in
    the fine-tuning files. kind: 'visual' or 'audio'. at: path of the module in the parameter tree, with its slash.
    """
    projector = {"visual": "vl_projector", "audio": "al_projector"}[kind]
    stem = f"{prefix}{projector}.{kind}"
    bert = f"{stem}_Qformer.bert"
    rules = [
        Rule(f"{stem}_query_tokens", "query_tokens"),
        *_norm(f"{stem}_ln", "ln"),
        *_norm(f"{bert}.embeddings.LayerNorm", "embeddings_norm"),
        *_linear(f"{stem}_proj.0", "proj_0"),
        *_linear(f"{stem}_proj.2", "proj_2"),
    ]
    for i in range(cfg.layers):
        source, target = f"{bert}.encoder.layer.{i}", f"layers[{i}]"
        for block in ("attention", "crossattention"):
            for name in ("query", "key", "value"):
                rules += _linear(f"{source}.{block}.self.{name}", f"{target}/{block}/{name}")
            rules += _linear(f"{source}.{block}.output.dense", f"{target}/{block}/dense")
            rules += _norm(f"{source}.{block}.output.LayerNorm", f"{target}/{block}/LayerNorm")
        rules += _linear(f"{source}.intermediate_query.dense", f"{target}/intermediate_query")
        rules += _linear(f"{source}.output_query.dense", f"{target}/output_query")
        rules += _norm(f"{source}.output_query.LayerNorm", f"{target}/output_query_norm")
    return [rule._replace(target=at + rule.target) for rule in rules]


def clip_config(
    config: Mapping[str, Any], taps: Iterable[int], dtype: str = "bfloat16", where: str = "config.json"
) -> ClipConfig:
    """Return the ClipConfig of a Hugging Face CLIP `config.json`.

    Raises InputError if a size is missing or the model has another formula.
    """
    vision = config.get("vision_config", config)
    check(vision, {}, where, "vision_config")
    formula = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    _require(where, formula | vision, formula)  # files often leave these defaults out
    return ClipConfig(
        taps=tuple(taps),
        dtype=dtype,
        **_sizes(
            where,
            vision,
            {
                "image_size": "image_size",
                "patch_size": "patch_size",
                "width": "hidden_size",
                "layers": "num_hidden_layers",
                "heads": "num_attention_heads",
                "mlp_dim": "intermediate_size",
            },
        ),
    )


def beats_config(cfg: Mapping[str, Any], dtype: str = "bfloat16", where: str = "BEATs cfg") -> BeatsConfig:
    """Return the BeatsConfig of the `cfg` of a BEATs file.

    Raises InputError if a size is missing or the model has another formula.
    """
    check(cfg, {}, where, "cfg")
    _require(
        where,
        cfg,
        {
            "layer_norm_first": False,
            "deep_norm": True,
            "gru_rel_pos": True,
            "activation_fn": "gelu",
            "relative_position_embedding": True,
            "conv_bias": False,
        },
    )
    return BeatsConfig(
        dtype=dtype,
        **_sizes(
            where,
            cfg,
            {
                "layers": "encoder_layers",
                "width": "encoder_embed_dim",
                "heads": "encoder_attention_heads",
                "mlp_dim": "encoder_ffn_embed_dim",
                "embed_dim": "embed_dim",
                "patch_size": "input_patch_size",
                "conv_pos": "conv_pos",
                "conv_pos_groups": "conv_pos_groups",
                "num_buckets": "num_buckets",
                "max_distance": "max_distance",
            },
        ),
    )


SIZE = Whole(1, 2**24)


def _sizes(where: str, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """Return {field of the config dataclass: value}, given {that field: field of the file}. Raises InputError."""
    for file_field in names.values():
        if not SIZE.fits(config.get(file_field)):
            raise InputError(
                where,
                file_field,
                f"{config.get(file_field)!r:.60} is not a size",
                f"give the config of this model: {SIZE.wanted}",
            )
    return {own_field: config[file_field] for own_field, file_field in names.items()}


def _require(where: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise InputError unless the config has the values of the formula that is implemented."""
    for name, value in values.items():
        if config.get(name) != value:
            raise InputError(where, name, f"{config.get(name)!r:.60} is not supported", f"use a model with {value!r}")
