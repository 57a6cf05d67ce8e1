"""Answer questions about your own clips and pictures.

    python -m crab_jax.predict --checkpoint runs/x --task avqa --video clip.mp4 --question "What is heard?" --out out
    python -m crab_jax.predict --checkpoint runs/x --task s4 --image dog.jpg --audio dog.wav --out out
    python -m crab_jax.predict --checkpoint runs/x --samples samples.json --out out

The sound is the video's own track unless --audio is given. --samples is a JSON list of objects with the keys task,
video_path | image_path, audio_path, question, expression, second (or idx), mask_path (a true mask, drawn as an outline
for comparison), windows and prompt_variant; paths are relative to the file. Writes predictions.jsonl and pictures into
--out: masks and overlays at the size of the picture, boxes for arig, time lines for ave and avvp.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from crab_jax import compile_cache, overlay
from crab_jax.errors import CommandLine, InputError, run_verb
from crab_jax.files import out_folder
from crab_jax.inference import Prediction, predict_examples
from crab_jax.runs import load_model
from crab_jax.tasks import TASKS
from data_pipelines import media
from data_pipelines.examples import WINDOWS, Example

# What to ask each task with, besides the media.
FIELDS = {"avqa": ("question",), "ref-avs": ("expression", "second"), "s4": ("second",), "ms3": ("second",),
          "avss": ("second",)}
PICTURE_TASKS = ("arig", *(name for name, task in TASKS.items() if task.mask_kind != "none"))
KEYS = ("task", "video_path", "image_path", "audio_path", "question", "expression", "second", "mask_path", "windows",
        "prompt_variant")
VARIANTS = ("train", "test", "quick")
SILENCE = 1e-4  # root mean square of a full scale of 1: -80 dB
MUCH_SHORTER = 0.8  # of the video


@dataclasses.dataclass(frozen=True)
class Request:
    """An Example to answer, the picture it is about (None for a question about a clip), and what is odd about it."""

    example: Example
    picture: Path | None
    warnings: tuple[str, ...]


def read_samples(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The records of a --samples file with absolute paths, and where each one stands. Raises InputError."""
    if not path.is_file():
        raise InputError(str(path), "--samples", "no such file", "give a JSON list of samples")
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(str(path), "--samples", f"not valid JSON ({error})", "write a list of objects") from None
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise InputError(str(path), "--samples", "is not a list of objects", 'write [{"task": "ave", ...}, ...]')
    found = []
    for number, record in enumerate(records):
        record = {"second" if key == "idx" else key: value for key, value in record.items()}
        for key in record.keys() - {"second"}:
            if not isinstance(record[key], str):
                raise InputError(f"{path}[{number}]", key, f"is {record[key]!r}, not text", "write it in quotes")
            if key.endswith("_path"):
                record[key] = str(path.parent / record[key])
        found.append((record, f"{path}[{number}]"))
    return found


