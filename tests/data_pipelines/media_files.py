"""Tiny media files for the tests: a clip whose frame number is its grey level, tones, pictures, masks."""

from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 16000


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """float32[seconds * rate]: a sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_video(path: Path, frames: int = 20, size: tuple[int, int] = (48, 32), seconds: float | None = None) -> Path:
    """A clip at 10 fps; frame i is grey of level 8 * i. `seconds` adds an AAC track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=size[0], height=size[1], pix_fmt="yuv420p")
        sound = container.add_stream("aac", rate=RATE, layout="mono") if seconds else None
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 8 * i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(tone(seconds)[None], format="fltp", layout="mono")
            frame.rate = RATE
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return path


def write_audio(path: Path, seconds: float = 10.0, rate: int = RATE, channels: int = 1) -> Path:
    """A tone, the same on every channel."""
    soundfile.write(path, np.stack([tone(seconds, rate)] * channels, axis=1), rate)
    return path


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    """uint8[H,W] or uint8[H,W,3] as a PNG or JPEG."""
    Image.fromarray(pixels).save(path)
    return path
