"""The one door for films and sounds: hidden frames, the stream that players choose, names, contents and truncation."""

import contextlib
import io
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition
from malformed import film, greys, noise, wave
from media_files import RATE, tone, write_video
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.io.files import stand_in
from data_pipelines import media
from data_pipelines.examine import examine

CODECS = [
    ("libx264", {"g": "12", "bf": "3"}),
    ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    ("libx264", {"x264-params": "intra-refresh=1:keyint=9"}),
    ("libx265", {"x265-params": "keyint=12:bframes=3:open-gop=1:pools=none:log-level=none"}),
    ("mpeg4", {"g": "12"}),
    ("mpeg4", {"g": "12", "bf": "2"}),
    ("libvpx-vp9", {"g": "12", "cpu-used": "8"}),
    ("libsvtav1", {"preset": "12", "svtav1-params": "keyint=12:lp=1"}),
]


def drifting(path: Path, codec: str, options: dict[str, str], count: int = 40) -> Path:
    """A film of noise that drifts: no two frames are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, width=64, height=64, pix_fmt="yuv420p", options=options)
        for i in range(count):
            picture = np.kron(np.roll(pixels, i // 3, axis=i % 2), np.ones((8, 8, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut_without_encoding(source: Path, target: Path, seconds: float) -> int:
    """What `ffmpeg -ss SECONDS -c copy` writes: all from the key frame before, with an edit list that hides the frames
    in front. How many it hides."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        track = old.streams.video[0]
        copied = new.add_stream_from_template(track, opaque=True)
        packets = [packet for packet in old.demux(track) if packet.size]
        start = round(seconds / track.time_base)
        first = max(i for i, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start)
        for packet in packets[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copied
            new.mux(packet)
    with av.open(str(target)) as cut:
        return sum(packet.is_discard for packet in cut.demux(video=0))


def every_frame(path: Path, size: int) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [
            frame.reformat(size, size, "rgb24", interpolation="BILINEAR").to_ndarray()
            for frame in container.decode(video=0)
        ]


def ten_are_right(path: Path, size: int = 32) -> None:
    every = every_frame(path, size)
    wanted = [every[number] for number in media.frame_numbers(len(every), 10)]
    np.testing.assert_array_equal(media.read_video(path, 10, size), wanted)
    assert media.watch(path)[:2] == (len(every), 0)


# Frames that are hidden, and frames in another order.


@pytest.mark.parametrize(("codec", "options"), CODECS)
@pytest.mark.parametrize("seconds", [0.3, 1.7])
def test_hidden_frames_are_decoded_and_not_shown(tmp_path, codec, options, seconds):
    source = drifting(tmp_path / "a.mp4", codec, options)
    for target in (tmp_path / "cut.mp4", tmp_path / "cut.mov"):
        if target.suffix == ".mov" and codec in ("libvpx-vp9", "libsvtav1"):
            continue
        assert cut_without_encoding(source, target, seconds) > 0
        ten_are_right(target)
        found = examine((str(tmp_path), target.name, ("video",))).problems
        assert not [text for _, text in found if not text.startswith("warning")]


@pytest.mark.parametrize(("codec", "options"), CODECS)
def test_a_file_that_calls_every_frame_a_key_frame(tmp_path, codec, options):
    path = drifting(tmp_path / "a.mp4", codec, options)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    ten_are_right(path)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("libx264", "a.avi"),
        ("mpeg4", "a.avi"),
        ("libx264", "a.ts"),
        ("mpeg2video", "a.mpg"),
        ("libx264", "a.flv"),
        ("libvpx", "a.webm"),
    ],
)
def test_frames_come_in_the_order_in_which_they_are_shown(tmp_path, codec, name):
    ten_are_right(drifting(tmp_path / name, codec, {"g": "12", "bf": "0" if codec == "libvpx" else "2"}))


# The stream that players choose.


