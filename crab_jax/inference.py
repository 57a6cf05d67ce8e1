"""Inference: predictions from Examples.

Encoding clips, answering prompts and drawing masks are three compiled programs. A clip that was encoded recently is not
encoded again, and a batch without masks neither compiles nor runs the mask decoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crab_jax.config import RunConfig
from crab_jax.generate import GenerateOptions, Generation, generate, stream
from crab_jax.io.errors import InputError
from crab_jax.models.protocol import Model
from crab_jax.parallel import sharding
from crab_jax.runs.run_data import eval_batches
from crab_jax.tasks import TASKS
from data_pipelines.batching import Batch
from data_pipelines.decoded import Root
from data_pipelines.examples import Example
from data_pipelines.tokens import Tokenizer

PROMPT_FIELDS = ("tokens", "slots", "text_mask", "index")  # of a Batch, what answering needs besides feature rows
BATCH_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
ENCODED_TOGETHER = 4  # clips per call, for each copy of the model
KEPT_BYTES = 2**30  # bound of the feature rows that are kept of earlier clips


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's answer to one Example.

    text: decoded up to `</s>`, without special tokens. parsed: the result of the task's parser, None for text that it
        cannot read.
    mask: float32[H,W] probabilities (binary tasks) or int32[H,W] class ids (semantic tasks) at the model's picture
        size; None when the task has no masks or too few mask tokens were generated.
    warnings: why a part is missing or was forced. further_masks: masks of the groups after the first, when several
        were requested.
    """

    example: Example
    text: str
    parsed: Any
    mask: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    further_masks: tuple[np.ndarray, ...] = ()


@partial(jax.jit, static_argnames=("model", "mesh"))
def _encode(model: Model, params: Any, frames: jax.Array, fbank: jax.Array, mesh: Mesh | None) -> jax.Array:
    with sharding.constrained(mesh):
        rows: jax.Array = model.apply({"params": params}, frames, fbank, method="features")
    if mesh is not None:
        rows = jax.lax.with_sharding_constraint(rows, sharding.replicated(mesh))
    return rows


@partial(jax.jit, static_argnames=("model", "options", "mesh"))
def _answer(
    model: Model,
    params: Any,
    prompts: Batch,
    options: GenerateOptions,
    rng: jax.Array | None,
    features: jax.Array,
    mesh: Mesh | None,
) -> Generation:
    with sharding.constrained(mesh):
        return generate(model, params, prompts, options, rng, features=features)


@partial(jax.jit, static_argnames=("model", "mesh"))
def _draw(model: Model, params: Any, states: jax.Array, pictures: jax.Array, mesh: Mesh | None) -> dict[str, jax.Array]:
    with sharding.constrained(mesh):
        return draw(model, params, states, pictures)


def draw(model: Model, params: Any, states: jax.Array, pictures: jax.Array) -> dict[str, jax.Array]:
    """Return the masks of `pictures` uint8[B,H,W,3] from the states [B,6,D] that predict their mask tokens.

    "binary" holds probabilities float32[B,H,W], "semantic" class ids int32[B,H,W], and "finite" bool[B] whether all
    mask logits were finite.
    """
    masks: Any = model.apply({"params": params}, states, pictures, method="masks")
    binary, semantic = masks
    return {
        "binary": jax.nn.sigmoid(binary.astype(jnp.float32)),
        "semantic": jnp.argmax(semantic, axis=1).astype(jnp.int32),
        "finite": jnp.isfinite(binary).all((1, 2)) & jnp.isfinite(semantic).all((1, 2, 3)),
    }


def spread(tree: Any, mesh: Mesh | None) -> Any:
    """Return the arrays [B,...] of `tree` with their rows spread over the copies of the model."""
    return tree if mesh is None else jax.device_put(tree, sharding.batch_sharding(mesh))


class Encoder:
    """Encoder of clips that keeps recent feature rows, because many questions are often about one clip."""

    def __init__(self, model: Model, params: Any, mesh: Mesh | None = None):
        self.model, self.params, self.mesh = model, params, mesh
        self.kept: dict[bytes, jax.Array] = {}  # rows [R,D] by the digest of their media, latest last

    def __call__(self, batch: Batch) -> jax.Array:
        """Return the feature rows [B,R,D] of a batch on the host."""
        names = [_digest(frames, fbank) for frames, fbank in zip(batch.frames, batch.fbank, strict=True)]
        first = {name: row for row, name in enumerate(names) if name not in self.kept}
        copies = 1 if self.mesh is None else self.mesh.shape["data"]
        together = min(copies * ENCODED_TOGETHER, len(names))
        for start in range(0, len(first), together):
            new = list(first)[start : start + together]
            taken = [first[name] for name in new]
            taken += taken[:1] * (together - len(taken))
            clips = spread((batch.frames[taken], batch.fbank[taken]), self.mesh)
            rows = _encode(self.model, self.params, *clips, self.mesh)
            self.kept |= dict(zip(new, rows, strict=False))
        needed = {name: self.kept.pop(name) for name in dict.fromkeys(names)}
        self.kept |= needed
        size = next(iter(needed.values())).nbytes
        while len(self.kept) > max(len(needed), KEPT_BYTES // max(1, size)):
            del self.kept[next(iter(self.kept))]
        return jnp.stack([needed[name] for name in names])


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).data)
    return digest.digest()


