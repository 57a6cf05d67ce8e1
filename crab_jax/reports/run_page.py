"""The page of a run: config, losses, scores, routing, and answers to a few examples beside the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crab_jax.reports.evaluation_page import every_metric
from crab_jax.reports.router_page import routing_pictures
from crab_jax.router import Routing
from crab_jax.tasks import TASKS
from crab_jax.training import goodput
from crab_jax.visualize import charts, page
from crab_jax.visualize.page import NONE, Html, Picture, Section, figure, score, table

SECTIONS = {
    "run": "What was run",
    "loss": "Losses",
    "goodput": "Goodput",
    "scores": "Scores",
    "masks": "Masks",
    "boxes": "Boxes",
    "times": "Time lines",
    "answers": "Questions and captions",
    "routing": "Routing of the LoRA heads",
}
PARTS = ("loss", "text", "bce", "dice", "ce")
HELD_OUT = "eval/loss"  # a key that only records of an evaluation during training have
CONFIG_KEYS = ("model", "compat", "init_from", "seed", "steps", "optim.lr", "data.batch_size", "data.root")


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The content of a report; on the page, empty parts are marked as missing.

    config: flat, such as {'optim.lr': 1e-4}. metrics: records of metrics.jsonl. results: see scoring.summarise, with
    baselines. pictures: section key ("masks", "boxes", "times") -> examples. answers: (task, question, truth, answer).
    windows: of goodput.jsonl.
    """

    title: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Sequence[Mapping[str, float]] = ()
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, Sequence[Picture]] = dataclasses.field(default_factory=dict)
    answers: Sequence[tuple[str, str, str, str]] = ()
    routing: Mapping[str, Routing] = dataclasses.field(default_factory=dict)
    windows: Sequence[goodput.Window] = ()


# The HTML.


def _run_section(data: ReportData) -> Html:
    shown = [(key, data.config[key]) for key in CONFIG_KEYS if key in data.config]
    counts = [(f"test examples of {task}", scores["n"]) for task, scores in data.results.get("tasks", {}).items()]
    full = "\n".join(f"{key} = {value!r}" for key, value in sorted(data.config.items()))
    every = Html("<details><summary>Every setting</summary><pre>{}</pre></details>").format(full)
    return table(("setting", "value"), [*shown, *counts]) + every


def _loss_section(data: ReportData) -> Html:
    if not data.metrics:
        return NONE
    by_part = charts.loss_curves(data.metrics, PARTS)
    by_task = charts.loss_curves(data.metrics, tuple(TASKS))
    return figure(
        Picture(
            by_part,
            "Loss of each part: every line should fall and level off; a part that rises again "
            "is drowned by the others.",
        )
    ) + (
        figure(Picture(by_task, "Text loss of each task: look for a task that stays far above the others."))
        + _held_out(data.metrics)
    )


def _goodput_section(data: ReportData) -> Html:
    if not data.windows:
        return NONE
    seconds = goodput.accounts(data.windows)
    total, rows = sum(seconds.values()) or 1.0, []
    for cause, what in {goodput.PRODUCTIVE: "steps that trained the model", **goodput.CAUSES}.items():
        rows.append((cause, f"{seconds[cause] / total:.1%}", f"{seconds[cause]:,.0f}", what))
    starts = len({window.session for window in data.windows})
    note = Html("<p>Wall time of {} process starts, on which it was spent.</p>").format(starts)
    return note + table(("spent on", "share", "seconds", "meaning"), rows)


def _held_out(records: Sequence[Mapping[str, float]]) -> Html:
    """Return curves and a table of the evaluations during training (eval_every); NONE for a run without them."""
    evaluated = [record for record in records if HELD_OUT in record]
    if not evaluated:
        return NONE
    first, last = evaluated[0]["step"], evaluated[-1]["step"]
    rows = []
    for key in dict.fromkeys(key for record in evaluated for key in record if key.startswith("eval/")):
        points = [(record[key], record["step"]) for record in evaluated if key in record]
        of = key.removeprefix("eval/").split("/")
        if key == "eval/samples":
            continue
        best, at = (min if of[0] == "loss" else max)(points)
        task = of[-1] if of[-1] in TASKS else "all"
        name = "/".join(part for part in of if part not in TASKS)
        rows.append((task, name, f"{points[0][0]:.3f}", f"{best:.3f}", at, f"{points[-1][0]:.3f}"))
    by_part = charts.loss_curves(evaluated, PARTS, HELD_OUT)
    by_task = charts.loss_curves(evaluated, tuple(TASKS), f"{HELD_OUT}/text")
    return (
        Html("<h3>Held-out examples, during training</h3>")
        + figure(
            Picture(
                by_part,
                "Loss of held-out examples: a line that rises while that of training falls is learned by heart.",
            )
        )
        + figure(Picture(by_task, "Text loss of the held-out examples of each task."))
        + table(("task", "measured", f"step {first:.0f}", "best", "at step", f"step {last:.0f}"), sorted(rows))
    )


def _scores_section(data: ReportData) -> Html:
    tasks = data.results.get("tasks", {})
    if not tasks:
        return NONE
    columns = {"trained": tasks, **data.results.get("baselines", {})}
    heads = ("task", "metric", "n", *columns)
    rows = [
        (
            task,
            TASKS[task].headline,
            scores["n"],
            *(score(column.get(task, {}), TASKS[task].headline) for column in columns.values()),
        )
        for task, scores in tasks.items()
    ]
    unread = [(task, s["n"], s.get("n_unparsed", 0), s.get("n_no_mask", 0)) for task, s in tasks.items()]
    chart = Picture(
        charts.score_bars(columns),
        "Headline metric of each task with its interval: the top bar, the "
        "trained model, should end right of every baseline, with intervals apart.",
    )
    note = Html("<p>Headline metric of each task, with 95 % bootstrap intervals over the examples.</p>")
    return (
        note
        + table(heads, rows)
        + figure(chart)
        + Html("<details><summary>Every metric of the trained model</summary>{}</details>").format(every_metric(tasks))
        + Html("<h3>Answers that could not be used</h3>")
        + table(("task", "n", "unreadable text", "no mask"), unread)
    )


def _routing_section(data: ReportData) -> Html:
    return NONE.join(map(figure, routing_pictures(data.routing).values())) if data.routing else NONE


def _answers_section(data: ReportData) -> Html:
    return table(("task", "question", "truth", "answer"), data.answers) if data.answers else NONE


def _pictures_section(key: str, data: ReportData) -> Html:
    return NONE.join(map(figure, data.pictures.get(key, ())))


_BODIES = {
    "run": _run_section,
    "loss": _loss_section,
    "goodput": _goodput_section,
    "scores": _scores_section,
    "answers": _answers_section,
    "routing": _routing_section,
}


def write(out_html: str | Path, data: ReportData) -> None:
    """Write the report as one file that refers to nothing outside itself."""
    bodies = {key: _BODIES[key](data) if key in _BODIES else _pictures_section(key, data) for key in SECTIONS}
    page.write(out_html, data.title, page.LEGEND, [Section(key, title, bodies[key]) for key, title in SECTIONS.items()])
