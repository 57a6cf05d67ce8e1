"""Draw the picture that README.md opens with: what the warm start says of one generated scene that it never saw.

make picture        or        python docs/images/draw.py --scene 5 --out docs/images/answer.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

import crab_jax as cj
from crab_jax.reports.answer_pictures import enlarged
from crab_jax.visualize import overlay
from data_pipelines.sources import scene_graph, scene_media

SEED = 1  # the warm start has learned from scenes of seed 0
COLOURS = 96  # of the file, which is then a third as large


def clip(scene: scene_graph.Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the frames uint8[T,H,W,3] and the sound float32[N] of a scene, and its things uint8[10,H,W] by second."""
    frames, things = scene_media.draw(scene)
    return np.stack([np.asarray(frame) for frame in frames]), scene_media.synthesise(scene), things


def masks_and_box(crab: cj.Crab, scene: scene_graph.Scene, second: int) -> np.ndarray:
    """Return a row of pictures of one second: as it is, with the true mask, the answered mask, the answered box."""
    frames, sound, things = clip(scene)
    media = {"video": frames, "seconds": 10.0, "audio": (sound, scene_media.SAMPLE_RATE), "second": second}
    mask = crab.answer(cj.ask(**media, task="ms3")).masks[0]
    frame = frames[second * scene_media.FPS + scene_media.FPS // 2]
    window = sound[second * scene_media.SAMPLE_RATE : (second + 1) * scene_media.SAMPLE_RATE]
    box = crab.answer(cj.ask(image=frame, audio=(window, scene_media.SAMPLE_RATE), task="arig"))
    sources = [scene_graph.KINDS.index(thing.kind) + 1 for thing in scene.sources(second)]
    picture = enlarged(frame)
    size = picture.shape[1], picture.shape[0]
    truth = overlay.resize_mask(np.isin(things[second], sources), size)
    answered = overlay.overlay_mask(picture, overlay.resize_mask(mask, size))
    boxed = overlay.overlay_boxes(picture, [(box.parsed, overlay.PREDICTION, "")] if box.parsed else [])
    return overlay.side_by_side(
        [
            (picture, f"second {second}"),
            (overlay.overlay_mask(picture, truth, overlay.TRUTH), "what sounds: truth"),
            (answered, "answer: mask (ms3)"),
            (boxed, "answer: box (arig)"),
        ]
    )


def events(crab: cj.Crab, scene: scene_graph.Scene) -> np.ndarray:
    """Return the time line of a scene: each true event over the answered one of the same name."""
    frames, sound, _ = clip(scene)
    media = {"video": frames, "seconds": 10.0, "audio": (sound, scene_media.SAMPLE_RATE)}
    label = {
        "audio": [(thing.kind, *thing.sounding) for thing in scene.sounding],
        "visual": [(thing.kind, *thing.visible) for thing in scene.visible],
    }
    tracks = [
        track._replace(label=f"{track.label}, {said}")
        for said, parsed, colour in (
            ("truth", label, overlay.TRUTH),
            ("answer", crab.answer(cj.ask(**media, task="avvp")).parsed, overlay.PREDICTION),
        )
        for track in overlay.event_tracks("avvp", parsed, colour)
    ]
    shown = frames[scene_media.FPS // 2 :: scene_media.FPS]
    line = overlay.timeline(sound, shown, sorted(tracks, key=lambda track: track.label.split(",")[0]), 10.0)
    return np.asarray(Image.open(io.BytesIO(line)).convert("RGB"))


def stacked(*pictures: np.ndarray) -> Image.Image:
    """Return pictures uint8[H,W,3] under each other, all as wide as the first."""
    width = pictures[0].shape[1]
    scaled = [Image.fromarray(p).resize((width, round(p.shape[0] * width / p.shape[1]))) for p in pictures]
    total = Image.new("RGB", (width, sum(one.height for one in scaled)), "white")
    top = 0
    for one in scaled:
        total.paste(one, (0, top))
        top += one.height
    return total


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=int, default=5, help="its number in the test split of seed 1")
    parser.add_argument("--second", type=int, default=4, help="what is asked for masks and box")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "answer.png")
    args = parser.parse_args()
    crab, scene = cj.load("warm_start"), scene_graph.sample(SEED, "test", args.scene)
    row = masks_and_box(crab, scene, args.second)
    picture = stacked(row, events(crab, scene))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