def request(record: dict[str, Any], where: str, name: str, out: Path) -> Request:
    """Check one record and make it a question; a picture that has to be taken out of a video is saved in `out`.

    Raises InputError for an unknown task or key, media that are missing or cannot be decoded, and a missing question.
    """
    task = record.get("task")
    if task not in TASKS:
        problem = f"unknown task {task!r}" if task else "is missing"
        raise InputError(where, "task", problem, f"use one of {', '.join(TASKS)}")
    for key in record.keys() - set(KEYS):
        raise InputError(where, key, "unknown key", f"use some of {', '.join(KEYS)}")
    video, image, audio = (record.get(f"{kind}_path") for kind in ("video", "image", "audio"))
    if bool(video) == bool(image):
        raise InputError(where, "video or image", "exactly one is needed", "give a video, or a picture with its sound")
    if image and not audio:
        raise InputError(where, "audio", f"a picture has no sound, and {task} is about sound", "give an audio file")
    if record.get("mask_path") and TASKS[task].mask_kind == "none":
        raise InputError(where, "mask", f"{task} has no mask", "leave it out")
    record = {"second": 0, **record}
    if type(record["second"]) is not int or record["second"] < 0:
        raise InputError(where, "second", f"is {record['second']!r}", "give a whole number from 0")
    for field in FIELDS.get(task, ()):
        if field != "second" and not record.get(field, "").strip():
            raise InputError(where, field, f"is missing, and {task} needs it", f"give the {field}")

    source: Any = audio or video  # one of them is there: a picture without sound was refused above
    sound = media.read_audio(source)
    seconds = len(sound) / media.SAMPLE_RATE
    instruction = _instruction(record, where, image is not None)
    windows = record.get("windows") or _windows(task, seconds, "<image>" in instruction)
    if windows not in WINDOWS or windows == "none":
        raise InputError(where, "windows", f"unknown value {windows!r}", f"use one of {', '.join(WINDOWS[:-1])}")
    picture = Path(image) if image else None
    if video and task in PICTURE_TASKS:
        picture = out / f"{name}_picture.png"
        video_picture(video, record["second"], 5 if windows == "five" else 10, where).save(picture)
    whole_clip = "<video>" in instruction
    example = Example(
        id=name, task=task, instruction=instruction, windows=windows, second=record["second"],
        video=_absolute(video) if whole_clip else None, image=None if whole_clip else _absolute(picture),
        audio=_absolute(source), seg_image=_absolute(picture) if whole_clip else None,
        mask=_absolute(record.get("mask_path")), mask_kind=TASKS[task].mask_kind)
    return Request(example, picture, _warnings(sound, video))


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _instruction(record: dict[str, Any], where: str, is_image: bool) -> str:
    """The prompt: of the wanted variant, else of the first one that takes the given kind of media.

    A prompt for a picture also serves a video, whose frame is taken; a prompt for a video needs one.
    """
    task, wanted = record["task"], record.get("prompt_variant")
    if wanted and wanted not in VARIANTS:
        raise InputError(where, "prompt_variant", f"unknown value {wanted!r}", f"use one of {', '.join(VARIANTS)}")
    fields = {field: record[field] for field in FIELDS.get(task, ())}
    texts = [TASKS[task].instruction(variant=v, **fields) for v in ((wanted,) if wanted else ("train", "quick"))]
    fitting = [text for text in texts if ("<image>" if is_image else "<video>") in text and not
               ("<image>" in text and "<video>" in text)]
    if not fitting and not is_image and task in PICTURE_TASKS:
        fitting = [text for text in texts if "<video>" not in text]
    if not fitting:
        given, other = ("a picture", "a video") if is_image else ("a video", "a picture")
        if wanted:
            problem = f"the {wanted} prompt of {task} cannot be asked about {given}"
            raise InputError(where, "prompt_variant", problem, "use another one")
        problem = f"{task} cannot be asked about {given}"
        raise InputError(where, "image" if is_image else "video", problem, f"give {other}")
    return fitting[0]


def _windows(task: str, seconds: float, one_picture: bool) -> str:
    """Audio windows of about a second each, as the task was trained with: see data_pipelines/fbank.py."""
    if one_picture and task != "ref-avs":
        return "one_of_five" if task in ("s4", "ms3", "arig") and seconds < 7.5 else "one"
    if task == "avqa" and seconds > 30:
        return "music_avqa"
    return "five" if task in ("s4", "ms3") and seconds < 7.5 else "ten"


def video_picture(path: str, part: int, parts: int, where: str) -> Image.Image:
    """The first frame of part `part` of `parts` of a video, at the video's own size."""
    size = media.video_size(path)
    frames = media.read_video(path, parts, max(size))
    if part >= len(frames):
        raise InputError(where, "second", f"is {part}, but the clip has {len(frames)} parts",
                         f"give a number from 0 to {len(frames) - 1}")
    return Image.fromarray(frames[part]).resize(size, Image.Resampling.LANCZOS)


def _warnings(sound: np.ndarray, video: str | None) -> tuple[str, ...]:
    found = []
    if np.sqrt(np.mean(sound.astype(np.float64) ** 2)) < SILENCE:
        found.append("the audio is silent")
    length = len(sound) / media.SAMPLE_RATE
    if video and length < MUCH_SHORTER * video_seconds(video):
        found.append(f"the audio lasts {length:.1f} s, but the video {video_seconds(video):.1f} s")
    return tuple(found)


def video_seconds(path: str) -> float:
    """Length of a video, 0 when its container does not say."""
    media.video_size(path)  # a file that cannot be opened is reported like everywhere else
    with av.open(path) as container:
        return (container.duration or 0) / av.time_base


