"""A corpus of odd and damaged inputs: what people's copies of data sets hold. `write(root)` makes a raw root of them.

Each `Case` is one line of own/test.jsonl with the files that it names, and says what `validate` must call wrong with
it, or that nothing is ("": it only looks odd). The other datasets have annotation files that are damaged as a whole,
`ANNOTATIONS`, and no media.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import releases
import soundfile
from media_files import RATE, tone, write_audio
from PIL import Image
from pycocotools import mask as coco

from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines.media import inline_mask

LOOK = {"task": "avcap", "instruction": "<video>What is it?", "target": "It.", "windows": "none"}
SEE = {**LOOK, "instruction": "<image>What is it?"}
HEAR = {**LOOK, "instruction": "<audio>What is it?", "windows": "ten"}
BOTH = {**LOOK, "instruction": "<video><audio>What is it?", "windows": "ten"}
MASKS = "".join(f"<mask_{i}>" for i in range(6))
SEGMENT = {**SEE, "task": "s4", "target": MASKS, "mask_kind": "binary", "image": "media/picture.png"}
CLASSES = {**SEGMENT, "task": "avss", "mask_kind": "semantic"}
SIZE = (48, 32)  # of pictures, width and height


@dataclasses.dataclass(frozen=True)
class Case:
    """line: of own/test.jsonl. problem: a pattern that the text of its only problem matches, "" for none. field: of the
    problem."""

    id: str
    line: str
    problem: str = ""
    field: str = ""


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    times: Sequence[int] = (),
    seconds: float = 0.0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A clip of uint8[H,W,3] frames at 10 fps, or at `times` in tenths of a second; `seconds` of sound if any."""
    height, width = frames[0].shape[:2] if len(frames) else (32, 48)
    with av.open(str(path), "w", options=options or {}) as container:
        if len(frames) or not seconds:
            stream = container.add_stream(codec, rate=10, width=width, height=height, pix_fmt=pix_fmt)
        sound = container.add_stream("aac", rate=RATE, layout="mono") if seconds else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[number] if times else number
            container.mux(stream.encode(frame))
        container.start_encoding()
        container.mux(stream.encode() if len(frames) else [])
        if sound:
            waves = av.AudioFrame.from_ndarray(tone(seconds)[None], format="fltp", layout="mono")
            waves.rate = RATE
            container.mux([*sound.encode(waves), *sound.encode()])
    return path.read_bytes()


def greys(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """Frames of level 8 * i."""
    return [np.full((size[1], size[0], 3), 8 * i % 256, np.uint8) for i in range(count)]


def noise(count: int, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3)).astype(np.uint8))


def sky(size: tuple[int, int] = SIZE) -> np.ndarray:
    """White above, black below."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2] = 255
    return pixels


def turned(clip: bytes, matrix: Sequence[int]) -> bytes:
    """The clip with the display matrix (a, b, c, d) of its track set."""
    a, b, c, d = (65536 * value for value in matrix)
    at = clip.index(b"tkhd") + 44
    return clip[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + clip[at + 36 :]


def overwritten(clip: bytes, box: bytes, content: Callable[[int], bytes], skip: int = 8) -> bytes:
    """The clip with what follows the first `skip` bytes of a box replaced."""
    at = clip.index(box) + 4
    end = at - 8 + int.from_bytes(clip[at - 8 : at - 4], "big")
    return clip[: at + skip] + content(end - at - skip) + clip[end:]


def interlaced(pixels: np.ndarray) -> bytes:
    """uint8[H,W] as a PNG that loads in seven passes, which Pillow reads but does not write."""
    rows = b""
    for top, left, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        part = pixels[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    height, width = pixels.shape
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, body)
        for kind, body in (
            (b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 1)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum or zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """The PNG with a chunk in front of its pixels."""
    return png[:33] + chunk(kind, body, checksum) + png[33:]


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """The JPEG with a segment of metadata in front of all others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def grey_of(bits: int, values: np.ndarray) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow reads but does not write; the width is whole bytes."""
    height, width = values.shape
    digits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in digits)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def huge(width: int, height: int) -> bytes:
    """The beginning of a large PNG."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def wave(samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=kind)
    return file.getvalue()


class Corpus:
    """Cases, and the files that they name, as they are written."""

    def __init__(self, root: Path):
        self.folder = root / "own"
        self.media = self.folder / "media"
        self.media.mkdir(parents=True)
        self.cases: list[Case] = []

    def row(self, id: str, problem: str, field: str, **record: Any) -> None:
        self.cases.append(Case(id, json.dumps({"id": id, **record}), problem, field))

    def line(self, id: str, line: str, problem: str, field: str = "") -> None:
        self.cases.append(Case(id, line, problem, field))

    def file(self, name: str, content: bytes, problem: str = "", field: str = "video", row: dict | None = None) -> None:
        """A case of one file, named like it."""
        (self.media / name).write_bytes(content)
        row = row or {"video": LOOK, "image": SEE, "audio": HEAR, "mask": SEGMENT}[field]
        self.row(name, problem, field if problem else "", **{**row, field: f"media/{name}"})


