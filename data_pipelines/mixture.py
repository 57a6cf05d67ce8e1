"""From lists of Examples to batches: a resumable training mixture (Grain) and evaluation batches."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from crab_jax.errors import InputError
from data_pipelines.batching import Batch, Bucket, DataConfig, bucket_for, collate, load
from data_pipelines.examples import Example
from data_pipelines.tokens import Tokenizer

_log = logging.getLogger(__name__)


def group_by_bucket(examples: Sequence[Example], tokenizer: Tokenizer, config: DataConfig) -> dict[Bucket, list[int]]:
    """Positions of the examples of each bucket, buckets in increasing order.

    With `on_error="skip"` an example that fits no bucket is left out with a warning. Raises InputError otherwise, and
    when nothing is left.
    """
    groups: dict[Bucket, list[int]] = collections.defaultdict(list)
    for index, example in enumerate(examples):
        try:
            groups[bucket_for(example, tokenizer, config)].append(index)
        except InputError as error:
            if config.on_error == "raise":
                raise
            _log.warning("left out example %s: %s", example.id, error)
    if not groups:
        raise InputError("data", "examples", "there is none", "check the split, the weights and the warnings above")
    return dict(sorted(groups.items()))


class BatchLoader:
    """Positions of one global batch -> Batch of this process's share of its rows.

    With `on_error="skip"` an example that cannot be loaded is replaced by the next one of its bucket that can: the same
    one in every epoch, process and worker. `bad` counts and lists what was replaced in this process: position -> error.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        groups: Mapping[Bucket, Sequence[int]],
        root: str | Path,
        tokenizer: Tokenizer,
        config: DataConfig,
        rows: slice = slice(None),
    ):
        self.examples, self.root, self.tokenizer, self.config, self.rows = examples, root, tokenizer, config, rows
        self.bad: dict[int, str] = {}
        rings = [(group, [*group[1:], group[0]]) for group in groups.values()]
        self.following = {index: after for group, shifted in rings for index, after in zip(group, shifted, strict=True)}

    def __call__(self, indices: np.ndarray) -> Batch:
        return collate([self.row(int(index)) for index in indices[self.rows]])

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The loaded example `index`, or its replacement."""
        chosen = index
        while (arrays := self.try_row(chosen)) is None:
            chosen = self.following[chosen]
            if chosen == index:
                problem = f"no example of its bucket can be loaded, nor it: {self.bad[index]}"
                raise InputError(f"example {self.examples[index].id}", "", problem, "check the media files")
        return arrays

    def try_row(self, index: int) -> dict[str, np.ndarray] | None:
        """The loaded example `index`; None, after one warning, when it is bad and bad ones are skipped."""
        if index in self.bad:
            return None
        try:
            return load(self.examples[index], self.root, self.tokenizer, self.config, index)
        except InputError as error:
            if self.config.on_error == "raise":
                raise
            self.bad[index] = str(error)
            _log.warning("skipped example %s (%d so far): %s", self.examples[index].id, len(self.bad), error)
            return None


def _rates(examples: Sequence[Example], kept: Sequence[int], weights: Mapping[str, float] | None) -> list[float]:
    """How often each kept example is drawn, relative to the others."""
    if weights is None:
        return [1.0] * len(kept)
    counts = collections.Counter(examples[index].task for index in kept)
    for task in counts:
        if not weights.get(task, 0) > 0:
            problem = f"is {weights.get(task)} for {task!r}, which has {counts[task]} examples"
            raise InputError("config", "weights", problem, "give a positive weight, or leave the examples out")
    # Rounded, so that equal rates are equal floats and their examples share one stream.
    rates = {task: float(f"{weights[task] / count:.9g}") for task, count in counts.items()}
    return [rates[examples[index].task] for index in kept]


def _mix(parts: Sequence[tuple[grain.MapDataset, float]]) -> grain.MapDataset:
    """Interleave datasets in fixed proportions."""
    if len(parts) == 1:
        return parts[0][0]
    smallest = min(share for _, share in parts)
    # Hundredths of the smallest share: Grain's own conversion to integers truncates, so 1.9999 would become 1.99.
    weights = [round(100 * share / smallest) for _, share in parts]
    return grain.MapDataset.mix([part for part, _ in parts], weights=weights)


def train_dataset(
    examples: Sequence[Example],
    root: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    read_options: grain.ReadOptions | None = None,
) -> grain.IterDataset:
    """Endless IterDataset of Batch, every batch from one bucket.

    batch_size: rows of a global batch; process `process_index` of `process_count` loads its contiguous share of them,
        so the order of the examples does not depend on the number of processes.
    weights: task -> share of the samples (any scale); None draws every example equally often. Examples of one bucket
        that are drawn equally often form one stream, shuffled anew every epoch, in which each comes once per epoch.
    workers: processes that decode, 0 = threads of this one. Workers are spawned, so a script that uses them needs
        `if __name__ == "__main__"`.

    The iterator's get_state / set_state continue it exactly. Errors of a worker reach the caller as InputError.
    """
    if batch_size % process_count:
        problem = f"{batch_size} rows do not split over {process_count} processes"
        raise InputError("config", "batch_size", problem, "give a multiple of the number of processes")
    groups = group_by_bucket(examples, tokenizer, config)
    kept = [index for group in groups.values() for index in group]
    rate_of = dict(zip(kept, _rates(examples, kept, weights), strict=True))

    buckets, streams = [], 0
    for group in groups.values():
        by_rate: dict[float, list[int]] = collections.defaultdict(list)
        for index in group:
            by_rate[rate_of[index]].append(index)
        parts = []
        for rate, members in sorted(by_rate.items()):
            stream = grain.MapDataset.source(members).seed(seed + streams).shuffle().repeat()
            parts.append((stream, rate * len(members)))
            streams += 1
        share = sum(part for _, part in parts)
        buckets.append((_mix(parts).batch(batch_size, drop_remainder=True), share))

    rows = batch_size // process_count
    own = slice(process_index * rows, (process_index + 1) * rows)
    batches = _mix(buckets).map(BatchLoader(examples, groups, root, tokenizer, config, own))
    # A buffered element is a whole batch, so the buffers are kept short.
    dataset = batches.to_iter_dataset(read_options or grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own absl flags, in programs that parse none as well
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return dataset


def eval_batches(
    examples: Sequence[Example],
    root: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    threads: int = 4,
) -> Iterator[tuple[Bucket, Batch]]:
    """Prompt-only batches of every example once, bucket by bucket, decoded ahead by threads.

    The last batch of a bucket is filled with copies of its first row whose index is -1. With `on_error="skip"` a bad
    example is left out with a warning; otherwise it raises InputError.
    """
    config = dataclasses.replace(config, prompt_only=True)
    groups = group_by_bucket(examples, tokenizer, config)
    loader = BatchLoader(examples, groups, root, tokenizer, config)
    chunks = [
        (bucket, group[start : start + batch_size])
        for bucket, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    pending: collections.deque = collections.deque()
    try:
        while chunks or pending:
            while chunks and len(pending) < 2:
                bucket, chunk = chunks.pop(0)
                pending.append((bucket, [pool.submit(loader.try_row, index) for index in chunk]))
            bucket, futures = pending.popleft()
            rows = [row for future in futures if (row := future.result()) is not None]
            if rows:
                filler = {**rows[0], "index": np.array(-1, np.int32)}
                yield bucket, collate(rows + [filler] * (batch_size - len(rows)))
    finally:
        pool.shutdown(cancel_futures=True)
