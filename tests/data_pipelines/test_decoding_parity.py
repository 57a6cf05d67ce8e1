"""Decoding against what the reference's loader gave for Crab's example files: decord, librosa, torchaudio, Pillow, cv2.

The files and their arrays are not committed. The tests run where the media are (CRAB_MEDIA_DIR, or ../shared/media) and
a whole golden directory (CRAB_GOLDEN_DIR, or ../shared/golden).
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import fbank, media
from data_pipelines.media import container, video

SHARED = Path(__file__).resolve().parents[3] / "shared"
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def given(variable: str, folder: str) -> Path:
    return Path(os.environ.get(variable, SHARED / folder))


@pytest.fixture(scope="module")
def files() -> Path:
    folder = given("CRAB_MEDIA_DIR", "media")
    if not (folder / "ave").is_dir():
        pytest.skip("Crab's example files are not here")
    return folder


@pytest.fixture(scope="module")
def arrays():
    path = given("CRAB_GOLDEN_DIR", "golden") / "media.npz"
    if not path.is_file():
        pytest.skip("media.npz is not here")
    return np.load(path)


def close(pixels, expected):
    """Whether uint8 pixels differ by at most 5, and by at most 0.2 on average."""
    difference = np.abs(pixels.astype(int) - np.round(expected).astype(int))
    return difference.max() <= 5 and difference.mean() <= 0.2


def test_frames_of_a_video(files, arrays):
    path = next((files / "ave").glob("*.mp4"))
    with container.opened(path, "video") as opened:
        stream = opened.streams.video[0]
        packets, _ = video._packets(opened, stream)
        assert len(packets) == stream.frames == arrays["ave.vlen"]
    assert media.frame_numbers(len(packets), len(arrays["ave.indices"])) == arrays["ave.indices"].tolist()  # exact
    kept, size = arrays["ave.frames_uint8"].shape[:2]  # of the ten, the first
    ours = media.read_video(path, 10, size)[:kept]
    assert close(ours, arrays["ave.frames_uint8"])
    restored = np.moveaxis(arrays["ave.pixel_values"], 1, -1) * STD + MEAN  # CLIPImageProcessor changes nothing else
    assert close(ours, restored * 255)


@pytest.mark.parametrize(
    ("name", "file", "policy"),
    [("ave", "ave/*.mp3", "ten"), ("s4", "s4/audio.wav", "five"), ("avss48k", "avss/audio.wav", "ten")],
)
def test_windows_of_sound(files, arrays, name, file, policy):
    wave = media.read_audio(next(files.glob(file)))
    assert len(wave) == arrays[f"{name}.audio_len"]
    unit = len(wave) // fbank.PARTS[policy][0]
    if f"{name}.samples_per_unit" in arrays:
        assert unit == arrays[f"{name}.samples_per_unit"]
    expected = arrays[f"{name}.seg0.wave"]
    np.testing.assert_allclose(wave[: len(expected)], expected, atol=1e-6)
    bands = fbank.fbank(fbank.cut_windows(wave, policy))
    for window in (w for w in (0, 5) if f"{name}.seg{w}.fbank" in arrays):
        np.testing.assert_allclose(bands[window], arrays[f"{name}.seg{window}.fbank"], atol=1e-3)


def test_pictures_and_masks_are_exact(files, arrays):
    picture = media.read_image(files / "s4/0.jpg", 224)
    assert picture.astype(np.int64).sum() == arrays["s4.image224_uint8_sum"]
    mask = media.read_mask(files / "s4/0.png", 224, "binary", Image.open(files / "s4/0.jpg").size)
    np.testing.assert_array_equal(np.packbits(mask.astype(np.uint8), axis=1), arrays["s4.mask224"])
    np.testing.assert_array_equal(media.read_mask(files / "avss/0.png", 224, "semantic"), arrays["avss.label224"])
    np.testing.assert_array_equal(avss_palette(), arrays["v2_palette"])
