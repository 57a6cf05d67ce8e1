"""Shared parts of the completeness checks: reading at positions, trailing data, tags, and messages."""

from __future__ import annotations

from collections.abc import Callable

from data_pipelines.media.content import id3_length

PADDING = 8192  # bytes of zeros that may follow a file
Read = Callable[[int, int], bytes]  # (at, count): the bytes of the file from `at`, fewer at its end


def behind_id3(read: Read) -> int:
    """Return the position after the ID3 tags at the beginning of a file."""
    at = 0
    while length := id3_length(read(at, 10)):
        at += length
    return at


def without_tags(read: Read, size: int) -> tuple[int, bool]:
    """Return (end of the sound, whether tags follow it): ID3v1, APE and Lyrics3."""
    end = size
    if read(end - 128, 3) == b"TAG":
        end -= 128
    if read(end - 9, 9) == b"LYRICS200" and read(end - 15, 6).isdigit():
        end -= 15 + int(read(end - 15, 6))
    footer = read(end - 32, 32)
    if footer[:8] == b"APETAGEX":
        end -= int.from_bytes(footer[12:16], "little") + (32 if footer[23] & 0x80 else 0)
    return max(0, end), end < size


def behind(read: Read, at: int, size: int) -> str:
    """Return a problem if only zeros, and many, follow the last part of a file: space for a copy that stopped early.

    Other trailing data are not part of the file and are ignored.
    """
    many = size - at >= max(PADDING, size // 20)
    zeros = many and not read(at, 4096).strip(b"\0") and not read(size - 4096, 4096).strip(b"\0")
    return f"holds nothing but zeros from byte {at} on; the copy stopped early" if zeros else ""


def padded(read: Read, size: int) -> str:
    """Apply `behind` to a format that does not state its length and whose data never contain so many zeros."""
    return behind(read, max(0, size - max(PADDING, size // 20)), size)


def short(what: str, missing: int) -> str:
    """Return the message for a file that ends inside a part, so many bytes too early."""
    return f"ends inside of its {what}, {missing} bytes short"


def unknown(length: int) -> bool:
    """Return whether a 32-bit length means "unknown", as in files written to a pipe."""
    return length >= 0xFFFFFFF0 or 0x7FFFF000 <= length <= 0x7FFFFFFF
