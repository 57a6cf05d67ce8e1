"""An evaluation's folder, judged: its predictions and masks compared with the labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from crab_jax.evaluation import predictions, scoring
from crab_jax.evaluation.scoring import Judged
from crab_jax.inference import Prediction, read_answer
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines.decoded import read_mask
from data_pipelines.examples import Example

DESCRIPTION = "evaluation.json"


def check_labels(examples: Iterable[Example]) -> None:
    """Raise InputError for an example that cannot be scored, before hours of decoding rather than after."""
    for example in examples:
        scoring.check_label(example)
        kind = TASKS[example.task].mask_kind
        if example.mask_kind != kind or (kind != "none" and not example.mask):
            problem = f"{example.task} needs a mask of kind {kind!r}, this one has {example.mask_kind!r} {example.mask}"
            raise InputError(f"example {example.id!r}", "mask", problem, "give the mask file and its kind")


# Scores.


def read_predictions(
    folder: Path, rows: Mapping[str, predictions.Row], examples: Sequence[Example]
) -> Iterator[Prediction]:
    """The answer to each Example from the lines of a folder (`predictions.read_all`) and its masks; nothing at all
    where there is no line."""
    for example in examples:
        found = predictions.answer_of(
            rows.get(example.id), example, folder, f"prediction {example.id}", predictions.OURS
        )
        yield read_answer(example, found.text, found.mask)


def judge_folder(folder: Path, examples: Sequence[Example], root: Path) -> list[Judged]:
    """Score what a folder holds against the labels; an example without a line counts as answered with nothing.

    Masks are compared at their own size, answers without one at that of the first mask.
    """
    check_labels(examples)
    rows = predictions.read_all(folder)
    usual = next(
        (len(p.mask) for p in read_predictions(folder, rows, examples) if p.mask is not None), predictions.DEFAULT_SIZE
    )
    judged = []
    for found in read_predictions(folder, rows, examples):
        example, side = found.example, usual if found.mask is None else len(found.mask)
        truth = read_mask(root, example, side) if example.mask else None
        judged.append(scoring.judge(example, scoring.Answer(example.id, found.text, found.mask), truth))
    return judged
