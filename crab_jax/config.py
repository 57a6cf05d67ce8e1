"""Model sizes by name, and the way from a run config (ml_collections) to the dataclasses that modules take."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

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
from data_pipelines.batching import DataConfig


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


def _overlay(sizes: Any, overrides: ConfigDict) -> Any:
    changed = {}
    for name, value in overrides.items():
        if isinstance(value, ConfigDict):
            changed[name] = _overlay(getattr(sizes, name), value)
        elif value is not None:
            changed[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(sizes, **changed)


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


def check_config(config: ConfigDict) -> None:
    """Every derived dataclass can be built and every choice is known, before anything starts."""
    model_config(config)
    loss_config(config)
    data_config(config)
    optim = OptimConfig(**config.optim)
    learning_rate(optim, config.steps)
    for field in ("steps", "log_every", "checkpoint_every", "keep", "max_skipped"):
        if config[field] < 1:
            raise InputError("--config", field, f"is {config[field]}", "must be at least 1")
    for field in ("caps", "curriculum"):
        for task, value in config.data[field].items():
            if value < 0:
                raise InputError("--config", f"data.{field}.{task}", f"is {value}", "must not be negative")
    if optim.accumulate and config.data.batch_size % optim.accumulate:
        raise InputError("--config", "data.batch_size", f"{config.data.batch_size} rows do not split into "
                         f"{optim.accumulate} micro-batches", "use a multiple of optim.accumulate")


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
    try:
        rest = values(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError("command line", "", reason, "see --help and the keys in the config file") from error
    for name in ("config", *(["workdir"] if workdir else [])):
        if values[name].value is None:
            raise InputError("command line", f"--{name}", "is missing", f"give --{name}=...")
    if rest[1:]:
        raise InputError("command line", rest[1], "is not a flag", "write --config.key=value")
    if "://" in (values.workdir or ""):
        raise InputError("command line", "--workdir", f"{values.workdir!r} is no folder",
                         "mount the bucket and give its path (launch_tpu.sh does)")
    config = values.config
    wanted = _keys(_fresh(argv))
    if _keys(config) != wanted:
        odd = sorted(_keys(config) ^ wanted)
        raise InputError("command line", odd[0], "an override replaced or dropped a whole section",
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
    file = next(arg for number, arg in enumerate(argv) if arg.startswith("--config=") or
                (number and argv[number - 1] == "--config"))
    values(["fresh", file if file.startswith("--config=") else f"--config={file}"])
    return values.config


def _keys(config: ConfigDict, prefix: str = "") -> set[str]:
    """Dotted paths of all leaves."""
    out: set[str] = set()
    for name, value in config.items():
        out |= _keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name}
    return out
