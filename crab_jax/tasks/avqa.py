"""MUSIC-AVQA: a short answer to a question about a musical performance.

meta: `{"answer": str, "type": [modality, kind]}` with the type as in the release, e.g. `["Audio-Visual", "Counting"]`;
a question without a type counts in the overall accuracy only.
Prompt and target: dataset/unified_dataset.py and the released AV-UIE labels. Metric: exact match, per question type and
per modality (GeWu-Lab/MUSIC-AVQA, net_grd_avst/main_avst.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from crab_jax.tasks.placeholders import AUDIO, VIDEO
from crab_jax.tasks.rows import CLIP, only
from crab_jax.tasks.task import (
    AV_REASONER,
    NOTES,
    TEXT,
    Field,
    Made,
    Meta,
    Oddity,
    Published,
    Row,
    Stats,
    Task,
    by_group,
    is_list,
    says_nothing,
    windows_for,
)
from crab_jax.tasks.text import find_tags, normalise, one_tag

SUBTYPES = (
    "audio_counting",
    "audio_comparative",
    "visual_counting",
    "visual_location",
    "audio_visual_existential",
    "audio_visual_counting",
    "audio_visual_location",
    "audio_visual_comparative",
    "audio_visual_temporal",
)
MODALITIES = ("audio", "visual", "audio_visual")
METRICS = {
    "accuracy": "exact match over all questions (MUSIC-AVQA)",
    "accuracy_substring": "answers that contain the label (the rule of some released scorers; looser)",
    **{name: f"exact match over the {name.replace('_', '-')} questions" for name in MODALITIES},
    **{name: f"exact match over the {' '.join(name.rsplit('_', 1))} questions" for name in SUBTYPES},
}


def kind_of(meta: Meta) -> str:
    """Return the question type as SUBTYPES spells it, "" for none."""
    return "_".join(normalise(" ".join(meta.get("type", ()))).split())


LABEL = {
    "answer": TEXT,
    "type": Field(
        '[modality, kind] as in the release, such as ["Audio-Visual", "Counting"], or left out',
        lambda value, meta: is_list(value, lambda word: isinstance(word, str)) and kind_of(meta) in ("", *SUBTYPES),
        "",
    ),
}
# What --all-tasks asks where no question is given.
QUESTIONS = (
    "How many musical instruments were heard throughout the video?",
    "How many types of musical instruments appeared in the entire video?",
)
_MODALITY = {name: name.rpartition("_")[0] for name in SUBTYPES}
_PROMPT = f"{VIDEO}{AUDIO}Please answer this question: "
_INSTRUCTIONS = {"train": _PROMPT, "test": _PROMPT, "quick": _PROMPT}


def instruction(variant: str = "train", *, question: str) -> str:
    """Return the prompt; the three variants are the same text."""
    return _INSTRUCTIONS[variant] + question


def target(answer: str, reasoning: str = "") -> str:
    """Return `{reasoning} So the answer is <answer> x </answer>.`, the answer in its tag."""
    text = f"So the answer is <answer> {answer} </answer>."
    return f"{reasoning} {text}" if reasoning else text


def parse(text: str) -> str | None:
    """Return the last tagged answer, or None when no tag holds a word."""
    answers = [content for _, content in find_tags(text, ("answer",)) if normalise(content)]
    return answers[-1] if answers else None


def stats(parsed: str | None, mask: np.ndarray | None, meta: Mapping[str, Any], gt_mask: np.ndarray | None) -> Stats:
    """Return whether one answer is right, exactly and by the substring rule of some scorers, and the question type."""
    answer, truth = normalise(parsed or ""), normalise(str(meta["answer"]))
    if not truth:  # then every unread answer would be right
        raise ValueError(f"the answer {meta['answer']!r} holds no word")
    kind = kind_of(meta)
    if kind and kind not in SUBTYPES:
        raise ValueError(f"unknown question type {meta['type']!r}")
    return {"correct": float(answer == truth), "substring": float(truth in answer), "type": kind}


def reduce(samples: Sequence[Stats]) -> dict[str, float]:
    """Return accuracies over all questions, per modality (pooled over its questions) and per type.

    Types without questions are left out. `accuracy_substring` accepts an answer that contains the label.
    """
    groups = {"accuracy": [s["correct"] for s in samples], "accuracy_substring": [s["substring"] for s in samples]}
    for modality in MODALITIES:
        groups[modality] = [s["correct"] for s in samples if _MODALITY.get(s["type"]) == modality]
    for subtype in SUBTYPES:
        groups[subtype] = [s["correct"] for s in samples if s["type"] == subtype]
    return {name: float(np.mean(values)) for name, values in groups.items() if values}


def constants(metas: Sequence[Mapping[str, Any]], gt_masks: Sequence[np.ndarray | None]) -> list[tuple[str, None]]:
    """Return the three most frequent answers."""
    return [(target(answer), None) for answer, _ in Counter(str(m["answer"]) for m in metas).most_common(3)]


def arguments(meta: Meta, second: int) -> dict[str, Any]:
    """Return the arguments of `target` from a label."""
    return {"answer": meta["answer"].strip()}


def disagreements(text: str, values: Mapping[str, Any], meta: Meta, second: int) -> list[str]:
    """Return how a target differs from its label: the answer, as tagged or as the parser reads it."""
    said, found = one_tag(text, "answer")
    truth = values["answer"]
    if normalise(said) != normalise(truth) or normalise(parse(text) or "") != normalise(truth):
        found.append(f"the answer is {said!r}, the label says {truth!r}")
    return found


def oddities(meta: Meta) -> Iterator[Oddity]:
    """Yield an answer that is unlike those of MUSIC-AVQA; answers are compared word for word."""
    answer = meta["answer"]
    if says_nothing(answer):
        yield Oddity(False, "answer", f"is {answer!r}, which stands for no value", "give the name")
    elif re.fullmatch(r"[0-9.]+", answer):
        yield Oddity(False, "answer", f"is {answer!r}, a number", "MUSIC-AVQA answers in words, such as 'two'")
    elif re.fullmatch(r"[A-E]|.*[.!?;:]|(?:\S+\s+){5,}\S+", answer.strip(), re.DOTALL):
        problem = f"is {answer!r:.60}, a letter or a sentence; it is compared word for word"
        yield Oddity(False, "answer", problem, "give the answer in a word or two")


def from_row(row: Row) -> Made:
    """Read a row of a user's table: a clip, a question, its answer, and optionally its type (Audio-Visual/Counting)."""
    only(row, *CLIP)
    question, label = row.text("question"), {"answer": row.text("answer")}
    kind = row.given("type")
    kinds = [part.strip() for part in re.split(r"[/,]", kind)] if isinstance(kind, str) else kind
    if kinds is not None and not LABEL["type"].holds(kinds, {"type": kinds}):
        raise row.error(
            "type",
            f"is {kind!r:.60}",
            f"use modality/kind, as in Audio-Visual/Counting, of {', '.join(SUBTYPES)}, or leave it empty",
        )
    meta = {**label, "question": question} | ({"type": kinds} if kinds else {})
    return Made(instruction(question=question), label, meta, {"windows": windows_for(AVQA, row.seconds)})


