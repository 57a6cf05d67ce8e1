"""Sound: any file or track to mono samples at 16 kHz."""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

from crab_jax.errors import InputError
from data_pipelines.media.container import AGAIN, demuxed, opened, sound_stream, whole
from data_pipelines.media.outline import SLACK, behind_tags, is_mpeg_audio, mpeg_frames, with_index

SAMPLE_RATE = 16000
_LOWEST_RATE = 1000  # Hz; below it a header is wrong, and resampling to 16 kHz would fill the memory
_AUDIO_BLOCK = 1 << 16  # samples
_UNKNOWN = 1 << 48  # samples; libsndfile says more of a file that was written to a pipe


def _is_soundfile(start: bytes) -> bool:
    """Whether libsndfile reads a file that begins so: WAV, FLAC, MP3, Ogg, AIFF, AU, CAF and Wave64."""
    return (start[:4] in (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"riff")
            and start[8:11] != b"AVI") or is_mpeg_audio(start)


def _read_soundfile(path: str) -> tuple[np.ndarray, int] | None:
    """(mono samples, rate) of a file as libsndfile reads it; None where it cannot."""
    try:
        with soundfile.SoundFile(os.fsencode(os.path.abspath(path))) as file:
            rate, stated, kind = file.samplerate, file.frames, file.format
            samples = _blocks(file) if stated >= _UNKNOWN else file.read(dtype="float32", always_2d=True)
        if kind == "MP3":
            samples = _whole_mp3(path, samples)
    except (soundfile.SoundFileError, OSError, MemoryError):
        return None
    exact = kind not in ("MP3", "OGG")  # else the number is guessed
    if len(samples) < (1 if exact else 0.9) * stated < _UNKNOWN:
        raise InputError(path, "audio", f"only {len(samples)} of {stated} samples can be decoded; "
                         "the file is truncated", AGAIN)
    # Channel by channel: NumPy's mean of the few values side by side takes longer than reading the file.
    return sum(samples.T[1:], samples.T[0]) / samples.shape[1], rate


def _blocks(file: soundfile.SoundFile) -> np.ndarray:
    """The samples of a file that does not say how many it has."""
    blocks = [file.read(_AUDIO_BLOCK, dtype="float32", always_2d=True)]
    while len(blocks[-1]):
        blocks.append(file.read(_AUDIO_BLOCK, dtype="float32", always_2d=True))
    return np.concatenate(blocks)


def _whole_mp3(path: str, samples: np.ndarray) -> np.ndarray:
    """The samples that libsndfile reads of an mp3, with those that it leaves out.

    It takes the number of frames from the index, which may be that of the first of several joined files, and without
    one guesses it from the first frames. So it is given an index of all frames.
    """
    with open(path, "rb") as file:
        content = file.read()
    frames = mpeg_frames(lambda at, count: content[at : at + count], len(content))
    if frames is None or (frames.stated + SLACK >= frames.whole if frames.stated
                          else len(samples) >= frames.whole * frames.samples):
        return samples
    with soundfile.SoundFile(io.BytesIO(with_index(content, frames))) as file:
        every = file.read(dtype="float32", always_2d=True)
    if frames.stated:
        return every
    # With an index, the delay of the decoder is taken off the start.
    return np.concatenate([samples, every[len(samples) - (frames.whole * frames.samples - len(every)) :]])


def _read_track(path: str) -> tuple[np.ndarray, int]:
    """The audio track of a container that players play."""
    with opened(path, "audio") as container:
        stream = sound_stream(container, path)
        to_float, waiting, mono = av.AudioResampler(format="fltp"), av.AudioFifo(), [np.zeros(0, np.float32)]

        def take(frame: av.AudioFrame | None) -> None:
            if frame is not None:
                mono.append(frame.to_ndarray().mean(axis=0))

        for packet in demuxed(container, stream):
            decoded: list[av.AudioFrame] = packet.decode()  # type: ignore[assignment]
            for frame in (out for one in decoded for out in to_float.resample(one)):
                frame.pts = None  # gaps in time are not filled
                waiting.write(frame)
                if waiting.samples >= _AUDIO_BLOCK:  # few large arrays are converted faster than many small ones
                    take(waiting.read())
        take(waiting.read())
        return np.concatenate(mono), stream.rate


def stated_seconds(path: str | Path) -> float:
    """How long the audio track of a file is by the lengths of its packets, without decoding them."""
    with opened(path, "audio") as container:
        stream = sound_stream(container, path)
        return float(sum(packet.duration or 0 for packet in container.demux(stream)) * (stream.time_base or 0))


def read_audio(path: str | Path) -> np.ndarray:
    """float32[N] mono at 16 kHz: the mean of the channels, then soxr HQ, as librosa.load does.

    What is WAV, FLAC, MP3 or Ogg by its content is read by libsndfile; from any other file (MP4, AAC, WebM) the audio
    track is taken that players play.
    Raises InputError for a missing, damaged, truncated or empty file, and for one without an audio track.
    """
    path = whole(path, "audio")
    sound = _read_soundfile(path) if _is_soundfile(behind_tags(path)) else None
    mono, rate = sound or _read_track(path)
    if rate < _LOWEST_RATE:
        raise InputError(str(path), "audio", f"has a sample rate of {rate} Hz", "export the audio again")
    if not len(mono):
        raise InputError(str(path), "audio", "has no samples", "give an audio file that is not empty")
    if not np.isfinite(mono).all():
        raise InputError(str(path), "audio", "holds NaN or infinite samples", "export the audio again")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return mono.astype(np.float32, copy=False)
