"""Pictures and masks of every sort: the model sees what a viewer shows, or is told why not."""

import os
import subprocess
import sys
from pathlib import Path

import malformed
import numpy as np
import pytest
from malformed import encoded, encoded_16, grey_of, with_chunk, with_segment
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import media
from data_pipelines.decoded import Files
from data_pipelines.media import pictures
from data_pipelines.shards import Decoding

SHARED = Path(__file__).resolve().parents[3] / "shared/cases"
WIDTH, HEIGHT = 48, 32


@pytest.fixture
def read(tmp_path):
    """A function that gives int[H,W,3] of the content of a picture file."""

    def of(content, name="x.bin"):
        (tmp_path / name).write_bytes(content)
        return media.read_picture(tmp_path / name).astype(int)

    return of


@pytest.fixture(scope="module")
def colours():
    """uint8[32,48,3] that differ in every corner and channel."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 7, columns * 5, (rows + columns) * 3], 2).astype(np.uint8)


def turned(pixels, orientation):
    """What is stored of upright `pixels` under an EXIF orientation, worked out from its definition: where the stored
    row 0 and column 0 are shown."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_upright_in_size_and_pixels(read, tmp_path, colours, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {"quality": 95})
    content = encoded(
        np.ascontiguousarray(turned(colours, orientation)),
        kind,
        exif=exif,
        **{} if kind in ("PNG", "TIFF") else options,
    )
    pixels = read(content)
    assert pixels.shape == colours.shape and np.abs(pixels - colours).mean() < 4
    assert media.image_size(tmp_path / "x.bin") == (WIDTH, HEIGHT)
    assert media.is_turned(tmp_path / "x.bin") == (orientation > 1) or kind == "TIFF"
    small = media.read_image(tmp_path / "x.bin", 16)
    np.testing.assert_array_equal(small, np.array(Image.fromarray(pixels.astype(np.uint8)).resize((16, 16), 3)))


@pytest.mark.parametrize("orientation", [0, 9, 250])
def test_an_orientation_that_is_none_turns_nothing(read, colours, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read(encoded(colours, exif=exif)), colours)


