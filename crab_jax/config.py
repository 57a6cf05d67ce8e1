"""Model sizes by name, and the way from a run config (ml_collections) to the dataclasses that modules take."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from crab_jax import losses, optim
from crab_jax.bounds import PATH, Bound, Choice, Fixed, Flag, Name, Patterns, Place, Real, Whole, Wholes, Words
from crab_jax.compat import PRESETS
from crab_jax.errors import InputError
from crab_jax.losses import LossConfig
from crab_jax.models.beats import BeatsConfig
from crab_jax.models.clip import ClipConfig
from crab_jax.models.crab import CrabConfig
from crab_jax.models.llama import LlamaConfig
from crab_jax.models.lora import LoraConfig
from crab_jax.models.mask_decoder import SegConfig
from crab_jax.models.qformer import QFormerConfig
from crab_jax.optim import OptimConfig, learning_rate
from crab_jax.structured import refuse_special
from crab_jax.tasks import TASKS
from data_pipelines.batching import DataConfig
from data_pipelines.datasets import DATASETS, VARIANTS

CONFIG_BYTES = 1 << 20  # of a config file, which a person wrote

def crab_7b() -> CrabConfig:
    """The paper's sizes: CLIP ViT-L/14, BEATs iter3+, two Q-Formers, LLaMA-2-7B-chat, LoRA r=8 with 3 heads."""
    return CrabConfig()


def tiny() -> CrabConfig:
    """A Crab of about 3 M parameters that learns the generated scenes on two CPU cores."""
    clip = ClipConfig(image_size=64, patch_size=8, width=128, layers=4, heads=4, mlp_dim=384, taps=(2, 3, 4),
                      dtype="float32")
    beats = BeatsConfig(layers=3, width=96, heads=4, mlp_dim=288, embed_dim=64, conv_pos=16, conv_pos_groups=4,
                        dtype="float32")
    llama = LlamaConfig(vocab_size=657, hidden=128, layers=4, heads=4, kv_heads=4, mlp_dim=384, remat="none",
                        dtype="float32")
    qformer: dict[str, Any] = dict(out_dim=128, width=96, heads=4, mlp_dim=256, layers=2, dropout=0.0,
                                   dtype="float32")
    return CrabConfig(
        clip=clip, beats=beats, llama=llama,
        visual=QFormerConfig(in_dim=128, queries=3, **qformer), audio=QFormerConfig(in_dim=96, queries=2, **qformer),
        lora=LoraConfig(rank=8, alpha=16.0, heads=3, dropout=0.0),
        seg=SegConfig(llm_dim=128, image_dim=128, grid=8, image_size=64, dim=64, queries=16, heads=4, mlp_dim=128,
                      query_mlp_dim=128, low_res=32, dtype="float32"),
    )


MODELS = {"tiny": tiny, "crab_7b": crab_7b}
COMPAT_FIELDS = ("seg_taps", "chain_queries", "dropout_per_head")  # set by `config.compat`, not one by one


def size_overrides(sizes: Any) -> Any:
    """A typed, empty place for every size: `--config.sizes.llama.layers=2` overrides the model's own."""
    if dataclasses.is_dataclass(sizes):
        return ConfigDict({f.name: size_overrides(getattr(sizes, f.name)) for f in dataclasses.fields(sizes)
                           if f.name not in COMPAT_FIELDS})
    return config_dict.placeholder(type(sizes))


def _overlay(sizes: Any, overrides: ConfigDict, at: str = "sizes") -> Any:
    changed = {}
    for name, value in overrides.items():
        if isinstance(value, ConfigDict):
            changed[name] = _overlay(getattr(sizes, name), value, f"{at}.{name}")
        elif value is not None:
            changed[name] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(sizes, **changed)
    except InputError as error:
        raise InputError("--config", f"{at}.{error.field}", error.problem, error.fix) from None


def model_config(config: ConfigDict) -> CrabConfig:
    """CrabConfig of a run config: the sizes of `config.model`, overridden by `config.sizes`, with its compat preset."""
    if config.model not in MODELS:
        raise InputError("--config", "model", f"unknown model {config.model!r}", f"use one of {', '.join(MODELS)}")
    if config.compat not in PRESETS:
        raise InputError("--config", "compat", f"unknown preset {config.compat!r}", f"use one of {', '.join(PRESETS)}")
    compat = PRESETS[config.compat]
    sizes = _overlay(MODELS[config.model](), config.sizes)
    return dataclasses.replace(
        sizes, seg_taps=compat.seg_taps,
        seg=dataclasses.replace(sizes.seg, chain_queries=compat.chain_queries),
        lora=dataclasses.replace(sizes.lora, dropout_per_head=compat.dropout_per_head))


