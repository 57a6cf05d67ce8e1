"""Questions about a user's own media: the prompt, the sound windows and the picture.

Unusual media are adapted where that is harmless, with a note in the warnings of the request; everything else is an
InputError before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.io import paths
from crab_jax.io.bounds import Anything
from crab_jax.io.errors import InputError
from crab_jax.io.structured import read_json
from crab_jax.tasks import TASKS
from crab_jax.tasks.avcap import AVCAP
from crab_jax.tasks.placeholders import AUDIO, IMAGE, VIDEO
from crab_jax.tasks.task import FREE, WINDOWS, windows_for
from data_pipelines import fbank, media
from data_pipelines.examples import Example
from data_pipelines.given import Given

READER = AVCAP.name  # the task whose parser reads answers to a question without a task: it accepts any text
KEYS = (
    "task",
    "video_path",
    "image_path",
    "audio_path",
    "question",
    "expression",
    "second",
    "mask_path",
    "windows",
    "prompt_variant",
)
VARIANTS = ("train", "test", "quick")
SILENCE = 1e-4  # root mean square below which sound counts as silent; -80 dB of full scale


@dataclasses.dataclass(frozen=True)
class Request:
    """An Example to answer.

    task: name of the task, or "question". picture: name of the picture that the question is about, None for a question
    about a clip. warnings: notes on unusual media.
    """

    task: str
    example: Example
    picture: str | None
    warnings: tuple[str, ...]


def read_samples(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Return the records of a --samples file with absolute paths, each with its place. Raises InputError."""
    if not path.is_file():
        raise InputError(str(path), "--samples", "no such file", "give a JSON list of samples")
    records = read_json(path, Anything(), "--samples", "write a list of objects")
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise InputError(str(path), "--samples", "is not a list of objects", 'write [{"task": "ave", ...}, ...]')
    placed = []
    for number, record in enumerate(records):
        record = {"second" if key == "idx" else key: value for key, value in record.items()}
        for key in record.keys() - {"second"}:
            if not isinstance(record[key], str):
                raise InputError(f"{path}[{number}]", key, f"is {record[key]!r:.60}, not text", "write it in quotes")
            if key.endswith("_path"):
                record[key] = str(paths.named_in(path.parent, record[key]))
        placed.append((record, f"{path}[{number}]"))
    return placed


def fields_of(task: str) -> tuple[str, ...]:
    """Return the fields that the prompt of a task needs, besides the media."""
    return ("question",) if task == FREE else TASKS[task].fields


def about_picture(task: str) -> bool:
    """Whether the questions of a task are about one picture, of a clip or alone."""
    return task in TASKS and TASKS[task].about_picture


