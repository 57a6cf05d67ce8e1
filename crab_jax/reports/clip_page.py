"""The page of one clip: all answers of a model about the clip, in one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from crab_jax.inference import Prediction
from crab_jax.io import paths
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from crab_jax.tasks.task import Task
from crab_jax.visualize import overlay, page
from crab_jax.visualize.page import NONE, Html, Picture, Section, figure, jpeg, table
from data_pipelines.media.kinds import HEAD, kind_of
from data_pipelines.media.pictures import read_picture

PLAYED = {".mp4": "video/mp4", ".webm": "video/webm", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}
WIDEST = 1280  # pixels of a picture on the page
LARGEST = 8_000_000  # bytes of a media file that is embedded in the page


class Answered(NamedTuple):
    """One answer: the prediction, its picture as PNG (None without one), and the warnings about it."""

    prediction: Prediction
    picture: bytes | None
    warnings: tuple[str, ...]


def tracks(answers: Sequence[Answered]) -> list[overlay.Track]:
    """Return the events of all answers as tracks of one time line, task by task."""
    return [
        track
        for name, task in TASKS.items()
        for answer in answers
        if task.answer == "events" and answer.prediction.example.task == name
        for track in overlay.event_tracks(name, answer.prediction.parsed, both=True)
    ]


def player(path: str) -> Html:
    """Return HTML that embeds a media file, or only its name when the file is large or of another kind.

    A picture is decoded as for the model, because browsers differ in how they decode pictures.
    """
    file = paths.local(path)
    with open(file, "rb") as content:
        known = kind_of(content.read(HEAD))
    if known and known.picture:
        shown = Image.fromarray(read_picture(file))
        shown.thumbnail((WIDEST, WIDEST))
        return Html("<p>{}</p>").format(jpeg(np.array(shown), file.name))
    kind = PLAYED.get(file.suffix.lower(), "")
    if not kind or file.stat().st_size > LARGEST:
        return Html("<p>{}</p>").format(file.name)
    size = Html(' height="240"') if kind[:5] == "video" else NONE
    return Html('<p><{tag} controls{size} src="data:{kind};base64,{data}"></{tag}></p>').format(
        tag=kind[:5], size=size, kind=kind, data=base64.b64encode(file.read_bytes()).decode()
    )


def write(path: Path, media: Sequence[str], answers: Sequence[Answered], time_line: bytes | None) -> None:
    """Write the page of a clip.

    media: paths of the files that the answers are about. time_line: PNG of the events, None for a picture.
    """
    warnings = list(dict.fromkeys(warning for answer in answers for warning in answer.warnings))
    noted = NONE.join(Html("<p><b>Note:</b> {}.</p>").format(warning) for warning in warnings)
    times = figure(Picture(time_line, "Each bar is an event that the model reports.")) if time_line else NONE
    texts = [(_question(answer), _short(answer)) for answer in answers if _task(answer).answer == "text"]
    places = NONE.join(_place(answer) for answer in answers if _task(answer).about_picture)
    whole = [
        (answer.prediction.example.task, _question(answer), answer.prediction.text, "; ".join(answer.warnings))
        for answer in answers
    ]
    sections = [
        Section("clip", "The clip", NONE.join(map(player, media)) + noted),
        Section("times", "What happens when", times),
        Section("answers", "Questions and caption", table(("asked", "answer"), texts) if texts else NONE),
        Section("places", "Where it is", Html('<div class="grid">{}</div>').format(places) if places else NONE),
        Section("texts", "Every answer in full", table(("task", "asked", "answer", "notes"), whole)),
    ]
    page.write(path, f"What is in {paths.at(media[0]).name}", NONE, [section for section in sections if section.body])


def _task(answer: Answered) -> Task:
    return TASKS[answer.prediction.example.task]


def _question(answer: Answered) -> str:
    """Return the question itself, which is the last line of a prompt."""
    return answer.prediction.example.instruction.rpartition("\n")[2].removeprefix("Please answer this question: ")


def _short(answer: Answered) -> str:
    """Return the answer without the reasoning before it; the whole text when the answer cannot be read."""
    parsed, text = answer.prediction.parsed, answer.prediction.text.replace(MASK, "(mask)")
    if isinstance(parsed, dict) and "objects" in parsed:
        return ", ".join(parsed["objects"]) or "nothing"
    start = _task(answer).answer_start if _task(answer).answer == "box" else ""
    return parsed if isinstance(parsed, str) else text[max(text.rfind(start) if start else 0, 0) :]


def _place(answer: Answered) -> Html:
    """Return the picture of an answer, or the reason why there is none."""
    task = _task(answer)
    caption = f"{task.name}, {task.drawn or f'the {task.answer} of the answer'}: {_short(answer)}"
    if answer.picture is None:
        why = "; ".join(answer.prediction.warnings) or "nothing was drawn"
        return Html("<figure><p>No picture: {}.</p><figcaption>{}</figcaption></figure>").format(why, caption)
    return figure(Picture(answer.picture, caption))
