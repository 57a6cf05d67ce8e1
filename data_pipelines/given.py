"""Media given with a question: clips, pictures and sounds, as files or as arrays in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.files import whole
from data_pipelines import fbank, media
from data_pipelines.decoded import Files
from data_pipelines.media import SAMPLE_RATE, Heard, Timing
from data_pipelines.media.limits import check, check_sound
from data_pipelines.shards import Decoding


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip in memory: frames uint8[T,H,W,3] in RGB, evenly spaced over `seconds`."""

    frames: np.ndarray
    seconds: float


class Given:
    """Media by name: arrays that were added under a name, and files, whose names are their paths.

    folder: where pictures and sounds that are made for a question are written; None keeps them in memory. All methods
    raise InputError for missing, damaged or malformed media.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._clips: dict[str, Clip] = {}
        self._pictures: dict[str, np.ndarray] = {}
        self._sounds: dict[str, np.ndarray] = {}

    @classmethod
    def together(cls, several: Sequence[Given]) -> Given:
        """Return the arrays of several, whose names differ, as one."""
        new = cls()
        for given in several:
            new._clips |= given._clips
            new._pictures |= given._pictures
            new._sounds |= given._sounds
        return new

    def holds(self, name: str) -> bool:
        """Return whether a name stands for an array."""
        return name in self._clips or name in self._pictures or name in self._sounds

    # Adding media

    def add_clip(self, name: str, frames: np.ndarray, seconds: float) -> str:
        """Add frames uint8[T,H,W,3] of a clip of this length in seconds, and return its name."""
        _check_pixels(frames, 4, "video")
        if not (np.isfinite(seconds) and seconds > 0):
            raise InputError("video", "seconds", f"is {seconds!r}", "give the length of the clip in seconds")
        self._clips[name] = Clip(frames, float(seconds))
        return name

    def add_picture(self, name: str, pixels: np.ndarray) -> str:
        """Add a picture uint8[H,W,3] in RGB, and return its name."""
        _check_pixels(pixels, 3, "image")
        self._pictures[name] = pixels
        return name

    def add_sound(self, name: str, samples: np.ndarray, rate: int) -> str:
        """Add a sound float[N] or float[N,C] between -1 and 1, of `rate` samples per second, and return its name."""
        samples = np.asarray(samples)
        if samples.ndim not in (1, 2) or not samples.size or not np.issubdtype(samples.dtype, np.floating):
            raise InputError(
                "audio",
                "",
                f"is {samples.dtype}{list(samples.shape)}",
                "give float32[samples] or float32[samples, channels], between -1 and 1 (int16: divide by 32768)",
            )
        check_sound("audio", len(samples) / rate if rate > 0 else 0, rate, samples[0].size)
        if not np.isfinite(samples).all():
            raise InputError("audio", "", "holds NaN or infinite samples", "give numbers between -1 and 1")
        check("audio", "", loudest=float(np.abs(samples).max()))
        mono = (samples if samples.ndim == 1 else samples.mean(axis=1)).astype(np.float32)
        self._sounds[name] = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
        return name

    def keep_picture(self, name: str, pixels: np.ndarray) -> str:
        """Store a generated picture uint8[H,W,3], and return the name by which it is read."""
        if self._folder is None:
            return self.add_picture(f"{name}_picture", pixels)
        file = self._folder / f"{name}_picture.png"
        with whole(file) as partial:
            Image.fromarray(pixels).save(partial, compress_level=1)
        return str(paths.local(file.absolute()))

    def keep_sound(self, name: str, samples: np.ndarray) -> str:
        """Store a generated sound float32[N] at 16 kHz, and return the name by which it is read."""
        if self._folder is None:
            self._sounds[f"{name}_sound"] = samples
            return f"{name}_sound"
        file = self._folder / f"{name}_sound.wav"
        with whole(file) as partial:
            soundfile.write(partial, samples, SAMPLE_RATE, subtype="FLOAT")
        return str(paths.local(file.absolute()))

    # Reading media

    def picture(self, name: str) -> np.ndarray:
        """Return uint8[H,W,3]: a picture, upright, at its own size."""
        return self._pictures[name] if name in self._pictures else media.read_picture(name)

    def picture_size(self, name: str) -> tuple[int, int]:
        """Return the (width, height) of a picture."""
        return _size(self._pictures[name]) if name in self._pictures else media.image_size(name)

    def check_video(self, name: str) -> None:
        """Decode the frames of a clip that a model sees, to raise any InputError."""
        if name not in self._clips:
            media.read_video(name, 10, 16)

    def video_size(self, name: str) -> tuple[int, int]:
        """Return the (width, height) of a clip."""
        return _size(self._clips[name].frames[0]) if name in self._clips else media.video_size(name)

    def moment(self, name: str, part: int, parts: int) -> np.ndarray:
        """Return uint8[H,W,3]: the frame shown at `part` / `parts` of a clip."""
        if name in self._clips:
            frames = self._clips[name].frames
            frame: np.ndarray = frames[part * len(frames) // parts]
            return frame
        return np.array(media.moment_picture(name, part, parts))

    def timing(self, name: str) -> Timing:
        """Return the clock of a clip."""
        if name in self._clips:
            clip = self._clips[name]
            return Timing(len(clip.frames), clip.seconds, False, None, "")
        return media.timing(name)

    def hear(self, name: str, video: str | None) -> Heard:
        """Return a sound and its place on the clock of the pictures of `video`."""
        seconds = self._clips[video].seconds if video in self._clips else None
        if name in self._sounds:
            length = self.timing(video).seconds if video and seconds is None else seconds
            return Heard(self._sounds[name], 0.0, length or 0.0)
        if seconds is not None:
            return media.hear(name)._replace(start=0.0, seconds=seconds)
        return media.hear(name, video)

    def cancels(self, name: str) -> bool:
        """Return whether the channels of a sound cancel each other out, so that their mean is silent."""
        return name not in self._sounds and media.cancels(name)

    def source(self, decoding: Decoding) -> _Source:
        """Return the media as decoded for a batch; see `decoded.source`."""
        return _Source(self, decoding)


class _Source(Files):
    """The media of a `Given`, decoded for a batch."""

    def __init__(self, given: Given, decoding: Decoding):
        super().__init__("/", decoding)
        self._given = given

    def video(self, path: str) -> np.ndarray:
        if path not in self._given._clips:
            return super().video(path)
        frames, size = self._given._clips[path].frames, (self.decoding.image_size,) * 2
        numbers = media.frame_numbers(len(frames), self.decoding.video_frames)
        return np.stack(
            [np.array(Image.fromarray(frames[number]).resize(size, Image.Resampling.BILINEAR)) for number in numbers]
        )

    def video_size(self, path: str) -> tuple[int, int]:
        return self._given.video_size(path)

    def picture(self, path: str, field: str) -> np.ndarray:
        if path not in self._given._pictures:
            return super().picture(path, field)
        size = (self.decoding.image_size,) * 2
        return np.array(Image.fromarray(self._given._pictures[path]).resize(size, Image.Resampling.BICUBIC))

    def picture_size(self, path: str, field: str) -> tuple[int, int]:
        return self._given.picture_size(path)

    def samples(self, path: str, video: str | None) -> np.ndarray:
        held = self._given._sounds
        return (
            self._given.hear(path, video).placed()
            if path in held or video in self._given._clips
            else (super().samples(path, video))
        )

    def sound(self, path: str, windows: str, second: int | None, video: str | None = None) -> np.ndarray:
        cut = fbank.cut_windows(self.samples(path, video), windows, second, path, self.decoding.pad_short_audio)
        return fbank.fbank(cut)


def _check_pixels(pixels: np.ndarray, axes: int, field: str) -> None:
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != axes
        or pixels.shape[-1] != 3
        or not pixels.size
    ):
        found = f"is {pixels.dtype}{list(pixels.shape)}" if isinstance(pixels, np.ndarray) else f"is {type(pixels)}"
        raise InputError(field, "", found, f"give uint8[{'frames, ' if axes == 4 else ''}height, width, 3] in RGB")


def _size(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[1], pixels.shape[0]