def draw(asked: Request, prediction: Prediction, out: Path) -> dict[str, str]:
    """Write the pictures of one answer; {"mask": name, "overlay": name} of those that there are."""
    example, parsed = asked.example, prediction.parsed
    files: dict[str, bytes] = {}
    if example.task in ("ave", "avvp"):
        files["overlay"] = _draw_timeline(example, parsed)
    elif asked.picture is not None:
        with Image.open(asked.picture) as opened:
            picture = np.array(opened.convert("RGB"))
        size = picture.shape[1], picture.shape[0]
        drawn = picture
        if prediction.mask is not None:
            mask = overlay.resize_mask(prediction.mask, size)
            files["mask"] = overlay.mask_png(mask)
            drawn = overlay.overlay_mask(drawn, mask)
        if example.task == "arig" and parsed:
            drawn = overlay.overlay_boxes(drawn, [(parsed, overlay.PREDICTION, "answer")])
        if example.mask:
            truth = media.read_mask(example.mask, max(size), example.mask_kind, size)
            drawn = overlay.overlay_outline(drawn, overlay.resize_mask(truth, size))
        if drawn is not picture:
            files["overlay"] = overlay.png(drawn)
    names = {}
    for kind, data in files.items():
        names[kind] = f"{example.id}_{kind}.png"
        (out / names[kind]).write_bytes(data)
    return names


def _draw_timeline(example: Example, parsed: Any) -> bytes:
    source = str(example.video)
    frames = media.read_video(source, overlay.PARTS, 96)
    sound = media.read_audio(str(example.audio))
    seconds = video_seconds(source) or len(sound) / media.SAMPLE_RATE
    return overlay.timeline(sound, frames, overlay.event_tracks(example.task, parsed), seconds)


def predict(arguments: argparse.Namespace) -> None:
    """Answer everything that the command line asks for."""
    out = out_folder(arguments.out)
    if arguments.samples:
        records = read_samples(Path(arguments.samples))
    else:
        given = {key: getattr(arguments, key) for key in KEYS if getattr(arguments, key, None) is not None}
        records = [(given, "command line")]
    asked = {}
    for number, (record, where) in enumerate(records):
        name = f"{number:03d}_{record.get('task')}"
        asked[name] = request(record, where, name, out)

    model, params, config, tokenizer = load_model(arguments.checkpoint)
    examples = [one.example for one in asked.values()]
    answers = predict_examples(model, params, config, tokenizer, examples, "/", arguments.batch_size,
                               arguments.max_new_tokens, on_error="raise")
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in answers:
            example = prediction.example
            files = draw(asked[example.id], prediction, out)
            warnings = [*asked[example.id].warnings, *prediction.warnings]
            line = {"id": example.id, "task": example.task, "prompt": example.instruction, "text": prediction.text,
                    "parsed": prediction.parsed, "mask": files.get("mask"), "overlay": files.get("overlay"),
                    "warnings": warnings}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(f"{example.id}: {prediction.text}")
            for warning in warnings:
                print(f"  warning: {warning}")
            for kind, name in files.items():
                print(f"  {kind}: {out / name}", flush=True)
    print(f"answers: {out / 'predictions.jsonl'}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; raises InputError when it is wrong."""
    parser = CommandLine(__doc__, "python -m crab_jax.predict")
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run, or a packed model")
    parser.add_argument("--out", required=True, help="folder for predictions.jsonl and pictures")
    parser.add_argument("--samples", metavar="JSON", help="list of samples, instead of the flags below")
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--video", dest="video_path", metavar="FILE")
    parser.add_argument("--image", dest="image_path", metavar="FILE", help="with --audio, for arig and segmentation")
    parser.add_argument("--audio", dest="audio_path", metavar="FILE", help="default: the video's own track")
    parser.add_argument("--mask", dest="mask_path", metavar="FILE", help="a true mask to compare with")
    parser.add_argument("--question", help="for avqa")
    parser.add_argument("--expression", help="for ref-avs: what to segment, in words")
    parser.add_argument("--second", type=int, metavar="K", help="which second to ask about, from 0 (default 0)")
    parser.add_argument("--prompt-variant", metavar="V", help=f"{', '.join(VARIANTS)} (default: train, or quick for a "
                        "picture where the training prompt is about a video)")
    parser.add_argument("--windows", help=f"cuts of the sound: {', '.join(WINDOWS[:-1])} (default: by task and length)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    single = [key for key in KEYS if getattr(arguments, key) is not None]
    if arguments.samples and single:
        raise InputError("command line", f"--{single[0]}", "cannot be combined with --samples", "use one of the two")
    if arguments.batch_size < 1:
        raise InputError("command line", "--batch-size", f"is {arguments.batch_size}", "give at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.predict`."""
    argv = sys.argv[1:] if argv is None else argv
    compile_cache.enable()
    run_verb(lambda: predict(parse_arguments(argv)), "--debug" in argv)


if __name__ == "__main__":
    main()
