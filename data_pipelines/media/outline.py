"""What is wrong with the outline of a film or sound: the lengths that a file states against the bytes that it has.

Decoders read what is there of a shorter file and keep quiet. Nothing is decoded here, and the kind of a file is told by
its content. A length that a file does not state (written to a pipe, recorded live) is not asked for, and what follows
the end of a container (tags, junk) is no part of it. docs/datasets.md says what cannot be seen.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipelines.media.content import HEAD, id3_length

_BLOCK = 1 << 20
_PADDING = 8192  # bytes of zeros that may stand behind a file
_LEAST = 12  # bytes that the head of any kind has
Read = Callable[[int, int], bytes]  # (at, count): the bytes of the file from `at`, fewer at its end


def outline(path: str | Path) -> str:
    """What is wrong with the lengths that a film or sound states; "" when nothing is, and for any other kind of file.

    Raises OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        number = file.fileno()

        def read(at: int, count: int) -> bytes:
            return os.pread(number, count, at)

        size, at = os.fstat(number).st_size, behind_id3(read)
        start = read(at, HEAD)
        for is_one, check in _TAGGED if at else _KINDS:
            if is_one(start):
                return check(read, size)
    return f"holds only {size} bytes" if 0 < size < _LEAST else ""


def behind_tags(path: str | Path) -> bytes:
    """The first bytes of a file, behind the ID3 tags that it may begin with."""
    with open(path, "rb") as file:
        number = file.fileno()
        return os.pread(number, HEAD, behind_id3(lambda at, count: os.pread(number, count, at)))


def behind_id3(read: Read) -> int:
    """Where the ID3 tags end that a file may begin with."""
    at = 0
    while length := id3_length(read(at, 10)):
        at += length
    return at


