"""A run on disk and what it is made of: workdir, tokenizer, data, starting parameters, a loaded model."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax import optim, packaged, sharding
from crab_jax.bounds import Anything, Choice, Text
from crab_jax.checkpoints import RunCheckpoints, check_match, identity, stored_params
from crab_jax.compat import PRESETS
from crab_jax.config import RunConfig, bound_of, built, leaves
from crab_jax.defaults import base
from crab_jax.errors import InputError
from crab_jax.files import json_object, out_folder, write_whole
from crab_jax.models.crab import Crab, fuse_model, init_params
from crab_jax.models.presets import MODELS
from crab_jax.structured import Each, read_json
from data_pipelines import datasets, decoded, fbank, leaks, mixture, shards
from data_pipelines.batching import Batch, Bucket, empty_batch
from data_pipelines.examples import Example, learned, seg_source
from data_pipelines.mistakes import TrainingLabels
from data_pipelines.tokens import Tokenizer

# A resumed run may change these without becoming another run.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep",
    "watchdog_seconds",
    "max_skipped",
    "data.workers",
    "data.root",
    "data.cache_dir",
    "data.allow_other",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)
# The processes of one run may have these each of its own: where its host has the data, and how it reads them.
OWN_KEYS = ("data.root", "data.cache_dir", "data.workers", "watchdog_seconds", "init_from", "tokenizer")

_SECTION = Each(Text(1, 100), Anything())
RUN_CONFIG = {
    "model": Choice(tuple(MODELS)),
    "compat": Choice(tuple(PRESETS)),
    "sizes?": Each(Text(1, 100), _SECTION),
    **{f"{section}?": _SECTION for section in ("data", "optim", "loss", "mesh")},
}
# What of a config decides the arrays of a run that is there; the bounds of its other keys may be younger than the run.
_DECIDING = re.compile(
    r"frozen_dtype|trainable|frozen|(sizes|mesh)\..*|"
    r"data\.(video_frames|lengths|pad_short_audio|blank_video|mute_audio|root|cache_dir|workers)"
)
TENTHS = fbank.WINDOW_COUNT["ten"]  # `second` of a video
LEFT_OUT = "left_out.jsonl"  # of a workdir: rows and Examples that data.on_error=skip leaves out before the start
_log = logging.getLogger(__name__)


def shared(config: RunConfig) -> dict[str, Any]:
    """What all processes of one run must have alike of its config; of `init_from` the checkpoint, not its path."""
    ours = {f"config.{key}": value for key, value in config.flat().items() if key not in OWN_KEYS}
    return ours | {"config.init_from": config.init_from and f"a checkpoint with hash {identity(config.init_from)}"}


def claim_workdir(workdir: Path, config: RunConfig) -> None:
    """Make the workdir, or check that the run it holds has this config. Raises InputError.

    A key that is younger than the run counts as having had its default.
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
    """The tokenizer of a run config."""
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


def read_examples(root: str | Path, split: str, **options: Any) -> list[Example]:
    """The Examples of one split of a data root; `options` are those of `datasets.read_examples`."""
    if not root:
        raise InputError("--config", "data.root", "is not set", "give --config.data.root=DIR")
    return datasets.read_examples(root, split, **options)


def train_examples(config: RunConfig, skipped: Path | None = None) -> list[Example]:
    """The Examples that a run may draw; what data.on_error=skip leaves out is listed beside `skipped`."""
    wanted = config.mixture
    left: list[datasets.LeftOut] = []
    found = read_examples(
        wanted.root,
        wanted.split,
        datasets=wanted.datasets,
        variant=wanted.variant,
        frames=wanted.frames,
        missing=config.data.on_error,
        malformed=config.data.on_error,
        left=left,
        epoch=None,
    )
    if skipped and left and not jax.process_index():
        list_left_out(skipped.with_name(LEFT_OUT), left)
    found, leaking = leaks.without(found, wanted.root, wanted.split, wanted.exclude_leaks)
    if leaking:
        _log.warning("%s", leaking)
    examples = [example for example in found if wanted.weights[example.task] > 0]
    return examples[: wanted.limit] if wanted.limit else examples