def loss_config(config: ConfigDict) -> LossConfig:
    """LossConfig of a run config, with the reduction of its compat preset."""
    return LossConfig(**config.loss, reduction=PRESETS[config.compat].mask_loss_reduction)


def data_config(config: ConfigDict, **changes: Any) -> DataConfig:
    """DataConfig of a run config: picture size and row counts come from the model, the clock from its compat preset."""
    sizes = model_config(config)
    names = {f.name for f in dataclasses.fields(DataConfig)}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in config.data.items() if k in names}
    return DataConfig(**{**chosen, "image_size": sizes.clip.image_size,
                         "visual_queries": sizes.visual.queries, "audio_queries": sizes.audio.queries,
                         "clock": PRESETS[config.compat].clock, **changes})


# What the keys of a run config may be. A key that is not named here is true or false.
_DTYPE = Choice(("float32", "bfloat16", "float16"))
_SIZE, _LAYERS = Whole(1, 2**20), Whole(1, 1024)
_SHARE = Real(0, 0.99)
BOUNDS: dict[str, Bound] = {
    "model": Choice(tuple(MODELS)), "compat": Choice(tuple(PRESETS)), "init_from": Place(), "tokenizer": Place(),
    "fresh": Patterns(), "trainable": Patterns(least=1), "frozen": Patterns(), "frozen_dtype": _DTYPE,
    "seed": Whole(), "steps": Whole(1), "log_every": Whole(1), "checkpoint_every": Whole(1), "keep": Whole(1),
    "max_skipped": Whole(1), "watchdog_seconds": Real(0.1, 1e9, zero=True, note="0 = never"),
    "data.root": Place(), "data.split": Name(), "data.datasets": Words(tuple(DATASETS)),
    "data.variant": Choice(VARIANTS), "data.frames": Choice(("one", "all")),
    "data.limit": Whole(note="0 = all"), "data.batch_size": Whole(1, 2**24),
    "data.workers": Whole(0, 1024), "data.video_frames": Whole(1, 1024), "data.cache_dir": Place(),
    "data.lengths": Wholes(1, 2**20, rising=True), "data.on_error": Choice(("raise", "skip")),
    "data.prompt_only": Fixed(False, "there would be nothing to learn"),
    **{f"data.weights.{task}": Real(1e-6, 1e6, zero=True) for task in TASKS},
    **{f"data.caps.{task}": Whole(note="0 = all") for task in TASKS},
    **{f"data.curriculum.{task}": Whole() for task in TASKS},
    **{f"loss.{term}": bound for term, bound in losses.BOUNDS.items() if term != "reduction"},
    **{f"optim.{field}": bound for field, bound in optim.BOUNDS.items()},
    **{f"mesh.{axis}": Whole(0, 2**20, note="0 = inferred") for axis in ("data", "fsdp", "tensor")},
}
# Those of `sizes`, by the name of the field; `sizes.<module>.<field>` where modules differ.
SIZE_BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("image_size", "patch_size", "width", "heads", "mlp_dim", "embed_dim", "conv_pos",
                     "conv_pos_groups", "max_distance", "in_dim", "out_dim", "queries", "hidden", "kv_heads", "rank",
                     "llm_dim", "image_dim", "grid", "dim", "query_mlp_dim", "low_res"), _SIZE),
    "layers": _LAYERS, "depth": _LAYERS, "query_layers": _LAYERS, "num_buckets": Whole(4, 2**20), "dtype": _DTYPE,
    "taps": Wholes(0, 1024), "vocab_size": Whole(18, 2**24), "rope_theta": Real(1, 1e12), "rms_eps": Real(1e-30, 1),
    "remat": Choice(("none", "full", "dots")), "dropout": _SHARE, "alpha": Real(1e-9, 1e9), "scales": Whole(2, 2),
    "tokens_per_scale": Whole(3, 3), "classes": Whole(71, 2**16), "beats.patch_size": Whole(1, 98),
}


