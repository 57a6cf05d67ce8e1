"""Judging of an evaluation folder: its predictions and masks compared with the labels."""

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
    """Raise InputError for an example that cannot be scored, so that an error comes before hours of decoding."""
    for example in examples:
        scoring.check_label(example)
        kind = TASKS[example.task].mask_kind
        if example.mask_kind != kind or (kind != "none" and not example.mask):
            problem = f"{example.task} needs a mask of kind {kind!r}, this one has {example.mask_kind!r} {example.mask}"
            raise InputError(f"example {example.id!r}", "mask", problem, "give the mask file and its kind")


def read_predictions(
    folder: Path, rows: Mapping[str, predictions.Row], examples: Sequence[Example]
) -> Iterator[Prediction]:
    """Yield the answer to each Example from the lines of a folder (see `predictions.read_all`) and its masks.

    An Example without a line gets an empty answer. Raises InputError for a mask that cannot be read.
    """
    for example in examples:
        answer = predictions.answer_of(
            rows.get(example.id), example, folder, f"prediction {example.id}", predictions.OURS
        )
        yield read_answer(example, answer.text, answer.mask)


def judge_folder(folder: Path, examples: Sequence[Example], root: Path) -> list[Judged]:
    """Score the answers in a folder against the labels; an example without a line counts as an empty answer.

    Masks are compared at their own size, and answers without a mask at the size of the first mask. Raises InputError
    for a label that cannot be scored against, and for a mask that cannot be read.
    """
    check_labels(examples)
    rows = predictions.read_all(folder)
    usual = next(
        (len(p.mask) for p in read_predictions(folder, rows, examples) if p.mask is not None), predictions.DEFAULT_SIZE
    )
    judged = []
    for answer in read_predictions(folder, rows, examples):
        example, side = answer.example, usual if answer.mask is None else len(answer.mask)
        truth = read_mask(root, example, side) if example.mask else None
        judged.append(scoring.judge(example, scoring.Answer(example.id, answer.text, answer.mask), truth))
    return judged
