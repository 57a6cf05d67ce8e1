"""Text and mask losses as sums with counts, divided once.

Sums and counts add over samples, micro-batches and hosts, so the total does not depend on how a batch was split.
Source: paper section 3.4; models/multimodal_encoder.py (`SegModule.forward`) and models/loss.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from crab_jax.io import bounds
from crab_jax.io.bounds import Bound, Choice, Real

CHUNK = 128  # targets of a row whose logits exist at a time
BINARY, SEMANTIC = 1, 2  # values of `seg_kind`; 0: no mask


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms, and how mask terms are pooled.

    reduction: "mean" averages over the mask samples of a batch. "released" follows the released code: terms are summed
    over samples and each sum is scaled by its kind's share of the mask samples, so it grows with the batch.
    """

    text: float = 1.0
    bce: float = 1.0
    dice: float = 0.5
    ce: float = 1.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        bounds.check("loss", vars(self), BOUNDS)


BOUNDS: dict[str, Bound] = {
    **{term: Real(1e-9, 1e9, zero=True) for term in ("text", "bce", "dice", "ce")},
    "reduction": Choice(("mean", "released")),
}


class Term(NamedTuple):
    """A sum of losses and the number of things summed; both [B] per sample or both scalars."""

    sum: jax.Array
    number: jax.Array


def text_rows(logits: jax.Array, tokens: jax.Array, loss_mask: jax.Array, valid: jax.Array) -> Term:
    """Return the cross-entropy of the target tokens of each row.

    logits [B,L,V] (position i-1 predicts token i), tokens int[B,L], loss_mask bool[B,L], valid bool[B] (false for
    filler rows). Returns sums float32[B] in nats and counts float32[B] of target tokens.
    """
    logits, labels = logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    counted = loss_mask[:, 1:] & valid[:, None]
    loss = jnp.where(counted, _cross_entropy(logits, labels), 0)
    return Term(loss.sum(1), counted.sum(1, dtype=jnp.float32))


