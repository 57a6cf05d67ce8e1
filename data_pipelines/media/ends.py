"""How a file that ends early is told: reading it in places, what may stand behind its last part, and tags around it."""

from __future__ import annotations

from collections.abc import Callable

from data_pipelines.media.content import id3_length

PADDING = 8192  # bytes of zeros that may stand behind a file
Read = Callable[[int, int], bytes]  # (at, count): the bytes of the file from `at`, fewer at its end


def behind_id3(read: Read) -> int:
    """Where the ID3 tags end that a file may begin with."""
    at = 0
    while length := id3_length(read(at, 10)):
        at += length
    return at


def without_tags(read: Read, size: int) -> tuple[int, bool]:
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


def behind(read: Read, at: int, size: int) -> str:
    """What stands behind the last part of a file is no part of it, unless it is zeros to the end and many: room that
    was made for a copy which stopped early."""
    many = size - at >= max(PADDING, size // 20)
    zeros = many and not read(at, 4096).strip(b"\0") and not read(size - 4096, 4096).strip(b"\0")
    return f"holds nothing but zeros from byte {at} on; the copy stopped early" if zeros else ""


def padded(read: Read, size: int) -> str:
    """`behind` of a kind that says nothing of its length, and whose data never hold so many zeros."""
    return behind(read, max(0, size - max(PADDING, size // 20)), size)


def short(what: str, missing: int) -> str:
    return f"ends inside of its {what}, {missing} bytes short"


def unknown(length: int) -> bool:
    """Whether a length of 32 bits says that it was not known: written to a pipe."""
    return length >= 0xFFFFFFF0 or 0x7FFFF000 <= length <= 0x7FFFFFFF
