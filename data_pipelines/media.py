"""Decoding: video, image, audio and mask files to arrays. Every failure is an InputError that names the file."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from pycocotools import mask as coco

from crab_jax.errors import InputError

SAMPLE_RATE = 16000
SEMANTIC_CLASSES = 71
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# A mask may be written where its path would be: COCO run lengths, rle:<height>x<width>:<counts>, or nothing at all.
INLINE_MASK = "rle:"
EMPTY_MASK = f"{INLINE_MASK}empty"
_LOWEST_RATE = 1000  # Hz; below it a header is wrong, and resampling to 16 kHz would fill the memory
_DEEP = ("I", "I;16", "I;16L", "I;16B")  # modes of one channel of more than 8 bits
_AUDIO_BLOCK = 1 << 16  # samples
_MP4 = (".mp4", ".m4a", ".m4v", ".mov")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"styp", b"sidx", b"uuid",
              b"pnot", b"meta", b"udta")
_OTHERS = (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"G@")  # Matroska, Ogg, Flash, MPEG


def _require(path: str | Path, field: str) -> str:
    if not os.path.isfile(path):  # which says so of names that no file can have too
        raise InputError(str(path), field, "no such file", "check the data root and the path in the annotation")
    return str(path)


@contextlib.contextmanager
def _opened(path: str | Path, field: str) -> Iterator[av.container.InputContainer]:
    """An open media container; libav errors while it is in use become InputErrors."""
    path = _require(path, field)
    try:
        if damaged := mp4_damage(path):
            raise InputError(path, field, f"{damaged}; the file is damaged or incomplete", "copy or download it again")
        with av.open(path, metadata_errors="replace") as container:  # titles may be in any encoding
            if not container.streams:
                raise EOFError  # an mp4 that ends before its index opens all the same
            yield container
    except InputError:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError, MemoryError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or incomplete"
        raise InputError(path, field, problem, "copy or download the file again") from None


def mp4_damage(path: str | Path) -> str:
    """What is wrong with the outline of an MP4 file; "" when nothing is, and for a file of another kind.

    The boxes of the outermost level must add up to the file, and its index must be among them. libav reads what is
    there of a shorter file, and makes up the rest of its last frame.
    """
    if Path(path).suffix.lower() not in _MP4:
        return ""
    at, kinds, size = 0, set(), os.path.getsize(path)
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not at and kind not in _MP4_BOXES:
                other = header.startswith(_OTHERS) or (header[:4] == b"RIFF" and header[8:12] == b"AVI ")
                return "" if other else "is no MP4 file"  # another container with this ending is decoded all the same
            if kind not in _MP4_BOXES and b"moov" in kinds and b"mdat" in kinds:
                return ""  # something else behind the film
            length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
            if at + length > size:
                return f"ends inside of its {kind.decode('latin-1')!r} box, {at + length - size} bytes short"
            if length < 8:
                return "" if b"moov" in kinds else f"has a broken box at byte {at}"
            kinds.add(kind)
            at += length
    return "" if b"moov" in kinds else "has no index (moov); the copy stopped early"


def _video_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise InputError(str(path), "video", "has no video stream", "give a video file, or leave the field out")
    stream = container.streams.video[0]
    _decode_alone(stream)
    return stream


def _decode_alone(stream: Any) -> None:
    """Decode in this thread: the data loader already runs one decoder per core."""
    if stream.codec_context is None:
        raise ValueError("unknown codec")
    stream.codec_context.thread_count = 1


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns to the left that put a frame upright: phones film sideways and say so. Players and decord do it."""
    return round(frame.rotation / 90) % 4


