"""Pictures: opened upright, in RGB of 8 bits."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from crab_jax.errors import InputError
from data_pipelines.media.container import require

DEEP = ("I", "I;16", "I;16L", "I;16B")  # modes of one channel of more than 8 bits


@contextlib.contextmanager
def open_picture(path: str | Path, field: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """An open picture, upright, from its bytes where they are at hand; errors of the decoder become InputErrors."""
    path = str(path) if content is not None else require(path, field)
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as picture:
            # Looking for the tag in a PNG that has none in front would decode all of it.
            if picture.format != "PNG" or "exif" in picture.info:
                ImageOps.exif_transpose(picture, in_place=True)
            yield picture
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        problem = f"cannot be decoded ({error.__class__.__name__}); the file is damaged or not a picture"
        raise InputError(path, field, problem, "copy or download the file again") from None


def image_size(path: str | Path, field: str = "image") -> tuple[int, int]:
    """(width, height) of a picture file as a viewer shows it."""
    with open_picture(path, field) as picture:
        return picture.size


def read_image(path: str | Path, size: int, field: str = "image") -> np.ndarray:
    """uint8[size, size, 3]: an RGB picture, bicubic, aspect ratio ignored, what is transparent by its hidden colour.

    It is upright: a picture that was taken sideways and says so (EXIF) is turned, as viewers do; the reference reads it
    as it is stored. Raises InputError.
    """
    with open_picture(path, field) as picture:
        return _square(_rgb(picture), size)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 3]: an RGB picture, resized as CLIPImageProcessor does it."""
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def alpha(path: str | Path, field: str = "mask") -> np.ndarray | None:
    """uint8[H,W]: how opaque a picture is, None for one that does not say."""
    with open_picture(path, field) as picture:
        return np.array(picture.convert("RGBA").getchannel("A")) if picture.has_transparency_data else None


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits. Pillow cuts greys of 16 bits off at 255 instead of scaling them."""
    if picture.mode not in DEEP:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    grey = np.asarray(picture)
    if grey.min(initial=0) < 0 or grey.max(initial=0) > 0xFFFF:
        raise ValueError("grey values of more than 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
