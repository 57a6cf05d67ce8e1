"""The committed golden directory says what it leaves out of the whole one."""

import numpy as np


def test_every_array_of_the_manifest_is_there_or_named_as_left_out(data):
    for file, arrays in data.manifest["arrays"].items():
        if file in data.omitted["files"]:
            assert not (data.folder / file).exists()
            continue
        left_out = set(data.omitted["arrays"].get(file, ()))
        with np.load(data.folder / file) as z:
            assert set(z) | left_out == set(arrays) and not set(z) & left_out, file


def test_every_weight_file_is_there_or_named_as_left_out(data):
    recorded = [name for name in data.manifest["file_bytes"] if name.startswith("weights/")]
    assert recorded
    for name in recorded:
        assert (data.folder / name).exists() != (name in data.omitted["files"]), name