def bound_of(key: str) -> Bound:
    """What the value of a key may be."""
    if not key.startswith("sizes."):
        return BOUNDS.get(key, Flag())
    module, _, field = key.removeprefix("sizes.").partition(".")
    return SIZE_BOUNDS.get(f"{module}.{field}") or SIZE_BOUNDS.get(field, Flag())


def check_values(config: ConfigDict) -> None:
    """Raise InputError naming the first key whose value is not allowed (see BOUNDS and SIZE_BOUNDS)."""
    for key, value in leaves(config):
        if value is None and key.startswith("sizes."):  # the model's own
            continue
        if problem := bound_of(key).problem(value):
            raise InputError("--config", key, f"is {' '.join(repr(value).split()):.60}", problem)


def check_sizes(cfg: CrabConfig) -> None:
    """Raise InputError naming the first size that does not go with another one."""
    clip, beats, llama, seg, visual, audio = cfg.clip, cfg.beats, cfg.llama, cfg.seg, cfg.visual, cfg.audio
    grid = clip.image_size // clip.patch_size
    divided = (("clip.heads", clip.heads, "clip.width", clip.width),
               ("beats.heads", beats.heads, "beats.width", beats.width),
               ("beats.conv_pos_groups", beats.conv_pos_groups, "beats.width", beats.width),
               ("visual.heads", visual.heads, "visual.width", visual.width),
               ("audio.heads", audio.heads, "audio.width", audio.width),
               ("llama.heads", llama.heads, "llama.hidden", llama.hidden),
               ("llama.kv_heads", llama.kv_heads, "llama.heads", llama.heads))
    equal = (("seg.grid", seg.grid, "clip.image_size / clip.patch_size", grid),
             ("seg.image_size", seg.image_size, "clip.image_size", clip.image_size),
             ("seg.image_dim", seg.image_dim, "clip.width", clip.width),
             ("seg.llm_dim", seg.llm_dim, "llama.hidden", llama.hidden),
             ("visual.in_dim", visual.in_dim, "clip.width", clip.width),
             ("audio.in_dim", audio.in_dim, "beats.width", beats.width),
             ("visual.out_dim", visual.out_dim, "llama.hidden", llama.hidden),
             ("audio.out_dim", audio.out_dim, "llama.hidden", llama.hidden))
    wrong = [(key, f"{by} does not divide sizes.{name} = {size}", "use a divisor")
             for key, by, name, size in divided if size % by]
    wrong += [(key, f"is {size}, and sizes.{name} is {wanted}", "make them equal")
              for key, size, name, wanted in equal if size != wanted]
    if cfg.lora.rank > llama.hidden:
        wrong.append(("lora.rank", f"is {cfg.lora.rank}, more than sizes.llama.hidden = {llama.hidden}", "use less"))
    if llama.head_dim % 2:
        wrong.append(("llama.heads", f"a head has {llama.head_dim} channels", "make it an even number"))
    if beats.num_buckets % 2:
        wrong.append(("beats.num_buckets", f"is {beats.num_buckets}", "make it even: half of them are for each sign"))
    if beats.max_distance <= beats.num_buckets // 4:
        wrong.append(("beats.max_distance", f"is {beats.max_distance}", f"use more than {beats.num_buckets // 4}, a "
                      "quarter of sizes.beats.num_buckets"))
    if len(clip.taps) <= max(cfg.seg_taps):
        wrong.append(("clip.taps", f"has {len(clip.taps)} layers", f"give {max(cfg.seg_taps) + 1}"))
    for key, problem, fix in wrong[:1]:
        raise InputError("--config", f"sizes.{key}", problem, fix)


