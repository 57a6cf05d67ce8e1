"""Task: the functions that make one benchmark task, gathered from the one file that defines it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Stats = dict[str, Any]  # sufficient statistics of one sample: floats or small arrays
Constant = tuple[str, np.ndarray | None]  # an answer: its text and its mask


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
    """

    name: str
    instruction: Callable[..., str]
    target: Callable[..., str]
    parse: Callable[[str], Any]
    stats: Callable[[Any, np.ndarray | None, Mapping[str, Any], Any], Stats]
    reduce: Callable[[Sequence[Stats]], dict[str, float]]
    constants: Callable[[Sequence[Mapping[str, Any]], Sequence[np.ndarray | None]], Sequence[Constant]]
    headline: str
    mask_kind: str = "none"  # none | binary | semantic
    modalities: tuple[str, ...] = ("audio", "video")  # what the task cannot be answered without
