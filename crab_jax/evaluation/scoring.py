"""Scoring: from answers to results with bootstrap intervals, and baselines that need no model.

All functions here are pure. The score of a sample depends only on its own answer and label, and results do not depend
on the order of the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import Stats, wrong_fields
from data_pipelines.examples import Example

RESAMPLES = 1000
PARSED = "_parsed"  # suffix of a metric over the answered samples only
COUNTS = ("n", "n_unparsed", "n_no_mask", "intervals")  # keys beside the metrics in the results of a task
ReadMask = Callable[[Example], np.ndarray | None]
Results = dict[str, dict[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to the Example with the same id: its text, and its mask if there is one.

    mask: float[H,W] probabilities or bool[H,W] (binary tasks), int[H,W] class ids (semantic), at the size of the label.
    """

    id: str
    text: str
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Judged:
    """One scored answer; `parsed` is None for text that the task cannot read."""

    id: str
    task: str
    parsed: Any
    has_mask: bool
    stats: Stats


def check_label(example: Example) -> None:
    """Raise InputError when `meta` lacks a field that the example's task is scored against.

    A bad label then stops a run before hours of decoding, not after.
    """
    task = TASKS[example.task]
    for name, problem, must_be in wrong_fields(task, example.meta):
        fix = f"must be {must_be} ({task.stats.__module__.replace('.', '/')}.py)"
        raise InputError(f"example {example.id!r}", f"meta.{name}", problem, fix)


def judge(example: Example, prediction: Answer, gt_mask: np.ndarray | None) -> Judged:
    """Parse and score one answer; raise InputError when its task is scored against a mask and there is none."""
    task = TASKS[example.task]
    if task.mask_kind != "none" and gt_mask is None:
        raise InputError(
            f"example {example.id!r}",
            "mask",
            f"{task.name} is scored against a mask, but there is none",
            "add the mask file to the record",
        )
    parsed = task.parse(prediction.text)
    stats = task.stats(parsed, prediction.mask, example.meta, gt_mask)
    return Judged(example.id, example.task, parsed, prediction.mask is not None, stats)


def answered(answer: Judged) -> bool:
    """Return whether an answer has what its task is scored on: a mask, or text that can be read.

    The released evaluation leaves out the other answers. Here they count as empty answers, and are left out of the
    metrics that end in `_parsed`.
    """
    return answer.has_mask if TASKS[answer.task].mask_kind != "none" else answer.parsed is not None


def measure(judged: Sequence[Judged]) -> dict[str, float]:
    """Return every defined metric of one task over all answers and, with the suffix `_parsed`, over the answered ones.

    Shares of readable answers (`_rate`) have no `_parsed` variant.
    """
    reduce = TASKS[judged[0].task].reduce
    kept = [answer.stats for answer in judged if answered(answer)]
    everything = reduce([answer.stats for answer in judged])
    parsed = everything if len(kept) == len(judged) else reduce(kept) if kept else {}
    metrics = everything | {name + PARSED: value for name, value in parsed.items() if not name.endswith("_rate")}
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


def interval(values: Sequence[float]) -> list[float]:
    """Return `[low, high]`, the bounds of the middle 95 % of bootstrap values."""
    return [float(x) for x in np.percentile(values, (2.5, 97.5))]


def intervals(judged: Sequence[Judged], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, list[float]]:
    """Return the 95 % percentile bootstrap interval `[low, high]` of every metric of one task.

    Samples are resampled with replacement, by a generator with the given seed. A metric that is undefined in a resample
    (a question type that was not drawn) is taken over the other resamples.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        for name, value in measure([judged[i] for i in rng.integers(0, len(judged), len(judged))]).items():
            drawn.setdefault(name, []).append(value)
    return {name: interval(values) for name, values in drawn.items()}


def by_task(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """Return the answers of each task that has any: tasks in the order of TASKS, answers sorted by id."""
    ordered = sorted(judged, key=lambda answer: answer.id)
    groups = {name: [answer for answer in ordered if answer.task == name] for name in TASKS}
    return {name: answers for name, answers in groups.items() if answers}


def summarise(judged: Iterable[Judged], resamples: int = RESAMPLES, seed: int = 0) -> Results:
    """Return the results of scored answers, with the metrics of `measure` and their bootstrap intervals.

    They are `{"tasks": {task: {metric: x, "n": N, "n_unparsed": k, "n_no_mask": k, "intervals": {metric: [lo, hi]}}}}`.
    Metrics that are undefined on these samples are left out.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, answers in by_task(judged).items():
        metrics, bounds = measure(answers), intervals(answers, resamples, seed)
        results[name] = metrics | {
            "n": len(answers),
            "n_unparsed": sum(answer.parsed is None for answer in answers),
            "n_no_mask": sum(not answer.has_mask for answer in answers) if TASKS[name].mask_kind != "none" else 0,
            "intervals": {key: bounds[key] for key in metrics if key in bounds},
        }
    return {"tasks": results}