AVQA = Task(
    name="avqa",
    instruction=instruction,
    target=target,
    parse=parse,
    stats=stats,
    reduce=reduce,
    constants=constants,
    headline="accuracy",
    metrics=METRICS,
    label=LABEL,
    shown=lambda meta: str(meta["answer"]),
    fields=("question",),
    unasked={"question": QUESTIONS},
    arguments=arguments,
    tags=("answer",),
    disagreements=disagreements,
    oddities=oddities,
    answer_start="So the answer is",
    columns=("question", "answer", "type"),
    from_row=from_row,
    windows=("music_avqa", "ten"),
    breakdown=by_group(lambda meta: ["/".join(meta.get("type", ())) or "no type"], reduce, "accuracy"),
    published=[
        Published("Crab", {"accuracy": 0.7894, "audio": 0.7658, "visual": 0.9073, "audio_visual": 0.7413}, NOTES),
        Published("TSPM", {"accuracy": 0.7679, "audio": 0.7691, "visual": 0.8361, "audio_visual": 0.7351}, NOTES),
        Published("LAVISH", {"accuracy": 0.7446, "audio": 0.7597, "visual": 0.8022, "audio_visual": 0.7126}, NOTES),
        Published("VALOR", {"accuracy": 0.7890}, NOTES),
        Published("PAVE", {"accuracy": 0.8230}, AV_REASONER),
        Published("AV-Reasoner", {"accuracy": 0.8339}, AV_REASONER),
        Published("AV-Reasoner, thinking", {"accuracy": 0.8501}, AV_REASONER),
    ],
)
