"""The contents of a set of released files: their keys and sizes, and the CrabConfig and key tables that follow.

Crab's own files are recognised by their keys, not by their names: pre-training files name the bare model
(`model.vl_projector...`), fine-tuning files the PEFT model (`base_model.model.model.vl_projector...`). Here every key
has the PEFT name. If several files hold a key, the last file given wins, as in the released loading order.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crab_jax.convert import torch_file
from crab_jax.convert.encoders import (
    BEATS_IGNORED,
    CLIP_IGNORED,
    QFORMER_IGNORED,
    beats_config,
    beats_rules,
    clip_config,
    clip_rules,
    qformer_rules,
)
from crab_jax.convert.keymap import Rule
from crab_jax.convert.llama import LLAMA_IGNORED, PEFT, llama_config, llama_rules, lora_rules, lora_sizes, vocab_rules
from crab_jax.convert.mask_decoder import position_rules, seg_rules
from crab_jax.io import stored_tensors
from crab_jax.io.errors import InputError
from crab_jax.io.structured import read_json
from crab_jax.models.clip import ClipConfig
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import LlamaConfig
from crab_jax.models.lora import LoraConfig
from crab_jax.models.mask_decoder import SegConfig
from crab_jax.models.qformer import QFormerConfig
from crab_jax.models.quirks import PRESETS

COMPONENTS = (
    "vl_projector",
    "al_projector",
    "lora",
    "seg_module",
)  # the contents of Crab's files, and the choices of --fresh
SEG = f"{PEFT}model.seg_module."
EMBED, HEAD = (rule.source for rule in vocab_rules(PEFT))
DEFAULT_TAPS = {24: (14, 22, 23)}  # number of layers -> tapped layers; 24: ViT-L/14
_POPPED = {re.escape(EMBED): "the released scripts drop it from pre-training files"}


class Source(NamedTuple):
    """One file or directory: its tensors under the names of the key tables, and patterns of ignored names."""

    where: str
    tensors: Mapping[str, Any]
    ignored: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Choices:
    """Settings that no file holds.

    bert_heads: attention heads of the Q-Formers. taps: CLIP layers, None for the known ones. low_res: side in pixels at
    which mask levels are averaged, None for half the image size. dtype: of the computation.
    """

    bert_heads: int = 12
    taps: tuple[int, ...] | None = None
    lora_alpha: float = 16.0
    low_res: int | None = None
    dtype: str = "bfloat16"
    compat: str = "released"


def crab_source(path: Path) -> Source:
    """Return one of Crab's files, with its keys under their PEFT names. Raises InputError for any other file."""
    tensors = stored_tensors.read_safetensors(path) if path.suffix == ".safetensors" else torch_file.read(path)
    fine_tuned = any(name.startswith(PEFT) for name in tensors)
    known = re.compile(
        rf"({re.escape(PEFT)})?(model\.(vl_projector|al_projector|seg_module|embed_tokens)\.|lm_head\."
        r"|model\.layers\.\d+\.(self_attn|mlp)\.\w+\.lora_)"
    )
    if not any(known.match(name) for name in tensors):
        raise InputError(
            str(path),
            "",
            f"holds no weights of Crab (first keys: {list(tensors)[:3]})",
            "give files like finetune_weights.bin or visual_pretrain.bin",
        )
    renamed = (
        tensors
        if fine_tuned
        else stored_tensors.LazyTensors({PEFT + name: functools.partial(tensors.__getitem__, name) for name in tensors})
    )
    return Source(str(path), renamed, QFORMER_IGNORED | ({} if fine_tuned else _POPPED))


def resolve(sources: Sequence[Source]) -> tuple[dict[str, Source], dict[str, dict[str, str]]]:
    """Return ({key: file that gives it}, {file: {unused key: reason}}) of Crab's files in their order.

    The output matrix of pre-training files is used only when no fine-tuning file is given: the released inference never
    loads it.
    """
    unused: dict[str, dict[str, str]] = {source.where: {} for source in sources}
    given: dict[str, Source] = {}
    tuned = any(_component(key) == "lora" for source in sources for key in source.tensors)
    for source in sources:
        pretraining = bool(set(source.ignored) & set(_POPPED))
        for key in source.tensors:
            if pretraining and key == EMBED:
                continue  # ignored by its pattern
            if pretraining and tuned and key == HEAD:
                unused[source.where][key] = "output matrix of a pre-training file, unused once LoRA is there"
                continue
            if key in given:
                unused[given[key].where][key] = f"replaced by {source.where}"
            given[key] = source
    return given, unused


