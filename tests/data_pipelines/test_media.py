"""Decoding to arrays, and one clear error for every kind of bad file."""

import av
import numpy as np
import pytest
import soundfile
from media_files import tone, write_audio, write_picture, write_video
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import media
from data_pipelines.media import video


def test_video_frames_are_evenly_spaced(tmp_path):
    frames = media.read_video(write_video(tmp_path / "a.mp4", frames=25), 10, 16)
    assert frames.shape == (10, 16, 16, 3) and frames.dtype == np.uint8
    expected = 8 * np.arange(0, 25, 2.5).astype(int)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), expected, atol=3)


def test_a_short_video_gives_all_its_frames(tmp_path):
    assert media.read_video(write_video(tmp_path / "a.mp4", frames=3), 10, 16).shape == (3, 16, 16, 3)


def test_frames_are_counted_when_the_container_does_not_say(tmp_path):
    frames = media.read_video(write_video(tmp_path / "a.mkv", frames=20), 4, 16)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [0, 40, 80, 120], atol=3)


def test_video_size(tmp_path):
    assert media.video_size(write_video(tmp_path / "a.mp4", frames=2, size=(48, 32))) == (48, 32)


def test_image_is_rgb_and_square(tmp_path):
    path = write_picture(tmp_path / "a.png", np.full((20, 40), 77, np.uint8))
    image = media.read_image(path, 16)
    assert image.shape == (16, 16, 3) and (image == 77).all()
    assert media.image_size(path) == (40, 20)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_audio_is_mono_at_16_khz(tmp_path, name):
    wave = media.read_audio(write_audio(tmp_path / name, 2.0, rate=48000, channels=2))
    assert wave.dtype == np.float32 and abs(len(wave) - 32000) <= 400
    spectrum = np.abs(np.fft.rfft(wave))
    assert abs(spectrum.argmax() * 16000 / len(wave) - 440) < 2


def test_channels_are_averaged(tmp_path):
    left = tone(1.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav"), left / 2, atol=1e-6)


def test_audio_of_a_video_file(tmp_path):
    wave = media.read_audio(write_video(tmp_path / "a.mp4", seconds=2.0))
    middle = slice(8000, 24000)
    assert abs(len(wave) - 32000) <= 2048
    assert abs(np.abs(np.fft.rfft(wave[middle])).argmax() - 440) <= 1


def test_palette_has_the_first_voc_colours():
    palette = avss_palette()
    assert palette.shape == (71, 3) and palette.dtype == np.uint8
    assert palette[[0, 1, 2, 7, 8, 64, 70]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 128], [64, 0, 0], [32, 0, 0], [32, 128, 128]
    ]  # fmt: skip
    assert len({tuple(colour) for colour in palette.tolist()}) == 71


def test_binary_mask_is_grey_above_zero(tmp_path):
    grey = np.zeros((8, 8), np.uint8)
    grey[:4, 4:] = 1
    mask = media.read_mask(write_picture(tmp_path / "a.png", grey), 4, "binary")
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2)


def test_semantic_mask_from_palette_indices_and_from_colours(tmp_path):
    labels = np.repeat(np.repeat(np.array([[0, 3], [64, 70]], np.uint8), 2, axis=0), 2, axis=1)
    indexed = Image.fromarray(labels)
    indexed.putpalette(avss_palette().tobytes())
    indexed.save(tmp_path / "index.png")
    write_picture(tmp_path / "rgb.png", avss_palette()[labels])
    for name in ("index.png", "rgb.png"):
        np.testing.assert_array_equal(media.read_mask(tmp_path / name, 2, "semantic"), [[0, 3], [64, 70]])


def test_unknown_colours_are_background(tmp_path):
    """As in the reference, where they are slips of a drawing tool; more of them are no mask of these classes."""
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[0, :2] = (1, 2, 3)
    assert not media.read_mask(write_picture(tmp_path / "a.png", colours), None, "semantic").any()
    colours[0, 2] = (3, 2, 1)
    with pytest.raises(InputError, match="3 of 2000 pixels have a colour of no class"):
        media.read_mask(write_picture(tmp_path / "b.png", colours), None, "semantic")


def test_bad_videos(tmp_path):
    whole = write_video(tmp_path / "a.mp4", frames=20).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_audio(tmp_path / "sound.wav", 1.0)
    for name, problem in [
        ("missing.mp4", "no such file"), ("cut.mp4", "damaged"), ("text.mp4", "damaged"), ("empty.mp4", "damaged"),
        ("sound.wav", "no video stream"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=rf"{name} \[video\]: .*{problem}.*; "):
            media.read_video(tmp_path / name, 4, 16)


def test_a_video_cut_after_its_index_is_truncated(tmp_path):
    fast = tmp_path / "fast.mp4"
    _faststart(write_video(tmp_path / "b.mp4", frames=60), fast)
    whole = fast.read_bytes()
    fast.write_bytes(whole[: int(len(whole) * 0.6)])
    with pytest.raises(InputError, match="fast.mp4.*(truncated|damaged)"):
        media.read_video(fast, 4, 16)


def test_bad_audio(tmp_path):
    whole = write_audio(tmp_path / "a.wav", 1.0).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    write_video(tmp_path / "silent.mp4", frames=5)
    for name, problem in [
        ("missing.wav", "no such file"), ("cut.wav", "truncated"), ("text.wav", "damaged"), ("zero.wav", "no samples"),
        ("nan.wav", "NaN"), ("silent.mp4", "no audio track"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=rf"{name} \[audio\]: .*{problem}.*; "):
            media.read_audio(tmp_path / name)


def test_bad_pictures_and_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    whole = write_picture(tmp_path / "a.png", noise).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    for name, problem in [("missing.png", "no such file"), ("cut.png", "damaged"), ("text.png", "damaged")]:
        with pytest.raises(InputError, match=rf"{name} \[image\]: .*{problem}.*; "):
            media.read_image(tmp_path / name, 16)
        with pytest.raises(InputError, match=rf"{name} \[mask\]: .*{problem}.*; "):
            media.read_mask(tmp_path / name, 16, "binary")
    with pytest.raises(InputError, match="is 64x64, but its picture is 64x48"):
        media.read_mask(tmp_path / "a.png", 16, "binary", picture=(64, 48))
    with pytest.raises(InputError, match="class id 200 is outside 0..70"):
        media.read_mask(write_picture(tmp_path / "b.png", np.full((4, 4), 200, np.uint8)), 4, "semantic")


def _faststart(source, target):
    """Rewrite an mp4 with its index in front, so that a truncated copy can still be opened."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("mpeg4", {"g": "6"}),
        ("libx264", {"g": "7", "bf": "2"}),
        ("libx264", {"g": "9", "bf": "3", "x264-params": "open-gop=1"}),
        ("libx264", {"g": "250", "bf": "3", "b-pyramid": "normal"}),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frames_are_the_same_whether_all_or_only_what_they_need_is_decoded(tmp_path, codec, options, name):
    path, pixels = tmp_path / name, np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, width=32, height=32, pix_fmt="yuv420p", options=options)
        for i in range(60):  # noise that drifts: no two frames are alike
            picture = np.kron(np.roll(pixels, i // 3, axis=i % 2), np.ones((4, 4, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    every, times = video._decode_all(path, set(range(60)), 16)
    for count in (1, 7, 10, 60):
        numbers = media.frame_numbers(len(times.ticks), count)
        np.testing.assert_array_equal(media.read_video(path, count, 16), [every[number] for number in numbers])
