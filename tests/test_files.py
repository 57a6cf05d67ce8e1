"""Files that only stand in for the one that was meant, and text in other encodings, are called what they are."""

import json
import shutil

import numpy as np
import pytest

from crab_jax.checkpoints.models import PACKED
from crab_jax.checkpoints.stored import stored_params
from crab_jax.convert import importing, released, torch_file
from crab_jax.evaluation import predictions
from crab_jax.evaluation.predictions import read_rows
from crab_jax.io import files, stored_tensors
from crab_jax.io.errors import InputError
from crab_jax.io.structured import read_json
from crab_jax.questions import read_samples
from crab_jax.runs import run_data
from crab_jax.runs.run_folder import load_config
from crab_jax.training import metrics_log
from data_pipelines import media
from data_pipelines.examples import read_jsonl
from data_pipelines.tokens import Tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4920739\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang=en><head><title>model.safetensors at main</title>"
STAND_INS = [
    (POINTER, "is a Git LFS pointer, not the file itself; run: git lfs pull"),
    (PAGE, "is a web page, not the"),
    (b"\xef\xbb\xbf<HTML>", "is a web page"),
]


def tokenizer_json(path):
    return Tokenizer.load(path)


def llama_directory(path):
    path.parent.mkdir(exist_ok=True)
    return Tokenizer.load(path.parent)


READERS = {
    "model.safetensors": stored_tensors.read_safetensors,
    "weights.bin": torch_file.read,
    "BEATs.pt": torch_file.read,
    PACKED: lambda path: stored_params(path.parent),
    "pytorch_model.bin": lambda path: torch_file.read_model_dir(path.parent),
    "rows.npz": importing.read_arrays,
    "tuned.safetensors": released.crab_source,
    "tuned.bin": released.crab_source,
    "config.json": lambda path: load_config(path.parent),
    "tokenizer.json": tokenizer_json,
    "tokenizer.model": llama_directory,
    "tokenizer_config.json": llama_directory,
    "predictions.jsonl": read_rows,
    "train.jsonl": read_jsonl,
    "model.safetensors.index.json": lambda path: torch_file.read_model_dir(path.parent),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("content", "said"), STAND_INS)
def test_what_was_not_fetched_is_called_that(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        READERS[name](path)
    assert name in str(error.value) and "damaged" not in str(error.value)


def test_pointers_are_told_from_files_that_speak_of_them():
    for content, pointer in (
        (POINTER, True),
        (POINTER.replace(b"\n", b"\r\n"), True),
        (b"", False),
        (b"version https://git", False),
        (b"x" + POINTER, False),
    ):
        assert bool(files.stand_in(content)) == pointer


@pytest.mark.parametrize(
    "content",
    [
        POINTER,
        PAGE,
        b"\xef\xbb\xbf<HTML>",
        b"\n<?xml version='1.0'?><!-- x --><html>",
        b"/annex/objects/MD5E-s1--x.mp4\n",
        b"<script>",
    ],
)
def test_what_was_not_fetched_is_called_the_same_whatever_was_wanted(tmp_path, content):
    """A config, a list, a film, a sound and a picture."""
    (tmp_path / "x").write_bytes(content)
    wanted = files.stand_in(content)[0]
    for read in (
        read_rows,
        lambda path: files.refuse_stand_in(path),
        media.read_picture,
        media.read_audio,
        media.video_size,
    ):
        with pytest.raises(InputError) as refused:
            read(tmp_path / "x")
        assert refused.value.problem == wanted


@pytest.mark.parametrize(
    "content", [b"not a model", b"", b"\x00" * 64, b"\x0a\x0f\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"]
)
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
TEXTS = {
    "train.jsonl": (read_jsonl, EXAMPLE),
    "samples.json": (read_samples, [{"task": "ave"}]),
    "config.json": (lambda path: load_config(path.parent), {"model": "tiny", "compat": "paper", "é": 1}),
    "any.json": (read_json, {"a": "é"}),
}


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
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "a.safetensors"}}), encoding="utf-8-sig"
    )
    assert torch_file.read_model_dir(tmp_path)["w"].tolist() == [1, 1]


LINES = b'{"step": 1, "index": 1, "id": "a"}\n{"step": 2, "index": 2, "id": "b"}\n'
TAILS = [
    b'{"step": 3, "ind',
    bytes(4096),
    b"\xff\xfe\x00garbage",
    b"\n\n\n",
    b"garbage\nmore\n",
    b'{"a": 1}\0\0\0\n',
    b"7\n",
    b"[" * 100_000,
    b'"half',
    b"\x00\n\x00\n",
]


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
def test_what_a_power_cut_leaves_at_the_end_of_a_log_is_cut_off(tail, tmp_path, capsys):
    path = tmp_path / "skipped.0.jsonl"
    path.write_bytes(LINES + tail)
    assert list(run_data.skipped_examples(tmp_path)) == [1, 2]
    files.cut_tail(path)
    assert path.read_bytes() == LINES
    assert (f"{path}: the last {len(tail):,} bytes" in capsys.readouterr().err) == bool(tail.strip())
    (tmp_path / "predictions.jsonl").write_bytes(LINES + tail)
    assert list(predictions.read_all(tmp_path)) == ["a", "b"]
    (tmp_path / "metrics.jsonl").write_bytes(LINES + tail)
    metrics_log.keep_until(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == LINES[: LINES.index(b"\n") + 1]


def test_a_line_without_its_end_is_ended_and_one_that_cannot_be_read_left_out(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[:-1])
    files.cut_tail(path)
    assert path.read_bytes() == LINES and not capsys.readouterr().err
    path.write_bytes(LINES.replace(b"\n", b"\n\0\0\0\n", 1))
    metrics_log.keep_until(path, 2)
    assert path.read_bytes() == LINES and "1 lines cannot be read" in capsys.readouterr().err
    path.write_bytes(bytes(100))
    files.cut_tail(path)
    assert path.read_bytes() == b""


def test_a_file_is_on_disk_with_its_folder_before_it_is_named(tmp_path, monkeypatch):
    done = []
    replace, fsync = files.Path.replace, files.os.fsync
    monkeypatch.setattr(files.Path, "replace", lambda self, to: (done.append("rename"), replace(self, to))[1])
    monkeypatch.setattr(files.os, "fsync", lambda number: (done.append("sync"), fsync(number))[1])
    files.write_whole(tmp_path / "manifest.json", "{}")
    assert done == ["sync", "rename", "sync"] and (tmp_path / "manifest.json").read_text() == "{}"


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole_or_left_as_it_was(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **options: object())
    folder = tmp_path / "model"
    for number in (1, 2):
        with files.replaced(folder) as new:
            (new / "params").mkdir()
            (new / "params" / "w").write_text(str(number))
            (new / "config.json").write_text(str(number))
        (folder / ".lock").write_text("mine")
    whole = tree(folder)
    assert whole == {"params/w": "2", "config.json": "2", ".lock": "mine"}
    with pytest.raises(KeyboardInterrupt), files.replaced(folder) as new:
        (new / "config.json").write_text("3")
        raise KeyboardInterrupt
    assert tree(folder) == whole and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_stands_alone_is_replaced_within(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os.path, "ismount", lambda path: True)
    folder = tmp_path / "volume"
    for number in (1, 2):
        with files.replaced(folder) as new:
            assert new.parent == folder
            (new / "params").mkdir()
            for name in ("params/w", "manifest.json"):
                (new / name).write_text(str(number))
    assert tree(folder) == {"params/w": "2", "manifest.json": "2"}
