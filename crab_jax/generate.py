"""Generation on device: prefill, one `lax.while_loop` of decode steps, and the states behind the mask tokens.

Rows are independent: a row's tokens depend on its own prompt (and, when sampling, on its `index`), never on its
neighbours, their order, or the padding. The released scripts attend to left pads instead (models/unified_llama.py:
`generate`, `generate_avs`), so their text depends on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crab_jax.errors import InputError
from crab_jax.models.llama import KVCache, grow_cache, init_cache


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How to decode. `mask_ids` are the ids of `<mask_0>` ... `<mask_5>`; temperature 0 is greedy; `top_p` keeps the
    fewest tokens whose probability reaches it. Raises InputError on values outside their range."""

    eos_id: int
    pad_id: int
    mask_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for field, valid, fix in (
                ("max_new_tokens", self.max_new_tokens >= 1, "give a number of tokens of at least 1"),
                ("temperature", self.temperature >= 0, "give 0 for greedy decoding or a positive temperature"),
                ("top_p", 0 < self.top_p <= 1, "give a probability above 0 and up to 1")):
            if not valid:
                raise InputError("generation options", field, f"{getattr(self, field)} is out of range", fix)


@flax.struct.dataclass
class Generation:
    """What was generated for B rows, N = max_new_tokens.

    tokens int32[B,N]: new tokens, `pad_id` after the end. lengths int32[B]: how many, `</s>` included.
    mask_states [B,6,D]: hidden states that PREDICTED the (last) six mask tokens, in the order of generation.
    has_mask bool[B]: whether there were six; if not, `mask_states` is not meaningful.
    """

    tokens: jax.Array
    lengths: jax.Array
    mask_states: jax.Array
    has_mask: jax.Array


@flax.struct.dataclass
class _State:
    step: jax.Array  # number of tokens chosen so far
    cache: KVCache
    tokens: jax.Array
    lengths: jax.Array
    mask_states: jax.Array
    mask_count: jax.Array
    done: jax.Array


def sample(logits: jax.Array, keys: jax.Array | None, temperature: float, top_p: float) -> jax.Array:
    """One token per row: logits float32[B,V], one key per row [B] -> int32[B]. Temperature 0 is the argmax,
    which needs no keys."""
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert keys is not None
    logits = logits / temperature
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def generate(model: nn.Module, params: Any, batch: Any, options: GenerateOptions, rng: jax.Array | None = None,
             forced: jax.Array | None = None, features: jax.Array | None = None) -> Generation:
    """Continue every prompt of `batch` until `</s>` or `max_new_tokens`; stops when all rows have ended.

    `model` has `cfg.llama` and the methods `prefill(batch, cache)`, `decode(token, positions, cache)` and
    `logits(hidden)`. `batch` holds right-padded prompts: `text_mask` bool[B,L] and `index` int32[B] (rows of index -1
    are filler and generate nothing). `rng` is needed when sampling: a row's draws come from (rng, its index, step).
    `forced` int32[B,N] dictates tokens where it is >= 0. `features` [B,R,D] are what the prefill would make of the
    batch's media. To compile, jit with `model` and `options` static.
    """
    if options.temperature > 0 and rng is None:
        raise InputError("generation options", "rng", "sampling needs a seed", "pass rng or set temperature to 0")
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    rows, width = batch.text_mask.shape
    prompt_lengths = batch.text_mask.sum(axis=-1, dtype=jnp.int32)
    mask_ids = jnp.asarray(options.mask_ids, jnp.int32)
    row_keys = None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, batch.index.astype(jnp.uint32))

    def choose(state: _State, hidden: jax.Array) -> _State:
        """Take the next token of every row from the hidden states [B,D] that predict it."""
        keys = None if row_keys is None else jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.step)
        token = sample(apply(hidden, method="logits"), keys, options.temperature, options.top_p)
        if forced is not None:
            token = jnp.where(forced[:, state.step] >= 0, forced[:, state.step], token)
        token = jnp.where(state.done, options.pad_id, token)
        is_mask = (token[:, None] == mask_ids).any(axis=-1) & ~state.done
        shifted = jnp.concatenate([state.mask_states[:, 1:], hidden[:, None]], axis=1)
        return state.replace(
            step=state.step + 1,
            tokens=state.tokens.at[:, state.step].set(token),
            lengths=state.lengths + ~state.done,
            mask_states=jnp.where(is_mask[:, None, None], shifted, state.mask_states),
            mask_count=state.mask_count + is_mask,
            done=state.done | (token == options.eos_id))

    def advance(state: _State) -> _State:
        """Feed the last token, which stands right after the prompt and the tokens before it."""
        positions = (prompt_lengths + state.step - 1)[:, None]
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        hidden, cache = apply(token, positions, state.cache, method="decode")
        return choose(state.replace(cache=cache), hidden[:, 0])

    def unfinished(state: _State) -> jax.Array:
        return (state.step < options.max_new_tokens) & ~state.done.all()

    media = () if features is None else (features,)
    hidden, cache = apply(batch, init_cache(model.cfg.llama, rows, width), *media, method="prefill")
    last = jnp.take_along_axis(hidden, jnp.maximum(prompt_lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    state = _State(
        step=jnp.int32(0),
        cache=grow_cache(cache, options.max_new_tokens),
        tokens=jnp.full((rows, options.max_new_tokens), options.pad_id, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        mask_states=jnp.zeros((rows, len(options.mask_ids), last.shape[-1]), last.dtype),
        mask_count=jnp.zeros(rows, jnp.int32),
        done=batch.index < 0)
    state = jax.lax.while_loop(unfinished, advance, choose(state, last))
    return Generation(state.tokens, state.lengths, state.mask_states, state.mask_count >= len(options.mask_ids))
