"""Bounds before work: what is too long, too large or too loud is refused in a moment, by its header."""

import struct
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from crab_jax.io.errors import InputError
from data_pipelines import datasets, media
from data_pipelines.decoded import Files, inside, read_mask
from data_pipelines.examine import examine
from data_pipelines.examples import Example
from data_pipelines.media import limits
from data_pipelines.shards import Decoding


def sparse_wav(path, channels, rate, samples):
    """A WAV of zeros that takes no room on the disk."""
    size = samples * channels * 2
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + head + b"data" + struct.pack("<I", size))
        file.truncate(size + 44)


def film(path, size, ticks=(0, 1)):
    """A film of one frame a tick of a tenth of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for tick in ticks:
            frame = av.VideoFrame(*size, "yuv420p")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def loud_wav(path, value):
    samples = np.zeros(16000, np.float32)
    samples[5] = value
    soundfile.write(path, samples, 16000, subtype="FLOAT")


def see(path):
    return media.read_video(path, 10, 16)


CASES = {  # name: (how it is made, how it is read, what validate uses it for, what is said)
    "ten-hours.wav": (lambda p: sparse_wav(p, 1, 16000, 16000 * 36000), media.read_audio, "audio", "10 hours"),
    "three-gigabytes.wav": (lambda p: sparse_wav(p, 1, 16000, 15 * 10**8), media.read_audio, "audio", "26.04 hours"),
    "an-hour-of-eight.wav": (lambda p: sparse_wav(p, 8, 48000, 48000 * 3600), media.read_audio, "audio", "gigasamples"),
    "many-channels.wav": (lambda p: sparse_wav(p, 1000, 16000, 16000), media.read_audio, "audio", "1,000 channels"),
    "loud.wav": (lambda p: loud_wav(p, 1e38), media.read_audio, "audio", "times full scale"),
    "low.wav": (lambda p: loud_wav(p, -2e4), media.read_audio, "audio", "times full scale"),
    "8k.mp4": (lambda p: film(p, (7680, 4320)), see, "video", "33.18 megapixels"),
    "100-hours.mkv": (lambda p: film(p, (32, 32), (0, 3600000)), see, "video", "100 hours"),
    "large.png": (lambda p: Image.new("1", (20000, 10000)).save(p), media.read_picture, "picture", "200 megapixels"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_too_large_is_refused_in_a_moment_by_loader_and_validate_alike(name, tmp_path):
    make, read, use, said = CASES[name]
    make(tmp_path / name)
    began = time.monotonic()
    with pytest.raises(InputError, match=said) as refused:
        read(tmp_path / name)
    assert refused.value.where.endswith(name) and time.monotonic() - began < 5
    assert said in examine((str(tmp_path), name, (use,))).problems[0][1]


def test_a_film_of_two_hours_and_one_of_4k_are_read(tmp_path):
    film(tmp_path / "long.mkv", (32, 32), (0, 71000))
    film(tmp_path / "4k.mp4", (4096, 2160))
    assert see(tmp_path / "long.mkv").shape[1:] == see(tmp_path / "4k.mp4").shape[1:] == (16, 16, 3)


def test_limits_are_raised_for_a_command(tmp_path, monkeypatch):
    film(tmp_path / "8k.mp4", (7680, 4320))
    monkeypatch.setenv(limits.VARIABLE, "film_megapixels=40, hours=12")
    assert len(see(tmp_path / "8k.mp4")) and limits.limits().hours == 12
    monkeypatch.setenv(limits.VARIABLE, "megapixels=0.001")
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="CRAB_JAX_MEDIA_LIMITS=megapixels"):
        media.read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["hours", "hours=", "hours=-1", "hours=nan", "days=3", "hours=1e99"])
def test_a_limit_that_cannot_be_read_is_named(text, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, text)
    with pytest.raises(InputError, match=r"CRAB_JAX_MEDIA_LIMITS \[(hours|days)\].*is no limit"):
        limits.limits()


def test_a_large_sound_is_read_in_blocks_to_the_same_samples(tmp_path, monkeypatch):
    samples = np.random.default_rng(0).uniform(-1, 1, (150_000, 3))
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="PCM_16")
    whole = media.read_audio(tmp_path / "a.wav")
    monkeypatch.setattr("data_pipelines.media.sound._LARGE", 1000)
    assert np.array_equal(media.read_audio(tmp_path / "a.wav"), whole)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", "ffconcat version 1.0\nfile other.mp4\n"),
        ("a.mkv", "#EXTM3U\n#EXTINF:1,\nother.mp4\n"),
        ("a.wav", "v=0\no=- 0 0 IN IP4 127.0.0.1\n"),
        ("a.png", "%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n"),
        ("a.jpg", "\x00\x00\x01\x00icon"),
        ("a.avi", ";FFMETADATA1\ntitle=x\n"),
    ],
)
def test_what_reads_other_files_or_starts_programs_is_not_opened(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    film(tmp_path / "other.mp4", (32, 32))
    with pytest.raises(InputError):
        (media.read_picture if name.endswith(("png", "jpg")) else see)(tmp_path / name)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_out_of_a_root_is_not_followed_by_the_loader(link, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir(), elsewhere.mkdir()
    (root / "train.jsonl").write_text("{}\n")
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    (root / "media").mkdir() if link == "file" else (root / "media").symlink_to(elsewhere)
    if link == "file":
        (root / "media/a.png").symlink_to(elsewhere / "a.png")
    files = Files(root, Decoding(32, 10, False))
    for read in (
        lambda path: files.picture(path, "image"),
        lambda path: files.mask(path, "binary", 8),
        files.video,
        lambda path: files.samples(path, None),
        lambda path: read_mask(root, Example("x", "s4", "", mask=path, mask_kind="binary"), 8),
    ):
        with pytest.raises(InputError, match="is a link out of the data root"):
            read("media/a.png")
    (root / "inside.png").symlink_to(root / "b.png")
    Image.new("RGB", (8, 8)).save(root / "b.png")
    assert not files.picture("inside.png", "image").any() and not files.picture(str(elsewhere / "a.png"), "image").any()


def test_the_folder_of_a_dataset_may_be_on_another_disk_and_a_list_may_not(tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    root.mkdir(), disk.mkdir()
    (root / "ave").symlink_to(disk)
    Image.new("RGB", (8, 8)).save(disk / "a.png")
    assert inside(root, "ave/a.png").is_file()
    (tmp_path / "list.jsonl").write_text("{}\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train.jsonl").symlink_to(tmp_path / "list.jsonl")
    with pytest.raises(InputError, match="is a link out of the data root"):
        datasets.read_jsonl(tmp_path / "own", "train")
