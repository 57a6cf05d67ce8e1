"""Pictures of the LoRA router: the weights of its heads, and how much the loss grows without a head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crab_jax.router import INTACT, SEGMENTS, Routing
from crab_jax.visualize import charts, page


def routing_pictures(routing: Mapping[str, Routing]) -> dict[str, page.Picture]:
    """Return the plots of `router_weights`, by the names of their files."""
    overall = {task: measured.overall() for task, measured in routing.items()}
    weights = {task: means[0] for task, means in overall.items()}
    heads = next(iter(weights.values())).shape[-1]
    by_segment = {
        task: {
            name: measured.weights[number].mean((0, 1))
            for number, name in enumerate(SEGMENTS)
            if measured.tokens[number]
        }
        for task, measured in routing.items()
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
            charts.entropy_heatmap({task: means[1] for task, means in overall.items()}, heads),
            f"Entropy of a token's head weights: {np.log2(heads):.2f} bits is an even mix of the heads, 0 is one head "
            "alone.",
        ),
    }


def increases(effects: Mapping[str, Mapping[str, Mapping[str, float]]], loss: str) -> dict[str, dict[str, float]]:
    """Return {task: {variant: increase of `loss` over the intact model}} for the tasks that have this loss."""
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
    """Return the plots of `ablation`, by the names of their files."""
    by_loss = {loss: increases(effects, loss) for loss in LOSSES}
    return {
        f"ablation_{loss}": page.Picture(
            charts.table_heatmap(rows, f"increase of loss: {LOSSES[loss]}"),
            f"How much worse a model predicts {LOSSES[loss]}, when a head is taken out: a task leans on the heads "
            "whose columns stand out; near zero, the others make up for it; below zero, it does better "
            "without.",
        )
        for loss, rows in by_loss.items()
        if rows
    }