def film_of_tracks(
    path: Path, pictures: list[tuple[int, tuple[int, int], int]], sounds: list[tuple[float, int]]
) -> Path:
    """A file of video tracks of (grey level, size, disposition) and sounds of (hertz, disposition), a second long."""
    with av.open(str(path), "w") as container:
        tracks = []
        for level, size, disposition in pictures:
            still = disposition & Disposition.attached_pic
            track = container.add_stream(
                "mjpeg" if still else "mpeg4",
                rate=10,
                width=size[0],
                height=size[1],
                pix_fmt="yuvj420p" if still else "yuv420p",
            )
            track.disposition = disposition
            frame = np.full((size[1], size[0], 3), level, np.uint8)
            tracks.append((track, [av.VideoFrame.from_ndarray(frame, format="rgb24")] * (1 if still else 10)))
        for hertz, disposition in sounds:
            track = container.add_stream("aac", rate=RATE, layout="mono")
            track.disposition = disposition
            frame = av.AudioFrame.from_ndarray(tone(1.0, hertz=hertz)[None], format="fltp", layout="mono")
            frame.rate = RATE
            tracks.append((track, [frame]))
        container.start_encoding()
        for track, frames in tracks:
            for number, frame in enumerate(frames):
                frame.pts = number if isinstance(frame, av.VideoFrame) else None
                container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


SMALL, LARGE = (32, 32), (64, 48)
DEFAULT, COVER = Disposition.default.value, Disposition.attached_pic.value
ASIDE, BLIND = Disposition.comment.value, Disposition.visual_impaired.value


def level(path: Path) -> float:
    return float(media.read_video(path, 4, 16).mean())


def hertz(path: Path) -> float:
    sound = media.read_audio(path)
    return float(np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound))


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize(
    ("pictures", "wanted"),
    [
        ([(200, LARGE, COVER), (80, SMALL, DEFAULT)], 80),
        ([(80, SMALL, DEFAULT), (200, LARGE, COVER)], 80),
        ([(80, SMALL, 0), (160, LARGE, DEFAULT)], 160),
        ([(80, LARGE, DEFAULT), (160, SMALL, 0)], 80),
    ],
)
def test_the_film_is_taken_and_no_cover(tmp_path, name, pictures, wanted):
    path = film_of_tracks(tmp_path / name, pictures, [(440.0, DEFAULT)])
    size = next(size for level, size, _ in pictures if level == wanted)
    assert abs(level(path) - wanted) < 4 and media.video_size(path) == size == media.watch(path).size
    assert media.watch(path).frames == 10


@pytest.mark.parametrize(
    ("sounds", "wanted"),
    [
        ([(300.0, 0), (900.0, DEFAULT)], 900),
        ([(300.0, DEFAULT), (900.0, 0)], 300),
        ([(300.0, 0), (900.0, 0)], 300),
        ([(300.0, ASIDE), (900.0, 0)], 900),
        ([(300.0, DEFAULT | BLIND), (900.0, DEFAULT)], 900),
        ([(300.0, ASIDE)], 300),
    ],
)
def test_the_default_track_is_heard(tmp_path, sounds, wanted):
    path = film_of_tracks(tmp_path / "a.mkv", [(80, SMALL, DEFAULT)], sounds)
    assert abs(hertz(path) - wanted) < 3


@pytest.mark.parametrize("name", ["a.mp4", "a.m4a", "a.mp3"])
def test_a_sound_with_a_cover_has_no_film(tmp_path, name):
    path = tmp_path / name
    is_mp3 = name == "a.mp3"
    with av.open(str(path), "w", format="mp3" if is_mp3 else "mp4") as container:
        cover = container.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
        cover.disposition = Disposition.attached_pic
        sound = container.add_stream("libmp3lame" if is_mp3 else "aac", rate=RATE, layout="mono")
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        picture.pts = 0
        frame = av.AudioFrame.from_ndarray(tone(1.0)[None], format="fltp", layout="mono")
        frame.rate = RATE
        container.mux([*cover.encode(picture), *cover.encode(), *sound.encode(frame), *sound.encode()])
    for read in (lambda: media.read_video(path, 4, 16), lambda: media.watch(path), lambda: media.video_size(path)):
        with pytest.raises(InputError, match="has no video stream, only a cover picture"):
            read()
    assert abs(hertz(path) - 440) < 3


# Names.

