"""Completeness checks of containers made of consecutive chunks.

The formats are WAV, AVI, AIFF, Wave64, CAF, ASF, AU, RealMedia, IVF and MXF. Each check returns what is wrong with the
file, or "".
"""

from __future__ import annotations

import struct

from data_pipelines.media.ends import Read, behind, short, unknown

_BLOCK = 1 << 20


def wave(read: Read, size: int) -> str:
    """Check a WAV file: libsndfile silently shortens truncated files and skips samples that no header counts."""
    stated = int.from_bytes(read(4, 4), "little") + 8
    if size < stated and not unknown(stated - 8):
        return f"holds {size} of {stated} bytes; the file is truncated"
    at, kind = 12, b""
    while at + 8 <= size and (kind != b"data" or at < stated):  # data after the RIFF chunk do not belong to it
        header = read(at, 8)
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        if not kind.isascii() or not kind.strip(b" \0").isalnum():
            return f"has no chunk at byte {at}, where its header says so; samples would be lost"
        if kind == b"data" and unknown(length):
            return ""
        if at + 8 + length > size:
            return f"its {kind.decode()!r} chunk holds {size - at - 8} of {length} bytes; the file is truncated"
        at += 8 + length + length % 2
    return "" if kind else "ends before the samples"


def wave64(read: Read, size: int) -> str:
    """Check an RF64 file: a WAV file with 64-bit lengths."""
    stated = int.from_bytes(read(20, 8), "little") + 8
    return short("RF64 chunk", stated - size) if read(12, 4) == b"ds64" and size < stated < 1 << 62 else ""


def avi(read: Read, size: int) -> str:
    """Check an AVI file: one RIFF chunk, or several in files of gigabytes."""
    at = 0
    while at + 12 <= size and read(at, 4) == b"RIFF":
        length = int.from_bytes(read(at + 4, 4), "little")
        if not length or unknown(length):
            return _chunks(read, size, at + 12)
        if at + 8 + length > size:
            return short("RIFF chunk", at + 8 + length - size)
        if zeros := _chunks(read, at + 8 + length, at + 12):
            return zeros
        at += 8 + length + length % 2
    return behind(read, at, size)


def _chunks(read: Read, size: int, at: int) -> str:
    """Check the chunks of an AVI: they must fit into the file and continue to its end."""
    while at < size:
        header = read(at, 12)
        kind, length = header[:4], int.from_bytes(header[4:8], "little")
        if not kind.isalnum():
            return behind(read, at, size)
        if len(header) < 8:
            return short("last chunk", 8 - len(header))
        if kind == b"LIST" and (header[8:] in (b"movi", b"rec ") or unknown(length)):
            at += 12
            continue
        if at + 8 + length > size:
            return short(f"{kind.decode()!r} chunk", at + 8 + length - size)
        at += 8 + length + length % 2
    return ""


def aiff(read: Read, size: int) -> str:
    """Check an AIFF file."""
    stated = int.from_bytes(read(4, 4), "big") + 8
    return short("FORM chunk", stated - size) if size < stated and not unknown(stated - 8) else ""


def sony(read: Read, size: int) -> str:
    """Check a (Sony) Wave64 file."""
    stated = int.from_bytes(read(16, 8), "little")
    return short("RIFF chunk", stated - size) if size < stated < 1 << 62 else ""


def caf(read: Read, size: int) -> str:
    """Check a CAF file."""
    at = 8
    while at + 12 <= size:
        header = read(at, 12)
        length = int.from_bytes(header[4:], "big", signed=True)
        if length < 0:
            return ""  # to the end of the file
        at += 12 + length
    return short("last chunk", at - size) if at > size else ""


def au(read: Read, size: int) -> str:
    """Check an AU file."""
    begin, length = struct.unpack(">II", read(4, 8))
    return short("samples", begin + length - size) if not unknown(length) and begin + length > size else ""


_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_INDEX = bytes.fromhex("90080033b1e5cf1189f400a0c90349cb")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def asf(read: Read, size: int) -> str:
    """Check WMV and WMA: a header, the data, and indices; data of unknown length have packets of a known length."""
    at, packet = 0, 0
    while at + 24 <= size:
        header = read(at, 24)
        length = int.from_bytes(header[16:], "little")
        if not at:
            _, found, properties = read(0, min(length, 1 << 16)).partition(_ASF_PROPERTIES)
            packet = int.from_bytes(properties[76:80], "little") if found else 0
        if header[:16] == _ASF_DATA and length <= 50:
            index = read(max(0, size - _BLOCK), _BLOCK).rfind(_ASF_INDEX)
            end = max(0, size - _BLOCK) + index if index >= 0 else size
            rest = (end - at - 50) % packet if packet else 0
            if rest or end == size:
                return short("last packet", packet - rest) if rest else ""
            at = end
            continue
        if header[:16] == _ASF_DATA and packet and not read(min(size, at + length) - packet, packet).strip(b"\0"):
            return "ends in nothing but zeros; the copy stopped early"
        if header[3:4] not in (b"\x75", b"\x33", b"\xd6", b"\xfe") or length < 24:
            return behind(read, at, size)
        at += length
    return short("last object", at - size) if at > size else ""


_HEAD_TWICE = 18  # bytes of the head of the DATA chunk, which libav counts twice


def real(read: Read, size: int) -> str:
    """Check a RealMedia file: chunks that state their lengths, heads included."""
    at = 0
    while at < size:
        header = read(at, 8)
        kind, length = header[:4], int.from_bytes(header[4:], "big")
        if len(header) < 8 or kind not in (b".RMF", b"PROP", b"MDPR", b"CONT", b"DATA", b"INDX", b"RMMD"):
            return behind(read, at, size)
        if kind == b"DATA" and length <= 18:
            return ""  # unknown when the file was written
        at += max(8, length)
    return short("last chunk", at - size) if at > size + _HEAD_TWICE else ""


def ivf(read: Read, size: int) -> str:
    """Check an IVF file: frames with their lengths, behind a head that may state their number."""
    at, count, stated = int.from_bytes(read(6, 2), "little"), 0, int.from_bytes(read(24, 4), "little")
    while at < size and (count < stated or not stated):
        header = read(at, 12)
        at += 12 + int.from_bytes(header[:4], "little")
        if len(header) < 12 or at > size:
            return short("last frame", max(12 - len(header), at - size))
        count += 1
    return f"holds {count} of {stated} frames" if count < stated < 1 << 31 else ""


_MXF_KEY = bytes.fromhex("060e2b34")


def mxf(read: Read, size: int) -> str:
    """Check an MXF file: 16-byte keys, lengths and values; the first value may state where the last partition is."""
    at = 0
    while at < size:
        header = read(at, 25)
        if not header.startswith(_MXF_KEY[: len(header)]):
            return behind(read, at, size)
        more = header[16] - 0x80 if len(header) > 16 and header[16] > 0x80 else 0
        if len(header) < 17 + more or more > 8:
            return short("last element", 17 + more - len(header)) if more <= 8 else ""
        length = int.from_bytes(header[17 : 17 + more], "big") if more else header[16]
        if not at and (footer := int.from_bytes(read(17 + more + 24, 8), "big")) >= size:
            return f"ends before byte {footer}, where its last part begins"
        at += 17 + more + length
    return short("last element", at - size) if at > size else ""
