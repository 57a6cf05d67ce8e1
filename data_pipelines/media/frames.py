"""Sound in frames without a container: MPEG audio (mp3), AAC and AC-3, followed from the first frame to the last."""

from __future__ import annotations

import functools
from typing import NamedTuple

from data_pipelines.media.content import id3_length
from data_pipelines.media.ends import Read, behind, behind_id3, padded, short, without_tags


class Frames(NamedTuple):
    """The frames of an MPEG audio file.

    begin: position of the first frame. index_size: bytes of that frame if it holds an index and no sound, else 0.
    whole: number of complete frames of sound. samples: per frame; rate: in Hz. stated: number of frames according to
    the index, 0 without one; at: position of that number in the file, 0 if absent. short: bytes missing from the last
    frame; end: its end.
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
_KBITS = {  # (is MPEG-1, layer) -> bit rate for each of 14 codes
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RESYNC = 1 << 16  # most bytes of other data between two frames


@functools.lru_cache(256)
def _frame(header: bytes) -> tuple[int, int, int] | None:
    """Return (length in bytes, samples, rate) of the MPEG audio frame with this header; None for other headers."""
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
    """Follow the frames of an mp3 file from the first to the last; None if it has none.

    The result is cached, because the file is checked before the sound is read.
    """
    size = len(content)

    def read(at: int, count: int) -> bytes:
        return content[at : at + count]

    begin = _next_frame(read, behind_id3(read), size, None)
    if begin < 0:
        return None
    first = _frame(read(begin, 4))
    assert first
    end, tagged = without_tags(read, size)
    at, count, lacks = begin, 0, 0
    while at < end:
        found = _frame(read(at, 4))
        if found is None or found[1:] != first[1:]:
            header = read(at, 10)
            length = id3_length(header)
            if header[0] == 0xFF and end - at < 4 and not tagged:
                lacks = 4 - (end - at)
                break
            after = at + length if length else _next_frame(read, at, min(end, at + _RESYNC), first[1:])
            if after < 0:
                break  # something else behind the last frame
            at = after
            continue
        if at + found[0] > end:
            lacks = 0 if tagged else at + found[0] - end
            break
        at, count = at + found[0], count + 1
    index, stated, where = _index(read(begin, first[0]))
    return Frames(begin, index, count - (index > 0), *first[1:], stated, begin + where if where else 0, lacks, at)


def _next_frame(read: Read, at: int, end: int, like: tuple[int, int] | None) -> int:
    """Return the position of the next frame that another one follows, -1 if there is none nearby."""
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


def _index(frame: bytes) -> tuple[int, int, int]:
    """Return (length of a first frame with an index, number of frames it states, position of that number), or zeros."""
    at = 4 + _side_information(frame)
    if frame[at : at + 4] in (b"Xing", b"Info"):
        if len(frame) < at + 12 or not frame[at + 7] & 1:
            return len(frame), 0, 0
        return len(frame), int.from_bytes(frame[at + 8 : at + 12], "big"), at + 8
    if frame[36:40] == b"VBRI":
        return len(frame), int.from_bytes(frame[50:54], "big"), 50
    return 0, 0, 0


def _side_information(header: bytes) -> int:
    """Return the number of bytes between the header of an mp3 frame and its sound or index."""
    mono = header[3] >> 6 == 3
    return (17 if mono else 32) if header[1] >> 3 & 3 == 3 else (9 if mono else 17)


def with_index(content: bytes, frames: Frames) -> bytes:
    """Return an mp3 with an index that counts all of its `frames`."""
    number = frames.whole.to_bytes(4, "big")
    if frames.at:
        return content[: frames.at] + number + content[frames.at + 4 :]
    sound = content[frames.begin + frames.index_size :]
    # A frame like the first, without checksum and padding, at a medium bit rate, which has room for the number.
    header = bytes([0xFF, sound[1] | 1, 0x90 | sound[2] & 0x0C, sound[3]])
    length = (_frame(header) or (0,))[0]
    index = header + bytes(_side_information(header)) + b"Xing\0\0\0\1" + number
    return index.ljust(length, b"\0") + sound


SLACK = 2  # frames; some encoders count the frame of the index, or one of padding


def mpeg_audio(read: Read, size: int) -> str:
    """Check an mp3 file; return what is wrong, or ""."""
    if zeros := padded(read, size):  # before reading all of it
        return zeros
    frames = mpeg_frames(read(0, size))
    if frames is None:
        return ""
    if frames.short:
        return f"{short('last frame', frames.short)}; the file is truncated"
    if frames.whole + SLACK < frames.stated:
        return f"holds {frames.whole} of {frames.stated} frames; the file is truncated"
    return behind(read, frames.end, size)


def adts(read: Read, size: int) -> str:
    """Check AAC in frames that state their lengths; return what is wrong, or ""."""
    at, (end, tagged) = behind_id3(read), without_tags(read, size)
    while at < end:
        header = read(at, 7)
        if not is_adts(header) and len(header) == 7:
            return behind(read, at, size)
        length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5 if len(header) == 7 else 7
        if at + length > end:
            return "" if tagged else f"{short('last frame', at + length - end)}; the file is truncated"
        at += max(7, length)
    return ""


def is_mpeg_audio(start: bytes) -> bool:
    """Return whether a file begins with an MPEG audio frame."""
    return _frame(start[:4]) is not None


def is_adts(start: bytes) -> bool:
    """Return whether a file begins with an AAC frame (ADTS)."""
    return len(start) >= 7 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0


_AC3_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


def _ac3_length(header: bytes) -> int:
    """Return the length in bytes of the AC-3 or Enhanced AC-3 frame with this header (6 bytes), 0 for other headers."""
    if len(header) < 6 or header[:2] != b"\x0b\x77":
        return 0
    if 10 < header[5] >> 3 <= 16:  # enhanced
        return 2 * (((header[2] & 7) << 8 | header[3]) + 1)
    rate, code = header[4] >> 6, header[4] & 0x3F
    if header[5] >> 3 > 10 or rate == 3 or code >= 2 * len(_AC3_KBITS):
        return 0
    words = _AC3_KBITS[code // 2] * 96000 // (48000, 44100, 32000)[rate]
    return 2 * (words + (code & 1 if rate == 1 else 0))


def is_ac3(start: bytes) -> bool:
    """Return whether a file begins with an AC-3 frame."""
    return _ac3_length(start) > 0


def ac3(read: Read, size: int) -> str:
    """Check AC-3 and Enhanced AC-3 in frames that state their lengths; return what is wrong, or ""."""
    at = 0
    while at < size:
        header = read(at, 6)
        length = _ac3_length(header) if len(header) == 6 else 6 if header == b"\x0b\x77"[: len(header)] else 0
        if not length:
            return behind(read, at, size)
        at += length
    return f"{short('last frame', at - size)}; the file is truncated" if at > size else ""