NAMES = [
    b"12:30:05.mp4",
    b"2024-05-01T12:30:05.mp4",
    b"file:x.mp4",
    b"concat:x.mp4",
    b"http:x.mp4",
    b"pat%03d.mp4",
    b"-dash.mp4",
    b" space.mp4",
    b"na\xefve.mp4",
    b"a|b;c&d'e\"f.mp4",
    b"pipe:0",
    b"\xe5\x89\xaa #?.mp4",
    b"-",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    """Relative to the folder, where libav would take it for a protocol, an option or a pattern."""
    monkeypatch.chdir(tmp_path)
    write_video(Path("x.mp4"), 4, (16, 16), seconds=0.5)  # which `file:x.mp4` is not
    film(Path("right.mp4"), greys(20), seconds=2.0)
    path = os.fsdecode(name)
    os.rename("right.mp4", path)
    assert media.watch(path).frames == 20 and len(media.read_video(path, 10, 16)) == 10
    assert len(media.read_audio(path)) > 1.9 * RATE and media.video_size(path) == (48, 32)
    os.rename(path, "right.mp4")
    Path(path).write_bytes(wave(tone(2.0)))
    assert len(media.read_audio(path)) == 2 * RATE


# What a file is by its content.


def test_a_cover_that_is_not_called_one(tmp_path):
    """One H.264 picture in front of the film, as a converter leaves it that knows no covers."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        tracks = [
            container.add_stream("libx264", rate=10, width=width, height=height, pix_fmt="yuv420p")
            for width, height in (LARGE, SMALL)
        ]
        for track, grey, count in zip(tracks, (200, 80), (1, 10), strict=True):
            for number in range(count):
                frame = np.full((track.height, track.width, 3), grey, np.uint8)
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
                frame.pts = number
                container.mux(track.encode(frame))
            container.mux(track.encode())
    assert abs(level(path) - 80) < 4 and media.watch(path).frames == 10


def encoded_sound(codec: str, kind: str, seconds: float = 2.0, options: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options or {}) as container:
        rate = 48000 if codec == "libopus" else RATE
        stream = container.add_stream(codec, rate=rate, layout="mono", bit_rate=64000)
        samples = tone(seconds, rate)[None]
        form = stream.codec_context.format.name
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = rate
        for part in av.AudioResampler(
            format=form, layout="mono", rate=rate, frame_size=stream.codec_context.frame_size or 1024
        ).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    return file.getvalue()


SOUNDS = {
    "wav": lambda: wave(tone(2.0)),
    "flac": lambda: wave(tone(2.0), subtype="PCM_16", kind="FLAC"),
    "aiff": lambda: wave(tone(2.0), kind="AIFF"),
    "w64": lambda: wave(tone(2.0), kind="W64"),
    "rf64": lambda: wave(tone(2.0), kind="RF64"),
    "caf": lambda: wave(tone(2.0), kind="CAF"),
    "au": lambda: wave(tone(2.0), kind="AU"),
    "ogg": lambda: wave(tone(2.0), subtype="VORBIS", kind="OGG"),
    "mp3": lambda: wave(tone(2.0), subtype="MPEG_LAYER_III", kind="MP3"),
    "mp3 without index": lambda: encoded_sound("libmp3lame", "mp3", options={"write_xing": "0"}),
    "opus": lambda: encoded_sound("libopus", "ogg"),
    "webm": lambda: encoded_sound("libopus", "webm"),
    "aac": lambda: encoded_sound("aac", "adts"),
    "m4a": lambda: encoded_sound("aac", "ipod"),
    "mka": lambda: encoded_sound("aac", "matroska"),
    "wma": lambda: encoded_sound("wmav2", "asf"),
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_sound_is_read_by_its_content(tmp_path, kind):
    content = SOUNDS[kind]()
    lengths = set()
    for name in ("a.wav", "a.mp3", "a.m4a", "a.ogg", "a.mp4", "a"):
        (tmp_path / name).write_bytes(content)
        lengths.add(len(media.read_audio(tmp_path / name)))
        assert abs(hertz(tmp_path / name) - 440) < 3 and not media.outline(tmp_path / name)
    assert len(lengths) == 1 and abs(lengths.pop() / RATE - 2) < 0.15


@pytest.mark.parametrize("kind", ["ogg", "opus", "flac", "mp3", "mp3 without index", "aac"])
def test_files_behind_each_other_are_all_heard(tmp_path, kind):
    (tmp_path / "one").write_bytes(SOUNDS[kind]())
    (tmp_path / "two").write_bytes(2 * SOUNDS[kind]())
    assert abs(len(media.read_audio(tmp_path / "two")) - 2 * len(media.read_audio(tmp_path / "one"))) < 0.2 * RATE


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 1), (2 * RATE, 2), (2 * RATE, 1)])
def test_rate_and_channels_may_change_within_a_track(tmp_path, rate, channels):
    """Broadcasts, and files behind each other; libav ends the process where nobody looks after it."""
    (tmp_path / "a.aac").write_bytes(adts(RATE, 2) + adts(rate, channels))
    sound = media.read_audio(tmp_path / "a.aac")
    assert abs(len(sound) / RATE - 4) < 0.25  # encoders fill up their first and last frames
    for second in range(4):  # the loudest tone is the same in each
        part = sound[second * RATE + RATE // 4 :][: RATE // 2]
        assert abs(np.abs(np.fft.rfft(part)).argmax() * 2 - 440) <= 2 and 0.4 < np.abs(part).max() < 0.6
    np.testing.assert_array_equal(media.clip_sound(tmp_path / "a.aac"), sound)


@pytest.mark.parametrize(
    ("layout", "codec", "form"),
    [("7.1", "aac", "fltp"), ("7.1", "pcm_s24le", "s32"), ("hexadecagonal", "pcm_s16le", "s16")],
)
def test_films_of_many_channels_are_heard(tmp_path, layout, codec, form):
    """PyAV's planes of eight channels and more end the process."""
    path, channels = tmp_path / "a.mkv", av.AudioLayout(layout).nb_channels
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        block = np.repeat((tone(2.0) * 32767).astype(np.int16), channels)[None]
        frame = av.AudioFrame.from_ndarray(block, "s16", layout)
        frame.rate = RATE
        size = stream.codec_context.frame_size or 1024
        for part in av.AudioResampler(form, layout, RATE, frame_size=size).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    sound = media.read_audio(path)
    assert abs(len(sound) / RATE - 2) < 0.15 and abs(hertz(path) - 440) < 3 and abs(np.abs(sound).max() - 0.5) < 0.06


@pytest.mark.parametrize("kind", ["WAV", "MKV"])
def test_channels_that_cancel_each_other_out_are_called_that(tmp_path, kind):
    """Their mean, which is read, is silence; players play a tone."""
    path = tmp_path / "a.mkv"
    path.write_bytes(wave(np.stack([tone(2.0), -tone(2.0)], 1), kind="WAV"))
    if kind == "MKV":
        with av.open(str(tmp_path / "b.mkv"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
            frame = av.AudioFrame.from_ndarray(
                (np.stack([tone(2.0), -tone(2.0)]) * 32767).astype(np.int16), "s16p", "stereo"
            )
            frame.rate = RATE
            container.mux([*stream.encode(av.AudioResampler("s16").resample(frame)[0]), *stream.encode()])
        path = tmp_path / "b.mkv"
    assert np.abs(media.read_audio(path)).max() < 1e-3 and media.cancels(path)
    assert (
        "audio",
        "warning: is silent: its channels cancel each other out, and their mean is read; export it as mono",
    ) in examine((str(tmp_path), path.name, ("audio",))).problems
    path.write_bytes(wave(np.zeros((2 * RATE, 2))))
    assert not media.cancels(path)


def adts(rate: int, channels: int) -> bytes:
    """Two seconds of a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=rate, layout="stereo" if channels == 2 else "mono", bit_rate=96000)
        frame = av.AudioFrame.from_ndarray(np.stack([tone(2.0, rate)] * channels), "fltp", stream.layout.name)
        frame.rate = rate
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def test_a_codec_in_which_nothing_can_be_looked_up_is_read(tmp_path):
    (tmp_path / "a.wav").write_bytes(wave(tone(2.0, 8000), 8000, "GSM610"))
    assert abs(len(media.read_audio(tmp_path / "a.wav")) / RATE - 2) < 0.1 and abs(hertz(tmp_path / "a.wav") - 440) < 3


def test_a_recorder_that_did_not_come_to_write_the_lengths(tmp_path):
    """libav reads what is there, libsndfile nothing."""
    wav = wave(tone(2.0))
    (tmp_path / "a.wav").write_bytes(wav[:4] + bytes(4) + wav[8:40] + bytes(4) + wav[44:])
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav"), tone(2.0), atol=1e-3)
    for samples in (wave(np.zeros(0)), wave(np.full(1, 0.5), 48000)):  # a single one is none at 16 kHz
        (tmp_path / "a.wav").write_bytes(samples)
        with pytest.raises(InputError, match="has no samples"):
            media.read_audio(tmp_path / "a.wav")


def test_lengths_that_were_not_known_are_not_asked_for(tmp_path):
    """Written to a pipe: no number of samples in a FLAC, all ones in a WAV."""
    flac, wav = bytearray(SOUNDS["flac"]()), SOUNDS["wav"]()
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(flac)
    (tmp_path / "a.wav").write_bytes(wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:])
    for name in ("a.flac", "a.wav"):
        assert len(media.read_audio(tmp_path / name)) == 2 * RATE


def test_an_mp3_in_a_wav_file_is_read_to_its_end(tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded_sound("libmp3lame", "wav", seconds=4.0))
    assert abs(len(media.read_audio(tmp_path / "a.wav")) / RATE - 4) < 0.15


def test_what_is_encrypted_is_called_that(tmp_path):
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    path = tmp_path / "a.mp4"
    path.write_bytes(container_of(path, "mp4", "libx264", "aac", key))
    for read in (media.read_audio, media.watch, lambda path: media.read_video(path, 10, 16)):
        with pytest.raises(InputError, match="is encrypted .DRM.; give a copy without protection"):
            read(path)


def test_a_picture_that_moves_is_called_a_picture(tmp_path):
    """An animated WebP, which libav does not read."""
    pictures = [Image.fromarray(pixels) for pixels in noise(3)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(InputError, match="is WebP, no film or sound; give a film"):
        media.read_video(tmp_path / "a.webp", 4, 16)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_MEDIA = [
    (LFS, "Git LFS pointer.*git lfs pull"),
    (b"/annex/objects/MD5E-s1--x.mp4\n", "git-annex.*git annex get"),
    (b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
    (b"\n <HTML><body>404</body>", "web page"),
    (b"<?xml version='1.0'?><!-- x --><html>", "web page"),
    (b"Error 404: not found", "but text"),
    (b'{"message": "rate limit exceeded"}', "but text"),
    (b"", "is empty"),
    (bytes(5000), "nothing but zeros"),
    (b"#EXTM3U\n#EXTINF:10,\nclip.mp4\n#EXT-X-ENDLIST\n", "playlist"),
    (b"ffconcat version 1.0\nfile clip.mp4", "playlist"),
    (b"file 'clip.mp4'\n", "playlist"),
    (b"\xef\xbb\xbf[playlist]\nFile1=clip.mp4\n", "playlist"),
    (b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "playlist"),
    (b'<?xml version="1.0"?><MPD xmlns="x">', "playlist"),
    (b"http://example.org/clip.mp4\n", "playlist"),
    (b"PK\3\4" + bytes(60), "ZIP archive; unpack"),
    (b"\x1f\x8b\x08" + bytes(60), "gzip"),
]


@pytest.mark.parametrize(("content", "problem"), NO_MEDIA)
@pytest.mark.parametrize("name", ["a.mp4", "a.wav", "a.mp3", "a.m3u8"])
def test_what_is_no_medium_is_called_what_it_is(tmp_path, content, problem, name):
    write_video(tmp_path / "clip.mp4", 4, (16, 16))
    path = tmp_path / name
    path.write_bytes(content)
    for field, read in (
        ("audio", media.read_audio),
        ("video", media.watch),
        ("video", media.video_size),
        ("video", lambda path: media.read_video(path, 4, 16)),
    ):
        with pytest.raises(InputError, match=rf"{name} \[{field}\]: .*{problem}"):
            read(path)
    assert bool(stand_in(content)) == bool(re.search("Git LFS|annex|web page", problem))


# Truncation.


def container_of(
    path: Path, name: str, codec: str, sound: str, options: dict[str, str] | None = None, pipe: bool = False
) -> bytes:
    """The bytes of a film of 20 frames and two seconds of sound; `pipe`: without going back to fill in lengths."""
    if pipe:
        content = io.BytesIO()
        target = type("Pipe", (), {"write": lambda self, data: content.write(data)})()
    with av.open(target if pipe else str(path), "w", format=name, options=options or {}) as container:
        video = container.add_stream(codec, rate=10, width=48, height=32, pix_fmt="yuv420p", options={"g": "5"})
        rate = 48000 if sound == "libopus" else 44100 if sound == "mp2" else RATE
        audio = container.add_stream(sound, rate=rate, layout="mono", bit_rate=64000)
        packets = []
        for number, pixels in enumerate(noise(20)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            packets += video.encode(frame)
        packets += video.encode()
        frame = av.AudioFrame.from_ndarray(tone(2.0, rate)[None], format="fltp", layout="mono")
        frame.rate = rate
        for part in av.AudioResampler(
            format=audio.codec_context.format.name,
            layout="mono",
            rate=rate,
            frame_size=audio.codec_context.frame_size or 1024,
        ).resample(frame):
            packets += audio.encode(part)
        packets += audio.encode()
        container.mux(packets)
    return content.getvalue() if pipe else path.read_bytes()


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FILMS = {  # name -> (how it is made, whether a cut at the edge of its parts can be seen)
    "mp4": (("mp4", "mpeg4", "aac"), True),
    "fast mp4": (("mp4", "mpeg4", "aac", {"movflags": "faststart"}), True),
    "mov": (("mov", "libx264", "aac"), True),
    "fragments": (("mp4", "libx264", "aac", FRAGMENTS), False),
    "mkv": (("matroska", "libx264", "aac"), True),
    "webm": (("webm", "libvpx-vp9", "libopus"), True),
    "live mkv": (("matroska", "libx264", "aac", {"live": "1"}, True), False),
    "avi": (("avi", "mpeg4", "libmp3lame"), True),
    "flv": (("flv", "flv", "aac"), True),
    "ts": (("mpegts", "libx264", "aac"), False),
    "mpg": (("mpeg", "mpeg2video", "mp2"), False),
    "wmv": (("asf", "wmv2", "wmav2"), True),
}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Name -> (the bytes of a film, its ten frames, its sound)."""
    at, made = tmp_path_factory.mktemp("films"), {}
    for name, (how, _) in FILMS.items():
        (at / "x").write_bytes(content := container_of(at / "x", *how))
        made[name] = content, media.read_video(at / "x", 10, 16), media.read_audio(at / "x")
        assert media.watch(at / "x").frames == 20 and not media.outline(at / "x"), name
    return made


def cuts(size: int, count: int) -> list[int]:
    return sorted({int(at) for at in np.random.default_rng(size).integers(1, size, count)})


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", FILMS)
def test_a_film_that_was_cut_off_is_refused(films, tmp_path, name, count):
    """Anywhere, by all of its readers; where the edge of a part cannot be told from the end, what is read is right."""
    content, frames, sound = films[name]
    path, seen = tmp_path / "cut", 0
    for at in cuts(len(content), count):
        path.write_bytes(content[:at])
        for read, whole in (
            (lambda path: media.read_video(path, 10, 16), frames),
            (media.read_audio, sound),
            (media.watch, None),
        ):
            try:
                got = read(path)
            except InputError:
                seen += 1
                continue
            assert not FILMS[name][1], f"{name} cut at {at} of {len(content)} is read"
            if whole is sound:
                np.testing.assert_allclose(got[:-400], sound[: len(got) - 400], atol=1e-3)
    assert seen >= 3 * 0.9 * len(cuts(len(content), count)) or not FILMS[name][1]


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", SOUNDS)
def test_a_sound_that_was_cut_off_is_refused(tmp_path, kind, count):
    """Save at the very edge of a frame of an mp3 without index, of AAC, and of an Ogg page."""
    content = SOUNDS[kind]()
    path, read = tmp_path / "cut", 0
    for at in cuts(len(content), count):
        path.write_bytes(content[:at])
        with contextlib.suppress(InputError):
            media.read_audio(path)
            read += 1
    assert read <= (0.03 * count if kind in ("mp3 without index", "aac", "ogg", "opus") else 0)


def one_stream(path: Path, form: str, codec: str) -> bytes:
    """The bytes of a film of 20 frames without sound, or of two seconds of sound alone."""
    film, rate = codec in ("libvpx-vp9", "libsvtav1", "mpeg2video", "rv20"), 48000
    with av.open(str(path), "w", format=form) as container:
        if film:
            stream = container.add_stream(codec, rate=25, width=176, height=144, pix_fmt="yuv420p")
            for pixels in greys(20, (176, 144)):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        else:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(tone(2.0, rate)[None], format="fltp", layout="mono")
            frame.rate = rate
            for part in av.AudioResampler(
                format="fltp", layout="mono", rate=rate, frame_size=stream.codec_context.frame_size
            ).resample(frame):
                container.mux(stream.encode(part))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("ivf", "libvpx-vp9"),
        ("ivf", "libsvtav1"),
        ("mxf", "mpeg2video"),
        ("rm", "rv20"),
        ("ac3", "ac3"),
        ("eac3", "eac3"),
    ],
)
def test_rarer_forms_that_were_cut_off_are_refused_too(tmp_path, form, codec):
    """At any byte, but for the edge of a frame of AC-3; what follows the end is no part of it."""
    content, path, read = one_stream(tmp_path / "whole", form, codec), tmp_path / "x", 0
    look = media.read_audio if codec.endswith("ac3") else media.watch
    path.write_bytes(content + ID3V1)
    assert not media.outline(path)
    look(tmp_path / "whole")
    for at in cuts(len(content) - 32, 40):
        path.write_bytes(content[:at])
        with contextlib.suppress(InputError):
            look(path)
            read += 1
    assert read <= (1 if codec.endswith("ac3") else 0)


@pytest.mark.parametrize("name", FILMS)
def test_a_film_that_ends_in_zeros_is_refused(films, tmp_path, name):
    """Room was made for all of it before the copy, which stopped half-way."""
    content = films[name][0]
    half = len(content) // 2
    (tmp_path / "a").write_bytes(content[:half] + bytes(len(content) - half))
    for read in (lambda path: media.read_video(path, 20, 16), media.read_audio):
        with pytest.raises(InputError):
            read(tmp_path / "a")
    assert any(text.startswith("corrupt") for _, text in examine((str(tmp_path), "a", ("video",))).problems)


ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (32).to_bytes(4, "little") + bytes(16)


@pytest.mark.parametrize(
    "behind", [b"", b"\0" * 100, b"\xff" * 100, ID3V1, APE + ID3V1], ids=["nothing", "zeros", "ones", "id3", "ape"]
)
@pytest.mark.parametrize("kind", ["mp3", "mp3 without index", "wav", "ogg", "m4a", "aac", "webm"])
def test_what_follows_a_sound_is_no_part_of_it(tmp_path, kind, behind):
    (tmp_path / "a").write_bytes(SOUNDS[kind]())
    (tmp_path / "b").write_bytes(SOUNDS[kind]() + behind)
    if kind == "aac" and behind == b"\xff" * 100:
        return  # which begins like a frame
    assert not media.outline(tmp_path / "b")
    assert len(media.read_audio(tmp_path / "b")) == len(media.read_audio(tmp_path / "a"))


# mp3s whose length libsndfile does not know.


def varying_mp3(xing: bool) -> bytes:
    """Three seconds of noise, the first of it quiet: the first frames are much smaller than the others."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"write_xing": str(int(xing))}) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        stream.codec_context.flags |= 2  # a varying bit rate
        stream.codec_context.global_quality = 0
        noise = np.random.default_rng(0).uniform(-1, 1, 3 * RATE) * np.repeat([1e-3, 0.5, 0.5], RATE)
        frame = av.AudioFrame.from_ndarray(noise.astype(np.float32)[None], format="fltp", layout="mono")
        frame.rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    return file.getvalue()


def test_an_mp3_without_index_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.mp3"
    path.write_bytes(varying_mp3(xing=False))
    guessed = soundfile.read(path, dtype="float32")[0]
    whole = media.read_audio(path)
    assert len(guessed) < 2.5 * RATE and abs(len(whole) / RATE - 3) < 0.15
    np.testing.assert_array_equal(whole[: len(guessed)], guessed)
    with av.open(str(path)) as container:
        decoded = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    np.testing.assert_allclose(whole, decoded, atol=1e-5)


def test_joined_mp3s_are_read_to_the_end_of_the_last(tmp_path):
    part = varying_mp3(xing=True)
    (tmp_path / "one.mp3").write_bytes(part)
    (tmp_path / "two.mp3").write_bytes(part + part)
    one, two = media.read_audio(tmp_path / "one.mp3"), media.read_audio(tmp_path / "two.mp3")
    assert len(soundfile.read(tmp_path / "two.mp3")[0]) < 1.1 * len(one)
    np.testing.assert_array_equal(two[: len(one) - 2000], one[: len(one) - 2000])
    assert abs(len(two) - 2 * len(one)) < 0.2 * RATE


def test_an_index_without_a_number_of_frames(tmp_path):
    content = varying_mp3(xing=True)
    (tmp_path / "right.mp3").write_bytes(content)
    right = media.read_audio(tmp_path / "right.mp3")
    at = content.index(b"Xing") + 8
    (tmp_path / "a.mp3").write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    assert abs(len(media.read_audio(tmp_path / "a.mp3")) - len(right)) < 0.2 * RATE
