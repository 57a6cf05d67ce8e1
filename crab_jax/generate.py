"""Generation on device: prefill, one `lax.while_loop` of decode steps, and the states that predict the mask tokens.

Rows are independent: the tokens of a row depend on its own prompt (and, when sampling, on its `index`), never on other
rows, their order, or the padding. The released scripts attend to left padding instead (models/unified_llama.py:
`generate`, `generate_avs`), so that their text depends on the batch.

`generate` is a single program. `stream` runs the same steps a few tokens at a time and passes them to a callback. Both
can go on from prompts whose first part is in a cache already (`Begun`). The rows of a `State` may have chosen different
numbers of tokens, and the slots of a row follow from its own prompt, so a row can be replaced while others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.models.protocol import Cache, Model


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How to decode.

    mask_ids: ids of `<mask_0>` to `<mask_5>`. temperature: 0 decodes greedily. top_p: sample among the fewest most
    probable tokens whose probabilities add up to this. mask_groups: how many groups of mask tokens to keep of an
    answer. force_masks: append the missing mask tokens to an answer that has no complete group. Raises InputError for
    a value outside its range.
    """

    eos_id: int
    pad_id: int
    mask_ids: tuple[int, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    mask_groups: int = 1
    force_masks: bool = False

    def __post_init__(self) -> None:
        least = len(self.mask_ids) + 1 if self.force_masks else 1
        for field, valid, fix in (
            ("max_new_tokens", self.max_new_tokens >= least, f"give a number of tokens of at least {least}"),
            ("temperature", self.temperature >= 0, "give 0 for greedy decoding or a positive temperature"),
            ("top_p", 0 < self.top_p <= 1, "give a probability above 0 and up to 1"),
            ("mask_groups", self.mask_groups >= 1, "give at least 1"),
        ):
            if not valid:
                raise InputError("generation options", field, f"{getattr(self, field)} is out of range", fix)


@flax.struct.dataclass
class Generation:
    """The answers to B prompts, with N = max_new_tokens and G = mask_groups.

    tokens: int32[B,N], new tokens, `pad_id` after the end. lengths: int32[B], number of new tokens, `</s>` included.
    mask_states: [B,G,6,D], hidden states that predicted the mask tokens (those of the position before each) of the last
        G groups, in the order of generation. A group ends at `<mask_5>` and consists of the last six mask tokens. If no
        group ended, the last six mask tokens in any order are one.
    has_mask: bool[B,G], which groups exist; they come first.
    forced: bool[B], whether `force_masks` appended mask tokens.
    finite: bool[B], whether all logits were finite; otherwise the answer of the row is meaningless.
    """

    tokens: jax.Array
    lengths: jax.Array
    mask_states: jax.Array
    has_mask: jax.Array
    forced: jax.Array
    finite: jax.Array


@flax.struct.dataclass
class _Masks:
    """States of the mask tokens so far."""

    window: jax.Array  # [B,6,D] states of the last six mask tokens
    since: jax.Array  # int32[B] mask tokens since the last group ended
    states: jax.Array  # [B,G,6,D] the last G groups, the latest last
    groups: jax.Array  # int32[B] groups that ended
    forced: jax.Array  # int32[B] the token appended last: mask token 1 to 6, 7 for the end token, 0 for none


@flax.struct.dataclass
class Begun:
    """B prompts whose first positions are read already.

    cache: has room for the whole prompts and `max_new_tokens`; it holds `lengths` int32[B] positions of each row, fewer
    than its prompt has. width: an upper bound of the number of positions left.
    """

    cache: Cache
    lengths: jax.Array
    width: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class State:
    """Everything that a decode step reads and writes; the first axis of all but the cache is that of the rows."""

    cache: Cache
    token: jax.Array  # int32[B] the token chosen last
    tokens: jax.Array
    lengths: jax.Array  # int32[B] number of tokens chosen so far
    masks: _Masks
    done: jax.Array  # bool[B] rows that have ended, or have all their tokens
    finite: jax.Array
    prompt_lengths: jax.Array
    first_position: jax.Array  # int32[B] position of the first generated token
    row_keys: jax.Array | None
    dictated: jax.Array | None


def sample(logits: jax.Array, keys: jax.Array | None, temperature: float, top_p: float) -> jax.Array:
    """Choose one token per row, int32[B], from logits float32[B,V] and one random key per row [B].

    Temperature 0 takes the first of the largest and needs no keys.
    """
    if temperature == 0.0:
        # Not `argmax`, whose running maximum the TPU compiler keeps in bfloat16, where near values are ties.
        largest = jnp.max(logits, axis=-1, keepdims=True)
        size = logits.shape[-1]
        first = jnp.min(jnp.where(logits == largest, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
        return first % size  # 0 where nothing equals the largest, which is no number
    assert keys is not None
    logits = logits / temperature
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _collect(masks: _Masks, token: jax.Array, hidden: jax.Array, done: jax.Array, options: GenerateOptions) -> _Masks:
    """Return `masks` after the tokens [B] that the states `hidden` [B,D] predicted; rows that are `done` stay."""
    six = len(options.mask_ids)
    is_mask = (token[:, None] == jnp.asarray(options.mask_ids)).any(axis=-1) & ~done
    shifted = jnp.concatenate([masks.window[:, 1:], hidden[:, None]], axis=1)
    window = jnp.where(is_mask[:, None, None], shifted, masks.window)
    since = masks.since + is_mask
    ended = is_mask & (token == options.mask_ids[-1]) & (since >= six)
    states = jnp.concatenate([masks.states[:, 1:], window[:, None]], axis=1)
    return dataclasses.replace(
        masks,
        window=window,
        since=jnp.where(ended, 0, since),
        groups=masks.groups + ended,
        states=jnp.where(ended[:, None, None, None], states, masks.states),
    )


def _force(masks: _Masks, token: jax.Array, state: State, options: GenerateOptions) -> tuple[jax.Array, jax.Array]:
    """Return the tokens [B], mask tokens in rows that would end without a group, and the new `masks.forced`."""
    six = len(options.mask_ids)
    lacks = (masks.groups == 0) & (masks.since < six) & (masks.forced == 0) & ~state.done
    last_chance = state.lengths >= options.max_new_tokens - 1 - (six - masks.since)
    starts = lacks & ((token == options.eos_id) | last_chance)
    forced = jnp.where(masks.forced > 0, masks.forced + 1, jnp.where(starts, masks.since + 1, 0))
    appended = jnp.asarray((*options.mask_ids, options.eos_id), jnp.int32)[jnp.clip(forced - 1, 0, six)]
    return jnp.where(forced > 0, appended, token), forced


def _choose(apply: Callable[..., Any], state: State, hidden: jax.Array, options: GenerateOptions) -> State:
    """Choose the next token of every row from the hidden states [B,D] that predict it."""
    keys = None if state.row_keys is None else jax.vmap(jax.random.fold_in)(state.row_keys, state.lengths)
    logits = apply(hidden, method="logits")
    token = sample(logits, keys, options.temperature, options.top_p)
    if state.dictated is not None:
        dictated = jnp.take_along_axis(state.dictated, state.lengths[:, None], axis=1, mode="clip")[:, 0]
        token = jnp.where(dictated >= 0, dictated, token)
    masks = state.masks
    if options.force_masks:
        token, forced = _force(masks, token, state, options)
        masks = dataclasses.replace(masks, forced=forced)
    token = jnp.where(state.done, options.pad_id, token)
    place = jnp.arange(options.max_new_tokens) == state.lengths[:, None]
    lengths = state.lengths + ~state.done
    return dataclasses.replace(
        state,
        token=token,
        tokens=jnp.where(place, token[:, None], state.tokens),
        lengths=lengths,
        masks=_collect(masks, token, hidden, state.done, options),
        finite=state.finite & (state.done | jnp.isfinite(logits).all(axis=-1)),
        done=state.done | (token == options.eos_id) | (lengths == options.max_new_tokens),
    )


def _first_position(positions: jax.Array, text_mask: jax.Array) -> jax.Array:
    """Return int32[B]: one more than the largest position, on any axis, of the tokens of each prompt."""
    largest = positions if positions.ndim == 2 else positions.max(axis=-1)
    return jnp.where(text_mask, largest, -1).max(axis=-1).astype(jnp.int32) + 1


def start(
    model: Model,
    params: Any,
    batch: Any,
    options: GenerateOptions,
    rng: jax.Array | None = None,
    dictated: jax.Array | None = None,
    features: jax.Array | None = None,
    begun: Begun | None = None,
) -> State:
    """Read the prompts, or what is left of them, and choose the first token of each.

    The arguments are those of `generate`.
    """
    if options.temperature > 0 and rng is None:
        raise InputError("generation options", "rng", "sampling needs a seed", "pass rng or set temperature to 0")
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    rows, width = batch.text_mask.shape
    lengths = batch.text_mask.sum(axis=-1, dtype=jnp.int32)
    positions = model.positions(batch)
    if begun is None:
        media = () if features is None else (features,)
        hidden, cache = apply(batch, model.empty_cache(rows, width), *media, method="prefill")
        cache, last = model.grown_cache(cache, options.max_new_tokens), lengths - 1
    else:
        # Past the end of a prompt these slots hold nothing that is read: decoding fills them first.
        slots = begun.lengths[:, None] + jnp.arange(begun.width)
        inside = jnp.minimum(slots, width - 1)
        left = jnp.take_along_axis(batch.tokens, inside, axis=1)
        where = jnp.take_along_axis(positions, inside.reshape(*inside.shape, *(1,) * (positions.ndim - 2)), axis=1)
        hidden, cache = apply(left, where, slots, begun.cache, method="decode")
        last = lengths - 1 - begun.lengths
    hidden = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    none = jnp.zeros(rows, jnp.int32)
    group = jnp.zeros((rows, len(options.mask_ids), hidden.shape[-1]), hidden.dtype)
    state = State(
        cache=cache,
        token=none,
        tokens=jnp.full((rows, options.max_new_tokens), options.pad_id, jnp.int32),
        lengths=none,
        masks=_Masks(group, none, jnp.repeat(group[:, None], options.mask_groups, axis=1), none, none),
        done=batch.index < 0,
        finite=jnp.ones(rows, bool),
        prompt_lengths=lengths,
        first_position=_first_position(positions, batch.text_mask),
        row_keys=None if rng is None else jax.vmap(jax.random.fold_in, (None, 0))(rng, batch.index.astype(jnp.uint32)),
        dictated=dictated,
    )
    return _choose(apply, state, hidden, options)


def advance(
    model: Model, params: Any, state: State, options: GenerateOptions, steps: int | jax.Array | None = None
) -> State:
    """Decode `steps` more tokens of every row (by default all that are left), or until all rows have ended."""
    apply: Callable[..., Any] = partial(model.apply, {"params": params})
    limit = options.max_new_tokens if steps is None else steps

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        # The token to read was chosen last: it follows the prompt and the `before` tokens chosen earlier.
        count, state = carry
        before = jnp.maximum(state.lengths - 1, 0)
        positions, slots = (state.first_position + before)[:, None], (state.prompt_lengths + before)[:, None]
        hidden, cache = apply(state.token[:, None], positions, slots, state.cache, method="decode")
        return count + 1, _choose(apply, dataclasses.replace(state, cache=cache), hidden[:, 0], options)

    def goes_on(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < limit) & ~carry[1].done.all()

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), state))[1]


