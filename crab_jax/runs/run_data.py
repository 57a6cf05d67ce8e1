"""The data of a run: the Examples it trains on, their order, and checks that a resumed run has the same data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crab_jax.checkpoints.run_steps import RunCheckpoints
from crab_jax.config import RunConfig
from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import json_object, write_whole
from crab_jax.parallel import distributed
from crab_jax.runs.run_folder import log
from data_pipelines import datasets, decoded, fbank, index, mixture, shards
from data_pipelines.batching import Batch, Bucket
from data_pipelines.examples import Example, learned, seg_source
from data_pipelines.index import TENTH, Indexed
from data_pipelines.mistakes import TrainingLabels
from data_pipelines.several import OneRoot, Several, by_root
from data_pipelines.tokens import Tokenizer

TENTHS = fbank.WINDOW_COUNT["ten"]  # number of values of `second` in a video
LONG = 30.0  # seconds of reading annotations after which a run names the index
LEFT_OUT = "left_out.jsonl"  # file of a workdir: rows and Examples that data.on_error=skip leaves out before the start


def read_examples(root: str | Path, split: str, **options: Any) -> list[Example]:
    """Return the Examples of one split of a data root; `options` are those of `datasets.read_examples`."""
    if not root:
        raise InputError("--config", "data.root", "is not set", "give --config.data.root=DIR")
    return datasets.read_examples(root, split, **options)


def train_examples(config: RunConfig, skipped: Path | None = None) -> Sequence[Example]:
    """Return the Examples that a run may draw, `Several` for several data roots; of the index of a root that has one.

    skipped: Examples left out by data.on_error=skip are listed in LEFT_OUT beside this file.
    """
    chosen = config.mixture
    left_out: list[datasets.LeftOut] = []
    parts, room = [], chosen.limit or sys.maxsize
    for root in chosen.places:
        examples = examples_of_root(config, root, left_out)
        examples = examples if len(examples) <= room else examples[:room]
        parts.append(OneRoot(root, examples, own_frames(root) if chosen.places[1:] else 0))
        room -= len(examples)
    if skipped and left_out and not jax.process_index():
        list_left_out(skipped.with_name(LEFT_OUT), left_out)
    return Several(parts) if parts[1:] else parts[0].examples


def examples_of_root(config: RunConfig, root: str, left_out: list[datasets.LeftOut]) -> Sequence[Example]:
    """Return the Examples of one data root that a run may draw; `left_out` collects the rows that are not read."""
    chosen = config.mixture
    wanted = index.Wanted(chosen.split, chosen.datasets, chosen.variant, chosen.frames, config.data.on_error)
    began = time.monotonic()
    examples = index.read(root, wanted, left_out)
    if (seconds := time.monotonic() - began) > LONG and not isinstance(examples, Indexed):
        distributed.say(
            f"reading the annotations took {seconds:.0f} s, which `python -m data_pipelines index --root {root}` "
            "saves at every later start"
        )
    examples, leaking = index.without_leaks(examples, chosen.places, chosen.split, chosen.exclude_leaks)
    if leaking:
        log.warning("%s", leaking)
    if isinstance(examples, Indexed):
        task_of, tasks = examples.tasks()
        return examples.take(np.array([chosen.weights[task] > 0 for task in tasks])[task_of])
    return [example for example in examples if chosen.weights[example.task] > 0]


def own_frames(root: str | Path) -> int:
    """Return the number of frames of a video in a prepared root; 0 for a raw root, which is read with any number."""
    prepared = shards.opened(root)
    return prepared.decoding.video_frames if prepared else 0


def train_order(
    config: RunConfig, tokenizer: Tokenizer, skipped: Path | None = None, examples: Sequence[Example] | None = None
) -> mixture.TrainOrder:
    """Return the order of the run's Examples in batches, with the share of each task as configured.

    examples: the result of `train_examples`, where it is known already. Raises InputError.
    """
    drawn = config.mixture
    examples = train_examples(config, skipped) if examples is None else examples
    if drawn.batch_size > len(examples):
        log.warning("a batch of %d holds examples several times: there are %d", drawn.batch_size, len(examples))
    counts: Counter[str] = Counter()
    for part in by_root(examples):
        check_tenths(part.frames or config.data.video_frames, part.examples)
        counts += first_epoch(part.examples, config.seed)
    # A cap limits a task's share, not its examples: those left over in one epoch come in the next.
    weights = {task: min(n, drawn.caps[task] or n) * drawn.weights[task] for task, n in counts.items()}
    labels = [TrainingLabels(root, drawn.split) for root in drawn.places]
    order = mixture.train_order(
        examples,
        tokenizer,
        config.data,
        drawn.batch_size,
        config.seed,
        weights,
        skipped,
        drawn.curriculum,
        [of_root.check for of_root in labels],
    )
    for part, of_root in zip(by_root(examples), labels, strict=True):
        if isinstance(part.examples, Indexed):
            of_root.odd, of_root.first_odd = part.examples.odd()
        of_root.warn()
    return order


def first_epoch(examples: Sequence[Example], seed: int) -> Counter[str]:
    """Return the number of Examples of each task in the first epoch."""
    if isinstance(examples, Indexed):
        return examples.counts(seed)
    return Counter(example.task for example in datasets.one_frame_each(examples, seed, epoch=0))


def check_tenths(frames: int, examples: Sequence[Example]) -> None:
    """Raise InputError where a mask belongs to a tenth of a video and a run reads another number of `frames`."""
    if frames == TENTHS:
        return
    if isinstance(examples, Indexed):
        examples = examples.take(examples.has(TENTH))[:1]
    for example in examples:
        if example.mask_kind != "none" and seg_source(example) == ("video", example.video):
            raise InputError(
                "--config",
                "data.video_frames",
                f"is {frames}, but example {example.id!r} has the mask of a tenth of its video",
                f"use {TENTHS}, or give the pictures in 'seg_image'",
            )


def data_identity(config: RunConfig, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the identity of a run's data, as kept in its checkpoints' manifest.json.

    It has the number of Examples, their hash, and the hash of the media of a prepared root.
    """
    digests, media = [], []
    for root, part in zip(config.mixture.places, by_root(examples), strict=True):
        found = part.examples
        digests.append(found.learned() if isinstance(found, Indexed) else learned(found))
        media.append(media_identity(root, config.mixture.split, part.examples))
    prepared = {"prepared": _together(media)} if any(media) else {}
    return {"count": len(examples), "examples": _together(digests), **prepared}


