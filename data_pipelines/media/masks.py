"""Ground-truth masks: pictures of grey values, class ids or colours, and run lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from crab_jax.io.errors import InputError
from crab_jax.tasks.avs_classes import CLASSES, avss_palette
from data_pipelines.media.pictures import DEEP, Picture, open_picture

STRAY = 1e-3  # share of a mask's pixels up to which unknown colours are taken as a slip of the drawing tool
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")  # formats that may change values slightly
BETWEEN = 0.02  # share of a mask's pixels that such a format may leave between black and white
MOST_PIXELS = 10**8  # of a run-length mask, whose few bytes could request any amount of memory
# A mask may be written in place of its path: COCO run lengths, rle:<height>x<width>:<counts>, or an empty mask.
INLINE_MASK = "rle:"
EMPTY_MASK = f"{INLINE_MASK}empty"


def _labels_of_colours(rgb: np.ndarray, unknown: int) -> np.ndarray:
    """Return int32[...] class ids of exact palette colours uint8[..., 3]; `unknown` for any other colour."""
    weights = np.array([65536, 256, 1])
    codes, keys = rgb.astype(np.int64) @ weights, avss_palette().astype(np.int64) @ weights
    order = np.argsort(keys)
    place = np.minimum(np.searchsorted(keys[order], codes), len(CLASSES) - 1)
    return np.where(keys[order][place] == codes, order[place], unknown).astype(np.int32)


def inline_mask(code: Mapping[str, Any]) -> str:
    """Return the text of a mask given as COCO run lengths, {"size": [height, width], "counts": bytes}."""
    return f"{INLINE_MASK}{code['size'][0]}x{code['size'][1]}:{code['counts'].decode()}"


def decode_runs(size: Any, counts: Any, where: str) -> np.ndarray:
    """Decode a mask in COCO run lengths to uint8[H,W] of 0 and 1.

    size: [height, width]; counts: compressed text or bytes. Everything is checked before the C library sees it, which
    leaves memory uninitialised where runs end early. Raises InputError that names `where`.
    """

    def refuse(problem: str) -> InputError:
        return InputError(
            where,
            "mask",
            f"is no mask in COCO run lengths: {problem}",
            "write the run-length encoding of pycocotools.mask.encode, counts as text",
        )

    if not (isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise refuse(f"size is {size!r:.60}, not two whole numbers above 0")
    height, width = size
    if height * width > MOST_PIXELS:
        raise refuse(f"size {height}x{width} has more than {MOST_PIXELS:,} pixels")
    if not isinstance(counts, str | bytes):
        raise refuse(f"counts is {counts!r:.40}, not the compressed text")
    text = counts if isinstance(counts, str) else counts.decode("latin-1")
    area, filled = height * width, 0
    try:
        for number, run in enumerate(_runs(text), 1):
            filled += run
            if run < 0:
                raise ValueError(f"run {number} of counts has {run:,} pixels")
            if filled > area:
                raise ValueError(f"the runs hold more than the {area:,} pixels of {height}x{width}")
        if filled != area:
            raise ValueError(f"the runs hold {filled:,} of the {area:,} pixels of {height}x{width}")
    except ValueError as error:
        raise refuse(str(error)) from None
    mask: np.ndarray = coco.decode({"size": [height, width], "counts": text.encode()})
    return mask


def _runs(counts: str) -> Iterator[int]:
    """Yield the runs in compressed text: five bits per character, lowest first.

    From the third run on, numbers are differences from the run before the previous one. Raises ValueError for other
    characters and for a number that does not end.
    """
    runs: list[int] = []
    number = shift = 0
    for char in counts:
        bits = ord(char) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"counts holds the character {char!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32 and shift < 60:
            continue
        number -= (bits & 16) << (shift - 4)  # the sign
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        yield runs[-1]
        number = shift = 0
    if shift:
        raise ValueError("counts ends in the middle of a number")


def _decode_inline(code: str) -> np.ndarray:
    """Return uint8[H,W] of a text written by `inline_mask`."""
    match = re.fullmatch(rf"{INLINE_MASK}([0-9]{{1,9}})x([0-9]{{1,9}}):(.*)", code, re.DOTALL)
    if not match:
        fix = f"write {INLINE_MASK}<height>x<width>:<counts>, or the path of a picture"
        raise InputError(code[:60], "mask", "is no mask in COCO run lengths", fix)
    return decode_runs([int(match[1]), int(match[2])], match[3], code[:60])


def check_size(size: tuple[int, int], picture: tuple[int, int] | None, where: str) -> None:
    """Raise InputError for a mask whose (width, height) is not that of its picture, both upright."""
    if picture is not None and size != picture:
        problem = f"is {size[0]}x{size[1]}, but its picture is {picture[0]}x{picture[1]}"
        turned = ", as it is shown: upright where EXIF turns it" if size == picture[::-1] else ""
        raise InputError(where, "mask", problem, f"export the mask at the size of its picture{turned}")


def _binary(grey: np.ndarray, size: int | None) -> np.ndarray:
    """Return int32[size, size], 1 where grey[H, W] is above 0; int32[H, W] without a size."""
    # cv2's nearest neighbour (floor(i * scale)); semantic masks use Pillow's, which is half a pixel off.
    rows, columns = (np.arange(size or n) * n // (size or n) for n in grey.shape)
    labels: np.ndarray = (grey[rows[:, None], columns] > 0).astype(np.int32)
    return labels


def _grey(mask: Picture) -> tuple[np.ndarray, str]:
    """Return ([H, W] above 0 where a binary mask has an object, what contradicts this reading or "")."""
    image = mask.image
    if image.mode in DEEP:
        return np.asarray(image), ""
    grey = np.asarray(image.convert("L"))
    if mask.kind in LOSSY and (levels := np.unique(grey))[levels > 0].size > 1:  # changed by compression
        unclear = levels[-1] < 192 or ((grey > 64) & (grey < 192)).mean() > BETWEEN
        return grey > 127, f"is a {mask.kind} whose greys are not black and white" if unclear else ""
    if image.mode == "P":
        return grey, _palette_against(image)
    if image.mode in ("RGB", "RGBA") and (np.asarray(image.convert("RGB")).any(axis=2) != (grey > 0)).any():
        return grey, "has colours so dark that their grey value is 0, which is read as nothing"
    return grey, ""


def _palette_against(image: Image.Image) -> str:
    """Return what in a palette contradicts that black, and index 0, is the background; "" if nothing does."""
    if (image.getpalette("RGB") or [])[3 * 255 :] == [224, 224, 192] and image.histogram()[255]:
        return "its index 255 has the colour that Pascal VOC gives to pixels of no class, which count as something"
    every = Image.frombytes("P", (256, 1), bytes(range(256)))
    every.putpalette(image.getpalette("RGB") or [])
    seen, used = np.asarray(every.convert("L"))[0] > 0, np.flatnonzero(image.histogram())
    if used.size and not used[0] and seen[used].all():
        return "its palette has a bright colour for index 0 and no black: all of it would be read as something"
    if used.size and not used[0] and not seen[0] and not seen[used[1:]].all():
        return f"its palette has black for index {used[1:][~seen[used[1:]]][0]} and for index 0"
    return ""


def _opacity_against(image: Image.Image, grey: np.ndarray) -> str:
    """Return how a mask's opacity contradicts its grey values; "" if it does not."""
    alpha = np.asarray(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else np.array([255])
    differs = alpha.min(initial=255) < 255 and ((alpha > 0) != (grey > 0)).any()
    return "what is opaque is not what is above black, which is what is read" if differs else ""


def _check_palette(mask: Image.Image, where: str) -> None:
    """Raise InputError for a palette whose colours are those of other classes than its indices.

    Programs that sort palettes leave such files, in which neither colours nor indices can be trusted.
    """
    colours = np.array(mask.getpalette("RGB"), np.uint8).reshape(-1, 3)
    used = np.flatnonzero(mask.histogram())
    if used[-1] < len(colours):
        classes = _labels_of_colours(colours[used], -1)
        if (classes >= 0).all() and (wrong := np.flatnonzero(classes != used)).size:
            problem = f"has the colour of class {classes[wrong[0]]} for palette index {used[wrong[0]]}"
            raise InputError(where, "mask", problem, "export the mask as RGB, or with the index as the class id")


def _ids(mask: Picture, where: str) -> Image.Image:
    """Return a semantic mask whose values are class ids 0..70, or colours of classes. Raises InputError for others."""
    image, problem, fix = mask.image, "", "use the 71 AVSBench-semantic classes"
    if image.mode == "P":
        _check_palette(image, where)
    elif image.mode == "LA":
        image = image.convert("L")
    elif image.mode == "L" and mask.bits < 8:  # Pillow scales values of fewer bits to 0..255
        image = Image.fromarray(np.asarray(image) // (255 // (2**mask.bits - 1)))
    if image.mode in ("P", "L", "1", *DEEP):
        extrema: Any = (0, np.flatnonzero(image.histogram())[-1]) if image.mode == "P" else image.getextrema()
        low, high = extrema
        if mask.kind in LOSSY:
            problem, fix = f"is a {mask.kind}, which does not keep class ids exactly", "export it as PNG"
        elif image.mode != "1" and not 0 <= low <= high < len(CLASSES):
            problem = f"class id {low if low < 0 else high} is outside 0..{len(CLASSES) - 1}"
    else:
        image = image.convert("RGB")
        pixels = image.width * image.height
        most = int(STRAY * pixels)
        colours = image.getcolors(len(CLASSES) + most)
        stray = (
            most + 1
            if colours is None
            else sum(count for count, colour in colours if _labels_of_colours(np.array(colour), -1) < 0)
        )
        if stray > most:
            number = "more than " if colours is None else ""
            problem = f"{number}{stray} of {pixels} pixels have a colour of no class"
    if problem:
        raise InputError(where, "mask", problem, fix)
    return image


def read_mask(
    path: str | Path,
    size: int | None,
    kind: str,
    picture: tuple[int, int] | None = None,
    unknown: int = 0,
    content: bytes | None = None,
) -> np.ndarray:
    """Return a ground-truth mask as int32[size, size] by nearest neighbour; int32[H, W] in its own size with None.

    `binary`: 1 where the grey value is above 0 (above half of white in a JPEG, which blurs). `semantic`: class ids
    0..70, from the indices of a palette or grey PNG or from the exact AVSBench colours of an RGB one; up to 0.1 % of
    the pixels may have other colours, which become `unknown` (by default background, as in the reference). A mask is
    upright like its picture: it is rotated by its own EXIF tag, and compared with the picture as that is shown.
    `picture` is the (width, height) of the picture that the mask belongs to. A `path` that starts with INLINE_MASK is a
    binary mask itself. content: the bytes of the file, if read already. Raises InputError for a damaged file, another
    size than `picture`, an id > 70, more of other colours, a palette that contradicts the ids, and palettes, opacity or
    greys that leave open what is background.
    """
    if (code := Path(path).name).startswith(INLINE_MASK):
        grey = np.zeros((1, 1)) if code == EMPTY_MASK else _decode_inline(code)
        check_size((grey.shape[1], grey.shape[0]), None if code == EMPTY_MASK else picture, str(path))
        return _binary(grey, size)
    with open_picture(path, "mask", content, whole=True) as mask:
        if mask.image.mode == "F":
            raise InputError(str(path), "mask", "holds decimal numbers", "export it as PNG, with 8 bits")
        if kind == "binary":
            grey, problem = _grey(mask)
            if problem := problem or _opacity_against(mask.image, grey):
                fix = "export it as PNG: black, and white where something is"
                raise InputError(str(path), "mask", problem, fix)
            check_size(mask.size, picture, str(path))  # after the checks that it is a mask at all
            return _binary(grey, size)
        image = _ids(mask, str(path))
        if mask.image.has_transparency_data and (problem := _opacity_against(mask.image, _classes(np.array(image), 0))):
            raise InputError(str(path), "mask", problem, "export it without opacity")
        check_size(mask.size, picture, str(path))
        values = np.array(image if size is None else image.resize((size, size), Image.Resampling.NEAREST))
    return _classes(values, unknown)


def _classes(values: np.ndarray, unknown: int) -> np.ndarray:
    """Return int32[H, W] class ids of a semantic mask's values or colours; `unknown` for a colour of no class."""
    return _labels_of_colours(values, unknown) if values.ndim == 3 else values.astype(np.int32)
