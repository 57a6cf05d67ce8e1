"""Reported cases, each of which stands for a kind of input that went wrong: the right outcome of every one.

The files are not committed. The tests run where they are (CRAB_CASES_DIR, or ../shared/cases); tests of the kinds, with
inputs of their own, stand beside the code that reads them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from crab_jax import evaluate, predict
from crab_jax.config import parse_flags
from crab_jax.evaluation.predictions import load_mask
from crab_jax.io import packaged
from crab_jax.io.errors import InputError
from crab_jax.optim import OptimConfig, optimizer
from data_pipelines import media
from data_pipelines.__main__ import main as data_pipelines

REPOSITORY = Path(__file__).resolve().parents[1]
CASES = Path(os.environ.get("CRAB_CASES_DIR", REPOSITORY.parent / "shared/cases"))
pytestmark = pytest.mark.skipif(not (CASES / "README.md").is_file(), reason="the reported cases are not here")
CHECKPOINT = packaged.located(packaged.WARM_START)


def done(main, *words) -> int:
    """The exit code of a verb."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def made(case: str, folder: Path, *words) -> Path:
    """The folder, in which the case's script has made its files."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(CASES / "w0-shared", folder.parent / "w0-shared", dirs_exist_ok=True)
    subprocess.run([sys.executable, CASES / case / "make.py", *map(str, words)], cwd=folder, check=True)
    return folder


@pytest.fixture
def beep(tmp_path) -> Path:
    """Ten seconds of noise that is loud in the fourth."""
    wave = np.random.default_rng(0).normal(0, 0.01, 160000)
    wave[48000:64000] *= 20
    soundfile.write(tmp_path / "beep.wav", wave, 16000)
    return tmp_path / "beep.wav"


def answer(out: Path, *words) -> tuple[dict, Path]:
    """(the only line of predictions.jsonl, the folder) of predict on the warm start."""
    assert done(predict.main, "--checkpoint", CHECKPOINT, "--out", out, *words) == 0
    return json.loads((out / "predictions.jsonl").read_text()), out


@pytest.mark.parametrize("probability", [0.001, 0.003, 0.005, 0.007])
def test_w1_a_sure_empty_mask_is_empty(tmp_path, probability):
    made("w1-near-empty-mask", tmp_path / "here", probability, tmp_path / "w1")
    made_here = tmp_path / "w1"
    assert (
        done(
            evaluate.main,
            "--predictions",
            made_here / "p.jsonl",
            "--data",
            made_here / "d",
            "--examples",
            0,
            "--out",
            tmp_path / "r",
        )
        == 0
    )
    scores = json.loads((tmp_path / "r/results.json").read_text())["tasks"]
    assert scores["ref-avs"]["s_null"] == 0 and scores["s4"]["miou"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["cut_mpeg4_few.mp4", "cut_libx264.mp4"])
def test_w2_hidden_frames_are_decoded(name):
    path = CASES / "w2-hidden-key-frame" / name
    with av.open(str(path)) as container:
        full = [
            frame.reformat(64, 64, "rgb24", interpolation="BILINEAR").to_ndarray()
            for frame in container.decode(video=0)
        ]
    np.testing.assert_array_equal(media.read_video(path, 10, 64), [full[i * len(full) // 10] for i in range(10)])


def shown_second(out: Path, row: dict) -> float:
    """The second that the grey of the picture that was asked about says."""
    picture = np.asarray(Image.open(out / f"{row['id']}_picture.png").convert("L"))
    return round((float(picture.mean()) - 20) / 22, 1)


@pytest.mark.parametrize(
    ("name", "word", "second"),
    [("late15.mp4", "fourth second", 3), ("late3.mp4", "seco", 7), ("video_late.mp4", "seco", 4)],
)
def test_w3_sound_and_pictures_are_in_step(tmp_path, name, word, second):
    folder = made("w3-sound-starts-later", tmp_path / "w3")
    row, out = answer(tmp_path / "out", "--task", "s4", "--video", folder / name)
    assert word in row["prompt"] and abs(shown_second(out, row) - second) < 0.3


@pytest.mark.parametrize(("second", "grey"), [(3, 86), (7, 174)])
def test_w4_a_second_is_a_second_at_a_varying_rate(tmp_path, second, grey):
    folder = made("w4-variable-frame-rate", tmp_path / "w4")
    row, out = answer(tmp_path / "out", "--task", "s4", "--second", second, "--video", folder / "vfr.mp4")
    assert abs(np.asarray(Image.open(out / f"{row['id']}_picture.png").convert("L")).mean() - grey) <= 3


def test_w6_a_turned_photo_is_drawn_upright(tmp_path, beep):
    photo = CASES / "w6-overlay-of-turned-photo/exif6.jpg"
    Image.new("L", (160, 240), 255).save(tmp_path / "truth.png")
    row, out = answer(
        tmp_path / "out",
        "--task",
        "s4",
        "--image",
        photo,
        "--audio",
        beep,
        "--force-masks",
        "--mask",
        tmp_path / "truth.png",
    )
    for name in (row["mask"], row["overlay"], f"{row['id']}_picture.png"):
        assert Image.open(out / name).size == (160, 240)


def test_w6_greys_of_sixteen_bits_are_drawn_as_they_are_seen(tmp_path, beep):
    photo = CASES / "w6-overlay-of-turned-photo/grey16.png"
    row, out = answer(tmp_path / "out", "--task", "arig", "--image", photo, "--audio", beep)
    picture = np.asarray(Image.open(out / f"{row['id']}_picture.png").convert("L"))
    assert picture.min() >= 80 and picture.max() <= 210


@pytest.mark.parametrize(
    ("size", "counts"), [([128, 128], None), ([64, 64], ""), ([-64, 64], None), ([100000, 100000], None)]
)
def test_w7_run_lengths_fill_their_size(tmp_path, size, counts):
    from pycocotools import mask as coco

    mask = np.zeros((64, 64), np.uint8, order="F")
    mask[16:48, 10:20] = 1
    code = coco.encode(mask)["counts"].decode()
    np.testing.assert_array_equal(load_mask({"size": [64, 64], "counts": code}, "binary", tmp_path), mask)
    counts = code if counts is None else counts
    with pytest.raises(InputError):
        load_mask({"size": size, "counts": counts}, "binary", tmp_path)
    with pytest.raises(InputError):
        media.read_mask(f"rle:{size[0]}x{size[1]}:{counts}", 128, "binary")


def test_w8_a_broken_model_does_not_answer(tmp_path, scenes_root, capsys):
    subprocess.run(
        [sys.executable, CASES / "w8-not-finite-weights/make.py", tmp_path / "broken"], cwd=REPOSITORY, check=True
    )
    clip = next((scenes_root).rglob("*.mp4"))
    for main, words in (
        (predict.main, ("--task", "avcap", "--video", clip)),
        (evaluate.main, ("--data", scenes_root, "--tasks", "ave", "--limit", 1)),
    ):
        assert done(main, "--checkpoint", tmp_path / "broken", "--out", tmp_path / "out", *words) == 2
        assert re.search("error: .*(not finite|NaN)", capsys.readouterr().err)


def test_w10_no_clipping_and_no_nonsense(tmp_path):
    params, gradient = {"w": np.ones(3, np.float32)}, {"w": np.array([1.0, -2.0, 3.0], np.float32)}
    updates = []
    for norm in (0.0, 1e9):
        steps = optimizer(OptimConfig(lr=1e-2, clip_norm=norm), 100)
        state = steps.init(params)
        for _ in range(5):
            update, state = steps.update(gradient, state, params)
        updates.append(update["w"])
    np.testing.assert_allclose(*updates)
    assert np.abs(updates[0]).min() > 0
    for text in (
        "optim.clip_norm=-1",
        "data.limit=-1",
        "optim.lr=nan",
        "optim.lr=-1e-4",
        "optim.b1=1.5",
        "optim.eps=0",
        "optim.warmup_share=3",
        "loss.dice=-1",
        "loss.dice=nan",
        "data.batch_size=-4",
        "data.video_frames=-3",
        "data.workers=-1",
    ):
        with pytest.raises(InputError, match=re.escape(text.partition("=")[0])):
            parse_flags(["train", "--config=configs/tiny.py", f"--config.{text}"], None, workdir=False)


def test_w16_validate_and_the_loader_agree(tmp_path):
    folder = made("w16-validate-and-loader-disagree", tmp_path / "w16", tmp_path / "w16")
    for verb in ("status", "validate"):
        report = tmp_path / f"{verb}.json"
        assert done(data_pipelines, verb, "--root", folder, "--json", report) == 0
        counts = json.loads(report.read_text())
        assert sum(count["have"] for count in counts["counts"]) == 6
        assert all(problem["problem"].startswith("warning") for problem in counts["problems"])


def test_w18_null_is_absent(tmp_path, golden):
    from data_pipelines.tokens import Tokenizer

    ids = {}
    for name, value in (("absent", ...), ("null", None), ("true", True), ("false", False)):
        folder = shutil.copytree(golden / "weights/llama", tmp_path / name)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("legacy", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config | ({} if value is ... else {"legacy": value})))
        ids[name] = [part.tolist() for part in map(np.asarray, Tokenizer.load(folder).encode("it is <mask_0> it </s>"))]
    assert ids["null"] == ids["absent"] == ids["true"] != ids["false"]


@pytest.mark.parametrize("name", ["12:30:05.mp4", "2024-05-01T12:30:05.mp4", "file:x.mp4"])
def test_w20_names_that_look_like_protocols(tmp_path, monkeypatch, name):
    folder = made("w4-variable-frame-rate", tmp_path / "w4")
    late = made("w3-sound-starts-later", tmp_path / "w3")
    shutil.copy(folder / "vfr.mp4", tmp_path / name)
    shutil.copy(late / "late15.mp4", tmp_path / "x.mp4")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(media.read_video(name, 10, 16), media.read_video(folder / "vfr.mp4", 10, 16))


def test_w20_what_is_healthy_is_not_called_damaged(tmp_path):
    folder = CASES / "w20-called-damaged"
    with pytest.raises(InputError, match="HEIC.*JPEG"):
        media.read_image(folder / "up.heic", 16)
    assert media.read_image(folder / "exif_bad.png", 16).shape == (16, 16, 3)
    (tmp_path / "photo.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="Git LFS.*git lfs pull"):
        media.read_image(tmp_path / "photo.jpg", 16)


def test_the_folder_is_known():
    """A case that is new there is tried here too."""
    tried = {re.match(r"test_w(\d+)_", name)[1] for name in globals() if name.startswith("test_w")}
    elsewhere = {
        "0": "makes clips",
        "9": "test_resume.py",
        "13": "test_locks.py",
        "14": "test_elsewhere.py",
        "22": "test_distributed.py",
        "24": "test_locks.py",
        "50": "data_pipelines/test_healthy_media.py",
    }
    assert all((REPOSITORY / "tests" / name).is_file() for name in list(elsewhere.values())[1:])
    assert {re.match(r"w(\d+)", path.name)[1] for path in CASES.iterdir() if path.is_dir()} <= tried | set(elsewhere)