def videos(corpus: Corpus) -> None:
    """Damage at every level of an mp4, and what only looks like it."""
    add, media = corpus.file, corpus.media
    clip = film(media / "clip.mp4", greys(20), seconds=2.0)  # the index comes last
    front = film(media / "front.mp4", noise(20), options={"movflags": "faststart"})
    index, data = front.index(b"moov") - 4, front.index(b"mdat") - 4
    corpus.row("clip.mp4", "", "", **BOTH, video="media/clip.mp4")
    add("zero-length.mp4", b"", "is empty")
    add("text.mp4", b"404: not found\n" * 40, "but text .'404: not found")
    add("page.mp4", b"<!DOCTYPE html><title>Quota exceeded</title>" * 99, "is a web page")
    add("random.mp4", np.random.default_rng(1).bytes(5000), "cannot be decoded")
    add("ftyp-cut.mp4", front[:10], "inside of its 'ftyp' box")
    add("ftyp-only.mp4", front[:index], "no index")
    add("moov-missing.mp4", clip[: clip.index(b"moov") - 4], "no index")
    add("moov-cut.mp4", front[: (index + data) // 2], "inside of its 'moov' box")
    add("moov-cut-behind.mp4", clip[:-100], "inside of its 'moov' box")
    add("mdat-cut.mp4", front[: data + (len(front) - data) // 2], "inside of its 'mdat' box")
    add("mdat-cut-late.mp4", front[:-200], "inside of its 'mdat' box")
    add("mdat-absent.mp4", front[:data], "to which its index points")
    add("mdat-zeros.mp4", overwritten(front, b"mdat", bytes), "cannot be decoded|0 of 20 frames")
    add("mdat-random.mp4", overwritten(front, b"mdat", np.random.default_rng(2).bytes), "cannot be decoded")
    half = (len(front) - data) // 2
    add("mdat-hole.mp4", front[: data + half] + bytes(2000) + front[data + half + 2000 :], "cannot be decoded|damaged")
    for box in (b"stsz", b"stco", b"stsc", b"stts", b"stsd"):
        add(f"{box.decode()}-zeros.mp4", overwritten(front, box, bytes, 0), "cannot be decoded|of 20 frames|no frames")
    add("stco-random.mp4", overwritten(front, b"stco", np.random.default_rng(3).bytes, 8), "to which its index points")
    add("trak-missing.mp4", front.replace(b"trak", b"free"), "no video stream|cannot be decoded")
    add("box-of-three.mp4", front[:index] + b"\0\0\0\3moov" + front[index + 8 :], "broken box")
    add("name-in-latin.mp4", overwritten(front, b"hdlr", lambda n: b"\xe9" * n, 24))
    add("no-frames.mp4", film(media / "x.mp4", []), "no video stream|no frames|cannot be decoded|no index")
    add("sound-only.mp4", film(media / "x.mp4", [], seconds=2.0), "no video stream")
    write_audio(media / "x.wav", 2.0)
    add("a-wav.mp4", (media / "x.wav").read_bytes(), "no video stream")
    add("one-frame.mp4", film(media / "x.mp4", greys(1)))
    add("varying-rate.mp4", film(media / "x.mp4", greys(12), times=[0, 1, 2, 3, 10, 11, 12, 13, 30, 31, 32, 50]))
    upright = film(media / "x.mp4", [sky()] * 4)
    for degrees, matrix in ((90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))):
        add(f"rotated-{degrees}.mp4", turned(upright, matrix))
    for size in ((1, 1), (3, 5), (4097, 2)):
        add(f"{size[0]}x{size[1]}.mp4", film(media / "x.mp4", noise(3, size), "mjpeg", "yuvj444p"))
    add("CAPITALS.MP4", clip)
    film(media / "x.mkv", greys(4))
    add("matroska.mp4", (media / "x.mkv").read_bytes())
    add("junk-behind.mp4", clip + b"\xff" * 100)
    add("mute.mp4", upright, "no audio track", "video", BOTH)
    corpus.cases[-1] = dataclasses.replace(corpus.cases[-1], field="audio")
    add("short-sound.mp4", film(media / "x.mp4", greys(40), seconds=2.0), "2.* s of sound for 4.00 s", "video", BOTH)
    for name in ("x.mp4", "x.mkv", "x.wav"):
        (media / name).unlink()


def sounds(corpus: Corpus) -> None:
    """Rates, channels and depths; headers that are wrong; and recordings of nothing."""
    two = tone(2.0)

    def add(name: str, content: bytes, problem: str = "") -> None:
        corpus.file(name, content, problem, "audio")

    add("mono.wav", wave(two))
    add("stereo.wav", wave(np.stack([two, 0 * two], 1)))
    add("surround.wav", wave(np.stack([two] * 6, 1)))
    add("8-khz.wav", wave(tone(2.0, 8000), 8000))
    add("96-khz.wav", wave(tone(2.0, 96000), 96000))
    for subtype in ("PCM_24", "PCM_32", "PCM_U8", "FLOAT", "DOUBLE"):
        add(f"{subtype}.wav", wave(two, subtype=subtype))
    add("nan.wav", wave(np.where(np.arange(len(two)) == 9, np.nan, two), subtype="FLOAT"), "NaN or infinite")
    add("infinite.wav", wave(np.where(np.arange(len(two)) == 9, np.inf, two), subtype="FLOAT"), "NaN or infinite")
    add("silent.wav", wave(0 * two), "is silent")
    add("nearly-silent.wav", wave(two * 1e-5, subtype="FLOAT"), "is silent")
    add("a-tenth.wav", wave(tone(0.1)), "too short")
    add("no-samples.wav", wave(two[:0]), "no samples")
    add("zero-length.wav", b"", "is empty")
    add("text.wav", b"not found\n" * 9, "but text")
    whole = wave(two)

    def stating(at: int, value: int) -> bytes:
        return whole[:at] + struct.pack("<I", value) + whole[at + 4 :]

    add("cut.wav", whole[: len(whole) // 2], "truncated")
    add("riff-too-long.wav", stating(4, len(whole)), "truncated")
    add("riff-unknown.wav", stating(4, 0xFFFFFFFF))
    add("data-too-long.wav", stating(40, 2 * len(whole)), "truncated")
    add("data-too-short.wav", stating(40, 16000), "samples would be lost")
    add("data-zero.wav", stating(40, 0), "samples would be lost")
    add("1-hertz.wav", stating(24, 1), "sample rate of 1 Hz")
    add("0-hertz.wav", stating(24, 0), "cannot be decoded")
    add("no-channels.wav", whole[:22] + bytes(2) + whole[24:], "cannot be decoded")
    add("trailing.wav", whole + b"TAG" + bytes(125))
    flac, mp3 = (wave(two, subtype=s, kind=k) for s, k in (("PCM_16", "FLAC"), ("MPEG_LAYER_III", "MP3")))
    add("whole.flac", flac)
    add("cut.flac", flac[: len(flac) // 2], "cannot be decoded|truncated")
    add("cut.mp3", mp3[: len(mp3) // 2], "truncated")
    picture = encoded(np.zeros((4, 4, 3), np.uint8))
    body = b"\0image/png\0\3\0" + picture
    tag = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    length = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    add("cover.mp3", b"ID3\3\0\0" + length + tag + mp3)
    with av.open(str(corpus.media / "x.mp3"), "w", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        stream.codec_context.flags |= 2  # a varying bit rate
        stream.codec_context.global_quality = 0
        quiet = np.concatenate([1e-3 * two, two, two]) * np.random.default_rng(0).uniform(-1, 1, 6 * RATE)
        frame = av.AudioFrame.from_ndarray(quiet.astype(np.float32)[None], format="fltp", layout="mono")
        frame.rate = RATE
        container.mux([*stream.encode(frame), *stream.encode()])
    add("no-index.mp3", (corpus.media / "x.mp3").read_bytes())
    (corpus.media / "x.mp3").unlink()


def pictures(corpus: Corpus) -> None:
    """Depths, modes and orientations, and files that end."""
    pixels = noise(1)[0]

    def add(name: str, content: bytes, problem: str = "") -> None:
        corpus.file(name, content, problem, "image")

    png, jpeg = encoded(pixels), encoded(pixels, "JPEG")
    add("picture.png", png)
    add("cut.png", png[: len(png) // 2], "ends before")
    add("hole.png", png[:200] + bytes(400) + png[600:], "the checksum of its pixels")
    add("wrong-sum.png", png[:29] + bytes(4) + png[33:], "cannot be decoded")
    add("bomb.png", huge(60000, 60000), "has 3,600 megapixels, and at most 179 are read")
    add("200-megapixels.png", huge(16320, 12240), "has 200 megapixels")
    add("zero-length.png", b"", "is empty")
    add("text.jpg", b"not found\n" * 9, "but text")
    add("cut.jpg", jpeg[: len(jpeg) // 2], "ends before")
    add("cut-and-closed.jpg", jpeg[: len(jpeg) // 2] + b"\xff\xd9", "the rest is grey")
    add("16-bit.png", encoded((np.arange(32 * 48, dtype=np.uint16) * 40).reshape(32, 48)))
    add("alpha.png", encoded(np.concatenate([pixels, pixels[..., :1]], 2)))
    add("palette.png", encoded(Image.fromarray(pixels).quantize(16)))
    add("interlaced.png", interlaced(pixels[..., 0]))
    add("cmyk.jpg", encoded(Image.fromarray(np.full_like(pixels, (200, 40, 40))).convert("CMYK"), "JPEG", quality=95))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    add("exif.jpg", encoded(sky(), "JPEG", quality=95, exif=exif))
    add("4097.png", encoded(np.zeros((2, 4097), np.uint8)))
    add("one.png", encoded(np.full((1, 1, 3), 9, np.uint8)))
    add(
        "two-pictures.gif",
        encoded(Image.fromarray(pixels), "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    )
    look_odd(corpus, pixels)
    not_read(corpus, pixels)


def look_odd(corpus: Corpus, pixels: np.ndarray) -> None:
    """Pictures under other names, with metadata of every sort, and of every mode that is read."""
    image, smooth = Image.fromarray(pixels), Image.fromarray(pixels[:6, :8]).resize(SIZE)
    png, jpeg = encoded(pixels), encoded(smooth, "JPEG", quality=95)
    grey = (np.arange(32 * 48).reshape(32, 48) // 6).astype(np.uint8)
    deep = grey.astype(np.uint16) * 256

    def add(name: str, content: bytes) -> None:
        corpus.file(name, content, "", "image")

    add("png-inside.jpg", png)
    add("jpeg-inside.png", jpeg)
    add("webp-inside.jpg", encoded(image, "WEBP", lossless=True))
    add("gif-inside.png", encoded(image.quantize(64), "GIF"))
    add("no-ending", png)
    add("CAPITALS.JPEG", jpeg)
    add("moving.png", encoded(image, save_all=True, append_images=[Image.new("RGB", SIZE)]))
    add("two-pictures.mpo", encoded(image, "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)]))
    add("motion-photo.jpg", jpeg + b"\0\0\0\x18ftypmp42" + bytes(20_000))
    add("junk-behind.png", png + b"\xff\xd9" * 9000)
    add("progressive.jpg", encoded(smooth, "JPEG", progressive=True))
    add("restarts.jpg", encoded(smooth, "JPEG", restart_marker_blocks=2))
    add("grey-128.jpg", encoded(np.full_like(pixels, 128), "JPEG"))
    add("grey-128-progressive.jpg", encoded(np.full_like(pixels, 128), "JPEG", progressive=True))
    for name, exif in (
        ("junk", b"Exif\0\0" + bytes(range(200))),
        ("short", b"Exif\0\0MM"),
        ("circle", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\1\0\0\0\x08\0\0\0\x08"),
    ):
        add(f"exif-{name}.jpg", with_segment(jpeg, 0xE1, exif))
        add(f"exif-{name}.png", with_chunk(png, b"eXIf", exif[6:]))
        add(f"exif-{name}.webp", encoded(image, "WEBP", exif=exif))
    add("xmp-latin.jpg", with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>\xe9\xff</x:xmpmeta>"))
    add("multi-picture-junk.jpg", with_segment(jpeg, 0xE2, b"MPF\0" + bytes(range(60))))
    add("colours-junk.jpg", with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\1\1" + b"\xff" * 50))
    add("adobe-junk.jpg", with_segment(jpeg, 0xED, b"Photoshop 3.0\0" + b"8BIM\4\4" + b"\xff" * 5))
    add("comment-latin.jpg", with_segment(jpeg, 0xFE, b"caf\xe9 \xff\xfe"))
    add("colours-junk.png", with_chunk(png, b"iCCP", b"sRGB\0\0no zlib"))
    add("colours-method.png", with_chunk(png, b"iCCP", b"sRGB\0\7"))
    add("text-latin.png", with_chunk(png, b"tEXt", b"Caf\xe9\0\xff\xfe"))
    add("text-long.png", with_chunk(png, b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))))
    add("text-wrong-sum.png", with_chunk(png, b"tEXt", b"a\0b", 1))
    add("text-empty.png", with_chunk(png, b"iTXt", b""))
    add("16-bit-colour.png", encoded_16(np.stack([deep, deep // 2, deep[::-1]], 2)))
    add("16-bit.tif", encoded(deep, "TIFF"))
    add("16-bit.pgm", encoded(deep, "PPM"))
    add("16-bit-white-is-0.tif", encoded(0xFFFF - deep, "TIFF", tiffinfo={262: 0}))
    add("2-bit.png", grey_of(2, grey // 64))
    add("4-bit.png", grey_of(4, grey // 16))
    for mode, kind in (
        ("1", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "TIFF"),
        ("LAB", "TIFF"),
        ("YCbCr", "TIFF"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("RGB", "JPEG2000"),
        ("RGB", "AVIF"),
    ):
        add(f"{mode}.{kind.lower()}", encoded(image.convert(mode), kind))
    see_through = image.quantize(16)
    see_through.info["transparency"] = 3
    add("palette-see-through.png", encoded(see_through))
    (corpus.media / "http:").mkdir()
    for name in (
        "2024-05-01T12:30:05.jpg",
        "100%25.jpg",
        "%03d.jpg",
        "file:x.jpg",
        "http:/x.jpg",
        "a?b#c.jpg",
        "-x.jpg",
    ):
        add(name, jpeg)


def encoded_16(values: np.ndarray) -> bytes:
    """uint16[H,W,3] as a PNG, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    height, width = values.shape[:2]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def not_read(corpus: Corpus, pixels: np.ndarray) -> None:
    """Pictures that are cut off, and what is whole but of a kind that is not read."""
    image, smooth = Image.fromarray(pixels), Image.fromarray(pixels[:6, :8]).resize((480, 320))

    def add(name: str, content: bytes, problem: str) -> None:
        corpus.file(name, content, problem, "image")

    for name, content in (
        ("gif", encoded(image.quantize(64), "GIF")),
        ("webp", encoded(image, "WEBP", lossless=True)),
        ("bmp", encoded(image, "BMP")),
        ("tif", encoded(image, "TIFF")),
        ("jp2", encoded(image, "JPEG2000")),
        ("avif", encoded(smooth, "AVIF")),
        ("ppm", encoded(image, "PPM")),
        ("interlaced.png", interlaced(pixels[..., 0])),
        ("progressive.jpg", encoded(smooth, "JPEG", progressive=True)),
    ):
        add(f"cut.{name}", content[: len(content) * 3 // 5], "ends before|cannot be decoded")
    for name, options in (
        ("progressive", {"progressive": True}),
        ("restarts", {"restart_marker_blocks": 4}),
        ("grey", {}),
    ):
        jpeg = encoded(smooth.convert("L") if name == "grey" else smooth, "JPEG", **options)
        add(f"cut-{name}-closed.jpg", jpeg[: len(jpeg) * 4 // 5] + b"\xff\xd9", "data end before the picture does")
    add("zeros-behind.jpg", jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "ends before")
    add("float.tif", encoded(pixels[..., 0].astype(np.float32) / 255, "TIFF"), "decimal numbers")
    add("32-bit.tif", encoded(pixels[..., 0].astype(np.int32), "TIFF"), "numbers of 32 bits")
    add("raw.dng", encoded(image, "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "raw file")
    add("preview-first.tif", encoded(image, "TIFF", tiffinfo={254: 1}), "preview only")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    for name, content, problem in (
        ("photo.heic", heic, "is HEIC"),
        ("heic-inside.jpg", heic, "is HEIC"),
        ("mif1.heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1miaf" + bytes(99), "is HEIC"),
        ("raw.cr2", b"II*\0\x10\0\0\0CR\2\0" + bytes(99), r"raw file \(CR2"),
        ("raw.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99), r"raw file \(CR3"),
        ("raw.raf", b"FUJIFILMCCD-RAW 0201" + bytes(99), "raw file"),
        ("drawing.psd", b"8BPS\0\1" + bytes(99), "Photoshop"),
        ("new.jxl", b"\xff\x0a" + bytes(99), "JPEG XL"),
        ("boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
        ("drawing.svg", b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg width='1' height='1'/>", "is SVG"),
        ("svg-inside.png", b"<svg width='1' height='1'></svg>", "is SVG"),
        ("postscript-inside.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        ("paper.pdf", b"%PDF-1.7\n" + bytes(99), "PDF"),
        ("icon.ico", b"\0\0\1\0\1\0" + bytes(99), "ICO"),
        ("web-page.jpg", b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "LFS pointer"),
        ("zeros.png", bytes(5000), "zeros"),
        ("zip-inside.jpg", b"PK\3\4" + bytes(99), "ZIP"),
        ("film-inside.jpg", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "is a film"),
        ("unknown.jpg", b"\1\2\3\4\xff" * 99, "no known kind"),
    ):
        add(name, content, problem)


def masks(corpus: Corpus) -> None:
    """Sizes, colours and palettes."""
    ids = np.zeros((32, 48), np.uint8)
    ids[:16] = 9

    def add(name: str, content: bytes, problem: str = "", row: dict | None = None) -> None:
        corpus.file(name, content, problem, "mask", row or CLASSES)

    def indexed(palette: np.ndarray, values: np.ndarray = ids) -> bytes:
        picture = Image.fromarray(values, "P")
        picture.putpalette(palette.astype(np.uint8).tobytes())
        return encoded(picture)

    colours = avss_palette()[ids]
    stray, strange = colours.copy(), colours.copy()
    stray[0, 0], strange[:4] = (1, 2, 3), (1, 2, 3)
    add("binary.png", encoded(ids), "", SEGMENT)
    add("binary-16-bit.png", encoded(ids.astype(np.uint16)), "", SEGMENT)
    add("small.png", encoded(ids[::2, ::2]), "is 24x16, but its picture is 48x32", SEGMENT)
    add("see-through.png", encoded(np.stack([0 * ids, 25 * ids], 2)), "opaque", SEGMENT)
    add("cut-mask.png", encoded(noise(1)[0])[:600], "ends before", SEGMENT)
    full = Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8))
    add("blurred.jpg", encoded(full, "JPEG"), "", SEGMENT)
    add(
        "dim.jpg",
        encoded((ids > 0).astype(np.uint8) * 9 + 3 * np.eye(32, 48, dtype=np.uint8), "JPEG"),
        "not black and white",
        SEGMENT,
    )
    add(
        "shaded.jpg",
        encoded(Image.fromarray(np.arange(1536).reshape(32, 48).astype(np.uint8)), "JPEG"),
        "not black and white",
        SEGMENT,
    )
    objects = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])
    add("objects.png", indexed(objects, ids // 9 * 2), "", SEGMENT)
    add("black-and-white.gif", encoded(full.convert("P"), "GIF"), "", SEGMENT)
    add("white-first.png", indexed(np.array([[255] * 3, [0] * 3]), (ids == 0).astype(np.uint8)), "", SEGMENT)
    add("bright-background.png", indexed(objects[::-1] + 100, ids // 9), "bright colour for index 0", SEGMENT)
    add("black-object.png", indexed(0 * objects, ids // 9), "has black for index 1", SEGMENT)
    add("dark-object.png", encoded(np.where(ids[..., None] > 0, [0, 0, 1], 0).astype(np.uint8)), "so dark", SEGMENT)
    add("float-mask.tif", encoded((ids / 9).astype(np.float32), "TIFF"), "decimal numbers", SEGMENT)
    add("32-bit-mask.tif", encoded(ids.astype(np.int32), "TIFF"), "", SEGMENT)
    add("1-bit-mask.png", encoded(Image.fromarray(ids > 0)), "", SEGMENT)
    add("ids-4-bit.png", grey_of(4, ids))
    add("ids.jpg", encoded(ids, "JPEG"), "does not keep class ids")
    add("greys-in-colour.png", encoded(ids[..., None].repeat(3, 2)), "768 of 1536 pixels have a colour of no class")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned_picture = {**SEGMENT, "image": "media/exif.jpg"}
    add(
        "upright.png",
        encoded(np.ascontiguousarray(np.rot90(ids, -1))),
        "warning: EXIF turns its picture",
        turned_picture,
    )
    add("turned-alike.png", encoded(Image.fromarray(ids), exif=exif), "", turned_picture)
    add("sideways.png", encoded(ids), "is 48x32, but its picture is 32x48", turned_picture)
    add("ids.png", encoded(ids))
    add("colours.png", encoded(colours))
    add("ids-with-palette.png", indexed(avss_palette()))
    add("ids-with-greys.png", indexed(np.arange(256)[:, None].repeat(3, 1)))
    swapped = avss_palette()[[0, 9]]
    add("sorted-palette.png", indexed(swapped, (ids > 0).astype(np.uint8)), "colour of class 9 for palette index 1")
    add("id-71.png", encoded(np.where(np.arange(48) == 1, 71, ids).astype(np.uint8)), "class id 71 is outside")
    add("stray-colour.png", encoded(stray), "warning: 1 of 1536 pixels")
    add("strange-colours.png", encoded(strange), "corrupt: 192 of 1536 pixels")
    code = coco.encode(np.asfortranarray(ids[:5, :5]))
    corpus.row("inline.rle", "is 5x5, but", "mask", **SEGMENT, mask=inline_mask(code))
    corpus.row("text.rle", "no mask in COCO run lengths", "mask", **SEGMENT, mask="rle:32x48:~~~")
    corpus.row(
        "no-picture",
        "which is no frame",
        "second",
        **{**SEGMENT, "image": None, "instruction": "<video>?"},
        video="media/clip.mp4",
        mask="media/binary.png",
    )


def paths(corpus: Corpus) -> None:
    """Names that lead elsewhere, to nothing, or to what is no file."""
    media = corpus.media

    def add(name: str, path: str, problem: str) -> None:
        corpus.row(name, problem, "video" if problem else "", **LOOK, video=path)

    for name, path in (
        ("absolute", "/etc/passwd"),
        ("escaping", "../ave/x.mp4"),
        ("deep-escape", "media/../../x.mp4"),
        ("backslash", "media\\clip.mp4"),
        ("home", "~/clip.mp4"),
        ("drive", "C:/clip.mp4"),
        ("address", "https://example.org/clip.mp4"),
        ("zero-byte", "media/clip.mp4\0.txt"),
    ):
        add(name, path, "malformed: .*leaves the data root")
    outside = media.parent.parent / "outside.mp4"
    outside.write_bytes((media / "clip.mp4").read_bytes())
    (media / "link-out.mp4").symlink_to(outside)
    (media / "link-in.mp4").symlink_to("clip.mp4")
    (media / "link-to-nothing.mp4").symlink_to("nothing.mp4")
    (media / "circle.mp4").symlink_to("elcric.mp4")
    (media / "elcric.mp4").symlink_to("circle.mp4")
    (media / "folder.mp4").mkdir()
    (media / "\u526a\u8f91 \u00e9 1.mp4").write_bytes(outside.read_bytes())
    os.mkfifo(media / "pipe.mp4")
    add("link-out", "media/link-out.mp4", "link out of the data root")
    add("link-in", "media/link-in.mp4", "")
    add("link-to-nothing", "media/link-to-nothing.mp4", "missing: ")
    add("circle", "media/circle.mp4", "missing: ")
    add("folder", "media/folder.mp4", "missing: .*is a folder")
    add("pipe", "media/pipe.mp4", "malformed: .*a pipe or a device")
    add("nothing", "media/nothing.mp4", "missing: ")
    add("long-name", f"media/{'x' * 5000}.mp4", "missing: ")
    add("\u526a\u8f91 \U0001f3bb", "media/\u526a\u8f91 \u00e9 1.mp4", "")
    if os.geteuid() == 0:
        os.mknod(media / "device.mp4", 0o20666, os.makedev(1, 5))  # endless zeros
        add("device", "media/device.mp4", "malformed: .*a pipe or a device")
    else:
        (media / "locked.mp4").write_bytes(outside.read_bytes())
        (media / "locked.mp4").chmod(0)
        add("locked", "media/locked.mp4", "cannot be read")


def rows(corpus: Corpus) -> None:
    """Lines that are no records, or records that say nothing."""
    good = {**LOOK, "video": "media/clip.mp4"}
    text = json.dumps(good)[:-1]

    corpus.row("twice", "", "", **good)
    corpus.row("twice", "duplicate id", "id", **good)
    corpus.line("half a line", '{"id": "x", "task"', "not valid JSON")
    corpus.line("a list", "[1, 2]", "JSON object")
    corpus.line("a word", "null", "JSON object")
    corpus.line("key twice", text + ', "id": "k", "id": "l"}', "'id' comes twice")
    corpus.line("nan", text + ', "id": "n", "meta": {"start": NaN}}', "NaN is no number")
    corpus.line("infinity", text + ', "id": "i", "meta": {"end": -Infinity}}', "-Infinity is no number")
    corpus.line("deep", text + ', "id": "d", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", "brackets too deep|JSON")
    corpus.line("long", text + f', "id": "long", "target": "{"x" * 17_000_000}"}}', "line of 16 MB")
    corpus.line("digits", text + f', "id": "digits", "second": {"9" * 5000}}}', "5000 digits")
    corpus.line("half a character", text + r', "id": "\ud83d"}', "half of a surrogate pair")
    corpus.row("whole character", "", "", **{**good, "target": "\U0001f3bb"})  # written as two halves
    corpus.row("number for text", "is int 3", "target", **{**good, "target": 3})
    corpus.row("truth for number", "is bool True", "second", **good, second=True)
    corpus.row("text for list", "missing: .*no folder", "frames", **LOOK, frames="media/clip.mp4")
    corpus.row("no instruction", "missing field", "instruction", task="avcap", video="media/clip.mp4")
    corpus.row("unknown field", "unknown field", "vidoe", **good, vidoe="media/clip.mp4")
    corpus.row("unknown task", "unknown value 'song'", "task", **{**good, "task": "song"})
    corpus.row("no placeholder", "visual placeholders", "instruction", **{**good, "instruction": "What?"})
    corpus.row("no sound", "is missing", "audio", **HEAR)
    corpus.row("no second", "reads one of 10", "second", **{**BOTH, "windows": "one"}, video="media/clip.mp4")


def write(root: Path) -> list[Case]:
    """The whole corpus; own/train.jsonl has a byte order mark and CRLF and is sound."""
    corpus = Corpus(root)
    for part in (videos, sounds, pictures, masks, paths, rows):
        part(corpus)
    text = "".join(case.line + "\n" for case in corpus.cases)
    (corpus.folder / "test.jsonl").write_text(text, encoding="utf-8")
    (corpus.media / "\u526a.png").write_bytes((corpus.media / "one.png").read_bytes())
    sound = json.dumps({"id": "\u526a", **SEE, "image": "media/\u526a.png"}, ensure_ascii=False)
    releases.text(corpus.folder / "train.jsonl", f"{sound}\n", "\r\n", bom=True)
    for name, _, _, content, _ in ANNOTATIONS:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif content == PIPE:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
    return corpus.cases


PIPE = b"a pipe"
QUESTION = json.dumps(releases.AVQA_ROWS["train"][0])
# (file, dataset, split, content, the text of a problem of it). Sound rows are reported as missing their media.
ANNOTATIONS: list[tuple[str, str, str, bytes | None, str]] = [
    (
        "ave/trainSet.txt",
        "ave",
        "train",
        b"\xef\xbb\xbfBark&RUhOCu3LNXM&good&0&10\r\n\r\n",
        "missing: .*RUhOCu3LNXM.mp4",
    ),
    ("ave/valSet.txt", "ave", "val", b"", "malformed: is empty"),
    ("ave/testSet.txt", "ave", "test", None, "missing: no such annotation file"),
    ("llp/AVVP_train.csv", "avvp", "train", "filename\tevent_labels\n".encode("utf-16"), "not UTF-8"),
    ("llp/AVVP_val_pd.csv", "avvp", "val", b"filename\tevent_labels\nx\xe9\tDog\n", "not UTF-8"),
    ("llp/AVVP_test_pd.csv", "avvp", "test", b"filename\tevent_labels\rx\tDog\r", "no such column"),
    ("llp/AVVP_eval_audio.csv", "avvp", "test", b"filename\tonset\toffset\tevent_labels\nx\t1\t2\n", "3 fields, not 4"),
    ("llp/AVVP_eval_visual.csv", "avvp", "test", b"filename\tonset\toffset\tevent_labels\nx\t1\t-2\tDog\n", "is -2"),
    ("music_avqa/json_update/avqa-train.json", "avqa", "train", QUESTION[:-9].encode(), "not valid JSON"),
    ("music_avqa/json_update/avqa-val.json", "avqa", "val", b"[" * 100_000, "brackets too deep"),
    ("music_avqa/json_update/avqa-test.json", "avqa", "test", QUESTION.encode(), "holds dict, not a list"),
    (
        "music_avqa/json/avqa-train.json",
        "avqa_original",
        "train",
        b'[{"anser": "one", "anser": "two"}]',
        "'anser' comes twice",
    ),
    (
        "music_avqa/json/avqa-val.json",
        "avqa_original",
        "val",
        f"[{QUESTION}]".replace(": 12,", ": NaN,").encode(),
        "is nan",
    ),
    (
        "music_avqa/json/avqa-test.json",
        "avqa_original",
        "test",
        f"[{QUESTION}]".replace(": 12,", ": Infinity,").encode(),
        "is inf",
    ),
    ("avsbench_semantic/metadata.csv", "avss", "train", b"uid,split,label\nx,train,v2\n", "no such column"),
    (
        "avsbench_object/Single-source/s4_meta_data.csv",
        "s4_object",
        "train",
        b"name,start,category,split,note\n-_wznbUu3DY,0,helicopter,train,extra\n",
        "missing: .*-_wznbUu3DY",
    ),
    (
        "avsbench_object/Multi-sources/ms3_meta_data.csv",
        "ms3_object",
        "train",
        b'video_id,split\n"jlhuZfcw61w,train\n',
        "unfinished quotation",
    ),
    (
        "ref_avs/metadata.csv",
        "ref_avs",
        "train",
        b'vid,uid,split,fid,exp\r\n-8mcyL3kWNQ_8000_18000,-8mcyL3kWNQ_8000_18000_cat_1,train,11,"the cat, left"\r\n',
        "missing: .*-8mcyL3kWNQ_8000_18000/",
    ),
    ("valor/desc_train.json", "valor", "train", b'[{"video_id": ' + b"9" * 5000 + b"}]", "5000 digits"),
    ("valor/desc_val.json", "valor", "val", b'[["video_id", "desc"]]', "not an object"),
    ("valor/desc_test.json", "valor", "test", PIPE, "missing: no such annotation file"),
    (
        "video_llava/valley_.json",
        "video_llava",
        "train",
        b'[{"id": {}, "video": "../x.mp4", "conversations": [{"value": "a"}, {"value": "b"}]}]',
        "leaves the data root",
    ),
    (
        "audiocaps/train.csv",
        "audiocaps",
        "train",
        b"audiocap_id,youtube_id,start_time,caption\n1,\0,0,x\n",
        "is '.x00'",
    ),
    ("audiocaps/val.csv", "audiocaps", "val", b"<html><body>Sign in</body></html>\n", "is a web page"),
    (
        "audiocaps/test.json",
        "audiocaps",
        "test",
        b'[{"audiocap_id": 1.5, "youtube_id": "r1nicOVtvkQ", "caption": "x"}]',
        "is 1.5",
    ),
    (
        "lvis/lvis_v1_train.json",
        "lvis",
        "train",
        b'{"images": [], "categories": [], "annotations": [{"area": NaN}]}',
        "is nan",
    ),
    ("lvis/lvis_v1_val.json", "lvis", "val", b'{"images": [], "annotations": []}', "is no list"),
]
