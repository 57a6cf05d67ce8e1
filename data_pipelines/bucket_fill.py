"""Padding in the batches of a mixture: positions of the text model, frames of clips, windows of sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_pipelines.batching import Bucket, Fill


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


def padding(groups: Mapping[Bucket, Mapping[int, Fill]], rate_of: Mapping[int, float] | None = None) -> list[Padding]:
    """Return the padding of each bucket.

    rate_of: {position of an example: how often it is drawn}; None: equally often.
    """
    rates = {index: 1.0 for group in groups.values() for index in group} if rate_of is None else rate_of
    drawn_in_all, rows = sum(rates.values()), []
    for bucket, group in groups.items():
        drawn = [(rates[index], fill) for index, fill in group.items() if index in rates]
        share = sum(rate for rate, _ in drawn)
        filled = (sum(rate * fill[axis] for rate, fill in drawn) for axis in range(3))
        empty = (max(0.0, 1 - full / (share * of)) for full, of in zip(filled, _size(bucket), strict=True))
        rows.append(Padding(bucket, len(drawn), share / drawn_in_all, *empty))
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
