"""Export of a checkpoint into the families of PyTorch files it could have come from.

`crab` writes Crab's own files, `hf` the frozen models and the multi-head LoRA as an adapter. The adapter's update
depends on the token, so it is never merged into the weights; its type is one that stock PEFT refuses to load, since
PEFT knows one B per A. Importing both formats together gives the same checkpoint, bit for bit.

The checkpoint is read a few leaves at a time and written tensor by tensor, all layers of a leaf after one another.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from crab_jax.checkpoints.stored import StoredParams, stored_params
from crab_jax.convert import torch_writer
from crab_jax.convert.keymap import Rule, permute, split_target
from crab_jax.convert.llama import PEFT, PROJECTIONS, vocab_rules
from crab_jax.convert.released import base_rules, buffer_rules, crab_rules
from crab_jax.convert.torch_writer import Tensor
from crab_jax.io.errors import InputError
from crab_jax.io.files import need_room, work_folder, write_whole
from crab_jax.models.beats import BeatsConfig
from crab_jax.models.clip import ClipConfig
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import LlamaConfig
from crab_jax.models.lora import LoraConfig
from crab_jax.runs.run_folder import load_config
from data_pipelines.tokens import MASK_TOKENS, SPECIAL_TOKENS, Tokenizer

FORMATS = ("crab", "hf")
AT_ONCE = 2**30  # bytes of leaves to read from the checkpoint together; a larger leaf is read alone


def export(checkpoint: Path, form: str, out: Path) -> list[Path]:
    """Write the files of one format into `out` and return their paths. Raises InputError if there is no checkpoint."""
    if form not in FORMATS:
        raise InputError("--format", form, "is unknown", f"use one of {', '.join(FORMATS)}")
    cfg = load_config(checkpoint).model
    params = stored_params(checkpoint)
    need_room(
        work_folder(out),
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in traverse_util.flatten_dict(params.shapes).values()),
        "the model",
    )
    before = set(out.rglob("*")) if out.exists() else set()
    (write_crab if form == "crab" else write_hugging_face)(cfg, params, out)
    if form == "hf":
        Tokenizer.load(checkpoint).save(out / "llama")
    return sorted(path for path in set(out.rglob("*")) - before if path.is_file())


class _Reader:
    """Reads leaves of a checkpoint by path, together with the leaves of `paths` that follow."""

    def __init__(self, params: StoredParams, paths: Iterable[str]):
        self._params, self._paths = params, list(dict.fromkeys(paths))
        self._shapes = traverse_util.flatten_dict(params.shapes, sep="/")
        self._held: dict[str, np.ndarray] = {}

    def stand_in(self, path: str) -> np.ndarray:
        """Return an array of the leaf's shape and dtype that takes no memory."""
        return np.broadcast_to(np.zeros((), self._shapes[path].dtype), self._shapes[path].shape)

    def read(self, path: str) -> np.ndarray:
        """Return a leaf."""
        if path not in self._held:
            self._held = {}
            wanted: list[str] = []
            size = 0
            for name in self._paths[self._paths.index(path) :]:
                leaf = self._shapes[name]
                size += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
                if wanted and size > AT_ONCE:
                    break
                wanted.append(name)
            self._held = {name: np.asarray(leaf) for name, leaf in self._params.some(wanted).items()}
        return self._held[path]


def tensors_of(rules: Iterable[Rule], params: StoredParams, rows: int) -> dict[str, Tensor]:
    """Return tensors under PyTorch's names, leaf by leaf.

    rows: number of tokens to keep in the embedding and the output matrix, without the padding of the vocabulary.
    """
    vocabulary = {rule.target for rule in vocab_rules(at="llama/")}
    rules = sorted(rules, key=lambda rule: split_target(rule.target)[0])
    reader = _Reader(params, (split_target(rule.target)[0] for rule in rules))

    def tensor(rule: Rule, leaf: np.ndarray) -> np.ndarray:
        value = permute(leaf[split_target(rule.target)[1]], rule.layout, inverse=True)
        return value[:rows] if rule.target in vocabulary else value

    def load(rule: Rule) -> np.ndarray:
        return tensor(rule, reader.read(split_target(rule.target)[0]))

    out = {}
    for rule in rules:
        value = tensor(rule, reader.stand_in(split_target(rule.target)[0]))
        out[rule.source] = Tensor(value.shape, value.dtype, functools.partial(load, rule))
    return out


