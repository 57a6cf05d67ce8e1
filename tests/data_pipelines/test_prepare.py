"""A prepared root stands for the root it was made from: the same Examples, batches, errors and scores."""

import dataclasses
import io
import json
import logging
import os
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module
from pycocotools import mask as coco

from crab_jax import evaluate
from crab_jax.io.errors import InputError
from data_pipelines import batching, datasets, decoded, media, mixture, prepare, shards
from data_pipelines.batching import DataConfig
from data_pipelines.datasets import DATASETS, VARIANTS, read_examples
from data_pipelines.examples import TASK_NAMES, WINDOWS, Example, read_jsonl
from data_pipelines.shards import Decoding

CONFIG = DataConfig(image_size=16, video_frames=4, visual_queries=3, audio_queries=2, lengths=(256, 1024))
OPTIONS = ("--image-size", "16", "--video-frames", "4", "--workers", "0")


def run(root, out, *options):
    prepare.run(["--root", str(root), "--out", str(out), *OPTIONS, *options])
    return out


@pytest.fixture(scope="module")
def prepared(releases_root, tmp_path_factory):
    """The mini releases, prepared in small shards. Not to be changed."""
    return run(releases_root, tmp_path_factory.mktemp("prepared"), "--datasets", ",".join(DATASETS), "--shard-mb", "1")


@pytest.fixture
def ave(copied, tmp_path):
    """A root with AVE only, and an empty folder beside it."""
    return copied("ave"), tmp_path / "prepared"


def shards_in(root):
    """The shards that a reader would see, relative to the root."""
    return [str(path.relative_to(root)) for path in root.rglob("*-of-?????") if not path.name.startswith(".")]


def outcome(call):
    """What a call gives, or what it says is wrong."""
    try:
        return call()
    except InputError as error:
        return type(error), error.field, error.problem, error.fix