def test_every_mode_is_what_a_viewer_shows(read, colours):
    image = Image.fromarray(colours)
    grey = np.array(image.convert("L")).astype(int)
    three = grey[..., None].repeat(3, 2)
    for mode, kind in (
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("RGB", "PPM"),
        ("RGB", "WEBP"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.abs(read(encoded(image.convert(mode), kind, **options)) - colours).mean() < 3, (mode, kind)
    for mode, kind in (("L", "PNG"), ("LA", "PNG"), ("L", "TIFF"), ("L", "GIF"), ("L", "PPM"), ("PA", "PNG")):
        if mode != "PA":
            np.testing.assert_array_equal(read(encoded(image.convert(mode), kind)), three)
    deep = grey.astype(np.uint16) * 256 + 77
    for content in (
        encoded(deep),
        encoded(deep, "TIFF"),
        encoded(deep, "PPM"),
        encoded(0xFFFF - deep, "TIFF", tiffinfo={262: 0}),
        encoded(Image.fromarray(deep.byteswap().view(deep.dtype.newbyteorder())), "TIFF"),
    ):
        np.testing.assert_array_equal(read(content), three)
    np.testing.assert_array_equal(read(encoded_16(colours.astype(np.uint16) * 256 + 9)), colours)
    for bits in (1, 2, 4):
        levels = (grey >> (8 - bits)).astype(np.uint8)
        np.testing.assert_array_equal(read(grey_of(bits, levels))[..., 0], levels.astype(int) * (255 // (2**bits - 1)))
    cmyk = np.array(image.convert("CMYK"))
    for content in (encoded(image.convert("CMYK"), "TIFF"), encoded(image.convert("CMYK"), "JPEG", quality=100)):
        np.testing.assert_allclose(read(content), 255 - cmyk[..., :3].astype(int), atol=25)  # Adobe's are inverted


def test_a_tiff_palette_of_8_bits_where_16_belong_is_read(read, colours):
    image = Image.fromarray(colours).quantize(256)
    content = encoded(image, "TIFF")
    levels = np.array(image.getpalette("RGB"), np.uint16).reshape(-1, 3).T
    stored = np.zeros((3, 256), np.uint16)
    stored[:, : levels.shape[1]] = levels
    wide = (stored * 256).astype("<u2").tobytes()
    assert wide in content
    np.testing.assert_array_equal(read(content.replace(wide, stored.astype("<u2").tobytes())), read(content))
    assert read(content).max() > 100


def test_metadata_of_every_sort_change_nothing(read, colours):
    png, jpeg = encoded(colours), encoded(colours, "JPEG", quality=95)
    plain = read(jpeg)
    junk = np.random.default_rng(0)
    for length in (0, 1, 7, 60, 3000):
        body = junk.bytes(length)
        for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME", b"xyzw"):
            np.testing.assert_array_equal(read(with_chunk(png, kind, body)), colours)
            np.testing.assert_array_equal(read(png[:-12] + malformed.chunk(kind, body) + png[-12:]), colours)
        for marker in (0xE1, 0xE2, 0xED, 0xEF, 0xFE):
            for head in (
                b"",
                b"Exif\0\0",
                b"MPF\0",
                b"ICC_PROFILE\0",
                b"Photoshop 3.0\0",
                b"http://ns.adobe.com/xap/1.0/\0",
            ):
                np.testing.assert_array_equal(read(with_segment(jpeg, marker, head + body)), plain)


def test_a_jpeg_that_ends_early_is_refused_wherever_it_is_cut(read, colours):
    image = Image.fromarray(colours).resize((240, 160))
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 5}, {"subsampling": 0}, {"optimize": True}):
        for mode in ("RGB", "L", "CMYK"):
            content = encoded(image.convert(mode), "JPEG", quality=90, **options)
            read(content)
            for share in (0.45, 0.6, 0.75, 0.9):
                cut = content[: int(len(content) * share)]
                for end in (b"", b"\xff\xd9", b"\xff\xd9" + bytes(9000)):
                    with pytest.raises(InputError, match="end before|ends before|cannot be decoded"):
                        read(cut + end)
    for pixels in (np.full((50, 70, 3), 128, np.uint8), np.full((8, 8), 127, np.uint8)):  # as grey as what is missing
        read(encoded(pixels, "JPEG"))
        read(encoded(pixels, "JPEG", progressive=True))


def test_the_look_for_missing_data_costs_little(colours, tmp_path, monkeypatch):
    """A JPEG whose last pixel has another colour than grey is decoded once."""
    content = encoded(Image.fromarray(colours).resize((640, 480)), "JPEG")
    (tmp_path / "x.jpg").write_bytes(content)
    opened = []
    monkeypatch.setattr(pictures.Image, "open", lambda *a, of=Image.open, **k: opened.append(1) or of(*a, **k))
    monkeypatch.setattr(pictures, "_NEXT_MARKER", Counting(pictures._NEXT_MARKER))
    media.read_image(tmp_path / "x.jpg", 32)
    assert opened == [1] and not pictures._NEXT_MARKER.searched  # the coded data are not looked through either


class Counting:
    def __init__(self, pattern):
        self.pattern, self.searched, self.match = pattern, 0, pattern.match

    def search(self, *arguments):
        self.searched += 1
        return self.pattern.search(*arguments)


def test_a_large_picture_is_made_smaller_while_it_is_decoded(read, tmp_path, colours, monkeypatch):
    monkeypatch.setattr(pictures, "LARGE", 400)  # of 1536: half the width and height is 384
    for content in (encoded(colours), encoded(colours, "JPEG", quality=100, subsampling=0)):
        pixels = read(content)
        assert pixels.shape == (HEIGHT // 2, WIDTH // 2, 3) and np.abs(pixels - colours[::2, ::2]).max() < 12
        assert media.image_size(tmp_path / "x.bin") == (WIDTH, HEIGHT)
    read(encoded(colours))
    assert media.read_mask(tmp_path / "x.bin", None, "binary").shape == (HEIGHT, WIDTH)  # masks are not


@pytest.mark.parametrize(
    "name",
    [
        b"12:30:05.jpg",
        b"100%25.jpg",
        b"%d.png",
        b"caf\xe9 \xff.jpg",
        b"\xe5\x89\xaa.png",
        b"new\nline.jpg",
        b"http:",
        b"-o.jpg",
        b"x.heic",
    ],
)
def test_names_of_every_sort(tmp_path, colours, name):
    path = os.path.join(str(tmp_path), os.fsdecode(name))
    Path(path).write_bytes(encoded(colours))
    np.testing.assert_array_equal(media.read_picture(path), colours)
    files = Files(tmp_path, Decoding(16, 4, False), str(tmp_path / "kept"))
    np.testing.assert_array_equal(files.picture(os.fsdecode(name), "image"), files.picture(os.fsdecode(name), "image"))
    Path(path).write_bytes(encoded(colours)[:60])
    with pytest.raises(InputError, match="damaged") as refused:
        media.read_picture(path)
    assert str(refused.value).encode("utf-8", "backslashreplace")


def test_masks_of_few_bits_and_of_blurring_formats(tmp_path):
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[:16, 8:] = 3

    def mask(content, kind="binary"):
        (tmp_path / "m").write_bytes(content)
        return media.read_mask(tmp_path / "m", None, kind)

    for bits in (2, 4):
        np.testing.assert_array_equal(mask(grey_of(bits, ids), "semantic"), ids)
    for kind, options in (("JPEG", {"quality": 40}), ("WEBP", {"quality": 40}), ("AVIF", {"quality": 40})):
        blurred = mask(encoded(np.where(ids, 255, 0).astype(np.uint8), kind, **options))
        assert (blurred != (ids > 0)).mean() < 0.01, kind
    np.testing.assert_array_equal(mask(encoded(np.where(ids, 1, 0).astype(np.uint8), "WEBP", lossless=True)), ids > 0)
    picture = Image.fromarray(ids, "P")
    picture.putpalette(avss_palette().tobytes())
    np.testing.assert_array_equal(mask(encoded(picture)), ids > 0)
    np.testing.assert_array_equal(mask(encoded(picture), "semantic"), ids)


def test_a_mask_that_is_in_the_opacity_only_is_refused_whatever_its_kind(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    pixels[:16, :, 3] = 255
    for kind in ("binary", "semantic"):
        (tmp_path / "m.png").write_bytes(encoded(pixels))
        with pytest.raises(InputError, match="what is opaque is not what is above black"):
            media.read_mask(tmp_path / "m.png", None, kind)
        pixels[:16, :, :3] = avss_palette()[3]
        (tmp_path / "m.png").write_bytes(encoded(pixels))
        assert media.read_mask(tmp_path / "m.png", None, kind)[:16].min() > 0
        pixels[..., :3] = 0


def test_the_border_of_pascal_voc_is_refused_in_a_mask_of_something(tmp_path):
    """Its 255 is no object; a palette that gives 255 another colour is as good as any."""
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[4:20, 8:30], ids[3, 8:30] = 15, 255
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    for void, refused in (((224, 224, 192), True), ((255, 255, 255), False)):
        palette[255] = void
        picture = Image.fromarray(ids, "P")
        picture.putpalette(palette.tobytes())
        picture.save(tmp_path / "m.png")
        if refused:
            with pytest.raises(InputError, match="index 255 has the colour that Pascal VOC gives"):
                media.read_mask(tmp_path / "m.png", None, "binary")
        else:
            np.testing.assert_array_equal(media.read_mask(tmp_path / "m.png", None, "binary"), ids > 0)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\1", "PAM"),
        (b"\x0a\5\1\x08" + bytes(200), "PCX"),
        (b"\x01\xda\1\1" + bytes(600), "SGI"),
        (b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(99), "JPEG-LS"),
        (b"\0\5\x16\7" + bytes(80), "beside its content .*give the file without"),
    ],
)
def test_what_is_whole_but_not_read_is_called_by_its_name(read, content, name):
    with pytest.raises(InputError, match=f"is .*{name}") as refused:
        read(content)
    assert "damaged" not in str(refused.value)


# The cases that were reported.


@pytest.fixture
def cases():
    if not (SHARED / "w6-overlay-of-turned-photo").is_dir():
        pytest.skip("the cases are not here")
    return SHARED


def test_reported_cases(cases, tmp_path):
    photo = cases / "w6-overlay-of-turned-photo/exif6.jpg"
    assert media.image_size(photo) == (160, 240) and media.read_picture(photo).shape == (240, 160, 3)
    deep = media.read_picture(cases / "w6-overlay-of-turned-photo/grey16.png")
    assert 80 < deep.min() < deep.max() < 210
    assert media.read_picture(cases / "w20-called-damaged/exif_bad.png").ndim == 3
    with pytest.raises(InputError, match="is HEIC.*export it as JPEG"):
        media.read_picture(cases / "w20-called-damaged/up.heic")
    made = tmp_path / "made"
    subprocess.run([sys.executable, str(cases / "w16-validate-and-loader-disagree/make.py"), str(made)], check=True)
    whole = media.read_picture(made / "ok.jpg").astype(int)
    for name in ("png_inside.jpg", "webp_inside.jpg", "jpg_inside.png", "motion.jpg", "trailing.png"):
        assert not media.picture_outline(made / name)
        assert np.abs(media.read_picture(made / name) - whole).mean() < 12, name


@pytest.mark.parametrize("kind", ["binary", "semantic"])
def test_a_picture_of_palette_indices_without_a_palette_is_refused(kind, tmp_path):
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette(avss_palette().tobytes())
    png = encoded(palette)
    (tmp_path / "x.png").write_bytes(png.replace(b"PLTE", b"ABCD"))
    with pytest.raises(InputError, match="x.png"):
        media.read_mask(tmp_path / "x.png", None, kind)
