"""Run configs: from the keys of config files and command lines (ml_collections) to one frozen, typed RunConfig."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from crab_jax import losses, optim, tasks
from crab_jax.defaults import COMPAT_SIZES, DERIVED_DATA, DERIVED_LOSS, base
from crab_jax.io import bounds, packaged, paths
from crab_jax.io.bounds import (
    ANY_PLACE,
    ANYWHERE,
    Bound,
    Choice,
    Fixed,
    Flag,
    Module,
    Modules,
    Name,
    Patterns,
    Place,
    Places,
    Real,
    Whole,
    Wholes,
    Words,
)
from crab_jax.io.errors import InputError
from crab_jax.io.structured import refuse_special
from crab_jax.losses import LossConfig
from crab_jax.models import presets
from crab_jax.models.crab import CrabConfig
from crab_jax.models.presets import DTYPE, MODELS, check_sizes, with_sizes
from crab_jax.models.protocol import ModelConfig
from crab_jax.models.quirks import PRESETS, Compat
from crab_jax.optim import OptimConfig
from crab_jax.tasks import TASKS
from data_pipelines.batching import DataConfig
from data_pipelines.datasets import DATASETS, VARIANTS

CONFIG_BYTES = 1 << 20  # largest size of a hand-written config file
# Bounds of the values, by section. Keys that are not listed are booleans.
MIXTURE_BOUNDS: dict[str, Bound] = {
    "root": ANY_PLACE,
    "roots": Places(),
    "split": Name(),
    "datasets": Words(tuple(DATASETS)),
    "variant": Choice(VARIANTS),
    "frames": Choice(("one", "all")),
    "exclude_leaks": Flag(),
    "limit": Whole(note="0 = all"),
    "batch_size": Whole(1, 2**24),
    "workers": Whole(0, 1024),
    "allow_other": Flag(),
}
TASK_BOUNDS: dict[str, Bound] = {
    "weights": Real(1e-6, 1e6, zero=True),
    "caps": Whole(note="0 = all"),
    "curriculum": Whole(),
}
DATA_BOUNDS: dict[str, Bound] = {
    "video_frames": Whole(1, 1024),
    "cache_dir": Place(),
    "lengths": Wholes(1, 2**20, rising=True),
    "on_error": Choice(("raise", "skip")),
    "prompt_only": Fixed(False, "there would be nothing to learn"),
}
MESH_BOUNDS: dict[str, Bound] = {
    axis: Whole(0, 2**20, note="0 = inferred") for axis in ("data", "fsdp", "tensor", "slices")
}
RUN_BOUNDS: dict[str, Bound] = {
    "model": Choice(tuple(MODELS)),
    "compat": Choice(tuple(PRESETS)),
    "init_from": ANY_PLACE,
    "tokenizer": ANY_PLACE,
    "fresh": Patterns(),
    "trainable": Patterns(least=1),
    "frozen": Patterns(),
    "frozen_dtype": DTYPE,
    "tasks": Modules(),
    "seed": Whole(),
    "steps": Whole(1),
    "log_every": Whole(1),
    "log_writer": Module(),
    "checkpoint_every": Whole(1),
    "keep": Whole(1),
    "max_skipped": Whole(1),
    "eval_every": Whole(note="0 = never"),
    "eval_split": Name(),
    "eval_samples": Whole(1, 1000),
    "eval_answers": Flag(),
    "watchdog_seconds": Real(0.1, 1e9, zero=True, note="0 = never"),
}
BOUNDS: dict[str, Bound] = {
    **RUN_BOUNDS,
    **{f"data.{name}": bound for name, bound in (MIXTURE_BOUNDS | DATA_BOUNDS).items()},
    **{f"loss.{term}": bound for term, bound in losses.BOUNDS.items() if term not in DERIVED_LOSS},
    **{f"optim.{field}": bound for field, bound in optim.BOUNDS.items()},
    **{f"mesh.{axis}": bound for axis, bound in MESH_BOUNDS.items()},
}


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The choice of Examples from a data root: the keys of `data` that do not concern decoding.

    root, split: the data root and its split. roots: several data roots, in place of `root`. datasets: of a raw root,
    empty = those of the joint stage. variant: of the prompts. frames: "one" frame per clip of AVSS and Ref-AVS and
    epoch, or "all". exclude_leaks: leave out clips that another dataset has in val or test. limit: number of Examples,
    0 = all. batch_size: rows of a step over all devices. workers: processes that decode. allow_other: continue a run on
    other Examples than it was trained on. weights: {task: factor of its natural share of the mixture}, 0 leaves it out.
    caps: {task: how many Examples count}, 0 = all. curriculum: {task: the step from which it is drawn}.
    """

    root: str = ""
    roots: tuple[str, ...] = ()
    split: str = "train"
    datasets: tuple[str, ...] = ()
    variant: str = "train"
    frames: str = "one"
    exclude_leaks: bool = False
    limit: int = 0
    batch_size: int = 256
    workers: int = 0
    allow_other: bool = False
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    caps: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 0))
    curriculum: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 0))

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        texts = {name: ",".join(values[name]) for name in ("datasets", "roots")}
        bounds.check("data", values | texts, MIXTURE_BOUNDS)
        for name, bound in TASK_BOUNDS.items():
            if unknown := values[name].keys() ^ TASKS.keys():
                raise InputError(
                    "--config",
                    f"data.{name}.{min(unknown)}",
                    "is missing or no task",
                    f"give each of {', '.join(TASKS)}",
                )
            bounds.check(f"data.{name}", values[name], dict.fromkeys(TASKS, bound))

    @property
    def places(self) -> tuple[str, ...]:
        """Return all data roots. Raises InputError when there is none."""
        if not self.roots and not self.root:
            raise InputError("--config", "data.root", "is not set", "give --config.data.root=DIR")
        return self.roots or (self.root,)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; 0 is inferred from their number and memory (crab_jax/runs/run_mesh.py).

    slices: the slices that `data` crosses; 0 and 1 are inferred from the devices.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0

    def __post_init__(self) -> None:
        bounds.check("mesh", vars(self), MESH_BOUNDS)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole config of a run. Its parts check themselves; `resolve` also checks that they fit together.

    model: sizes, with the quirks of `compat` (models/quirks.py), which also sets `loss.reduction` and `data.clock`.
    model_name: the preset that `model` is based on. init_from: a run, a packed or an imported model; "" starts from
    random weights. fresh: parameter patterns that it may lack. trainable, frozen: patterns ('/'-joined paths, full
    match) that divide the parameters. frozen_dtype: of the frozen ones. tokenizer: a tokenizer.json or a Hugging Face
    folder. tasks: the modules of a user's tasks that the run was started with (crab_jax/tasks/__init__.py); they are
    imported for a command line, never for a checkpoint. log_every, checkpoint_every: in steps. log_writer: a module
    with the shape of wandb, "module" or "module:project", "" = none. keep: number of checkpoints. max_skipped:
    consecutive non-finite steps before the run ends. eval_every: steps between evaluations, 0 = never, on
    `eval_samples` Examples of each task of `eval_split`; eval_answers: generate answers too.
    watchdog_seconds: longer waits are reported, 0 = never.
    """

    model_name: str
    compat: str
    model: CrabConfig
    mixture: MixtureConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    mesh: MeshConfig
    init_from: str
    fresh: tuple[str, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    frozen_dtype: str
    tasks: str
    tokenizer: str
    seed: int
    steps: int
    log_every: int
    log_writer: str
    checkpoint_every: int
    keep: int
    max_skipped: int
    eval_every: int
    eval_split: str
    eval_samples: int
    eval_answers: bool
    watchdog_seconds: float

    def __post_init__(self) -> None:
        bounds.check("", {**vars(self), "model": self.model_name}, RUN_BOUNDS)
        check_sizes(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Return the nested keys of config.json, in JSON types and with every size explicit."""
        sizes = dataclasses.asdict(self.model)
        data = dataclasses.asdict(self.data) | dataclasses.asdict(self.mixture)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("model_name", "mixture"):
            del own[name]
        config = own | {
            "model": self.model_name,
            "sizes": _without(sizes, COMPAT_SIZES),
            "data": {key: value for key, value in data.items() if key not in DERIVED_DATA}
            | {"datasets": ",".join(self.mixture.datasets), "roots": ",".join(self.mixture.roots)},
            "loss": _without(dataclasses.asdict(self.loss), DERIVED_LOSS),
            "optim": dataclasses.asdict(self.optim),
            "mesh": dataclasses.asdict(self.mesh),
        }
        plain: dict[str, Any] = json.loads(json.dumps(config))
        return plain

    def flat(self) -> dict[str, Any]:
        """Return `to_dict` with dotted keys: {'optim.lr': 1e-4, ...}."""
        flat: dict[str, Any] = traverse_util.flatten_dict(self.to_dict(), sep=".")
        return flat


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return a nested dict without the fields of these names."""
    return {
        name: _without(value, names) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in names
    }


def bound_of(key: str) -> Bound:
    """Return the bound of a key's value."""
    if not key.startswith("sizes."):
        section, _, task = key.rpartition(".")
        by_task = TASK_BOUNDS.get(section.removeprefix("data.")) if task in TASKS else None
        return by_task or BOUNDS.get(key, Flag())
    module, _, field = key.removeprefix("sizes.").partition(".")
    return presets.bound_of(module, field)


