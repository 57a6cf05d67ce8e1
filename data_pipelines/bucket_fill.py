"""Padding in the batches of a mixture: positions of the text model, frames of clips, windows of sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batching import Bucket, Fill
from data_pipelines.shared import Shared


class Padding(NamedTuple):
    """The padding in the batches of one bucket.

    share: of the rows drawn. positions, frames, windows: padded shares of the bucket's positions, frames and audio
    windows, weighted by how often each example is drawn.
    """

    bucket: Bucket
    examples: int
    share: float
    positions: float
    frames: float
    windows: float


class Group:
    """The examples of one bucket: their positions (ascending) and, int32[N,3], their Fills. Iterates over positions."""

    def __init__(self, positions: np.ndarray, fills: np.ndarray):
        self.positions, self.fills = Shared(positions), fills

    def __len__(self) -> int:
        return len(self.positions)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Group)
            and np.array_equal(self.positions.array, other.positions.array)
            and np.array_equal(self.fills, other.fills)
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.positions.array.tolist())


def padding(groups: Mapping[Bucket, Group], rates: np.ndarray | None = None) -> list[Padding]:
    """Return the padding of each bucket.

    rates: float[N], how often the example at each position is drawn, 0 for never; None: all equally often.
    """
    drawn = [np.ones(len(group)) if rates is None else rates[group.positions.array] for group in groups.values()]
    drawn_in_all, rows = sum(rate.sum() for rate in drawn), []
    for (bucket, group), rate in zip(groups.items(), drawn, strict=True):
        share = float(rate.sum())
        filled = (rate @ group.fills).tolist()
        empty = (max(0.0, 1 - full / (share * of)) for full, of in zip(filled, _size(bucket), strict=True))
        rows.append(Padding(bucket, int((rate > 0).sum()), share / float(drawn_in_all), *empty))
    return rows


def total(rows: Sequence[Padding]) -> tuple[float, float, float]:
    """Return the padded shares of positions, frames and windows over all batches; buckets count by their sizes."""

    def of(axis: int) -> float:
        capacity = [row.share * _size(row.bucket)[axis] for row in rows]
        empty = [(row.positions, row.frames, row.windows)[axis] for row in rows]
        return sum(c * e for c, e in zip(capacity, empty, strict=True)) / sum(capacity)

    return of(0), of(1), of(2)


def _size(bucket: Bucket) -> Fill:
    """Return the capacity of a bucket."""
    return Fill(bucket.length, bucket.frames, bucket.windows)


HEAD = (
    "positions",
    "frames",
    "windows",
    "fbank",
    "masks",
    "examples",
    "drawn",
    "positions empty",
    "frames empty",
    "windows empty",
)


def cells(rows: Sequence[Padding]) -> list[tuple[str, ...]]:
    """Return the rows of a table under HEAD; the last is for all buckets together."""
    lines = [(*map(str, row.bucket), f"{row.examples:,}", *(f"{value:.1%}" for value in row[2:])) for row in rows]
    totals = (f"{value:.1%}" for value in total(rows))
    return [*lines, ("all", "", "", "", "", f"{sum(row.examples for row in rows):,}", "100.0%", *totals)]


def table(rows: Sequence[Padding]) -> str:
    """Format the padding of each bucket and of all as a text table."""
    lines = [HEAD, *cells(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