def train_order(
    config: RunConfig, tokenizer: Tokenizer, skipped: Path | None = None, examples: list[Example] | None = None
) -> mixture.TrainOrder:
    """What every batch of the run holds, with the share of each task as configured; `examples`, where they are read
    already, are those of `train_examples`."""
    drawn, frames = config.mixture, config.data.video_frames
    examples = train_examples(config, skipped) if examples is None else examples
    if frames != TENTHS:
        for example in examples:  # whose mask is that of a tenth
            if example.mask_kind != "none" and seg_source(example) == ("video", example.video):
                raise InputError(
                    "--config",
                    "data.video_frames",
                    f"is {frames}, but example {example.id!r} has the mask of a tenth of its video",
                    f"use {TENTHS}, or give the pictures in 'seg_image'",
                )
    if drawn.batch_size > len(examples):
        _log.warning("a batch of %d holds examples several times: there are %d", drawn.batch_size, len(examples))
    counts = Counter(e.task for e in datasets.one_frame_each(examples, config.seed, epoch=0))
    # A cap limits a task's share, not its examples: those that an epoch leaves over come in the next.
    weights = {task: min(n, drawn.caps[task] or n) * drawn.weights[task] for task, n in counts.items()}
    labels = TrainingLabels(drawn.root, drawn.split)
    order = mixture.train_order(
        examples,
        tokenizer,
        config.data,
        drawn.batch_size,
        config.seed,
        weights,
        skipped,
        drawn.curriculum,
        labels.check,
    )
    labels.warn()
    return order


def data_identity(config: RunConfig, examples: list[Example]) -> dict[str, Any]:
    """What a run is trained on, as its checkpoints' manifest.json holds it: how many Examples, their hash, and that of
    the media of a prepared root."""
    media = media_identity(config.mixture.root, config.mixture.split, examples)
    return {"count": len(examples), "examples": learned(examples), **({"prepared": media} if media else {})}


def media_identity(root: str | Path, split: str, examples: Sequence[Example]) -> str:
    """A hash of the media of a prepared root that these Examples of a split have; "" for a raw one."""
    if not (prepared := shards.opened(root)):
        return ""
    listed = split in prepared.manifest["lists"]
    return prepared.digest({""} if listed else {e.meta["dataset"] for e in examples}, split)


def check_data(checkpoints: RunCheckpoints, identity: dict[str, Any], config: RunConfig) -> None:
    """Whether a run goes on with what it was trained on. Raises InputError unless `data.allow_other`.

    The manifest then says so, also of a run that is older than the note or changed from a raw to a prepared root.
    """
    manifest, root = checkpoints.manifest, str(config.mixture.root)
    old = manifest.get("data", {})
    if not old:
        print(
            f"warning: {checkpoints.folder}/manifest.json does not say what this run was trained on, for it is "
            f"older; the Examples of {root} are taken to be it",
            file=sys.stderr,
        )
    others = [
        problem
        for field, problem in (
            (
                "examples",
                f"holds other Examples than this run was trained on ({identity['count']} now, {old.get('count')} then)",
            ),
            ("prepared", "was prepared anew since this run was trained on it"),
        )
        if field in old and field in identity and old[field] != identity[field]
    ]
    if others and not config.mixture.allow_other:
        raise InputError(
            root,
            "data.root",
            others[0],
            "give the data that it was trained on, or --config.data.allow_other=true to go on with this",
        )
    for problem in others:
        print(f"warning: {root} {problem}; it goes on with this", file=sys.stderr)
    if others:
        for file in checkpoints.folder.parent.glob("skipped.*.jsonl"):  # positions in the list of before
            file.rename(f"{file}.before")
    now = identity if others else old | identity
    if now != old:
        checkpoints.note(manifest | {"data": now})


def train_dataset(
    config: RunConfig,
    tokenizer: Tokenizer,
    order: mixture.TrainOrder,
    rows: Any = slice(None),
    start: int = 0,
    skipped: Path | None = None,
) -> Any:
    """Grain dataset of the run's batches from number `start` on; `rows` of each (see data_pipelines/mixture.py)."""
    return mixture.train_dataset(
        order, config.mixture.root, tokenizer, config.data, rows, start, config.mixture.workers, skipped
    )


