"""Inference: predictions from Examples.

Encoding clips, answering prompts and drawing masks are three compiled programs. A clip that was encoded recently is not
encoded again, nor read again by the language model: prompts about one clip begin alike. A batch without masks neither
compiles nor runs the mask decoder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crab_jax.config import RunConfig
from crab_jax.generate import Begun, GenerateOptions, Generation, generate, stream
from crab_jax.io.errors import InputError
from crab_jax.models.protocol import Cache, Model
from crab_jax.parallel import sharding
from crab_jax.runs.run_data import eval_batches
from crab_jax.tasks import TASKS
from data_pipelines.batching import Batch
from data_pipelines.decoded import Root
from data_pipelines.examples import Example
from data_pipelines.fbank import SINGLE
from data_pipelines.tokens import Tokenizer

PROMPT_FIELDS = ("tokens", "slots", "text_mask", "index")  # of a Batch, what answering needs besides feature rows
BATCH_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
ENCODED_TOGETHER = 4  # clips per call, for each copy of the model
KEPT_BYTES = 2**30  # bound of the feature rows that are kept of earlier clips, and of the caches of their prompts
PREFIX = 64  # the beginning of a prompt is read by a program for a multiple of this many positions
SHORTEST_REST = 32  # the rest of prompts is read by a program for this many positions, or twice as many, and so on


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
def _read(model: Model, params: Any, prompts: Batch, features: jax.Array, mesh: Mesh | None) -> Cache:
    with sharding.constrained(mesh):
        _, cache = model.apply(
            {"params": params}, prompts, model.empty_cache(*prompts.tokens.shape), features, method="prefill"
        )
        return cache


@partial(jax.jit, static_argnames=("model", "slots"), donate_argnames="cache")
def _admit(model: Model, cache: Cache | None, prefix: Cache, rows: jax.Array, slots: int) -> Cache:
    return model.admitted(model.empty_cache(len(rows), slots) if cache is None else cache, prefix, rows)


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


def _spread(tree: Any, mesh: Mesh | None) -> Any:
    """Return the arrays [B,...] of `tree` with their rows spread over the copies of the model."""
    return tree if mesh is None else jax.device_put(tree, sharding.batch_sharding(mesh))


class Encoder:
    """Encoder of clips that keeps recent feature rows, because many questions are often about one clip."""

    def __init__(self, model: Model, params: Any, mesh: Mesh | None = None):
        self.model, self.params, self.mesh = model, params, mesh
        self.kept: dict[bytes, jax.Array] = {}  # rows [R,D] by the digest of their media, latest last

    def __call__(self, batch: Batch, names: Sequence[bytes] = ()) -> jax.Array:
        """Return the feature rows [B,R,D] of a batch on the host; `names` are `clip_names(batch)`, where known."""
        names = names or clip_names(batch)
        first = {name: row for row, name in enumerate(names) if name not in self.kept}
        copies = 1 if self.mesh is None else self.mesh.shape["data"]
        together = min(copies * ENCODED_TOGETHER, len(names))
        for start in range(0, len(first), together):
            new = list(first)[start : start + together]
            taken = [first[name] for name in new]
            taken += taken[:1] * (together - len(taken))
            clips = _spread((batch.frames[taken], batch.fbank[taken]), self.mesh)
            rows = _encode(self.model, self.params, *clips, self.mesh)
            self.kept |= dict(zip(new, rows, strict=False))
        needed = {name: self.kept.pop(name) for name in dict.fromkeys(names)}
        self.kept |= needed
        size = next(iter(needed.values())).nbytes
        while len(self.kept) > max(len(needed), KEPT_BYTES // max(1, size)):
            del self.kept[next(iter(self.kept))]
        return jnp.stack([needed[name] for name in names])


class Prefixes:
    """Reader of the beginnings of prompts, up to the last feature row, which it keeps for further prompts about a clip.

    It reads one clip at a time, so that no more of them take memory than the bound says. `positions` is the number of
    positions read so far.
    """

    def __init__(self, model: Model, params: Any, mesh: Mesh | None = None):
        self.model, self.params, self.mesh = model, params, mesh
        self.kept: dict[bytes, Cache] = {}  # caches of one row by the digest of what they hold, latest last
        self.positions = 0

    def __call__(self, prompts: Batch, names: Sequence[bytes], features: jax.Array, new: int) -> Begun | None:
        """Return prompts on the host begun, with room for `new` tokens; None when there is none with feature rows.

        names: `clip_names` of the clips that they are about. features: [B,R,D].
        """
        rows, length = prompts.tokens.shape
        whole = prompts.text_mask.sum(axis=1)
        last = np.where(prompts.slots >= 0, np.arange(length), -1).max(axis=1)
        ends = np.minimum(last + 1, whole - 1)
        if ends.min() <= 0:
            return None
        found = [
            _digest(tokens[:end], slots[:end]) + name
            for tokens, slots, end, name in zip(prompts.tokens, prompts.slots, ends, names, strict=True)
        ]
        cache: Cache | None = None
        for name in dict.fromkeys(found):
            first = found.index(name)
            prefix = self.kept.pop(name, None)
            if prefix is None:
                prefix = self._read(prompts, features, first, ends[first])
            self.kept[name] = prefix
            chosen = np.array([0 if other == name else -1 for other in found], np.int32)
            cache = _admit(self.model, cache, prefix, chosen, length + new)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(prefix))
            while len(self.kept) > max(1, KEPT_BYTES // max(1, size)):
                del self.kept[next(iter(self.kept))]
        left = int((whole - ends).max())
        width = SHORTEST_REST
        while width < left:
            width *= 2
        self.positions += rows * min(width, length)
        return Begun(cache, jnp.asarray(ends, jnp.int32), min(width, length))

    def _read(self, prompts: Batch, features: jax.Array, row: int, end: int) -> Cache:
        width = min(-(-int(end) // PREFIX) * PREFIX, prompts.tokens.shape[1])
        self.positions += width
        chosen = slice(row, row + 1)
        shown = dataclasses.replace(
            prompts,
            tokens=prompts.tokens[chosen, :width],
            slots=prompts.slots[chosen, :width],
            text_mask=prompts.text_mask[chosen, :width],
            index=prompts.index[chosen],
        )
        return _read(self.model, self.params, *_spread((shown, features[chosen]), self.mesh), self.mesh)


def clip_of(example: Example) -> tuple[Any, ...]:
    """Return what the Examples have in common whose feature rows are the same."""
    second = example.second if example.windows in SINGLE else None
    return example.video, example.frames, example.image, example.audio, example.windows, second


def clip_names(batch: Batch) -> list[bytes]:
    """Return a digest of the media of each row of a batch on the host."""
    return [_digest(frames, fbank) for frames, fbank in zip(batch.frames, batch.fbank, strict=True)]


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
    """Yield one Prediction per Example, bucket by bucket, within a bucket task by task, and clip by clip.

    This order keeps the answers of a batch about equally long, and questions about a clip beside each other: what
    their prompts have in common is read once. Decoding is greedy unless
    `decoding` (fields of GenerateOptions) says otherwise; samples depend on `seed` and the id of the Example. `on_text`
    is called with each Example and every new piece of its text. `mesh` is the mesh that the model was loaded on; the
    rows of a batch are spread over the copies of the model. `data_changes` replace fields of the DataConfig that the
    model was trained with. Raises InputError for bad media and for logits that are not finite.
    """
    options = GenerateOptions(
        tokenizer.eos_id, tokenizer.pad_id, tuple(tokenizer.mask_ids), max_new_tokens, **(decoding or {})
    )
    order = {name: number for number, name in enumerate(TASKS)}
    place: dict[tuple[Any, ...], int] = {}
    for example in examples:
        place.setdefault(clip_of(example), len(place))
    examples = sorted(examples, key=lambda example: (order[example.task], place[clip_of(example)]))
    questions = Counter(map(clip_of, examples))
    rng = jax.random.key(seed) if options.temperature else None
    encode, begin = Encoder(model, params, mesh), Prefixes(model, params, mesh)
    copies = 1 if mesh is None else mesh.shape["data"]
    for _, batch in eval_batches(examples, root, config, tokenizer, batch_size, **data_changes):
        rows, clips = np.asarray(batch.index), clip_names(batch)
        features = encode(batch, clips)
        prompts = Batch(**{name: getattr(batch, name) if name in PROMPT_FIELDS else None for name in BATCH_FIELDS})
        if rng is not None:
            prompts = dataclasses.replace(
                prompts,
                index=np.array(
                    [-1 if row < 0 else zlib.crc32(examples[row].id.encode()) >> 1 for row in rows], np.int32
                ),
            )
        begun = None
        # The copies of a model share no memory in which a prefix could lie for the rows of all of them.
        several = Counter(name for name, row in zip(clips, rows, strict=True) if row >= 0).most_common(1)[0][1] > 1
        if copies == 1 and (several or any(questions[clip_of(examples[row])] > 1 for row in rows[rows >= 0])):
            begun = begin(prompts, clips, features, options.max_new_tokens)
        prompts, features = _spread((prompts, features), mesh)
        chosen = dataclasses.replace(options, force_masks=options.force_masks and batch.seg_frame.shape[1] > 0)
        if on_text is None and begun is None:
            generation = _answer(model, params, prompts, chosen, rng, features, mesh)
        else:
            tell = None
            if on_text is not None:
                tell = _teller(tokenizer, [examples[row] if row >= 0 else None for row in rows], on_text)
            with sharding.constrained(mesh):
                generation = stream(model, params, prompts, chosen, tell, rng=rng, features=features, begun=begun)
        has_mask = np.asarray(generation.has_mask)
        drawn: list[Any] = []  # one entry per mask group
        if batch.seg_frame.shape[1]:
            drawn = [
                jax.device_get(
                    _draw(
                        model, params, *_spread((generation.mask_states[:, group], batch.seg_frame[:, 0]), mesh), mesh
                    )
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