def _together(digests: Sequence[str]) -> str:
    """Return one hash for those of several data roots; that of a single root itself."""
    return digests[0] if len(digests) == 1 else hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def media_identity(root: str | Path, split: str, examples: Sequence[Example]) -> str:
    """Return a hash of the media that these Examples of a split have in a prepared root; "" for a raw root."""
    if not (prepared := shards.opened(root)):
        return ""
    if split in prepared.manifest["lists"]:
        return prepared.digest({""}, split)
    names = examples.datasets() if isinstance(examples, Indexed) else {e.meta["dataset"] for e in examples}
    return prepared.digest(names, split)


def check_data(checkpoints: RunCheckpoints, identity: dict[str, Any], config: RunConfig) -> None:
    """Raise InputError if a resumed run has other data than before, unless `data.allow_other`.

    The manifest is updated, also for a run that is older than the record or that moved from a raw to a prepared root.
    """
    manifest, root = checkpoints.manifest, " and ".join(config.mixture.places)
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
        order, config.mixture.places[0], tokenizer, config.data, rows, start, config.mixture.workers, skipped
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
    if not given and len(config.mixture.roots) > 1:
        roots = " and ".join(config.mixture.roots)
        raise InputError("--data", "", f"is not given, and the checkpoint was trained on {roots}", "give one of them")
    root = given or next(iter(config.mixture.roots), config.mixture.root)
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
