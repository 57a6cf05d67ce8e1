"""Healthy media that other programs were reported to read wrongly: the picture and the sound of the right second.

Every film shows its second (grey 20 + 22 * second, a red square at the top left) and is loud in second 7 only.
"""

from __future__ import annotations

import io
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from malformed import encoded, turned
from PIL import Image

from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import media

RATE, FPS, SECONDS, LOUD = 16000, 10, 10, 7
GREY = 20 + 22 * LOUD


def pictures(width: int = 128, height: int = 96) -> list[np.ndarray]:
    """uint8[H, W, 3] of each frame."""
    frames = [np.full((height, width, 3), 20 + 22 * (number // FPS), np.uint8) for number in range(FPS * SECONDS)]
    for frame in frames:
        frame[:16, :16] = 255, 0, 0
    return frames


def sound(rate: int = RATE, channels: int = 1, loud_channel: int | None = None) -> np.ndarray:
    """float32[N, channels]: faint noise, and a tone in second 7, on one channel or on all."""
    time = np.arange(SECONDS * rate) / rate
    noise = 0.003 * np.random.default_rng(0).standard_normal((len(time), channels))
    tone = 0.5 * np.sin(5529 * time) * ((time >= LOUD) & (time < LOUD + 1))
    loud = np.array([loud_channel in (None, channel) for channel in range(channels)])
    return (noise + tone[:, None] * loud).astype(np.float32)


def film(
    path: Path,
    codec: str = "libx264",
    audio: str = "aac",
    pix_fmt: str = "yuv420p",
    layout: str = "mono",
    size: tuple[int, int] = (128, 96),
    loud_channel: int | None = None,
    container: dict[str, str] | None = None,
    stream_options: dict[str, str] | None = None,
    **attributes,
) -> Path:
    """The film in some codecs; `attributes` are set on the coder of the pictures."""
    rate = 48000 if audio == "libopus" else 44100 if audio == "libmp3lame" else RATE
    with av.open(str(path), "w", options=container or {}) as file:
        video = file.add_stream(codec, rate=FPS, width=size[0], height=size[1], pix_fmt=pix_fmt)
        video.options = stream_options or {}
        for name, value in attributes.items():
            setattr(video.codec_context, name, value)
        track = file.add_stream(audio, rate=rate, layout=layout)
        waves = sound(rate, len(av.AudioLayout(layout).channels), loud_channel)
        fifo, resampler = av.AudioFifo(), av.AudioResampler(track.format.name, layout, rate)
        source = av.AudioFrame.from_ndarray(np.ascontiguousarray(waves.T), "fltp", layout)
        source.sample_rate, source.pts, source.time_base = rate, 0, Fraction(1, rate)
        for frame in resampler.resample(source):
            fifo.write(frame)
        for number, pixels in enumerate(pictures(*size)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(video.encode(frame))
            while SECONDS - fifo.samples / rate < number / FPS and (block := fifo.read(track.frame_size or 1024)):
                file.mux(track.encode(block))
        while block := fifo.read(track.frame_size or 1024, partial=True):
            file.mux(track.encode(block))
        file.mux([*video.encode(), *track.encode()])
    return path


def check(path: Path, grey: float = GREY, tolerance: float = 4, seconds: float = SECONDS) -> None:
    """The seventh of ten windows is the loud one, and its picture the grey one."""
    frame = media.read_video(path, 10, 64)[LOUD]
    assert abs(float(frame[24:40, 24:40].mean()) - grey) <= tolerance
    assert frame[3, 3, 0] > 180 > 80 > frame[3, 3, 1]  # the red square is at the top left
    wave = media.read_audio(path)
    assert abs(len(wave) / RATE - seconds) < 0.2  # an encoder adds some frames
    assert np.argmax([np.square(part).sum() for part in np.array_split(wave, 10)]) == LOUD


FILMS = {
    "vp9-opus.webm": {
        "codec": "libvpx-vp9",
        "audio": "libopus",
        "stream_options": {"cpu-used": "8", "deadline": "realtime"},
    },
    "hevc-10-bit.mp4": {
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "stream_options": {"x265-params": "log-level=none", "preset": "ultrafast"},
    },
    "av1.mp4": {"codec": "libsvtav1", "stream_options": {"preset": "12"}},
    "h264.ts": {},
    "mpeg4-mp3.avi": {"codec": "mpeg4", "audio": "libmp3lame"},
    "fragmented.mp4": {"container": {"movflags": "empty_moov+frag_keyframe"}},
    "odd-444.mp4": {"pix_fmt": "yuv444p", "size": (127, 95)},
    "flash.flv": {"audio": "libmp3lame"},
    "b-frames.mkv": {"stream_options": {"bf": "3"}},
    "centre-channel.mp4": {"layout": "5.1", "loud_channel": 2},
}


@pytest.mark.parametrize("name", FILMS)
def test_films(tmp_path, name):
    check(film(tmp_path / name, **FILMS[name]))


@pytest.mark.parametrize(
    ("degrees", "matrix", "square"),
    [(90, (0, 1, -1, 0), (3, -4)), (180, (-1, 0, 0, -1), (-4, -4)), (270, (0, -1, 1, 0), (-4, 3))],
)
def test_turned_films_are_upright(tmp_path, degrees, matrix, square):
    path = tmp_path / "turned.mp4"
    path.write_bytes(turned(film(tmp_path / "x.mp4").read_bytes(), matrix))
    assert media.video_size(path) == ((96, 128) if degrees % 180 else (128, 96))
    frame = media.read_video(path, 10, 64)[LOUD]
    assert frame[square][0] > 180 > 80 > frame[square][1]


def test_pixels_that_are_not_square_change_nothing(tmp_path):
    check(film(tmp_path / "anamorphic.mp4", sample_aspect_ratio=Fraction(64, 45)))


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (6, False), (1, True), (9, False)])
def test_colours_of_every_matrix_and_range(tmp_path, matrix, full):
    """A colour stays what it was, whatever matrix (BT.709, SMPTE 170M, BT.2020) and range the film is coded in."""
    colour = 200, 50, 20
    with av.open(str(tmp_path / "c.mp4"), "w") as file:
        stream = file.add_stream(
            "libx264", rate=FPS, width=64, height=64, pix_fmt="yuv420p10le" if matrix == 9 else "yuv420p"
        )
        stream.options = {"crf": "1", "preset": "ultrafast"}
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for number in range(FPS):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8), "rgb24")
            # libswscale knows a matrix as the film does, but for SMPTE 170M, its 5.
            coded = frame.reformat(
                format=stream.pix_fmt, dst_colorspace={6: 5}.get(matrix, matrix), dst_color_range=2 if full else 1
            )
            coded.pts, coded.time_base = number, Fraction(1, FPS)
            file.mux(stream.encode(coded))
        file.mux(stream.encode())
    assert np.abs(media.read_video(tmp_path / "c.mp4", 1, 64)[0].astype(int) - colour).max() <= 4