def same(a, b):
    """Whether two outcomes of `batching.load` are equal."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a == b
    return all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_examples_are_the_same_for_every_dataset_split_variant_and_choice_of_frames(releases_root, prepared):
    seen = 0
    for name, dataset in DATASETS.items():
        for split in datasets.SPLITS:
            for variant in VARIANTS if split in dataset.sizes else ():
                raw, ours = (list(datasets.records(root, name, split, variant)) for root in (releases_root, prepared))
                assert list(map(str, raw)) == list(map(str, ours)), (name, split, variant)
                seen += len(raw)
    assert seen > 500
    for options in (
        {"split": "train"},
        {"split": "train", "frames": "all"},
        {"split": "train", "epoch": 3, "seed": 1},
        {"split": "train", "epoch": None},
        {"split": "test", "variant": "quick"},
        {"split": "val", "datasets": ["valor", "lvis"], "missing": "skip"},
    ):
        assert read_examples(releases_root, **options) == read_examples(prepared, **options)


def test_arrays_of_every_dataset_are_the_same(releases_root, prepared, tokenizer):
    kinds, loaded, blind = set(), 0, dataclasses.replace(CONFIG, prompt_only=True, mute_audio=True, blank_video=True)
    for name, dataset in DATASETS.items():
        for split, variant in (("train", "train"), ("test", "test"), ("test", "quick")):
            found = list(datasets.records(prepared, name, split, variant)) if split in dataset.sizes else []
            chosen = [one for one in found[:: -max(1, len(found) // 2)] if isinstance(one, Example)]
            for number, example in enumerate(chosen):
                config = (CONFIG, blind)[number % 2]
                raw, ours = (
                    outcome(lambda root=root, e=example, c=config: batching.load(e, root, tokenizer, c))
                    for root in (releases_root, prepared)
                )
                assert same(raw, ours), (example.id, variant)
                loaded += isinstance(raw, dict)
                kinds.add((example.task, example.windows))
    assert {task for task, _ in kinds} == set(TASK_NAMES) and {windows for _, windows in kinds} == set(WINDOWS)
    assert loaded > 30


def test_batches_of_training_and_of_evaluation_are_the_same(releases_root, prepared, tokenizer):
    examples = read_examples(releases_root, "train", epoch=None)
    order = mixture.train_order(examples, tokenizer, CONFIG, batch_size=4, seed=3)
    streams = (
        iter(mixture.train_dataset(order, root, tokenizer, CONFIG, start=5)) for root in (releases_root, prepared)
    )
    for _, raw, ours in zip(range(3), *streams, strict=False):
        assert same(vars(raw), vars(ours))
    tested = read_examples(releases_root, "test", ["ave", "s4"])
    for (_, raw), (_, ours) in zip(
        *(mixture.eval_batches(tested, root, tokenizer, CONFIG, 3) for root in (releases_root, prepared)), strict=True
    ):
        assert same(vars(raw), vars(ours))


def test_masks_of_any_size_are_those_of_the_files(releases_root, prepared):
    for name in ("s4", "avss", "ref_avs", "lvis"):
        split = "val" if name == "lvis" else "test"
        example = next(e for e in read_examples(releases_root, split, [name]) if e.mask)
        for size in (16, 7, 300):
            raw, ours = (decoded.read_mask(root, example, size) for root in (releases_root, prepared))
            np.testing.assert_array_equal(raw, ours)


def test_evaluation_scores_and_draws_the_same(scenes_root, tmp_path):
    prepared = run(scenes_root, tmp_path / "prepared", "--splits", "test")
    assert read_examples(prepared, "test") == read_examples(scenes_root, "test") == read_jsonl(prepared / "test.jsonl")
    mask = {"size": [9, 9], "counts": coco.encode(np.asfortranarray(np.eye(9, dtype=np.uint8)))["counts"].decode()}
    rows = [
        {"id": example.id, "text": example.target, **({"mask": mask} if example.mask_kind == "binary" else {})}
        for example in read_examples(prepared, "test")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = []
    for root in (scenes_root, prepared):
        out = tmp_path / f"out{len(results)}"
        flags = [
            "--predictions",
            tmp_path / "answers.jsonl",
            "--data",
            root,
            "--out",
            out,
            "--tasks",
            "s4,ave",
            "--limit",
            2,
        ]
        evaluate.evaluate(evaluate.parse_arguments([*map(str, flags), "--examples", "1"]))
        results.append(json.loads((out / "results.json").read_text()))
        assert (out / "results.html").read_text().count("<img") >= 2
    assert results[0] == results[1]


def test_what_is_shown_many_times_is_stored_once(releases_root, prepared):
    questions = read_examples(releases_root, "train", ["avqa"])
    assert len({e.video for e in questions}) < len(questions)
    manifest = json.loads((prepared / "prepared.json").read_text())
    assert sorted(shard["file"] for shard in manifest["shards"]) == sorted(shards_in(prepared))
    places = np.fromfile(prepared / "index.bin", shards.PLACE)
    assert len(places) == len(np.unique(places["key"])) == manifest["records"]


def test_another_decoding_is_refused_by_name(prepared, tokenizer, caplog):
    for field, value in (("image_size", 8), ("video_frames", 5), ("pad_short_audio", True)):
        config = dataclasses.replace(CONFIG, on_error="skip", **{field: value})
        with pytest.raises(InputError, match=rf"\[{field}\]: was prepared with .*, but {value} is asked for"):
            next(mixture.eval_batches(read_examples(prepared, "test", ["ave"]), prepared, tokenizer, config, 2))
    assert "skipped" not in caplog.text


def test_what_was_not_prepared_is_named(ave, tokenizer):
    root, out = ave
    run(root, out, "--splits", "test", "--variants", "train")
    for options, message in (
        ({"split": "val", "datasets": ["ave"]}, r"\[datasets\]: was prepared without ave val"),
        ({"split": "test", "variant": "quick"}, r"\[variant\]: was prepared without quick"),
        ({"split": "test", "datasets": ["avqa"]}, "was prepared without avqa test"),
    ):
        with pytest.raises(InputError, match=message):
            read_examples(out, **options)
    other = dataclasses.replace(read_examples(out, "test")[0], video="ave/AVE/other.mp4")
    with pytest.raises(InputError, match=r"other.mp4 \(video\) is not among what was prepared"):
        batching.load(other, out, tokenizer, CONFIG)
    run(root, out, "--splits", "val", "--variants", "train")  # is added
    assert read_examples(out, "val") and read_examples(out, "test")
    for option, value, field in (("--image-size", "8", "image_size"), ("--variants", "test", "variants")):
        with pytest.raises(InputError, match=rf"\[{field}\]: was prepared with"):
            run(root, out, "--splits", "val", option, value)


def test_files_that_cannot_be_decoded_are_the_same_errors_and_skipped_alike(ave, tokenizer, caplog):
    root, out = ave
    (first, *_) = examples = read_examples(root, "train")
    damaged = root / first.video
    whole = damaged.read_bytes()
    damaged.unlink()  # it is a link to the shared release
    damaged.write_bytes(whole[: len(whole) // 2])
    run(root, out, "--splits", "train")
    raw, ours = (outcome(lambda root=root: batching.load(first, root, tokenizer, CONFIG)) for root in (root, out))
    assert raw == ours and "damaged" in raw[2]
    config = dataclasses.replace(CONFIG, on_error="skip")
    with caplog.at_level(logging.ERROR):
        raw, ours = (
            [batch for _, batch in mixture.eval_batches(examples, root, tokenizer, config, 2)] for root in (root, out)
        )
    assert len(raw) == len(ours) and all(same(vars(a), vars(b)) for a, b in zip(raw, ours, strict=True))


def test_a_stopped_run_goes_on_and_leaves_no_half_shard(copied, tmp_path, monkeypatch):
    root, out, whole = copied("ave", "avsbench_semantic"), tmp_path / "out", tmp_path / "whole"
    options = ("--splits", "train", "--shard-mb", "1")
    monkeypatch.setattr(prepare, "_bytes_of", lambda medium, decoding: 400_000)  # two media a shard
    run(root, whole, *options)
    decode, calls = prepare.record_of, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(prepare, "record_of", dies)
    with pytest.raises(KeyboardInterrupt):
        run(root, out, *options)
    visible = shards_in(out)
    assert len(visible) == 6 and all((out / name).read_bytes() == (whole / name).read_bytes() for name in visible)
    with pytest.raises(InputError, match="is not completely prepared; run prepare again"):
        read_examples(out, "train")

    calls.clear()
    monkeypatch.setattr(prepare, "record_of", lambda *a: calls.append(a) or decode(*a))
    run(root, out, *options)
    total = json.loads((whole / "prepared.json").read_text())["records"]
    assert len(calls) == total - sum(json.loads((out / f"{name}.json").read_text())["records"] for name in visible)
    files = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in files)

    calls.clear()  # a changed source is decoded again, and nothing else of another shard
    source = root / read_examples(whole, "train", ["ave"])[0].video
    content = source.read_bytes()
    source.unlink()
    source.write_bytes(content)
    os.utime(source, (1, 1))
    run(root, out, *options)
    assert 2 <= len(calls) <= 4


def test_a_damaged_shard_is_named_and_made_anew(ave, tokenizer):
    root, out = ave
    run(root, out, "--splits", "test")
    (shard,) = (out / name for name in shards_in(out) if name.startswith("frames/"))
    example, content = read_examples(out, "test")[0], shard.read_bytes()
    shard.write_bytes(content[:-100])
    os.utime(out / "prepared.json", (2, 2))  # as after a copy; an open root is not looked at again
    with pytest.raises(InputError, match=rf"{shard.name}: holds .* bytes; the shard is damaged; run prepare again"):
        read_examples(out, "test")
    shard.write_bytes(content[:300] + bytes(64) + content[364:])
    os.utime(out / "prepared.json", (3, 3))
    with pytest.raises(InputError, match=rf"{shard.name}: record \d+ cannot be read; the shard is damaged"):
        for other in read_examples(out, "test"):
            batching.load(other, out, tokenizer, CONFIG)
    run(root, out, "--splits", "test")
    os.utime(out / "prepared.json", (4, 4))
    assert shard.read_bytes() == content
    assert same(*(batching.load(example, one, tokenizer, CONFIG) for one in (root, out)))


def test_records_are_read_from_their_places_as_array_record_reads_them(tmp_path):
    """Sizes around those of a block; and any changed byte is noticed."""
    generator, sizes = np.random.default_rng(0), [1, 100, 60_000, 65_300, *range(65_400, 65_560, 24), 400_000, 7]
    records = [shards.encode({"path": f"{n}", "x": generator.bytes(size)}) for n, size in enumerate(sizes * 4)]
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "shard"), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    written = [(record[: prepare._HEAD], len(record), shards.checksum(record)) for record in records]
    places = prepare._locate(tmp_path / "shard", written)
    direct = [place for place in places if place[0]]
    assert len(direct) > 0.8 * len(records)
    with io.FileIO(tmp_path / "shard") as file:
        read = [bytes(shards.read_at(file, at, length)) if at else None for at, length, _ in places]
    assert all(one in (None, record) for one, record in zip(read, records, strict=True))
    content = bytearray((tmp_path / "shard").read_bytes())
    for at, _, _ in direct:
        content[at + 5] ^= 1
    (tmp_path / "shard").write_bytes(content)
    with io.FileIO(tmp_path / "shard") as file:
        assert all(shards.checksum(shards.read_at(file, at, length)) != total for at, length, total in direct)


def test_compressed_pictures_are_the_same(ave, tokenizer):
    root, out = ave
    for folder, options in ((out, ()), (out.with_name("small"), ("--compress",))):
        run(root, folder, "--splits", "test", *options)
    as_they_are = [np.fromfile(one / "index.bin", shards.PLACE)["at"] > 0 for one in (out, out.with_name("small"))]
    assert as_they_are[0].all() and as_they_are[1].sum() == len(as_they_are[1]) // 2  # the sounds
    for example in read_examples(out, "test"):
        assert same(*(batching.load(example, one, tokenizer, CONFIG) for one in (out, out.with_name("small"))))
    with pytest.raises(InputError, match=r"\[compress\]: was prepared with False, not True"):
        run(root, out, "--splits", "val", "--compress")


def test_tfds_reads_the_shards(prepared, releases_root):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(prepared / "frames"))
    source = builder.as_data_source("ave_train")
    record = source[0]
    path = record["path"].decode()
    assert record["detail"] == b"video" and record["bytes"] == (releases_root / path).stat().st_size
    np.testing.assert_array_equal(record["pixels"], media.read_video(releases_root / path, 4, 16))
    sounds = tfds.builder_from_directory(str(prepared / "sounds")).as_data_source("ave_train")
    assert sounds[0]["fbank"].shape == (980, 128) and len(sounds) == len(source)


def test_processes_write_what_one_process_does(ave, tmp_path):
    root, out = ave
    run(root, tmp_path / "two", "--splits", "val", "--workers", "2")
    run(root, out, "--splits", "val")
    ours, theirs = (json.loads((one / "prepared.json").read_text())["shards"] for one in (out, tmp_path / "two"))
    assert ours == theirs


def test_bad_command_lines(ave, tmp_path):
    root, out = ave
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    shutil.copytree(root / "ave", tmp_path / "of" / "ave")
    for arguments, message in (
        (["--root", str(root / "no"), "--out", str(out)], "no.*--root.*is no folder"),
        (["--root", str(root), "--out", str(tmp_path / "full")], "holds something that prepare did not write"),
        (["--root", str(root), "--out", str(out), "--variants", "x"], "unknown variant 'x'"),
        (["--root", str(root), "--out", str(out), "--image-size", "0"], "--image-size.*a whole number from 1"),
        (["--root", str(root), "--out", str(out), "--splits", "no"], "holds none of no"),
    ):
        with pytest.raises(InputError, match=message):
            prepare.run(arguments)
    run(root, out, "--splits", "val")
    with pytest.raises(InputError, match="is prepared already"):
        run(out, tmp_path / "again")


def test_records_are_taken_apart_as_they_were_put_together():
    record = {"a": "ä", "n": 3 << 40, "zero": 0, "empty": b"", "x": bytes(range(256)) * 300}
    found = shards.decode(shards.encode(record))
    assert found["n"] == 3 << 40 and found["zero"] == 0
    assert [bytes(found[k]) for k in ("a", "empty", "x")] == ["ä".encode(), b"", record["x"]]
    for cut in (b"", b"\n", shards.encode(record)[:-1], b"\x08\x01"):
        with pytest.raises((ValueError, IndexError, KeyError)):
            shards.decode(cut)
    assert shards.Medium("frames", "a", "b").key() != shards.Medium("frames", "ab", "").key()
    assert Decoding(1, 2, False)._asdict() == {
        "image_size": 1,
        "video_frames": 2,
        "pad_short_audio": False,
        "clock": "shown",
    }
