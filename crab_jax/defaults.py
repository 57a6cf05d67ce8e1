"""Defaults of a run config, as the ConfigDict that files of configs/ change and command lines override."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from crab_jax.io import packaged
from crab_jax.losses import LossConfig
from crab_jax.models.crab import PARAMETER_GROUPS
from crab_jax.models.presets import crab_7b
from crab_jax.optim import OptimConfig
from crab_jax.tasks import TASKS
from data_pipelines.batching import DataConfig

# Parameters that stages train or freeze together, by the model's own names (crab_jax/models/crab.py).
ENCODERS, QFORMERS = PARAMETER_GROUPS["encoders"], PARAMETER_GROUPS["qformers"]
LORA, LLAMA = PARAMETER_GROUPS["lora"], PARAMETER_GROUPS["llama"]
FOURIER, SEGMENTATION = PARAMETER_GROUPS["fourier"], PARAMETER_GROUPS["segmentation"]


# Fields that follow from `compat` and the model and therefore have no keys.
COMPAT_SIZES = ("seg_taps", "chain_queries", "dropout_per_head")
DERIVED_DATA = ("image_size", "visual_queries", "audio_queries", "clock", "tasks")
DERIVED_LOSS = ("reduction",)


def size_overrides(sizes: Any) -> Any:
    """Return an empty, typed placeholder for every size: `--config.sizes.llama.layers=2` overrides the model's own."""
    if dataclasses.is_dataclass(sizes):
        return ConfigDict(
            {
                field.name: size_overrides(getattr(sizes, field.name))
                for field in dataclasses.fields(sizes)
                if field.name not in COMPAT_SIZES
            }
        )
    return config_dict.placeholder(type(sizes))


def base() -> ConfigDict:
    """Return all keys of a run config. Stages change values, never add keys."""
    decoding = {k: v for k, v in dataclasses.asdict(DataConfig()).items() if k not in DERIVED_DATA}
    loss = {k: v for k, v in dataclasses.asdict(LossConfig()).items() if k not in DERIVED_LOSS}
    return ConfigDict(
        {
            "model": "crab_7b",
            "compat": "paper",
            "sizes": size_overrides(crab_7b()),
            "init_from": "",  # a run's workdir or a packed model; "" starts from random weights
            "fresh": (),  # parameter patterns that `init_from` may lack
            "trainable": (*QFORMERS, *LORA, *SEGMENTATION),
            "frozen": (*ENCODERS, *LLAMA, *FOURIER),
            "frozen_dtype": "bfloat16",
            "tasks": "",  # modules with tasks of your own, "package.module:NAME,other.module", which are imported
            "tokenizer": "",  # tokenizer.json or a Hugging Face LLaMA directory
            # For a raw root: `datasets` "a,b" ("" = those of the joint stage), the `variant` of prompts (train, test or
            # quick), and `frames`: "one" frame per clip of AVSS and Ref-AVS and epoch, or "all".
            # `roots` "a,b" takes the place of `root` and reads several data roots together.
            # `exclude_leaks` leaves out clips that another dataset of the root has in val or test.
            # `weights` multiply a task's natural share of the mixture, 0 leaves it out. `caps` bounds how many examples
            # of a task count (0 = all). `curriculum` is the step from which a task is drawn. `allow_other` continues a
            # run on other Examples than those it was trained on.
            "data": {
                "root": "",
                "roots": "",
                "split": "train",
                "datasets": "",
                "variant": "train",
                "frames": "one",
                "exclude_leaks": False,
                "limit": 0,
                "batch_size": 256,
                "workers": 0,
                "weights": dict.fromkeys(TASKS, 1.0),
                "caps": dict.fromkeys(TASKS, 0),
                "curriculum": dict.fromkeys(TASKS, 0),
                "allow_other": False,
                **decoding,
            },
            "loss": loss,
            "optim": dataclasses.asdict(OptimConfig()),
            # Devices per axis, 0 is inferred; `slices` of them (0 and 1: those that the devices name) share `data`.
            "mesh": {"data": 0, "fsdp": 1, "tensor": 1, "slices": 0},
            "seed": 0,
            "steps": 1000,
            "log_every": 10,
            "log_writer": "",  # also log to "module" or "module:project" with the shape of wandb: wandb, trackio
            "checkpoint_every": 500,
            "keep": 2,
            "max_skipped": 10,  # the run ends after so many non-finite, skipped steps in a row
            # Evaluation during training (docs/training.md): every so many steps (0 = never), on `eval_samples` examples
            # of each task of `eval_split`; `eval_answers` also generates and scores answers, beside the losses.
            "eval_every": 0,
            "eval_split": "val",
            "eval_samples": 4,
            "eval_answers": False,
            "watchdog_seconds": 300.0,  # a longer wait for input, devices or disk is reported; 0 = never
        }
    )


def released() -> ConfigDict:
    """Return `base` for the stages of the paper.

    Mesh and micro-batches are inferred from the devices and their memory.
    """
    config = base()
    config.mesh.fsdp = 0
    config.optim.accumulate = 0
    return config


def tiny() -> ConfigDict:
    """Return `base` for the tiny model on generated scenes, from random weights; see docs/tiny.md."""
    config = base()
    config.model = "tiny"
    config.frozen_dtype = "float32"
    config.tokenizer = packaged.TOKENIZER
    config.data.batch_size = 16
    config.data.lengths = (144, 192, 272)
    return config
