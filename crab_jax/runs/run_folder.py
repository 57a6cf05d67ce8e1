"""The folder of a run: its config and tokenizer, and the checks of a resumed run."""

from __future__ import annotations

import functools
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util

from crab_jax.checkpoints.stored import identity
from crab_jax.config import RunConfig, bound_of, built, leaves
from crab_jax.defaults import base
from crab_jax.io import packaged, paths
from crab_jax.io.bounds import Anything, Choice, Modules, Text
from crab_jax.io.errors import InputError
from crab_jax.io.files import out_folder, write_whole
from crab_jax.io.structured import Each, read_json
from crab_jax.models.presets import MODELS
from crab_jax.models.quirks import PRESETS
from crab_jax.tasks import FLAG, TASKS, use_tasks
from crab_jax.tasks.task import Task
from data_pipelines.tokens import Tokenizer

# A resumed run may change these keys.
FREE_KEYS = (
    "log_every",
    "log_writer",
    "checkpoint_every",
    "keep",
    "watchdog_seconds",
    "max_skipped",
    "eval_every",
    "eval_split",
    "eval_samples",
    "eval_answers",
    "tasks",
    "data.workers",
    "data.root",
    "data.roots",
    "data.cache_dir",
    "data.allow_other",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.slices",
)
# The processes of one run may differ in these keys, which say where a host has its files and how it reads them.
OWN_KEYS = ("data.root", "data.roots", "data.cache_dir", "data.workers", "watchdog_seconds", "init_from", "tokenizer")

_SECTION = Each(Text(1, 100), Anything())
RUN_CONFIG = {
    "model": Choice(tuple(MODELS)),
    "compat": Choice(tuple(PRESETS)),
    "sizes?": Each(Text(1, 100), _SECTION),
    **{f"{section}?": _SECTION for section in ("data", "optim", "loss", "mesh")},
}
# Keys that determine the arrays of an existing run. Other keys of an old run may violate bounds that were added later.
_DECIDING = re.compile(
    r"frozen_dtype|trainable|frozen|(sizes|mesh)\..*|"
    r"data\.(video_frames|lengths|pad_short_audio|blank_video|mute_audio|roots?|cache_dir|workers)"
)
log = logging.getLogger(__name__)


def shared(config: RunConfig) -> dict[str, Any]:
    """Return the config values that all processes of a run must share, with the identity of `init_from`."""
    values = {f"config.{key}": value for key, value in config.flat().items() if key not in OWN_KEYS}
    return values | {"config.init_from": config.init_from and f"a checkpoint with hash {identity(config.init_from)}"}


def claim_workdir(workdir: Path, config: RunConfig) -> None:
    """Create the workdir, or check that the run in it has this config. Raises InputError.

    A key that is newer than the run counts as having its default.
    """
    out_folder(workdir, "--workdir")
    file = workdir / "config.json"
    if not file.exists() or not (workdir / "checkpoints" / "manifest.json").exists():
        return
    stored, replaced = _stored_config(workdir)
    old, new = stored.flat() | replaced, config.flat()
    changed = sorted(key for key in new if key not in FREE_KEYS and old[key] != new[key])
    if changed:
        key = changed[0]
        raise InputError(
            str(file),
            key,
            f"this run was started with {old.get(key)!r}, not {new.get(key)!r}",
            "use the same config to resume it, or another --workdir",
        )


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """Return the tokenizer of a run config. Raises InputError."""
    if not config.tokenizer:
        raise InputError("--config", "tokenizer", "is not set", "give a tokenizer.json or a LLaMA directory")
    tokenizer, rows = Tokenizer.load(config.tokenizer), config.model.llama.vocab_size
    if tokenizer.vocab_size > rows:
        raise InputError(
            config.tokenizer,
            "tokenizer",
            f"has {tokenizer.vocab_size} tokens with Crab's own, the model {rows}",
            "give the model's tokenizer, or set sizes.llama.vocab_size",
        )
    return tokenizer


def save_description(workdir: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Write config.json and the tokenizer: with the checkpoints, all that evaluate and predict need."""
    write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=1))
    tokenizer.save(workdir)


def load_config(path: str | Path) -> RunConfig:
    """Return the config of a run or a packed model; keys that are newer than it have their defaults.

    A value that is no longer allowed and does not determine any array is replaced by its default, with a warning.
    Raises InputError naming the file and the key.
    """
    config, replaced = _stored_config(paths.at(path))
    for key, problem in replaced.items():
        print(
            f"warning: {paths.at(path) / 'config.json'}: {key} {problem}; the default is used, which changes no answer",
            file=sys.stderr,
        )
    return config


def use_tasks_of(tasks: str | Sequence[Task | str], checkpoint: str | Path | None = None) -> None:
    """Register a user's tasks in this process, and warn of tasks of a checkpoint that are unknown here.

    tasks: modules as in --task-modules, or Tasks. Modules named in a checkpoint's config.json are never imported.
    Raises InputError as `crab_jax.tasks.use_tasks`.
    """
    use_tasks([tasks] if isinstance(tasks, str) else tasks)
    file = packaged.located(checkpoint) / "config.json" if checkpoint else None
    if file is None or not file.is_file():
        return  # loading the model reports the error
    stored = read_json(file, RUN_CONFIG)
    modules, weights = stored.get("tasks", ""), stored.get("data", {}).get("weights", {})
    unknown = sorted(weights.keys() - TASKS.keys()) if isinstance(weights, dict) else []
    if modules and unknown and Modules().fits(modules):
        _tell_unknown(
            f"{file}: trained with tasks that are not known here ({', '.join(unknown):.200}); give {FLAG} "
            f"{modules} to use them, where you trust those modules"
        )


@functools.lru_cache(maxsize=64)
def _tell_unknown(warning: str) -> None:
    """Print a warning, once in a process."""
    print(f"warning: {warning}", file=sys.stderr)


def _stored_config(path: Path) -> tuple[RunConfig, dict[str, str]]:
    """Return (config of a run or model, {key: problem} of the keys that were replaced by their defaults)."""
    path = packaged.located(path)
    file, fix = path / "config.json", "copy the file again"
    if not file.is_file():
        raise InputError(str(path), "--checkpoint", "has no config.json", "give a --workdir of train or a packed model")
    stored, defaults = traverse_util.flatten_dict(read_json(file, RUN_CONFIG), sep="."), dict(leaves(base()))
    for key in stored.keys() - defaults.keys():  # other unknown keys belong to another version
        if key.startswith("sizes.") or any(key.startswith(f"{known}.") for known in defaults):
            raise InputError(str(file), key, "is no key of a config", fix)
    values, replaced = {key: stored.get(key, value) for key, value in defaults.items()}, {}
    for key, value in values.items():
        if key.startswith("sizes.") and value is None or not (problem := bound_of(key).problem(value)):
            continue
        if _DECIDING.fullmatch(key):
            raise InputError(str(file), key, f"is {value!r:.60}", problem)
        values[key], replaced[key] = defaults[key], f"is {value!r:.60} and {problem}"
    try:
        return built(values), replaced
    except InputError as error:
        raise InputError(str(file), error.field, error.problem, error.fix) from None
