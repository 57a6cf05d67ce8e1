"""The data of a run: the Examples it trains on, their order, and checks that a resumed run has the same data."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from crab_jax.checkpoints.run_steps import RunCheckpoints
from crab_jax.config import RunConfig
from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import json_object, write_whole
from crab_jax.runs.run_folder import log
from data_pipelines import datasets, decoded, fbank, leaks, mixture, shards
from data_pipelines.batching import Batch, Bucket
from data_pipelines.examples import Example, learned, seg_source
from data_pipelines.mistakes import TrainingLabels
from data_pipelines.tokens import Tokenizer

TENTHS = fbank.WINDOW_COUNT["ten"]  # number of values of `second` in a video
LEFT_OUT = "left_out.jsonl"  # file of a workdir: rows and Examples that data.on_error=skip leaves out before the start


def read_examples(root: str | Path, split: str, **options: Any) -> list[Example]:
    """Return the Examples of one split of a data root; `options` are those of `datasets.read_examples`."""
    if not root:
        raise InputError("--config", "data.root", "is not set", "give --config.data.root=DIR")
    return datasets.read_examples(root, split, **options)


def train_examples(config: RunConfig, skipped: Path | None = None) -> list[Example]:
    """Return the Examples that a run may draw.

    skipped: Examples left out by data.on_error=skip are listed in LEFT_OUT beside this file.
    """
    chosen = config.mixture
    left_out: list[datasets.LeftOut] = []
    examples = read_examples(
        chosen.root,
        chosen.split,
        datasets=chosen.datasets,
        variant=chosen.variant,
        frames=chosen.frames,
        missing=config.data.on_error,
        malformed=config.data.on_error,
        left=left_out,
        epoch=None,
    )
    if skipped and left_out and not jax.process_index():
        list_left_out(skipped.with_name(LEFT_OUT), left_out)
    examples, leaking = leaks.without(examples, chosen.root, chosen.split, chosen.exclude_leaks)
    if leaking:
        log.warning("%s", leaking)
    examples = [example for example in examples if chosen.weights[example.task] > 0]
    return examples[: chosen.limit] if chosen.limit else examples


def train_order(
    config: RunConfig, tokenizer: Tokenizer, skipped: Path | None = None, examples: list[Example] | None = None
) -> mixture.TrainOrder:
    """Return the order of the run's Examples in batches, with the share of each task as configured.

    examples: the result of `train_examples`, where it is known already. Raises InputError.
    """
    drawn = config.mixture
    examples = train_examples(config, skipped) if examples is None else examples
    check_tenths(config.data.video_frames, examples)
    if drawn.batch_size > len(examples):
        log.warning("a batch of %d holds examples several times: there are %d", drawn.batch_size, len(examples))
    counts = Counter(e.task for e in datasets.one_frame_each(examples, config.seed, epoch=0))
    # A cap limits a task's share, not its examples: those left over in one epoch come in the next.
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


def check_tenths(frames: int, examples: Sequence[Example]) -> None:
    """Raise InputError where a mask belongs to a tenth of a video and a run reads another number of `frames`."""
    for example in examples if frames != TENTHS else ():
        if example.mask_kind != "none" and seg_source(example) == ("video", example.video):
            raise InputError(
                "--config",
                "data.video_frames",
                f"is {frames}, but example {example.id!r} has the mask of a tenth of its video",
                f"use {TENTHS}, or give the pictures in 'seg_image'",
            )


def data_identity(config: RunConfig, examples: list[Example]) -> dict[str, Any]:
    """Return the identity of a run's data, as kept in its checkpoints' manifest.json.

    It has the number of Examples, their hash, and the hash of the media of a prepared root.
    """
    media = media_identity(config.mixture.root, config.mixture.split, examples)
    return {"count": len(examples), "examples": learned(examples), **({"prepared": media} if media else {})}


def media_identity(root: str | Path, split: str, examples: Sequence[Example]) -> str:
    """Return a hash of the media that these Examples of a split have in a prepared root; "" for a raw root."""
    if not (prepared := shards.opened(root)):
        return ""
    listed = split in prepared.manifest["lists"]
    return prepared.digest({""} if listed else {e.meta["dataset"] for e in examples}, split)


def check_data(checkpoints: RunCheckpoints, identity: dict[str, Any], config: RunConfig) -> None:
    """Raise InputError if a resumed run has other data than before, unless `data.allow_other`.

    The manifest is updated, also for a run that is older than the record or that moved from a raw to a prepared root.
    """
    manifest, root = checkpoints.manifest, str(config.mixture.root)
    old = manifest.get("data", {})
    if not old:
        print(
            f"warning: {checkpoints.folder}/manifest.json is of an older version and does not record the data of "
            f"this run; the Examples of {root} are taken to be the same",
            file=sys.stderr,
        )
    differences = [
        problem
        for field, problem in (
            (
                "examples",
                f"holds other Examples than this run was trained on ({identity['count']} now, {old.get('count')} then)",
            ),
            ("prepared", "was prepared again since this run was trained on it"),
        )
        if field in old and field in identity and old[field] != identity[field]
    ]
    if differences and not config.mixture.allow_other:
        raise InputError(
            root,
            "data.root",
            differences[0],
            "give the data that it was trained on, or --config.data.allow_other=true to go on with this",
        )
    for problem in differences:
        print(f"warning: {root} {problem}; the run goes on with it", file=sys.stderr)
    if differences:
        for file in checkpoints.folder.parent.glob("skipped.*.jsonl"):  # they hold positions in the former list
            write_whole(f"{file}.before", file.read_bytes())
            file.unlink()
    now = identity if differences else old | identity
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
    """Return the Grain dataset of the run's batches from number `start` on.

    rows: which rows of each batch to load (see data_pipelines/mixture.py).
    """
    return mixture.train_dataset(
        order, config.mixture.root, tokenizer, config.data, rows, start, config.mixture.workers, skipped
    )


def list_left_out(file: Path, left: list[datasets.LeftOut]) -> None:
    """Write the annotations that are left out, one JSON object per line."""
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
    log.warning("all %d annotations that are left out are listed in %s", len(left), file)


def skipped_file(workdir: Path) -> Path:
    """Return the file in which this process and its workers list the examples that they skip."""
    return workdir / f"skipped.{jax.process_index()}.jsonl"


def skipped_examples(workdir: Path) -> dict[int, dict[str, Any]]:
    """Return {position: {"index", "id", "task", "error"}} of every example that any process of a run skipped."""
    lines = [line for file in sorted(workdir.glob("skipped.*.jsonl")) for line in file.read_bytes().split(b"\n")]
    records = [record for line in lines if (record := json_object(line)) is not None]
    return {record["index"]: record for record in records if isinstance(record.get("index"), int)}


def data_root(given: str, config: RunConfig) -> Path:
    """Return --data, or else the root that the checkpoint was trained on if it exists here. Raises InputError."""
    root = given or config.mixture.root
    if not root or not (given or paths.at(root).is_dir()):
        trained_on = f"on {root}, which is no folder here" if root else "without one"
        raise InputError("--data", "", f"is not given, and the checkpoint was trained {trained_on}", "give --data=DIR")
    return paths.at(root)


def eval_batches(
    examples: list[Example],
    root: decoded.Root,
    config: RunConfig,
    tokenizer: Tokenizer,
    batch_size: int,
    **changes: Any,
) -> Iterator[tuple[Bucket, Batch]]:
    """Yield prompt-only batches of `examples`, every example once; filler rows have index -1.

    The cache folder of training is not used: `cache_dir` is "" unless `changes` sets it.
    """
    decoding = dataclasses.replace(config.data, **{"cache_dir": "", **changes})
    return mixture.eval_batches(examples, root, tokenizer, decoding, batch_size)
