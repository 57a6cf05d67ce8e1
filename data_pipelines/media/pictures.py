"""Opening of pictures: upright, complete, and in 8-bit RGB.

`open_picture` is the only function that opens a user's picture. It goes by the content of a file, never by its name;
metadata beside the pixels (EXIF, ICC, text, trailing data) may be anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from crab_jax.io.errors import InputError
from data_pipelines.media import kinds
from data_pipelines.media.container import require
from data_pipelines.media.content import not_supported
from data_pipelines.media.limits import VARIABLE, check, limits

warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns about metadata, and about faults that are errors here
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # modes with one channel of more than 8 bits
LARGE = 50_000_000  # pixels; larger pictures are reduced while decoding, which saves gigabytes
MOST_BYTES = 1 << 30  # of a file; its picture takes as much again
_PILLOWS = Image.MAX_IMAGE_PIXELS or 0
AGAIN = "copy or download the file again"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> operation that makes the picture upright
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    MemoryError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # errors that Pillow raises for bad files


class Picture(NamedTuple):
    """A decoded picture.

    image: upright, in the mode of the file. size: (width, height) of the whole picture, which is larger than `image`
    above LARGE pixels. turned: whether EXIF rotates or flips it. kind: Pillow's name of the format. bits: per channel
    in the file.
    """

    image: Image.Image
    size: tuple[int, int]
    turned: bool
    kind: str
    bits: int


@contextlib.contextmanager
def _refused(where: str, field: str) -> Iterator[None]:
    """Convert a decoder's exceptions to InputError."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        pixels, limit = (int(number) / 1e6 for number in re.findall(r"\d+", str(error))[:2])
        raise InputError(
            where,
            field,
            f"has {pixels:,.0f} megapixels, and at most {limit:,.0f} are read",
            f"make the picture smaller, or raise the limit for one command: {VARIABLE}=megapixels=NUMBER",
        ) from None
    except _UNREADABLE as error:
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        problem = "ends before the picture does" if cut else f"cannot be decoded ({error.__class__.__name__})"
        raise InputError(where, field, f"{problem}; the file is damaged or not a picture", AGAIN) from None


def _file(path: str | Path, field: str) -> BinaryIO:
    """Open a picture file, of limited size. Raises InputError."""
    if (size := os.path.getsize(require(path, field))) > MOST_BYTES:
        raise InputError(
            str(path),
            field,
            f"has {size / 2**30:.1f} GB, and at most {MOST_BYTES >> 30} is read",
            "copy or download the file again, or export it smaller",
        )
    return open(path, "rb")


def kind_of(path: str | Path, field: str, content: bytes | None = None) -> kinds.Kind:
    """Return the kind of a picture file. Raises InputError naming the kind if it is not read as a picture."""
    if content is None:
        with _refused(str(path), field), _file(path, field) as file:
            head = file.read(kinds.HEAD)
    else:
        head = content[: kinds.HEAD]
    kind = kinds.kind_of(head)
    if kind is None:
        other = not_supported(path) if os.path.isfile(path) else None
        problem, fix = other or ("is of no known kind; the file is damaged or not a picture", AGAIN)
        raise InputError(str(path), field, problem, fix)
    if not kind.picture:
        raise InputError(str(path), field, f"is {kind.name}, which is not read as a picture", kind.fix)
    return kind


