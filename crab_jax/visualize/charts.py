"""Charts of the reports: losses, scores against baselines and by class, and routing of the LoRA heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks import TASKS
from crab_jax.visualize.overlay import figure_png, label_of, new_figure

# Okabe-Ito colours, which colour-blind readers can tell apart; the trained model has the first.
COLOURS = ("#D55E00", "#56B4E9", "#009E73", "#999999", "#CC79A7", "#0072B2", "#E69F00", "#F0E442", "#000000")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def loss_curves(records: Sequence[Mapping[str, float]], names: Sequence[str], total: str = "loss") -> bytes:
    """Return a PNG with one line per loss over the steps of metrics.jsonl.

    names: "loss" for the key `total`, others without the prefix `<total>/`.
    """
    # Imported late: it takes a quarter of a second, and few commands draw.
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    for number, name in enumerate(names):
        key = total if name == "loss" else f"{total}/{name}"
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            again, colour = divmod(number, len(COLOURS))  # the tasks of users have other lines in the same colours
            style = ("-", "--", ":", "-.")[again % 4]
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[colour], label=name, linewidth=1.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("loss (log scale)")
    _plain(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure_png(figure)


def score_bars(columns: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """Return a PNG with each task's headline metric and its 95 % interval for every column.

    columns: {name: {task: {metric, intervals}}}.
    """
    tasks = [task for task in TASKS if any(task in rows for rows in columns.values())]
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = new_figure(3.3 * across, (0.26 * len(columns) + 0.8) * down)
    grid = figure.subplots(down, across, squeeze=False, gridspec_kw={"hspace": 0.6, "wspace": 0.12}, sharey=True)
    for axes in grid.flat[len(tasks) :]:
        axes.axis("off")
    for axes, task in zip(grid.flat, tasks, strict=False):
        metric = TASKS[task].headline
        for row, name in enumerate(columns):
            scores = columns[name].get(task, {})
            if metric not in scores:
                continue
            low, high = scores.get("intervals", {}).get(metric, (scores[metric],) * 2)
            error = [[max(0.0, scores[metric] - low)], [max(0.0, high - scores[metric])]]
            axes.barh(
                row,
                scores[metric],
                xerr=error,
                color=COLOURS[0] if row == 0 else "0.72",
                error_kw={"linewidth": 1, "ecolor": "0.25"},
            )
        axes.set_title(f"{task}: {metric}", fontsize=10, loc="left")
        axes.set_yticks(range(len(columns)), list(map(label_of, columns)))
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=8)
        _plain(axes)
    return figure_png(figure)


def routing_heatmaps(weights: Mapping[str, np.ndarray], axis: str) -> bytes:
    """Return a PNG with the mean weight of each head per task, by `axis` "layer" or "projection".

    The weights are averaged over the other axis. `weights` are float[layers, projections, heads]; the colours are
    centred on 1/heads, uniform use.
    """
    means = {task: array.mean(axis=1 if axis == "layer" else 0).T for task, array in weights.items()}
    columns = next(iter(means.values())).shape[1]
    ticks = [name.removesuffix("_proj") for name in PROJECTIONS] if axis == "projection" else _numbers(columns)
    return _head_panels(means, ticks, axis)


def segment_heatmaps(weights: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Return a PNG with the mean weight of each head per task and segment, from {segment: float[heads]}.

    A segment that a task does not have stays white.
    """
    names = list(dict.fromkeys(name for rows in weights.values() for name in rows))
    heads = len(next(iter(next(iter(weights.values())).values())))
    missing = np.full(heads, np.nan)
    means = {task: np.stack([rows.get(name, missing) for name in names], axis=1) for task, rows in weights.items()}
    return _head_panels(means, names, "segment")


def _head_panels(means: Mapping[str, np.ndarray], ticks: Sequence[str], axis: str) -> bytes:
    """Return a PNG with one panel of float[heads, columns] per task, colours centred on 1/heads (uniform use)."""
    heads = next(iter(means.values())).shape[0]
    spread = max(0.02, max(float(np.nanmax(np.abs(mean - 1 / heads))) for mean in means.values()))
    across = min(3, len(means))
    down = -(-len(means) // across)
    figure = new_figure(3.2 * across, (0.3 * heads + 0.75) * down)
    gaps = {"hspace": 0.55, "wspace": 0.08}
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True, gridspec_kw=gaps)
    for axes in grid.flat[len(means) :]:
        axes.axis("off")
    for axes, (task, mean) in zip(grid.flat, means.items(), strict=False):
        image = axes.imshow(mean, cmap="PuOr_r", vmin=1 / heads - spread, vmax=1 / heads + spread, aspect="auto")
        axes.set_title(task, fontsize=10, loc="left")
        axes.set_yticks(range(heads), [f"head {i + 1}" for i in range(heads)], fontsize=8)
        _sparse_ticks(axes, ticks)
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel(axis, fontsize=9)
    figure.colorbar(image, ax=grid, label="mean weight", fraction=0.03, pad=0.02)
    return figure_png(figure)


def entropy_heatmap(entropy: Mapping[str, np.ndarray], heads: int) -> bytes:
    """Return a PNG of the entropy (bits) of a token's head weights by task and layer.

    entropy: float[layers, projections] per task.
    """
    table = np.stack([array.mean(axis=1) for array in entropy.values()])
    figure = new_figure(7, 0.32 * len(table) + 0.9)
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=np.log2(heads) if heads > 1 else 1, aspect="auto")
    axes.set_yticks(range(len(table)), list(entropy), fontsize=9)
    _sparse_ticks(axes, _numbers(table.shape[1]))
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="bits", fraction=0.03, pad=0.02)
    return figure_png(figure)


def table_heatmap(rows: Mapping[str, Mapping[str, float]], label: str) -> bytes:
    """Return a PNG of a table of signed numbers with the number in each cell, colours centred on zero."""
    columns = list(next(iter(rows.values())))
    values = np.array([[row[column] for column in columns] for row in rows.values()])
    figure = new_figure(1.3 * len(columns) + 1.5, 0.34 * len(rows) + 1.1)
    axes = figure.subplots()
    # Colours are relative to the largest number of the row, so that a row of large numbers does not bleach the others.
    largest = np.abs(values).max(axis=1, keepdims=True)
    shares = values / np.where(largest > 0, largest, 1)
    axes.imshow(shares, cmap="PuOr_r", vmin=-1.4, vmax=1.4, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(shares[row, column]) > 0.7 else "black"
        axes.text(column, row, f"{value:+.3g}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_title(label, fontsize=10, loc="left")
    return figure_png(figure)


def breakdown_bars(breakdown: Mapping[str, tuple[float, int]], label: str) -> bytes:
    """Return a PNG with one bar per class or question type {name: (score, samples)}, in the given order."""
    figure = new_figure(7, 0.24 * len(breakdown) + 0.8)
    axes = figure.subplots()
    values = [value for value, _ in breakdown.values()]
    axes.barh(range(len(values)), values, color=COLOURS[5], height=0.7)
    for row, (value, count) in enumerate(breakdown.values()):
        axes.text(max(value, 0), row, f" {value:.2f}  (n {count})", va="center", fontsize=7.5, color="0.3")
    axes.set_yticks(range(len(values)), list(map(label_of, breakdown)), fontsize=8)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, max(1.0, *values) * 1.12)
    axes.set_xlabel(label, fontsize=9)
    _plain(axes)
    return figure_png(figure)


def _numbers(count: int) -> list[str]:
    return [str(i + 1) for i in range(count)]


def _sparse_ticks(axes: Any, names: Sequence[str]) -> None:
    step = -(-len(names) // 8)
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize=8)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