def video_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a video file as a player shows it."""
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        frame = next(container.decode(stream), None)
        sideways = frame is not None and _quarter_turns(frame) % 2
        return (stream.height, stream.width) if sideways else (stream.width, stream.height)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[av.Packet], int]:
    """The coded frames that will be shown, in the order of the file, and how many there are with hidden ones."""
    coded = [packet for packet in container.demux(stream) if packet.size]
    return [packet for packet in coded if not packet.is_discard], len(coded)


def _needed(packets: Sequence[av.Packet], numbers: Sequence[int]) -> tuple[set[int], dict[int, int]] | None:
    """Which packets must be decoded for the frames `numbers` (in the order of showing), and time -> number of those.

    From every group of frames that starts with a key frame and refers to no other group, those up to the last wanted
    one. None when the times do not tell.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if not packets or len(set(times)) < len(packets):
        return None
    order = sorted(times)
    wanted = {order[number]: number for number in numbers}
    starts, latest = [0], times[0]
    for place in range(1, len(packets)):
        # A group starts where all before it are shown earlier.
        if packets[place].is_keyframe and latest < times[place]:
            starts.append(place)
        latest = max(latest, times[place])
    groups = [range(start, end) for start, end in itertools.pairwise([*starts, len(packets)])]
    merged: list[range] = []
    for group in groups:
        if merged and min(times[place] for place in group) < times[group.start]:
            merged[-1] = range(merged[-1].start, group.stop)  # shows frames before its key frame: refers back
        else:
            merged.append(group)
    decoded: set[int] = set()
    for group in merged:
        if places := [place for place in group if times[place] in wanted]:
            decoded.update(range(group.start, places[-1] + 1))
    return decoded, wanted


