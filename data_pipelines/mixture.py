"""From lists of Examples to batches: a resumable training mixture (Grain) and evaluation batches."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from crab_jax.io.errors import InputError, printable
from crab_jax.io.files import append_line
from crab_jax.tasks import TASKS
from data_pipelines import decoded
from data_pipelines.batching import Batch, Bucket, DataConfig, Fill, collate, load, place
from data_pipelines.bucket_fill import Padding, padding
from data_pipelines.examples import Example, choice
from data_pipelines.isolated import end_with_parent
from data_pipelines.tokens import Tokenizer

_log = logging.getLogger(__name__)


def note_skipped(file: Path | None, index: int, example: Example, error: InputError) -> None:
    """Append one line to the list of skipped examples. Several workers share the file."""
    if file is not None:
        append_line(file, {"index": index, "id": example.id, "task": example.task, "error": str(error)})


def group_by_bucket(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: DataConfig,
    skipped: Path | None = None,
    check: Callable[[Example], None] = lambda example: None,
) -> dict[Bucket, dict[int, Fill]]:
    """Positions of the examples of each bucket and how much of it each fills, buckets in increasing order.

    With `on_error="skip"` an example that fits no bucket, or that `check` refuses, is left out with a warning, and a
    line in the file `skipped`. Raises InputError otherwise, and when nothing is left.
    """
    groups: dict[Bucket, dict[int, Fill]] = collections.defaultdict(dict)
    for index, example in enumerate(examples):
        try:
            check(example)
            bucket, fill = place(example, tokenizer, config)
            groups[bucket][index] = fill
        except InputError as error:
            if config.on_error == "raise":
                raise
            _log.warning("left out example %s: %s", printable(example.id), error)
            note_skipped(skipped, index, example, error)
    if not groups:
        raise InputError("data", "examples", "there is none", "check the split, the weights and the warnings above")
    return dict(sorted(groups.items()))


class BatchLoader:
    """Positions of one global batch -> Batch of `rows` of it (this process's share).

    With `on_error="skip"` an example that cannot be loaded is replaced by the next one of its bucket that can: the same
    one in every epoch, process and worker. Each loader adds a line to the file `skipped` when it first meets one; `bad`
    has what was replaced in this process: position -> error.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        groups: Mapping[Bucket, Iterable[int]],
        root: decoded.Root,
        tokenizer: Tokenizer,
        config: DataConfig,
        rows: Any = slice(None),
        skipped: Path | None = None,
    ):
        self.examples, self.root, self.tokenizer, self.config = examples, root, tokenizer, config
        self.rows, self.skipped = rows, skipped
        self.bad: dict[int, str] = {}
        decoded.source(root, config.decoding)  # settings that prepared shards lack are no fault of an example
        rings = [(group, [*group[1:], group[0]]) for group in map(list, groups.values())]
        self.following = {index: after for group, shifted in rings for index, after in zip(group, shifted, strict=True)}

    def __call__(self, indices: np.ndarray) -> Batch:
        chosen = indices[self.rows]
        return collate((self.row(int(index)) for index in chosen), len(chosen))

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
            _log.warning("skipped example %s (%d so far): %s", printable(self.examples[index].id), len(self.bad), error)
            note_skipped(self.skipped, index, self.examples[index], error)
            return None


