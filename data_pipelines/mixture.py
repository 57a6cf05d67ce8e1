"""Batches from lists of Examples: a resumable training mixture (Grain) and evaluation batches."""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from data_pipelines.batching import Batch, Bucket, DataConfig, collate, empty_batch, load, place
from data_pipelines.bucket_fill import Group, Padding, padding
from data_pipelines.examples import Example, choice
from data_pipelines.index import Indexed
from data_pipelines.isolated import end_with_parent
from data_pipelines.several import Several, by_root
from data_pipelines.shared import Shared
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
    check: Check | Sequence[Check] = lambda example: None,
) -> dict[Bucket, Group]:
    """Return the examples of each bucket, buckets in increasing order.

    With `on_error="skip"` an example that fits no bucket, or that `check` refuses, is left out with a warning and a
    line in the file `skipped`. Raises InputError otherwise, and when nothing is left. Examples of an index are not
    built for this, and are not passed to `check`: the index holds which of them are refused. check: one for all, or one
    for each root of Examples of several.
    """
    numbers: dict[Bucket, int] = {}
    of, fills, start = np.full(len(examples), -1, np.int32), np.zeros((len(examples), 3), np.int32), 0
    parts = by_root(examples)
    for part, checked in zip(parts, [check] * len(parts) if callable(check) else check, strict=True):
        here, settings = slice(start, start + len(part.examples)), part.config(config)
        leave_out = functools.partial(_left_out, config, skipped, start)
        if isinstance(part.examples, Indexed):
            buckets, number_of, fills[here] = _placed_in_index(part.examples, tokenizer, settings, leave_out)
        else:
            buckets, number_of, fills[here] = _placed(part.examples, tokenizer, settings, checked, leave_out)
        known = np.array([numbers.setdefault(bucket, len(numbers)) for bucket in buckets] + [-1], np.int32)
        of[here], start = known[number_of], here.stop
    if not (of >= 0).any():
        raise InputError("data", "examples", "there is none", "check the split, the weights and the warnings above")
    order = np.argsort(of, kind="stable").astype(np.int32)
    edges = np.searchsorted(of[order], np.arange(len(numbers) + 1))
    groups = {
        bucket: Group(order[first:last], fills[order[first:last]])
        for bucket, first, last in zip(numbers, edges, edges[1:], strict=False)
        if first < last
    }
    return dict(sorted(groups.items()))


Check = Callable[[Example], None]
Placed = tuple[list[Bucket], np.ndarray, np.ndarray]  # buckets, int[N] of each example or -1, int[N,3] its Fill
LeaveOut = Callable[[int, Example, InputError], None]


def _left_out(
    config: DataConfig, skipped: Path | None, start: int, at: int, example: Example, error: InputError
) -> None:
    """Note that example `start + at` is left out. Raises its error unless bad examples are skipped."""
    if config.on_error == "raise":
        raise error
    _log.warning("left out example %s: %s", printable(example.id), error)
    note_skipped(skipped, start + at, example, error)


def _placed(
    examples: Sequence[Example], tokenizer: Tokenizer, config: DataConfig, check: Check, leave_out: LeaveOut
) -> Placed:
    numbers: dict[Bucket, int] = {}
    of, fills = np.full(len(examples), -1, np.int64), np.zeros((len(examples), 3), np.int32)
    for index, example in enumerate(examples):
        try:
            check(example)
            bucket, fills[index] = place(example, tokenizer, config)
            of[index] = numbers.setdefault(bucket, len(numbers))
        except InputError as error:
            leave_out(index, example, error)
    return list(numbers), of, fills


def _placed_in_index(examples: Indexed, tokenizer: Tokenizer, config: DataConfig, leave_out: LeaveOut) -> Placed:
    buckets, of, fills = examples.placed(tokenizer, config)
    for index in np.flatnonzero(of < 0).tolist():
        leave_out(index, examples[index], examples.fault(index, tokenizer, config))
    return buckets, of, fills


