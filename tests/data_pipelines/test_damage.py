"""Any damage to a media file is an InputError or is not seen by its decoder; never another exception."""

import malformed
import numpy as np
import pytest
from malformed import encoded, film, noise, wave
from media_files import tone

from crab_jax.io.errors import InputError
from data_pipelines import media
from data_pipelines.status import damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ending -> the bytes of a sound file of that kind."""
    at = tmp_path_factory.mktemp("whole") / "x.mp4"
    grey = noise(1)[0][..., 0]
    return {
        "mp4": film(at, noise(8), seconds=1.0, options={"movflags": "faststart"}),
        "h264.mp4": film(at, noise(8), "libx264", seconds=1.0),
        "wav": wave(tone(0.5)),
        "flac": wave(tone(0.5), subtype="PCM_16", kind="FLAC"),
        "mp3": wave(tone(0.5), subtype="MPEG_LAYER_III", kind="MP3"),
        "ogg": wave(tone(0.5), subtype="VORBIS", kind="OGG"),
        "png": encoded(grey),
        "jpg": encoded(grey, "JPEG"),
        "webp": encoded(grey, "WEBP"),
        "gif": encoded(malformed.Image.fromarray(grey).quantize(8), "GIF"),
    }


READERS = {  # by the ending
    ("mp4", "h264.mp4"): (lambda path: media.read_video(path, 4, 16), media.watch, media.video_size, media.read_audio),
    ("wav", "flac", "mp3", "ogg"): (media.read_audio,),
    ("png", "jpg", "webp", "gif"): (
        lambda path: media.read_image(path, 16),
        media.image_size,
        media.read_picture,
        lambda path: media.read_mask(path, None, "binary"),
        lambda path: media.read_mask(path, 16, "semantic"),
    ),
}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content cut, with bytes changed, taken out or put in; its head, where sizes and offsets are, more often."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(len(changed) * rng.random() ** rng.choice([1, 4]))
        some = rng.bytes(int(rng.integers(1, 9)))
        how = rng.integers(5)
        if how == 0:
            del changed[at:]
        elif how == 1:
            changed[at : at + len(some)] = some
        elif how == 2:
            changed[at:at] = some
        elif how == 3:
            changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        else:
            del changed[at : at + int(rng.integers(1, 200))]
    return bytes(changed)


@pytest.mark.parametrize("count", [15, pytest.param(1500, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("ending", [ending for endings in READERS for ending in endings])
def test_a_damaged_file_is_read_or_refused(whole, tmp_path, ending, count):
    rng = np.random.default_rng(count)
    path = tmp_path / f"x.{ending}"
    readers = next(readers for endings, readers in READERS.items() if ending in endings)
    for _ in range(count):
        path.write_bytes(damaged(whole[ending], rng))
        field = "image" if ending in ("png", "jpg", "webp", "gif") else "video"
        outline = damage(tmp_path, path.name, field)
        for read in readers:
            try:
                read(path)
                # The outline never blames what is read; a header is read of what is cut off, too.
                assert not outline or field == "video" or read is media.image_size, outline
            except InputError as error:
                assert error.where == str(path)


def test_a_flipped_bit_of_what_has_checksums_is_refused_or_changes_nothing(whole, tmp_path):
    rng = np.random.default_rng(0)
    for ending, read in (("png", media.read_picture), ("ogg", media.read_audio), ("flac", media.read_audio)):
        path = tmp_path / f"x.{ending}"
        path.write_bytes(whole[ending])
        before, refused = read(path), 0
        for at in rng.integers(len(whole[ending]), size=60):
            changed = bytearray(whole[ending])
            changed[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            try:
                np.testing.assert_array_equal(read(path), before)
            except InputError:
                refused += 1
        assert refused > 30


def test_a_flac_whose_head_says_another_rate_than_its_frames_is_refused(whole, tmp_path):
    """No checksum covers the head."""
    content = bytearray(whole["flac"])
    content[19] ^= 1  # of the twenty bits of the rate
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(InputError, match="samples a second, and its frames 16000"):
        media.read_audio(tmp_path / "x.flac")


def test_an_ogg_file_without_one_of_its_pages_is_refused(tmp_path):
    content = wave(tone(4.0) * np.random.default_rng(0).uniform(0, 1, 64000), subtype="VORBIS", kind="OGG")
    pages = [b"OggS" + page for page in content.split(b"OggS")[1:]]
    assert len(pages) > 4
    for lost, said in (
        (pages[:3] + pages[4:], "pages are missing"),
        (pages[:3] + [b"oggs" + pages[3][4:]] + pages[4:], "is broken"),
    ):
        (tmp_path / "x.ogg").write_bytes(b"".join(lost))
        with pytest.raises(InputError, match=said):
            media.read_audio(tmp_path / "x.ogg")
    (tmp_path / "x.ogg").write_bytes(content + b"TAG" + bytes(125))
    assert len(media.read_audio(tmp_path / "x.ogg")) == 64000


@pytest.mark.parametrize("ending", ["avi", "flac", "mp3", "ogg", "png", "jpg", "gif"])
def test_gigabytes_of_zeros_behind_a_file_cost_neither_time_nor_memory(whole, tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_bytes(film(tmp_path / "y.avi", noise(8)) if ending == "avi" else whole[ending])
    with open(path, "ab") as file:
        file.truncate(5 << 30)
    for read in (
        (media.read_audio, media.watch)
        if ending in ("avi", "flac", "mp3", "ogg")
        else (media.read_picture, media.image_size)
    ):
        with pytest.raises(InputError, match="zeros|at most 1 is read"):
            read(path)


def test_a_file_of_zeros_is_told_by_its_beginning(tmp_path):
    with open(tmp_path / "x.mp4", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="begins with 64 MB of zeros"):
        media.watch(tmp_path / "x.mp4")
