"""Task: the functions that make one benchmark task, gathered from the one file that defines it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Stats = dict[str, Any]  # sufficient statistics of one sample: floats or small arrays
Meta = Mapping[str, Any]  # the label of one sample
Constant = tuple[str, np.ndarray | None]  # an answer: its text and its mask
Breakdown = dict[str, tuple[float, int]]  # class or question type -> its score and on how many samples


class Published(NamedTuple):
    """A row of a published table: the model, its scores by our metric names (fractions), and where they were read."""

    model: str
    scores: Mapping[str, float]
    source: str


# Where the numbers of `published` were read. The body of the paper was not; what no source states is left out.
NOTES = "public notes on arXiv 2503.13068"
AV_REASONER = "result tables of AV-Reasoner, which cite the models"


def no_breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
    """The `breakdown` of a task without classes or types."""
    return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark task; every field is a pure function or a constant.

    instruction: `(variant="train", **fields) -> str`, the prompt with placeholders; variants "train", "test", "quick".
    target: `(**label fields, reasoning="") -> str`, the answer a model is trained to write.
    parse: `text -> label | None`, tolerant; None when the answer cannot be read.
    stats: `(parsed, mask, meta, gt_mask) -> Stats` of one sample; `parsed`/`mask` None when absent, `gt_mask`
        when the task has no masks. Masks are
        bool[H,W] (binary) or int[H,W] class ids (avss); `mask_scores` float[H,W] in [0,1] may replace a binary mask.
    reduce: `Sequence[Stats] -> {metric: float}` of any multiset of samples, in [0, 1] unless documented.
    constants: `(metas, gt_masks) -> [(text, mask or None)]`, candidate constant answers built from a set of labels;
        the best-scoring one is the "constant" baseline.
    metrics: what each metric of `reduce` is, in one line, with whose convention it follows.
    breakdown: `(stats, metas) -> {class or question type: (score, samples)}`, for plots.
    published: rows of the paper's table and of tables that cite it, as far as they are known.
    """

    name: str
    instruction: Callable[..., str]
    target: Callable[..., str]
    parse: Callable[[str], Any]
    stats: Callable[[Any, np.ndarray | None, Mapping[str, Any], Any], Stats]
    reduce: Callable[[Sequence[Stats]], dict[str, float]]
    constants: Callable[[Sequence[Mapping[str, Any]], Sequence[np.ndarray | None]], Sequence[Constant]]
    headline: str
    metrics: Mapping[str, str]
    breakdown: Callable[[Sequence[Stats], Sequence[Meta]], Breakdown] = no_breakdown
    published: Sequence[Published] = ()
    mask_kind: str = "none"  # none | binary | semantic
    modalities: tuple[str, ...] = ("audio", "video")  # what the task cannot be answered without


def by_group(groups: Callable[[Meta], Iterable[str]], reduce: Callable[[Sequence[Stats]], dict[str, float]],
             metric: str) -> Callable[[Sequence[Stats], Sequence[Meta]], Breakdown]:
    """A `breakdown`: `metric` over the samples of each of `groups(meta)`, in alphabetical order."""
    def breakdown(samples: Sequence[Stats], metas: Sequence[Meta]) -> Breakdown:
        found: dict[str, list[Stats]] = {}
        for sample, meta in zip(samples, metas, strict=True):
            for name in groups(meta):
                found.setdefault(name, []).append(sample)
        return {name: (reduce(found[name])[metric], len(found[name])) for name in sorted(found)}
    return breakdown