def write_crab(cfg: CrabConfig, params: StoredParams, out: Path) -> None:
    """Write finetune_weights.bin, avs_finetune_weights.bin with the position matrices, and three pre-training files."""
    rules = crab_rules(cfg)
    rows = cfg.llama.vocab_size

    def tensors(*components: str) -> dict[str, Tensor]:
        return tensors_of([rule for name in components for rule in rules[name]], params, rows)

    torch_writer.save(out / "finetune_weights.bin", tensors("lora", "vl_projector", "al_projector"))
    vocabulary = tensors_of(vocab_rules(PEFT, "llama/"), params, rows)
    torch_writer.save(
        out / "avs_finetune_weights.bin", tensors("seg_module") | tensors_of(buffer_rules(), params, rows) | vocabulary
    )
    for name, component in (("visual", "vl_projector"), ("audio", "al_projector"), ("segmentation", "seg_module")):
        bare = {key.removeprefix(PEFT): tensor for key, tensor in tensors(component).items()}
        torch_writer.save(out / f"{name}_pretrain.bin", bare)


def write_hugging_face(cfg: CrabConfig, params: StoredParams, out: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write clip/ and llama/ as model directories, beats/BEATs.pt, and adapter/ with the LoRA."""
    rules = base_rules(cfg)
    base = cfg.llama.vocab_size - len(SPECIAL_TOKENS) - len(MASK_TOKENS)
    clip, beats, llama = (tensors_of(rules[name], params, base) for name in ("clip", "beats", "llama"))
    torch_writer.save_model_dir(out / "clip", clip)
    torch_writer.save_model_dir(out / "llama", llama, shard_bytes)
    torch_writer.save(
        out / "beats" / "BEATs.pt",
        {"cfg": beats_cfg(cfg.beats), "model": {key.removeprefix("model."): value for key, value in beats.items()}},
    )
    lora = tensors_of(crab_rules(cfg)["lora"], params, base)
    torch_writer.save_safetensors(out / "adapter" / "adapter_model.safetensors", lora)
    for folder, config in (
        ("clip", clip_json(cfg.clip)),
        ("llama", llama_json(cfg.llama, base, llama)),
        ("adapter", adapter_json(cfg.lora)),
    ):
        name = "adapter_config.json" if folder == "adapter" else "config.json"
        write_whole(out / folder / name, json.dumps(config, indent=1))


def clip_json(cfg: ClipConfig) -> dict[str, Any]:
    """Return the config.json of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_dim,
    }


def llama_json(cfg: LlamaConfig, vocab_size: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config.json of a LlamaForCausalLM or Qwen2ForCausalLM without the added tokens."""
    kind, name = ("qwen2", "Qwen2ForCausalLM") if cfg.qkv_bias else ("llama", "LlamaForCausalLM")
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": cfg.hidden,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "intermediate_size": cfg.mlp_dim,
        "rms_norm_eps": cfg.rms_eps,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": tensors["model.norm.weight"].dtype.name,
    }


def beats_cfg(cfg: BeatsConfig) -> dict[str, Any]:
    """Return the `cfg` of a BEATs file."""
    return {
        "encoder_layers": cfg.layers,
        "encoder_embed_dim": cfg.width,
        "encoder_attention_heads": cfg.heads,
        "encoder_ffn_embed_dim": cfg.mlp_dim,
        "embed_dim": cfg.embed_dim,
        "input_patch_size": cfg.patch_size,
        "conv_pos": cfg.conv_pos,
        "conv_pos_groups": cfg.conv_pos_groups,
        "num_buckets": cfg.num_buckets,
        "max_distance": cfg.max_distance,
        "layer_norm_first": False,
        "deep_norm": True,
        "gru_rel_pos": True,
        "activation_fn": "gelu",
        "relative_position_embedding": True,
        "conv_bias": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "dropout_input": 0.0,
        "encoder_layerdrop": 0.0,
        "finetuned_model": False,
    }


def adapter_json(cfg: LoraConfig) -> dict[str, Any]:
    """Return the sizes of the multi-head LoRA under the names of the released peft_hyper."""
    return {
        "peft_type": "MULTI_HEAD_LORA",
        "task_type": "CAUSAL_LM",
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_nums": cfg.heads,
        "lora_dropout": cfg.dropout,
        "bias": "none",
        "target_modules": [name.split(".")[-1] for name in PROJECTIONS],
    }
