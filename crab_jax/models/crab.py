"""Crab: encoders, Q-Formers, the spliced sequence, LLaMA with multi-head LoRA, text logits and masks.

Sources: section 3 of the paper (architecture); released files models/unified_arch.py, models/unified_llama.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from crab_jax.models.beats import Beats, BeatsConfig
from crab_jax.models.clip import Clip, ClipConfig, normalize
from crab_jax.models.generating import FusedLlama, by_layer, fuse
from crab_jax.models.llama import KVCache, Llama, LlamaConfig, admitted, grow_cache, init_cache
from crab_jax.models.lora import LoraConfig
from crab_jax.models.mask_decoder import SegConfig, SegModule
from crab_jax.models.qformer import QFormer, QFormerConfig
from crab_jax.models.shapes import (
    CacheSlots,
    DropoutRows,
    FeatureRows,
    Frames,
    Hidden,
    Ids,
    Logits,
    MaskStates,
    Positions,
    Windows,
)

# Parameters that stages train or freeze together: regular expressions that match whole paths, joined by '/'.
PARAMETER_GROUPS = {
    "encoders": ("clip/.*", "beats/.*"),
    "qformers": ("vl_projector/.*", "al_projector/.*"),
    "lora": ("llama/.*/lora_(A|B|route)",),
    "llama": ("llama/(?!.*/lora_).*",),
    # The random Fourier matrices are saved state, never trained (the released code registers them as buffers).
    "fourier": ("seg_module/.*positional_encoding_gaussian_matrix",),
    "segmentation": ("seg_module/(?!.*positional_encoding_gaussian_matrix).*",),
}


@dataclasses.dataclass(frozen=True)
class CrabConfig:
    """Sizes of every module.

    seg_taps: which two of the CLIP taps the mask decoder reads; the last tap feeds the language model.
    """

    clip: ClipConfig = ClipConfig()
    beats: BeatsConfig = BeatsConfig()
    visual: QFormerConfig = QFormerConfig(in_dim=1024, out_dim=4096)
    audio: QFormerConfig = QFormerConfig(in_dim=768, out_dim=4096)
    llama: LlamaConfig = LlamaConfig()
    lora: LoraConfig = LoraConfig()
    seg: SegConfig = SegConfig()
    seg_taps: tuple[int, int] = (0, 2)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures that the model sees."""
        return self.clip.image_size

    @property
    def visual_queries(self) -> int:
        """Number of feature rows per frame."""
        return self.visual.queries

    @property
    def audio_queries(self) -> int:
        """Number of feature rows per audio window."""
        return self.audio.queries

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the vocabulary, including those that the tasks add."""
        return self.llama.vocab_size

    @property
    def lora_heads(self) -> int:
        """Number of heads of the multi-head LoRA."""
        return self.lora.heads

    @property
    def dtype(self) -> str:
        """Compute dtype of the language model."""
        return self.llama.dtype

    def build(self) -> Crab:
        """Return the module in the layout for training."""
        return Crab(self)


@flax.struct.dataclass
class CrabOutput:
    """Result of a teacher-forced pass over B rows of L tokens with M mask groups each.

    logits: float32[B,L,V], or None. hidden: [B,L,D]. binary: mask logits float32[B,M,H,W]. semantic: class logits
    float32[B,M,classes,H,W]. Both kinds of mask logits are None when M = 0.
    """

    logits: jax.Array | None
    hidden: jax.Array
    binary: jax.Array | None
    semantic: jax.Array | None


def _rows(x: jax.Array) -> jax.Array:
    """Return `x` [B,...] sharded over its first axis like the rows of the batch (within `sharding.constrained`)."""
    spread: jax.Array = nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))
    return spread


def _each(rows: DropoutRows | None, parts: int) -> DropoutRows | None:
    """Return the numbers int32[B*parts] of the frames or windows of rows int32[B], for dropout; None stays None."""
    return None if rows is None else (rows[:, None] * parts + jnp.arange(parts)).reshape(-1)


class Crab(nn.Module):
    """The whole model, an implementation of `protocol.Model`.

    A `batch` is a `data_pipelines.batching.Batch`, or anything with its fields. With `weights` (one of
    `generating.KINDS`) the module has the layout for generation: it cannot be trained, and takes the parameters that
    `for_generation` returns.
    """

    cfg: CrabConfig
    weights: str = ""

    def setup(self) -> None:
        """Create the modules; linen calls this."""
        cfg = self.cfg
        self.clip = Clip(cfg.clip)
        self.beats = Beats(cfg.beats)
        # What is cheap to compute again is not kept while the language model goes backward.
        again: Any = (lambda module: module) if cfg.llama.remat == "none" else nn.remat
        self.vl_projector = again(QFormer)(cfg.visual)
        self.al_projector = again(QFormer)(cfg.audio)
        self.llama: Any = FusedLlama(cfg.llama, cfg.lora, self.weights) if self.weights else Llama(cfg.llama, cfg.lora)
        self.seg_module = again(SegModule)(cfg.seg)

    def encode_images(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Encode pictures uint8[B,T,H,W,3] to one [B,T,N,C] per CLIP tap."""
        batch = images.shape[0]
        taps = self.clip(_rows(normalize(rearrange(images, "b t h w c -> (b t) h w c"))))
        return tuple(rearrange(tap, "(b t) n c -> b t n c", b=batch) for tap in taps)

    def visual_rows(self, patches: jax.Array, dropout_rows: DropoutRows | None = None) -> jax.Array:
        """Map patches [B,T,N,C] of the last tap to feature rows [B,T*Q,D], frame by frame."""
        batch, frames = patches.shape[:2]
        numbers = _each(dropout_rows, frames)
        rows = self.vl_projector(_rows(rearrange(patches, "b t n c -> (b t) n c")), numbers)
        return _rows(rearrange(rows, "(b t) q d -> b (t q) d", b=batch))

    def audio_rows(self, fbank: jax.Array, dropout_rows: DropoutRows | None = None) -> jax.Array:
        """Encode log-mel windows float32[B,S,F,128] to feature rows [B,S*Q,D], window by window."""
        batch, windows = fbank.shape[:2]
        numbers = _each(dropout_rows, windows)
        encoded = _rows(self.beats(_rows(rearrange(fbank, "b s f m -> (b s) f m"))))
        return _rows(rearrange(self.al_projector(encoded, numbers), "(b s) q d -> b (s q) d", b=batch))

    def features(self, frames: Frames, fbank: Windows) -> FeatureRows:
        """Encode frames uint8[B,T,H,W,3] and windows float32[B,S,F,128] to the feature rows [B,R,D] that slots index.

        R = T * visual_queries + S * audio_queries, visual rows first.
        """
        rows = [jnp.zeros((len(frames), 0, self.cfg.llama.hidden), self.cfg.llama.dtype)]
        if frames.shape[1]:
            rows.append(self.visual_rows(self.encode_images(frames)[-1]))
        if fbank.shape[1]:
            rows.append(self.audio_rows(fbank))
        return jnp.concatenate(rows, axis=1)

    def splice(self, batch: Any, rows: list[jax.Array]) -> jax.Array:
        """Return the token embeddings [B,L,D] with feature rows in their slots, by one gather for the whole batch.

        rows: arrays [B,...,D] whose concatenation over axis 1 `batch.slots` indexes; a slot of -1 is a text token.
        """
        text = _rows(self.llama.embed(batch.tokens))
        if not rows:
            return text
        features = jnp.concatenate(rows, axis=1).astype(text.dtype)
        taken = jnp.take_along_axis(features, jnp.maximum(batch.slots, 0)[..., None], axis=1)
        return jnp.where((batch.slots >= 0)[..., None], taken, text)

    def inputs(self, batch: Any, dropout_rows: DropoutRows | None = None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return the spliced embeddings [B,L,D] and the mask decoder's features: two [B,M,N,C], none when M = 0."""
        frames, masks = batch.frames.shape[1], batch.seg_frame.shape[1]
        rows: list[jax.Array] = []
        seg_features: tuple[jax.Array, ...] = ()
        if frames + masks:
            taps = self.encode_images(jnp.concatenate([batch.frames, batch.seg_frame], axis=1))
            if frames:
                rows.append(self.visual_rows(taps[-1][:, :frames], dropout_rows))
            if masks:
                seg_features = tuple(taps[tap][:, frames:] for tap in self.cfg.seg_taps)
        if batch.fbank.shape[1]:
            rows.append(self.audio_rows(batch.fbank, dropout_rows))
        return self.splice(batch, rows), seg_features

    def __call__(self, batch: Any, dropout_rows: DropoutRows | None = None, with_logits: bool = True) -> CrabOutput:
        """Run a teacher-forced pass over prompts with their answers, tokens int32[B,L].

        With `dropout_rows`, dropout acts and needs the `dropout` rng. `with_logits` False leaves the logits out.
        """
        x, seg_features = self.inputs(batch, dropout_rows)
        hidden, _ = self.llama(x, self.positions(batch), dropout_rows=dropout_rows)
        binary = semantic = None
        if seg_features:
            b, m, k = batch.mask_positions.shape
            index = batch.mask_positions.reshape(b, m * k)[..., None]
            states = jnp.take_along_axis(hidden, index, axis=1).reshape(b * m, k, -1)
            features = tuple(_rows(rearrange(f, "b m n c -> (b m) n c")) for f in seg_features)
            logits: Any = self.seg_module(_rows(states), features)
            binary, semantic = jax.tree.map(lambda x: x.reshape(b, m, *x.shape[1:]), logits)
        return CrabOutput(self.llama.logits(hidden) if with_logits else None, hidden, binary, semantic)

    @nn.nowrap
    def positions(self, batch: Any) -> Positions:
        """Return the positions int32[B,L]: every token, text or feature, is one further than the token before it."""
        return jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)

    @nn.nowrap
    def empty_cache(self, rows: int, slots: int) -> KVCache:
        """Return an empty cache for `rows` rows of `slots` slots each."""
        cache = init_cache(self.cfg.llama, rows, slots)
        return by_layer(cache) if self.weights else cache

    @nn.nowrap
    def grown_cache(self, cache: KVCache, slots: int) -> KVCache:
        """Return the cache with `slots` more slots, all empty."""
        return grow_cache(cache, slots)

    @nn.nowrap
    def admitted(self, cache: KVCache, others: KVCache, rows: jax.Array) -> KVCache:
        """Return `cache` whose row i begins like row `rows[i]` of `others`, where `rows` int32[B] is not negative."""
        return admitted(cache, others, rows)

    def prefill(self, batch: Any, cache: KVCache, features: FeatureRows | None = None) -> tuple[Hidden, KVCache]:
        """Read prompts into the cache: (hidden [B,L,D], cache). With `features` [B,R,D] the batch needs no media."""
        if features is None:
            features = self.features(batch.frames, batch.fbank)
        x = self.splice(batch, [features] if features.shape[1] else [])
        slots = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        read: tuple[Hidden, KVCache] = self.llama(x, self.positions(batch), cache=cache, slots=slots)
        return read

    def decode(self, tokens: Ids, positions: Positions, slots: CacheSlots, cache: KVCache) -> tuple[Hidden, KVCache]:
        """Read further tokens of each row; tokens, positions and slots are int32[B,n]: (hidden [B,n,D], cache)."""
        read: tuple[Hidden, KVCache] = self.llama(self.llama.embed(tokens), positions, cache=cache, slots=slots)
        return read

    def output_matrix(self) -> jax.Array:
        """Return the matrix [D,V] that maps hidden states to logits."""
        matrix: jax.Array = self.llama.output_matrix()
        return matrix

    def logits(self, hidden: Hidden) -> Logits:
        """Map hidden [...,D] to logits float32[...,V]."""
        logits: Logits = self.llama.logits(hidden)
        return logits

    def masks(self, states: MaskStates, seg_frame: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the mask logits of pictures uint8[B,H,W,3] from the states [B,6,D] that predict their mask tokens.

        They are float32: binary [B,H,W] and semantic [B,classes,H,W].
        """
        taps = self.encode_images(seg_frame[:, None])
        logits: Any = self.seg_module(states, tuple(taps[tap][:, 0] for tap in self.cfg.seg_taps))  # both kinds
        binary, semantic = logits
        return binary, semantic

    @nn.nowrap
    def for_generation(self, params: Any, weights: str = "float", placement: Any = None) -> tuple[Crab, Any]:
        """Return this model in the layout for generation (models/generating.py), and its parameters.

        params: parameters of the layout for training. weights: one of `generating.KINDS`. placement: sharding of
        the language model's parameters.
        """
        llama = fuse(params["llama"], self.cfg.llama, self.cfg.lora, weights, placement)
        return Crab(self.cfg, weights), {**params, "llama": llama}
