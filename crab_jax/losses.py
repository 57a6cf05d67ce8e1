"""Text and mask losses as sums with counts, divided once.

Sums and counts add over samples, micro-batches and hosts, so the total does not depend on how a batch was split.
Source: paper section 3.4; models/multimodal_encoder.py (`SegModule.forward`) and models/loss.py.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crab_jax.io import bounds
from crab_jax.io.bounds import Bound, Choice, Real

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
    # A masked sum instead of a gather: it is exact, its gradient needs no scatter, and a sharded vocabulary stays so.
    hit = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.where(hit, logits, 0).sum(-1)
    counted = loss_mask[:, 1:] & valid[:, None]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    return Term(jnp.where(counted, loss, 0).sum(1), counted.sum(1, dtype=jnp.float32))


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
