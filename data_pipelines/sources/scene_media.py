"""Drawing and sound synthesis of generated scenes, and the media files written for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image, ImageDraw

from crab_jax.io import paths
from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines.sources.scene_graph import BOX_SPACE, CLASS_IDS, KINDS, SECONDS, SIZE, Box, Scene, Thing, save

FPS = 8
SAMPLE_RATE = 16000
_LOUD_RMS = 0.08  # root mean square of a loud instrument, full scale 1
_NOISE_RMS = 0.0008
_SUPERSAMPLE = 4
_INK = (28, 28, 32)

# Each kind is a list of (shape, coordinates in the unit square, colour); fixed, so that a small encoder can learn it.
_SHAPES: dict[str, list[tuple[str, tuple[float, ...], tuple[int, int, int]]]] = {
    "piano": [
        ("box", (0.05, 0.18, 0.95, 0.82), (36, 36, 44)),
        ("box", (0.10, 0.46, 0.90, 0.76), (245, 245, 245)),
        *[("box", (x, 0.46, x + 0.06, 0.64), _INK) for x in (0.18, 0.34, 0.50, 0.66, 0.80)],
    ],
    "drum": [
        ("box", (0.12, 0.32, 0.88, 0.80), (205, 40, 45)),
        ("oval", (0.12, 0.66, 0.88, 0.94), (205, 40, 45)),
        ("oval", (0.12, 0.14, 0.88, 0.46), (250, 235, 220)),
    ],
    "violin": [
        ("oval", (0.24, 0.08, 0.76, 0.52), (175, 95, 30)),
        ("oval", (0.16, 0.42, 0.84, 0.96), (175, 95, 30)),
        ("box", (0.46, 0.04, 0.54, 0.70), _INK),
        ("box", (0.36, 0.70, 0.64, 0.76), _INK),
    ],
    "flute": [
        ("poly", (0.04, 0.72, 0.72, 0.04, 0.96, 0.28, 0.28, 0.96), (90, 205, 230)),
        *[("oval", (c - 0.06, 0.94 - c, c + 0.06, 1.06 - c), _INK) for c in (0.30, 0.50, 0.70)],
    ],
    "accordion": [
        ("box", (0.05, 0.15, 0.95, 0.85), (35, 150, 70)),
        *[("box", (x, 0.15, x + 0.05, 0.85), (190, 240, 190)) for x in (0.32, 0.44, 0.56, 0.68)],
        ("box", (0.10, 0.25, 0.20, 0.75), (250, 250, 250)),
    ],
    "trumpet": [
        ("box", (0.05, 0.42, 0.70, 0.58), (240, 190, 30)),
        ("poly", (0.60, 0.42, 0.95, 0.12, 0.95, 0.88, 0.60, 0.58), (240, 190, 30)),
        *[("box", (x, 0.22, x + 0.08, 0.50), (200, 140, 10)) for x in (0.24, 0.36, 0.48)],
        ("oval", (0.26, 0.50, 0.58, 0.78), (240, 190, 30)),
    ],
}


def _pose(thing: Thing, time: float) -> tuple[float, float, float, float]:
    """Return centre x, y (pixels), angle (radians) and scale at `time` seconds: slow motion of a few pixels."""
    swing = math.sin(2 * math.pi * (time / 5 + thing.phase))
    dx, dy, angle, scale = {
        "piano": (0.0, 0.0, 0.0, 1.0),
        "drum": (0.0, 0.022, 0.0, 1.0),
        "violin": (0.0, 0.0, 0.18, 1.0),
        "flute": (0.022, 0.0, 0.0, 1.0),
        "accordion": (0.0, 0.0, 0.0, 1.07),
        "trumpet": (0.0, 0.0, 0.18, 1.0),
    }[thing.kind]
    return (thing.x + dx * swing) * SIZE, (thing.y + dy * swing) * SIZE, angle * swing, 1 + (scale - 1) * swing


def _sprite(thing: Thing, tint: np.ndarray) -> Image.Image:
    """Return an RGBA picture of a kind, `thing.size` of the picture wide; `tint` float[3] multiplies its colours."""
    side = round(thing.size * SIZE)
    big = side * _SUPERSAMPLE
    image = Image.new("RGBA", (big, big))
    draw = ImageDraw.Draw(image)
    for shape, coordinates, colour in _SHAPES[thing.kind]:
        fill = tuple(int(min(255, c * t)) for c, t in zip(colour, tint, strict=True))
        method: Callable[..., None] = {"box": draw.rectangle, "oval": draw.ellipse, "poly": draw.polygon}[shape]
        method([c * (big - 1) for c in coordinates], fill=fill)
    return image.reduce(_SUPERSAMPLE)


def _place(sprite: Image.Image, x: float, y: float, angle: float, scale: float) -> tuple[Image.Image, tuple[int, int]]:
    """Return the sprite rotated and scaled about (x, y) on a tile, and the tile's corner in the picture."""
    side = int(sprite.width * 1.3) + 3
    left, top = math.floor(x - side / 2), math.floor(y - side / 2)
    u, v, half = x - left, y - top, sprite.width / 2
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    affine = (c, s, half - c * u - s * v, -s, c, half + s * u - c * v)  # from a tile pixel to a sprite pixel
    return sprite.transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR), (left, top)


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a light gradient between two pale colours, with fixed noise."""
    corners = rng.uniform(165, 235, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    grid = np.linspace(-0.5, 0.5, SIZE)
    ramp = 0.5 + 0.6 * (math.cos(angle) * grid[None, :] + math.sin(angle) * grid[:, None])
    pixels = corners[0] + ramp[..., None] * (corners[1] - corners[0]) + rng.normal(0, 3, (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(scene: Scene) -> tuple[list[Image.Image], np.ndarray]:
    """Return all pictures of the clip, FPS per second, and the map of uncovered things at the middle of each second.

    The map is uint8[10,SIZE,SIZE]: 0 for background, 1 + KINDS index for a thing.
    """
    rng = scene.rng("pictures")
    background = _background(rng)
    sprites = [_sprite(t, rng.uniform(0.9, 1.1, 3)) if t.visible else None for t in scene.things]
    frames, things = [], np.zeros((SECONDS, SIZE, SIZE), np.uint8)
    for index in range(SECONDS * FPS):
        second, middle = index // FPS, index % FPS == FPS // 2
        frame = background.copy()
        layer = Image.new("L", (SIZE, SIZE)) if middle else None
        for thing, sprite in zip(scene.things, sprites, strict=True):
            if sprite is None or not thing.seen(second):
                continue
            tile, corner = _place(sprite, *_pose(thing, index / FPS))
            frame.paste(tile, corner, tile)
            if layer is not None:
                layer.paste(KINDS.index(thing.kind) + 1, corner, tile.getchannel("A").point(lambda a: 255 * (a > 127)))
        frames.append(frame)
        if layer is not None:
            things[second] = np.asarray(layer)
    return frames, things


def box_of(mask: np.ndarray) -> Box | None:
    """Return the box of a bool[H,W] mask in BOX_SPACE, far edge exclusive; None when the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return None
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x1, y1, x2, y2 = (round(int(edge) * BOX_SPACE / SIZE) for edge in edges)
    return x1, y1, x2, y2


