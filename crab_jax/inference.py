"""From Examples to predictions.

Encoding clips, answering prompts and drawing masks are three compiled programs, so that what is not needed is neither
run nor compiled again: a clip that was asked about before, a batch without masks.
"""

from __future__ import annotations

import dataclasses
import hashlib
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

PROMPT_FIELDS = ("tokens", "slots", "text_mask", "index")  # of a Batch, all that answering needs beside feature rows
BATCH_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
ENCODED_TOGETHER = 4  # clips
KEPT_BYTES = 2**30  # of feature rows of clips


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


@partial(jax.jit, static_argnames="model")
def _encode(model: Crab, params: Any, frames: jax.Array, fbank: jax.Array) -> jax.Array:
    return model.apply({"params": params}, frames, fbank, method="features")  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("model", "options"))
def _answer(model: Crab, params: Any, prompts: Batch, options: GenerateOptions, features: jax.Array) -> Generation:
    return generate(model, params, prompts, options, features=features)


@partial(jax.jit, static_argnames="model")
def _draw(model: Crab, params: Any, states: jax.Array, pictures: jax.Array) -> dict[str, jax.Array]:
    masks: Any = model.apply({"params": params}, states, pictures, method="masks")
    binary, semantic = masks
    return {"binary": jax.nn.sigmoid(binary.astype(jnp.float32)),
            "semantic": jnp.argmax(semantic, axis=1).astype(jnp.int32)}


class Encoder:
    """Feature rows of clips; a clip that was seen lately is not encoded again, for many questions are about one clip.
    """

    def __init__(self, model: Crab, params: Any):
        self.model, self.params = model, params
        self.kept: dict[bytes, jax.Array] = {}  # rows [R,D] by what was encoded, the latest last

    def __call__(self, batch: Batch) -> jax.Array:
        """Feature rows [B,R,D] of a batch on the host."""
        names = [_digest(frames, fbank) for frames, fbank in zip(batch.frames, batch.fbank, strict=True)]
        first = {name: row for row, name in enumerate(names) if name not in self.kept}
        together = min(ENCODED_TOGETHER, len(names))
        for start in range(0, len(first), together):
            new = list(first)[start:start + together]
            taken = [first[name] for name in new]
            taken += taken[:1] * (together - len(taken))
            rows = _encode(self.model, self.params, batch.frames[taken], batch.fbank[taken])
            self.kept |= dict(zip(new, rows, strict=False))
        found = {name: self.kept.pop(name) for name in dict.fromkeys(names)}
        self.kept |= found
        size = next(iter(found.values())).nbytes
        while len(self.kept) > max(len(found), KEPT_BYTES // max(1, size)):
            del self.kept[next(iter(self.kept))]
        return jnp.stack([found[name] for name in names])


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).data)
    return digest.digest()


def predict_examples(model: Crab, params: Any, config: ConfigDict, tokenizer: Tokenizer, examples: Sequence[Example],
                     root: str | Path, batch_size: int, max_new_tokens: int = 256,
                     **data_changes: Any) -> Iterator[Prediction]:
    """Greedy predictions, one per Example, in the order of the batches: bucket by bucket, and task by task within one,
    because the answers of a task are about equally long.

    `data_changes` replace fields of the DataConfig that the model was trained with. Raises InputError on bad media.
    """
    options = GenerateOptions(tokenizer.eos_id, tokenizer.pad_id, tuple(tokenizer.mask_ids), max_new_tokens)
    order = {name: number for number, name in enumerate(TASKS)}
    examples = sorted(examples, key=lambda example: order[example.task])
    encode = Encoder(model, params)
    for _, batch in eval_batches(examples, root, config, tokenizer, batch_size, **data_changes):
        prompts = Batch(**{name: getattr(batch, name) if name in PROMPT_FIELDS else None for name in BATCH_FIELDS})
        generation = _answer(model, params, prompts, options, encode(batch))
        rows, has_mask = np.asarray(batch.index), np.asarray(generation.has_mask)
        masks: dict[str, Any] = {}
        if batch.seg_frame.shape[1] and has_mask.any():
            masks = jax.device_get(_draw(model, params, generation.mask_states, batch.seg_frame[:, 0]))
        generation = jax.device_get(generation)
        for row in np.flatnonzero(rows >= 0):
            example = examples[rows[row]]
            text = tokenizer.decode(generation.tokens[row, :generation.lengths[row]])
            mask = masks[example.mask_kind][row] if example.mask_kind in masks and has_mask[row] else None
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
