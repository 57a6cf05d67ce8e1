"""The programs of a training step, one for each bucket, compiled in the background from the start of a run.

Left to itself, a run stops for minutes whenever a bucket comes for the first time. Here the programs of all buckets
are compiled beside the first steps, in other threads, those that are drawn most often first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from data_pipelines.batching import Batch, Bucket, empty_batch

MOST_THREADS = 4  # a compilation of the 7B step takes gigabytes of a host's memory


def abstract_batch(bucket: Bucket, rows: int, image_size: int, placement: NamedSharding) -> Batch:
    """Return the shapes of a batch of `rows` rows of a bucket, with one sharding; image_size: pixels of a side."""
    row = empty_batch(bucket, 1, image_size)
    shapes: Batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=placement), row)
    return shapes


class StepPrograms:
    """A jitted step (state, frozen, batch) -> (state, metrics) whose programs for some batches are compiled ahead.

    A batch whose program was not asked for, or has not begun to be compiled, is compiled when it comes, as ever.
    """

    def __init__(self, step: Any, state: Any, frozen: Any, ahead: Iterable[Batch] = ()):
        """Begin to compile for the batches `ahead`, given as shapes with shardings, in their order."""
        self._step, self._ran = step, set[Any]()
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, frozen))

        def compiled(batch: Batch) -> Callable[..., Any]:
            program: Callable[..., Any] = step.lower(*given, batch).compile()
            return program

        threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(threads, "compile")
        self._programs: dict[Any, Future[Callable[..., Any]]] = {}
        for batch in ahead:
            self._programs[_shapes(batch)] = self._pool.submit(compiled, batch)

    def __call__(self, state: Any, frozen: Any, batch: Batch) -> Any:
        """Take the step, with the program of the batch.

        If it is being compiled, wait for it, and raise what compiling raises.
        """
        shapes = _shapes(batch)
        program = self._programs.get(shapes)
        if program is None or program.cancel():
            self._programs.pop(shapes, None)
            return self._step(state, frozen, batch)
        taken = program.result()(state, frozen, batch)
        self._ran.add(shapes)
        return taken

    def used(self) -> int:
        """Return the number of programs that have run."""
        of_step: int = self._step._cache_size()
        return of_step + len(self._ran)

    def close(self) -> None:
        """Leave uncompiled what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(batch))