def _component(key: str) -> str | None:
    if ".lora_" in key:
        return "lora"
    match = re.match(rf"{re.escape(PEFT)}model\.(vl_projector|al_projector|seg_module)\.", key)
    return match.group(1) if match else None


def present(keys: Mapping[str, Any]) -> set[str]:
    """Return the COMPONENTS that the keys belong to."""
    return {component for key in keys if (component := _component(key))}


class _Shapes:
    """Sizes of the model, read from the shapes of Crab's tensors."""

    def __init__(self, given: Mapping[str, Source]):
        self.given = given

    def size(self, key: str, axis: int) -> int:
        """Return the size of one axis of a tensor. Raises InputError."""
        if key not in self.given:
            raise InputError(
                ", ".join(sorted({source.where for source in self.given.values()})),
                key,
                "this tensor is missing, and a size is read from it",
                "fetch the file again",
            )
        source = self.given[key]
        shape = source.tensors[key].shape
        if axis >= len(shape):
            raise InputError(source.where, key, f"has shape {shape}, which has no axis {axis}", "fetch the file again")
        size: int = shape[axis]
        return size

    def count(self, pattern: str) -> int:
        """Return the number of distinct first groups with which keys match `pattern`."""
        return len({match.group(1) for key in self.given if (match := re.match(pattern, key))})


def _qformer(shapes: _Shapes, kind: str, in_dim: int, out_dim: int, choices: Choices) -> QFormerConfig:
    stem = f"{PEFT}model.{'vl' if kind == 'visual' else 'al'}_projector.{kind}"
    layer = f"{stem}_Qformer.bert.encoder.layer."
    width = shapes.size(f"{stem}_query_tokens", 2)
    if width % choices.bert_heads:
        raise InputError(
            shapes.given[f"{stem}_query_tokens"].where,
            f"{stem}_query_tokens",
            f"width {width} does not split into {choices.bert_heads} heads",
            "give --bert CONFIG.JSON of the model's BERT",
        )
    return QFormerConfig(
        in_dim=in_dim,
        out_dim=out_dim,
        width=width,
        heads=choices.bert_heads,
        dtype=choices.dtype,
        mlp_dim=shapes.size(f"{layer}0.intermediate_query.dense.weight", 0),
        layers=shapes.count(re.escape(layer) + r"(\d+)\."),
        queries=shapes.size(f"{stem}_query_tokens", 1),
    )


def _seg(shapes: _Shapes, llama: LlamaConfig, clip: ClipConfig, choices: Choices) -> SegConfig:
    decoder = f"{SEG}mask_decoder."
    transformer, queries = f"{decoder}transformer.0.layers.", f"{decoder}query_generator.layers."
    return SegConfig(
        **_seg_frame(llama, clip, choices),
        dim=shapes.size(f"{SEG}no_mask_embed.weight", 1),
        queries=shapes.size(f"{decoder}avs_query_tokens.weight", 0),
        mlp_dim=shapes.size(f"{transformer}0.mlp.lin1.weight", 0),
        depth=shapes.count(re.escape(transformer) + r"(\d+)"),
        query_layers=shapes.count(re.escape(queries) + r"(\d+)"),
        query_mlp_dim=shapes.size(f"{queries}0.ffn.0.weight", 0),
        classes=shapes.size(f"{decoder}avss_classifier.weight", 0),
    )


def _seg_frame(llama: LlamaConfig, clip: ClipConfig, choices: Choices) -> dict[str, Any]:
    """Return the sizes of the mask branch that follow from other modules."""
    return {
        "llm_dim": llama.hidden,
        "image_dim": clip.width,
        "grid": clip.image_size // clip.patch_size,
        "image_size": clip.image_size,
        "low_res": choices.low_res or clip.image_size // 2,
        "chain_queries": PRESETS[choices.compat].chain_queries,
    }


