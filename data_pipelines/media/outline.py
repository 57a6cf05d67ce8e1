"""Checks of films and sounds for truncation: the lengths that a file states against its size.

Decoders read what is left of a truncated file without an error. Nothing is decoded here, and the content determines the
format. Lengths that a file does not state (written to a pipe, recorded live) are not checked, and data after the end of
a container (tags, junk) are ignored. docs/datasets.md lists what cannot be detected.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from crab_jax.io.files import HEAD
from data_pipelines.media.boxes import MP4_BOXES, matroska, mp4
from data_pipelines.media.chunks import aiff, asf, au, avi, caf, ivf, mxf, real, sony, wave, wave64
from data_pipelines.media.ends import PADDING, Read, behind, behind_id3, padded, short
from data_pipelines.media.frames import ac3, adts, is_ac3, is_adts, is_mpeg_audio, mpeg_audio

_BLOCK = 1 << 20
_LEAST = 12  # smallest size of a head of any format


def outline(path: str | Path) -> str:
    """Return what is wrong with the lengths that a film or sound states; "" if nothing is, and for other formats.

    Raises OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        number = file.fileno()

        def read(at: int, count: int) -> bytes:
            return os.pread(number, count, at)

        size, at = os.fstat(number).st_size, behind_id3(read)
        start = read(at, HEAD)
        for matches, check in _TAGGED if at else _KINDS:
            if matches(start):
                return check(read, size)
    return f"holds only {size} bytes" if 0 < size < _LEAST else ""


def behind_tags(path: str | Path) -> bytes:
    """Return the first bytes of a file after any ID3 tags at its beginning."""
    with open(path, "rb") as file:
        number = file.fileno()
        return os.pread(number, HEAD, behind_id3(lambda at, count: os.pread(number, count, at)))


# Ogg