def resolve(config: ConfigDict) -> RunConfig:
    """Return the typed config of a run, checked as a whole before anything starts.

    Raises InputError naming the key that is unknown, missing, out of its bounds, or does not go with another one.
    """
    if not isinstance(config, ConfigDict):
        raise InputError("--config", "", f"is {type(config).__name__}", "get_config() must return a ConfigDict")
    known, values = dict(leaves(base())), dict(leaves(config))
    for key in sorted(known.keys() ^ values.keys()):
        problem, fix = (
            ("is missing", "start from crab_jax.defaults.base()")
            if key in known
            else ("is no key of a config", "see crab_jax/defaults.py")
        )
        raise InputError("--config", key, problem, fix)
    bounds.check(
        "",
        values,
        {key: bound_of(key) for key, value in values.items() if value is not None or not key.startswith("sizes.")},
    )
    run = built(values)
    check_run(run)
    return run


def built(values: Mapping[str, Any]) -> RunConfig:
    """Return the RunConfig of flat values, one for each key; a size of None keeps the model's own.

    Raises InputError.
    """
    config = traverse_util.unflatten_dict(
        {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}, sep="."
    )
    if config["tokenizer"] == packaged.FORMER_TOKENIZER:
        config["tokenizer"] = packaged.TOKENIZER
    compat = PRESETS[config["compat"]]
    sizes = with_sizes(MODELS[config["model"]](), config.pop("sizes", {}))
    model = dataclasses.replace(
        sizes,
        seg_taps=compat.seg_taps,
        seg=dataclasses.replace(sizes.seg, chain_queries=compat.chain_queries),
        lora=dataclasses.replace(sizes.lora, dropout_per_head=compat.dropout_per_head),
    )
    data, mixture = config.pop("data"), {field.name for field in dataclasses.fields(MixtureConfig)}
    drawn = {name: value for name, value in data.items() if name in mixture}
    decoded = {name: value for name, value in data.items() if name not in mixture}
    try:
        return RunConfig(
            model_name=config.pop("model"),
            model=model,
            mixture=MixtureConfig(
                **drawn | {name: tuple(filter(None, data[name].split(","))) for name in ("datasets", "roots")}
            ),
            data=DataConfig(**decoded, **derived_data(model, compat)),
            loss=LossConfig(**config.pop("loss"), reduction=compat.mask_loss_reduction),
            optim=OptimConfig(**config.pop("optim")),
            mesh=MeshConfig(**config.pop("mesh")),
            **config,
        )
    except TypeError as error:  # an unknown key
        raise InputError("--config", "", f"has unknown keys ({error!s:.80})", "see crab_jax/defaults.py") from None