def _small(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    """uint8[size, size, 3]: a frame, upright. Frames of a video share a `scaler`, which is slow to set up."""
    # Bilinear, because it is what decord's VideoReader(width=, height=) does; in this thread, as the decoding.
    small = scaler.reformat(frame, size, size, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.rot90(small, _quarter_turns(frame))


def _decode_needed(stream: av.VideoStream, packets: Sequence[av.Packet], decoded: set[int], wanted: Mapping[int, int],
                   size: int) -> dict[int, np.ndarray]:
    """Number -> frame, resized, of those of the `wanted` times that decoding the packets `decoded` gives."""
    picked: dict[int, np.ndarray] = {}
    context, running, scaler = stream.codec_context, False, VideoReformatter()

    def take(frames: Sequence[av.VideoFrame]) -> None:
        picked.update((wanted[f.pts], _small(f, size, scaler))
                      for f in frames if f.pts is not None and f.pts in wanted)

    for place, packet in enumerate(packets):
        if place in decoded:
            take(context.decode(packet))
            running = True
        elif running:
            take(context.decode(None))
            context.flush_buffers()
            running = False
        if len(picked) == len(wanted):
            return picked
    take(context.decode(None))
    return picked


def _decode_all(path: str | Path, wanted: set[int], size: int) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames, resized, by their place among all that are decoded, and how many those are."""
    picked, number, scaler = {}, 0, VideoReformatter()
    with _opened(path, "video") as container:
        for frame in container.decode(_video_stream(container, path)):
            if number in wanted:
                picked[number] = _small(frame, size, scaler)
            number += 1
    return picked, number


def frame_numbers(total: int, count: int) -> list[int]:
    """The numbers of the frames that are taken of a video of `total`: i * total // n for each of n = min(count, total).

    The reference's `np.arange(0, total, total / n).astype(int)` is the same for every length below 4,000.
    """
    taken = min(count, total)
    return [i * total // taken for i in range(taken)]


def read_video(path: str | Path, count: int, size: int) -> np.ndarray:
    """uint8[min(count, n), size, size, 3]: RGB frames i * n / count of the n frames of a video, aspect ratio ignored.

    All its coded frames are held (opening a file twice costs more), and only what those frames need is decoded; `watch`
    finds damage anywhere. Source: dataset/video_processor.py (decord, which resizes while decoding); docs/datasets.md
    has the tolerance. Raises InputError for a missing, damaged or truncated file, one without a video stream, and one
    without frames.
    """
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        declared = stream.frames
        packets, stored = _packets(container, stream)
        total = len(packets)
        numbers = frame_numbers(total, count)
        if stored >= 0.9 * declared and (needed := _needed(packets, numbers)):
            picked = _decode_needed(stream, packets, *needed, size)
            if numbers and len(picked) == len(numbers):
                return np.stack([picked[number] for number in numbers])
    while True:  # what the container says is off: decode everything, and choose again from what there is
        numbers = frame_numbers(total, count)
        picked, decoded = _decode_all(path, set(numbers), size)
        _check_frames(decoded, declared, path)
        if decoded == total:
            return np.stack([picked[number] for number in numbers])
        total = decoded


def _check_frames(decoded: int, declared: int, path: str | Path) -> None:
    if decoded < 0.9 * declared:
        problem = f"only {decoded} of {declared} frames can be decoded; the file is truncated"
        raise InputError(str(path), "video", problem, "copy or download the file again")
    if decoded == 0:
        raise InputError(str(path), "video", "has no frames", "give a video with at least one frame")


class Watched(NamedTuple):
    """A video, seen to its end. frames: how many, damaged: those that the decoder guessed parts of; seconds from the
    first to the end of the last; (width, height) as a player shows it."""

    frames: int
    damaged: int
    seconds: float
    size: tuple[int, int]


def watch(path: str | Path) -> Watched:
    """Decode every frame of a video and keep none. Raises InputError as `read_video` does."""
    frames = damaged = 0
    begin, end = math.inf, -math.inf
    size = (0, 0)
    with _opened(path, "video") as container:
        stream = _video_stream(container, path)
        for frame in container.decode(stream):
            if not frames:
                size = (frame.height, frame.width) if _quarter_turns(frame) % 2 else (frame.width, frame.height)
            frames, damaged = frames + 1, damaged + frame.is_corrupt
            if frame.pts is not None and frame.time_base:
                tick = float(frame.time_base)
                begin, end = min(begin, frame.pts * tick), max(end, (frame.pts + (frame.duration or 0)) * tick)
        declared = stream.frames
    _check_frames(frames, declared, path)
    return Watched(frames, damaged, max(0.0, end - begin), size)


@contextlib.contextmanager
def _picture(path: str | Path, field: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """An open picture, upright, from its bytes where they are at hand; errors of the decoder become InputErrors."""
    path = str(path) if content is not None else _require(path, field)
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as picture:
            # Looking for the tag in a PNG that has none in front would decode all of it.
            if picture.format != "PNG" or "exif" in picture.info:
                ImageOps.exif_transpose(picture, in_place=True)
            yield picture
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or not a picture"
        raise InputError(path, field, problem, "copy or download the file again") from None


def image_size(path: str | Path, field: str = "image") -> tuple[int, int]:
    """(width, height) of a picture file as a viewer shows it."""
    with _picture(path, field) as picture:
        return picture.size


def read_image(path: str | Path, size: int, field: str = "image") -> np.ndarray:
    """uint8[size, size, 3]: an RGB picture, bicubic, aspect ratio ignored, what is transparent by its hidden colour.

    It is upright: a picture that was taken sideways and says so (EXIF) is turned, as viewers do; the reference reads it
    as it is stored. Raises InputError.
    """
    with _picture(path, field) as picture:
        return _square(_rgb(picture), size)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 3]: an RGB picture, resized as CLIPImageProcessor does it."""
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def alpha(path: str | Path, field: str = "mask") -> np.ndarray | None:
    """uint8[H,W]: how opaque a picture is, None for one that does not say."""
    with _picture(path, field) as picture:
        return np.array(picture.convert("RGBA").getchannel("A")) if picture.has_transparency_data else None


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits. Pillow cuts greys of 16 bits off at 255 instead of scaling them."""
    if picture.mode not in _DEEP:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    grey = np.asarray(picture)
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 0xFFFF:
        raise ValueError("grey values of more than 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")


def riff_damage(path: str | Path) -> str:
    """What is wrong with the lengths that a WAV file states; "" when nothing is, and for any other file.

    libsndfile silently returns what is there of a shorter file, and leaves out what a header does not count.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        stated = int.from_bytes(head[4:8], "little") + 8
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return ""
        if size < stated < 0xFFFFFFF0:  # all ones: written to a pipe, length unknown
            return f"holds {size} of {stated} bytes; the file is truncated"
        at, kind = 12, b""
        while at + 8 <= size and (kind != b"data" or at < stated):  # what follows the RIFF is no part of it
            file.seek(at)
            kind, length = file.read(4), int.from_bytes(file.read(4), "little")
            if not kind.isascii() or not kind.strip(b" \0").isalnum():
                return f"has no chunk at byte {at}, where its header says so; samples would be lost"
            if kind == b"data" and length >= 0xFFFFFFF0:
                return ""
            if at + 8 + length > size:
                return f"its {kind.decode()!r} chunk holds {size - at - 8} of {length} bytes; the file is truncated"
            at += 8 + length + length % 2
    return "" if kind else "ends before the samples"


def _read_soundfile(path: str | Path) -> tuple[np.ndarray, int]:
    path = _require(path, "audio")
    again = "copy or download the file again"
    try:
        if damaged := riff_damage(path):
            raise InputError(path, "audio", damaged, again)
        with soundfile.SoundFile(path) as file:
            rate, stated = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or not audio"
        raise InputError(path, "audio", problem, again) from None
    if len(samples) < 0.9 * stated:
        raise InputError(path, "audio", f"only {len(samples)} of {stated} samples can be decoded; "
                         "the file is truncated", again)
    # Channel by channel: NumPy's mean of the few values side by side takes longer than reading the file.
    return sum(samples.T[1:], samples.T[0]) / samples.shape[1], rate


def _read_track(path: str | Path) -> tuple[np.ndarray, int]:
    """The first audio track of a container."""
    with _opened(path, "audio") as container:
        if not container.streams.audio:
            fix = "give an audio file in the 'audio' field, or set windows to 'none'"
            raise InputError(str(path), "audio", "has no audio track", fix)
        stream = container.streams.audio[0]
        _decode_alone(stream)
        to_float, waiting, mono = av.AudioResampler(format="fltp"), av.AudioFifo(), [np.zeros(0, np.float32)]

        def take(frame: av.AudioFrame | None) -> None:
            if frame is not None:
                mono.append(frame.to_ndarray().mean(axis=0))

        for frame in (out for decoded in container.decode(stream) for out in to_float.resample(decoded)):
            frame.pts = None  # gaps in time are not filled
            waiting.write(frame)
            if waiting.samples >= _AUDIO_BLOCK:  # few large arrays are converted faster than many small ones
                take(waiting.read())
        take(waiting.read())
        return np.concatenate(mono), stream.rate


def stated_seconds(path: str | Path) -> float:
    """How long the first audio track of a file is by the lengths of its packets, without decoding them."""
    with _opened(path, "audio") as container:
        stream = container.streams.audio[0]
        return float(sum(packet.duration or 0 for packet in container.demux(stream)) * (stream.time_base or 0))


def read_audio(path: str | Path) -> np.ndarray:
    """float32[N] mono at 16 kHz: the mean of the channels, then soxr HQ, as librosa.load does.

    wav, flac, mp3 and ogg are read by libsndfile; from any other file (mp4, m4a, aac) the first audio track is taken.
    Raises InputError for a missing, damaged, truncated or empty file, and for one without an audio track.
    """
    is_sound = Path(path).suffix.lower() in SOUNDFILE_SUFFIXES
    mono, rate = _read_soundfile(path) if is_sound else _read_track(path)
    if rate < _LOWEST_RATE:
        raise InputError(str(path), "audio", f"has a sample rate of {rate} Hz", "export the audio again")
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


def _labels_of_colours(rgb: np.ndarray, unknown: int) -> np.ndarray:
    """int32[...] class ids of exact palette colours, uint8[..., 3]; `unknown` stands for any other colour."""
    weights = np.array([65536, 256, 1])
    codes, keys = rgb.astype(np.int64) @ weights, avss_palette().astype(np.int64) @ weights
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys[order], codes), SEMANTIC_CLASSES - 1)
    return np.where(keys[order][place] == codes, order[place], unknown).astype(np.int32)


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


