"""Model sizes by name: those of the paper, and a tiny model that learns the generated scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from crab_jax.io.bounds import Bound, Choice, Flag, Real, Whole, Wholes
from crab_jax.io.errors import InputError
from crab_jax.models.beats import BeatsConfig
from crab_jax.models.clip import ClipConfig
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import LlamaConfig
from crab_jax.models.lora import LoraConfig
from crab_jax.models.mask_decoder import SegConfig
from crab_jax.models.qformer import QFormerConfig


def crab_7b(**sizes: Mapping[str, Any]) -> CrabConfig:
    """Return the paper's sizes: CLIP ViT-L/14, BEATs iter3+, two Q-Formers, LLaMA-2-7B-chat, LoRA r=8 with 3 heads.

    `sizes` override fields of its modules, as in `crab_7b(lora={"heads": 5})`. Raises InputError for a size that does
    not exist or is inconsistent with the others.
    """
    return with_sizes(CrabConfig(), sizes)


def tiny(**sizes: Mapping[str, Any]) -> CrabConfig:
    """Return a Crab of about 3 M parameters that learns the generated scenes on two CPU cores; `sizes` as `crab_7b`."""
    clip = ClipConfig(
        image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_dim=384, taps=(2, 3, 4), dtype="float32"
    )
    beats = BeatsConfig(
        layers=3, width=96, heads=4, mlp_dim=288, embed_dim=64, conv_pos=16, conv_pos_groups=4, dtype="float32"
    )
    llama = LlamaConfig(
        vocab_size=657, hidden=128, layers=4, heads=4, kv_heads=4, mlp_dim=384, remat="none", dtype="float32"
    )
    qformer: dict[str, Any] = {
        "out_dim": 128,
        "width": 96,
        "heads": 4,
        "mlp_dim": 256,
        "layers": 2,
        "dropout": 0.0,
        "dtype": "float32",
    }
    cfg = CrabConfig(
        clip=clip,
        beats=beats,
        llama=llama,
        visual=QFormerConfig(in_dim=128, queries=3, **qformer),
        audio=QFormerConfig(in_dim=96, queries=2, **qformer),
        lora=LoraConfig(rank=8, alpha=16.0, heads=3, dropout=0.0),
        seg=SegConfig(
            llm_dim=128,
            image_dim=128,
            grid=8,
            image_size=64,
            dim=64,
            queries=16,
            heads=4,
            mlp_dim=128,
            query_mlp_dim=128,
            low_res=32,
            dtype="float32",
        ),
    )
    return with_sizes(cfg, sizes)


MODELS = {"tiny": tiny, "crab_7b": crab_7b}
DTYPE = Choice(("float32", "bfloat16", "float16"))
REMATS = Choice(("none", "full", "dots"))
_SIZE, _LAYERS, _SHARE = Whole(1, 2**20), Whole(1, 1024), Real(0, 0.99)
# Bounds of sizes by the name of the field, or by <module>.<field> where modules differ; other fields are flags.
BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(
        (
            "image_size",
            "patch_size",
            "width",
            "heads",
            "mlp_dim",
            "embed_dim",
            "conv_pos",
            "conv_pos_groups",
            "max_distance",
            "in_dim",
            "out_dim",
            "queries",
            "hidden",
            "kv_heads",
            "rank",
            "llm_dim",
            "image_dim",
            "grid",
            "dim",
            "query_mlp_dim",
            "low_res",
        ),
        _SIZE,
    ),
    "layers": _LAYERS,
    "depth": _LAYERS,
    "query_layers": _LAYERS,
    "num_buckets": Whole(4, 2**20),
    "dtype": DTYPE,
    "taps": Wholes(0, 1024),
    "vocab_size": Whole(18, 2**24),
    "rope_theta": Real(1, 1e12),
    "rms_eps": Real(1e-30, 1),
    "remat": REMATS,
    "dropout": _SHARE,
    "alpha": Real(1e-9, 1e9),
    "scales": Whole(2, 2),
    "tokens_per_scale": Whole(3, 3),
    "classes": Whole(71, 2**16),
    "beats.patch_size": Whole(1, 98),
}


def bound_of(module: str, field: str) -> Bound:
    """Return the bound of the size `module.field`."""
    return BOUNDS.get(f"{module}.{field}") or BOUNDS.get(field, Flag())


def with_sizes(cfg: CrabConfig, sizes: Mapping[str, Any]) -> CrabConfig:
    """Return `cfg` with the fields of `sizes`, {module: {field: value}}, replaced; None keeps the value of a field.

    Raises InputError naming a field that does not exist, or the first size that is inconsistent with another one.
    """
    cfg = _replaced(cfg, sizes)
    check_sizes(cfg)
    return cfg


def _replaced(cfg: Any, sizes: Mapping[str, Any], module: str = "") -> Any:
    known = [field.name for field in dataclasses.fields(cfg)]
    changed = {}
    for name, value in sizes.items():
        key = f"{module}.{name}".lstrip(".")
        if name not in known or isinstance(value, Mapping) != dataclasses.is_dataclass(getattr(cfg, name)):
            raise InputError("--config", f"sizes.{key}", "is no size", f"use some of {', '.join(known)}")
        if isinstance(value, Mapping):
            changed[name] = _replaced(getattr(cfg, name), value, name)
        elif value is not None:
            if module and (problem := bound_of(module, name).problem(value)):
                raise InputError("--config", f"sizes.{key}", f"is {' '.join(repr(value).split()):.60}", problem)
            changed[name] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(cfg, **changed)
    except InputError as error:
        raise InputError("--config", f"sizes.{module}.{error.field}", error.problem, error.fix) from None


def check_sizes(cfg: CrabConfig) -> None:
    """Raise InputError naming the first size that is inconsistent with another one."""
    clip, beats, llama, seg, visual, audio = cfg.clip, cfg.beats, cfg.llama, cfg.seg, cfg.visual, cfg.audio
    grid = clip.image_size // clip.patch_size
    divided = (
        ("clip.heads", clip.heads, "clip.width", clip.width),
        ("beats.heads", beats.heads, "beats.width", beats.width),
        ("beats.conv_pos_groups", beats.conv_pos_groups, "beats.width", beats.width),
        ("visual.heads", visual.heads, "visual.width", visual.width),
        ("audio.heads", audio.heads, "audio.width", audio.width),
        ("llama.heads", llama.heads, "llama.hidden", llama.hidden),
        ("llama.kv_heads", llama.kv_heads, "llama.heads", llama.heads),
    )
    equal = (
        ("seg.grid", seg.grid, "clip.image_size / clip.patch_size", grid),
        ("seg.image_size", seg.image_size, "clip.image_size", clip.image_size),
        ("seg.image_dim", seg.image_dim, "clip.width", clip.width),
        ("seg.llm_dim", seg.llm_dim, "llama.hidden", llama.hidden),
        ("visual.in_dim", visual.in_dim, "clip.width", clip.width),
        ("audio.in_dim", audio.in_dim, "beats.width", beats.width),
        ("visual.out_dim", visual.out_dim, "llama.hidden", llama.hidden),
        ("audio.out_dim", audio.out_dim, "llama.hidden", llama.hidden),
    )
    wrong = [
        (key, f"{by} does not divide sizes.{name} = {size}", "use a divisor")
        for key, by, name, size in divided
        if size % by
    ]
    wrong += [
        (key, f"is {size}, and sizes.{name} is {wanted}", "make them equal")
        for key, size, name, wanted in equal
        if size != wanted
    ]
    if cfg.lora.rank > llama.hidden:
        wrong.append(("lora.rank", f"is {cfg.lora.rank}, more than sizes.llama.hidden = {llama.hidden}", "use less"))
    if llama.head_dim % 2:
        wrong.append(("llama.heads", f"a head has {llama.head_dim} channels", "make it an even number"))
    if beats.num_buckets % 2:
        wrong.append(("beats.num_buckets", f"is {beats.num_buckets}", "make it even: half of them are for each sign"))
    if beats.max_distance <= beats.num_buckets // 4:
        wrong.append(
            (
                "beats.max_distance",
                f"is {beats.max_distance}",
                f"use more than {beats.num_buckets // 4}, a quarter of sizes.beats.num_buckets",
            )
        )
    if len(clip.taps) <= max(cfg.seg_taps):
        wrong.append(("clip.taps", f"has {len(clip.taps)} layers", f"give {max(cfg.seg_taps) + 1}"))
    for key, problem, fix in wrong[:1]:
        raise InputError("--config", f"sizes.{key}", problem, fix)
