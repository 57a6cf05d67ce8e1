"""Files written for PyTorch hold plain tensors only, and read back bit for bit."""

import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest

from crab_jax.convert import torch_file, torch_writer
from crab_jax.convert.torch_writer import Tensor

# What `torch.load(weights_only=True)` admits and a state dict needs.
ADMITTED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


def tensor(value) -> Tensor:
    return Tensor(value.shape, value.dtype, lambda: value)


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=7).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "double": rng.normal(size=(1, 2)),
        "ids": np.arange(3),
        "flags": np.array([True, False]),
        "scalar": np.float32(2.5).reshape(()),
        "none": np.zeros((0, 4), np.float32),
        "view": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }


def test_tensors_and_plain_values_read_back(tmp_path, values):
    cfg = {"layers": 12, "negative": -3, "big": 2**40, "rate": 0.6, "on": True, "off": False, "name": "gelu"}
    torch_writer.save(tmp_path / "a.pt", {"cfg": cfg, "model": {k: tensor(v) for k, v in values.items()}})
    read = torch_file.read(tmp_path / "a.pt")
    assert read.metadata == {"cfg": cfg, "model": {}}
    for name, value in values.items():
        found = read[f"model.{name}"]
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(found, value)


def test_the_file_is_laid_out_as_torch_save_does(tmp_path, values):
    path = tmp_path / "a.bin"
    torch_writer.save(path, {k: tensor(v) for k, v in values.items()})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[0] == "archive/data.pkl" and archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        pickled = archive.read("archive/data.pkl")
        data = path.read_bytes()
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            name, extra = (
                int.from_bytes(data[info.header_offset + at : info.header_offset + at + 2], "little") for at in (26, 28)
            )
            assert (info.header_offset + 30 + name + extra) % torch_writer.ALIGNMENT == 0
    named = {arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
    assert {n for n in named if not n.endswith("Storage")} == ADMITTED
    assert {n for n in named if n.endswith("Storage")} <= {f"torch {s}" for s in torch_file.STORAGES}


def test_what_is_no_tensor_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="list"):
        torch_writer.save(tmp_path / "a.pt", {"x": [1]})
    with pytest.raises(ValueError, match="expected"):
        torch_writer.save(tmp_path / "a.pt", {"x": Tensor((2,), np.dtype(np.float32), lambda: np.zeros(3))})


@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_model_directories_read_back(tmp_path, values, shard_bytes):
    torch_writer.save_model_dir(tmp_path, {k: tensor(v) for k, v in values.items()}, shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 60)
    read = torch_file.read_model_dir(tmp_path)
    assert set(read) == set(values)
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
