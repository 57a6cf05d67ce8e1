"""Kaldi filter banks of audio windows, the input of BEATs.

Written in NumPy: kaldi-native-fbank refuses 128 mel bins at 16 kHz because the lowest triangle holds no FFT bin, while
the reference (torchaudio.compliance.kaldi, called by dataset/audio_processor.py) keeps that bin as an empty one.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.fft
import scipy.sparse

from crab_jax.io.errors import InputError

SAMPLE_RATE = 16000
MEL_BINS = 128
FRAME = 400  # samples of 25 ms
SHIFT = 160  # samples of 10 ms
FFT = 512
MEAN, STD = 15.41663, 6.55582  # AudioSet statistics of BEATs
FLOOR = np.finfo(np.float32).eps
SILENCE = np.float32((np.log(FLOOR) - MEAN) / (2 * STD))  # every value of a silent window

WINDOW_COUNT = {"ten": 10, "five": 5, "music_avqa": 10, "one": 1, "one_of_five": 1, "none": 0}
WINDOW_FRAMES = {"ten": 98, "five": 98, "music_avqa": 198, "one": 98, "one_of_five": 98, "none": 98}
# (number of parts of a clip, number of parts in a window)
PARTS = {"ten": (10, 1), "one": (10, 1), "five": (5, 1), "one_of_five": (5, 1), "music_avqa": (60, 2)}
SINGLE = {"one": 10, "one_of_five": 5}  # number of windows from which one is taken
# BEATs cuts 16x16 patches: a window with fewer frames than a patch row has no patch.
SHORTEST_WINDOW = FRAME + 15 * SHIFT


def samples_of(frames: int) -> int:
    """Return the number of samples that give exactly `frames` frames, with no sample left over."""
    return FRAME + (frames - 1) * SHIFT


@functools.cache
def mel_banks() -> np.ndarray:
    """Return float32[257, 128]: triangles on the mel axis, 20 Hz to 8 kHz; the Nyquist bin has weight 0."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log(1.0 + np.asarray(hertz) / 700.0)

    low, high = mel(20.0), mel(SAMPLE_RATE / 2)
    edges = low + np.arange(MEL_BINS + 2) * (high - low) / (MEL_BINS + 1)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(FFT // 2) * SAMPLE_RATE / FFT)[:, None]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return np.concatenate([np.maximum(triangles, 0.0), np.zeros((1, MEL_BINS))]).astype(np.float32)


@functools.cache
def _mel_matrix() -> scipy.sparse.csr_array:
    """Return `mel_banks` as a sparse float32[128, 257], of whose weights 504 are not zero."""
    return scipy.sparse.csr_array(mel_banks().T)


@functools.cache
def povey_window() -> np.ndarray:
    """Return float32[400]: a Hann window to the power 0.85."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))
    return (hann**0.85).astype(np.float32)


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """Return Kaldi log-mel energies: float[..., N] in [-1, 1] at 16 kHz -> float32[..., 1 + (N - 400) // 160, 128].

    Per frame: remove the mean, pre-emphasis 0.97 (the first sample with itself), Povey window, power spectrum.
    """
    samples = np.asarray(waveform, np.float32) * np.float32(32768)
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME, axis=-1)[..., ::SHIFT, :]
    energies = np.empty((*frames.shape[:-1], MEL_BINS), np.float32)
    for window in np.ndindex(frames.shape[:-2]):  # one by one, so that intermediate arrays stay in the core's cache
        energies[window] = _mel_of_frames(frames[window])
    return np.log(np.maximum(energies, FLOOR, out=energies), out=energies)


def _mel_of_frames(frames: np.ndarray) -> np.ndarray:
    """Return float32[n, 128]: the energies of frames float32[n, 400]."""
    centred = frames - frames.mean(-1, keepdims=True)
    padded = np.zeros((len(frames), FFT), np.float32)
    shaped = padded[:, 1:FRAME]  # the window's weight of the first sample is 0
    np.multiply(centred[:, :-1], np.float32(-0.97), out=shaped)
    shaped += centred[:, 1:]
    shaped *= povey_window()[1:]
    spectrum = scipy.fft.rfft(padded, overwrite_x=True)
    power = spectrum.real**2 + spectrum.imag**2
    # A sparse product stays on this thread: BLAS threads of several loaders fight for the cores, 30 times slower.
    bands: np.ndarray = (_mel_matrix() @ power.T).T
    return bands


def fbank(waveform: np.ndarray) -> np.ndarray:
    """Return BEATs input: float[..., N] in [-1, 1] at 16 kHz -> float32[..., frames, 128].

    The values are normalised log-mel energies.
    """
    bands = log_mel(waveform)
    bands -= np.float32(MEAN)
    bands /= np.float32(2 * STD)
    return bands


def envelope(bands: np.ndarray) -> np.ndarray:
    """Return a waveform for display, float32[2 * S * F], as loud every 10 ms as filter banks float32[S, F, 128]."""
    loudness = np.sqrt(np.exp(bands * (2 * STD) + MEAN).mean(axis=-1)).reshape(-1)
    return np.stack([loudness, -loudness], axis=-1).reshape(-1).astype(np.float32)


def check_windows(samples: int, policy: str, second: int | None, where: str, pad_short: bool = False) -> None:
    """Raise InputError for a clip of `samples` that a policy (other than `none`) cannot cut.

    Refused are a bad `second`, and, unless `pad_short`, windows below one BEATs patch row (175 ms).
    """
    parts, spans = PARTS[policy]
    if policy in SINGLE and (second is None or not 0 <= second < parts):
        problem = f"is {second}, but windows {policy!r} reads one of {parts}"
        raise InputError(where, "second", problem, f"give a second from 0 to {parts - 1}")
    if not pad_short and samples // parts * spans < SHORTEST_WINDOW:
        needed = SHORTEST_WINDOW * parts / spans / SAMPLE_RATE
        problem = f"{samples / SAMPLE_RATE:.2f} s of audio are too short for windows {policy!r}"
        raise InputError(where, "audio", problem, f"give at least {needed:.2f} s, or set pad_short_audio")


def cut_windows(
    waveform: np.ndarray, policy: str, second: int | None = None, where: str = "audio", pad_short: bool = False
) -> np.ndarray:
    """Cut a clip into audio windows: float32[N] -> float32[S, samples], samples = 15920 (1 s) or 31920 (2 s).

    A "second" is relative to the clip, as in the reference: `int(N / 10)` samples for `ten` and `one`, `int(N / 5)` for
    `five` and `one_of_five`, `int(N / 60)` for `music_avqa` (windows of two, [t - 0.5, t + 1.5] for t = 0, 6, ..., 54,
    zeros before the clip). Each window is then cropped, or zero-padded at its end, to the samples of 98 (198) frames,
    which changes no frame of a clip of exactly 10 (5, 60) seconds. `one` is window `second` of `ten`, `one_of_five` of
    `five`; `none` gives S = 0.

    Raises InputError as `check_windows` does.
    """
    samples = samples_of(WINDOW_FRAMES[policy])
    if policy == "none":
        return np.zeros((0, samples), np.float32)
    check_windows(len(waveform), policy, second, where, pad_short)
    parts = PARTS[policy][0]
    unit = len(waveform) // parts
    if policy == "music_avqa":
        centred = [waveform[int(max(0, t - 0.5) * unit) : int((t + 1.5) * unit)] for t in range(0, 60, 6)]
        pieces = [np.pad(piece, (2 * unit - len(piece), 0)) for piece in centred]
    else:
        chosen = [second] if policy in SINGLE and second is not None else range(parts)
        pieces = [waveform[i * unit : (i + 1) * unit] for i in chosen]
    windows = np.zeros((len(pieces), samples), np.float32)
    for window, piece in zip(windows, pieces, strict=True):
        window[: len(piece)] = piece[:samples]
    return windows