def _with_metadata_or_without(
    kind: kinds.Kind, source: str | bytes, use: Callable[[ImageFile.ImageFile], Image.Image]
) -> Image.Image:
    """Open a picture from its path or bytes and apply `use`; retry without its metadata if that fails."""
    # Pillow refuses pictures of twice this size before decoding; lower limits are checked by `_check_header`.
    Image.MAX_IMAGE_PIXELS = max(_PILLOWS, round(limits().megapixels * 1e6) // 2)

    def tried(source: str | io.BytesIO) -> Image.Image:
        picture = Image.open(source, formats=kind.picture)
        try:
            used = use(picture)
        except BaseException:
            picture.close()
            raise
        if used is not picture:
            picture.close()
        return used

    try:
        return tried(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError:
        raise
    except _UNREADABLE:
        strip = {"PNG": _bare_png, "JPEG": _bare_jpeg}.get(kind.picture[0])
        if strip is None:
            raise
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        bare = strip(content)
        if bare == content:
            raise
        return tried(io.BytesIO(bare))


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a picture; 1 if it has none that can be read."""
    # Pillow rotates a TIFF itself. Searching a PNG whose tag is not at its beginning would decode all of it.
    if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
        return 1
    try:
        tag = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata may be anything
        return 1
    return tag if tag in _TURNS else 1


def _tags(picture: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF picture by number; none for a picture of another format."""
    return picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}


def _check_header(picture: Image.Image, where: str, field: str) -> None:
    """Raise InputError for pictures that are too large, or that Pillow does not read as a viewer shows them."""
    check(where, field, megapixels=picture.width * picture.height / 1e6)
    if picture.format == "TIFF":
        tags = _tags(picture)
        if 50706 in tags or tags.get(254, 0) & 1:  # DNGVersion; the first page is a thumbnail
            raise InputError(
                where, field, "is a camera's raw file, or its first page is a preview only", "export it as JPEG or PNG"
            )


@contextlib.contextmanager
def open_picture(path: str | Path, field: str, content: bytes | None = None, whole: bool = False) -> Iterator[Picture]:
    """Yield the decoded picture of a file, or of its bytes if given; whole: at full size, however large.

    Raises InputError for a missing, damaged, truncated, too large or unsupported file, also for decoder errors while
    the picture is in use.
    """
    where = str(path)
    with _refused(where, field):
        if content is None:
            with _file(path, field) as file:
                content = file.read()
        kind = kind_of(path, field, content)
        if kind.name == "PNG" and not _pixels_are_whole(content):
            problem = "the checksum of its pixels is that of others; the file is damaged"
            raise InputError(where, field, problem, AGAIN)
        stored: dict[str, Any] = {}

        def decode(picture: ImageFile.ImageFile) -> Image.Image:
            _check_header(picture, where, field)
            stored.update(size=picture.size, raw=str(picture.tile[0][3]) if picture.tile else "")
            return _decoded(picture, whole)

        with contextlib.closing(_with_metadata_or_without(kind, content, decode)) as picture:
            if kind.name == "JPEG" and _ends_early(picture, content):
                problem = "its data end before the picture does and the rest is grey; the file is damaged"
                raise InputError(where, field, problem, AGAIN)
            turn, size = _orientation(picture), stored["size"]
            bits = re.search(r"[LI];(\d+)", stored["raw"])
            upright = picture if turn == 1 else picture.transpose(_TURNS[turn])
            yield Picture(
                upright,
                size[::-1] if turn > 4 else size,
                turn > 1,
                picture.format or kind.picture[0],
                int(bits[1]) if bits else 16 if picture.mode in DEEP else 8,
            )


def _decoded(picture: Image.Image, whole: bool) -> Image.Image:
    """Return the decoded picture; above LARGE pixels at a half, a quarter, ... of its size unless `whole`."""
    size, factor = picture.size, 1
    while size[0] * size[1] > LARGE * factor**2 and not whole:
        factor *= 2
    small = max(1, size[0] // factor), max(1, size[1] // factor)
    if factor > 1:
        picture.draft(picture.mode, small)  # if the format supports it
    picture.load()
    if picture.mode == "P" and picture.palette is None:
        raise ValueError("no palette")
    made = picture
    if picture.format == "TIFF" and picture.mode in DEEP and _tags(picture).get(262) == 0:
        made = Image.fromarray(0xFFFF - np.asarray(picture))  # 0 is white, which Pillow does not convert for 16 bits
    if picture.format == "TIFF" and picture.mode == "P":
        colours = np.array(_tags(picture).get(320, ()))
        if (
            colours.max(initial=0) < 256
        ):  # some programs write 8-bit values into the 16-bit palette, which Pillow shows as black
            made.putpalette(colours.reshape(3, -1).T.astype(np.uint8).tobytes())
    if factor > 1 and made.size == size:
        made = made.resize(small, Image.Resampling.NEAREST)
    made.format, made.info = picture.format, picture.info
    return made


def _header(path: str | Path, field: str) -> tuple[tuple[int, int], int]:
    """Return ((width, height) as a viewer shows it, EXIF orientation) of a picture file, without decoding it."""
    kind = kind_of(path, field)
    with _refused(str(path), field):

        def look(picture: Image.Image) -> Image.Image:
            _check_header(picture, str(path), field)
            return picture

        with contextlib.closing(_with_metadata_or_without(kind, str(path), look)) as picture:
            turn = _orientation(picture)
            return picture.size[::-1] if turn > 4 else picture.size, turn


def image_size(path: str | Path, field: str = "image") -> tuple[int, int]:
    """Return the (width, height) of a picture file as a viewer shows it, from its header."""
    return _header(path, field)[0]


def is_turned(path: str | Path, field: str = "image") -> bool:
    """Return whether EXIF rotates or flips a picture file."""
    return _header(path, field)[1] > 1


def read_image(path: str | Path, size: int, field: str = "image") -> np.ndarray:
    """Return uint8[size, size, 3]: an RGB picture, resized bicubically, ignoring aspect ratio and transparency.

    It is upright: EXIF rotation is applied, as viewers do; the reference reads pictures as they are stored. Raises
    InputError.
    """
    with open_picture(path, field) as picture:
        return np.array(rgb(picture, str(path), field).resize((size, size), Image.Resampling.BICUBIC))


def read_picture(path: str | Path, field: str = "image") -> np.ndarray:
    """Return uint8[H, W, 3]: the picture that `read_image` resizes, at its own size (of `image_size`), upright.

    A picture of more than LARGE pixels is returned at a half, a quarter, ... of its size. Raises InputError.
    """
    with open_picture(path, field) as picture:
        return np.array(rgb(picture, str(path), field))


def rgb(picture: Picture, where: str, field: str) -> Image.Image:
    """Return a picture of the file `where` in 8-bit RGB; greys of more bits are scaled (Pillow would clip them at 255).

    Raises InputError for values of unknown scale.
    """
    image = picture.image
    if image.mode == "F" or (image.mode == "I" and picture.kind not in ("PNG", "PPM")):
        holds = "decimal numbers" if image.mode == "F" else "numbers of 32 bits or with a sign"
        problem = f"is a {picture.kind} of {holds}, and nothing says which of them is white"
        raise InputError(where, field, problem, "export it with 8 or 16 bits a channel")
    if image.mode in DEEP:
        grey = np.asarray(image) >> (picture.bits - 8)
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)  # premultiplied alpha
    image = image.convert(straight) if straight else image
    return image if image.mode == "RGB" else image.convert("RGB")


def outline(path: str | Path, field: str = "image") -> str:
    """Return what is wrong with a picture file as far as its kind, header and end show; "" if nothing is.

    Only pictures that seem truncated are decoded, and everything that `open_picture` reads is accepted.
    """
    try:
        kind = kind_of(path, field)
        image_size(path, field)
        with _refused(str(path), field), open(path, "rb") as file:
            if (kind.name == "JPEG" and not _has_end(file)) or (kind.name == "PNG" and not _holds_data(file)):
                read_picture(path, field)
    except InputError as error:
        return error.problem
    return ""


# Chunks, segments and metadata of the formats


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, whole chunk) of a PNG, up to its end."""
    at = len(kinds.PNG)
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], content[at:end]
        if content[at + 4 : at + 8] == b"IEND":
            return
        at = end


def _pixels_are_whole(content: bytes) -> bool:
    """Return whether all complete pixel chunks of a PNG have their checksums, which Pillow does not check.

    A chunk that is cut off with the file has none.
    """
    return all(
        len(chunk) - 12 < int.from_bytes(chunk[:4], "big")
        or kind != b"IDAT"
        or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        for kind, chunk in _png_chunks(content)
    )


def _bare_png(content: bytes) -> bytes:
    """Return a PNG without its metadata."""
    needed = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    return kinds.PNG + b"".join(chunk for kind, chunk in _png_chunks(content) if kind in needed)


def _holds_data(file: BinaryIO) -> bool:
    """Return whether the pixel chunks of a PNG lie within the file; the last checksums may be missing."""
    at, size = len(kinds.PNG), file.seek(0, os.SEEK_END)
    while at + 8 <= size:
        file.seek(at)
        header = file.read(8)
        at += 12 + int.from_bytes(header[:4], "big")
        if header[4:] == b"IDAT" and at > size + 24:
            return False
        if header[4:] == b"IEND":
            break
    return True


class _Segment(NamedTuple):
    """A part of a JPEG.

    marker: its kind. start: position of the marker. body, header: start and end of its body, which begins with a
    length. end: end of the coded data after it.
    """

    marker: int
    start: int
    body: int
    header: int
    end: int


# In coded data, FF 00 stands for FF, and D0 to D7 are restart markers.
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_SOS, _EOI, _FRAMES = 0xDA, 0xD9, (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_PROGRESSIVE = (0xC2, 0xCA)
_ARITHMETIC = range(0xC9, 0xD0)


def _jpeg_segments(content: bytes, coded: bool = True) -> Iterator[_Segment]:
    """Yield the segments of the first picture of a JPEG, up to its end or to a fault.

    coded: False stops before the coded data of the first scan, which take long to search.
    """
    at = 2
    while match := _NEXT_MARKER.match(content, at):
        start, body, marker = at, match.end(), content[match.end() - 1]
        if marker == _EOI:
            return
        at = header = body + int.from_bytes(content[body : body + 2], "big")
        if marker == _SOS and coded:
            behind = _NEXT_MARKER.search(content, header)
            at = behind.start() if behind else len(content)
        yield _Segment(marker, start, body, header, at)
        if marker == _SOS and not coded:
            return


def _bare_jpeg(content: bytes) -> bytes:
    """Return a JPEG without its metadata, except the segments that define its colours."""
    kept, segments = content[:2], list(_jpeg_segments(content))
    for marker, start, _, _, end in segments:
        if marker not in (0xFE, *range(0xE1, 0xF0)) or (marker == 0xEE and b"Adobe" in content[start:end]):
            kept += content[start:end]
    return kept + content[segments[-1].end :] if segments else content


def _has_end(file: BinaryIO) -> bool:
    """Return whether a JPEG has an end marker anywhere; without it, libjpeg waits for more data."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4096))
    if b"\xff\xd9" in file.read():
        return True
    file.seek(0)
    return b"\xff\xd9" in file.read()


