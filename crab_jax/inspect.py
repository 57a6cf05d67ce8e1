"""Inspect a trained model: how the router uses the LoRA heads, and what each head contributes.

    python -m crab_jax.inspect router --checkpoint runs/x --out runs/x/router

`router` runs a few examples of each task, prompt and true answer, through the model. Per task, layer, projection and
segment (visual rows, audio rows, text, answer) it measures the mean weight of each head and the entropy of a token's
weights; then, per task, how much the losses of the true answer and mask rise without one head, and without all. Writes
router.json, router.html and the plots as PNG into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crab_jax.aot import compile_cache
from crab_jax.io import paths
from crab_jax.io.bounds import ANY_PLACE, ANYWHERE, Name, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import write_whole
from crab_jax.io.locks import locked
from crab_jax.io.progress import Progress
from crab_jax.reports.router_page import ablation_pictures, increases, routing_pictures
from crab_jax.router import SEGMENTS, Routing, ablation, answered_batches, router_weights
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.tasks import add_flag
from crab_jax.visualize import charts, page
from data_pipelines.examples import spread


def to_json(routing: Mapping[str, Routing], effects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of router.json as lists: weights [layers][projections][heads] of each segment."""
    tasks = {}
    for task, usage in routing.items():
        weights, entropy = usage.overall()
        by_segment = {
            name: {
                "tokens": int(usage.tokens[k]),
                "weights": usage.weights[k].tolist(),
                "entropy_bits": usage.entropy[k].tolist(),
            }
            for k, name in enumerate(SEGMENTS)
            if usage.tokens[k]
        }
        tasks[task] = {
            "all": {"tokens": int(usage.tokens.sum()), "weights": weights.tolist(), "entropy_bits": entropy.tolist()},
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
    """Measure the router and write all results."""
    with locked(arguments.out) as out:
        _router(arguments, out)


def _router(arguments: argparse.Namespace, out: Path) -> None:
    model, params, config, tokenizer = run_params.load_model(arguments.checkpoint)
    root = run_data.data_root(arguments.data, config)
    examples = spread(run_data.read_examples(root, arguments.split), arguments.samples)
    unanswered = next((example for example in examples if not example.target), None)
    if unanswered is not None:
        raise InputError(
            f"example {unanswered.id!r}",
            "target",
            "is empty, but heads are judged on true answers",
            "give another --split",
        )
    batches = list(answered_batches(examples, root, config, tokenizer, arguments.batch_size))
    print(f"{len(examples)} examples in {len(batches)} batches", flush=True)
    routing = router_weights(model, params, Progress("batches routed", len(batches)).over(batches))
    print(f"router weights of {len(routing)} tasks; ablating {model.cfg.lora_heads} heads", flush=True)
    effects = ablation(model, params, batches)

    write_whole(out / "router.json", json.dumps(to_json(routing, effects)))
    pictures = {"Routing": routing_pictures(routing), "Without a head": ablation_pictures(effects)}
    for group in pictures.values():
        for name, picture in group.items():
            write_whole(out / f"{name}.png", picture.data)
    page.write(
        out / "router.html",
        f"LoRA heads of {paths.absolute(arguments.checkpoint).name}",
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
    """Parse the command line."""
    parser = CommandLine(__doc__, "python -m crab_jax.inspect")
    parser.add_argument("what", choices=("router",), help="what to inspect")
    parser.add_argument(
        "--checkpoint", type=ANYWHERE, required=True, help="workdir of a training run, or a packed model"
    )
    parser.add_argument("--out", type=ANYWHERE, required=True, help="folder to write")
    parser.add_argument("--data", type=ANY_PLACE, default="", help="data root (default: the one of training)")
    parser.add_argument("--split", type=Name(), default="test", help="reads <data>/<split>.jsonl")
    parser.add_argument("--samples", type=Whole(1), default=16, help="examples of each task")
    parser.add_argument("--batch-size", type=Whole(1, 2**16), default=4)
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m crab_jax.inspect`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        run_folder.use_tasks_of(arguments.task_modules, arguments.checkpoint)
        compile_cache.enable()
        router(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
