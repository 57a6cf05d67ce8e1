"""Sound: any file or track to mono samples at 16 kHz."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from crab_jax.errors import InputError
from data_pipelines.media.container import decode_alone, opened, require

SAMPLE_RATE = 16000
SOUNDFILE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
_LOWEST_RATE = 1000  # Hz; below it a header is wrong, and resampling to 16 kHz would fill the memory
_AUDIO_BLOCK = 1 << 16  # samples


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
    path = require(path, "audio")
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
    with opened(path, "audio") as container:
        if not container.streams.audio:
            fix = "give an audio file in the 'audio' field, or set windows to 'none'"
            raise InputError(str(path), "audio", "has no audio track", fix)
        stream = container.streams.audio[0]
        decode_alone(stream)
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
    with opened(path, "audio") as container:
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