class BatchLoader:
    """Loads the `rows` (this process's share) of a global batch, given the positions of its examples.

    With `on_error="skip"` an example that cannot be loaded is replaced by the next loadable one of its bucket: the same
    one in every epoch, process and worker. Each loader adds a line to the file `skipped` when it first meets such an
    example; `bad` has those replaced in this process: {position: error}.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        groups: Mapping[Bucket, Group],
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
        for part in by_root(examples):
            decoded.source(part.root or root, part.config(config).decoding)
        self.rings = [group.positions for group in groups.values()]

    def __call__(self, indices: np.ndarray) -> Batch:
        """Return the Batch of this process's share of the examples at `indices`."""
        chosen = indices[self.rows]
        return collate((self.row(int(index)) for index in chosen), len(chosen))

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return the loaded example `index`, or its replacement. Raises InputError if its whole bucket is bad."""
        chosen = index
        while (arrays := self.try_row(chosen)) is None:
            chosen = self.following(chosen)
            if chosen == index:
                problem = f"no example of its bucket can be loaded, nor it: {self.bad[index]}"
                raise InputError(f"example {self.examples[index].id}", "", problem, "check the media files")
        return arrays

    def following(self, index: int) -> int:
        """Return the next example of the bucket of example `index`, the first after the last."""
        for ring in self.rings:
            at = int(np.searchsorted(ring.array, index))
            if at < len(ring) and ring[at] == index:
                return int(ring[(at + 1) % len(ring)])
        raise KeyError(index)

    def try_row(self, index: int) -> dict[str, np.ndarray] | None:
        """Return the loaded example `index`; None, with one warning, if it is bad and bad examples are skipped."""
        if index in self.bad:
            return None
        try:
            root, config = self.root, self.config
            if isinstance(self.examples, Several):
                part = self.examples.roots[self.examples.number_of(index)]
                root, config = part.root, part.config(config)
            return load(self.examples[index], root, self.tokenizer, config, index)
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

    def __call__(self, position: int, group: np.ndarray) -> int:
        """Return the position of the example that the epoch of `position` takes from `group`."""
        if len(group) == 1:
            return int(group[0])
        mark = self.examples[int(group[0])].meta["one_of"]
        return int(group[choice(mark, len(group), self.seed, position // self.groups)])


class OneOfGroups:
    """Groups of positions of examples, of which an epoch takes one each: a random-access source for Grain.

    members: the positions, group by group. ends: where each group ends; None when every group holds one.
    """

    def __init__(self, members: np.ndarray, ends: np.ndarray | None):
        self.members, self.ends = Shared(members), None if ends is None else Shared(ends)

    def __len__(self) -> int:
        return len(self.members if self.ends is None else self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        start = number if self.ends is None else self.ends[number - 1] if number else 0
        members: np.ndarray = self.members[start : number + 1 if self.ends is None else self.ends[number]]
        return members

    def firsts(self) -> np.ndarray:
        """Return the first position of each group."""
        return self.members.array if self.ends is None else self.members[np.append(0, self.ends[:-1])]

    def where(self, chosen: np.ndarray) -> OneOfGroups:
        """Return the groups at which a mask is True."""
        if self.ends is None:
            return OneOfGroups(self.members[chosen], None)
        sizes = np.diff(self.ends.array, prepend=0)
        return OneOfGroups(self.members[np.repeat(chosen, sizes)], np.cumsum(sizes[chosen]))


def _one_of_groups(positions: np.ndarray, marks: np.ndarray | None) -> OneOfGroups:
    """Split positions (ascending) into groups of equal marks, in the order of their first members; see `_marks`."""
    own = None if marks is None else marks[positions]
    if own is None or (own < 0).all():
        return OneOfGroups(positions, None)
    key = np.where(own < 0, int(own.max()) + 1 + np.arange(len(own)), own)
    _, first, of, sizes = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return OneOfGroups(positions[np.argsort(rank[of], kind="stable")], np.cumsum(sizes[order]))


def _marks(examples: Sequence[Example]) -> np.ndarray | None:
    """Return int[N]: a number for each value of `one_of` in a root, -1 for examples without; None when none has one."""
    marks, first = [], 0
    for part in by_root(examples):
        own = part.examples.marks_of() if isinstance(part.examples, Indexed) else _marks_of(part.examples)
        marks.append(np.full(len(part.examples), -1) if own is None else np.where(own < 0, -1, own + first))
        first += 0 if own is None else int(own.max()) + 1
    return np.concatenate(marks) if first else None


def _marks_of(examples: Sequence[Example]) -> np.ndarray | None:
    numbers: dict[str, int] = {}
    given = (example.meta.get("one_of") for example in examples)
    marks = np.fromiter((-1 if m is None else numbers.setdefault(m, len(numbers)) for m in given), int, len(examples))
    return marks if numbers else None


def _tasks(examples: Sequence[Example]) -> tuple[np.ndarray, list[str]]:
    """Return (int[N], names): the task of each example as a position in the names."""
    names = list(TASKS)
    number = {name: at for at, name in enumerate(names)}
    parts = [
        part.examples.tasks()[0]
        if isinstance(part.examples, Indexed)
        else np.fromiter((number[example.task] for example in part.examples), int, len(part.examples))
        for part in by_root(examples)
    ]
    return np.concatenate(parts), names


def _rates(counts: Mapping[str, int], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return how often an example of each task is drawn, relative to the others, given the number of examples.

    Raises InputError for a missing weight.
    """
    if weights is None:
        return dict.fromkeys(counts, 1.0)
    for task in counts:
        if not weights.get(task, 0) > 0:
            problem = f"is {weights.get(task)} for {task!r}, which has {counts[task]} examples"
            raise InputError("config", "weights", problem, "give a positive weight, or leave the examples out")
    # Rounded, so that equal rates are equal floats and their examples share one stream.
    return {task: float(f"{weights[task] / count:.9g}") for task, count in counts.items()}


