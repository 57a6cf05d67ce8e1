"""PyTorch files are read without PyTorch, and a file that would run code is refused before it does."""

import json
import os
import struct
import time
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from crab_jax.convert import torch_file
from crab_jax.io import stored_tensors
from crab_jax.io.errors import InputError

# A PyTorch file is a pickle next to raw storages; these few opcodes are enough to write one by hand.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *args: bytes) -> bytes:
    return f"c{module}\n{name}\n(".encode() + b"".join(args) + b"tR"


def integers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def storage(kind: str, key: str = "0", module: str = "torch") -> bytes:
    return b"(" + text("storage") + f"c{module}\n{kind}\n".encode() + text(key) + text("cpu") + b"K\x00tQ"


def tensor(kind: str, shape, strides, offset: int = 0, key: str = "0") -> bytes:
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage(kind, key),
        b"J" + struct.pack("<i", offset),
        integers(*shape),
        integers(*strides),
        b"\x89",
        call("collections", "OrderedDict"),
    )


def dictionary(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def write(path, pickled: bytes, compression=zipfile.ZIP_STORED, **storages: bytes):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", data)
    return path


def test_released_formats_hold_the_recorded_tensors(golden):
    recorded = json.loads((golden / "manifest.json").read_text())["weight_keys"]
    read = 0
    for name, shapes in recorded.items():
        file, _, nested = name.partition(":")
        for path in (golden / "weights").rglob(file.split("/")[-1]):
            if path.suffix in (".bin", ".pt"):
                tensors = torch_file.read(path)
                expected = {f"{nested}.{key}" if nested else key: shape for key, shape in shapes.items()}
                assert {key: list(tensor.shape) for key, tensor in tensors.items()} == expected
                read += 1
    assert read >= 2


def test_plain_values_are_metadata(golden):
    manifest = json.loads((golden / "manifest.json").read_text())
    path = next((golden / "weights/beats").glob("*.pt"))
    assert torch_file.read(path).metadata == {"cfg": manifest["beats_cfg"], "model": {}}


def test_tensors_are_read_only_views_of_the_file(golden):
    tensors = torch_file.read(golden / "weights/crab/finetune_weights.bin")
    value = tensors[next(iter(tensors))]
    assert not value.flags.writeable and not value.flags.owndata


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", np.float64),
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
        ("ComplexFloatStorage", np.complex64),
        ("ComplexDoubleStorage", np.complex128),
    ],
)
def test_every_element_type(tmp_path, kind, dtype):
    values = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
    path = write(tmp_path / "a.pt", dictionary(x=tensor(kind, (2, 3), (3, 1))), _0=values.tobytes())
    read = torch_file.read(path)["x"]
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_element_types_without_a_storage_class(tmp_path):
    values = np.arange(4).astype(ml_dtypes.float8_e4m3fn)
    rebuilt = call(
        "torch._utils",
        "_rebuild_tensor_v3",
        storage("UntypedStorage", module="torch.storage"),
        b"K\x00",
        integers(4),
        integers(1),
        b"\x89",
        call("collections", "OrderedDict"),
        b"ctorch\nfloat8_e4m3fn\n",
    )
    read = torch_file.read(write(tmp_path / "a.pt", dictionary(x=rebuilt), _0=values.tobytes()))["x"]
    assert read.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(read, values)


