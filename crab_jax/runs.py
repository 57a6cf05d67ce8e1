"""A run on disk and what it is made of: workdir, tokenizer, data, starting parameters, a loaded model."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from crab_jax import optim, sharding
from crab_jax.checkpoints import check_match, load_params
from crab_jax.config import data_config, model_config
from crab_jax.errors import InputError
from crab_jax.models.crab import Crab, init_params
from data_pipelines import mixture
from data_pipelines.batching import Batch, Bucket
from data_pipelines.examples import Example, read_jsonl
from data_pipelines.tokens import Tokenizer

# A resumed run may change these without becoming another run.
FREE_KEYS = ("log_every", "checkpoint_every", "keep", "data.workers", "data.root", "data.cache_dir")


def flat_config(config: ConfigDict) -> dict[str, Any]:
    """{'optim.lr': 1e-4, ...} in plain JSON types."""
    return traverse_util.flatten_dict(json.loads(json.dumps(config.to_dict())), sep=".")


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Make the workdir, or check that the run it holds has this config. Raises InputError."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(str(workdir), "--workdir", f"cannot be written ({error.strerror})",
                         "give a folder you may write to") from error
    file = workdir / "config.json"
    if not file.exists() or not (workdir / "checkpoints" / "manifest.json").exists():
        return
    old = traverse_util.flatten_dict(json.loads(file.read_text()), sep=".")
    new = flat_config(config)
    changed = sorted(k for k in old.keys() | new.keys() if k not in FREE_KEYS and old.get(k) != new.get(k))
    if changed:
        key = changed[0]
        raise InputError(str(file), key, f"this run was started with {old.get(key)!r}, not {new.get(key)!r}",
                         "use the same config to resume it, or another --workdir")


def tokenizer_of(config: ConfigDict) -> Tokenizer:
    """The tokenizer of a run config."""
    if not config.tokenizer:
        raise InputError("--config", "tokenizer", "is not set", "give a tokenizer.json or a LLaMA directory")
    return Tokenizer.load(config.tokenizer)


def read_examples(root: str | Path, split: str) -> list[Example]:
    """The Examples of one split of a data root."""
    if not root:
        raise InputError("--config", "data.root", "is not set", "give --config.data.root=DIR")
    return read_jsonl(Path(root) / f"{split}.jsonl")


def train_dataset(config: ConfigDict, tokenizer: Tokenizer) -> Any:
    """Resumable Grain dataset of the run's batches, with the share of each task as configured."""
    examples = [e for e in read_examples(config.data.root, config.data.split) if config.data.weights[e.task] > 0]
    if config.data.limit:
        examples = examples[:config.data.limit]
    counts = Counter(e.task for e in examples)
    weights = {task: n * config.data.weights[task] for task, n in counts.items()}
    return mixture.train_dataset(
        examples, config.data.root, tokenizer, data_config(config), batch_size=config.data.batch_size,
        seed=config.seed, weights=weights, process_index=jax.process_index(), process_count=jax.process_count(),
        workers=config.data.workers)


def init_batch(model: Crab) -> Batch:
    """One blank row that reaches every module: a frame, an audio window and a mask group."""
    side, length = model.cfg.clip.image_size, 8
    picture = jnp.zeros((1, 1, side, side, 3), jnp.uint8)
    return Batch(
        tokens=jnp.zeros((1, length), jnp.int32), slots=jnp.full((1, length), -1),
        text_mask=jnp.ones((1, length), bool), loss_mask=jnp.ones((1, length), bool),
        mask_positions=jnp.zeros((1, 1, 6), jnp.int32),
        frames=picture, frame_mask=jnp.ones((1, 1), bool), fbank=jnp.zeros((1, 1, 98, 128)),
        audio_mask=jnp.ones((1, 1), bool), seg_frame=picture, seg_target=jnp.zeros((1, 1, side, side), jnp.int32),
        seg_kind=jnp.ones((1, 1), jnp.int32), task=jnp.zeros(1, jnp.int32), index=jnp.zeros(1, jnp.int32))