def check_size(size: tuple[int, int], picture: tuple[int, int] | None, where: str) -> None:
    """Raise InputError for a mask of another (width, height) than the picture that it belongs to."""
    if picture is not None and size != picture:
        problem = f"is {size[0]}x{size[1]}, but its picture is {picture[0]}x{picture[1]}"
        raise InputError(where, "mask", problem, "export the mask at the size of its picture")


def _binary(grey: np.ndarray, size: int | None, where: str, picture: tuple[int, int] | None) -> np.ndarray:
    """int32[size, size], 1 where grey[H, W] is above 0; int32[H, W] without a size."""
    check_size((grey.shape[1], grey.shape[0]), picture, where)
    # The nearest rule of cv2 (floor(i * scale)); Pillow's, half a pixel off, is the semantic masks' one.
    rows, columns = (np.arange(size or n) * n // (size or n) for n in grey.shape)
    return (grey[rows[:, None], columns] > 0).astype(np.int32)


def _check_palette(mask: Image.Image, where: str) -> None:
    """Raise InputError for a palette that has the colours of other classes than its indices say, as a program that
    sorts palettes leaves it: neither of the two can be trusted."""
    colours = np.array(mask.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = np.flatnonzero(mask.histogram())
    if used[-1] < len(colours):
        classes = _labels_of_colours(colours[used], -1)
        if (classes >= 0).all() and (wrong := np.flatnonzero(classes != used)).size:
            problem = f"has the colour of class {classes[wrong[0]]} for palette index {used[wrong[0]]}"
            raise InputError(where, "mask", problem, "export the mask as RGB, or with the index as the class id")


def read_mask(path: str | Path, size: int | None, kind: str, picture: tuple[int, int] | None = None,
              unknown: int = 0, content: bytes | None = None) -> np.ndarray:
    """int32[size, size]: a ground-truth mask, nearest neighbour; int32[H, W] of its own size with None.

    `binary`: 1 where the grey value is above 0. `semantic`: class ids 0..70, from the indices of a palette or grey PNG
    or from the exact AVSBench colours of an RGB one; another colour is `unknown`, background as in the reference.
    `picture` is the (width, height) of the picture that the mask belongs to. Raises InputError for a damaged file,
    another size than `picture`, an id > 70, or a palette that contradicts the ids.
    A `path` that starts with INLINE_MASK is a binary mask itself. `content`: the bytes of the file, read already.
    """
    if (code := Path(path).name).startswith(INLINE_MASK):
        grey = np.zeros((1, 1)) if code == EMPTY_MASK else _decode_inline(code)
        return _binary(grey, size, str(path), None if code == EMPTY_MASK else picture)
    with _picture(path, "mask", content) as mask:
        if kind == "binary":
            grey = np.array(mask if mask.mode in _DEEP else mask.convert("L"))
            return _binary(grey, size, str(path), picture)
        check_size(mask.size, picture, str(path))
        if mask.mode == "P":
            _check_palette(mask, str(path))
        if mask.mode == "LA":
            mask = mask.convert("L")
        small = mask if mask.mode in ("P", "L", "1", *_DEEP) else mask.convert("RGB")
        if size is not None:
            small = small.resize((size, size), Image.Resampling.NEAREST)
        values = np.array(small)
    if values.ndim == 3:
        return _labels_of_colours(values, unknown)
    if values.max(initial=0) >= SEMANTIC_CLASSES:
        problem = f"class id {values.max()} is outside 0..{SEMANTIC_CLASSES - 1}"
        raise InputError(str(path), "mask", problem, "use the 71 AVSBench-semantic classes")
    return values.astype(np.int32)
