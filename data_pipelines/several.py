"""The Examples of several data roots in one training, each with the media and the frames of its own root."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, overload

import numpy as np

from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example


class OneRoot(NamedTuple):
    """The Examples of one root. frames: frames of a video there, 0 for `DataConfig.video_frames`."""

    root: str
    examples: Sequence[Example]
    frames: int = 0

    def config(self, config: DataConfig) -> DataConfig:
        """Return the settings with which the Examples of this root are loaded."""
        return dataclasses.replace(config, video_frames=self.frames) if self.frames else config


class Several(Sequence[Example]):
    """The Examples of several roots, one root after the other. Ids and marks `one_of` count within a root."""

    def __init__(self, roots: Sequence[OneRoot]):
        self.roots = tuple(roots)
        self.starts = np.cumsum([0, *(len(one.examples) for one in roots)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, at: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [self[number] for number in range(len(self))[at]]
        index = range(len(self))[at]
        number = self.number_of(index)
        return self.roots[number].examples[index - int(self.starts[number])]

    def number_of(self, index: int) -> int:
        """Return the number of the root that an Example is of."""
        return int(np.searchsorted(self.starts, index, "right")) - 1


def by_root(examples: Sequence[Example]) -> tuple[OneRoot, ...]:
    """Return Examples root by root; where there is one root, it is not named."""
    return examples.roots if isinstance(examples, Several) else (OneRoot("", examples),)