def _ends_early(picture: Image.Image, content: bytes) -> bool:
    """Return whether a decoded JPEG lacks data, which libjpeg silently fills with grey.

    The check costs little when one scan holds everything and the last pixel is not that grey. Otherwise the picture is
    decoded again with bytes appended to its data, which changes it only where data are missing.
    """
    heads = {segment.marker: segment for segment in _jpeg_segments(content, coded=False)}
    frame = next((heads[marker] for marker in _FRAMES if marker in heads), None)
    if frame is None or _SOS not in heads:
        return False
    corner = picture.getpixel((picture.width - 1, picture.height - 1))
    grey = all(level in (127, 128) for level in (corner if isinstance(corner, tuple) else (corner,)))
    in_one_scan = frame.marker not in _PROGRESSIVE and content[frame.body + 7] == content[heads[_SOS].body + 2]
    if in_one_scan and not grey:
        return False
    scans = [segment for segment in _jpeg_segments(content) if segment.marker == _SOS]
    if frame.marker in _PROGRESSIVE and not _refined(content, frame, scans):
        return True
    if frame.marker in _ARITHMETIC:
        return False  # encoders omit zeros at the end, so appended bytes change complete pictures too
    filled = content[: scans[-1].end] + b"\x5a\xa3\x1c\x69" * 512 + b"\xff\xd9"
    with Image.open(io.BytesIO(filled), formats=("JPEG",)) as other:
        other.draft(picture.mode, picture.size)
        return other.tobytes() != picture.tobytes()


def _refined(content: bytes, frame: _Segment, scans: Sequence[_Segment]) -> bool:
    """Return whether the scans of a progressive JPEG give every coefficient of every component to its last bit."""
    finest = {content[at]: [99] * 64 for at in range(frame.body + 8, frame.header, 3)}
    for scan in scans:
        first, last, bits = content[scan.header - 3 : scan.header]
        for at in range(scan.body + 3, scan.header - 3, 2):
            for coefficient in range(first, min(last, 63) + 1):
                finest[content[at]][coefficient] = bits & 15
    return not any(any(levels) for levels in finest.values())
