"""The committed golden directory is small and says what it leaves out of the whole one."""

import os

import numpy as np
import pytest


def test_every_array_of_the_manifest_is_there_or_named_as_left_out(data):
    for file, arrays in data.manifest["arrays"].items():
        if file in data.omitted["files"]:
            assert not (data.folder / file).exists()
            continue
        left_out = set(data.omitted["arrays"].get(file, ()))
        with np.load(data.folder / file) as z:
            assert set(z) | left_out == set(arrays) and not set(z) & left_out, file


def test_the_committed_directory_stays_below_6_mb(data):
    if "CRAB_GOLDEN_DIR" in os.environ:
        pytest.skip("only the committed directory has a limit")
    assert sum(path.stat().st_size for path in data.folder.rglob("*") if path.is_file()) <= 6e6


def test_every_weight_file_is_there_or_named_as_left_out(data):
    recorded = [name for name in data.manifest["file_bytes"] if name.startswith("weights/")]
    assert recorded
    for name in recorded:
        assert (data.folder / name).exists() != (name in data.omitted["files"]), name