def test_a_cut_without_encoding_at_a_key_frame(tmp_path):
    """Cut at 4 s as with `ffmpeg -ss 4 -c copy`: the rest, with its own seconds."""
    source, path = film(tmp_path / "x.mp4", stream_options={"g": "10"}), tmp_path / "cut.mp4"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.pts is not None and packet.pts * packet.time_base >= 4:
                shift = int(4 / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift,
                    packet.dts - shift,
                    streams[packet.stream.index],
                )
                new.mux(packet)
    frames = media.read_video(path, 6, 64)[:, 24:40, 24:40].mean((1, 2, 3))
    np.testing.assert_allclose(frames, [20 + 22 * second for second in range(4, 10)], atol=4)


def test_gif_without_sound(tmp_path):
    frames = [Image.fromarray(np.full((24, 32, 3), 20 + 22 * second, np.uint8)) for second in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    shown = media.read_video(tmp_path / "a.gif", 10, 16).mean((1, 2, 3))
    np.testing.assert_allclose(shown, [20 + 22 * second for second in range(10)], atol=4)


def piped(wav: bytes) -> bytes:
    """As ffmpeg and sox write to a pipe: no length known."""
    return wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:]


def wave(kind: str, subtype: str, channels: int = 1, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(rate, channels), rate, format=kind, subtype=subtype)
    return file.getvalue()


