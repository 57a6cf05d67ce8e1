"""Look into a trained model: what the router of the LoRA heads does, and what each head is for.

    python -m crab_jax.inspect router --checkpoint runs/x --out runs/x/router

`router` runs a few examples of each task through the model, prompt and true answer, and measures per task, layer,
projection and segment (visual rows, audio rows, text, answer) the mean weight of each head and the entropy of a token's
weights; then, per task, how much worse the true answer and the true mask are predicted without one head, or any.
Writes router.json, router.html and the plots as PNG into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crab_jax import charts, compile_cache, losses, page, runs
from crab_jax.bounds import ANY_PATH, PATH, Name, Whole
from crab_jax.config import RunConfig
from crab_jax.errors import CommandLine, InputError, run_verb
from crab_jax.files import write_whole
from crab_jax.locks import locked
from crab_jax.models.crab import Crab
from crab_jax.progress import Progress
from crab_jax.tasks import TASKS
from crab_jax.train import loss_rows
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
def _route(model: Crab, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the positions of each row and segment: weights [B,S,layers,P,heads], entropies (bits) [B,S,layers,P],
    positions [B,S]."""
    batch = batch.replace(seg_frame=batch.seg_frame[:, :0])  # masks are decoded after the LLM
    _, sown = model.apply({"params": params}, batch, mutable=["router"])
    found = {path[-2]: value[0] for path, value in traverse_util.flatten_dict(sown["router"]).items()}
    weights = jnp.stack([found[name] for name in charts.PROJECTIONS], axis=1)
    entropy = -(weights * jnp.log2(jnp.maximum(weights, 1e-30))).sum(-1)
    where = segments(batch, batch.frames.shape[1] * model.cfg.visual.queries)
    return (
        jnp.einsum("lpbth,sbt->bslph", weights, where),
        jnp.einsum("lpbt,sbt->bslp", entropy, where),
        where.sum(-1).T,
    )


def router_weights(model: Crab, params: Any, batches: Iterable[Batch]) -> dict[str, Routing]:
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
def _answer_losses(model: Crab, params: Any, batch: Batch, keep: jax.Array) -> dict[str, losses.Term]:
    """Rows of the text loss and, for a batch with masks, of the mask losses (see losses.py), with `keep_heads`."""
    output: Any = model.apply({"params": keep_heads(params, keep)}, batch)
    return loss_rows(output, batch)


def ablation(model: Crab, params: Any, batches: Sequence[Batch]) -> dict[str, dict[str, dict[str, float]]]:
    """{task: {variant: {loss: value}}}: losses with all heads, without each one, and without any.

    text is in nats per token of the true answer; bce, dice and ce are means over the samples with such a mask.
    """
    heads = model.cfg.lora.heads
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


def routing_pictures(routing: Mapping[str, Routing]) -> dict[str, page.Picture]:
    """The plots of `router_weights`, by the name of their file."""
    overall = {task: found.overall() for task, found in routing.items()}
    weights = {task: found[0] for task, found in overall.items()}
    heads = next(iter(weights.values())).shape[-1]
    by_segment = {
        task: {name: found.weights[number].mean((0, 1)) for number, name in enumerate(SEGMENTS) if found.tokens[number]}
        for task, found in routing.items()
    }
    return {
        "router_layers": page.Picture(
            charts.routing_heatmaps(weights, "layer"),
            "Mean router weight of each head by layer: heads specialise "
            "where rows differ in colour, and tasks share heads where panels look alike.",
        ),
        "router_projections": page.Picture(
            charts.routing_heatmaps(weights, "projection"),
            "The same by projection: look for projections whose heads are used unevenly.",
        ),
        "router_segments": page.Picture(
            charts.segment_heatmaps(by_segment),
            "The same by what a token is, a visual row, an audio row, a word of "
            "the prompt or of the answer: the head of a modality has one bright column.",
        ),
        "router_entropy": page.Picture(
            charts.entropy_heatmap({task: found[1] for task, found in overall.items()}, heads),
            f"Entropy of a token's head weights: {np.log2(heads):.2f} bits is an even mix of the heads, 0 is one head "
            "alone.",
        ),
    }


def increases(effects: Mapping[str, Mapping[str, Mapping[str, float]]], loss: str) -> dict[str, dict[str, float]]:
    """{task: {variant: increase of `loss` over the intact model}} of the tasks that have it."""
    return {
        task: {name: values[loss] - variants[INTACT][loss] for name, values in variants.items() if name != INTACT}
        for task, variants in effects.items()
        if loss in variants[INTACT]
    }


