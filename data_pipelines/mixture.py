"""Batches from lists of Examples: a resumable training mixture (Grain) and evaluation batches."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from crab_jax.io import paths
from crab_jax.io.errors import InputError, printable
from crab_jax.io.files import append_line
from crab_jax.tasks import TASKS
from data_pipelines import decoded
from data_pipelines.batching import Batch, Bucket, DataConfig, Fill, collate, empty_batch, load, place
from data_pipelines.bucket_fill import Padding, padding
from data_pipelines.examples import Example, choice
from data_pipelines.isolated import end_with_parent
from data_pipelines.tokens import Tokenizer

_log = logging.getLogger(__name__)


def note_skipped(file: Path | None, index: int, example: Example, error: InputError) -> None:
    """Append one line to the list of skipped examples. Several workers share the file, or have one each in a bucket."""
    if file is not None:
        append_line(paths.own_part(file), {"index": index, "id": example.id, "task": example.task, "error": str(error)})


def group_by_bucket(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: DataConfig,
    skipped: Path | None = None,
    check: Callable[[Example], None] = lambda example: None,
) -> dict[Bucket, dict[int, Fill]]:
    """Return {bucket: {position of an example: its Fill}}, buckets in increasing order.

    With `on_error="skip"` an example that fits no bucket, or that `check` refuses, is left out with a warning and a
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
    """Loads the `rows` (this process's share) of a global batch, given the positions of its examples.

    With `on_error="skip"` an example that cannot be loaded is replaced by the next loadable one of its bucket: the same
    one in every epoch, process and worker. Each loader adds a line to the file `skipped` when it first meets such an
    example; `bad` has those replaced in this process: {position: error}.
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
        # Settings that prepared shards lack must raise at once: they are no fault of an example.
        decoded.source(root, config.decoding)
        rings = [(group, [*group[1:], group[0]]) for group in map(list, groups.values())]
        self.following = {index: after for group, shifted in rings for index, after in zip(group, shifted, strict=True)}

    def __call__(self, indices: np.ndarray) -> Batch:
        """Return the Batch of this process's share of the examples at `indices`."""
        chosen = indices[self.rows]
        return collate((self.row(int(index)) for index in chosen), len(chosen))

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return the loaded example `index`, or its replacement. Raises InputError if its whole bucket is bad."""
        chosen = index
        while (arrays := self.try_row(chosen)) is None:
            chosen = self.following[chosen]
            if chosen == index:
                problem = f"no example of its bucket can be loaded, nor it: {self.bad[index]}"
                raise InputError(f"example {self.examples[index].id}", "", problem, "check the media files")
        return arrays

    def try_row(self, index: int) -> dict[str, np.ndarray] | None:
        """Return the loaded example `index`; None, with one warning, if it is bad and bad examples are skipped."""
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
    """Maps (position in an endless stream, group of positions of examples) to the example that this epoch takes.

    A group holds one example, or those of one bucket whose meta has the same `one_of` (the frames of a clip).
    """

    def __init__(self, examples: Sequence[Example], groups: int, seed: int):
        self.examples, self.groups, self.seed = examples, groups, seed

    def __call__(self, position: int, group: Sequence[int]) -> int:
        """Return the position of the example that the epoch of `position` takes from `group`."""
        if len(group) == 1:
            return group[0]
        mark = self.examples[group[0]].meta["one_of"]
        return group[choice(mark, len(group), self.seed, position // self.groups)]


def _one_of_groups(examples: Sequence[Example], indices: Iterable[int]) -> list[tuple[int, ...]]:
    """Split `indices` into groups of which an epoch takes one."""
    groups: dict[str | int, list[int]] = collections.defaultdict(list)
    for index in indices:
        groups[examples[index].meta.get("one_of", index)].append(index)
    return list(map(tuple, groups.values()))


def _rates(examples: Sequence[Example], kept: Sequence[int], weights: Mapping[str, float] | None) -> list[float]:
    """Return how often each kept example is drawn, relative to the others. Raises InputError for a missing weight."""
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
        """Take the parts (number of the first batch, batches), sorted by that number; the first is 0."""
        self.starts, self.parts = [start for start, _ in parts], [batches for _, batches in parts]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> np.ndarray:
        phase = bisect.bisect_right(self.starts, number) - 1
        return self.parts[phase][number - self.starts[phase]]


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """The examples of each global batch, independent of which process loads it."""

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
    """Return the order of training: every batch from one bucket, the same for any number of processes and workers.

    batch_size: rows of a global batch. weights: task -> share of the samples (any scale); None draws every example
    equally often. Examples of one bucket that are drawn equally often form one stream, shuffled again in every epoch,
    in which each occurs once per epoch. Those with the same `one_of` in their meta count as one example: an epoch takes
    one of them, chosen again each time. skipped: file that lists examples left out (see `group_by_bucket`). curriculum:
    task -> number of the first batch that may hold it (default 0). Whenever a task joins, the others are shuffled
    again. check: raises InputError for an example that must not be trained on.
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
    """Return an endless IterDataset of Batch in the given order.

    rows: which rows of the global batch to load (a slice or positions), so that processes share each batch. start:
    number of the first batch. A run takes one batch per step, so the step is the position of its input, and a run
    resumes with another number of processes or workers as well. workers: processes that decode, 0 = threads of this
    one; worker i decodes the batches start + i, start + i + workers, ... Workers are spawned, so a script that uses
    them needs `if __name__ == "__main__"`. skipped: file that lists the examples that could not be loaded, with
    `on_error="skip"`.

    The iterator's get_state / set_state continue it exactly. Errors of a worker reach the caller as InputError.
    """
    loader = BatchLoader(order.examples, order.groups, root, tokenizer, config, rows, skipped)
    batches = (order.batches[start:] if start else order.batches).map(loader)
    # A buffered element is a whole batch, so buffers are short.
    dataset = batches.to_iter_dataset(read_options or grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its own absl flags, even in programs that parse none
        # Python must not warn about resources of a process that exits at once because another one died.
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
    """Yield batches of every example once, with or without answers, bucket by bucket, decoded ahead by threads.

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
    pending: collections.deque[tuple[Bucket, list[concurrent.futures.Future[dict[str, np.ndarray] | None]]]] = (
        collections.deque()
    )
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


def answered_batches(
    examples: Sequence[Example],
    groups: Mapping[Bucket, Iterable[int]],
    root: decoded.Root,
    tokenizer: Tokenizer,
    config: DataConfig,
    batch_size: int,
    rows: Any = slice(None),
    threads: int = 4,
) -> list[Batch]:
    """Return batches of every example of `groups` once with its answer, bucket by bucket; of each the given `rows`.

    The number of batches and what stands in which row follow from `groups` alone, so that processes share each batch.
    Empty rows (index -1) fill the last batch of a bucket, and with `on_error="skip"` stand for examples that cannot be
    loaded, each with a warning; otherwise such an example raises InputError.
    """
    loader = BatchLoader(examples, groups, root, tokenizer, config)

    def row(bucket: Bucket, index: int) -> dict[str, np.ndarray]:
        arrays = loader.try_row(index) if index >= 0 else None
        empty = empty_batch(bucket, 1, config.image_size) if arrays is None else None
        return arrays or {field.name: getattr(empty, field.name)[0] for field in dataclasses.fields(Batch)}

    batches = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for bucket, group in groups.items():
            listed = list(group)
            for start in range(0, len(listed), batch_size):
                chunk = listed[start : start + batch_size]
                chosen = np.array(chunk + [-1] * (batch_size - len(chunk)))[rows]
                batches.append(collate(pool.map(functools.partial(row, bucket), map(int, chosen)), len(chosen)))
    return batches