def list_left_out(file: Path, left: list[datasets.LeftOut]) -> None:
    """Write what the annotations have that is not read, one JSON object a line."""
    write_whole(
        file,
        "".join(
            json.dumps(
                {
                    "dataset": dataset,
                    "split": split,
                    "where": error.where,
                    "field": error.field,
                    "problem": error.problem,
                }
            )
            + "\n"
            for dataset, split, error in left
        ),
    )
    _log.warning("all %d that are left out are listed in %s", len(left), file)


def skipped_file(workdir: Path) -> Path:
    """Where this process and its workers list the examples that they skip."""
    return workdir / f"skipped.{jax.process_index()}.jsonl"


def skipped_examples(workdir: Path) -> dict[int, dict[str, Any]]:
    """Position -> {"index", "id", "task", "error"} of every example that any process or worker of a run skipped."""
    lines = [line for file in sorted(workdir.glob("skipped.*.jsonl")) for line in file.read_bytes().split(b"\n")]
    records = [record for line in lines if (record := json_object(line)) is not None]
    return {record["index"]: record for record in records if isinstance(record.get("index"), int)}


def init_batch(model: Crab) -> Batch:
    """One filler row that reaches every module: a frame, an audio window and a mask group."""
    return empty_batch(Bucket(length=8, frames=1, windows=1, fbank_frames=98, masks=1), 1, model.cfg.clip.image_size)


@functools.lru_cache(maxsize=8)
def abstract_params(model: Crab) -> Any:
    """Shapes of all parameters, boxed with their logical axes."""
    return jax.eval_shape(lambda rng: init_params(model, rng, init_batch(model)), jax.random.key(0))


def wanted_params(config: RunConfig, model: Crab, mesh: jax.sharding.Mesh) -> Any:
    """Every parameter of a run as a ShapeDtypeStruct: trainables float32, the rest in the frozen dtype, with shardings.

    Raises InputError when the trainable and frozen patterns, or the mesh, do not divide the parameters.
    """
    boxed = abstract_params(model)
    trainable, frozen = optim.split(nn.unbox(boxed), config.trainable, config.frozen)
    shapes = optim.merge(_of_dtype(trainable, jnp.float32), _of_dtype(frozen, config.frozen_dtype))
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.param_shardings(boxed, mesh),
    )
    sharding.check_params(wanted, mesh)
    return wanted


def _of_dtype(shapes: Any, dtype: Any) -> Any:
    return jax.eval_shape(lambda tree: optim.cast_floating(tree, jnp.dtype(dtype)), shapes)


def initial_params(config: RunConfig, model: Crab, wanted: Any = None) -> Any:
    """Starting parameters: those of `init_from`, checked strictly; leaves named by `fresh` are newly drawn.

    With `wanted` (see `wanted_params`) every leaf is read or drawn straight into its shards and its dtype, so that no
    device and no host holds more than its part; without it the tree is whole on this host, in the stored dtypes.
    """
    shapes = traverse_util.flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    for pattern in config.fresh:
        if not any(re.fullmatch(pattern, path) for path in shapes):
            raise InputError(
                "--config",
                "fresh",
                f"{pattern!r} is no parameter of the model",
                "see the patterns of crab_jax/defaults.py",
            )
    stored = stored_params(config.init_from) if config.init_from else None
    found = traverse_util.flatten_dict(stored.shapes, sep="/") if stored else {}
    missing = sorted(
        path
        for path in shapes
        if path not in found and (not stored or any(re.fullmatch(p, path) for p in config.fresh))
    )
    nested = functools.partial(traverse_util.unflatten_dict, sep="/")
    if stored and (made := load_config(config.init_from).compat) != config.compat:
        print(
            f"warning: {config.init_from} was made with compat={made!r}, this run computes as {config.compat!r}: "
            f"--config.compat={made} goes on as it was",
            file=sys.stderr,
        )
    check_match(nested(shapes), nested(found | {path: shapes[path] for path in missing}), config.init_from)
    places = traverse_util.flatten_dict(wanted, sep="/") if wanted is not None else {}

    def draw(rng: jax.Array) -> dict[str, jax.Array]:
        # What is not missing is never computed.
        flat = traverse_util.flatten_dict(nn.unbox(init_params(model, rng, init_batch(model))), sep="/")
        return {path: flat[path].astype(places[path].dtype) if places else flat[path] for path in missing}

    where = {path: places[path].sharding for path in missing} if places else None
    drawn = jax.jit(draw, out_shardings=where)(jax.random.key(config.seed)) if missing else {}
    loaded = stored.load(nested({path: places[path] for path in found}) if places else None) if stored else {}
    return optim.merge(nested(drawn), loaded)


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


