"""Measurements of the LoRA router: head weights per task and segment, and losses without a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax import losses
from crab_jax.config import RunConfig
from crab_jax.io.progress import Progress
from crab_jax.models.protocol import Model
from crab_jax.tasks import TASKS
from crab_jax.training.train_step import loss_rows
from crab_jax.visualize import charts
from data_pipelines import mixture
from data_pipelines.batching import Batch
from data_pipelines.examples import Example
from data_pipelines.tokens import Tokenizer

SEGMENTS = ("visual", "audio", "text", "answer")
INTACT, WITHOUT_ALL = "intact", "without all heads"


class Routing(NamedTuple):
    """How the tokens of a task use the LoRA heads.

    P is the number of projections, in the order of charts.PROJECTIONS. weights: float64[segments, layers, P, heads],
    means over the tokens of a segment. entropy: float64[segments, layers, P], mean bits per token. tokens:
    float64[segments]. A segment without tokens holds zeros.
    """

    weights: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray

    def overall(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (weights [layers, P, heads], entropy [layers, P]) over the tokens of all segments."""
        share = self.tokens / max(self.tokens.sum(), 1)
        return np.tensordot(share, self.weights, 1), np.tensordot(share, self.entropy, 1)


def segments(batch: Batch, visual_rows: int) -> jax.Array:
    """Return float32[segments, B, L]: 1 where a position belongs to the segment, 0 for padding and filler rows.

    visual_rows: number of visual rows of the batch's features; the audio rows follow them.
    """
    real = batch.text_mask & (batch.index >= 0)[:, None]
    kinds = (
        (batch.slots >= 0) & (batch.slots < visual_rows),
        batch.slots >= visual_rows,
        (batch.slots < 0) & ~batch.loss_mask,
        (batch.slots < 0) & batch.loss_mask,
    )
    return jnp.stack([kind & real for kind in kinds]).astype(jnp.float32)


@partial(jax.jit, static_argnames="model")
def _route(model: Model, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return sums over the positions of each row and segment.

    weights [B,S,layers,P,heads], entropies (bits) [B,S,layers,P], positions [B,S].
    """
    batch = dataclasses.replace(batch, seg_frame=batch.seg_frame[:, :0])  # masks are decoded after the LLM
    _, sown = model.apply({"params": params}, batch, mutable=["router"])
    by_projection = {path[-2]: value[0] for path, value in traverse_util.flatten_dict(sown["router"]).items()}
    weights = jnp.stack([by_projection[name] for name in charts.PROJECTIONS], axis=1)
    entropy = -(weights * jnp.log2(jnp.maximum(weights, 1e-30))).sum(-1)
    membership = segments(batch, batch.frames.shape[1] * model.cfg.visual_queries)
    return (
        jnp.einsum("lpbth,sbt->bslph", weights, membership),
        jnp.einsum("lpbt,sbt->bslp", entropy, membership),
        membership.sum(-1).T,
    )


def router_weights(model: Model, params: Any, batches: Iterable[Batch]) -> dict[str, Routing]:
    """Return how the tokens of each task use the LoRA heads; every real position counts once, features included."""
    sums: dict[str, list[Any]] = {}
    names = list(TASKS)
    for batch in batches:
        parts = jax.device_get(_route(model, params, jax.tree.map(jnp.asarray, batch)))
        for row in np.flatnonzero(np.asarray(batch.index) >= 0):
            total = sums.setdefault(names[int(batch.task[row])], [0, 0, 0])
            sums[names[int(batch.task[row])]] = [
                old + part[row].astype(np.float64) for old, part in zip(total, parts, strict=True)
            ]
    routing = {}
    for name in names:
        if name in sums:
            weights, entropy, tokens = sums[name]
            each = np.maximum(tokens, 1)
            routing[name] = Routing(weights / each[:, None, None, None], entropy / each[:, None, None], tokens)
    return routing


def keep_heads(params: Any, keep: np.ndarray | jax.Array) -> Any:
    """Return parameters whose LoRA head i contributes `keep[i]` times its former update; 0 removes it.

    keep: float[heads]. The router weights do not change, so the difference is the contribution of the head.
    """
    return traverse_util.unflatten_dict(
        {
            path: leaf * keep[:, None, None] if path[-1] == "lora_B" else leaf
            for path, leaf in traverse_util.flatten_dict(params).items()
        }
    )


@partial(jax.jit, static_argnames="model")
def _answer_losses(model: Model, params: Any, batch: Batch, keep: jax.Array) -> dict[str, losses.Term]:
    """Return the rows of the text loss and, with masks, of the mask losses (see losses.py), with `keep_heads`."""
    output: Any = model.apply({"params": keep_heads(params, keep)}, batch)
    return loss_rows(output, batch)


def ablation(model: Model, params: Any, batches: Sequence[Batch]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {task: {variant: {loss: value}}}: losses with all heads, without each one, and without any.

    text is in nats per token of the true answer; bce, dice and ce are means over the samples with such a mask.
    """
    heads = model.cfg.lora_heads
    every = np.ones(heads, np.float32)
    variants = {
        INTACT: every,
        **{f"without head {head + 1}": every - np.eye(heads, dtype=np.float32)[head] for head in range(heads)},
        WITHOUT_ALL: 0 * every,
    }
    names = list(TASKS)
    progress = Progress("batches judged", len(variants) * len(batches))
    task_losses: dict[str, dict[str, dict[str, float]]] = {}
    for variant, keep in variants.items():
        sums: dict[tuple[str, str], np.ndarray] = {}
        for batch in progress.over(batches):
            terms = jax.device_get(_answer_losses(model, params, jax.tree.map(jnp.asarray, batch), keep))
            for loss, rows in terms.items():
                for task, total, number in zip(np.asarray(batch.task), rows.sum, rows.number, strict=True):
                    if number:
                        key = names[int(task)], loss
                        sums[key] = sums.get(key, np.zeros(2)) + (total, number)
        for (task, loss), (total, number) in sums.items():
            task_losses.setdefault(task, {}).setdefault(variant, {})[loss] = float(total / number)
    return {name: task_losses[name] for name in names if name in task_losses}


def answered_batches(
    examples: Sequence[Example], root: str | Path, config: RunConfig, tokenizer: Tokenizer, batch_size: int
) -> Iterator[Batch]:
    """Return batches of prompts with their true answers, every example once."""
    batches = mixture.eval_batches(
        examples, root, tokenizer, dataclasses.replace(config.data, cache_dir=""), batch_size, prompt_only=False
    )
    return (batch for _, batch in batches)
