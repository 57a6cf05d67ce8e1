"""What every stage config shares: the full set of keys with their defaults."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from crab_jax.config import crab_7b, size_overrides
from crab_jax.losses import LossConfig
from crab_jax.optim import OptimConfig
from crab_jax.tasks import TASKS
from data_pipelines.batching import DataConfig

# Paths ('/'-joined, full match) of the parameter groups that stages train or freeze.
ENCODERS = ("clip/.*", "beats/.*")
QFORMERS = ("vl_projector/.*", "al_projector/.*")
LORA = ("llama/.*/lora_(A|B|route)",)
LLAMA = ("llama/(?!.*/lora_).*",)
# The random Fourier matrices are saved state, never trained (the released code registers them as buffers).
FOURIER = ("seg_module/.*positional_encoding_gaussian_matrix",)
SEGMENTATION = ("seg_module/(?!.*positional_encoding_gaussian_matrix).*",)


def base() -> ConfigDict:
    """All keys of a run config. Stages change values, never add keys."""
    elsewhere = ("image_size", "visual_queries", "audio_queries", "clock")  # set by the model and by `compat`
    decoding = {k: v for k, v in dataclasses.asdict(DataConfig()).items() if k not in elsewhere}
    loss = {k: v for k, v in dataclasses.asdict(LossConfig()).items() if k != "reduction"}
    return ConfigDict({
        "model": "crab_7b",
        "compat": "paper",
        "sizes": size_overrides(crab_7b()),
        "init_from": "",  # a run's workdir or a packed model; "" starts from random weights
        "fresh": (),  # parameter patterns that `init_from` may lack
        "trainable": (*QFORMERS, *LORA, *SEGMENTATION),
        "frozen": (*ENCODERS, *LLAMA, *FOURIER),
        "frozen_dtype": "bfloat16",
        "tokenizer": "",  # tokenizer.json or a Hugging Face LLaMA directory
        # Of a raw root: `datasets` "a,b" ("" = those of the joint stage), the `variant` of prompts (train, test or
        # quick), and `frames`, "one" picture of a clip of AVSS and Ref-AVS in an epoch or "all".
        # `exclude_leaks` leaves out clips that another dataset of the root has in val or test.
        # `weights` multiply a task's natural share of the mixture, 0 leaves it out; with `caps` so many examples of a
        # task count at most (0 = all). `curriculum` is the step from which a task is drawn. `allow_other`: go on with
        # a run on other Examples than it was trained on.
        "data": {"root": "", "split": "train", "datasets": "", "variant": "train", "frames": "one",
                 "exclude_leaks": False, "limit": 0, "batch_size": 256, "workers": 0,
                 "weights": {name: 1.0 for name in TASKS}, "caps": {name: 0 for name in TASKS},
                 "curriculum": {name: 0 for name in TASKS}, "allow_other": False, **decoding},
        "loss": loss,
        "optim": dataclasses.asdict(OptimConfig()),
        "mesh": {"data": 0, "fsdp": 1, "tensor": 1},  # devices per axis; 0 is inferred
        "seed": 0,
        "steps": 1000,
        "log_every": 10,
        "checkpoint_every": 500,
        "keep": 2,
        "max_skipped": 10,  # steps in a row that are not finite and not taken, before the run ends
        "watchdog_seconds": 300.0,  # a longer wait for input, devices or disk is reported; 0 = never
    })


def released() -> ConfigDict:
    """`base` for the stages of the paper: the mesh and the micro-batches follow from the devices and their memory."""
    config = base()
    config.mesh.fsdp = 0
    config.optim.accumulate = 0
    return config
