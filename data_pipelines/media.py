"""Decoding: video, image, audio and mask files to arrays. Every failure is an InputError that names the file."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from PIL import Image
from pycocotools import mask as coco

from crab_jax.errors import InputError

SAMPLE_RATE = 16000
SEMANTIC_CLASSES = 71
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# A mask may be written where its path would be: COCO run lengths, rle:<height>x<width>:<counts>, or nothing at all.
INLINE_MASK = "rle:"
EMPTY_MASK = f"{INLINE_MASK}empty"


def _require(path: str | Path, field: str) -> str:
    if not Path(path).is_file():
        raise InputError(str(path), field, "no such file", "check the data root and the path in the annotation")
    return str(path)


@contextlib.contextmanager
def _opened(path: str | Path, field: str) -> Iterator[av.container.InputContainer]:
    """An open media container; libav errors while it is in use become InputErrors."""
    path = _require(path, field)
    try:
        with av.open(path) as container:
            if not container.streams:
                raise EOFError  # an mp4 that ends before its index opens all the same
            yield container
    except (av.FFmpegError, OSError, EOFError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or incomplete"
        raise InputError(path, field, problem, "copy or download the file again") from None


def _video_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise InputError(str(path), "video", "has no video stream", "give a video file, or leave the field out")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # the data loader already runs one decoder per core
    return stream


def video_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a video file."""
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        return stream.width, stream.height


