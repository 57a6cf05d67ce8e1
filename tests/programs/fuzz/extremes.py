"""Inputs that are meant to hurt: what is huge but for its size on disk, and what stands in a file's place. Each is
tried before a command that reads such a file, of media before every one."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.programs.fuzz import mutate
from tests.programs.fuzz.inputs import MEDIA, Kind

_GRAY = 11_000  # pixels a side of a picture of 121 megapixels


def _long_flac(path: Path) -> None:
    """Ten hours of silence in a megabyte."""
    silence = np.zeros(3600 * 8000, np.int16)
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(10):
            file.write(silence)


def _unstated_flac(path: Path) -> None:
    """The same, which does not say how long it is."""
    _long_flac(path)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


def _sparse_wav(path: Path) -> None:
    """3 GB of zeros that take no room."""
    size = 3 * 2**30
    header = (
        b"RIFF"
        + struct.pack("<I", size + 36)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
        + b"data"
        + struct.pack("<I", size)
    )
    path.write_bytes(header)
    os.truncate(path, size + len(header))


def _large_picture(path: Path) -> None:
    Image.new("L", (_GRAY, _GRAY), 128).save(path, compress_level=1)


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 3 * 2**30)


PLACES: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
    "a sparse file": _sparse,
}
LISTS: dict[str, Callable[[Path], None]] = {
    "a list of ffmpeg": _text("ffconcat version 1.0\nfile /etc/passwd\nduration 5\n"),
    "a list without a head": _text("file '/etc/passwd'\n"),
    "a playlist": _text("#EXTM3U\n/etc/passwd\n"),
    "a stream": _text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"),
    "an address": _text("http://127.0.0.1:9/x\n"),
    "DASH": _text('<?xml version="1.0"?><MPD><Period/></MPD>'),
}
PICTURES: dict[str, Callable[[Path], None]] = {
    "PostScript": _text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n{ } loop\nshowpage\n"),
    "SVG": _text('<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>'),
    "a PDF": _text("%PDF-1.4\n"),
    "121 megapixels": _large_picture,
}
SOUNDS: dict[str, Callable[[Path], None]] = {
    "ten hours": _long_flac,
    "ten hours unstated": _unstated_flac,
    "3 GB of zeros": _sparse_wav,
}


def zeros_behind(path: Path) -> None:
    """3 GB of zeros behind what is whole, which take no room."""
    os.truncate(path, path.stat().st_size + 3 * 2**30)


def extremes(kinds: list[Kind]) -> list[tuple[Kind, str, Callable[[Path], None]]]:
    """(kind of file, what stands in its place, what makes that)."""
    found = []
    for kind in kinds:
        makers: dict[str, Callable[[Path], None]] = {}
        if kind.name in ("clip.mp4", "sound.wav", "binary.png", "picture.png"):
            makers = {**PLACES, **LISTS}
        if kind.name == "picture.png" or kind.name == "binary.png":
            makers |= PICTURES
        if kind.name == "sound.wav":
            makers |= SOUNDS
        if (
            not makers
            and kind.family in (mutate.JSON, mutate.TEXT, mutate.ARCHIVE, mutate.WEIGHTS)
            and "*" not in (kind.file)
        ):
            makers = PLACES
        if kind.name in MEDIA:
            makers |= {"3 GB of zeros behind it": zeros_behind}
        found += [(kind, name, make) for name, make in makers.items()]
    return found
