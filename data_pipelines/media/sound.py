"""Decoding of any audio file or track to mono samples at 16 kHz."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import soxr

from crab_jax.io.errors import InputError
from data_pipelines.media import clock as clocks
from data_pipelines.media import video as videos
from data_pipelines.media.clock import FrameTimes, Holes, Stamp, Timing
from data_pipelines.media.container import (
    AGAIN,
    decode_alone,
    demuxed,
    opened,
    pictures_of,
    sound_of,
    sound_stream,
    whole,
)
from data_pipelines.media.frames import SLACK, is_mpeg_audio, mpeg_frames, with_index
from data_pipelines.media.limits import check_sound, limits
from data_pipelines.media.outline import behind_tags, chained

SAMPLE_RATE = 16000
SILENT = 1e-4  # of full scale (-80 dB); below it a recording is silent
_AUDIO_BLOCK = 1 << 16  # samples
_GENERIC_INDEX = 0x0100  # AVFMT_GENERIC_INDEX of libavformat: such formats have no times
_PLANES = 8  # from this number of channels on, PyAV reads one too many and crashes
_LARGE = 1 << 26  # samples of all channels (256 MB)
_UNKNOWN = 1 << 48  # samples; libsndfile reports more for a file that was written to a pipe


def _is_soundfile(start: bytes) -> bool:
    """Return whether libsndfile reads a file that begins so: WAV, FLAC, MP3, Ogg, AIFF, AU, CAF and Wave64."""
    return (
        start[:4] in (b"RIFF", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"riff") and start[8:11] != b"AVI"
    ) or is_mpeg_audio(start)


def _read_soundfile(path: str) -> tuple[np.ndarray, int] | None:
    """Return (mono samples, rate) of a file as libsndfile reads it; None if it cannot."""
    try:
        with soundfile.SoundFile(os.fsencode(os.path.abspath(path))) as file:
            rate, stated, kind = file.samplerate, file.frames, file.format
            if (kind != "MP3" and file.subtype.startswith("MPEG")) or (kind in ("OGG", "FLAC") and chained(path)):
                return None  # libsndfile does not find their ends
            if kind in ("WAV", "WAVEX") and not stated:
                return (
                    None  # libav reads to the end of the file where a recorder was stopped before it wrote the length
                )
            check_sound(path, stated / rate if rate and stated < _UNKNOWN else 0, rate, file.channels)
            in_blocks = stated * file.channels > _LARGE or not file.seekable()
            samples = _blocks(file, path) if in_blocks else file.read(dtype="float32", always_2d=True)
        if kind == "MP3":
            samples = _whole_mp3(path, samples)
        if kind == "FLAC":
            _check_rate(path, rate)
    except (soundfile.SoundFileError, OSError, MemoryError) as error:
        start = behind_tags(path)
        if not start.startswith(b"fLaC") or not int.from_bytes(start[21:26], "big") & 0xFFFFFFFFF:
            return None
        # The file states its number of samples; libav would return a truncated file without an error.
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or incomplete"
        raise InputError(path, "audio", problem, AGAIN) from None
    exact = kind not in ("MP3", "OGG")  # for the others the number is an estimate
    if len(samples) < (1 if exact else 0.9) * stated < _UNKNOWN:
        raise InputError(
            path, "audio", f"only {len(samples)} of {stated} samples can be decoded; the file is truncated", AGAIN
        )
    # NumPy's mean over the interleaved channels would take longer than reading the file.
    return _mean(samples), rate


def _check_rate(path: str, rate: int) -> None:
    """Raise InputError for a FLAC whose first frame, which has a checksum, states another rate than its header.

    The header has no checksum, and libsndfile uses its rate.
    """
    with opened(path, "audio") as container:
        stream = sound_stream(container, path)
        decode_alone(stream)
        frame = next(container.decode(stream), None)
    if frame is not None and frame.sample_rate != rate:
        raise InputError(
            path,
            "audio",
            f"says {rate} samples a second, and its frames {frame.sample_rate}; the file is damaged",
            AGAIN,
        )


def _mean(samples: np.ndarray) -> np.ndarray:
    """Return float32[N]: the mean of the channels of float32[N, C]."""
    with np.errstate(over="ignore"):  # infinite samples are refused
        mean: np.ndarray = sum(samples.T[1:], samples.T[0]) / samples.shape[1]
        return mean


def _blocks(file: soundfile.SoundFile, path: str) -> np.ndarray:
    """Return float32[N, 1]: the mean of the channels, read in blocks so that all channels are never held at once.

    For files that are large, do not state their number of samples, or have a codec without seeking (GSM).
    """
    blocks, count = [np.zeros((0, 1), np.float32)], 0
    while len(block := file.read(_AUDIO_BLOCK, dtype="float32", always_2d=True)):
        blocks.append(_mean(block)[:, None])
        count += len(block)
        check_sound(path, count / file.samplerate, file.samplerate, file.channels)
    return np.concatenate(blocks)


def _whole_mp3(path: str, samples: np.ndarray) -> np.ndarray:
    """Return the samples that libsndfile reads from an mp3, including those that it would leave out.

    It takes the number of frames from the index, which may be that of the first of several joined files, and without an
    index estimates it from the first frames. Therefore it is given an index of all frames.
    """
    with open(path, "rb") as file:
        content = file.read()
    frames = mpeg_frames(content)
    if frames is None or (
        frames.stated + SLACK >= frames.whole if frames.stated else len(samples) >= frames.whole * frames.samples
    ):
        return samples
    with soundfile.SoundFile(io.BytesIO(with_index(content, frames))) as file:
        every: np.ndarray = file.read(dtype="float32", always_2d=True)
    if frames.stated or every.shape[1] != samples.shape[1]:
        return every
    # With an index, libsndfile removes the decoder's delay at the start.
    return np.concatenate([samples, every[len(samples) - (frames.whole * frames.samples - len(every)) :]])


class _Track(NamedTuple):
    """A decoded audio track.

    mono: samples float32[N] at `rate`. first: time of the first sample on the file's clock in seconds, None if unknown.
    times: of the frames of the film that it belongs to, None without one.
    """

    mono: np.ndarray
    rate: int
    first: Fraction | None
    times: FrameTimes | None


def _read_track(path: str | Path, timed: bool) -> _Track:
    """Return the audio track of a container that players play.

    timed: with silence in its gaps, and with the times of the pictures.
    """
    with opened(path, "audio") as container:
        stream = sound_stream(container, path)
        pictures = pictures_of(container) if timed else None
        times = videos.remembered_times(path) if pictures else None
        stamps, coded = list[Stamp](), None  # of the pictures, and the first of them
        holes, first, begun, parts, seconds = _holes(container), None, False, list[_Part](), 0.0
        for packet in demuxed(container, stream, *([pictures] if pictures and times is None else [])):
            if packet.stream is pictures:
                coded = coded or (packet if packet.size else None)
                stamps += videos.shown([packet])
                continue
            for frame in stream.decode(packet):
                first, begun = first if begun else _heard(frame), True
                if not parts or parts[-1].kind != _kind(frame):
                    parts.append(_Part(frame))
                if timed and (silence := holes.before(_seconds(frame), frame.samples, frame.sample_rate)):
                    parts[-1].rest(silence)
                parts[-1].add(frame)
                seconds += frame.samples / frame.sample_rate
                check_sound(path, seconds, frame.sample_rate, frame.layout.nb_channels)
        if pictures and times is None:
            whole = videos.begins_whole(coded, stamps)
            times = videos.times_of(stamps, pictures, path) if whole else videos.video_times(path)
        rate = parts[0].kind[0] if parts else stream.rate
        mono = [soxr.resample(part.samples(), part.kind[0], rate, quality="HQ") for part in parts]
        return _Track(np.concatenate([np.zeros(0, np.float32), *mono]), rate, first, times)


def _kind(frame: av.AudioFrame) -> tuple[int, int, str]:
    """Return (rate, channels, format) of a frame; they may change within a track (broadcasts, joined files)."""
    return frame.sample_rate, frame.layout.nb_channels, frame.format.name


class _Part:
    """Consecutive decoded frames of one `kind`."""

    def __init__(self, like: av.AudioFrame):
        self.kind = _kind(like)
        self._together = self.kind[1] if self.kind[1] >= _PLANES else 0  # number of channels, if they are interleaved
        self._to_float, self._waiting = av.AudioResampler("flt" if self._together else "fltp"), av.AudioFifo()
        self._mono: list[np.ndarray] = [np.zeros(0, np.float32)]

    def add(self, frame: av.AudioFrame) -> None:
        """Append a frame."""
        for out in self._to_float.resample(frame):
            out.pts = None  # otherwise the fifo treats a gap as an error
            self._waiting.write(out)
        if self._waiting.samples >= _AUDIO_BLOCK:  # converting few large arrays is faster than many small ones
            self._take()

    def rest(self, samples: int) -> None:
        """Append silence."""
        self._take()
        self._mono.append(np.zeros(samples, np.float32))

    def samples(self) -> np.ndarray:
        """Return float32[N], mono."""
        self._take()
        return np.concatenate(self._mono)

    def _take(self) -> None:
        if (frame := self._waiting.read()) is not None:
            channels = frame.to_ndarray()
            if self._together:
                channels = channels.reshape(-1, self._together).T
            self._mono.append(channels.mean(axis=0))


def _heard(frame: av.AudioFrame) -> Fraction | None:
    """Return the time of a frame on the clock of its file, in seconds; None if unknown."""
    return frame.pts * frame.time_base if frame.pts is not None and frame.time_base else None


def _seconds(frame: av.AudioFrame) -> float | None:
    """Return `_heard` as a float, equal to the last bit; sums of fractions would take a fifth of the decoding time."""
    tick = frame.time_base
    if frame.pts is None or tick is None:
        return None
    return frame.pts * tick.numerator / tick.denominator


def _holes(container: av.container.InputContainer) -> Holes:
    """Return a `Holes` for a container.

    AVI and streams without a container (ADTS, AC-3) have no times of sound: libav derives them from byte positions and
    the first rate, so apparent gaps are none.
    """
    splices = videos.splices(container)
    made_up = container.format.name == "avi" or (container.format.flags & _GENERIC_INDEX and not splices)
    return Holes(0 if made_up else clocks.LONGEST, clocks.SPLICE if splices else clocks.LONGEST)


def read_audio(path: str | Path) -> np.ndarray:
    """Return float32[N] mono at 16 kHz: the mean of the channels, resampled by soxr HQ, as librosa.load does.

    WAV, FLAC, MP3 and Ogg (by content) are read by libsndfile; from other files (MP4, AAC, WebM) the audio track that
    players play is taken, from its first sample, whatever its times: `clip_sound` aligns it with the pictures. Raises
    InputError for a missing, damaged, truncated or empty file, and for one without an audio track.
    """
    return _resampled(path, timed=False)[0]


def _resampled(path: str | Path, timed: bool) -> tuple[np.ndarray, Fraction | None, FrameTimes | None]:
    """Return float32[N] at 16 kHz, and the `first` and `times` of its `_Track`."""
    path = whole(path, "audio")
    sound = _read_soundfile(path) if _is_soundfile(behind_tags(path)) else None
    track = _Track(*sound, None, None) if sound else _read_track(path, timed)
    mono, rate = track.mono, track.rate
    loudest = max(float(mono.max(initial=0)), -float(mono.min(initial=0)))
    if not np.isfinite(loudest):
        raise InputError(str(path), "audio", "holds NaN or infinite samples", "export the audio again")
    if loudest > limits().loudest:
        raise InputError(
            str(path),
            "audio",
            f"holds samples of {loudest:,.3g} times full scale",
            "export it again: samples of decimal numbers lie between -1 and 1",
        )
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if not len(mono):
        raise InputError(str(path), "audio", "has no samples", "give an audio file that is not empty")
    return mono.astype(np.float32, copy=False), track.first, track.times


def cancels(path: str | Path) -> bool:
    """Return whether the channels of a sound cancel each other out, so that their mean is nearly silent.

    Raises InputError as `read_audio` does.
    """
    loudest, left, to_packed = SILENT, 0.0, av.AudioResampler("flt")
    with opened(path, "audio") as container:
        for frame in container.decode(sound_stream(container, path)):
            for out in to_packed.resample(frame):
                channels = out.to_ndarray().reshape(-1, out.layout.nb_channels)
                loudest = max(loudest, np.abs(channels).max(initial=0.0))
                left = max(left, np.abs(channels.mean(axis=1)).max(initial=0.0))
    return loudest > SILENT and left < loudest / 10


class Heard(NamedTuple):
    """A sound and its place on the clock of its pictures.

    samples: float32[N] at 16 kHz from its first one on, with silence in its gaps. start: seconds from the first picture
    to the first sample. seconds: length of the pictures, 0 if unknown or without pictures.
    """

    samples: np.ndarray
    start: float
    seconds: float

    def placed(self) -> np.ndarray:
        """Return float32[N]: the sound aligned with the pictures, see `clock.place`."""
        return clocks.place(self.samples, self.start, self.seconds, SAMPLE_RATE)

    def start_remark(self) -> str:
        """Return what `placed` does at the start of the sound, "" if negligible."""
        return clocks.start_remark(self.start)

    def end_remark(self) -> str:
        """Return what `placed` does at the end of the sound, "" if nothing."""
        end = len(self.samples) / SAMPLE_RATE + (self.start if abs(self.start) > clocks.START else 0.0)
        if not self.seconds or abs(end - self.seconds) <= clocks.END:
            return ""
        lengths = f"the audio lasts {len(self.samples) / SAMPLE_RATE:.1f} s, but the video {self.seconds:.1f} s"
        return f"{lengths}: {'the rest is filled with silence' if end < self.seconds else 'what is longer is cut off'}"


def is_own(sound: str | Path, video: str | Path | None) -> bool:
    """Return whether a sound is the track of its own film, and not a separate file beside a `video`."""
    return not video or os.path.abspath(sound) == os.path.abspath(video)


def hear(path: str | Path, video: str | Path | None = None) -> Heard:
    """Return the sound of a clip: the track of a film, or a file beside a `video`, which begins with its pictures.

    Raises InputError as `read_audio` does, and as `read_video` for the `video`.
    """
    samples, first, times = _resampled(path, timed=True)
    if not is_own(path, video):
        return Heard(samples, 0.0, float(videos.video_times(str(video)).seconds))
    if times is None or not times.ticks:
        return Heard(samples, 0.0, 0.0)
    start, _ = clocks.sound_start(first, len(samples) / SAMPLE_RATE, times)
    return Heard(samples, start, float(times.seconds))


def clip_sound(path: str | Path, video: str | Path | None = None, clock: str = "shown") -> np.ndarray:
    """Return float32[N] at 16 kHz: the sound of a clip, aligned with its pictures and of their length (`clock.place`).

    With the clock "counted" this is the result of `read_audio`. Raises InputError as `hear` does.
    """
    return read_audio(path) if clock == "counted" else hear(path, video).placed()


def timing(path: str | Path) -> Timing:
    """Return the clock of a video file, without decoding its frames. Raises InputError as `read_video` does."""
    times, first, sound = videos.video_times(path), None, None
    with opened(path, "video") as container:
        if (stream := sound_of(container)) is not None:
            decode_alone(stream)
            heard, sound = next(container.decode(stream), None), 0.0
            first = _heard(heard) if heard else None
            length = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    odd = times.odd
    if sound is not None:
        sound, odd = clocks.sound_start(first, length, times)
    return Timing(len(times.ticks), float(times.seconds), times.varies, sound, odd)