def test_strided_views_share_a_storage(tmp_path):
    base = np.arange(12, dtype=np.float32)
    items = dictionary(
        transposed=tensor("FloatStorage", (4, 3), (1, 4)),
        tail=tensor("FloatStorage", (2,), (1,), 10),
        repeated=tensor("FloatStorage", (3, 2), (0, 1), 4),
        scalar=tensor("FloatStorage", (), (), 7),
        empty=tensor("FloatStorage", (0, 5), (5, 1)),
    )
    read = torch_file.read(write(tmp_path / "a.pt", items, _0=base.tobytes()))
    np.testing.assert_array_equal(read["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(read["tail"], base[10:])
    np.testing.assert_array_equal(read["repeated"], [[4, 5]] * 3)
    assert read["scalar"].shape == () and read["scalar"] == 7
    assert read["empty"].shape == (0, 5)


def test_nested_names_are_joined_and_parameters_unwrapped(tmp_path):
    x = tensor("FloatStorage", (2,), (1,))
    parameter = call("torch._utils", "_rebuild_parameter", x, b"\x88", call("collections", "OrderedDict"))
    pickled = dictionary(epoch=b"K\x03", state=dictionary(a=parameter, note=text("hi")), history=b"](" + x + b"K\x05e")
    read = torch_file.read(write(tmp_path / "a.pt", pickled, _0=np.ones(2, np.float32).tobytes()))
    assert list(read) == ["state.a", "history.0"]
    assert read.metadata == {"epoch": 3, "state": {"note": "hi"}, "history": [5]}


def test_a_state_dict_with_module_metadata(tmp_path):
    """`Module.state_dict()` is an OrderedDict with a `_metadata` attribute."""
    state = call("collections", "OrderedDict") + dictionary(_metadata=call("collections", "OrderedDict")) + b"b"
    state += b"(" + text("w") + tensor("FloatStorage", (1,), (1,)) + b"u"
    assert list(torch_file.read(write(tmp_path / "a.pt", state, _0=b"\0\0\0\0"))) == ["w"]


@pytest.mark.parametrize(
    ("module", "name", "argument"),
    [
        ("os", "system", "touch {}"),
        ("posix", "system", "touch {}"),
        ("builtins", "eval", "open({!r}, 'w')"),
        ("builtins", "exec", "open({!r}, 'w')"),
        ("pathlib", "Path", "{}"),
        ("torch.storage", "_load_from_bytes", "{}"),
        ("torch", "load", "{}"),
        ("torch.nn", "Module", "{}"),
        ("collections", "namedtuple", "{}"),
    ],
)
def test_code_is_refused_and_does_not_run(tmp_path, module, name, argument):
    victim = tmp_path / "victim"
    path = write(tmp_path / "evil.bin", dictionary(x=call(module, name, text(argument.format(str(victim))))))
    with pytest.raises(InputError) as caught:
        torch_file.read(path)
    assert not victim.exists()
    assert str(path) in str(caught.value)
    assert "archive/data.pkl" in str(caught.value) and f"{module}.{name}" in str(caught.value)


@pytest.mark.parametrize("state", [dictionary(_call=b"K\x01"), b"N" + dictionary(_call=b"K\x01") + b"\x86"])
def test_a_pickle_cannot_change_the_admitted_functions(tmp_path, state):
    path = write(tmp_path / "evil.bin", dictionary(x=b"ccollections\nOrderedDict\n" + state + b"b"))
    with pytest.raises(InputError, match="data.pkl"):
        torch_file.read(path)
    good = dictionary(x=tensor("FloatStorage", (1,), (1,)))
    assert torch_file.read(write(tmp_path / "good.bin", good, _0=b"\0\0\0\0"))["x"] == 0


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((3,), (1,), 0), ((2,), (1,), 1), ((2,), (-1,), 0), ((1,), (1,), -1), ((2, 2), (2**30, 1), 0)],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, shape, strides, offset):
    path = write(tmp_path / "a.pt", dictionary(x=tensor("FloatStorage", shape, strides, offset)), _0=bytes(8))
    with pytest.raises(InputError, match="data.pkl"):
        torch_file.read(path)


def test_a_missing_storage_is_named(tmp_path):
    path = write(tmp_path / "a.pt", dictionary(x=tensor("FloatStorage", (1,), (1,), key="7")))
    with pytest.raises(InputError, match="archive/data/7"):
        torch_file.read(path)


