"""MUSIC-AVQA (Li et al. 2022, GeWu-Lab/MUSIC-AVQA): questions about musical performances, answered in one phrase.

    data/json_update/avqa-{train,val,test}.json     conflicting duplicates resolved; used by Crab
    data/json/avqa-{train,val,test}.json            as first published; 55 test questions occur twice with other answers
    videos/<video_id>.mp4                           or MUSIC-AVQA-videos-Real/, MUCIS-AVQA-videos-Synthetic/

`type` and `templ_values` are JSON lists inside text, and the answer's field is spelled `anser`. Instead of these files
Crab's lists are read, `[valid_]<split>_samples.json`, whose `type` is a list and whose `question` is filled, and its
audio_data/<video_id>.mp3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from crab_jax.io.structured import strict_json
from crab_jax.tasks import avqa
from crab_jax.tasks.text import normalise
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each, sample_lists

ANSWERS = (
    "two",
    "cello",
    "congas",
    "zero",
    "no",
    "pipa",
    "six",
    "yes",
    "one",
    "four",
    "three",
    "seven",
    "five",
    "ukulele",
    "right",
    "piano",
    "left",
    "accordion",
    "clarinet",
    "guzheng",
    "more than ten",
    "nine",
    "indoor",
    "saxophone",
    "drum",
    "violin",
    "middle",
    "outdoor",
    "bagpipe",
    "bassoon",
    "acoustic_guitar",
    "banjo",
    "electric_bass",
    "ten",
    "eight",
    "flute",
    "simultaneously",
    "trumpet",
    "erhu",
    "xylophone",
    "tuba",
    "suona",
)
FOLDERS = (
    "videos",
    "video_data",
    "MUSIC-AVQA-videos-Real",
    "MUCIS-AVQA-videos-Synthetic",  # (sic)
    "MUSIC-AVQA-videos-Synthetic",
)
_DIGITS = 8  # digits in the name of a real video
_SLOT = re.compile(r"<[^<>]*>")


def read(release: Release, split: str, variant: str, annotations: str = "json_update") -> Iterator[Found]:
    """Yield Examples of task `avqa`; meta: answer, type, question, video, question_id.

    annotations: "json_update", or "json", where a question may occur twice; its second row is `<question_id>.2`.
    """
    times: Counter[int] = Counter()

    def examples(row: Row) -> Iterator[Example]:
        video = row.name("video_id", "00000093 or va00000093")
        number = row.integer("question_id", 0, 10**9)
        path = release.pick(f"{video}.mp4", *FOLDERS)
        if video.isdecimal() and len(video) < _DIGITS and not release.kind(path):
            raise row.error("video_id", f"is {video!r}: its leading zeros are lost", f"write it as {video:0>{_DIGITS}}")
        kind = _listed(row, "type", 2)
        if "_".join(normalise(" ".join(kind)).split()) not in avqa.SUBTYPES:
            raise row.error("type", f"unknown value {kind}", f"use one of {', '.join(avqa.SUBTYPES)}")
        question = row.words("question") if listed else fill(row)
        answer = row.one_of("answer" if listed else "anser", ANSWERS)
        times[number] += 1
        again = f".{times[number]}" if annotations == "json" and times[number] > 1 else ""
        yield Example(
            id=f"{number}{again}",
            task="avqa",
            instruction=avqa.instruction(variant, question=question),
            target=avqa.target(answer),
            windows="music_avqa",
            video=release.inside(path, row.where, "video_id"),
            audio=release.sound(video),
            meta={
                "answer": answer,
                "type": kind,
                "question": question,
                "video": video,
                "question_id": number,
                "row": row.place,
            },
        )

    name = f"{annotations}/avqa-{split}.json"
    lists = sample_lists(split, "music_avqa_data") if annotations == "json_update" else ()
    name = release.annotation(f"data/{name}", name, *lists)
    listed = name in lists
    return each(release.records(name, "question_id"), examples)


def fill(row: Row) -> str:
    """Return the question with its slots (`<Object>`, `<LR>`, ...) replaced from left to right by `templ_values`.

    The full-width question mark and the trailing space of a few templates become plain ones.
    """
    question, values = row.text("question_content"), _listed(row, "templ_values")
    if len(_SLOT.findall(question)) != len(values):
        raise row.error("templ_values", f"does not fill the slots of {question!r:.80}", "give one value per <slot>")
    rest = iter(values)
    return _SLOT.sub(lambda slot: next(rest), question).replace("\uff1f", "?").strip()


def _listed(row: Row, field: str, length: int | None = None) -> list[str]:
    """Return a list of texts, which is mostly written as JSON inside text. Raises InputError."""
    values = row.values.get(field)
    if not isinstance(values, list):
        try:
            values = strict_json(row.text(field))
        except ValueError:
            values = None
    if (
        not isinstance(values, list)
        or not all(isinstance(value, str) for value in values)
        or (length is not None and len(values) != length)
    ):
        raise row.error(
            field, f"is {row.values.get(field)!r:.60}", 'must be a JSON list of texts, such as ["Audio", ...]'
        )
    return values