def _decode_frames(path: str | Path, wanted: set[int], size: int) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames, resized, and the number of frames decoded in all."""
    picked, number = {}, 0
    with _opened(path, "video") as container:
        for frame in container.decode(_video_stream(container, path)):
            if number in wanted:
                # Bilinear, because it is what decord's VideoReader(width=, height=) does.
                small = frame.reformat(width=size, height=size, format="rgb24", interpolation="BILINEAR")
                picked[number] = small.to_ndarray()
            number += 1
    return picked, number


def read_video(path: str | Path, count: int, size: int) -> np.ndarray:
    """uint8[min(count, n), size, size, 3]: RGB frames i * n / count of the n frames of a video, aspect ratio ignored.

    Source: dataset/video_processor.py (decord, which resizes while decoding). On an H.264 clip of 450x360 to 56x56 the
    pixels differ from decord's by 0.08 on average and 5 at most. Raises InputError for a missing, damaged or truncated
    file, one without a video stream, and one without frames.
    """
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        declared = stream.frames
        total = declared or sum(1 for packet in container.demux(stream) if packet.size)
    while True:
        taken = min(count, total)
        indices = np.arange(taken) * total // max(taken, 1)
        picked, decoded = _decode_frames(path, set(indices.tolist()), size)
        if decoded < 0.9 * declared:
            problem = f"only {decoded} of {declared} frames can be decoded; the file is truncated"
            raise InputError(str(path), "video", problem, "copy or download the file again")
        if decoded == 0:
            raise InputError(str(path), "video", "has no frames", "give a video with at least one frame")
        if decoded == total:
            return np.stack([picked[i] for i in indices.tolist()])
        total = decoded  # the container's frame count was off: choose again from the real one


@contextlib.contextmanager
def _picture(path: str | Path, field: str) -> Iterator[Image.Image]:
    """An open picture; errors of the decoder while it is in use become InputErrors."""
    path = _require(path, field)
    try:
        with Image.open(path) as picture:
            yield picture
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or not a picture"
        raise InputError(path, field, problem, "copy or download the file again") from None


def image_size(path: str | Path, field: str = "image") -> tuple[int, int]:
    """(width, height) of a picture file."""
    with _picture(path, field) as picture:
        return picture.size


def read_image(path: str | Path, size: int, field: str = "image") -> np.ndarray:
    """uint8[size, size, 3]: an RGB picture, bicubic, aspect ratio ignored. Raises InputError."""
    with _picture(path, field) as picture:
        return np.array(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def _check_riff_length(path: str) -> None:
    """A RIFF file states its length; soundfile silently returns what is there of a shorter one."""
    with open(path, "rb") as file:
        head = file.read(8)
    stated = int.from_bytes(head[4:8], "little") + 8
    actual = Path(path).stat().st_size
    if head[:4] == b"RIFF" and actual < stated < 0xFFFFFFF0:  # all ones: written to a pipe, length unknown
        problem = f"holds {actual} of {stated} bytes; the file is truncated"
        raise InputError(path, "audio", problem, "copy or download the file again")


def _read_soundfile(path: str | Path) -> tuple[np.ndarray, int]:
    path = _require(path, "audio")
    _check_riff_length(path)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or not audio"
        raise InputError(path, "audio", problem, "copy or download the file again") from None
    return samples.mean(axis=1), rate


def _read_track(path: str | Path) -> tuple[np.ndarray, int]:
    """The first audio track of a container."""
    with _opened(path, "audio") as container:
        if not container.streams.audio:
            fix = "give an audio file in the 'audio' field, or set windows to 'none'"
            raise InputError(str(path), "audio", "has no audio track", fix)
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        to_float = av.AudioResampler(format="fltp")
        decoded = (out for frame in container.decode(stream) for out in to_float.resample(frame))
        mono = [frame.to_ndarray().mean(axis=0) for frame in decoded]
        return np.concatenate([np.zeros(0, np.float32), *mono]), stream.rate


def read_audio(path: str | Path) -> np.ndarray:
    """float32[N] mono at 16 kHz: the mean of the channels, then soxr HQ, as librosa.load does.

    wav, flac, mp3 and ogg are read by libsndfile; from any other file (mp4, m4a, aac) the first audio track is taken.
    Raises InputError for a missing, damaged, truncated or empty file, and for one without an audio track.
    """
    is_sound = Path(path).suffix.lower() in SOUNDFILE_SUFFIXES
    mono, rate = _read_soundfile(path) if is_sound else _read_track(path)
    if not len(mono):
        raise InputError(str(path), "audio", "has no samples", "give an audio file that is not empty")
    if not np.isfinite(mono).all():
        raise InputError(str(path), "audio", "holds NaN or infinite samples", "export the audio again")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return mono.astype(np.float32, copy=False)


@functools.cache
def avss_palette() -> np.ndarray:
    """uint8[71, 3]: RGB colour of each AVSBench-semantic class (the bits of the class id, spread over the channels)."""
    palette = np.zeros((SEMANTIC_CLASSES, 3), np.uint8)
    for label in range(SEMANTIC_CLASSES):
        for bit in range(3):
            for channel in range(3):
                palette[label, channel] |= (label >> (3 * bit + channel) & 1) << (7 - bit)
    palette.setflags(write=False)
    return palette


def _labels_of_colours(rgb: np.ndarray) -> np.ndarray:
    """int32[H, W] class ids of exact palette colours; any other colour is background, as in the reference."""
    weights = np.array([65536, 256, 1])
    codes, keys = rgb.astype(np.int64) @ weights, avss_palette().astype(np.int64) @ weights
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys[order], codes), SEMANTIC_CLASSES - 1)
    return np.where(keys[order][place] == codes, order[place], 0).astype(np.int32)


def inline_mask(code: Mapping[str, Any]) -> str:
    """The text that stands for a mask given as COCO run lengths, {"size": [height, width], "counts": bytes}."""
    return f"{INLINE_MASK}{code['size'][0]}x{code['size'][1]}:{code['counts'].decode()}"


def _decode_inline(code: str) -> np.ndarray:
    """uint8[H,W] of what `inline_mask` wrote."""
    found = re.fullmatch(rf"{INLINE_MASK}([1-9][0-9]{{0,4}})x([1-9][0-9]{{0,4}}):([0-o]+)", code)
    try:
        if not found:
            raise ValueError
        return coco.decode({"size": [int(found[1]), int(found[2])], "counts": found[3].encode()})
    except ValueError:
        fix = f"write {INLINE_MASK}<height>x<width>:<counts>, or the path of a picture"
        raise InputError(code[:60], "mask", "is no mask in COCO run lengths", fix) from None


def _check_size(size: tuple[int, int], picture: tuple[int, int] | None, where: str) -> None:
    if picture is not None and size != picture:
        problem = f"is {size[0]}x{size[1]}, but its picture is {picture[0]}x{picture[1]}"
        raise InputError(where, "mask", problem, "export the mask at the size of its picture")


def _binary(grey: np.ndarray, size: int, where: str, picture: tuple[int, int] | None) -> np.ndarray:
    """int32[size, size], 1 where grey[H, W] is above 0."""
    _check_size((grey.shape[1], grey.shape[0]), picture, where)
    # The nearest rule of cv2 (floor(i * scale)); Pillow's, half a pixel off, is the semantic masks' one.
    rows, columns = (np.arange(size) * n // size for n in grey.shape)
    return (grey[rows[:, None], columns] > 0).astype(np.int32)


def read_mask(path: str | Path, size: int, kind: str, picture: tuple[int, int] | None = None) -> np.ndarray:
    """int32[size, size]: a ground-truth mask, nearest neighbour.

    `binary`: 1 where the grey value is above 0. `semantic`: class ids 0..70, from the indices of a palette or grey PNG
    or from the exact AVSBench colours of an RGB one (unknown colours are 0). `picture` is the (width, height) of the
    picture that the mask belongs to. Raises InputError for a damaged file, another size than `picture`, or an id > 70.
    A `path` that starts with INLINE_MASK is a binary mask itself.
    """
    if (code := Path(path).name).startswith(INLINE_MASK):
        grey = np.zeros((1, 1)) if code == EMPTY_MASK else _decode_inline(code)
        return _binary(grey, size, str(path), None if code == EMPTY_MASK else picture)
    with _picture(path, "mask") as mask:
        if kind == "binary":
            return _binary(np.array(mask.convert("L")), size, str(path), picture)
        _check_size(mask.size, picture, str(path))
        small = mask if mask.mode in ("P", "L") else mask.convert("RGB")
        small = small.resize((size, size), Image.Resampling.NEAREST)
        values = np.array(small)
    if values.ndim == 3:
        return _labels_of_colours(values)
    if values.max(initial=0) >= SEMANTIC_CLASSES:
        problem = f"class id {values.max()} is outside 0..{SEMANTIC_CLASSES - 1}"
        raise InputError(str(path), "mask", problem, "use the 71 AVSBench-semantic classes")
    return values.astype(np.int32)