def predict_examples(
    model: Model,
    params: Any,
    config: RunConfig,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    root: Root,
    batch_size: int,
    max_new_tokens: int = 256,
    seed: int = 0,
    decoding: Mapping[str, Any] | None = None,
    on_text: Callable[[Example, str], None] | None = None,
    mesh: Mesh | None = None,
    **data_changes: Any,
) -> Iterator[Prediction]:
    """Yield one Prediction per Example, bucket by bucket and, within a bucket, task by task.

    This order keeps the answers of a batch about equally long. Decoding is greedy unless
    `decoding` (fields of GenerateOptions) says otherwise; samples depend on `seed` and the id of the Example. `on_text`
    is called with each Example and every new piece of its text. `mesh` is the mesh that the model was loaded on; the
    rows of a batch are spread over the copies of the model. `data_changes` replace fields of the DataConfig that the
    model was trained with. Raises InputError for bad media and for logits that are not finite.
    """
    options = GenerateOptions(
        tokenizer.eos_id, tokenizer.pad_id, tuple(tokenizer.mask_ids), max_new_tokens, **(decoding or {})
    )
    order = {name: number for number, name in enumerate(TASKS)}
    examples = sorted(examples, key=lambda example: order[example.task])
    rng = jax.random.key(seed) if options.temperature else None
    encode = Encoder(model, params, mesh)
    for _, batch in eval_batches(examples, root, config, tokenizer, batch_size, **data_changes):
        rows, features = np.asarray(batch.index), encode(batch)
        prompts = Batch(**{name: getattr(batch, name) if name in PROMPT_FIELDS else None for name in BATCH_FIELDS})
        if rng is not None:
            prompts = dataclasses.replace(
                prompts,
                index=np.array(
                    [-1 if row < 0 else zlib.crc32(examples[row].id.encode()) >> 1 for row in rows], np.int32
                ),
            )
        prompts, features = spread((prompts, features), mesh)
        chosen = dataclasses.replace(options, force_masks=options.force_masks and batch.seg_frame.shape[1] > 0)
        if on_text is None:
            generation = _answer(model, params, prompts, chosen, rng, features, mesh)
        else:
            tell = _teller(tokenizer, [examples[row] if row >= 0 else None for row in rows], on_text)
            with sharding.constrained(mesh):
                generation = stream(model, params, prompts, chosen, tell, rng=rng, features=features)
        has_mask = np.asarray(generation.has_mask)
        drawn: list[Any] = []  # one entry per mask group
        if batch.seg_frame.shape[1]:
            drawn = [
                jax.device_get(
                    _draw(model, params, *spread((generation.mask_states[:, group], batch.seg_frame[:, 0]), mesh), mesh)
                )
                for group in range(has_mask.shape[1])
                if has_mask[:, group].any()
            ]
        generation = jax.device_get(generation)
        for row in np.flatnonzero(rows >= 0):
            example = examples[rows[row]]
            drew = [masks["finite"][row] for group, masks in enumerate(drawn) if has_mask[row, group]]
            check_finite(example, generation.finite[row], all(drew))
            text = tokenizer.decode(generation.tokens[row])
            masks = [
                masks[example.mask_kind][row]
                for group, masks in enumerate(drawn)
                if example.mask_kind in masks and has_mask[row, group]
            ]
            answer = read_answer(
                example,
                text,
                masks[0] if masks else None,
                tokenizer.eos_id in generation.tokens[row],
                bool(generation.forced[row]),
            )
            yield dataclasses.replace(answer, further_masks=tuple(masks[1:]))


def check_finite(example: Example, logits: bool, masks: bool = True) -> None:
    """Raise InputError when logits or masks were not finite: the answer would be scored as an empty one."""
    if not (logits and masks):
        raise InputError(
            f"example {example.id!r}",
            "masks" if logits else "logits",
            f"the {'masks' if logits else 'logits'} of the model are not finite",
            "use other weights, a wider dtype (bfloat16, float32), or --weights float",
        )


def _teller(
    tokenizer: Tokenizer, examples: Sequence[Example | None], on_text: Callable[[Example, str], None]
) -> Callable[[np.ndarray, np.ndarray], None]:
    """Return a callback for `stream` that passes the new text of each row to `on_text`.

    A character is held back until all of its bytes are generated. Rows whose example is None are filler.
    """
    passed_on = [""] * len(examples)

    def tell(tokens: np.ndarray, lengths: np.ndarray) -> None:
        for row, example in enumerate(examples):
            text = tokenizer.decode(tokens[row, : lengths[row]]).removesuffix("\ufffd")
            if example is not None and len(text) > len(passed_on[row]):
                on_text(example, text[len(passed_on[row]) :])
                passed_on[row] = text

    return tell


def read_answer(
    example: Example, text: str, mask: np.ndarray | None, ended: bool = True, forced: bool = False
) -> Prediction:
    """Parse one answer and return it as a Prediction, with a warning for each problem.

    mask: None, float32[H,W] or int32[H,W] as in Prediction. ended: whether the model ended its answer with `</s>`.
    forced: whether mask tokens were appended to it.
    """
    task = TASKS[example.task]
    parsed = task.parse(text)
    problems = {
        "the answer did not end within the allowed number of tokens": not ended,
        f"the text cannot be read as an answer to {example.task}": parsed is None,
        "fewer than six mask tokens were written, so there is no mask": example.mask_kind != "none" and mask is None,
        "the model wrote no mask tokens; they were appended to its answer": forced,
    }
    return Prediction(example, text, parsed, mask, tuple(problem for problem, applies in problems.items() if applies))