def text_rows_of(
    hidden: jax.Array,
    matrix: jax.Array,
    vocab_size: int,
    tokens: jax.Array,
    loss_mask: jax.Array,
    valid: jax.Array,
    chunk: int = CHUNK,
) -> Term:
    """Return `text_rows` of the logits of `hidden`, which are computed at the positions that predict targets only.

    hidden [B,L,D], the output matrix [D,V], of whose columns the first `vocab_size` are tokens, and the arguments of
    `text_rows`. Targets are few (an answer, not the prompt and its media), so their positions come first, and `chunk`
    of every row are taken at a time until no row has more; the logits of one chunk exist at a time, in the backward
    pass too.
    """
    length = tokens.shape[1] - 1
    chunk = min(chunk, length)
    counted = loss_mask[:, 1:] & valid[:, None]
    numbers = counted.sum(1)
    # Positions of targets in their order, then the others, up to a multiple of the chunk.
    places = jnp.pad(jnp.argsort(~counted, axis=1, stable=True), [(0, 0), (0, -length % chunk)])
    labels = jnp.take_along_axis(tokens, places + 1, axis=1)
    total = _sum_of_targets(vocab_size, chunk, hidden, matrix, places, labels, numbers)
    return Term(total, numbers.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_targets(
    vocab_size: int,
    chunk: int,
    hidden: jax.Array,
    matrix: jax.Array,
    places: jax.Array,
    labels: jax.Array,
    numbers: jax.Array,
) -> jax.Array:
    """Return the cross-entropy float32[B], summed over the first `numbers` int[B] of `places` and `labels` int[B,N].

    A loop that ends with the last target cannot be differentiated by JAX, hence the gradient of its own.
    """

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        place, label, wanted = _chunk_of(places, labels, numbers, step, chunk)
        logits = _logits_at(hidden, matrix, place, vocab_size)
        return total + jnp.where(wanted, _cross_entropy(logits, label), 0).sum(1)

    total: jax.Array = jax.lax.fori_loop(0, _chunks(numbers, chunk), add, jnp.zeros(len(hidden), jnp.float32))
    return total


def _sum_forward(vocab_size: int, chunk: int, *args: Any) -> tuple[jax.Array, Any]:
    """Return the sum, and what the gradient needs; the last of it is None if the matrix is frozen."""
    values = tuple(arg.value for arg in args)
    trained = jnp.zeros(()) if args[1].perturbed else None
    return _sum_of_targets(vocab_size, chunk, *values), (values, trained)


def _sum_backward(vocab_size: int, chunk: int, kept: Any, cotangent: Any) -> tuple[Any, ...]:
    (hidden, matrix, places, labels, numbers), trained = kept
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)

    def add(step: jax.Array, grads: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        of_hidden, of_matrix = grads
        place, label, wanted = _chunk_of(places, labels, numbers, step, chunk)
        logits = _logits_at(hidden, matrix, place, vocab_size)
        hit = jnp.arange(logits.shape[-1]) == label[..., None]
        weight = jnp.where(wanted, cotangent[:, None], 0)[..., None]
        of_logits = ((jax.nn.softmax(logits) - hit) * weight).astype(hidden.dtype)
        of_states = jnp.einsum("bnv,dv->bnd", of_logits, matrix.astype(hidden.dtype))
        of_hidden = jax.vmap(lambda row, at, more: row.at[at].add(more))(of_hidden, place, of_states)
        if of_matrix is not None:
            states = jnp.take_along_axis(hidden, place[..., None], axis=1)
            of_matrix += jnp.einsum("bnd,bnv->dv", states, of_logits, preferred_element_type=jnp.float32)
        return of_hidden, of_matrix

    zero = jnp.zeros_like(hidden), None if trained is None else jnp.zeros(matrix.shape, jnp.float32)
    of_hidden, of_matrix = jax.lax.fori_loop(0, _chunks(numbers, chunk), add, zero)
    return of_hidden, None if of_matrix is None else of_matrix.astype(matrix.dtype), None, None, None


_sum_of_targets.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _chunks(numbers: jax.Array, chunk: int) -> jax.Array:
    """Return how many chunks the row with the most targets has."""
    return -(-numbers.max() // chunk)


def _chunk_of(
    places: jax.Array, labels: jax.Array, numbers: jax.Array, step: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the places and labels int[B,chunk] of a chunk, and bool[B,chunk]: which of them are targets."""
    place, label = (jax.lax.dynamic_slice_in_dim(x, step * chunk, chunk, axis=1) for x in (places, labels))
    return place, label, step * chunk + jnp.arange(chunk) < numbers[:, None]


def _logits_at(hidden: jax.Array, matrix: jax.Array, places: jax.Array, vocab_size: int) -> jax.Array:
    """Return the logits float32[B,N,V] at places int[B,N] of hidden [B,L,D]; those past `vocab_size` are -inf."""
    states = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = jnp.matmul(states, matrix.astype(states.dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy float32[...] in nats of labels int[...], from logits float32[...,V]."""
    # A masked sum instead of a gather: it is exact, its gradient needs no scatter, and a sharded vocabulary stays so.
    hit = jnp.arange(logits.shape[-1]) == labels[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)


def bce_rows(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean binary cross-entropy over pixels: logits [B,H,W], target [B,H,W] of 0 and 1 -> float32[B]."""
    logits, target = logits.astype(jnp.float32), target.astype(jnp.float32)
    return (jax.nn.softplus(logits) - logits * target).mean((1, 2))


def dice_rows(logits: jax.Array, target: jax.Array, scale: float = 1000.0, epsilon: float = 1e-6) -> jax.Array:
    """Return one minus the soft Dice coefficient: logits [B,H,W], target [B,H,W] of 0 and 1 -> float32[B].

    Areas are divided by `scale` before `epsilon` smooths them, as released: an empty target costs about 1 unless the
    predicted area is far below one pixel.
    """
    probability, target = jax.nn.sigmoid(logits.astype(jnp.float32)), target.astype(jnp.float32)
    overlap = (probability / scale * target).sum((1, 2))
    areas = (probability / scale).sum((1, 2)) + (target / scale).sum((1, 2))
    return 1 - (2 * overlap + epsilon) / (areas + epsilon)


def ce_rows(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Return the mean class cross-entropy over pixels, background included.

    logits [B,K,H,W], int target [B,H,W] -> float32[B].
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, target[:, None].astype(jnp.int32), axis=1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=1) - picked).mean((1, 2))


def mask_rows(
    binary: jax.Array | None, semantic: jax.Array | None, target: jax.Array, kind: jax.Array, valid: jax.Array
) -> dict[str, Term]:
    """Return the mask terms of each row: {"bce", "dice", "ce"}, each with sums and counts float32[B].

    binary [B,H,W] and semantic [B,K,H,W] logits (None when no row of the batch is of that kind), target int[B,H,W] (0/1
    or class ids), kind int[B] (`seg_kind`), valid bool[B].
    """
    terms = {}
    for name, loss, logits, wanted in (
        ("bce", bce_rows, binary, BINARY),
        ("dice", dice_rows, binary, BINARY),
        ("ce", ce_rows, semantic, SEMANTIC),
    ):
        counted = (kind == wanted) & valid
        if logits is None:
            zero = jnp.zeros(kind.shape, jnp.float32)
            terms[name] = Term(zero, zero)
        else:
            terms[name] = Term(jnp.where(counted, loss(logits, target), 0), counted.astype(jnp.float32))
    return terms


def pool(rows: Term) -> Term:
    """Return the scalar sum and count of a term's rows."""
    return Term(rows.sum.sum(), rows.number.sum())


def by_task(rows: Term, task: jax.Array, tasks: int) -> Term:
    """Return sums and counts float32[tasks] of a term's rows, by `task` int[B]."""
    return Term(*(jax.ops.segment_sum(x, task, num_segments=tasks) for x in rows))


def text_loss(logits: jax.Array, tokens: jax.Array, loss_mask: jax.Array, valid: jax.Array) -> Term:
    """Return the scalar sum and count of `text_rows`."""
    return pool(text_rows(logits, tokens, loss_mask, valid))


def mask_losses(
    binary: jax.Array | None, semantic: jax.Array | None, target: jax.Array, kind: jax.Array, valid: jax.Array
) -> dict[str, Term]:
    """Return the scalar sums and counts of `mask_rows`."""
    return {name: pool(rows) for name, rows in mask_rows(binary, semantic, target, kind, valid).items()}


def total(losses: dict[str, Term], cfg: LossConfig, counts: dict[str, jax.Array] | None = None) -> jax.Array:
    """Return the scalar to minimise, from scalar terms "text", and optionally "bce", "dice" and "ce".

    counts: the counts to divide by, instead of the terms' own. With the counts of a whole batch (see `batch_counts`)
    the totals of its micro-batches add up to the total of the batch.
    """
    counts = {name: term.number for name, term in losses.items()} if counts is None else counts
    value = cfg.text * losses["text"].sum / jnp.maximum(counts["text"], 1)
    if "ce" not in losses:
        return value
    masks = jnp.maximum(counts["bce"] + counts["ce"], 1)
    binary = cfg.bce * losses["bce"].sum + cfg.dice * losses["dice"].sum
    semantic = cfg.ce * losses["ce"].sum
    if cfg.reduction == "released":
        binary, semantic = binary * counts["bce"], semantic * counts["ce"]
    return value + (binary + semantic) / masks


def batch_counts(loss_mask: jax.Array, kind: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """Return the counts of every term from the batch alone.

    loss_mask bool[B,L], kind int[B] or [B,M], valid bool[B].
    """
    kind = kind.reshape(kind.shape[0], -1)
    of_kind = {wanted: ((kind == wanted) & valid[:, None]).sum(dtype=jnp.float32) for wanted in (BINARY, SEMANTIC)}
    text = (loss_mask[:, 1:] & valid[:, None]).sum(dtype=jnp.float32)
    return {"text": text, "bce": of_kind[BINARY], "dice": of_kind[BINARY], "ce": of_kind[SEMANTIC]}