def abstract_params(model: Crab) -> Any:
    """Shapes of all parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda rng: init_params(model, rng, init_batch(model)), jax.random.key(0))


def initial_params(config: ConfigDict, model: Crab) -> Any:
    """Starting parameters: those of `init_from`, checked strictly; leaves named by `fresh` are newly drawn."""
    wanted = traverse_util.flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    loaded = traverse_util.flatten_dict(load_params(config.init_from), sep="/") if config.init_from else {}
    # Only what is missing is drawn, so that a large checkpoint is not in memory twice.
    missing = sorted(path for path in wanted if path not in loaded and (
        not config.init_from or any(re.fullmatch(p, path) for p in config.fresh)))

    @jax.jit
    def draw(rng: jax.Array) -> dict[str, jax.Array]:
        flat = traverse_util.flatten_dict(nn.unbox(init_params(model, rng, init_batch(model))), sep="/")
        return {path: flat[path] for path in missing}

    drawn = draw(jax.random.key(config.seed)) if missing else {}
    params = traverse_util.unflatten_dict(loaded | drawn, sep="/")
    check_match(traverse_util.unflatten_dict(wanted, sep="/"), params, config.init_from)
    return params


def split_params(config: ConfigDict, params: Any, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """(trainable float32, frozen in the config's dtype) on the mesh."""
    shardings = sharding.param_shardings(abstract_params(Crab(model_config(config))), mesh)
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    trainable_at, frozen_at = optim.split(shardings, config.trainable, config.frozen)
    trainable = jax.device_put(optim.cast_floating(trainable, jnp.float32), trainable_at)
    frozen = jax.device_put(optim.cast_floating(frozen, jnp.dtype(config.frozen_dtype)), frozen_at)
    return trainable, frozen


def count(params: Any) -> int:
    """Number of scalars in a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def parameter_table(trainable: Any, frozen: Any) -> str:
    """Parameters per module, trained and frozen, as text."""
    groups: dict[str, list[int]] = {}
    for column, tree in enumerate((trainable, frozen)):
        for path, leaf in traverse_util.flatten_dict(tree, sep="/").items():
            name = "lora" if "/lora_" in path else path.split("/")[0]
            groups.setdefault(name, [0, 0])[column] += int(np.prod(leaf.shape))
    total = [sum(g[column] for g in groups.values()) for column in (0, 1)]
    rows = [f"{name:<14}{a:>15,}{b:>15,}" for name, (a, b) in [*groups.items(), ("total", total)]]
    share = total[0] / max(1, sum(total))
    return "\n".join([f"{'module':<14}{'trainable':>15}{'frozen':>15}", *rows, f"trainable share {share:.2%}"])


def save_description(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """config.json and tokenizer.json: with the checkpoints, all that evaluate and predict need."""
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    tokenizer.save(workdir)


def load_config(path: str | Path) -> ConfigDict:
    """The config that a run or a packed model was made with."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(str(path), "--checkpoint", "has no config.json", "give a --workdir of train or a packed model")
    try:
        return ConfigDict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(str(file), "", f"not valid JSON ({error.msg})", "copy the file again") from error


def load_model(path: str | Path) -> tuple[Crab, Any, ConfigDict, Tokenizer]:
    """(model, parameters, config, tokenizer) of a run or a packed model. Raises InputError if they disagree."""
    config = load_config(path)
    model = Crab(model_config(config))
    params = load_params(path)
    check_match(nn.unbox(abstract_params(model)), params, str(path))
    return model, jax.tree.map(jnp.asarray, params), config, Tokenizer.load(path)


def eval_batches(examples: list[Example], root: str | Path, config: ConfigDict, tokenizer: Tokenizer, batch_size: int,
                 **changes: Any) -> Iterator[tuple[Bucket, Batch]]:
    """Prompt-only batches of `examples`, every example once; filler rows have index -1."""
    cfg = data_config(config, prompt_only=True, **changes)
    return mixture.eval_batches(examples, root, tokenizer, cfg, batch_size)
