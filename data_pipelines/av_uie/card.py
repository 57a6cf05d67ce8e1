"""The dataset card: statistics of a set of Examples, as one JSON object and as a Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.io.errors import cell
from crab_jax.tasks import TASKS
from data_pipelines.av_uie.labels import reasoning_of
from data_pipelines.examples import Example

# The ability that each task requires (paper sections 1 and 3).
GRANULARITY = {
    "ave": "temporal localisation",
    "avvp": "temporal localisation",
    "avqa": "spatio-temporal reasoning",
    "arig": "spatial localisation",
    "s4": "pixel-level understanding",
    "ms3": "pixel-level understanding",
    "avss": "pixel-level understanding",
    "ref-avs": "pixel-level understanding",
    "avcap": "captioning",
}
_SOURCES = {"ave": "ave", "avvp": "avvp", "avqa": "avqa", "ref-avs": "ref_avs", "avcap": "valor"}


def source(example: Example) -> str:
    """Return the dataset of an Example: `meta.dataset`, or the usual one of its task."""
    return str(
        example.meta.get("dataset")
        or ("scenes" if "scene" in example.meta else _SOURCES.get(example.task, example.task))
    )


def lengths(values: Iterable[int]) -> dict[str, float]:
    """Return mean, median, 95th percentile and maximum."""
    numbers = np.array([*values], float)
    return {
        "mean": round(float(numbers.mean()), 1),
        "median": float(np.median(numbers)),
        "p95": float(np.percentile(numbers, 95)),
        "max": float(numbers.max()),
    }


def card(examples: Sequence[Example], count_tokens: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Return samples and shares per task, source, granularity and writer, lengths of targets, and reasoning coverage.

    coverage: share of the Examples with reasoning before the answer. distinct_reasoning: number of different reasoning
    texts. Lengths are in words, and with `count_tokens` also in tokens.
    """
    groups = {task: [e for e in examples if e.task == task] for task in TASKS}
    tasks = {task: _task_card(selected, len(examples), count_tokens) for task, selected in groups.items() if selected}
    return {
        "samples": len(examples),
        "tasks": tasks,
        "granularity": _shares(GRANULARITY[e.task] for e in examples),
        "sources": _shares(map(source, examples)),
        "writers": _shares(_writer(e) for e in examples),
        "coverage": _coverage(examples),
        "target_words": lengths(len(e.target.split()) for e in examples),
    }


def _task_card(examples: Sequence[Example], total: int, count_tokens: Callable[[str], int] | None) -> dict[str, Any]:
    texts = [reasoning_of(example) for example in examples]
    row = {
        "samples": len(examples),
        "share": round(len(examples) / total, 4),
        "granularity": GRANULARITY[examples[0].task],
        "sources": dict(Counter(map(source, examples))),
        "writers": dict(Counter(map(_writer, examples))),
        "coverage": _coverage(examples),
        "distinct_reasoning": len({text for text in texts if text}),
        "reasoning_words": lengths(len(text.split()) for text in texts),
        "target_words": lengths(len(e.target.split()) for e in examples),
    }
    if count_tokens:
        row["target_tokens"] = lengths(count_tokens(e.target) for e in examples)
    return row


def _writer(example: Example) -> str:
    return str(example.meta.get("reasoning", "plain"))


def _coverage(examples: Sequence[Example]) -> float:
    return round(sum(bool(reasoning_of(example)) for example in examples) / len(examples), 4)


def _shares(names: Iterable[str]) -> dict[str, dict[str, float]]:
    counted = Counter(names)
    return {name: {"samples": n, "share": round(n / counted.total(), 4)} for name, n in counted.most_common()}


def markdown(content: Mapping[str, Any], name: str) -> str:
    """Format the card as a page."""
    words = content["target_words"]
    lines = [
        f"# {cell(name)}",
        "",
        f"{content['samples']:,} samples; {content['coverage']:.1%} reason before they answer. "
        f"Targets have {words['mean']} words on average, {words['max']:g} at most.",
        "",
        "| task | samples | share | sources | written by | reasoning | distinct | words mean / p95 / max |"
        + (" tokens mean / p95 / max |" if _has_tokens(content) else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if _has_tokens(content) else ""),
    ]
    for task, row in content["tasks"].items():
        cells = [
            task,
            f"{row['samples']:,}",
            f"{row['share']:.1%}",
            _counts(row["sources"]),
            _counts(row["writers"]),
            f"{row['coverage']:.1%}",
            f"{row['distinct_reasoning']:,}",
            _lengths(row["target_words"]),
        ]
        cells += [_lengths(row["target_tokens"])] if _has_tokens(content) else []
        lines.append(f"| {' | '.join(cells)} |")
    for title, key in (("Granularity", "granularity"), ("Sources", "sources"), ("Reasoning written by", "writers")):
        lines += ["", f"## {title}", "", "| | samples | share |", "|---|---|---|"]
        lines += [f"| {cell(name)} | {row['samples']:,} | {row['share']:.1%} |" for name, row in content[key].items()]
    return "\n".join(lines) + "\n"


def _has_tokens(found: Mapping[str, Any]) -> bool:
    return any("target_tokens" in row for row in found["tasks"].values())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{cell(name)} {n:,}" for name, n in counts.items())


def _lengths(row: Mapping[str, float]) -> str:
    return f"{row['mean']:g} / {row['p95']:g} / {row['max']:g}"