def save_description(workdir: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """config.json and tokenizer.json: with the checkpoints, all that evaluate and predict need."""
    write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=1))
    tokenizer.save(workdir)


def load_config(path: str | Path) -> RunConfig:
    """Return the config that a run or a packed model was made with; keys younger than it have their defaults.

    A value that is allowed no more and decides no array has its default, too, and a warning says so. Raises InputError
    naming the file and the key.
    """
    config, replaced = _stored_config(Path(path))
    for key, problem in replaced.items():
        print(
            f"warning: {Path(path) / 'config.json'}: {key} {problem}; it is left out, and decides no answer",
            file=sys.stderr,
        )
    return config


def _stored_config(path: Path) -> tuple[RunConfig, dict[str, str]]:
    """(the config of a run or model, what is wrong with the keys that have their defaults instead)."""
    path = packaged.located(path)
    file, fix = path / "config.json", "copy the file again"
    if not file.is_file():
        raise InputError(str(path), "--checkpoint", "has no config.json", "give a --workdir of train or a packed model")
    found, usual = traverse_util.flatten_dict(read_json(file, RUN_CONFIG), sep="."), dict(leaves(base()))
    for key in found.keys() - usual.keys():  # others are of another version
        if key.startswith("sizes.") or any(key.startswith(f"{known}.") for known in usual):
            raise InputError(str(file), key, "is no key of a config", fix)
    values, replaced = {key: found.get(key, value) for key, value in usual.items()}, {}
    for key, value in values.items():
        if key.startswith("sizes.") and value is None or not (problem := bound_of(key).problem(value)):
            continue
        if _DECIDING.fullmatch(key):
            raise InputError(str(file), key, f"is {value!r:.60}", problem)
        values[key], replaced[key] = usual[key], f"is {value!r:.60} and {problem}"
    try:
        return built(values), replaced
    except InputError as error:
        raise InputError(str(file), error.field, error.problem, error.fix) from None


def load_model(
    path: str | Path, weights: str = "", mesh: jax.sharding.Mesh | None = None
) -> tuple[Crab, Any, RunConfig, Tokenizer]:
    """(model, parameters, config, tokenizer) of a run or a packed model. Raises InputError if they disagree.

    With `weights` (one of `fused.KINDS`) the model is laid out for generation and does nothing else. On a `mesh` (see
    `layout.serving_mesh`) every copy has it so, or, where a copy is split, lies as in training; without one all is on
    the first device.
    """
    config = load_config(path)
    model, stored = Crab(config.model), stored_params(path)
    check_match(nn.unbox(abstract_params(model)), stored.shapes, str(path))
    if mesh is not None and mesh.shape["tensor"] > 1:
        return model, stored.load(wanted_params(config, model, mesh)), config, Tokenizer.load(path)
    params, where = stored.load(), sharding.replicated(mesh) if mesh is not None else None
    if weights:
        model, params = fuse_model(model, params, weights, where)
    return model, jax.device_put(params, where), config, Tokenizer.load(path)


def data_root(given: str, config: RunConfig) -> Path:
    """--data, or the root that the checkpoint was trained on where that is here. Raises InputError."""
    root = given or config.mixture.root
    if not root or not (given or Path(root).is_dir()):
        where = f"on {root}, which is no folder here" if root else "without one"
        raise InputError("--data", "", f"is not given, and the checkpoint was trained {where}", "give --data=DIR")
    return Path(root)


def eval_batches(
    examples: list[Example],
    root: decoded.Root,
    config: RunConfig,
    tokenizer: Tokenizer,
    batch_size: int,
    **changes: Any,
) -> Iterator[tuple[Bucket, Batch]]:
    """Prompt-only batches of `examples`, every example once; filler rows have index -1.

    The cache of the machine that trained is no cache here: `cache_dir` is "" unless `changes` has it.
    """
    decoding = dataclasses.replace(config.data, **{"cache_dir": "", **changes})
    return mixture.eval_batches(examples, root, tokenizer, decoding, batch_size)
