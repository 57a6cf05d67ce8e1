"""Write one HTML file about a run: its config, losses, scores, example answers and router weights.

    python -m crab_jax.report --run runs/x --results runs/x/test/results.json --data runs/scenes --out report.html

The file contains its pictures, needs no network, and can be read on a phone and on paper. --results is a file that
evaluate wrote, optionally with "baselines": {name: {task: ...}}. The examples are answered again with the run's
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from crab_jax.aot import compile_cache
from crab_jax.evaluation.results import METRICS, read_results
from crab_jax.inference import predict_examples
from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Name, Whole
from crab_jax.io.errors import CommandLine, run_verb
from crab_jax.io.files import out_file
from crab_jax.io.structured import read_lines
from crab_jax.reports.answer_pictures import collect
from crab_jax.reports.run_page import ReportData, write
from crab_jax.router import answered_batches, router_weights
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.tasks import add_flag
from crab_jax.training import goodput
from data_pipelines.examples import spread


def report(arguments: argparse.Namespace) -> None:
    """Answer a few examples, average their router weights, and write the report."""
    run, root = paths.at(arguments.run), paths.at(arguments.data)
    out_file(arguments.out)
    results = read_results(paths.at(arguments.results))
    examples = run_data.read_examples(root, arguments.split)
    model, params, config, tokenizer = run_params.load_model(run)
    log = run / "metrics.jsonl"
    metrics = list(read_lines(log, METRICS, constants=True)) if log.is_file() else []

    shown = spread(examples, arguments.samples)
    # The layout for generation answers as `evaluate` does; router weights need the training layout below.
    answered = collect(
        predict_examples(
            *model.for_generation(params),
            config,
            tokenizer,
            shown,
            root,
            arguments.batch_size,
            arguments.max_new_tokens,
            on_error="raise",
        ),
        root,
        config.data.clock,
    )
    routed = spread(examples, arguments.routing_samples)
    batches = answered_batches(routed, root, config, tokenizer, arguments.batch_size)
    write(
        arguments.out,
        ReportData(
            title=f"Report of {run.name}",
            config=config.flat(),
            metrics=metrics,
            results=results,
            **answered,
            routing=router_weights(model, params, batches),
            windows=goodput.read_windows(run / goodput.LEDGER),
        ),
    )
    print(f"report: {arguments.out} ({paths.at(arguments.out).stat().st_size / 1e6:.1f} MB)")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises InputError when it is wrong."""
    parser = CommandLine(__doc__, "python -m crab_jax.report")
    parser.add_argument("--run", type=ANYWHERE, required=True, help="workdir of a training run, or a packed model")
    parser.add_argument(
        "--results", type=ANYWHERE, required=True, help="results.json of evaluate, optionally with baselines"
    )
    parser.add_argument("--data", type=ANYWHERE, required=True, help="data root of the examples")
    parser.add_argument("--out", type=ANYWHERE, required=True, help="HTML file to write")
    parser.add_argument("--split", type=Name(), default="test", help="reads <data>/<split>.jsonl")
    parser.add_argument("--samples", type=Whole(1), default=3, help="number of examples of each task to show")
    parser.add_argument(
        "--routing-samples", type=Whole(1), default=16, help="number of examples of each task for the router weights"
    )
    parser.add_argument("--batch-size", type=Whole(1, 2**16), default=4)
    parser.add_argument("--max-new-tokens", type=Whole(1, 2**16), default=256)
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.report`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        run_folder.use_tasks_of(arguments.task_modules, arguments.run)
        compile_cache.enable()
        report(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
