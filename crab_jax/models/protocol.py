"""What training, generation, inference and compilation need of a model: one small protocol, and its first is Crab.

A second model moves in by a config dataclass that is a `ModelConfig` and a linen module that is a `Model`. Nothing
above `crab_jax/models` may use more of a model than this, except where it is about Crab itself: its released weights
(`convert`), the estimate of a row's memory (`runs/run_mesh.py`), its presets and its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from crab_jax.models.shapes import (
    BinaryLogits,
    CacheSlots,
    Fbank,
    FeatureRows,
    Frames,
    Hidden,
    Ids,
    Logits,
    MaskStates,
    Positions,
    SemanticLogits,
)

# Paths ('/'-joined, full match) of parameters that stages train or freeze together.
ParameterGroups = Mapping[str, Sequence[str]]
Params = Any  # nested dict of arrays
Cache = Any  # a pytree whose leaves hold B rows


class ModelOutput(Protocol):
    """What a teacher-forced pass gives; masks are None for a batch without mask groups."""

    logits: Logits  # float32[B,L,V]
    hidden: Hidden  # [B,L,D]
    binary: jax.Array | None  # float32[B,M,P,P]
    semantic: jax.Array | None  # float32[B,M,classes,P,P]


@runtime_checkable
class ModelConfig(Protocol):
    """Sizes of a model. `image_size`, `visual_queries` and `audio_queries` say how its processor of media and text
    (data_pipelines/batching.py, by `config.derived_data`) makes the pictures, windows and feature slots of a batch.
    """

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures that the model sees."""

    @property
    def visual_queries(self) -> int:
        """Feature rows of each frame."""

    @property
    def audio_queries(self) -> int:
        """Feature rows of each audio window."""

    @property
    def vocab_size(self) -> int:
        """Tokens, those of the tasks included."""

    @property
    def lora_heads(self) -> int:
        """Heads of the routed LoRA."""

    @property
    def dtype(self) -> str:
        """Compute dtype of the language model."""

    def build(self) -> Model:
        """Return the module, in the layout of training."""


@runtime_checkable
class Model(Protocol):
    """A linen module; all that takes arrays is called through `apply`, by the names given here.

    The position of a token says how it is turned, its cache slot where its keys and values are kept. Both count from 0
    for a prompt of text; a model whose pictures share positions, or whose positions have several axes, gives others.
    """

    cfg: Any

    def __hash__(self) -> int:
        """Hash by sizes: a model is a static argument of compiled programs."""

    def init(self, rngs: Any, batch: Any) -> Mapping[str, Any]:
        """Return {"params": all parameters}, boxed with their logical axes."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method with parameters, as linen does."""

    def __call__(self, batch: Any, deterministic: bool = True) -> ModelOutput:
        """Run a teacher-forced pass over prompts with their answers."""

    def features(self, frames: Frames, fbank: Fbank) -> FeatureRows:
        """Encode the media of prompts, once for all that is asked about them."""

    def positions(self, batch: Any) -> Positions:
        """Return the position of every token of right-padded prompts."""

    def prefill(self, batch: Any, cache: Cache, features: FeatureRows | None = None) -> tuple[Hidden, Cache]:
        """Read prompts [B,L] into the first L slots of an empty cache; `features` stand for the batch's media."""

    def decode(self, tokens: Ids, positions: Positions, slots: CacheSlots, cache: Cache) -> tuple[Hidden, Cache]:
        """Read one more token a row, int32[B,1]; a generated token has the same position, int32[B,1], on every axis."""

    def logits(self, hidden: Hidden) -> Logits:
        """Return float32[...,V] of states [...,D]; tokens that do not exist have -1e30."""

    def masks(self, states: MaskStates, pictures: jax.Array) -> tuple[BinaryLogits, SemanticLogits]:
        """Draw the masks of mask-token states over pictures uint8[B,P,P,3]."""

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """Return a cache for so many rows and slots."""

    def grown_cache(self, cache: Cache, slots: int) -> Cache:
        """Return the cache with so many more slots, all empty."""

    def for_generation(self, params: Params, weights: str = "float", where: Any = None) -> tuple[Model, Params]:
        """Return the model laid out for generation with its parameters, in the sharding `where`."""
