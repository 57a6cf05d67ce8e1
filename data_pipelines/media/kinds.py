"""Detection of picture formats by the first bytes of a file, including formats that are not read."""

from __future__ import annotations

import re
from typing import NamedTuple

from PIL import features

HEAD = 1024  # number of first bytes that are examined
JPEG, PNG, WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"WEBP"


class Kind(NamedTuple):
    """A kind of file.

    name: for messages. fix: what to do where a picture is wanted. picture: Pillow's names of the format, empty for
    kinds that are not read as pictures.
    """

    name: str
    fix: str = ""
    picture: tuple[str, ...] = ()


_EXPORT, _NOT_A_PICTURE = "export it as JPEG or PNG", "give a picture: a JPEG or PNG file"
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (JPEG + b"\xf7", Kind("JPEG-LS", _EXPORT)),
    (JPEG, Kind("JPEG", picture=("JPEG", "MPO"))),
    (PNG, Kind("PNG", picture=("PNG",))),
    (b"GIF87a", Kind("GIF", picture=("GIF",))),
    (b"GIF89a", Kind("GIF", picture=("GIF",))),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Kind("JPEG 2000", picture=("JPEG2000",))),
    (b"\xff\x4f\xff\x51", Kind("JPEG 2000", picture=("JPEG2000",))),
    (b"FUJIFILMCCD-RAW", Kind("a camera's raw file (RAF)", _EXPORT)),
    (b"IIRO", Kind("a camera's raw file (ORF)", _EXPORT)),
    (b"IIRS", Kind("a camera's raw file (ORF)", _EXPORT)),
    (b"IIU\0", Kind("a camera's raw file (RW2)", _EXPORT)),
    (b"8BPS", Kind("a Photoshop file (PSD)", _EXPORT)),
    (b"\xff\x0a", Kind("JPEG XL", _EXPORT)),
    (b"\0\0\0\x0cJXL \r\n\x87\n", Kind("JPEG XL", _EXPORT)),
    (b"%!PS", Kind("PostScript", _EXPORT)),
    (b"\xc5\xd0\xd3\xc6", Kind("PostScript (EPS)", _EXPORT)),
    (b"\x76\x2f\x31\x01", Kind("OpenEXR", _EXPORT)),
    (b"#?RADIANCE", Kind("Radiance HDR", _EXPORT)),
    (b"SIMPLE  =", Kind("FITS", _EXPORT)),
    (b"gimp xcf", Kind("a GIMP file (XCF)", _EXPORT)),
    (b"\0\0\1\0", Kind("a Windows icon (ICO)", _EXPORT)),
    (b"icns", Kind("a macOS icon (ICNS)", _EXPORT)),
    (b"DDS ", Kind("DDS", _EXPORT)),
    (b"qoif", Kind("QOI", _EXPORT)),
    (b"BPG\xfb", Kind("BPG", _EXPORT)),
    (b"P7\n", Kind("PAM", _EXPORT)),
    (b"\x0a\x05\x01", Kind("PCX", _EXPORT)),
    (b"\x01\xda", Kind("SGI", _EXPORT)),
    (b"\0\5\x16\7", Kind("the part of a macOS file beside its content (._NAME)", "give the file without ._")),
    (b"\x93NUMPY", Kind("a NumPy array", _EXPORT)),
    (b"\x89HDF", Kind("HDF5", _EXPORT)),
    (b"\x1aE\xdf\xa3", Kind("a film (Matroska or WebM)", _NOT_A_PICTURE)),
    (b"OggS", Kind("Ogg", _NOT_A_PICTURE)),
    (b"ID3", Kind("MP3", _NOT_A_PICTURE)),
    (b"fLaC", Kind("FLAC", _NOT_A_PICTURE)),
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def kind_of(head: bytes) -> Kind | None:
    """Return the kind of the file that begins with `head` (HEAD bytes, or all of a shorter one); None if unknown.

    content.py recognises files that are no picture, film or sound at all.
    """
    if head[4:8] == b"ftyp":
        return _iso(head)
    if head.startswith(b"RIFF"):
        if head[8:12] == WEBP:
            return Kind("WebP", picture=("WEBP",))
        return Kind({b"WAVE": "WAV", b"AVI ": "a film (AVI)"}.get(head[8:12], "RIFF"), _NOT_A_PICTURE)
    if head.startswith(_TIFF):
        raw = head[8:10] == b"CR"
        return Kind("a camera's raw file (CR2)", _EXPORT) if raw else Kind("TIFF", picture=("TIFF",))
    if (
        head[:2] == b"BM"
        and len(head) > 18
        and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124)
    ):
        return Kind("BMP", picture=("BMP",))
    if re.match(rb"P[1-6yfF]\s", head):
        return Kind("a float map (PFM)", _EXPORT) if head[1:2] in b"fF" else Kind("PNM", picture=("PPM",))
    if head[128:132] == b"DICM":
        return Kind("DICOM", _EXPORT)
    if re.match(rb"(\xef\xbb\xbf)?\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*(<!doctype svg.*?>\s*)?<svg", head, re.I | re.S):
        return Kind("SVG", _EXPORT)
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _iso(head: bytes) -> Kind:
    """Return the kind of an ISO media file: films and some pictures, distinguished by their brands."""
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4))}
    if brands & {b"avif", b"avis"}:
        can = features.check("avif")
        return Kind("AVIF", "" if can else f"{_EXPORT}, or install a Pillow that reads AVIF", ("AVIF",) if can else ())
    if brands & _HEIC:
        return Kind("HEIC", "export it as JPEG (on a phone: camera format 'most compatible')")
    if b"crx " in brands:
        return Kind("a camera's raw file (CR3)", _EXPORT)
    return Kind("a film (MP4)", _NOT_A_PICTURE)