SOUNDS = {
    "ulaw.wav": ("WAV", "ULAW"),
    "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "double.wav": ("WAV", "DOUBLE"),
    "deep.wav": ("WAV", "PCM_24"),
    "long.wav": ("RF64", "PCM_16"),
    "a.w64": ("W64", "PCM_16"),
    "a.au": ("AU", "PCM_16"),
    "a.aiff": ("AIFF", "PCM_16"),
    "a.flac": ("FLAC", "PCM_16"),
    "vorbis.ogg": ("OGG", "VORBIS"),
    "opus.ogg": ("OGG", "OPUS"),
    "a.opus": ("OGG", "OPUS"),
    "CAPITALS.WAV": ("WAV", "PCM_16"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
    "mp3-inside.wav": ("MP3", "MPEG_LAYER_III"),
    "wav-inside.mp3": ("WAV", "PCM_16"),
}


def check_sound(path: Path, tolerance: float = 0.1) -> None:
    samples = media.read_audio(path)
    assert abs(len(samples) / RATE - SECONDS) < tolerance
    assert np.argmax([np.square(part).sum() for part in np.array_split(samples, 10)]) == LOUD


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds(tmp_path, name):
    (tmp_path / name).write_bytes(wave(*SOUNDS[name]))
    check_sound(tmp_path / name)


def test_sound_of_six_channels(tmp_path):
    (tmp_path / "a.wav").write_bytes(wave("WAV", "PCM_16", channels=6))
    check_sound(tmp_path / "a.wav")


def test_a_wav_written_to_a_pipe(tmp_path):
    (tmp_path / "a.wav").write_bytes(piped(wave("WAV", "PCM_16")))
    check_sound(tmp_path / "a.wav")


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.aac", "aac"), ("a.wma", "wmav2")])
def test_coded_sounds(tmp_path, name, codec):
    with av.open(str(tmp_path / name), "w", format="adts" if name.endswith(".aac") else None) as file:
        stream = file.add_stream(codec, rate=RATE, layout="mono", bit_rate=64000)
        fifo = av.AudioFifo()
        frame = av.AudioFrame.from_ndarray(sound().T.copy(), "fltp", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        fifo.write(frame)
        while block := fifo.read(stream.frame_size or 1024, partial=True):
            file.mux(stream.encode(block))
        file.mux(stream.encode())
    check_sound(tmp_path / name, 0.2)


def test_an_mp3_with_a_picture_in_its_tag(tmp_path):
    body = b"\0image/png\0\3\0" + encoded(np.zeros((4, 4, 3), np.uint8))
    tag = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    length = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    (tmp_path / "a.mp3").write_bytes(b"ID3\3\0\0" + length + tag + wave("MP3", "MPEG_LAYER_III"))
    check_sound(tmp_path / "a.mp3")


@pytest.mark.parametrize(
    "name", ["with spaces.mp4", "quo\"te's.mp4", "a;b&c.mp4", "\U0001f3bb.mp4", "-dash.mp4", "pat%03d.mp4"]
)
def test_names(tmp_path, name, monkeypatch, shared_film):
    shutil.copy(shared_film, tmp_path / name)
    check(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    check(Path(name))


@pytest.fixture(scope="module")
def shared_film(tmp_path_factory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "x.mp4")


# Pictures.


def top_left_red() -> Image.Image:
    pixels = np.full((30, 40, 3), (40, 120, 200), np.uint8)
    pixels[:10, :10] = 255, 0, 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("kind", "ending"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize(("orientation", "corner"), [(2, (3, -4)), (3, (-4, -4)), (6, (3, -4))])
def test_pictures_that_say_how_they_were_taken(tmp_path, kind, ending, orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind != "PNG" else {}
    (tmp_path / f"a.{ending}").write_bytes(encoded(top_left_red(), kind, exif=exif, **options))
    seen = media.read_image(tmp_path / f"a.{ending}", 32)
    assert seen[corner][0] > 180 > 80 > seen[corner][1]
    assert media.image_size(tmp_path / f"a.{ending}") == ((30, 40) if orientation == 6 else (40, 30))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("GIF", "P"),
        ("JPEG", "CMYK"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("JPEG2000", "RGB"),
        ("PPM", "RGB"),
        ("TIFF", "LAB"),
        ("JPEG", "YCbCr"),
        ("WEBP", "RGB"),
    ],
)
def test_kinds_of_pictures(tmp_path, kind, mode):
    from PIL import ImageCms

    picture = top_left_red()
    if mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(picture, lab)
    else:
        picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    (tmp_path / "a.picture").write_bytes(encoded(picture, kind, **({"quality": 95} if kind == "JPEG" else {})))
    seen = media.read_image(tmp_path / "a.picture", 32)
    assert np.abs(seen[20, 20].astype(int) - (40, 120, 200)).max() <= 6
    assert seen[2, 2, 0] > 225 > 40 > seen[2, 2, 1]


def test_greys_of_sixteen_bits_are_scaled(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(np.full((8, 8), 30000, np.uint16)))
    assert (media.read_image(tmp_path / "a.png", 4) == 30000 >> 8).all()


def test_grey_with_transparency_and_one_bit(tmp_path):
    (tmp_path / "la.png").write_bytes(encoded(Image.new("LA", (8, 8), (90, 255))))
    (tmp_path / "one.png").write_bytes(encoded(Image.new("1", (8, 8), 1)))
    assert (media.read_image(tmp_path / "la.png", 4) == 90).all()
    assert (media.read_image(tmp_path / "one.png", 4) == 255).all()


def test_the_first_picture_of_an_animation(tmp_path):
    first, second = top_left_red(), Image.new("RGB", (40, 30))
    for kind in ("GIF", "WEBP", "PNG"):
        (tmp_path / "a").write_bytes(encoded(first, kind, save_all=True, append_images=[second]))
        assert media.read_image(tmp_path / "a", 32)[2, 2, 0] > 200


# Masks.


def quarter(high: int, dtype: type = np.uint8) -> np.ndarray:
    mask = np.zeros((8, 8), dtype)
    mask[:4, :4] = high
    return mask


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(quarter(255)),
        Image.fromarray(quarter(1)),
        Image.fromarray(quarter(255)).convert("1"),
        Image.fromarray(quarter(65535, np.uint16)),
        Image.fromarray(quarter(1, np.uint16)),
    ],
    ids=["0-255", "0-1", "1-bit", "16-bit", "16-bit-of-0-and-1"],
)
def test_masks_of_every_depth(tmp_path, picture):
    (tmp_path / "m.png").write_bytes(encoded(picture))
    np.testing.assert_array_equal(media.read_mask(tmp_path / "m.png", None, "binary"), quarter(1))


def test_a_mask_in_the_palette_of_davis(tmp_path):
    picture = Image.fromarray(quarter(1))
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    (tmp_path / "m.png").write_bytes(encoded(picture))
    np.testing.assert_array_equal(media.read_mask(tmp_path / "m.png", None, "binary"), quarter(1))


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "L", "LA", "16"])
def test_class_ids_in_every_form(tmp_path, mode):
    ids = quarter(9)
    if mode in ("P", "RGB", "RGBA"):
        picture = Image.fromarray(ids)
        picture.putpalette(avss_palette().tobytes())
        picture = picture if mode == "P" else picture.convert(mode)
    else:
        picture = Image.fromarray(ids.astype(np.uint16) if mode == "16" else ids)
        picture = picture.convert("LA") if mode == "LA" else picture
    (tmp_path / "m.png").write_bytes(encoded(picture))
    np.testing.assert_array_equal(media.read_mask(tmp_path / "m.png", None, "semantic"), ids)
