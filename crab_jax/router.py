"""What the LoRA router does: weights of the heads per task and segment, and losses without a head."""

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
    """How the tokens of a task use the LoRA heads; P is the order of charts.PROJECTIONS, bits are of one token.

    weights: float64[segments, layers, P, heads], means over the tokens of a segment. entropy: float64[segments, layers,
    P] in bits. tokens: float64[segments]. A segment without tokens holds zeros.
    """

    weights: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray

    def overall(self) -> tuple[np.ndarray, np.ndarray]:
        """(weights [layers, P, heads], entropy [layers, P]) over all tokens, whatever their segment."""
        share = self.tokens / max(self.tokens.sum(), 1)
        return np.tensordot(share, self.weights, 1), np.tensordot(share, self.entropy, 1)


def segments(batch: Batch, visual_rows: int) -> jax.Array:
    """float32[segments, B, L]: 1 where a position belongs to the segment; padding and filler rows belong to none.

    `visual_rows` is how many rows of the batch's features are visual: the audio rows come behind them.
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
    """Sums over the positions of each row and segment: weights [B,S,layers,P,heads], entropies (bits) [B,S,layers,P],
    positions [B,S]."""
    batch = batch.replace(seg_frame=batch.seg_frame[:, :0])  # masks are decoded after the LLM
    _, sown = model.apply({"params": params}, batch, mutable=["router"])
    found = {path[-2]: value[0] for path, value in traverse_util.flatten_dict(sown["router"]).items()}
    weights = jnp.stack([found[name] for name in charts.PROJECTIONS], axis=1)
    entropy = -(weights * jnp.log2(jnp.maximum(weights, 1e-30))).sum(-1)
    where = segments(batch, batch.frames.shape[1] * model.cfg.visual_queries)
    return (
        jnp.einsum("lpbth,sbt->bslph", weights, where),
        jnp.einsum("lpbt,sbt->bslp", entropy, where),
        where.sum(-1).T,
    )


def router_weights(model: Model, params: Any, batches: Iterable[Batch]) -> dict[str, Routing]:
    """How the tokens of each task use the LoRA heads; every real position counts once, features included."""
    sums: dict[str, list[Any]] = {}
    names = list(TASKS)
    for batch in batches:
        parts = jax.device_get(_route(model, params, jax.tree.map(jnp.asarray, batch)))
        for row in np.flatnonzero(np.asarray(batch.index) >= 0):
            total = sums.setdefault(names[int(batch.task[row])], [0, 0, 0])
            sums[names[int(batch.task[row])]] = [
                old + part[row].astype(np.float64) for old, part in zip(total, parts, strict=True)
            ]
    found = {}
    for name in names:
        if name in sums:
            weights, entropy, tokens = sums[name]
            each = np.maximum(tokens, 1)
            found[name] = Routing(weights / each[:, None, None, None], entropy / each[:, None, None], tokens)
    return found


def keep_heads(params: Any, keep: np.ndarray | jax.Array) -> Any:
    """Parameters whose LoRA head i adds `keep[i]` times what it added: with 0 it is taken out.

    keep: float[heads]. Router weights stay what they are, so the difference is what the head contributes.
    """
    return traverse_util.unflatten_dict(
        {
            path: leaf * keep[:, None, None] if path[-1] == "lora_B" else leaf
            for path, leaf in traverse_util.flatten_dict(params).items()
        }
    )


@partial(jax.jit, static_argnames="model")
def _answer_losses(model: Model, params: Any, batch: Batch, keep: jax.Array) -> dict[str, losses.Term]:
    """Rows of the text loss and, for a batch with masks, of the mask losses (see losses.py), with `keep_heads`."""
    output: Any = model.apply({"params": keep_heads(params, keep)}, batch)
    return loss_rows(output, batch)


def ablation(model: Model, params: Any, batches: Sequence[Batch]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {variant: {loss: value}}}: losses with all heads, without each one, and without any.

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
    found: dict[str, dict[str, dict[str, float]]] = {}
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
            found.setdefault(task, {}).setdefault(variant, {})[loss] = float(total / number)
    return {name: found[name] for name in names if name in found}


def answered_batches(
    examples: Sequence[Example], root: str | Path, config: RunConfig, tokenizer: Tokenizer, batch_size: int
) -> Iterator[Batch]:
    """Batches of prompts with their true answers, every example once."""
    found = mixture.eval_batches(
        examples, root, tokenizer, dataclasses.replace(config.data, cache_dir=""), batch_size, prompt_only=False
    )
    return (batch for _, batch in found)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Up to `count` examples of each task, evenly spread over the list."""
    chosen = []
    for task in TASKS:
        ours = [example for example in examples if example.task == task]
        chosen += [ours[i * len(ours) // count] for i in range(count)] if len(ours) > count else ours
    return chosen
