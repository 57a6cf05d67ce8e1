"""Filter banks against the reference's numbers, and the windows of a clip."""

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from data_pipelines import fbank


def test_filter_banks_are_the_references(golden):
    z = np.load(golden / "fbank.npz")
    np.testing.assert_allclose(fbank.fbank(z["1s.waveform"]), z["1s.norm"], atol=2e-4)
    np.testing.assert_allclose(fbank.fbank(z["pad_front.waveform"]), z["pad_front.norm"], atol=2e-4)
    np.testing.assert_allclose(fbank.log_mel(z["odd.waveform"]), z["odd.raw"], atol=2e-3)


def test_silence_is_a_constant(golden):
    silent = fbank.fbank(np.zeros(fbank.samples_of(98)))
    np.testing.assert_allclose(silent, np.load(golden / "fbank.npz")["silence.norm"], atol=1e-6)
    np.testing.assert_allclose(silent, fbank.SILENCE)


@pytest.mark.parametrize(
    ("policy", "seconds", "count", "frames"), [("ten", 10, 10, 98), ("five", 5, 5, 98), ("music_avqa", 60, 10, 198)]
)
def test_windows_of_a_nominal_clip_keep_every_frame(policy, seconds, count, frames):
    clip = np.random.default_rng(0).normal(size=seconds * 16000).astype(np.float32)
    bands = fbank.fbank(fbank.cut_windows(clip, policy))
    assert bands.shape == (count, frames, 128) == (fbank.WINDOW_COUNT[policy], fbank.WINDOW_FRAMES[policy], 128)
    start, length = (int(5.5 * 16000), 32000) if policy == "music_avqa" else (16000, 16000)
    np.testing.assert_allclose(bands[1], fbank.fbank(clip[start : start + length]), atol=1e-5)


def test_a_second_is_relative_to_the_clip():
    clip = np.arange(12 * 16000, dtype=np.float32)  # seconds of 19200 samples, cropped to 98 frames
    windows = fbank.cut_windows(clip, "ten")
    np.testing.assert_array_equal(windows[3], clip[3 * 19200 : 3 * 19200 + 15920])
    windows = fbank.cut_windows(clip[: 8 * 16000], "ten")  # seconds of 12800 samples, zeros behind
    np.testing.assert_array_equal(windows[3, :12800], clip[3 * 12800 : 4 * 12800])
    assert not windows[:, 12800:].any()


def test_music_avqa_windows_are_centred_and_the_first_starts_with_silence():
    clip = np.arange(1, 60 * 16000 + 1, dtype=np.float32)
    windows = fbank.cut_windows(clip, "music_avqa")
    assert not windows[0, :8000].any()
    np.testing.assert_array_equal(windows[0, 8000:], clip[: 31920 - 8000])
    np.testing.assert_array_equal(windows[9], clip[int(53.5 * 16000) : int(53.5 * 16000) + 31920])


def test_one_is_a_window_of_ten():
    clip = np.random.default_rng(0).normal(size=160125).astype(np.float32)
    np.testing.assert_array_equal(fbank.cut_windows(clip, "one", 7), fbank.cut_windows(clip, "ten")[7:8])
    np.testing.assert_array_equal(fbank.cut_windows(clip, "one_of_five", 3), fbank.cut_windows(clip, "five")[3:4])
    assert fbank.cut_windows(clip, "none").shape[0] == 0


@pytest.mark.parametrize("second", [None, -1, 10])
def test_one_needs_a_second(second):
    with pytest.raises(InputError, match="one of 10"):
        fbank.cut_windows(np.zeros(160000), "one", second)


@pytest.mark.parametrize(("policy", "shortest"), [("ten", 1.75), ("one", 1.75), ("five", 0.875), ("music_avqa", 5.25)])
def test_short_clips_are_an_error_unless_allowed(policy, shortest):
    enough = np.zeros(int(shortest * 16000), np.float32)
    assert fbank.cut_windows(enough, policy, 0).any() == 0
    with pytest.raises(InputError, match=rf"a.wav \[audio\]: .* too short .* at least {shortest:.2f}"):
        fbank.cut_windows(enough[:-160], policy, 0, "a.wav")
    assert len(fbank.cut_windows(enough[:4800], policy, 0, pad_short=True)) == fbank.WINDOW_COUNT[policy]