def test_a_compressed_storage_is_refused(tmp_path):
    items = dictionary(x=tensor("FloatStorage", (4,), (1,)))
    path = write(tmp_path / "a.pt", items, zipfile.ZIP_DEFLATED, _0=bytes(16))
    with pytest.raises(InputError, match="compressed"):
        torch_file.read(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_files_give_one_clear_error(golden, tmp_path, keep):
    whole = next((golden / "weights/beats").glob("*.pt")).read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(InputError, match="cut.pt"):
        torch_file.read(path)


def test_other_files_give_one_clear_error(tmp_path):
    (tmp_path / "legacy.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "list.bin", b"](K\x01e")
    write(tmp_path / "short.bin", b"}(")
    for name in ("absent.bin", "legacy.bin", "other.zip", "folder", "list.bin", "short.bin"):
        with pytest.raises(InputError, match=name):
            torch_file.read(tmp_path / name)


def test_safetensors_directories(tmp_path):
    first = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    second = {"c": np.arange(2)}
    save_file(first, tmp_path / "model.safetensors")
    whole = torch_file.read_model_dir(tmp_path)
    assert sorted(whole) == ["a", "b"] and whole["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(whole["a"], first["a"])

    save_file(second, tmp_path / "second.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "c": "second.safetensors"}}))
    sharded = torch_file.read_model_dir(tmp_path)
    assert sorted(sharded) == ["a", "c"]
    np.testing.assert_array_equal(sharded["c"], second["c"])


def test_damaged_safetensors_directories_are_refused(tmp_path):
    with pytest.raises(InputError, match="model.safetensors"):
        torch_file.read_model_dir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(InputError, match="model.safetensors"):
        torch_file.read_model_dir(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, problem in (({"z": "model.safetensors"}, "z"), ({"a": "gone.safetensors"}, "gone"), (3, "index")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=problem):
            torch_file.read_model_dir(tmp_path)


def test_a_flipped_bit_in_a_storage_is_found_by_the_checksum_of_its_record(golden, tmp_path):
    path = tmp_path / "w.bin"
    values = np.arange(64, dtype=np.float32).tobytes()
    tensors = dictionary(a=tensor("FloatStorage", (64,), (1,)), b=tensor("FloatStorage", (64,), (1,), key="1"))
    write(path, tensors, **{"0": values, "1": values})
    content = path.read_bytes()
    at = content.index(values)
    for place in (at, at + 100, at + len(values) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"data/0.*1 storages are damaged \(their CRC-32 differs\)"):
            torch_file.read(path)
    path.write_bytes(content)
    assert torch_file.read(path)["a"][63] == 63


def test_a_file_that_was_written_without_checksums_is_read_and_said(tmp_path, capsys):
    path = tmp_path / "w.bin"
    write(
        path,
        dictionary(a=tensor("FloatStorage", (2,), (1,)), b=tensor("FloatStorage", (2,), (1,), key="1")),
        **{"0": b"abcdefgh", "1": b"ijklmnop"},
    )
    content = path.read_bytes()
    for values in (b"abcdefgh", b"ijklmnop"):
        content = content.replace(zlib.crc32(values).to_bytes(4, "little"), bytes(4))
    path.write_bytes(content)
    assert len(torch_file.read(path)) == 2 and "was written without checksums" in capsys.readouterr().err


def shared_lists(depth: int) -> bytes:
    """A list of ten times the same list of ten times the same list, ..."""
    made = b"]q\x00"
    for level in range(depth):
        made += b"0]q" + bytes([level + 1]) + b"(" + (b"h" + bytes([level])) * 10 + b"e"
    return b"}X\x01\x00\x00\x00a" + made + b"s"


@pytest.mark.parametrize(
    ("pickled", "problem"),
    [
        (shared_lists(12), "more than 300,000 values"),
        (b"}r\xff\xff\xff\x7f", "place 2,147,483,647"),
        (b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00", "damaged"),
    ],
    ids=["shared lists", "LONG_BINPUT", "BINBYTES8"],
)
def test_what_a_pickle_asks_for_is_bounded(pickled, problem, tmp_path):
    write(tmp_path / "w.bin", pickled)
    began = time.monotonic()
    with pytest.raises(InputError, match=problem):
        torch_file.read(tmp_path / "w.bin")
    assert time.monotonic() - began < 20


def test_a_large_pickle_is_refused_before_it_is_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "w.bin", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w/data.pkl", "w", force_zip64=True) as f,
    ):
        for _ in range(64):
            f.write(bytes(2**20))
    with pytest.raises(InputError, match="67,108,864 bytes, more than 33,554,432"):
        torch_file.read(tmp_path / "w.bin")


@pytest.mark.parametrize("read", [torch_file.read, stored_tensors.read_safetensors])
def test_pipes_and_devices_are_no_files(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device"):
            read(tmp_path / name)
