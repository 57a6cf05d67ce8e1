"""Pictures of one answer beside the truth: a mask, a box, or events on a time line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab_jax.inference import Prediction
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import shown_label
from crab_jax.tasks.text import normalise
from crab_jax.visualize import overlay
from crab_jax.visualize.page import Picture
from data_pipelines import media, shards
from data_pipelines.decoded import inside, read_mask
from data_pipelines.examples import Example
from data_pipelines.fbank import envelope
from data_pipelines.shards import all_windows

# Pictures of single examples.


def picture_of(example: Example, root: Path, clock: str) -> np.ndarray:
    """Return the picture that an Example asks about, uint8[H,W,3], at its own size.

    A prepared root holds smaller pictures, which are enlarged to that size. clock: the one that the model was asked
    by, see `Compat`.
    """
    path = example.seg_image or example.image or (example.frames[example.second or 0] if example.frames else None)
    if prepared := shards.opened(root):
        small = prepared.picture(path, "image") if path else prepared.video(str(example.video))[example.second or 0]
        size = prepared.picture_size(path, "image") if path else prepared.video_size(str(example.video))
        return np.array(Image.fromarray(small).resize(size))
    if path is None:
        size = media.video_size(inside(root, str(example.video)))
        frame = media.read_video(inside(root, str(example.video)), 10, max(size), clock)[example.second or 0]
        return np.array(Image.fromarray(frame).resize(size))
    return media.read_picture(inside(root, path))


def enlarged(picture: np.ndarray, height: int = 240) -> np.ndarray:
    """Resize a picture to `height`, keeping its aspect, so that drawings over it are sharp on the page."""
    width = round(picture.shape[1] * height / picture.shape[0])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def mask_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """Draw picture, true mask and predicted mask side by side, for class maps with the names of the colours."""
    picture = enlarged(picture_of(example, root, clock))
    size = picture.shape[1], picture.shape[0]
    truth = overlay.resize_mask(read_mask(root, example, max(size)), size)
    truth = truth.astype(bool) if example.mask_kind == "binary" else truth
    drawn, masks = [(picture, "picture"), (overlay.overlay_mask(picture, truth, overlay.TRUTH), "truth")], [truth]
    if prediction.mask is not None:
        masks.append(overlay.resize_mask(prediction.mask, size))
        drawn.append((overlay.overlay_mask(picture, masks[1]), "prediction"))
    row = overlay.side_by_side(drawn)
    if example.mask_kind == "semantic":
        row = overlay.legend(row, overlay.class_colours(*masks))
    asked = shown_label(TASKS[example.task], example.meta)
    advice = "; ".join(prediction.warnings) or "compare the outline of the prediction with the truth"
    return Picture(overlay.png(row), f"{example.task} {example.id} ({asked}): {advice}.")


def box_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """Draw the true and the predicted box over the picture."""
    task = TASKS[example.task]
    answer = None if prediction.parsed is None else task.box(prediction.parsed)
    boxes = [
        (box, colour, caption)
        for box, colour, caption in (
            (task.box(example.meta), overlay.TRUTH, f"truth: {shown_label(task, example.meta)}"),
            (answer, overlay.PREDICTION, "answer"),
        )
        if box
    ]
    drawn = overlay.overlay_boxes(enlarged(picture_of(example, root, clock), 300), boxes)
    advice = "the two boxes should coincide" if answer else "no box could be read in the answer"
    return Picture(overlay.png(drawn), f"{example.task} {example.id}: {advice}.")


def _clip(example: Example, root: Path, clock: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the sound of a clip, float[N], its frames, uint8[T,h,w,3], and its length in seconds.

    A prepared root has filter banks in place of sound; their envelope is then drawn.
    """
    path, frames = str(example.audio or example.video), np.zeros((0, 1, 1, 3), np.uint8)
    if prepared := shards.opened(root):
        bands = prepared.sound(path, all_windows(example.windows), None, example.video)
        return (
            envelope(bands),
            prepared.video(example.video) if example.video else frames,
            prepared.seconds(path, example.windows, example.video),
        )
    sound = media.clip_sound(inside(root, path), example.video and inside(root, example.video), clock)
    if example.video:
        frames = media.read_video(inside(root, example.video), overlay.PARTS, 96, clock)
    return sound, frames, len(sound) / media.SAMPLE_RATE


def time_picture(example: Example, prediction: Prediction, root: Path, clock: str) -> Picture:
    """Draw each true event over the predicted one of the same name, on the time line of the clip."""
    sourced = [
        (track, source)
        for source, label, colour in (
            ("truth", example.meta, overlay.TRUTH),
            ("answer", prediction.parsed, overlay.PREDICTION),
        )
        for track in overlay.event_tracks(example.task, label, colour)
    ]
    order = list(dict.fromkeys(normalise(track.label) for track, _ in sourced))
    tracks = [
        track._replace(label=f"{track.label}, {source}")
        for track, source in sorted(sourced, key=lambda pair: order.index(normalise(pair[0].label)))
    ]
    sound, frames, seconds = _clip(example, root, clock)
    data = overlay.timeline(sound, frames, tracks, seconds)
    advice = (
        "each answer bar should cover the truth bar of the same event"
        if prediction.parsed
        else "no event could be read in the answer"
    )
    return Picture(data, f"{example.task} {example.id}: {advice}.")


def collect(predictions: Iterable[Prediction], root: Path, clock: str = "shown") -> dict[str, Any]:
    """Return the `pictures` and `answers` of a report, in the order of the tasks."""
    pictures: dict[str, list[Picture]] = {"masks": [], "boxes": [], "times": []}
    answers = []
    for prediction in sorted(predictions, key=lambda p: (list(TASKS).index(p.example.task), p.example.id)):
        example = prediction.example
        task = TASKS[example.task]
        if example.mask_kind != "none":
            pictures["masks"].append(mask_picture(example, prediction, root, clock))
        elif task.answer == "box":
            pictures["boxes"].append(box_picture(example, prediction, root, clock))
        elif task.answer == "events":
            pictures["times"].append(time_picture(example, prediction, root, clock))
        else:
            question = example.meta.get("question") or example.instruction.rpartition("\n")[2]
            answers.append((example.task, question, shown_label(task, example.meta), prediction.text))
    return {"pictures": pictures, "answers": answers}
