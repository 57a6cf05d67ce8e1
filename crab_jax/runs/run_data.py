"""The data of a run: which Examples it trains on, in which order, and whether they are still the same."""

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
from crab_jax.io.errors import InputError
from crab_jax.io.files import json_object, write_whole
from crab_jax.runs.run_folder import log
from data_pipelines import datasets, decoded, fbank, leaks, mixture, shards
from data_pipelines.batching import Batch, Bucket
from data_pipelines.examples import Example, learned, seg_source
from data_pipelines.mistakes import TrainingLabels
from data_pipelines.tokens import Tokenizer

TENTHS = fbank.WINDOW_COUNT["ten"]  # `second` of a video
LEFT_OUT = "left_out.jsonl"  # of a workdir: rows and Examples that data.on_error=skip leaves out before the start


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
        log.warning("%s", leaking)
    examples = [example for example in found if wanted.weights[example.task] > 0]
    return examples[: wanted.limit] if wanted.limit else examples


def train_order(
    config: RunConfig, tokenizer: Tokenizer, skipped: Path | None = None, examples: list[Example] | None = None
) -> mixture.TrainOrder:
    """What every batch of the run holds, with the share of each task as configured; `examples`, where they are read
    already, are those of `train_examples`."""
    drawn = config.mixture
    examples = train_examples(config, skipped) if examples is None else examples
    check_tenths(config.data.video_frames, examples)
    if drawn.batch_size > len(examples):
        log.warning("a batch of %d holds examples several times: there are %d", drawn.batch_size, len(examples))
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


def check_tenths(frames: int, examples: Sequence[Example]) -> None:
    """Raise InputError where a mask is that of a tenth of its video, of which a run takes another number of frames."""
    for example in examples if frames != TENTHS else ():
        if example.mask_kind != "none" and seg_source(example) == ("video", example.video):
            raise InputError(
                "--config",
                "data.video_frames",
                f"is {frames}, but example {example.id!r} has the mask of a tenth of its video",
                f"use {TENTHS}, or give the pictures in 'seg_image'",
            )


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
    log.warning("all %d that are left out are listed in %s", len(left), file)


def skipped_file(workdir: Path) -> Path:
    """Where this process and its workers list the examples that they skip."""
    return workdir / f"skipped.{jax.process_index()}.jsonl"


def skipped_examples(workdir: Path) -> dict[int, dict[str, Any]]:
    """Position -> {"index", "id", "task", "error"} of every example that any process or worker of a run skipped."""
    lines = [line for file in sorted(workdir.glob("skipped.*.jsonl")) for line in file.read_bytes().split(b"\n")]
    records = [record for line in lines if (record := json_object(line)) is not None]
    return {record["index"]: record for record in records if isinstance(record.get("index"), int)}


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
