"""Files that only stand in for the one that was meant, and text in other encodings, are called what they are."""

import json
import shutil

import numpy as np
import pytest

from crab_jax import files
from crab_jax.checkpoints import PACKED, stored_params
from crab_jax.convert import importing, released, torch_file
from crab_jax.errors import InputError
from crab_jax.predictions import read_rows
from crab_jax.request import read_samples
from crab_jax.runs import load_config
from crab_jax.structured import read_json
from data_pipelines.examples import read_jsonl
from data_pipelines.tokens import Tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4920739\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang=en><head><title>model.safetensors at main</title>"
STAND_INS = [(POINTER, "is a Git LFS pointer, not the file itself; run: git lfs pull"),
             (PAGE, "is a web page, not the"), (b"\xef\xbb\xbf<HTML>", "is a web page")]


def tokenizer_json(path):
    return Tokenizer.load(path)


def llama_directory(path):
    path.parent.mkdir(exist_ok=True)
    return Tokenizer.load(path.parent)


READERS = {
    "model.safetensors": torch_file.read_safetensors, "weights.bin": torch_file.read, "BEATs.pt": torch_file.read,
    PACKED: lambda path: stored_params(path.parent),
    "pytorch_model.bin": lambda path: torch_file.read_model_dir(path.parent),
    "rows.npz": importing.read_arrays, "tuned.safetensors": released.crab_source, "tuned.bin": released.crab_source,
    "config.json": lambda path: load_config(path.parent), "tokenizer.json": tokenizer_json,
    "tokenizer.model": llama_directory, "tokenizer_config.json": llama_directory,
    "predictions.jsonl": read_rows, "train.jsonl": read_jsonl,
    "model.safetensors.index.json": lambda path: torch_file.read_model_dir(path.parent)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("content", "said"), STAND_INS)
def test_what_was_not_fetched_is_called_that(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        READERS[name](path)
    assert name in str(error.value) and "damaged" not in str(error.value)


def test_pointers_are_told_from_files_that_speak_of_them(tmp_path):
    for content, pointer in ((POINTER, True), (b"", False), (b"version https://git", False), (b"x" + POINTER, False)):
        (tmp_path / "f").write_bytes(content)
        assert files.git_lfs_pointer(tmp_path / "f") == pointer


@pytest.mark.parametrize("content", [b"not a model", b"", b"\x00" * 64,
                                     b"\x0a\x0f\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"])
def test_a_tokenizer_model_that_is_none_is_named_in_one_line(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.model.*cannot be read") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", ["false", 0, 1, "", []])
def test_a_legacy_flag_that_is_no_flag_is_refused(golden, legacy, tmp_path):
    shutil.copy(golden / "weights/llama/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
    with pytest.raises(InputError, match="legacy"):
        Tokenizer.load(tmp_path)


EXAMPLE = {"id": "é", "task": "avqa", "instruction": "?"}
TEXTS = {"train.jsonl": (read_jsonl, EXAMPLE), "samples.json": (read_samples, [{"task": "ave"}]),
         "config.json": (lambda path: load_config(path.parent), {"model": "tiny", "compat": "paper", "é": 1}),
         "any.json": (read_json, {"a": "é"})}


@pytest.mark.parametrize("name", TEXTS)
def test_a_byte_order_mark_is_read_and_other_encodings_are_named(name, tmp_path):
    read, content = TEXTS[name]
    path, text = tmp_path / name, json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8-sig")
    marked = read(path)
    path.write_text(text, encoding="utf-8")
    assert read(path) == marked
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        path.write_text(text if encoding != "latin-1" else '{"a": "é"}', encoding=encoding)
        with pytest.raises(InputError):
            read(path)


def test_weights_with_a_byte_order_mark_in_their_index_are_read(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}),
                                                           encoding="utf-8-sig")
    assert torch_file.read_model_dir(tmp_path)["w"].tolist() == [1, 1]