def every_task(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a record for every question that suits the media of `given`.

    Where it has no question or expression, the usual ones of each task (`Task.unasked`) are asked.
    """
    about = {key: value for key, value in given.items() if key not in ("question", "expression")}
    records = []
    for name, task in TASKS.items():
        if "video_path" not in given and not task.about_picture:
            continue
        text_fields = [field for field in task.fields if field != "second"]
        for texts in itertools.product(
            *([given[field]] if field in given else task.unasked.get(field, ()) for field in text_fields)
        ):
            records.append(about | {"task": name} | dict(zip(text_fields, texts, strict=True)))
    return records


def request(record: dict[str, Any], where: str, name: str, given: Given) -> Request:
    """Check one record and make it a question; pictures and sounds that are made for it are kept in `given`.

    where: the place of the record, for errors. name: id of the Example. Raises InputError for an unknown task or key,
    for media that are missing or cannot be decoded, and for a missing question.
    """
    task = record.get("task", FREE if record.get("question") else None)
    if task not in (*TASKS, FREE):
        problem = f"unknown task {task!r}" if task else "is missing"
        raise InputError(where, "task", problem, f"use one of {', '.join(TASKS)}, or give a question alone")
    for key in record.keys() - set(KEYS):
        raise InputError(where, key, "unknown key", f"use some of {', '.join(KEYS)}")
    for key in (key for key in record if key.endswith("_path") and paths.is_remote(str(record[key]))):
        record = record | {key: str(paths.local(record[key]))}
    video, image, audio = (record.get(f"{kind}_path") for kind in ("video", "image", "audio"))
    if bool(video) == bool(image):
        raise InputError(where, "video or image", "exactly one is needed", "give a video, or a picture with its sound")
    if image and not audio:
        raise InputError(where, "audio", f"a picture has no sound, and {task} is about sound", "give an audio file")
    mask_kind = TASKS[task].mask_kind if task in TASKS else "none"
    if record.get("mask_path") and mask_kind == "none":
        raise InputError(where, "mask", f"{task} has no mask", "leave it out")
    second = record.get("second")
    if second is not None and (type(second) is not int or second < 0):
        raise InputError(where, "second", f"is {second!r}", "give a whole number from 0")
    for field in fields_of(task):
        if field != "second" and not record.get(field, "").strip():
            raise InputError(where, field, f"is missing, and {task} needs it", f"give the {field}")

    ask, one_picture = _prompt(record, task, where, image is not None)
    picture, odd = (
        show(given, image, name) if image else (None, ())
    )  # damaged files are reported before a model is loaded
    if video:
        given.check_video(video)
    if mask := record.get("mask_path"):
        media.read_mask(mask, None, mask_kind, given.picture_size(image) if image else given.video_size(str(video)))
    source, sound, warnings = listen(given, video, audio, name)
    windows = record.get("windows") or (
        windows_for(TASKS[task], len(sound) / media.SAMPLE_RATE, one_picture)
        if task in TASKS
        else "one"
        if one_picture
        else "ten"
    )
    if windows not in WINDOWS or windows == "none":
        raise InputError(where, "windows", f"unknown value {windows!r}", f"use one of {', '.join(WINDOWS[:-1])}")
    parts = 5 if windows in ("five", "one_of_five") else 10
    second = loudest(sound, parts) if second is None else second
    if (image or about_picture(task)) and second >= parts:
        raise InputError(
            where, "second", f"is {second}, but the clip has {parts} parts", f"give a number from 0 to {parts - 1}"
        )
    if image and len(sound) < fbank.SHORTEST_WINDOW * parts:
        source = given.keep_sound(name, _placed(sound, second, parts))
        warnings += (f"the audio lasts {len(sound) / media.SAMPLE_RATE:.1f} s; it is used as the sound of the picture",)
    if video and about_picture(task):
        picture = given.keep_picture(name, given.moment(video, second, parts))

    def named(path: str | None) -> str | None:
        return path if path is None or given.holds(path) else str(paths.absolute(path))

    example = Example(
        id=name,
        task=task if task in TASKS else READER,
        instruction=ask(second),
        windows=windows,
        second=second,
        video=None if one_picture else named(video),
        image=named(image or picture) if one_picture else None,
        audio=named(source),
        seg_image=None if one_picture else named(picture),
        mask=named(record.get("mask_path")),
        mask_kind=mask_kind,
    )
    return Request(task, example, picture, (*odd, *warnings))


def _prompt(record: dict[str, Any], task: str, where: str, is_image: bool) -> tuple[Callable[[int], str], bool]:
    """Return (function from second to prompt, whether the prompt is about one picture).

    The variant is the wanted one, else the first that suits the media. A prompt for a picture also suits a video, of
    which one frame is taken; a prompt for a video needs a video.
    """
    if task == FREE:
        return lambda second: f"{IMAGE if is_image else VIDEO}{AUDIO}{record['question']}", is_image
    wanted = record.get("prompt_variant")
    if wanted and wanted not in VARIANTS:
        raise InputError(where, "prompt_variant", f"unknown value {wanted!r}", f"use one of {', '.join(VARIANTS)}")

    def ask(second: int, variant: str) -> str:
        fields = {field: record[field] if field != "second" else second for field in fields_of(task)}
        return TASKS[task].instruction(variant=variant, **fields)

    variants = {variant: ask(0, variant) for variant in ((wanted,) if wanted else ("train", "quick"))}
    fitting = [
        variant
        for variant, text in variants.items()
        if ("<image>" if is_image else "<video>") in text and not ("<image>" in text and "<video>" in text)
    ]
    if not fitting and not is_image and about_picture(task):
        fitting = [variant for variant, text in variants.items() if "<video>" not in text]
    if not fitting:
        given, other = ("a picture", "a video") if is_image else ("a video", "a picture")
        if wanted:
            problem = f"the {wanted} prompt of {task} cannot be asked about {given}"
            raise InputError(where, "prompt_variant", problem, "use another one")
        problem = f"{task} cannot be asked about {given}"
        raise InputError(where, "image" if is_image else "video", problem, f"give {other}")
    return functools.partial(ask, variant=fitting[0]), "<video>" not in variants[fitting[0]]


def show(given: Given, image: str, name: str) -> tuple[str, tuple[str, ...]]:
    """Keep a user's picture as decoded, before it is resized for the model; return its name and warnings."""
    (width, height), pixels = given.picture_size(image), given.picture(image)
    kept = given.keep_picture(name, pixels)
    if pixels.shape[:2] == (height, width):
        return kept, ()
    return kept, (
        f"the picture has {width * height / 1e6:.0f} megapixels; it is read and drawn at "
        f"{pixels.shape[1]}x{pixels.shape[0]}",
    )


# Sound.


def listen(given: Given, video: str | None, audio: str | None, name: str) -> tuple[str, np.ndarray, tuple[str, ...]]:
    """Return (name, samples float32[N] at 16 kHz, warnings): the sound of a clip, aligned with its pictures.

    A sound that had to be changed is kept under `name`. A video without a sound track gets silence. Raises InputError
    for a file that cannot be decoded.
    """
    clip = given.timing(video) if video else None
    warnings = [*(clip._replace(sound=None) if audio else clip).remarks()] if clip else []
    if clip and not audio and clip.sound is None:
        sound = np.zeros(max(round(clip.seconds * media.SAMPLE_RATE), media.SAMPLE_RATE), np.float32)
        source = given.keep_sound(name, sound)
        warnings.append("the video has no sound track; it is taken as silent")
    else:
        source = str(audio or video)
        heard = given.hear(source, video)
        sound = heard.placed()
        if np.sqrt(np.mean(sound.astype(np.float64) ** 2)) < SILENCE:
            warnings.append(
                "the audio is silent: the answer can rest on the pictures only"
                if not given.cancels(source)
                else "the channels of the audio cancel each other out, and their mean, which is read, is "
                "silent: export it as mono"
            )
        if remark := heard.end_remark():
            warnings.append(remark)
        if sound is not heard.samples:
            source = given.keep_sound(name, sound)
    if video and len(sound) < fbank.SHORTEST_WINDOW * 10:
        warnings.append(
            f"the clip lasts {len(sound) / media.SAMPLE_RATE:.1f} s; its windows of sound are filled with silence"
        )
    return source, sound, tuple(warnings)


def loudest(sound: np.ndarray, parts: int) -> int:
    """Return which of `parts` equal parts of a sound has the most energy; 0 for silence."""
    return int(np.argmax([np.square(part, dtype=np.float64).sum() for part in np.array_split(sound, parts)]))


def _placed(sound: np.ndarray, second: int, parts: int) -> np.ndarray:
    """Place a short sound at second `second` of a silent clip of `parts` seconds."""
    start, total = second * media.SAMPLE_RATE, parts * media.SAMPLE_RATE
    clip = np.zeros(max(total, start + len(sound)), np.float32)
    clip[start : start + len(sound)] = sound
    return clip[:total]
