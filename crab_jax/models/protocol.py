"""The protocol of a model: all that training, generation, inference and compilation need of it.

Crab is its first implementation. A further model is a config dataclass that implements `ModelConfig` and a linen module
that implements `Model`. Code outside `crab_jax/models` uses no more of a model than this, except where it is about Crab
itself: its released weights (`convert`), the estimate of a row's memory (`runs/run_mesh.py`), its presets and its
defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from crab_jax.models.shapes import (
    BinaryLogits,
    CacheSlots,
    DropoutRows,
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

# Parameters that stages train or freeze together: regular expressions that match whole paths, joined by '/'.
ParameterGroups = Mapping[str, Sequence[str]]
Params = Any  # nested dict of arrays
Cache = Any  # a pytree whose leaves hold B rows


class ModelOutput(Protocol):
    """Result of a teacher-forced pass; the mask logits are None for a batch without mask groups."""

    logits: Logits | None  # float32[B,L,V]
    hidden: Hidden  # [B,L,D]
    binary: jax.Array | None  # float32[B,M,P,P]
    semantic: jax.Array | None  # float32[B,M,classes,P,P]


@runtime_checkable
class ModelConfig(Protocol):
    """Sizes of a model.

    `image_size`, `visual_queries` and `audio_queries` determine how data_pipelines/batching.py makes the pictures,
    audio windows and feature slots of a batch; `config.derived_data` passes them on.
    """

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures that the model sees."""

    @property
    def visual_queries(self) -> int:
        """Number of feature rows per frame."""

    @property
    def audio_queries(self) -> int:
        """Number of feature rows per audio window."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary, including those that the tasks add."""

    @property
    def lora_heads(self) -> int:
        """Number of heads of the multi-head LoRA."""

    @property
    def dtype(self) -> str:
        """Compute dtype of the language model."""

    def build(self) -> Model:
        """Return the module in the layout for training."""


@runtime_checkable
class Model(Protocol):
    """A linen module with these methods; those that take arrays are called through `apply`, by name.

    The position of a token determines the rotation of its query and key; its cache slot is where the cache stores its
    key and value. Both count from 0 for a prompt of text. They differ in a model whose pictures share positions, or
    whose positions have several axes.
    """

    cfg: Any

    def __hash__(self) -> int:
        """Return a hash of the sizes: a model is a static argument of compiled programs."""

    def init(self, rngs: Any, batch: Any) -> Mapping[str, Any]:
        """Return {"params": all parameters}, each boxed with its logical axes."""

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a method on the given variables, as linen does."""

    def __call__(self, batch: Any, dropout_rows: DropoutRows | None = None, with_logits: bool = True) -> ModelOutput:
        """Run a teacher-forced pass over prompts with their answers.

        With `dropout_rows`, dropout acts; its bits depend on the number of a row and the rng `dropout`, not on where in
        the batch the row stands. `with_logits` False leaves the logits out (None).
        """

    def features(self, frames: Frames, fbank: Fbank) -> FeatureRows:
        """Encode the media of prompts to the feature rows [B,R,D] that several prompts about them can share."""

    def positions(self, batch: Any) -> Positions:
        """Return the positions of the tokens of right-padded prompts, int32[B,L] or int32[B,L,axes]."""

    def prefill(self, batch: Any, cache: Cache, features: FeatureRows | None = None) -> tuple[Hidden, Cache]:
        """Read prompts [B,L] into the first L slots of an empty cache; `features` replace the media of the batch."""

    def decode(self, tokens: Ids, positions: Positions, slots: CacheSlots, cache: Cache) -> tuple[Hidden, Cache]:
        """Read further tokens of each row, int32[B,n], at `positions` and `slots` int32[B,n]; what they hold is text.

        Slots past the end of the cache are not stored.

        A model whose positions have several axes uses the position on all of them.
        """

    def output_matrix(self) -> jax.Array:
        """Return the matrix [D,V] that maps states to logits, whole on every device but for its split vocabulary."""

    def logits(self, hidden: Hidden) -> Logits:
        """Map states [...,D] to logits float32[...,V]; ids past the vocabulary have -1e30."""

    def masks(self, states: MaskStates, pictures: jax.Array) -> tuple[BinaryLogits, SemanticLogits]:
        """Return the mask logits of pictures uint8[B,P,P,3] from the states [B,6,D] that predict their mask tokens."""

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """Return an empty cache for `rows` rows of `slots` slots each."""

    def grown_cache(self, cache: Cache, slots: int) -> Cache:
        """Return the cache with `slots` more slots, all empty."""

    def admitted(self, cache: Cache, others: Cache, rows: jax.Array) -> Cache:
        """Return `cache` whose row i begins like row `rows[i]` of `others`, where `rows` int32[B] is not negative."""

    def for_generation(self, params: Params, weights: str = "float", placement: Any = None) -> tuple[Model, Params]:
        """Return the model in the layout for generation, and its parameters in the sharding `placement`.

        weights: one of `generating.KINDS`, the dtype of the language model's matrices.
        """