class OneOf:
    """(position in an endless stream, group of positions of examples) -> the one that this epoch takes.

    A group holds one example, or those of one bucket whose meta has the same `one_of` (the pictures of a clip).
    """

    def __init__(self, examples: Sequence[Example], groups: int, seed: int):
        self.examples, self.groups, self.seed = examples, groups, seed

    def __call__(self, position: int, group: Sequence[int]) -> int:
        if len(group) == 1:
            return group[0]
        mark = self.examples[group[0]].meta["one_of"]
        return group[choice(mark, len(group), self.seed, position // self.groups)]


def _one_of_groups(examples: Sequence[Example], indices: Iterable[int]) -> list[tuple[int, ...]]:
    """`indices` in groups of which an epoch takes one."""
    groups: dict[str | int, list[int]] = collections.defaultdict(list)
    for index in indices:
        groups[examples[index].meta.get("one_of", index)].append(index)
    return list(map(tuple, groups.values()))


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


class Phases:
    """Batches of several mixtures one after the other: a random-access source for Grain, endless like the last."""

    def __init__(self, parts: Sequence[tuple[int, grain.MapDataset]]):
        """parts: (number of its first batch, batches), by that number, the first 0."""
        self.starts, self.parts = [start for start, _ in parts], [batches for _, batches in parts]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> np.ndarray:
        phase = bisect.bisect_right(self.starts, number) - 1
        return self.parts[phase][number - self.starts[phase]]


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """Which examples each global batch holds, whoever loads it."""

    examples: Sequence[Example]
    groups: Mapping[Bucket, Mapping[int, Fill]]
    batches: grain.MapDataset  # number of a batch -> positions of its examples, int[batch_size]; endless
    padding: Sequence[Padding]  # of each bucket, once all tasks are in the mixture


def train_order(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    skipped: Path | None = None,
    curriculum: Mapping[str, int] | None = None,
    check: Callable[[Example], None] = lambda example: None,
) -> TrainOrder:
    """The order of training: every batch from one bucket, the same for any number of processes and workers.

    batch_size: rows of a global batch.
    weights: task -> share of the samples (any scale); None draws every example equally often. Examples of one bucket
        that are drawn equally often form one stream, shuffled anew every epoch, in which each comes once per epoch.
        Those with the same `one_of` in their meta count as one example: an epoch takes one of them, chosen anew.
    skipped: file that lists examples left out (see `group_by_bucket`).
    curriculum: task -> number of the first batch that may hold it (default 0). Whenever a task joins, the others are
        shuffled anew.
    check: raises InputError for an example that must not be trained on.
    """
    groups = group_by_bucket(examples, tokenizer, config, skipped, check)
    choices = {bucket: _one_of_groups(examples, group) for bucket, group in groups.items()}
    kept = [indices[0] for group in choices.values() for indices in group]
    rate_of = dict(zip(kept, _rates(examples, kept, weights), strict=True))
    joins = {index: (curriculum or {}).get(examples[index].task, 0) for index in kept}
    starts = sorted(set(joins.values()))
    if starts[0] > 0:
        problem = f"leaves nothing for the first {starts[0]} steps"
        raise InputError("config", "data.curriculum", problem, "let a task that has examples join at step 0")

    parts, streams = [], 0
    for start in starts:
        buckets = []
        for group in choices.values():
            by_rate: dict[float, list[tuple[int, ...]]] = collections.defaultdict(list)
            for indices in group:
                if joins[indices[0]] <= start:
                    by_rate[rate_of[indices[0]]].append(indices)
            mixed = []
            for rate, members in sorted(by_rate.items()):
                shuffled = grain.MapDataset.source(members).seed(seed + streams).shuffle().repeat()
                stream = shuffled.map_with_index(OneOf(examples, len(members), seed))
                mixed.append((stream, rate * len(members)))
                streams += 1
            if mixed:
                share = sum(part for _, part in mixed)
                buckets.append((_mix(mixed).batch(batch_size, drop_remainder=True), share))
        parts.append((start, _mix(buckets)))
    batches = parts[0][1] if len(parts) == 1 else grain.MapDataset.source(Phases(parts))
    return TrainOrder(examples, groups, batches, padding(groups, rate_of))


def train_dataset(
    order: TrainOrder,
    root: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    rows: Any = slice(None),
    start: int = 0,
    workers: int = 0,
    skipped: Path | None = None,
    read_options: grain.ReadOptions | None = None,
) -> grain.IterDataset:
    """Endless IterDataset of Batch in the given order.

    rows: which rows of the global batch to load (a slice or positions), so processes share each batch.
    start: number of the first batch. A run takes one batch per step, so the step is the position of its input: it
        resumes with another number of processes or workers as well.
    workers: processes that decode, 0 = threads of this one; worker i decodes the batches start + i, start + i +
        workers, ... Workers are spawned, so a script that uses them needs `if __name__ == "__main__"`.
    skipped: file that lists the examples that could not be loaded, with `on_error="skip"`.

    The iterator's get_state / set_state continue it exactly. Errors of a worker reach the caller as InputError.
    """
    loader = BatchLoader(order.examples, order.groups, root, tokenizer, config, rows, skipped)
    batches = (order.batches[start:] if start else order.batches).map(loader)
    # A buffered element is a whole batch, so the buffers are kept short.
    dataset = batches.to_iter_dataset(read_options or grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own absl flags, in programs that parse none as well
        # A process that leaves at once, for another one died, has no last word about what Python then cleans up.
        sys.warnoptions.append("ignore:resource_tracker:UserWarning")
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, end_with_parent)
    return dataset


def eval_batches(
    examples: Sequence[Example],
    root: decoded.Root,
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    threads: int = 4,
    prompt_only: bool = True,
) -> Iterator[tuple[Bucket, Batch]]:
    """Batches of every example once, without their answers or with, bucket by bucket, decoded ahead by threads.

    The last batch of a bucket is filled with copies of its first row whose index is -1. With `on_error="skip"` a bad
    example is left out with a warning; otherwise it raises InputError.
    """
    config = dataclasses.replace(config, prompt_only=prompt_only, tasks=tuple(TASKS))  # of the model's run, and later
    groups = group_by_bucket(examples, tokenizer, config)
    loader = BatchLoader(examples, groups, root, tokenizer, config)
    chunks = [
        (bucket, group[start : start + batch_size])
        for bucket, group in ((bucket, list(fills)) for bucket, fills in groups.items())
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
                yield bucket, collate(rows + [filler] * (batch_size - len(rows)), batch_size)
    finally:
        pool.shutdown(cancel_futures=True)