# Timbres: (pitch in [0, 1), number of samples, rng) -> float32 waveform; the level is set afterwards.


def _wave(frequency: np.ndarray | float, length: int, harmonics: np.ndarray) -> np.ndarray:
    """Return a tone of a frequency in Hz (constant or per sample) whose period has the given harmonic amplitudes."""
    cycle = np.arange(4096) * (2 * np.pi / 4096)
    table = (harmonics[:, None] * np.sin(np.arange(1, len(harmonics) + 1)[:, None] * cycle)).sum(0).astype(np.float32)
    phase = np.cumsum(np.broadcast_to(np.asarray(frequency, np.float64), length)) / SAMPLE_RATE
    wave: np.ndarray = table[((phase % 1) * 4096).astype(np.int32)]
    return wave


def _time(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.float32) / SAMPLE_RATE


def _vibrato(length: int, frequency: float, rate: float, depth: float) -> np.ndarray:
    return frequency * (1 + depth * np.sin(2 * np.pi * rate * _time(length)))


def _piano(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return two decaying notes per second of a five-note scale."""
    beat = SAMPLE_RATE // 2
    notes = 262 * 2 ** ((np.floor(pitch * 5) + rng.choice([0, 2, 4, 7, 9], length // beat)) / 12)
    envelope = np.exp(-6 * _time(beat)) * np.minimum(1, _time(beat) * 400)
    tone = _wave(np.repeat(notes, beat), length, 1 / np.arange(1, 7) ** 1.3)
    sound: np.ndarray = tone * np.tile(envelope, len(notes))
    return sound


def _drum(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return four bursts of noise per second over a low thump."""
    beat = SAMPLE_RATE // 4
    time = _time(beat)
    noise = rng.standard_normal(length, dtype=np.float32) * np.tile(np.exp(-35 * time), length // beat)
    thump = np.sin(2 * np.pi * (60 + 30 * pitch) * time) * np.exp(-18 * time)
    sound: np.ndarray = noise + 1.5 * np.tile(thump, length // beat)
    return sound


def _violin(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a sawtooth with vibrato."""
    return _wave(_vibrato(length, 440 * 2 ** (pitch * 5 / 12), 6, 0.012), length, 1 / np.arange(1, 13))


def _flute(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a high, nearly pure tone with slow vibrato and slight breath noise."""
    tone = _wave(_vibrato(length, 1250 * 2 ** (pitch * 7 / 12), 4.5, 0.008), length, np.array([1, 0.06]))
    sound: np.ndarray = tone + 0.01 * rng.standard_normal(length, dtype=np.float32)
    return sound


def _accordion(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a major chord of odd harmonics, each note with a second reed that beats against it."""
    root, reed = 233 * 2 ** (pitch * 5 / 12), np.array([1, 0, 0.5, 0, 0.35, 0, 0.25])
    notes = (_wave(root * ratio + shift, length, reed) for ratio in (1, 1.26, 1.5) for shift in (0, 5))
    return sum(notes, start=np.zeros(length, np.float32))


def _trumpet(pitch: float, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return a low note whose harmonics are strongest near 1.3 kHz, with one attack per second."""
    frequency = 156 * 2 ** (pitch * 7 / 12)
    partials = np.arange(1, 17) * frequency
    attack = np.tile(np.minimum(1, _time(SAMPLE_RATE) * 12), length // SAMPLE_RATE)
    sound: np.ndarray = _wave(frequency, length, np.exp(-(((partials - 1300) / 700) ** 2)) + 0.1) * attack
    return sound


_TIMBRES: dict[str, Callable[[float, int, np.random.Generator], np.ndarray]] = {
    "piano": _piano,
    "drum": _drum,
    "violin": _violin,
    "flute": _flute,
    "accordion": _accordion,
    "trumpet": _trumpet,
}


def timbre(kind: str, pitch: float, seconds: int, rng: np.random.Generator) -> np.ndarray:
    """Return `seconds` of one instrument: float32[seconds * SAMPLE_RATE], root mean square 1, ends faded over 10 ms."""
    length = seconds * SAMPLE_RATE
    sound = np.asarray(_TIMBRES[kind](pitch, length, rng), np.float32)
    fade = np.minimum(1, np.arange(length, dtype=np.float32) / (0.01 * SAMPLE_RATE))
    sound *= fade * fade[::-1]
    level: np.ndarray = sound / np.sqrt(np.mean(sound**2))
    return level


def synthesise(scene: Scene) -> np.ndarray:
    """Return the sound of the scene: float32[10 * SAMPLE_RATE] in [-1, 1], over faint noise."""
    rng = scene.rng("sound")
    mix = _NOISE_RMS * rng.standard_normal(SECONDS * SAMPLE_RATE, dtype=np.float32)
    for thing in scene.sounding:
        assert thing.sounding is not None
        start, end = thing.sounding
        level = _LOUD_RMS * thing.loudness
        mix[start * SAMPLE_RATE : end * SAMPLE_RATE] += level * timbre(thing.kind, thing.pitch, end - start, rng)
    limited: np.ndarray = np.clip(mix, -0.99, 0.99)
    return limited


PALETTE = avss_palette().ravel().tolist()  # flat RGB, for Pillow


def _write_mask(path: Path, ids: np.ndarray, colours: list[int] | None) -> None:
    image = Image.fromarray(ids.astype(np.uint8))
    if colours:
        image.putpalette(colours)
    image.save(path, compress_level=1)


def _write_clip(path: Path, frames: list[Image.Image], sound: np.ndarray) -> None:
    """Write H.264 (yuv420p) and AAC into one mp4; one thread, so that the bytes depend on the content only."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "superfast", "crf": "21", "threads": "1"})
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 48000
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.asarray(picture), "rgb24")))
        container.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(sound[None], "fltp", "mono")
        samples.sample_rate, samples.pts, samples.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(audio.encode(samples))
        container.mux(audio.encode())


def write_scene(folder: Path, scene: Scene, masks: Iterable[tuple[str, int]]) -> Scene:
    """Draw and synthesise a scene into `folder`; return it with its boxes.

    Files: clip.mp4, audio.wav (16 kHz mono PCM16), frames/k.jpg (middle of second k), labels_semantic/k.png (class ids
    of the things seen and heard in second k), labels_all/k.png (1 + KINDS index of every visible thing),
    masks/<kind>_<k>.png for each (kind, k) of `masks`, masks/empty.png, and last scene.json.
    """
    for name in ("frames", "labels_semantic", "labels_all", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    frames, things = draw(scene)
    sound = synthesise(scene)
    thing_colours = [c for label in (0, *CLASS_IDS.values()) for c in PALETTE[3 * label : 3 * label + 3]]
    _write_clip(folder / "clip.mp4", frames, sound)
    soundfile.write(folder / "audio.wav", sound, SAMPLE_RATE, subtype="PCM_16")
    for second, ids in enumerate(things):
        frames[second * FPS + FPS // 2].save(folder / "frames" / f"{second}.jpg", quality=92)
        classes = np.zeros(len(KINDS) + 1, np.uint8)
        for thing in scene.sources(second):
            classes[KINDS.index(thing.kind) + 1] = CLASS_IDS[thing.kind]
        _write_mask(folder / "labels_semantic" / f"{second}.png", classes[ids], PALETTE)
        _write_mask(folder / "labels_all" / f"{second}.png", ids, thing_colours)
    for kind, second in masks:
        _write_mask(folder / "masks" / f"{kind}_{second}.png", 255 * (things[second] == KINDS.index(kind) + 1), None)
    _write_mask(folder / "masks" / "empty.png", np.zeros((SIZE, SIZE)), None)
    scene = dataclasses.replace(
        scene,
        things=tuple(
            dataclasses.replace(t, boxes=tuple(box_of(ids == KINDS.index(t.kind) + 1) for ids in things))
            for t in scene.things
        ),
    )
    save(folder / "scene.json", scene)
    return scene


def occupancy(root: str | Path, scene: Scene) -> np.ndarray:
    """Return the thing that covers each pixel in each second: int32[10,SIZE,SIZE], 0 none, else 1 + KINDS index."""
    folder = paths.at(root) / scene.folder / "labels_all"
    return np.stack([np.asarray(Image.open(paths.local(folder / f"{k}.png"))) for k in range(SECONDS)]).astype(np.int32)
