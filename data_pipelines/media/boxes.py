"""Completeness checks of containers made of nested boxes or elements: MP4 and its relatives, Matroska and WebM."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from data_pipelines.media.ends import Read, behind, short

_BLOCK = 1 << 20

# MP4, MOV, M4A, 3GP

MP4_BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"moof",
    b"mfra",
    b"styp",
    b"sidx",
    b"uuid",
    b"pnot",
    b"meta",
    b"udta",
    b"emsg",
    b"prft",
    b"ssix",
)


def mp4(read: Read, size: int) -> str:
    """Return what is missing of an MP4 file, or "".

    The boxes of the outermost level must fill the file, include the index, and the index must point into the file.
    """
    at, kinds, end, last = 0, set[bytes](), 0, b""
    while at < size:
        header = read(at, 16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if kind not in MP4_BOXES and {b"moov", b"mdat"} <= kinds:
            if b"moof" in kinds and 0 < size - at < 8 and not length:
                return f"ends inside of the head of a box, at byte {at}"  # the head of another fragment
            if zeros := behind(read, at, size):
                return zeros
            break  # other data behind the film
        length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
        if at + length > size:
            return short(f"{kind.decode('latin-1')!r} box", at + length - size)
        if length < 8:
            if b"moov" not in kinds:
                return f"has a broken box at byte {at}"
            break
        if kind == b"moov":
            end = max(end, _last_chunk(read, at + 8, at + length))
        elif kind == b"sidx":
            end = max(end, _indexed(read(at, length), at + length))
        kinds.add(kind)
        last = kind if kind in (b"moof", b"mdat") else last
        at += length
    if b"moov" not in kinds:
        return "has no index (moov); the copy stopped early"
    if last == b"moof":
        return "ends before the data of its last fragment"
    return f"ends before byte {end}, to which its index points" if end > size else ""


def encrypted(path: str | Path) -> bool:
    """Return whether the tracks of an MP4 are protected: its boxes are complete, but nothing can be decoded."""
    with open(path, "rb") as file:
        number = file.fileno()
        return any(
            kind == b"moov" and b"sinf" in os.pread(number, min(end - start, _BLOCK), start)
            for kind, start, end in _boxes(lambda at, count: os.pread(number, count, at), 0, os.fstat(number).st_size)
        )


def _boxes(read: Read, at: int, end: int) -> list[tuple[bytes, int, int]]:
    """Return (kind, start of the content, end) of the boxes between two positions."""
    boxes = []
    while at + 8 <= end:
        header = read(at, 16)
        length, wide = int.from_bytes(header[:4], "big"), 8
        if length == 1:
            length, wide = int.from_bytes(header[8:16], "big"), 16
        if length < wide:
            break
        boxes.append((header[4:8], at + wide, min(end, at + length)))
        at += length
    return boxes


def _last_chunk(read: Read, at: int, end: int) -> int:
    """Return the position of the last chunk of samples by the tables of an index; 0 if it has none in this file."""
    last, external = 0, False
    for kind, start, stop in _boxes(read, at, end):
        if kind in (b"trak", b"mdia", b"minf", b"stbl"):
            last = max(last, _last_chunk(read, start, stop))
        elif kind == b"dinf":  # samples in another file, which is never read
            external = any(
                kind == b"dref" and read(start + 8, 12)[11:] != b"\1" for kind, start, _ in _boxes(read, start, stop)
            )
        elif kind in (b"stco", b"co64"):
            wide = 4 if kind == b"stco" else 8
            count = min(int.from_bytes(read(start + 4, 4), "big"), (stop - start - 8) // wide)
            table = read(start + 8, count * wide)
            places = struct.unpack(f">{len(table) // wide}{'I' if wide == 4 else 'Q'}", table)
            last = max(last, max(places, default=0))
    return 0 if external else last


def _indexed(box: bytes, at: int) -> int:
    """Return the end of the last fragment that the segment index before `at` lists."""
    wide = 8 if box[8:9] > b"\0" else 4
    at += int.from_bytes(box[20 + wide : 20 + 2 * wide], "big")
    table = 24 + 2 * wide
    count = int.from_bytes(box[table - 2 : table], "big")
    return at + sum(
        int.from_bytes(box[place : place + 4], "big") & 0x7FFFFFFF
        for place in range(table, min(table + 12 * count, len(box) - 11), 12)
    )


# Matroska, WebM

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_IN_SEGMENT = (0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367)
_IN_CLUSTER = (0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF)
_ANYWHERE = (0xEC, 0xBF)  # void, checksum
_ELEMENTS = {_EBML, _SEGMENT, *_IN_SEGMENT, *_IN_CLUSTER, *_ANYWHERE}


def matroska(read: Read, size: int) -> str:
    """Return what is missing of a Matroska file, or "": elements must fit into the file.

    Elements of unknown length (live recordings) are entered.
    """
    at = segment = 0
    while at < size:
        header = read(at, 12)
        first = _vint_length(header[0])
        kind = int.from_bytes(header[:first], "big")
        second = _vint_length(header[first]) if len(header) > first else 1
        if len(header) < first < 5 or (kind in _ELEMENTS and len(header) < first + second):
            return f"ends inside of the head of an element, at byte {at}"
        if kind not in _ELEMENTS:
            broken = at < segment and not header[4:].strip(b"\0")
            return f"has a broken element at byte {at}" if broken else behind(read, at, size)
        unknown = (1 << 7 * second) - 1
        length = int.from_bytes(header[first : first + second], "big") & unknown
        at += first + second
        if length == unknown or (kind == _SEGMENT and at + length <= size):
            segment = 0 if length == unknown else at + length
            continue  # its children follow
        if at + length > size:
            return short({_SEGMENT: "segment", _CLUSTER: "cluster"}.get(kind, "element"), at + length - size)
        at += length
    return ""


def _vint_length(first: int) -> int:
    return 9 - first.bit_length()
