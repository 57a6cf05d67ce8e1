"""Key tables of the language model: Hugging Face LLaMA shards, finetune_weights.bin (LoRA), *avs_finetune_weights.bin.

Files hold `vocab_size` rows of the embedding and the output matrix, this project's parameters `padded_vocab` rows:
`pad_vocab` and `trim_vocab` convert. `at` is the path of the Llama in the whole parameter tree, e.g. "llama/".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crab_jax.convert.keymap import Rule
from crab_jax.io.bounds import Real, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.structured import Null, check
from crab_jax.models.llama import LlamaConfig
from crab_jax.models.lora import LoraConfig

PROJECTIONS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
PEFT = "base_model.model."  # PEFT's prefix of the names of the wrapped model
LLAMA_IGNORED = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "rotary frequencies, computed from the config"}


def vocab_rules(prefix: str = "", at: str = "") -> list[Rule]:
    """Return the rules of the embedding and output matrix.

    prefix: "base_model.model." in *avs_finetune_weights.bin.
    """
    return [
        Rule(f"{prefix}model.embed_tokens.weight", f"{at}embed_tokens/embedding"),
        Rule(f"{prefix}lm_head.weight", f"{at}lm_head/kernel", "linear"),
    ]


def llama_rules(cfg: LlamaConfig, at: str = "") -> list[Rule]:
    """Return the rules of all tensors of a Hugging Face LLaMA or Qwen2 directory, without LoRA."""
    rules = [*vocab_rules(at=at), Rule("model.norm.weight", f"{at}norm/scale")]
    for layer in range(cfg.layers):
        source, target = f"model.layers.{layer}.", f"{at}layers[{layer}]/"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rules.append(Rule(f"{source}{norm}.weight", f"{target}{norm}/scale"))
        for name in PROJECTIONS:
            path = target + name.replace(".", "/")
            rules.append(Rule(f"{source}{name}.weight", f"{path}/kernel", "linear"))
            if cfg.qkv_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                rules.append(Rule(f"{source}{name}.bias", f"{path}/bias"))
    return rules


def lora_rules(cfg: LlamaConfig, lora: LoraConfig, at: str = "") -> list[Rule]:
    """Return the rules of the LoRA tensors of finetune_weights.bin (peft_hyper naming: one `lora_B{i}` per head)."""
    rules = []
    for layer in range(cfg.layers):
        for name in PROJECTIONS:
            source = f"{PEFT}model.layers.{layer}.{name}."
            path = f"{at}layers[{layer}]/{name.replace('.', '/')}"
            rules.append(Rule(f"{source}lora_A.weight", f"{path}/lora_A", "linear"))
            rules.append(Rule(f"{source}lora_route.weight", f"{path}/lora_route", "linear"))
            rules += [
                Rule(f"{source}lora_B{head}.weight", f"{path}/lora_B[{head}]", "linear") for head in range(lora.heads)
            ]
    return rules


def lora_sizes(tensors: Mapping[str, Any], where: str = "checkpoint") -> tuple[int, int]:
    """Return (rank, heads) of the LoRA weights in a file, from the shapes of A (rank, in) and the router (heads, in).

    Raises InputError if there are none, or if layers disagree.
    """
    shapes = {
        kind: {np.shape(tensors[key])[0] for key in tensors if key.endswith(f"{kind}.weight")}
        for kind in ("lora_A", "lora_route")
    }
    for kind, sizes in shapes.items():
        if len(sizes) != 1:
            problem = f"layers disagree on its size: {sorted(sizes)}" if sizes else "no such weight"
            raise InputError(where, f"*.{kind}.weight", problem, "give a finetune_weights.bin of multi-head LoRA")
    return shapes["lora_A"].pop(), shapes["lora_route"].pop()


_SIZE = Whole(1, 2**24)
LLAMA = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), _SIZE
    ),
    "num_key_value_heads?": Null(_SIZE),
    "rms_norm_eps": Real(1e-12, 1),
    "rope_theta?": Null(Real(1, 1e12)),
}


def llama_config(hf: Mapping[str, Any], where: str = "config.json", **overrides: Any) -> LlamaConfig:
    """Return the LlamaConfig of a Hugging Face config.json of model_type llama or qwen2.

    Raises InputError for other models.
    """
    check(hf, {"model_type?": Null(Text()), "rope_parameters?": Null({})}, where)
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen2"):
        raise InputError(where, "model_type", f"{kind!r:.60} is not supported", "give a LLaMA or Qwen2 directory")
    rope = hf.get("rope_parameters") or {}  # newer versions of transformers keep rope_theta and the scaling here
    unsupported = {
        field: hf[field]
        for field in ("rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
        if hf.get(field)
    }
    if rope.get("rope_type", "default") != "default":
        unsupported["rope_parameters"] = rope
    for field, value in unsupported.items():
        fix = (
            "give a model whose lm_head has a matrix of its own, as LLaMA-2's has: Crab trains the two apart"
            if field == "tie_word_embeddings"
            else "give a model without it"
        )
        raise InputError(where, field, f"{value!r:.60} is not supported", fix)
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
    )
    for field in needed:
        if field not in hf:
            raise InputError(where, field, "it is missing", "give the config.json of the model's own directory")
    check(hf, LLAMA, where)
    check(rope, {"rope_theta?": LLAMA["rope_theta?"]}, where, "rope_parameters")
    vocab_size, hidden, layers, heads, mlp_dim, rms_eps = (hf[field] for field in needed)
    fields = {
        "vocab_size": vocab_size,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "mlp_dim": mlp_dim,
        "rms_eps": rms_eps,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "qkv_bias": kind == "qwen2",
        "rope_theta": hf.get("rope_theta") or rope.get("rope_theta") or 10000.0,
    }
    return LlamaConfig(**(fields | overrides))


def pad_vocab(
    params: Mapping[str, Any],
    cfg: LlamaConfig,
    new_embeddings: np.ndarray | None = None,
    new_heads: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return Llama parameters with `padded_vocab` rows: the file's rows, those of the added tokens, then zeros.

    `new_embeddings`, `new_heads` float [rows, D] are the added tokens' rows of the embedding and the output matrix.
    Raises InputError when the number of rows is not `cfg.vocab_size`.
    """

    def pad(rows: np.ndarray, new: np.ndarray | None, field: str) -> np.ndarray:
        rows = rows if new is None else np.concatenate([rows, np.asarray(new, rows.dtype)])
        if len(rows) != cfg.vocab_size:
            raise InputError(
                "language model",
                field,
                f"{len(rows)} rows for {cfg.vocab_size} tokens",
                "set vocab_size to the rows of the file plus the added tokens",
            )
        return np.pad(rows, ((0, cfg.padded_vocab - len(rows)), (0, 0)))

    embedding = pad(params["embed_tokens"]["embedding"], new_embeddings, "embed_tokens")
    head = pad(params["lm_head"]["kernel"].T, new_heads, "lm_head").T
    return {**params, "embed_tokens": {"embedding": embedding}, "lm_head": {"kernel": head}}


def trim_vocab(params: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return Llama parameters with only the first `rows` tokens, for export: the inverse of `pad_vocab`."""
    return {
        **params,
        "embed_tokens": {"embedding": params["embed_tokens"]["embedding"][:rows]},
        "lm_head": {"kernel": params["lm_head"]["kernel"][:, :rows]},
    }
