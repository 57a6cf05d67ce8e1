"""Opening media containers with libav, and what their outline says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from crab_jax.errors import InputError

_MP4 = (".mp4", ".m4a", ".m4v", ".mov")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"styp", b"sidx", b"uuid",
              b"pnot", b"meta", b"udta")
_OTHERS = (b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"G@")  # Matroska, Ogg, Flash, MPEG


def require(path: str | Path, field: str) -> str:
    if not os.path.isfile(path):  # which says so of names that no file can have too
        raise InputError(str(path), field, "no such file", "check the data root and the path in the annotation")
    return str(path)


@contextlib.contextmanager
def opened(path: str | Path, field: str) -> Iterator[av.container.InputContainer]:
    """An open media container; libav errors while it is in use become InputErrors."""
    path = require(path, field)
    try:
        if damaged := mp4_damage(path):
            raise InputError(path, field, f"{damaged}; the file is damaged or incomplete", "copy or download it again")
        with av.open(path, metadata_errors="replace") as container:  # titles may be in any encoding
            if not container.streams:
                raise EOFError  # an mp4 that ends before its index opens all the same
            yield container
    except InputError:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError, MemoryError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or incomplete"
        raise InputError(path, field, problem, "copy or download the file again") from None


def mp4_damage(path: str | Path) -> str:
    """What is wrong with the outline of an MP4 file; "" when nothing is, and for a file of another kind.

    The boxes of the outermost level must add up to the file, and its index must be among them. libav reads what is
    there of a shorter file, and makes up the rest of its last frame.
    """
    if Path(path).suffix.lower() not in _MP4:
        return ""
    at, kinds, size = 0, set(), os.path.getsize(path)
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if not at and kind not in _MP4_BOXES:
                other = header.startswith(_OTHERS) or (header[:4] == b"RIFF" and header[8:12] == b"AVI ")
                return "" if other else "is no MP4 file"  # another container with this ending is decoded all the same
            if kind not in _MP4_BOXES and b"moov" in kinds and b"mdat" in kinds:
                return ""  # something else behind the film
            length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
            if at + length > size:
                return f"ends inside of its {kind.decode('latin-1')!r} box, {at + length - size} bytes short"
            if length < 8:
                return "" if b"moov" in kinds else f"has a broken box at byte {at}"
            kinds.add(kind)
            at += length
    return "" if b"moov" in kinds else "has no index (moov); the copy stopped early"


def decode_alone(stream: Any) -> None:
    """Decode in this thread: the data loader already runs one decoder per core."""
    if stream.codec_context is None:
        raise ValueError("unknown codec")
    stream.codec_context.thread_count = 1