def check_config(config: ConfigDict) -> None:
    """Every value is in its bounds, all fit together and all dataclasses can be built, before anything starts."""
    from configs.common import base  # which imports this file

    if not isinstance(config, ConfigDict):
        raise InputError("--config", "", f"is {type(config).__name__}", "get_config() must return a ConfigDict")
    known, found = _keys(base()), _keys(config)
    for key in sorted(known ^ found):
        problem, fix = ("is missing", "start from configs.common.base()") if key in known else (
            "is no key of a config", "see configs/common.py")
        raise InputError("--config", key, problem, fix)
    check_values(config)
    check_sizes(model_config(config))
    loss_config(config)
    data_config(config)
    learning_rate(OptimConfig(**config.optim), config.steps)
    for section in ("loss", "data.weights"):
        if not any(value for key, value in leaves(config) if key.startswith(f"{section}.")):
            raise InputError("--config", section, "is 0 for all, so that nothing is learned", "give one a weight")
    weights, loss = config.data.weights, config.loss
    if not loss.text and not any(weights[name] and (loss.ce if task.mask_kind == "semantic" else loss.bce + loss.dice)
                                 for name, task in TASKS.items() if task.mask_kind != "none"):
        raise InputError("--config", "loss.text", "is 0, and no task of the run has another loss, so that nothing is "
                         "learned", "give loss.text, or a task with masks, a weight")
    for name, step in config.data.curriculum.items():
        if weights[name] and step >= config.steps:
            raise InputError("--config", f"data.curriculum.{name}", f"is {step}, but the run ends after step "
                             f"{config.steps}", f"use fewer, or leave the task out with data.weights.{name}=0")
    rows, accumulate = config.data.batch_size, config.optim.accumulate
    if accumulate and rows % accumulate:
        raise InputError("--config", "data.batch_size", f"{rows} rows do not split into {accumulate} micro-batches",
                         "use a multiple of optim.accumulate")


def parse_flags(argv: list[str], doc: str | None, workdir: bool = True) -> tuple[ConfigDict, Path]:
    """(config, workdir if it is needed) from `--config=FILE --workdir=DIR [--config.key=value]`.

    Raises InputError for a missing flag, an unknown or mistyped key, and a whole sub-dict replaced by one override.
    """
    argv = [_bracketed(arg) for arg in argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configs/<stage>.py", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of this run", flag_values=values)
    flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(doc)
        print("Flags: --config=FILE  --workdir=DIR  --config.key=value ...  --debug")
        raise SystemExit(0)
    refuse_no_file(_config_file(argv))
    sys.modules.pop("config_config", None)  # the file of an earlier command line, whose names would stay
    try:
        rest = values(argv)
        config = values.config
        keys, wanted = (_keys(config), _keys(_fresh(argv))) if config is not None else (set(), set())
    except Exception as error:  # a config file may raise anything
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError("command line", "", f"{reason or type(error).__name__:.300}",
                         "see --help and the keys in the config file") from error
    for name in ("config", *(["workdir"] if workdir else [])):
        if values[name].value is None:
            raise InputError("command line", f"--{name}", "is missing", f"give --{name}=...")
    if rest[1:]:
        raise InputError("command line", rest[1], "is not a flag", "write --config.key=value")
    if workdir and (problem := PATH.problem(values.workdir)):
        raise InputError("command line", "--workdir", f"is {values.workdir!r}", problem)
    if keys != wanted:
        raise InputError("command line", min(keys ^ wanted), "an override replaced or dropped a whole section",
                         "override one key at a time: --config.section.key=value")
    check_config(config)
    return config, Path(values.workdir or "")


def _bracketed(argument: str) -> str:
    """`--config.data.weights.ref-avs=2` as the flags take it, with a key that has a hyphen in brackets."""
    key, *value = argument.split("=", 1)
    if not key.startswith("--config."):
        return argument
    return "=".join((re.sub(r"\.(\w+-[\w-]+)", r"['\1']", key), *value))


def _fresh(argv: list[str]) -> ConfigDict:
    """The config of the command line's config file without any override."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=[])
    values(["fresh", f"--config={_config_file(argv)}"])
    return values.config


def _config_file(argv: list[str]) -> str:
    """What --config says, "" where it is not given."""
    return next((arg.removeprefix("--config=") for number, arg in enumerate(argv) if arg.startswith("--config=") or
                 (number and argv[number - 1] == "--config")), "")


def refuse_no_file(path: str | Path) -> None:
    """Raise InputError for a config file that is there and is a folder, a pipe, a device or no text a person wrote."""
    if "\0" not in str(path) and os.path.exists(path):
        refuse_special(path, "--config", CONFIG_BYTES)


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all leaves; an empty section is one."""
    for name, value in config.items():
        if isinstance(value, ConfigDict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _keys(config: ConfigDict) -> set[str]:
    """Dotted paths of all leaves."""
    return {key for key, _ in leaves(config)}
