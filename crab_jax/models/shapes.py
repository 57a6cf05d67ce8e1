"""Names for the arrays that modules exchange, with their shapes and dtypes.

B rows of a batch, L text positions, T frames, S audio windows, N encoder tokens, Q queries, R feature rows, D width of
the language model, V its padded vocabulary, H heads, K slots of a cache, M mask groups, P side of a picture. A leading
`...` stands for any axes. All of these types are `jax.Array`: the names document shapes, and nothing checks them.
"""

from __future__ import annotations

from typing import TypeAlias

import jax

Ids: TypeAlias = jax.Array  # int32[B,L] token ids
Positions: TypeAlias = jax.Array  # int32[B,L], or int32[B,L,axes] for a rotation over several axes
CacheSlots: TypeAlias = jax.Array  # int32[B,L] slots of a cache that store the keys and values of each input
DropoutRows: TypeAlias = jax.Array  # int32[B] numbers of the rows in their batch, by which dropout tells them apart
KeyMask: TypeAlias = jax.Array  # bool[B,L] inputs that may be attended to
AttentionMask: TypeAlias = jax.Array  # bool[B,L,N] keys that each query may attend to
Rotation: TypeAlias = tuple[jax.Array, jax.Array]  # cos and sin, float32[B,L,1,head_dim/2]
Hidden: TypeAlias = jax.Array  # [B,L,D] states of the language model
Logits: TypeAlias = jax.Array  # float32[...,V]
Frames: TypeAlias = jax.Array  # uint8[B,T,P,P,3] RGB
Pixels: TypeAlias = jax.Array  # float[B,P,P,3] normalised RGB
Tokens: TypeAlias = jax.Array  # [B,N,C] tokens of an encoder
Windows: TypeAlias = jax.Array  # float32[B,S,F,128] log-mel windows
Fbank: TypeAlias = jax.Array  # float32[B,F,128] one log-mel window
FeatureRows: TypeAlias = jax.Array  # [B,R,D] encoded media, visual rows first
MaskStates: TypeAlias = jax.Array  # [B,6,D] states that predict the six mask tokens
BinaryLogits: TypeAlias = jax.Array  # float32[B,P,P]
SemanticLogits: TypeAlias = jax.Array  # float32[B,classes,P,P]
