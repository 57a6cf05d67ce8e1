"""Compare two evaluations of the same samples: paired differences B - A with 95 % bootstrap intervals.

    python -m crab_jax.compare runs/a/test runs/b/test
    python -m crab_jax.compare runs/a/test runs/b/test --gate --out difference.json

A and B are --out folders of evaluate. Each resample draws the same samples from both, so the difficulty of samples
cancels. A star marks an interval without zero. With --gate the exit code is 3 when the headline metric of a task is
significantly lower in B.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from operator import ne
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.evaluation import predictions, scoring
from crab_jax.evaluation.judging import DESCRIPTION, judge_folder
from crab_jax.evaluation.scoring import Judged
from crab_jax.io import paths
from crab_jax.io.bounds import ANY_PLACE, ANYWHERE, Text
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_file, write_whole
from crab_jax.io.structured import read_json
from crab_jax.runs import run_data
from crab_jax.tasks import TASKS, add_flag, use_tasks
from data_pipelines.examples import Example

WORSE = 3  # exit code of --gate


def paired(
    a: Sequence[Judged], b: Sequence[Judged], resamples: int = scoring.RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return {metric: {"a", "b", "difference", "interval"}} of one task's answers to the same samples, in one order.

    interval: 95 % percentile bootstrap of b - a over resamples of the samples. Metrics that one side lacks (such as
    those over answered samples, when there are none) are left out.
    """
    values_a, values_b = scoring.measure(a), scoring.measure(b)
    drawn: dict[str, list[float]] = {name: [] for name in values_a if name in values_b}
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        chosen = rng.integers(0, len(a), len(a))
        scores_a, scores_b = scoring.measure([a[i] for i in chosen]), scoring.measure([b[i] for i in chosen])
        for name, values in drawn.items():
            if name in scores_a and name in scores_b:
                values.append(scores_b[name] - scores_a[name])
    return {
        name: {
            "a": values_a[name],
            "b": values_b[name],
            "difference": values_b[name] - values_a[name],
            "interval": scoring.interval(values),
        }
        for name, values in drawn.items()
        if values
    }


def differs(row: dict[str, Any]) -> bool:
    """Return whether zero is outside the interval of a difference."""
    low, high = row["interval"]
    return bool(low > 0 or high < 0)


EVALUATION = {"data": ANYWHERE, "split": Text(1, 200)}  # the fields of evaluation.json that are read


def judged_samples(folder: Path, data: str, tasks: Sequence[str]) -> dict[str, Judged]:
    """Return {id: scored answer} of an evaluation folder, for `tasks` (all when empty)."""
    file = folder / DESCRIPTION
    if not file.is_file():
        raise InputError(str(folder), DESCRIPTION, "no such file", "give the --out folder of evaluate")
    description = read_json(file, EVALUATION, fix="run evaluate again")
    root, split = paths.at(data or description["data"]), description["split"]
    known = predictions.read_all(folder)

    def wanted(example: Example) -> bool:
        return example.id in known and (not tasks or example.task in tasks)

    examples = [example for example in run_data.read_examples(root, split) if wanted(example)]
    return {answer.id: answer for answer in judge_folder(folder, examples, root)}


def markdown(differences: dict[str, dict[str, Any]]) -> str:
    """Format one table row per metric, the headline of each task first."""
    lines = ["| task | n | metric | A | B | B - A | 95 % interval | |", "|---|---|---|---|---|---|---|---|"]
    for name, task in differences.items():
        metrics = sorted(task["metrics"], key=partial(ne, TASKS[name].headline))
        for metric in metrics:
            row = task["metrics"][metric]
            low, high = row["interval"]
            lines.append(
                f"| {name} | {task['n']} | {metric} | {row['a']:.4f} | {row['b']:.4f} "
                f"| {row['difference']:+.4f} | {low:+.4f} .. {high:+.4f} | {'*' if differs(row) else ''} |"
            )
    return "\n".join(lines) + "\n"


def compare(arguments: argparse.Namespace) -> int:
    """Print the differences and return the exit code, 0 or WORSE."""
    if arguments.out:
        out_file(arguments.out)
    tasks = [task for task in arguments.tasks.split(",") if task]
    a, b = (judged_samples(paths.at(folder), arguments.data, tasks) for folder in (arguments.a, arguments.b))
    common = sorted(a.keys() & b.keys())
    if not common:
        raise InputError(
            arguments.b,
            "predictions",
            f"has no sample in common with {arguments.a}",
            "compare evaluations of the same split and tasks",
        )
    for folder, own in ((arguments.a, a), (arguments.b, b)):
        if len(own) > len(common):
            print(f"{len(own) - len(common)} samples are in {folder} only and are left out")
    differences: dict[str, dict[str, Any]] = {}
    for name, answers in scoring.by_task(a[sample] for sample in common).items():
        rows = paired(answers, [b[answer.id] for answer in answers])
        differences[name] = {"n": len(answers), "metrics": rows}
    print(markdown(differences))
    if arguments.out:
        text = json.dumps({"a": arguments.a, "b": arguments.b, "tasks": differences}, indent=1)
        write_whole(arguments.out, text)
    worse = [
        name
        for name, task in differences.items()
        if (row := task["metrics"].get(TASKS[name].headline)) and row["interval"][1] < 0
    ]
    if worse:
        print(f"worse in B: {', '.join(worse)}")
    return WORSE if worse and arguments.gate else 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__, "python -m crab_jax.compare")
    parser.add_argument("a", type=ANYWHERE, metavar="A", help="folder of the first evaluation")
    parser.add_argument("b", type=ANYWHERE, metavar="B", help="folder of the second evaluation")
    parser.add_argument("--data", type=ANY_PLACE, default="", help="data root (default: the one each was evaluated on)")
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--gate", action="store_true", help=f"exit with {WORSE} when a headline metric got worse")
    parser.add_argument("--out", type=ANY_PLACE, default="", metavar="FILE", help="write the differences as JSON, too")
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m crab_jax.compare`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        use_tasks([arguments.task_modules])
        code = compare(arguments)
        if code:
            sys.exit(code)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