def _mix(parts: Sequence[tuple[grain.MapDataset, float]]) -> grain.MapDataset:
    """Interleave datasets in fixed proportions."""
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
        rows: np.ndarray = self.parts[phase][number - self.starts[phase]]
        return rows


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """The examples of each global batch, independent of which process loads it."""

    examples: Sequence[Example]
    groups: Mapping[Bucket, Group]
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
    check: Check | Sequence[Check] = lambda example: None,
) -> TrainOrder:
    """Return the order of training: every batch from one bucket, the same for any number of processes and workers.

    batch_size: rows of a global batch. weights: task -> share of the samples (any scale); None draws every example
    equally often. Examples of one bucket that are drawn equally often form one stream, shuffled again in every epoch,
    in which each occurs once per epoch. Those with the same `one_of` in their meta count as one example: an epoch takes
    one of them, chosen again each time. skipped: file that lists examples left out (see `group_by_bucket`). curriculum:
    task -> number of the first batch that may hold it (default 0). Whenever a task joins, the others are shuffled
    again. check: raises InputError for an example that must not be trained on; see `group_by_bucket`.
    """
    groups = group_by_bucket(examples, tokenizer, config, skipped, check)
    marks, (task_of, tasks) = _marks(examples), _tasks(examples)
    choices = [_one_of_groups(group.positions.array, marks) for group in groups.values()]
    drawn = np.bincount(np.concatenate([task_of[chosen.firsts()] for chosen in choices]), minlength=len(tasks))
    rate_of = _rates({task: int(count) for task, count in zip(tasks, drawn, strict=True) if count}, weights)
    rates = np.array([rate_of.get(task, 0.0) for task in tasks])
    joins = np.array([(curriculum or {}).get(task, 0) for task in tasks])
    starts = sorted(set(joins[drawn > 0].tolist()))
    if starts[0] > 0:
        problem = f"leaves nothing for the first {starts[0]} steps"
        raise InputError("config", "data.curriculum", problem, "let a task that has examples join at step 0")

    parts, streams = [], 0
    for start in starts:
        buckets = []
        for chosen in choices:
            task_of_group = task_of[chosen.firsts()]
            rate_of_group = np.where(joins[task_of_group] <= start, rates[task_of_group], 0.0)
            mixed = []
            for rate in filter(None, np.unique(rate_of_group).tolist()):
                members = chosen.where(rate_of_group == rate)
                shuffled = grain.MapDataset.source(members).seed(seed + streams).shuffle().repeat()
                stream = shuffled.map_with_index(OneOf(examples, len(members), seed))
                mixed.append((stream, rate * len(members)))
                streams += 1
            if mixed:
                share = sum(part for _, part in mixed)
                buckets.append((_mix(mixed).batch(batch_size, drop_remainder=True), share))
        parts.append((start, _mix(buckets)))
    batches = parts[0][1] if len(parts) == 1 else grain.MapDataset.source(Phases(parts))
    rate_of_example = np.zeros(len(examples))
    for chosen in choices:
        rate_of_example[chosen.firsts()] = rates[task_of[chosen.firsts()]]
    return TrainOrder(examples, groups, batches, padding(groups, rate_of_example))


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

    A clip that several neighbouring examples are about is decoded once.

    The last batch of a bucket is filled with copies of its first row whose index is -1. With `on_error="skip"` a bad
    example is left out with a warning; otherwise it raises InputError.
    """
    config = dataclasses.replace(config, prompt_only=prompt_only, tasks=tuple(TASKS))  # of the model's run, and later
    groups = group_by_bucket(examples, tokenizer, config)
    loader = BatchLoader(examples, groups, decoded.Remembering(root, config.cache_dir), tokenizer, config)
    chunks = [
        (bucket, group[start : start + batch_size])
        for bucket, group in ((bucket, list(group)) for bucket, group in groups.items())
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
    groups: Mapping[Bucket, Group],
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
