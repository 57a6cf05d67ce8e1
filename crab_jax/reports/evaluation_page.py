"""The page of an evaluation: our numbers beside published ones, every metric, classes and question types, examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from crab_jax.evaluation.scoring import PARSED
from crab_jax.inference import Prediction
from crab_jax.io.errors import InputError
from crab_jax.reports import answer_pictures
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import Breakdown, Published, sample_metric
from crab_jax.visualize import charts, page
from crab_jax.visualize.page import NONE, Html, Picture, Section, figure, score, table

INTRO = Html(
    "<p>Numbers are fractions (0.8 is 80 %) with 95 % bootstrap intervals over the samples. <b>All</b> counts an "
    "answer that cannot be used as wrong; <b>answered</b> leaves it out, as the released evaluation does: text that "
    "cannot be read, or for tasks with masks an answer without one. Published numbers were measured on the benchmarks "
    "and compare only with an evaluation on the same data.</p>"
)


def every_metric(tasks: Mapping[str, Any]) -> Html:
    """List each metric with its meaning and its values over all and over the answered samples, and the counts."""
    parts = []
    for name, row in tasks.items():
        rows = [
            (
                Html("<b>{}</b>").format(m) if m == TASKS[name].headline else m,
                what,
                score(row, m),
                score(row, m + PARSED),
            )
            for m, what in TASKS[name].metrics.items()
            if m in row
        ]
        counts = f"N {row['n']}, unreadable text {row['n_unparsed']}" + (
            f", without mask {row['n_no_mask']}" if TASKS[name].mask_kind != "none" else ""
        )
        parts.append(
            Html("<h3>{}</h3><p>{}</p>").format(name, counts) + table(("metric", "what it is", "all", "answered"), rows)
        )
    return NONE.join(parts)


def _tables(tasks: Mapping[str, Any]) -> Html:
    """List our scores and the published ones of each task, for the headline and every published metric."""
    parts = []
    for name, row in tasks.items():
        task = TASKS[name]
        shown = list(dict.fromkeys([task.headline, *(metric for other in task.published for metric in other.scores)]))
        answered = row["n"] - (row["n_no_mask"] if task.mask_kind != "none" else row["n_unparsed"])
        rows = [
            [Html("<b>ours, all</b>"), row["n"], *(score(row, m) for m in shown), ""],
            [Html("<b>ours, answered</b>"), answered, *(score(row, m + PARSED) for m in shown), ""],
        ]
        # There is always a row for Crab; scores that are not known stay blank.
        published = [other for other in task.published if other.model == "Crab"] or [Published("Crab", {}, "not known")]
        published = [*published, *(other for other in task.published if other.model != "Crab")]
        rows += [
            [model, "", *(f"{scores[m]:.4f}" if m in scores else "" for m in shown), source]
            for model, scores, source in published
        ]
        parts.append(Html("<h3>{}</h3>").format(name) + table(("model", "n", *shown, "source"), rows))
    return NONE.join(parts)


def _breakdowns(breakdowns: Mapping[str, Breakdown]) -> Html:
    """Draw one bar chart per task."""
    return NONE.join(
        figure(
            Picture(
                charts.breakdown_bars(groups, f"{name}: {TASKS[name].breakdown_of or TASKS[name].headline}"),
                f"{name} by class or question type, with the number of samples: look for classes far below the others.",
            )
        )
        for name, groups in breakdowns.items()
        if groups
    )


def extremes(values: Mapping[str, float], count: int) -> tuple[list[str], list[str]]:
    """Return the ids of the `count` worst and the `count` best of {id: score}, ties by id.

    No sample is in both lists; with few samples the list of the worst is filled first.
    """
    ranked = sorted(values, key=lambda name: (values[name], name))
    worst = ranked[:count]
    return worst, [name for name in ranked[::-1] if name not in worst][:count]


def drawn(prediction: Prediction, value: float, root: Path, clock: str = "shown") -> Html:
    """Show one answered example: its picture where the media can be read, else question and answer as text."""
    example = prediction.example
    head = Html("<p><b>{}</b>: {} {}</p>").format(example.id, sample_metric(TASKS[example.task]), f"{value:.3f}")
    try:
        collected = answer_pictures.collect([prediction], root, clock)
    except InputError as error:
        asked = example.instruction.rpartition("\n")[2]
        return head + table(
            ("asked", "truth", "answer", ""),
            [(asked, example.target or example.meta, prediction.text, f"not drawn: {error}")],
        )
    pictures = NONE.join(figure(picture) for group in collected["pictures"].values() for picture in group)
    rows = [row[1:] for row in collected["answers"]]
    return head + (table(("asked", "truth", "answer"), rows) if rows else pictures)


def write(
    path: Path,
    title: str,
    results: Mapping[str, Any],
    breakdowns: Mapping[str, Breakdown],
    examples: Iterable[tuple[str, Html]],
) -> None:
    """Write the page; `examples` are (heading, content)."""
    tasks = results["tasks"]
    shown = NONE.join(Html("<h3>{}</h3>{}").format(heading, body) for heading, body in examples)
    page.write(
        path,
        title,
        INTRO + page.LEGEND,
        [
            Section("published", "Beside published numbers", _tables(tasks)),
            Section("metrics", "Every metric", every_metric(tasks)),
            Section("classes", "Classes and question types", _breakdowns(breakdowns)),
            Section("examples", "Worst and best examples", shown),
        ],
    )
