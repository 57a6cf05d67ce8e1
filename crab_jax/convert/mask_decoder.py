"""Key tables of the mask branch in the released files.

avs_finetune_weights.bin has it under `base_model.model.model.seg_module.`. The released files lack the two random
position matrices (buffers there); `position_rules` is separate, for files that hold them and for our own exports.
"""

from __future__ import annotations

from crab_jax.convert.keymap import Rule
from crab_jax.models.mask_decoder import SegConfig


def _linear(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/kernel", "linear"), Rule(f"{source}.bias", f"{target}/bias")]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def _attention(source: str, target: str) -> list[Rule]:
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [rule for name in names for rule in _linear(f"{source}.{name}", f"{target}/{name}")]


def _packed_attention(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.in_proj_weight", f"{target}/in_proj/kernel", "linear"),
        Rule(f"{source}.in_proj_bias", f"{target}/in_proj/bias"),
        *_linear(f"{source}.out_proj", f"{target}/out_proj"),
    ]


def _upscale(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.0.weight", f"{target}/conv/kernel", "conv_transpose2d"),
        Rule(f"{source}.0.bias", f"{target}/conv/bias"),
        *_norm(f"{source}.1", f"{target}/norm"),
    ]


def _query_layer(source: str, target: str) -> list[Rule]:
    rules = _packed_attention(f"{source}.self_attn", f"{target}/self_attn")
    rules += _packed_attention(f"{source}.cross_attn", f"{target}/cross_attn")
    rules += _linear(f"{source}.ffn.0", f"{target}/ffn_0") + _linear(f"{source}.ffn.2", f"{target}/ffn_2")
    return rules + [r for i in (1, 2, 3) for r in _norm(f"{source}.norm{i}", f"{target}/norm{i}")]


def _two_way_block(source: str, target: str) -> list[Rule]:
    rules = [
        r
        for n in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        for r in _attention(f"{source}.{n}", f"{target}/{n}")
    ]
    rules += [r for n in ("lin1", "lin2") for r in _linear(f"{source}.mlp.{n}", f"{target}/{n}")]
    return rules + [r for i in (1, 2, 3, 4) for r in _norm(f"{source}.norm{i}", f"{target}/norm{i}")]


def seg_rules(cfg: SegConfig, prefix: str, at: str = "") -> list[Rule]:
    """Return the rules of every trained tensor of `SegModule`.

    prefix: precedes the keys, with its dot. at: path of the module in the parameter tree, with its slash.
    """
    p, d = prefix, f"{prefix}mask_decoder"
    rules = _linear(f"{p}text_hidden_fcs.0.0", "text_hidden_fcs/layers_0")
    rules += _linear(f"{p}text_hidden_fcs.0.2", "text_hidden_fcs/layers_1")
    rules += [Rule(f"{p}no_mask_embed.weight", "no_mask_embed")]
    for i in (0, 2):
        rules += [
            Rule(f"{p}image_feature_neck.{i}.weight", f"image_feature_neck/conv_{i}/kernel", "conv2d"),
            *_norm(f"{p}image_feature_neck.{i + 1}", f"image_feature_neck/norm_{i + 1}"),
        ]
    for level in range(cfg.scales):
        source, target = f"{d}.transformer.{level}", f"mask_decoder/transformer_{level}"
        for i in range(cfg.depth):
            rules += _two_way_block(f"{source}.layers.{i}", f"{target}/layers_{i}")
        rules += _attention(f"{source}.final_attn_token_to_image", f"{target}/final_attn_token_to_image")
        rules += _norm(f"{source}.norm_final_attn", f"{target}/norm_final_attn")
    for i in range(cfg.query_layers):
        rules += _query_layer(f"{d}.query_generator.layers.{i}", f"mask_decoder/query_generator/layers_{i}")
    for i in range(3):
        rules += _linear(f"{d}.hyper_mlp.layers.{i}", f"mask_decoder/hyper_mlp/layers_{i}")
        source, target = f"{d}.hyper_mlp_out.layers.{i}", f"mask_decoder/hyper_mlp_out/layers_{i}"
        rules += [Rule(f"{source}.weight", f"{target}/kernel", "conv2d"), Rule(f"{source}.bias", f"{target}/bias")]
    for name in ("output_upscaling", "upsample_2x"):
        rules += _upscale(f"{d}.{name}", f"mask_decoder/{name}")
    rules += [
        Rule(f"{d}.avs_query_tokens.weight", "mask_decoder/avs_query_tokens"),
        Rule(f"{d}.level_embed.weight", "mask_decoder/level_embed"),
        # The misspelling is that of the released files.
        Rule(f"{d}.ms3_s4_classfier.weight", "mask_decoder/ms3_s4_classifier/kernel", "conv2d"),
        Rule(f"{d}.avss_classifier.weight", "mask_decoder/avss_classifier/kernel", "conv2d"),
    ]
    return [rule._replace(target=at + rule.target) for rule in rules]


def position_rules(prefix: str, at: str = "") -> list[Rule]:
    """Return the rules of the two random position matrices, under their names as buffers of the released modules."""
    leaf = "positional_encoding_gaussian_matrix"
    return [
        Rule(f"{prefix}pe_layer.{leaf}", f"{at}pe_layer/{leaf}"),
        Rule(f"{prefix}mask_decoder.pe1.{leaf}", f"{at}mask_decoder/pe1/{leaf}"),
    ]