def derived_data(model: ModelConfig, compat: Compat) -> dict[str, Any]:
    """Return the fields of a DataConfig that follow from the model and its quirks and have no keys."""
    return {
        "image_size": model.image_size,
        "visual_queries": model.visual_queries,
        "audio_queries": model.audio_queries,
        "clock": compat.clock,
        "tasks": tuple(TASKS),
    }


def check_run(run: RunConfig) -> None:
    """Raise InputError where values of a config, each allowed on its own, do not fit together."""
    mixture, loss = run.mixture, run.loss
    if not (loss.text or loss.bce or loss.dice or loss.ce):
        raise InputError("--config", "loss", "is 0 for all, so that nothing is learned", "give one a weight")
    if not any(mixture.weights.values()):
        raise InputError("--config", "data.weights", "is 0 for all, so that nothing is learned", "give one a weight")
    if not loss.text and not any(
        mixture.weights[name] and (loss.ce if task.mask_kind == "semantic" else loss.bce + loss.dice)
        for name, task in TASKS.items()
        if task.mask_kind != "none"
    ):
        raise InputError(
            "--config",
            "loss.text",
            "is 0, and no task of the run has another loss, so that nothing is learned",
            "give loss.text, or a task with masks, a weight",
        )
    if run.eval_every and (shared := sorted(set(run.eval_split.split("+")) & set(mixture.split.split("+")))):
        raise InputError(
            "--config",
            "eval_split",
            f"is {run.eval_split!r}, and {shared[0]!r} is trained on (data.split is {mixture.split!r})",
            "name a split that the run does not train on",
        )
    for name, step in mixture.curriculum.items():
        if mixture.weights[name] and step >= run.steps:
            raise InputError(
                "--config",
                f"data.curriculum.{name}",
                f"is {step}, but the run ends after step {run.steps}",
                f"use fewer, or leave the task out with data.weights.{name}=0",
            )
    if run.optim.accumulate and mixture.batch_size % run.optim.accumulate:
        raise InputError(
            "--config",
            "data.batch_size",
            f"{mixture.batch_size} rows do not split into {run.optim.accumulate} micro-batches",
            "use a multiple of optim.accumulate",
        )


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of all leaves, including empty sections."""
    for name, value in config.items():
        if isinstance(value, ConfigDict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# The command line: a config file, overrides of its keys, and the origin of each value.


def parse_flags(argv: list[str], doc: str | None, workdir: bool = True) -> tuple[RunConfig, Path]:
    """Return (config, workdir if needed) of `--config=FILE --workdir=DIR [--config.key=value]`.

    `--print-config` prints every value with its origin and exits with code 0. Raises InputError for a missing flag, an
    unknown or mistyped key, a whole section replaced by one override, and anything that `resolve` refuses.
    """
    argv = [_bracketed(arg) for arg in argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configs/<stage>.py", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of this run", flag_values=values)
    flags.DEFINE_bool("debug", False, "show tracebacks", flag_values=values)
    flags.DEFINE_bool("print-config", False, "print the config and end", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(doc)
        print("Flags: --config=FILE  --workdir=DIR  --config.key=value ...  --print-config  --debug")
        raise SystemExit(0)
    refuse_no_file(_config_file(argv))
    sys.modules.pop("config_config", None)  # remove the config file of an earlier call, whose names would remain
    try:
        _use_tasks(argv)
        rest = values(argv)
        config = values.config
        fresh = _fresh(argv) if config is not None else None
        keys, wanted = (set(dict(leaves(config))), set(dict(leaves(fresh)))) if config is not None else (set(), set())
    except InputError:
        raise
    except Exception as error:  # a config file may raise anything
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(
            "command line", "", f"{reason or type(error).__name__:.300}", "see --help and the keys in the config file"
        ) from error
    shown = values["print-config"].value
    for name in ("config", *(["workdir"] if workdir and not shown else [])):
        if values[name].value is None:
            raise InputError("command line", f"--{name}", "is missing", f"give --{name}=...")
    if rest[1:]:
        raise InputError("command line", rest[1], "is not a flag", "write --config.key=value")
    if workdir and not shown and (problem := ANYWHERE.problem(values.workdir)):
        raise InputError("command line", "--workdir", f"is {values.workdir!r}", problem)
    if keys != wanted:
        raise InputError(
            "command line",
            min(keys ^ wanted),
            "an override replaced or dropped a whole section",
            "override one key at a time: --config.section.key=value",
        )
    run = resolve(config)
    if shown:
        flag: Any = values["config"]
        print(described(run, config, fresh, flag.config_filename))
        raise SystemExit(0)
    return run, paths.at(values.workdir or "")


def described(run: RunConfig, config: ConfigDict, fresh: ConfigDict, file: str) -> str:
    """Return the resolved config, one `key = value` per line, with the origin of each value.

    config: with the overrides of the command line; fresh: as written in `file`.
    """
    default, written, given = (dict(leaves(each)) for each in (base(), fresh, config))
    rows = []
    for key, value in run.flat().items():
        if given[key] != written[key]:
            origin = "command line"
        elif written[key] != default[key]:
            origin = file
        else:
            origin = f"model {run.model_name}" if key.startswith("sizes.") else "default"
        rows.append((key, json.dumps(value), origin))
    quirks = {**dataclasses.asdict(PRESETS[run.compat])}
    rows += [(f"({name})", json.dumps(value), f"compat {run.compat}") for name, value in quirks.items()]
    widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}} = {value:<{widths[1]}}  # {origin}" for key, value, origin in rows)


def _use_tasks(argv: list[str]) -> None:
    """Register the user's tasks of the command line, or of its config file, before the other keys are read.

    Every task has keys of its own (such as its weight), so the config file must be read again once the tasks are known.
    """
    key = "--config.tasks"
    values = [arg.partition("=")[2] for arg in argv if arg.startswith(f"{key}=")]
    values += [after for arg, after in itertools.pairwise(argv) if arg == key]
    if not values and _config_file(argv):
        with contextlib.suppress(Exception):  # reported when the whole command line is read
            values = [_fresh(argv).get("tasks", "")]
    modules = values[-1].strip("'\"") if values and isinstance(values[-1], str) else ""
    if problem := Modules().problem(modules):
        raise InputError("--config", "tasks", f"is {modules!r:.80}", problem)
    tasks.use_tasks([modules], "--config.tasks")


def _bracketed(argument: str) -> str:
    """Return `--config.data.weights.ref-avs=2` in the form that the flags accept: keys with a hyphen in brackets."""
    key, *value = argument.split("=", 1)
    if not key.startswith("--config."):
        return argument
    return "=".join((re.sub(r"\.(\w+-[\w-]+)", r"['\1']", key), *value))


def _fresh(argv: list[str]) -> ConfigDict:
    """Return the config of the command line's config file without any override."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=[])
    values(["fresh", f"--config={_config_file(argv)}"])
    return values.config


def _config_file(argv: list[str]) -> str:
    """Return the value of --config, or ""."""
    return next(
        (
            arg.removeprefix("--config=")
            for number, arg in enumerate(argv)
            if arg.startswith("--config=") or (number and argv[number - 1] == "--config")
        ),
        "",
    )


def refuse_no_file(path: str | Path) -> None:
    """Raise InputError for an existing path that is a folder, a pipe, a device or too large for a config file."""
    if "\0" not in str(path) and os.path.exists(path):
        refuse_special(path, "--config", CONFIG_BYTES)