LOSSES = {
    "text": "the text of the true answer, nats per token",
    "bce": "the true mask, cross-entropy per pixel",
    "ce": "the true class map, cross-entropy per pixel",
}


def ablation_pictures(effects: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, page.Picture]:
    """The plots of `ablation`, by the name of their file."""
    found = {loss: increases(effects, loss) for loss in LOSSES}
    return {
        f"ablation_{loss}": page.Picture(
            charts.table_heatmap(rows, f"increase of loss: {LOSSES[loss]}"),
            f"How much worse a model predicts {LOSSES[loss]}, when a head is taken out: a task leans on the heads "
            "whose columns stand out; near zero, the others make up for it; below zero, it does better "
            "without.",
        )
        for loss, rows in found.items()
        if rows
    }


def to_json(routing: Mapping[str, Routing], effects: Mapping[str, Any]) -> dict[str, Any]:
    """The content of router.json, in lists: weights [layers][projections][heads] of each segment."""
    tasks = {}
    for task, found in routing.items():
        weights, entropy = found.overall()
        by_segment = {
            name: {
                "tokens": int(found.tokens[k]),
                "weights": found.weights[k].tolist(),
                "entropy_bits": found.entropy[k].tolist(),
            }
            for k, name in enumerate(SEGMENTS)
            if found.tokens[k]
        }
        tasks[task] = {
            "all": {"tokens": int(found.tokens.sum()), "weights": weights.tolist(), "entropy_bits": entropy.tolist()},
            **by_segment,
        }
    heads = next(iter(routing.values())).weights.shape[-1]
    return {
        "heads": heads,
        "projections": list(charts.PROJECTIONS),
        "segments": list(SEGMENTS),
        "routing": tasks,
        "ablation": effects,
    }


def router(arguments: argparse.Namespace) -> None:
    """Measure and write everything about the router."""
    with locked(arguments.out) as out:
        _router(arguments, out)


def _router(arguments: argparse.Namespace, out: Path) -> None:
    model, params, config, tokenizer = runs.load_model(arguments.checkpoint)
    root = runs.data_root(arguments.data, config)
    examples = spread(runs.read_examples(root, arguments.split), arguments.samples)
    untold = next((example for example in examples if not example.target), None)
    if untold is not None:
        raise InputError(
            f"example {untold.id!r}", "target", "is empty, but heads are judged on true answers", "give another --split"
        )
    batches = list(answered_batches(examples, root, config, tokenizer, arguments.batch_size))
    print(f"{len(examples)} examples in {len(batches)} batches", flush=True)
    routing = router_weights(model, params, Progress("batches routed", len(batches)).over(batches))
    print(f"router weights of {len(routing)} tasks; taking out {model.cfg.lora.heads} heads", flush=True)
    effects = ablation(model, params, batches)

    write_whole(out / "router.json", json.dumps(to_json(routing, effects)))
    pictures = {"Routing": routing_pictures(routing), "Without a head": ablation_pictures(effects)}
    for group in pictures.values():
        for name, picture in group.items():
            write_whole(out / f"{name}.png", picture.data)
    page.write(
        out / "router.html",
        f"LoRA heads of {Path(arguments.checkpoint).resolve().name}",
        page.NONE,
        [
            page.Section(title.lower().replace(" ", "-"), title, page.NONE.join(map(page.figure, group.values())))
            for title, group in pictures.items()
        ],
    )
    for task, variants in increases(effects, "text").items():
        print(f"{task}: " + ", ".join(f"{name} {value:+.3f}" for name, value in variants.items()) + " nats per token")
    print(f"router: {out / 'router.html'}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__, "python -m crab_jax.inspect")
    parser.add_argument("what", choices=("router",), help="what to look at")
    parser.add_argument("--checkpoint", type=PATH, required=True, help="workdir of a training run, or a packed model")
    parser.add_argument("--out", type=PATH, required=True, help="folder to write")
    parser.add_argument("--data", type=ANY_PATH, default="", help="data root (default: the one of training)")
    parser.add_argument("--split", type=Name(), default="test", help="reads <data>/<split>.jsonl")
    parser.add_argument("--samples", type=Whole(1), default=16, help="examples of each task")
    parser.add_argument("--batch-size", type=Whole(1, 2**16), default=4)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.inspect`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        compile_cache.enable()
        router(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
