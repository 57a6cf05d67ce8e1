"""Answer questions about your own clips and pictures.

    python -m crab_jax.predict --checkpoint runs/x --video clip.mp4 --all-tasks --out out
    python -m crab_jax.predict --checkpoint runs/x --video clip.mp4 --question "What is heard?" --out out
    python -m crab_jax.predict --checkpoint runs/x --task s4 --image dog.jpg --audio dog.wav --out out
    python -m crab_jax.predict --checkpoint runs/x --samples samples.json --out out

The sound is the video's own track unless --audio is given; missing sound is filled with silence, with a warning. A
--question without --task is put to the model as it stands; with --task avqa it gets the prompt of MUSIC-AVQA.
--all-tasks asks every question that suits the clip, or the picture with its sound, and writes page.html, one file with
all answers. --samples is a JSON list of objects with the keys task, video_path | image_path, audio_path, question,
expression, second (or idx), mask_path (a true mask, drawn as an outline for comparison), windows and prompt_variant;
paths are relative to the file. The command writes predictions.jsonl and pictures into --out: ID_picture.png, the
picture that the question is about as the model saw it (upright, RGB), masks and overlays at its size (for avss with a
legend of the colours), boxes for arig, and time lines for ave and avvp. --task-modules adds tasks of your own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crab_jax.aot import compile_cache
from crab_jax.api import ASKED, load
from crab_jax.inference import Prediction
from crab_jax.io import paths
from crab_jax.io.bounds import ANY_PLACE, ANYWHERE, Real, Whole
from crab_jax.io.errors import CommandLine, InputError, printable, run_verb
from crab_jax.io.files import append_line, write_whole
from crab_jax.io.locks import locked
from crab_jax.models.generating import KINDS
from crab_jax.questions import KEYS, VARIANTS, Request, every_task, read_samples, request
from crab_jax.reports import clip_page
from crab_jax.runs.run_folder import use_tasks_of
from crab_jax.tasks import TASKS, add_flag
from crab_jax.tasks.task import FREE
from crab_jax.visualize import overlay
from data_pipelines import media
from data_pipelines.examples import WINDOWS, Example
from data_pipelines.given import Given


def draw(asked: Request, prediction: Prediction, out: Path) -> dict[str, str]:
    """Write the pictures of one answer; return their names, {"mask": name, "mask_2": name, ..., "overlay": name}."""
    example, parsed = asked.example, prediction.parsed
    files: dict[str, bytes] = {}
    task = TASKS[example.task]
    if task.answer == "events":
        files["overlay"] = time_line(example, overlay.event_tracks(example.task, parsed))
    elif asked.picture is not None and task.about_picture:
        picture = media.read_picture(asked.picture)
        size = picture.shape[1], picture.shape[0]
        drawn, masks = picture, []
        for mask in () if prediction.mask is None else (prediction.mask, *prediction.further_masks):
            masks.append(overlay.resize_mask(mask, size))
            files["mask" if len(masks) == 1 else f"mask_{len(masks)}"] = overlay.mask_png(masks[-1])
            drawn = overlay.overlay_mask(drawn, masks[-1])
        if task.answer == "box" and parsed is not None and (box := task.box(parsed)):
            drawn = overlay.overlay_boxes(drawn, [(box, overlay.PREDICTION, "answer")])
        if example.mask:
            truth = media.read_mask(example.mask, max(size), example.mask_kind)  # `request` has compared the sizes
            masks.append(overlay.resize_mask(truth, size))
            drawn = overlay.overlay_outline(drawn, masks[-1])
        if masks and example.mask_kind == "semantic":
            drawn = overlay.legend(drawn, overlay.class_colours(*masks))
        if drawn is not picture:
            files["overlay"] = overlay.png(drawn)
    names = {}
    for kind, data in files.items():
        names[kind] = f"{example.id}_{kind}.png"
        write_whole(out / names[kind], data)
    return names


def time_line(example: Example, tracks: Sequence[overlay.Track]) -> bytes:
    """Return a PNG of events under the pictures and the sound of a clip."""
    frames = media.read_video(str(example.video), overlay.PARTS, 96)
    sound = media.clip_sound(str(example.audio), example.video)
    seconds = media.timing(str(example.video)).seconds or len(sound) / media.SAMPLE_RATE
    return overlay.timeline(sound, frames, tracks, seconds)


def predict(arguments: argparse.Namespace) -> None:
    """Answer everything that the command line asks for."""
    with locked(arguments.out) as out:
        _predict(arguments, out)


def _predict(arguments: argparse.Namespace, out: Path) -> None:
    given = {key: getattr(arguments, key) for key in KEYS if getattr(arguments, key, None) is not None}
    if arguments.samples:
        records = read_samples(paths.at(arguments.samples))
    else:
        records = [(record, "command line") for record in (every_task(given) if arguments.all_tasks else [given])]
    asked = {}
    for number, (record, where) in enumerate(records):
        name = f"{number:03d}_{record.get('task', FREE)}"
        asked[name] = request(record, where, name, Given(out))

    crab = load(arguments.checkpoint, arguments.weights, batch_size=arguments.batch_size, tensor=arguments.tensor)
    examples = [question.example for question in asked.values()]
    decoding = {
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "force_masks": arguments.force_masks,
        "mask_groups": arguments.mask_groups,
    }

    def tell(example: Example, text: str) -> None:
        several = arguments.batch_size > 1  # then pieces of different answers alternate, one line each
        print(f"  {printable(example.id)} ... {text}" if several else text, end="\n" if several else "", flush=True)

    answers = crab.predict(
        examples,
        "/",
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        decoding=decoding,
        on_text=tell if arguments.stream else None,
        **ASKED,
    )
    answered: dict[str, clip_page.Answered] = {}
    file = out / "predictions.jsonl"
    write_whole(file, "")
    for prediction in answers:
        question = asked[prediction.example.id]
        example, files = question.example, draw(question, prediction, out)
        warnings = [*question.warnings, *prediction.warnings]
        append_line(
            file,
            {
                "id": example.id,
                "task": question.task,
                "prompt": example.instruction,
                "text": prediction.text,
                "parsed": prediction.parsed,
                "mask": files.get("mask"),
                "overlay": files.get("overlay"),
                "further_masks": [name for kind, name in files.items() if kind.startswith("mask_")],
                "warnings": warnings,
            },
        )
        if arguments.stream:
            print()
        print(f"{printable(example.id)}: {prediction.text}")
        for warning in warnings:
            print(f"  warning: {printable(warning)}")
        for kind, name in files.items():
            print(f"  {kind}: {out / name}", flush=True)
        shown = (out / files["overlay"]).read_bytes() if "overlay" in files else None
        answered[example.id] = clip_page.Answered(prediction, shown, tuple(warnings))
    print(f"answers: {file}")
    if arguments.all_tasks:
        answers_in_order = [answered[name] for name in asked]
        clip = next((example for example in examples if example.video), None)
        times = time_line(clip, clip_page.tracks(answers_in_order)) if clip else None
        media_files = [given[key] for key in ("video_path", "image_path", "audio_path") if key in given]
        clip_page.write(out / "page.html", media_files, answers_in_order, times)
        print(f"page: {out / 'page.html'}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises InputError when it is wrong."""
    parser = CommandLine(__doc__, "python -m crab_jax.predict")
    parser.add_argument(
        "--checkpoint", type=ANYWHERE, required=True, help="workdir of a training run, or a packed model"
    )
    parser.add_argument("--out", type=ANYWHERE, required=True, help="folder for predictions.jsonl and pictures")
    parser.add_argument("--samples", type=ANY_PLACE, metavar="JSON", help="list of samples, instead of the flags below")
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)} (default: --question without a prompt of a task)")
    parser.add_argument(
        "--all-tasks", action="store_true", help="ask every question that suits the media; writes page.html"
    )
    parser.add_argument("--video", type=ANY_PLACE, dest="video_path", metavar="FILE")
    parser.add_argument(
        "--image", type=ANY_PLACE, dest="image_path", metavar="FILE", help="a picture, with its sound in --audio"
    )
    parser.add_argument(
        "--audio", type=ANY_PLACE, dest="audio_path", metavar="FILE", help="default: the video's own track"
    )
    parser.add_argument("--mask", type=ANY_PLACE, dest="mask_path", metavar="FILE", help="a true mask to compare with")
    parser.add_argument("--question", help="the question; with --task avqa it gets the prompt of MUSIC-AVQA")
    parser.add_argument("--expression", help="for ref-avs: the object to segment, in words")
    parser.add_argument(
        "--second",
        type=Whole(),
        metavar="K",
        help="which second (a tenth of a clip, or a fifth of a short one) to ask about, from 0 (default: the loudest)",
    )
    parser.add_argument(
        "--prompt-variant",
        metavar="V",
        help=f"{', '.join(VARIANTS)} (default: train, or quick for a "
        "picture where the training prompt is about a video)",
    )
    parser.add_argument(
        "--windows", help=f"how the sound is cut: {', '.join(WINDOWS[:-1])} (default: by task and length)"
    )
    parser.add_argument("--batch-size", type=Whole(1, 2**16), default=1)
    parser.add_argument("--max-new-tokens", type=Whole(1, 2**16), default=256)
    parser.add_argument(
        "--weights",
        default="float",
        choices=KINDS,
        help="matrices of the language model: as trained, or as integers, smaller and less exact (docs/generation.md)",
    )
    parser.add_argument(
        "--tensor",
        type=Whole(0, 2**16),
        default=0,
        metavar="N",
        help="split the model over N devices (default: as few as it fits on)",
    )
    parser.add_argument("--temperature", type=Real(1e-3, 1e3, zero=True), default=0.0, help="0 (the default) is greedy")
    parser.add_argument(
        "--top-p", type=Real(1e-6, 1), default=1.0, help="sample among the likeliest tokens of this share"
    )
    parser.add_argument("--seed", type=Whole(), default=0, help="seed of sampling")
    parser.add_argument("--stream", action="store_true", help="show the text as it is written")
    parser.add_argument(
        "--force-masks",
        action="store_true",
        help="append the mask tokens where the model wrote none, so that there is a mask",
    )
    parser.add_argument(
        "--mask-groups",
        type=Whole(1, 64),
        default=1,
        metavar="G",
        help="draw a mask for each of the last G groups of mask tokens of an answer (default 1)",
    )
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    single = [key for key in KEYS if getattr(arguments, key) is not None]
    if arguments.samples and single:
        raise InputError("command line", f"--{single[0]}", "cannot be combined with --samples", "use one of the two")
    for key in ("task", "mask_path", "windows", "prompt_variant", "samples") if arguments.all_tasks else ():
        if getattr(arguments, key) is not None:
            flag = f"--{key.removesuffix('_path').replace('_', '-')}"
            raise InputError("command line", flag, "cannot be combined with --all-tasks", "use one of the two")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.predict`."""
    argv = sys.argv[1:] if argv is None else argv

    def verb() -> None:
        arguments = parse_arguments(argv)
        use_tasks_of(arguments.task_modules, arguments.checkpoint)
        compile_cache.enable()
        predict(arguments)

    run_verb(verb, "--debug" in argv)


if __name__ == "__main__":
    main()
