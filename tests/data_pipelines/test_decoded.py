"""Decoded media that are kept for further Examples about a clip."""

import concurrent.futures
import time

import numpy as np
import pytest

from crab_jax.io.errors import InputError
from data_pipelines import decoded


class Counting:
    """A root that notes what is decoded."""

    def __init__(self):
        self.asked: list[tuple] = []

    def source(self, decoding):
        return self

    def video(self, path):
        self.asked.append(("video", path))
        time.sleep(0.05)
        if path == "bad":
            raise InputError(path, "", "is damaged", "send it again")
        return np.full(10, len(path), np.uint8)

    def sound(self, path, windows, second, video=None):
        self.asked.append((path, windows, second))
        return np.zeros((1, 3), np.float32)

    def picture(self, path, field):
        self.asked.append(("picture", path))
        return np.zeros(3, np.uint8)


def test_of_several_examples_about_a_clip_its_video_and_sound_are_decoded_once():
    """Also when threads ask at the same time; a window of its own is a sound of its own, and pictures pass through."""
    root = Counting()
    source = decoded.Remembering(root).source(None)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(source.video, ["a", "bb", "a", "a", "bb"]))
    assert [array[0] for array in found] == [1, 2, 1, 1, 2] and found[0] is found[2]
    assert sorted(root.asked) == [("video", "a"), ("video", "bb")]
    root.asked.clear()
    for windows, second in (("ten", 1), ("ten", 2), ("one", 1), ("one", 2), ("one", 1)):
        source.sound("a", windows, second)
    assert root.asked == [("a", "ten", 1), ("a", "one", 1), ("a", "one", 2)]
    source.picture("p", "image"), source.picture("p", "image")
    assert root.asked[3:] == [("picture", "p")] * 2


def test_the_latest_media_are_kept_within_a_bound_and_errors_are_not():
    root = Counting()
    source = decoded.Remembering(root, limit=20).source(None)
    for path in ("a", "b", "a", "c", "a", "b"):  # two of ten bytes fit; the one asked for least lately goes
        source.video(path)
    assert [path for _, path in root.asked] == ["a", "b", "c", "b"]
    for _ in range(2):
        with pytest.raises(InputError, match="damaged"):
            source.video("bad")
    assert [path for _, path in root.asked][4:] == ["bad", "bad"]
    large = decoded.Remembering(root, limit=5).source(None)
    assert large.video("a") is large.video("a"), "the latest is kept whatever its size"