def finish(state: State, options: GenerateOptions) -> Generation:
    """Return what was generated up to `state`, for prompts that are finished or not."""
    masks, kept = state.masks, options.mask_groups
    loose = (masks.groups == 0) & (masks.since >= len(options.mask_ids))  # six mask tokens out of order
    states = jnp.where(loose[:, None, None, None], masks.states.at[:, -1].set(masks.window), masks.states)
    count = jnp.minimum(masks.groups + loose, kept)
    states = jax.vmap(lambda rows, shift: jnp.roll(rows, shift, axis=0))(states, count - kept)
    has_mask = jnp.arange(kept) < count[:, None]
    return Generation(state.tokens, state.lengths, states, has_mask, masks.forced > 0, state.finite)


def generate(
    model: Model,
    params: Any,
    batch: Any,
    options: GenerateOptions,
    rng: jax.Array | None = None,
    dictated: jax.Array | None = None,
    features: jax.Array | None = None,
    begun: Begun | None = None,
) -> Generation:
    """Continue every prompt of `batch` until `</s>` or `max_new_tokens`; stop when all rows have ended.

    model: only its caches, `positions`, `prefill`, `decode` and `logits` are used. batch: right-padded prompts with
    `text_mask` bool[B,L] and `index` int32[B]; rows of index -1 are filler, for which nothing is generated. rng:
    required when sampling; the draws of a row depend on (rng, its index, step). dictated: int32[B,N], tokens to take
    instead of the model's where they are >= 0. features: [B,R,D], the encoded media, which the prefill otherwise
    computes from the batch. begun: the first part of the prompts, read already; what is left holds no media. To
    compile, jit with `model` and `options` static. Raises InputError for sampling without an rng.
    """
    state = start(model, params, batch, options, rng, dictated, features, begun)
    return finish(advance(model, params, state, options), options)


_start = jax.jit(start, static_argnums=(0, 3), donate_argnums=7)
_advance = jax.jit(advance, static_argnums=(0, 3), donate_argnums=2)


def stream(
    model: Model,
    params: Any,
    batch: Any,
    options: GenerateOptions,
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None,
    every: int = 4,
    rng: jax.Array | None = None,
    dictated: jax.Array | None = None,
    features: jax.Array | None = None,
    begun: Begun | None = None,
) -> Generation:
    """Generate like `generate`, and call `on_tokens` after the first token and then after every `every` tokens.

    `on_tokens` receives the tokens so far, int32[B,N], and their lengths, int32[B]; without it, nothing is told. The
    programs are compiled once per shape, whatever the callback, and the cache is donated from call to call, that of
    `begun` too.
    """
    state = _start(model, params, batch, options, rng, dictated, features, begun)
    if on_tokens is None:
        return finish(_advance(model, params, state, options), options)
    while True:
        tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
        on_tokens(tokens, lengths)
        if done.all():
            return finish(state, options)
        state = _advance(model, params, state, options, every)
