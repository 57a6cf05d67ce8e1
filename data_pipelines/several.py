"""The Examples of several data roots in one training, each with the media and the frames of its own root."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, overload

import numpy as np

from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example


class Part(NamedTuple):
    """The Examples of one root. frames: frames of a video there, 0 for `DataConfig.video_frames`."""

    root: str
    examples: Sequence[Example]
    frames: int = 0

    def config(self, config: DataConfig) -> DataConfig:
        """Return the settings with which the Examples of this root are loaded."""
        return dataclasses.replace(config, video_frames=self.frames) if self.frames else config


class Several(Sequence[Example]):
    """The Examples of several roots, one root after the other. Ids and marks `one_of` count within a root."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part.examples) for part in parts)])

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
        return self.parts[number].examples[index - int(self.starts[number])]

    def number_of(self, index: int) -> int:
        """Return the number of the part that an Example is in."""
        return int(np.searchsorted(self.starts, index, "right")) - 1


def parts_of(examples: Sequence[Example]) -> tuple[Part, ...]:
    """Return the parts of Examples; Examples of one root are one part, whose root is not named."""
    return examples.parts if isinstance(examples, Several) else (Part("", examples),)
