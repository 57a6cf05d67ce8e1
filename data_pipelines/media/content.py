"""Detection of files that are no picture, film or sound, by their first bytes whatever their name."""

from __future__ import annotations

import re
from pathlib import Path

from crab_jax.io.files import HEAD, stand_in

_BLOCK, _BLOCKS = 1 << 20, 64  # bytes of a block, and the number of blocks that are searched for zeros

_AGAIN = "copy or download it again"
_NO_MEDIA = "is no picture, film or sound but"
_PLAYLIST = (f"{_NO_MEDIA} a playlist, which names other files", "give the film or sound itself")
_TEXTS = [  # (pattern of the beginning, description, fix)
    (
        rb"#EXTM3U|#EXTINF|#EXT-X-|ffconcat version|\[playlist\]|<\?wpl|<asx|(<\?xml[^>]*>\s*)?<(MPD|playlist|smil)\b"
        rb"|v=0\s+o=|\[InternetShortcut\]|\[Reference\]|file '|file \S+\s|(https?|rtsp|rtmp)://\S+\s*$",
        *_PLAYLIST,
    )
]
_BINARIES = [  # (offset, bytes, description, fix)
    (0, b"PK\3\4", "a ZIP archive", "unpack it"),
    (0, b"PK\5\6", "a ZIP archive", "unpack it"),
    (0, b"\x1f\x8b", "compressed (gzip)", "unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (0, b"\xfd7zXZ\0", "compressed (xz)", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed (zstd)", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"%PDF-", "a PDF document", "export its picture"),
]
# Beginnings of media formats that are text, or begin like text.
_MEDIA_TEXT = (
    b"#!AMR",
    b"YUV4MPEG2",
    b"NIST_1A",
    b"P1",
    b"P2",
    b"P3",
    b"P4",
    b"P5",
    b"P6",
    b"P7",
    b"PF",
    b"Pf",
    b"/* XPM",
    b"#define",
    b"GIF8",
    b"fLaC",
    b"OggS",
    b"RIFF",
    b"FORM",
    b"FLV",
)


def head(path: str | Path) -> bytes:
    """Return the first HEAD bytes of a file."""
    with open(path, "rb") as file:
        return file.read(HEAD)


def not_supported(path: str | Path) -> tuple[str, str] | None:
    """Return (problem, fix) of a file that is no picture, film or sound; None if it may be one.

    Recognised are pointers of Git LFS and git-annex, web pages, playlists and other text, archives, and empty or zeroed
    files. Raises OSError for a file that cannot be read.
    """
    start = head(path)
    if not start:
        return "the file is empty; it is damaged or incomplete", _AGAIN
    if placeholder := stand_in(start):
        return placeholder
    if not start.strip(b"\0") and (problem := _zeros(path)):
        return f"{problem}; the copy stopped early", _AGAIN
    for at, magic, description, fix in _BINARIES:
        if start[at:].startswith(magic):
            return f"is {description}", fix
    if not is_text(start):
        return None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, problem, fix in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return problem, fix
    words = " ".join(text[:60].decode("utf-8", "replace").split())
    return f"{_NO_MEDIA} text ({words[:40]!r}); the file is damaged or another one", _AGAIN


def is_text(start: bytes) -> bool:
    """Return whether the first bytes of a file are text, and not the beginning of a media format."""
    if start.startswith(_MEDIA_TEXT) or re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]", start):
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start > len(start) - 4  # the last character may be cut
    return True


def _zeros(path: str | Path) -> str:
    """Return a description of a file that holds only zeros, as far as it is examined; "" for any other."""
    with open(path, "rb") as file:
        for _ in range(_BLOCKS):
            if not (block := file.read(_BLOCK)):
                return "holds nothing but zeros"
            if block.strip(b"\0"):
                return ""
    return f"begins with {_BLOCKS} MB of zeros"


def id3_length(start: bytes) -> int:
    """Return the length in bytes of the ID3v2 tag at the beginning of `start`, 0 without one."""
    if start[:3] != b"ID3" or len(start) < 10 or max(start[6:10]) > 127:
        return 0
    footer = 10 if start[5] & 0x10 else 0
    return 10 + footer + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
