"""Clips, pictures, masks and sounds are decoded as the reference decodes them, where the files are at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from crab_jax.models.clip import normalize
from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import fbank, media

GREY_LEVEL = 1 / 255 / 0.26  # of normalised pixels
CUTS = {"ave": "ten", "avss48k": "one", "s4": "one_of_five"}  # of the sounds that media.npz is about


def exact_fbank(waveform: np.ndarray) -> np.ndarray:
    """`fbank.fbank` of one window in float64."""
    samples = np.float64(np.float32(waveform)) * 32768
    frames = np.lib.stride_tricks.sliding_window_view(samples, fbank.FRAME)[:: fbank.SHIFT]
    frames = frames - frames.mean(-1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=-1)
    power = np.abs(np.fft.rfft(frames * fbank.povey_window(), fbank.FFT)) ** 2
    return (np.log(np.maximum(power @ fbank.mel_banks(), fbank.FLOOR)) - fbank.MEAN) / (2 * fbank.STD)


def test_decoded_media(data):
    """Sounds sample by sample, masks pixel by pixel; resized pictures to a grey level, H.264 frames to five (decord's
    colour conversion differs). Filter banks to ten times the reference's error from float64, which depends on the sound
    (quiet bands beside loud ones lose most) and is recorded of none of these."""
    folder = Path(os.environ.get("CRAB_MEDIA_DIR", data.folder.parent / "media"))
    if not (folder / "samples.json").is_file():
        pytest.skip(f"{folder} has no samples.json: set CRAB_MEDIA_DIR to the folder of the media of media.npz")
    z = data.arrays("media.npz")
    samples = {
        record["task"]: {kind: folder / path for kind, path in record.items() if kind.endswith("_path")}
        for record in json.loads((folder / "samples.json").read_text())
    }

    frames = z["ave.frames_uint8"]
    ours = media.read_video(samples["ave"]["video_path"], len(z["ave.indices"]), frames.shape[1])
    difference = np.abs(ours[: len(frames)].astype(int) - frames)
    assert difference.max() <= 5 and difference.mean() < 0.2
    np.testing.assert_array_equal(np.arange(len(ours)) * z["ave.vlen"] // len(ours), z["ave.indices"])
    np.testing.assert_allclose(normalize(frames), z["ave.pixel_values"].transpose(0, 2, 3, 1), rtol=0, atol=1e-6)

    for name, policy in CUTS.items():
        sound = media.read_audio(samples[name.removesuffix("48k")]["audio_path"])
        assert len(sound) == z[f"{name}.audio_len"]
        assert len(sound) // 10 == z.get(f"{name}.samples_per_unit", len(sound) // 10)
        np.testing.assert_array_equal(sound[: len(z[f"{name}.seg0.wave"])], z[f"{name}.seg0.wave"])
        windows = fbank.cut_windows(sound, policy, 0)
        for key in [key for key in z if key.startswith(f"{name}.seg") and key.endswith(".fbank")]:
            window = windows[int(key.split(".")[1].removeprefix("seg"))]
            atol = 10 * np.abs(z[key] - exact_fbank(window)).max()
            np.testing.assert_allclose(fbank.fbank(window), z[key], rtol=0, atol=atol, err_msg=key)

    pixels = z["s4.image_pixel_values"][0].transpose(1, 2, 0)
    picture = media.read_image(samples["s4"]["image_path"], len(pixels))
    np.testing.assert_allclose(normalize(picture), pixels, rtol=0, atol=1.05 * GREY_LEVEL)
    side = len(z["s4.mask224"])
    assert media.read_image(samples["s4"]["image_path"], side).sum(dtype=np.int64) == z["s4.image224_uint8_sum"]
    mask = media.read_mask(samples["s4"]["mask_path"], side, "binary")
    np.testing.assert_array_equal(np.packbits(mask.astype(bool), axis=1), z["s4.mask224"])
    np.testing.assert_array_equal(avss_palette(), z["v2_palette"])
    label = media.read_mask(samples["avss"]["mask_path"], len(z["avss.label224"]), "semantic")
    np.testing.assert_array_equal(label, z["avss.label224"])