def _ogg(read: Read, size: int) -> str:
    """Check an Ogg file: complete pages, consecutive in each stream, and no packet that continues on a missing page.

    Decoders drop a page with a wrong checksum, so that the sound after it is heard too early.
    """
    at, going_on, open_ones, numbers = 0, set[bytes](), set[bytes](), dict[bytes, int]()
    while at < size:
        header = read(at, 27 + 255)
        if not header.startswith(b"OggS"[: len(header)]):
            return f"its page at byte {at:,} is broken" if open_ones else behind(read, at, size)
        lengths = header[27 : 27 + header[26]] if len(header) > 26 else b""
        end = at + 27 + header[26] + sum(lengths) if len(header) > 26 else size + 1
        if end > size:
            return short("last page", end - size)
        if _ogg_checksum(page := read(at, end - at)) != int.from_bytes(page[22:26], "little"):
            return f"its page at byte {at:,} has the checksum of another one"
        stream, number = header[14:18], int.from_bytes(header[18:22], "little")
        if not header[5] & 2 and number != (numbers.get(stream, number - 1) + 1) % 2**32:
            return f"pages are missing before byte {at:,}"
        numbers[stream] = number
        (open_ones.discard if header[5] & 4 else open_ones.add)(stream)
        if lengths:
            (going_on.add if lengths[-1] == 255 else going_on.discard)(header[14:18])
        at = end
    return "ends inside of a packet" if going_on else ""


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """Return the checksum of an Ogg page: that of zlib with another bit order and initial value."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def chained(path: str | Path) -> bool:
    """Return whether an Ogg or FLAC file is several files joined, of which libsndfile reads only the first."""
    with open(path, "rb") as file:
        if (block := file.read(8))[:4] == b"fLaC":
            while more := file.read(_BLOCK):
                if b"fLaC\0\0\0\x22" in (block := block[-7:] + more):
                    return True
        number, at, begun = file.fileno(), 0, False
        while (header := os.pread(number, 27 + 255, at)).startswith(b"OggS") and len(header) > 26:
            if header[5] & 2 and begun:
                return True
            begun = begun or not header[5] & 2
            at += 27 + header[26] + sum(header[27 : 27 + header[26]])
    return False


# Flash


def _flash(read: Read, size: int) -> str:
    at, stated = int.from_bytes(read(5, 4), "big") + 4, 0.0
    while at < size:
        header = read(at, 11)
        kind, length = header[0] & 0x1F, int.from_bytes(header[1:4], "big")
        if kind not in (8, 9, 18):
            return behind(read, at, size)
        if at + 11 + length + 4 > size:
            return short("last tag", at + 11 + length + 4 - size)
        if kind == 18 and not stated:
            _, found, after = read(at + 11, length).partition(b"\0\x08filesize\0")
            stated = struct.unpack(">d", after[:8])[0] if found and len(after) >= 8 else 0.0
        at += 11 + length + 4
    return f"holds {size} of {stated:.0f} bytes" if size < stated < 1e15 else ""


# MPEG transport and program streams


def _transport(start: bytes) -> int:
    """Return the packet length of a transport stream, 0 for other files."""
    for length, at in ((188, 0), (192, 4), (204, 0)):
        if len(start) > at + 4 * length and all(start[at + k * length] == 0x47 for k in range(5)):
            return length
    return 0


def _mpegts(read: Read, size: int) -> str:
    length = _transport(read(0, HEAD))
    rest = size % length
    if size > 2 * PADDING and not read(size - PADDING, PADDING).strip(b"\0"):
        return "ends in nothing but zeros; the copy stopped early"
    begins = read(size - rest, rest)[4 if length == 192 else 0 :][:1]
    return short("last packet", length - rest) if rest and begins in (b"\x47", b"") else ""


def _mpegps(read: Read, size: int) -> str:
    at = 0
    while at < size:
        header = read(at, 14)
        if len(header) < 6:
            return short("last packet", 6 - len(header)) if header.startswith(b"\0\0\1"[: len(header)]) else ""
        if header[:3] != b"\0\0\1" or header[3] < 0xB9:
            return behind(read, at, size)
        if header[3] == 0xBA:
            length = 12 if header[4] & 0xC0 != 0x40 else 14 + (header[13] & 7 if len(header) > 13 else 0)
        else:
            length = 4 if header[3] == 0xB9 else 6 + int.from_bytes(header[4:6], "big")
        at += length
    return short("last packet", at - size) if at > size else ""


# GIF


def _gif(read: Read, size: int) -> str:
    """Check a GIF: it must end between two blocks; many writers omit the final block."""
    flags = read(10, 1)[0]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < size:
        kind = read(at, 10)
        if kind[0] == 0x2C and len(kind) == 10:
            at += 10 + (3 << (kind[9] & 7) + 1 if kind[9] & 0x80 else 0) + 1
        elif kind[0] == 0x21:
            at += 2
        else:
            return short("last picture", 10 - len(kind)) if kind[0] == 0x2C else ""
        while True:
            if at >= size:
                return short("last picture", at - size + 1)
            length = read(at, 1)[0]
            at += 1 + length
            if not length:
                break
    return ""


Kinds = tuple[tuple[Callable[[bytes], object], Callable[[Read, int], str]], ...]  # (test of the first bytes, check)
_TAGGED: Kinds = ((is_adts, adts), (is_mpeg_audio, mpeg_audio))  # formats that may have ID3 tags in front
_KINDS: Kinds = (
    (lambda start: start[4:8] in MP4_BOXES, mp4),
    (lambda start: start[:4] == b"\x1aE\xdf\xa3", matroska),
    (lambda start: start[:4] == b"OggS", _ogg),
    (lambda start: start[:4] == b"fLaC", padded),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"WAVE", wave),
    (lambda start: start[:4] == b"RF64", wave64),
    (lambda start: start[:4] == b"RIFF" and start[8:11] == b"AVI", avi),
    (lambda start: start[:4] == b"FORM" and start[8:11] == b"AIF", aiff),
    (lambda start: start[:4] == b"riff", sony),
    (lambda start: start[:4] == b"caff", caf),
    (lambda start: start[:4] == b".snd" and len(start) >= 12, au),
    (lambda start: start[:4] == b"FLV\1", _flash),
    (lambda start: start[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", asf),
    (lambda start: start[:4] == b"\0\0\1\xba", _mpegps),
    (lambda start: start[:4] == b"GIF8", _gif),
    (lambda start: start[:4] == b".RMF", real),
    (lambda start: start[:4] == b"DKIF" and len(start) >= 32, ivf),
    (lambda start: start[:14] == bytes.fromhex("060e2b34020501010d0102010102"), mxf),
    (is_ac3, ac3),
    (_transport, _mpegts),
    *_TAGGED,
)