def _behind(read: Read, at: int, size: int) -> str:
    """What stands behind the last part of a file is no part of it, unless it is zeros to the end and many: room that
    was made for a copy which stopped early."""
    many = size - at >= max(_PADDING, size // 20)
    zeros = many and not read(at, 4096).strip(b"\0") and not read(size - 4096, 4096).strip(b"\0")
    return f"holds nothing but zeros from byte {at} on; the copy stopped early" if zeros else ""


def _padded(read: Read, size: int) -> str:
    """`_behind` of a kind that says nothing of its length, and whose data never hold so many zeros."""
    return _behind(read, max(0, size - max(_PADDING, size // 20)), size)


def _short(what: str, missing: int) -> str:
    return f"ends inside of its {what}, {missing} bytes short"


# MP4, MOV, M4A, 3GP

MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"styp", b"sidx", b"uuid",
             b"pnot", b"meta", b"udta", b"emsg", b"prft", b"ssix")


def _mp4(read: Read, size: int) -> str:
    """The boxes of the outermost level must add up to the file, its index be among them, and point into it."""
    at, kinds, end, last = 0, set[bytes](), 0, b""
    while at < size:
        header = read(at, 16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if kind not in MP4_BOXES and {b"moov", b"mdat"} <= kinds:
            if b"moof" in kinds and 0 < size - at < 8 and not length:
                return f"ends inside of the head of a box, at byte {at}"  # another fragment began
            if zeros := _behind(read, at, size):
                return zeros
            break  # something else behind the film
        length = int.from_bytes(header[8:16], "big") if length == 1 else length or size - at
        if at + length > size:
            return _short(f"{kind.decode('latin-1')!r} box", at + length - size)
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
    """Whether the tracks of an MP4 are protected: its boxes are whole, and nothing can be decoded."""
    with open(path, "rb") as file:
        number = file.fileno()
        return any(kind == b"moov" and b"sinf" in os.pread(number, min(end - start, _BLOCK), start) for kind, start, end
                   in _boxes(lambda at, count: os.pread(number, count, at), 0, os.fstat(number).st_size))


def _boxes(read: Read, at: int, end: int) -> list[tuple[bytes, int, int]]:
    """(kind, start of the content, end) of the boxes between two places."""
    found = []
    while at + 8 <= end:
        header = read(at, 16)
        length, wide = int.from_bytes(header[:4], "big"), 8
        if length == 1:
            length, wide = int.from_bytes(header[8:16], "big"), 16
        if length < wide:
            break
        found.append((header[4:8], at + wide, min(end, at + length)))
        at += length
    return found


def _last_chunk(read: Read, at: int, end: int) -> int:
    """Where the last chunk of samples begins, by the tables of an index; 0 where it has none in this file."""
    last, external = 0, False
    for kind, start, stop in _boxes(read, at, end):
        if kind in (b"trak", b"mdia", b"minf", b"stbl"):
            last = max(last, _last_chunk(read, start, stop))
        elif kind == b"dinf":  # samples in another file, which nothing reads
            external = any(kind == b"dref" and not read(start + 8, 12)[11:] == b"\1" for kind, start, _ in
                           _boxes(read, start, stop))
        elif kind in (b"stco", b"co64"):
            wide = 4 if kind == b"stco" else 8
            count = min(int.from_bytes(read(start + 4, 4), "big"), (stop - start - 8) // wide)
            table = read(start + 8, count * wide)
            places = struct.unpack(f">{len(table) // wide}{'I' if wide == 4 else 'Q'}", table)
            last = max(last, max(places, default=0))
    return 0 if external else last


def _indexed(box: bytes, at: int) -> int:
    """Where the last of the fragments that a segment index lists ends; it stands before `at`."""
    wide = 8 if box[8:9] > b"\0" else 4
    at += int.from_bytes(box[20 + wide : 20 + 2 * wide], "big")
    table = 24 + 2 * wide
    count = int.from_bytes(box[table - 2 : table], "big")
    return at + sum(int.from_bytes(box[place : place + 4], "big") & 0x7FFFFFFF
                    for place in range(table, min(table + 12 * count, len(box) - 11), 12))


# Matroska, WebM

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_IN_SEGMENT = (0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367)
_IN_CLUSTER = (0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xAF)
_ANYWHERE = (0xEC, 0xBF)  # void, checksum
_ELEMENTS = {_EBML, _SEGMENT, *_IN_SEGMENT, *_IN_CLUSTER, *_ANYWHERE}


def _matroska(read: Read, size: int) -> str:
    """Elements must fit into the file; those of unknown length (live recordings) are looked into."""
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
            return f"has a broken element at byte {at}" if broken else _behind(read, at, size)
        unknown = (1 << 7 * second) - 1
        length = int.from_bytes(header[first : first + second], "big") & unknown
        at += first + second
        if length == unknown or (kind == _SEGMENT and at + length <= size):
            segment = 0 if length == unknown else at + length
            continue  # its children come next
        if at + length > size:
            return _short({_SEGMENT: "segment", _CLUSTER: "cluster"}.get(kind, "element"), at + length - size)
        at += length
    return ""


def _vint_length(first: int) -> int:
    return 9 - first.bit_length()


# Ogg

def _ogg(read: Read, size: int) -> str:
    """Pages must be whole, each the one after the last of its stream, and no packet go on in a page that is not there.
    Decoders leave out a page of another checksum than its own, and what follows is heard too early."""
    at, going_on, open_ones, numbers = 0, set[bytes](), set[bytes](), dict[bytes, int]()
    while at < size:
        header = read(at, 27 + 255)
        if not header.startswith(b"OggS"[: len(header)]):
            return f"its page at byte {at:,} is broken" if open_ones else _behind(read, at, size)
        lengths = header[27 : 27 + header[26]] if len(header) > 26 else b""
        end = at + 27 + header[26] + sum(lengths) if len(header) > 26 else size + 1
        if end > size:
            return _short("last page", end - size)
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
    """The checksum of an Ogg page: zlib's, but for the order of the bits and where it starts."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
    return int(f"{zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def chained(path: str | Path) -> bool:
    """Whether an Ogg or FLAC file is several behind each other, of which libsndfile reads the first only."""
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
            return _behind(read, at, size)
        if at + 11 + length + 4 > size:
            return _short("last tag", at + 11 + length + 4 - size)
        if kind == 18 and not stated:
            _, found, after = read(at + 11, length).partition(b"\0\x08filesize\0")
            stated = struct.unpack(">d", after[:8])[0] if found and len(after) >= 8 else 0.0
        at += 11 + length + 4
    return f"holds {size} of {stated:.0f} bytes" if size < stated < 1e15 else ""


# MPEG transport and program streams

def _transport(start: bytes) -> int:
    """The length of the packets of a transport stream, 0 for another file."""
    for length, at in ((188, 0), (192, 4), (204, 0)):
        if len(start) > at + 4 * length and all(start[at + k * length] == 0x47 for k in range(5)):
            return length
    return 0


def _mpegts(read: Read, size: int) -> str:
    length = _transport(read(0, HEAD))
    rest = size % length
    if size > 2 * _PADDING and not read(size - _PADDING, _PADDING).strip(b"\0"):
        return "ends in nothing but zeros; the copy stopped early"
    begins = read(size - rest, rest)[4 if length == 192 else 0 :][:1]
    return _short("last packet", length - rest) if rest and begins in (b"\x47", b"") else ""


def _mpegps(read: Read, size: int) -> str:
    at = 0
    while at < size:
        header = read(at, 14)
        if len(header) < 6:
            return _short("last packet", 6 - len(header)) if header.startswith(b"\0\0\1"[: len(header)]) else ""
        if header[:3] != b"\0\0\1" or header[3] < 0xB9:
            return _behind(read, at, size)
        if header[3] == 0xBA:
            length = 12 if header[4] & 0xC0 != 0x40 else 14 + (header[13] & 7 if len(header) > 13 else 0)
        else:
            length = 4 if header[3] == 0xB9 else 6 + int.from_bytes(header[4:6], "big")
        at += length
    return _short("last packet", at - size) if at > size else ""


# Files of chunks: WAV, AVI, AIFF, Wave64, CAF, ASF, AU

def _unknown(length: int) -> bool:
    """Whether a length of 32 bits says that it was not known: written to a pipe."""
    return length >= 0xFFFFFFF0 or 0x7FFFF000 <= length <= 0x7FFFFFFF


def _wave(read: Read, size: int) -> str:
    """libsndfile silently returns what is there of a shorter file, and leaves out what a header does not count."""
    stated = int.from_bytes(read(4, 4), "little") + 8
    if size < stated and not _unknown(stated - 8):
        return f"holds {size} of {stated} bytes; the file is truncated"
    at, kind = 12, b""
    while at + 8 <= size and (kind != b"data" or at < stated):  # what follows the RIFF is no part of it
        header = read(at, 8)
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        if not kind.isascii() or not kind.strip(b" \0").isalnum():
            return f"has no chunk at byte {at}, where its header says so; samples would be lost"
        if kind == b"data" and _unknown(length):
            return ""
        if at + 8 + length > size:
            return f"its {kind.decode()!r} chunk holds {size - at - 8} of {length} bytes; the file is truncated"
        at += 8 + length + length % 2
    return "" if kind else "ends before the samples"


def _wave64(read: Read, size: int) -> str:
    """RF64: a WAV file with lengths of 64 bits."""
    stated = int.from_bytes(read(20, 8), "little") + 8
    return _short("RF64 chunk", stated - size) if read(12, 4) == b"ds64" and size < stated < 1 << 62 else ""


def _avi(read: Read, size: int) -> str:
    """One RIFF chunk, and more of them in a film of gigabytes."""
    at = 0
    while at + 12 <= size and read(at, 4) == b"RIFF":
        length = int.from_bytes(read(at + 4, 4), "little")
        if not length or _unknown(length):
            return _chunks(read, size, at + 12)
        if at + 8 + length > size:
            return _short("RIFF chunk", at + 8 + length - size)
        if zeros := _chunks(read, at + 8 + length, at + 12):
            return zeros
        at += 8 + length + length % 2
    return _behind(read, at, size)


def _chunks(read: Read, size: int, at: int) -> str:
    """The chunks of an AVI: they must fit in, and go on to the end."""
    while at < size:
        header = read(at, 12)
        kind, length = header[:4], int.from_bytes(header[4:8], "little")
        if not kind.isalnum():
            return _behind(read, at, size)
        if len(header) < 8:
            return _short("last chunk", 8 - len(header))
        if kind == b"LIST" and (header[8:] in (b"movi", b"rec ") or _unknown(length)):
            at += 12
            continue
        if at + 8 + length > size:
            return _short(f"{kind.decode()!r} chunk", at + 8 + length - size)
        at += 8 + length + length % 2
    return ""


def _aiff(read: Read, size: int) -> str:
    stated = int.from_bytes(read(4, 4), "big") + 8
    return _short("FORM chunk", stated - size) if size < stated and not _unknown(stated - 8) else ""


def _sony(read: Read, size: int) -> str:
    """Wave64."""
    stated = int.from_bytes(read(16, 8), "little")
    return _short("RIFF chunk", stated - size) if size < stated < 1 << 62 else ""


def _caf(read: Read, size: int) -> str:
    at = 8
    while at + 12 <= size:
        header = read(at, 12)
        length = int.from_bytes(header[4:], "big", signed=True)
        if length < 0:
            return ""  # to the end of the file
        at += 12 + length
    return _short("last chunk", at - size) if at > size else ""


def _au(read: Read, size: int) -> str:
    begin, length = struct.unpack(">II", read(4, 8))
    return _short("samples", begin + length - size) if not _unknown(length) and begin + length > size else ""


_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_INDEX = bytes.fromhex("90080033b1e5cf1189f400a0c90349cb")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf(read: Read, size: int) -> str:
    """WMV, WMA: a header, the data, and indices. The data may be of unknown length, in packets of a known one."""
    at, packet = 0, 0
    while at + 24 <= size:
        header = read(at, 24)
        length = int.from_bytes(header[16:], "little")
        if not at:
            _, found, properties = read(0, min(length, 1 << 16)).partition(_ASF_PROPERTIES)
            packet = int.from_bytes(properties[76:80], "little") if found else 0
        if header[:16] == _ASF_DATA and length <= 50:
            behind = read(max(0, size - _BLOCK), _BLOCK).rfind(_ASF_INDEX)
            end = max(0, size - _BLOCK) + behind if behind >= 0 else size
            rest = (end - at - 50) % packet if packet else 0
            if rest or end == size:
                return _short("last packet", packet - rest) if rest else ""
            at = end
            continue
        if header[:16] == _ASF_DATA and packet and not read(min(size, at + length) - packet, packet).strip(b"\0"):
            return "ends in nothing but zeros; the copy stopped early"
        if header[3:4] not in (b"\x75", b"\x33", b"\xd6", b"\xfe") or length < 24:
            return _behind(read, at, size)
        at += length
    return _short("last object", at - size) if at > size else ""


def _gif(read: Read, size: int) -> str:
    """Ends between two blocks: many writers leave out the last one, which says that it is the last."""
    flags = read(10, 1)[0]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < size:
        kind = read(at, 10)
        if kind[0] == 0x2C and len(kind) == 10:
            at += 10 + (3 << (kind[9] & 7) + 1 if kind[9] & 0x80 else 0) + 1
        elif kind[0] == 0x21:
            at += 2
        else:
            return _short("last picture", 10 - len(kind)) if kind[0] == 0x2C else ""
        while True:
            if at >= size:
                return _short("last picture", at - size + 1)
            length = read(at, 1)[0]
            at += 1 + length
            if not length:
                break
    return ""


# MPEG audio (mp3) and AAC in frames

class Frames(NamedTuple):
    """The frames of an MPEG audio file.

    begin: of the first frame. index_size: bytes of that frame where it holds an index and no sound, else 0. whole:
    frames of sound that are. samples: of each; rate: in Hz. stated: how many the index says there are, 0 without one;
    at: where the number stands in the file, 0 for nowhere. short: bytes that the last frame lacks; end: where
    it ends.
    """

    begin: int
    index_size: int
    whole: int
    samples: int
    rate: int
    stated: int
    at: int
    short: int
    end: int


_RATES = (44100, 48000, 32000)
_KBITS = {  # (is MPEG-1, layer) -> for each of 14 numbers
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
_RESYNC = 1 << 16  # bytes of something else between two frames


@functools.lru_cache(256)
def _frame(header: bytes) -> tuple[int, int, int] | None:
    """(length in bytes, samples, rate) of the MPEG audio frame with this header; None for no such frame."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = _RATES[rate] >> (0 if first else 1 if version == 2 else 2)
    per_second, padding = 1000 * _KBITS[first, layer][bits - 1], header[2] >> 1 & 1
    if layer == 1:
        return (12 * per_second // hertz + padding) * 4, 384, hertz
    samples = 1152 if first or layer == 2 else 576
    return samples // 8 * per_second // hertz + padding, samples, hertz


@functools.lru_cache(2)
def mpeg_frames(content: bytes) -> Frames | None:
    """Follow the frames of an mp3 file from the first to the last; None where there are none to follow.

    Kept, because the outline is looked at before the sound is read.
    """
    size = len(content)

    def read(at: int, count: int) -> bytes:
        return content[at : at + count]

    begin = _next_frame(read, behind_id3(read), size, None)
    if begin < 0:
        return None
    first = _frame(read(begin, 4))
    assert first
    end, tagged = _without_tags(read, size)
    at, count, short = begin, 0, 0
    while at < end:
        found = _frame(read(at, 4))
        if found is None or found[1:] != first[1:]:
            header = read(at, 10)
            length = id3_length(header)
            if header[0] == 0xFF and end - at < 4 and not tagged:
                short = 4 - (end - at)
                break
            after = at + length if length else _next_frame(read, at, min(end, at + _RESYNC), first[1:])
            if after < 0:
                break  # something else behind the last frame
            at = after
            continue
        if at + found[0] > end:
            short = 0 if tagged else at + found[0] - end
            break
        at, count = at + found[0], count + 1
    index, stated, where = _index(read(begin, first[0]))
    return Frames(begin, index, count - (index > 0), *first[1:], stated, begin + where if where else 0, short, at)


def _next_frame(read: Read, at: int, end: int, like: tuple[int, int] | None) -> int:
    """Where the next frame that another one follows begins, -1 for nowhere near."""
    near = read(at, min(_RESYNC, max(0, end - at)))
    place = near.find(b"\xff")
    while place >= 0:
        found = _frame(near[place : place + 4])
        if found and like in (None, found[1:]):
            after = at + place + found[0]
            follows = _frame(read(after, 4))
            if (follows and follows[1:] == found[1:]) or (not place and after == end):
                return at + place
        place = near.find(b"\xff", place + 1)
    return -1


def _without_tags(read: Read, size: int) -> tuple[int, bool]:
    """Where the sound ends and tags begin, and whether there are any: ID3v1, APE and Lyrics3."""
    end = size
    if read(end - 128, 3) == b"TAG":
        end -= 128
    if read(end - 9, 9) == b"LYRICS200" and read(end - 15, 6).isdigit():
        end -= 15 + int(read(end - 15, 6))
    footer = read(end - 32, 32)
    if footer[:8] == b"APETAGEX":
        end -= int.from_bytes(footer[12:16], "little") + (32 if footer[23] & 0x80 else 0)
    return max(0, end), end < size


def _index(frame: bytes) -> tuple[int, int, int]:
    """(the length of a first frame that holds an index, frames that it says the file has, where in it that number
    stands); 0 for none."""
    at = 4 + _side_information(frame)
    if frame[at : at + 4] in (b"Xing", b"Info"):
        if len(frame) < at + 12 or not frame[at + 7] & 1:
            return len(frame), 0, 0
        return len(frame), int.from_bytes(frame[at + 8 : at + 12], "big"), at + 8
    if frame[36:40] == b"VBRI":
        return len(frame), int.from_bytes(frame[50:54], "big"), 50
    return 0, 0, 0


def _side_information(header: bytes) -> int:
    """Bytes between the header of an mp3 frame and its sound, or its index."""
    mono = header[3] >> 6 == 3
    return (17 if mono else 32) if header[1] >> 3 & 3 == 3 else (9 if mono else 17)


def with_index(content: bytes, frames: Frames) -> bytes:
    """An mp3 with an index that counts all of its `frames`."""
    number = frames.whole.to_bytes(4, "big")
    if frames.at:
        return content[: frames.at] + number + content[frames.at + 4 :]
    sound = content[frames.begin + frames.index_size :]
    # A frame like the first, without checksum and padding, of a middle bit rate: it has room for the number.
    header = bytes([0xFF, sound[1] | 1, 0x90 | sound[2] & 0x0C, sound[3]])
    length = (_frame(header) or (0,))[0]
    index = header + bytes(_side_information(header)) + b"Xing\0\0\0\1" + number
    return index.ljust(length, b"\0") + sound


SLACK = 2  # frames: some encoders count the one that holds the index, or one of padding


def _mpeg_audio(read: Read, size: int) -> str:
    if zeros := _padded(read, size):  # before all of it is read
        return zeros
    frames = mpeg_frames(read(0, size))
    if frames is None:
        return ""
    if frames.short:
        return f"{_short('last frame', frames.short)}; the file is truncated"
    if frames.whole + SLACK < frames.stated:
        return f"holds {frames.whole} of {frames.stated} frames; the file is truncated"
    return _behind(read, frames.end, size)


def _adts(read: Read, size: int) -> str:
    """AAC in frames that state their lengths."""
    at, (end, tagged) = behind_id3(read), _without_tags(read, size)
    while at < end:
        header = read(at, 7)
        if not _is_adts(header) and len(header) == 7:
            return _behind(read, at, size)
        length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5 if len(header) == 7 else 7
        if at + length > end:
            return "" if tagged else f"{_short('last frame', at + length - end)}; the file is truncated"
        at += max(7, length)
    return ""


def is_mpeg_audio(start: bytes) -> bool:
    return _frame(start[:4]) is not None


def _is_adts(start: bytes) -> bool:
    return len(start) >= 7 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0


Kinds = tuple[tuple[Callable[[bytes], object], Callable[[Read, int], str]], ...]  # (by the first bytes, the check)
_TAGGED: Kinds = ((_is_adts, _adts), (is_mpeg_audio, _mpeg_audio))  # may have ID3 tags in front
_KINDS: Kinds = (
    (lambda start: start[4:8] in MP4_BOXES, _mp4),
    (lambda start: start[:4] == b"\x1aE\xdf\xa3", _matroska),
    (lambda start: start[:4] == b"OggS", _ogg),
    (lambda start: start[:4] == b"fLaC", _padded),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"WAVE", _wave),
    (lambda start: start[:4] == b"RF64", _wave64),
    (lambda start: start[:4] == b"RIFF" and start[8:11] == b"AVI", _avi),
    (lambda start: start[:4] == b"FORM" and start[8:11] == b"AIF", _aiff),
    (lambda start: start[:4] == b"riff", _sony),
    (lambda start: start[:4] == b"caff", _caf),
    (lambda start: start[:4] == b".snd" and len(start) >= 12, _au),
    (lambda start: start[:4] == b"FLV\1", _flash),
    (lambda start: start[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _asf),
    (lambda start: start[:4] == b"\0\0\1\xba", _mpegps),
    (lambda start: start[:4] == b"GIF8", _gif),
    (_transport, _mpegts),
    *_TAGGED,
)
