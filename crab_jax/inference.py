"""From Examples to predictions: prompt batches, generation, and the mask decoder, one compilation per bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from crab_jax.generate import GenerateOptions, Generation, generate
from crab_jax.models.crab import Crab
from crab_jax.runs import eval_batches
from crab_jax.tasks import TASKS
from data_pipelines.batching import Batch
from data_pipelines.examples import Example
from data_pipelines.tokens import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model answered to one Example.

    text: decoded up to `</s>`, without special tokens. parsed: what the task's parser read in it, or None.
    mask: at the model's picture size, None when the task has none or too few mask tokens were written: float32[H,W]
    probabilities (binary tasks) or int32[H,W] class ids (semantic). warnings: why a part is missing.
    """

    example: Example
    text: str
    parsed: Any
    mask: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


@partial(jax.jit, static_argnames=("model", "options"))
def answer(model: Crab, params: Any, batch: Batch,
           options: GenerateOptions) -> tuple[Generation, jax.Array | None, jax.Array | None]:
    """(generation, binary probabilities float32[B,H,W], class ids int32[B,H,W]); no masks for a batch with M = 0."""
    generation = generate(model, params, batch, options)
    if not batch.seg_frame.shape[1]:
        return generation, None, None
    masks: Any = model.apply({"params": params}, generation.mask_states, batch.seg_frame[:, 0], method="masks")
    binary, semantic = masks
    return generation, jax.nn.sigmoid(binary.astype(jnp.float32)), jnp.argmax(semantic, axis=1).astype(jnp.int32)


def predict_examples(model: Crab, params: Any, config: ConfigDict, tokenizer: Tokenizer, examples: Sequence[Example],
                     root: str | Path, batch_size: int, max_new_tokens: int = 256,
                     **data_changes: Any) -> Iterator[Prediction]:
    """Greedy predictions, one per Example, in the order of the batches (bucket by bucket).

    `data_changes` replace fields of the DataConfig that the model was trained with. Raises InputError on bad media.
    """
    options = GenerateOptions(tokenizer.eos_id, tokenizer.pad_id, tuple(tokenizer.mask_ids), max_new_tokens)
    for _, batch in eval_batches(list(examples), root, config, tokenizer, batch_size, **data_changes):
        rows = np.asarray(batch.index)
        generation, binary, semantic = jax.device_get(answer(model, params, jax.tree.map(jnp.asarray, batch), options))
        for row in np.flatnonzero(rows >= 0):
            example = examples[rows[row]]
            text = tokenizer.decode(generation.tokens[row, :generation.lengths[row]])
            masks = {"binary": binary, "semantic": semantic}.get(example.mask_kind)
            mask = masks[row] if masks is not None and generation.has_mask[row] else None
            yield read_answer(example, text, mask, ended=tokenizer.eos_id in generation.tokens[row])


def read_answer(example: Example, text: str, mask: np.ndarray | None, ended: bool = True) -> Prediction:
    """Parse one answer and say what is wrong with it; `ended` is whether the model closed it with `</s>`."""
    task = TASKS[example.task]
    parsed = task.parse(text)
    problems = {
        "the answer did not end within the allowed number of tokens": not ended,
        f"the text cannot be read as an answer to {example.task}": parsed is None,
        "fewer than six mask tokens were written, so there is no mask": example.mask_kind != "none" and mask is None,
    }
    return Prediction(example, text, parsed, mask, tuple(problem for problem, found in problems.items() if found))