def read_config(
    clip: Path, llama: Path, beats: Source, given: Mapping[str, Source], vocab_size: int, choices: Choices
) -> CrabConfig:
    """Return the CrabConfig of the files; components that Crab's files lack get default sizes. Raises InputError."""
    vision = read_json(clip / "config.json", {"vision_config?": {}})
    layers = vision.get("vision_config", vision).get("num_hidden_layers")
    taps = choices.taps or (DEFAULT_TAPS.get(layers) if isinstance(layers, int) else None)
    if taps is None:
        raise InputError(
            str(clip / "config.json"),
            "num_hidden_layers",
            f"the taps of {layers!r:.40} layers are not known",
            "give --taps A,B,C",
        )
    clip_cfg = clip_config(vision, taps, choices.dtype, str(clip / "config.json"))
    metadata = beats.tensors.metadata if isinstance(beats.tensors, stored_tensors.LazyTensors) else {}
    beats_cfg = beats_config(metadata.get("cfg", {}), choices.dtype, beats.where)
    llama_cfg = llama_config(
        read_json(llama / "config.json"), str(llama / "config.json"), vocab_size=vocab_size, dtype=choices.dtype
    )
    compat, shapes, components = PRESETS[choices.compat], _Shapes(given), present(given)

    def qformer(component: str, kind: str, in_dim: int) -> QFormerConfig:
        if component in components:
            return _qformer(shapes, kind, in_dim, llama_cfg.hidden, choices)
        return QFormerConfig(in_dim=in_dim, out_dim=llama_cfg.hidden, dtype=choices.dtype)

    lora = LoraConfig(alpha=choices.lora_alpha, dropout_per_head=compat.dropout_per_head)
    if "lora" in components:
        rank, heads = _lora(given)
        lora = dataclasses.replace(lora, rank=rank, heads=heads)
    seg = (
        _seg(shapes, llama_cfg, clip_cfg, choices)
        if "seg_module" in components
        else SegConfig(**_seg_frame(llama_cfg, clip_cfg, choices))
    )
    return CrabConfig(
        clip=clip_cfg,
        beats=beats_cfg,
        llama=llama_cfg,
        lora=lora,
        seg=seg,
        seg_taps=compat.seg_taps,
        visual=qformer("vl_projector", "visual", clip_cfg.width),
        audio=qformer("al_projector", "audio", beats_cfg.width),
    )


def _lora(given: Mapping[str, Source]) -> tuple[int, int]:
    """Return (rank, heads) of the LoRA. Raises InputError naming the files that disagree."""
    tensors: dict[str, dict[str, Any]] = {}
    for key, source in given.items():
        if _component(key) == "lora":
            tensors.setdefault(source.where, {})[key] = source.tensors[key]
    sizes = {where: lora_sizes(held, where) for where, held in tensors.items()}
    if len(set(sizes.values())) > 1:
        listed = "; ".join(f"{where}: rank {rank}, {heads} heads" for where, (rank, heads) in sizes.items())
        raise InputError(", ".join(sizes), "lora_route", f"the files disagree ({listed})", "give files of one LoRA")
    return next(iter(sizes.values()))


def crab_rules(cfg: CrabConfig) -> dict[str, list[Rule]]:
    """Return the key tables of Crab's own files by component, without the vocabulary and the position matrices."""
    prefix = f"{PEFT}model."
    return {
        "vl_projector": qformer_rules(cfg.visual, prefix, "visual", "vl_projector/"),
        "al_projector": qformer_rules(cfg.audio, prefix, "audio", "al_projector/"),
        "lora": lora_rules(cfg.llama, cfg.lora, "llama/"),
        "seg_module": seg_rules(cfg.seg, SEG, "seg_module/"),
    }


def base_rules(cfg: CrabConfig) -> dict[str, list[Rule]]:
    """Return the key tables of the frozen models' own files: "clip", "beats", and "llama" with its vocabulary."""
    return {
        "clip": clip_rules(cfg.clip, "clip/"),
        "beats": beats_rules(cfg.beats, "beats/"),
        "llama": llama_rules(cfg.llama, "llama/"),
    }


def buffer_rules() -> list[Rule]:
    """Return the rules of the two random position matrices, which only our own exports hold."""
    return position_rules(SEG, "seg_module/")


def base_sources(clip: Path, llama: Path, beats: Path) -> dict[str, Source]:
    """Return the frozen models' files, by the names of `base_rules`."""
    return {
        "clip": Source(str(clip), torch_file.read_model_dir(clip), CLIP_IGNORED),
        "beats": Source(str(beats), torch_file.read(beats), BEATS_IGNORED),
        "llama": Source(str(llama), torch_file.read_model_dir(llama), LLAMA_IGNORED),
    }
