"""A tiny tokenizer and a tiny data root with one media file of each kind."""

import os
import re
import shutil

import numpy as np
import pytest
from media_files import write_audio, write_picture, write_video

from data_pipelines.batching import DataConfig
from data_pipelines.tokens import Tokenizer, chat_prompt, train_tiny_tokenizer

CORPUS = [
    chat_prompt("This is a video:\n<video>\nThis is an audio:\n<audio>\nPlease describe the events."),
    "So the answer is <answer> two </answer>. The dog barks from 0 to 8.",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tiny_tokenizer(CORPUS * 20, path, vocab_size=400)
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """clip.mp4 (20 frames, 2 s of sound), clip.wav (2 s), 0.png .. 4.png (48x32), mask.png, labels.png."""
    root = tmp_path_factory.mktemp("data")
    write_video(root / "clip.mp4", frames=20, size=(48, 32), seconds=2.0)
    write_audio(root / "clip.wav", 2.0)
    for i in range(5):
        write_picture(root / f"{i}.png", np.full((32, 48, 3), 50 * i, np.uint8))
    labels = np.zeros((32, 48), np.uint8)
    labels[:16] = 9
    write_picture(root / "labels.png", labels)
    write_picture(root / "mask.png", labels * 28)
    return root


@pytest.fixture
def config() -> DataConfig:
    return DataConfig(image_size=16, video_frames=4, visual_queries=3, audio_queries=2, lengths=(128, 192, 320))


@pytest.fixture(scope="session")
def releases_root(tmp_path_factory):
    """A raw root: a mini release of every dataset in its original layout. Not to be changed; see `copied`."""
    import releases

    root = tmp_path_factory.mktemp("releases")
    releases.write(root / "data", root / "scenes")
    return root / "data"


@pytest.fixture
def copied(releases_root, tmp_path):
    """A function that gives a root with copies of some releases, which a test may change with `releases.text`."""

    def copy(*folders: str):
        for folder in folders:
            shutil.copytree(releases_root / folder, tmp_path / folder, copy_function=os.link)
        return tmp_path

    return copy


@pytest.fixture
def one_line_error(capsys):
    """A function that runs main(argv) and checks that it ends with code 2 and one line, in which `message` is found."""

    def check(main, argv, message) -> None:
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and re.search(message, error)

    return check