def no_masks(example: Example) -> None:
    """Return no mask: the default of `read_mask`, for examples without masks."""


def score(
    predictions: Iterable[Answer],
    examples: Sequence[Example],
    read_mask: ReadMask = no_masks,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Results:
    """Return the results of `predictions` on `examples`; an example without a prediction counts as an empty answer.

    Raises InputError for a prediction of an unknown example, and for two of one example.
    """
    answers: dict[str, Answer] = {}
    for prediction in predictions:
        if prediction.id in answers:
            raise InputError("predictions", "id", f"two answers to example {prediction.id!r}", "keep one of them")
        answers[prediction.id] = prediction
    unknown = sorted(answers.keys() - {example.id for example in examples})
    if unknown:
        raise InputError(
            "predictions",
            "id",
            f"{len(unknown)} answers to unknown examples, such as {unknown[0]!r}",
            "score against the split that was predicted",
        )
    for example in examples:
        check_label(example)
    judged = (judge(e, answers.get(e.id, Answer(e.id, "")), read_mask(e)) for e in examples)
    return summarise(judged, resamples, seed)


def baseline_results(
    examples: Sequence[Example], kind: str, read_mask: ReadMask = no_masks, resamples: int = RESAMPLES, seed: int = 0
) -> Results:
    """Return the results of giving the same answer to every question of a task, whatever the media.

    kind: "empty" gives no text and no mask. "constant" gives the best of the task's candidate constant answers by its
    headline metric on these same examples, so it is an upper bound. Raises InputError for another kind.
    """
    if kind == "empty":
        return score([], examples, read_mask, resamples, seed)
    if kind != "constant":
        raise InputError("baseline", "kind", f"unknown baseline {kind!r}", "use empty or constant")
    for example in examples:
        check_label(example)
    results: dict[str, dict[str, Any]] = {}
    for name, task in TASKS.items():
        of_task = [example for example in examples if example.task == name]
        if not of_task:
            continue
        masks = [read_mask(example) for example in of_task]

        def judged(
            text: str, mask: np.ndarray | None, of_task: list[Example] = of_task, masks: list[np.ndarray | None] = masks
        ) -> list[Judged]:
            return [judge(e, Answer(e.id, text, mask), gt) for e, gt in zip(of_task, masks, strict=True)]

        candidates = [judged(*candidate) for candidate in task.constants([e.meta for e in of_task], masks)]
        best = max(candidates, key=lambda c: task.reduce([answer.stats for answer in c])[task.headline])  # noqa: B023
        results |= summarise(best, resamples, seed)["tasks"]
    return {"tasks": results}


def _shown(row: dict[str, Any], metric: str) -> str:
    """Return two cells of a Markdown table, a metric and its interval."""
    if metric not in row:
        return "- | -"
    low, high = row["intervals"].get(metric, (float("nan"),) * 2)
    return f"{row[metric]:.4f} | {low:.4f} .. {high:.4f}"


def headlines(results: Results) -> str:
    """Return a Markdown table of the headline metric of each task with its 95 % interval."""
    lines = ["| task | n | metric | value | 95 % interval | unreadable | no mask |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['n']} | {TASKS[name].headline} | {_shown(row, TASKS[name].headline)} "
        f"| {row['n_unparsed']} | {row['n_no_mask']} |"
        for name, row in results["tasks"].items()
    ]
    return "\n".join(lines) + "\n"


def markdown(results: Results) -> str:
    """Return the headlines in Markdown, and a table of every metric over all samples and over the answered ones."""
    lines = ["| task | metric | all | 95 % interval | answered | 95 % interval |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {metric} | {_shown(row, metric)} | {_shown(row, metric + PARSED)} |"
        for name, row in results["tasks"].items()
        for metric in row
        if metric not in COUNTS and not metric.endswith(PARSED)
    ]
    return f"{headlines(results)}\n" + "\n".join(lines) + "\n"
