"""Clips that one dataset has in train and another in val or test: named, counted, and left out when asked."""

import logging
from collections import Counter

import numpy as np
import pytest
import releases
from test_annotations import SAME, rows_of

from configs import tiny
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from data_pipelines.batching import DataConfig, load
from data_pipelines.datasets import read, read_examples
from data_pipelines.examples import TASK_NAMES, Example, write_jsonl
from data_pipelines.leaks import Clip, clip_of, held_out, leak_problems, leaks_of, without
from data_pipelines.prepare import main as prepare
from data_pipelines.status import status
from data_pipelines.validate import validate

ID = "RUhOCu3LNXM"  # in train of AVE


def example(named=None, **fields):
    """An Example whose meta has `video`, or none."""
    meta = {"meta": {"video": named}} if named is not None else {}
    return Example(**{"id": "x", "task": "ave", "instruction": "", **meta, **fields})


@pytest.mark.parametrize(
    ("dataset", "video", "clip"),
    [
        ("ave", ID, Clip(ID)),
        ("ave", "ab-c_10_200", Clip("ab-c_10_200")),  # an id as it comes
        ("valor", f"{ID}_30.000_40.000", Clip(ID, (30, 40))),
        ("valor", ID, Clip(ID)),
        ("avss", f"{ID}_1000_11000", Clip(ID, (1, 11))),
        ("ref_avs", f"{ID}_14000_24000", Clip(ID, (14, 24))),
        ("s4", f"{ID}_0_5000", Clip(ID)),
        ("arig", f"{ID}_0_5000", Clip(ID)),
        ("s4_object", ID, Clip(ID)),
        ("ms3", f"{ID}_36", Clip(ID)),
        ("ms3", ID, Clip(ID)),
        ("ms3_object", f"{ID}_1", Clip(ID)),
        ("ms3_object", "baby_dog_2_1", Clip("baby_dog_2_1")),
        ("avqa", "00000093", Clip("00000093")),
        ("own", f"{ID}_30_40", Clip(ID, (30, 40))),
        ("own", f"{ID}_000030", Clip(ID, (30, 40))),
        ("own", f"a film [{ID}].mp4", Clip(ID)),
        ("own", f"clips/{ID}.mp4", Clip(ID)),
        ("own", "my clip", Clip("my clip")),
        ("lvis", "155379", None),
    ],
)
def test_what_a_name_tells_of_the_clip(dataset, video, clip):
    assert clip_of(example(video), dataset) == clip


def test_a_clip_of_llp_or_audiocaps_is_that_of_its_row(releases_root):
    assert clip_of(read(releases_root, "avvp", "test")[0], "avvp") == Clip("KSRjje7GH44", (60, 70))
    assert clip_of(read(releases_root, "avvp", "train")[2], "avvp") == Clip("AP0061o0Nvk", (101.8, 111.8))
    assert clip_of(read(releases_root, "audiocaps", "train")[0], "audiocaps") == Clip("r1nicOVtvkQ", (130, 140))
    assert clip_of(example(audio=f"a/{ID}_10_20.wav"), "own") == Clip(ID, (10, 20))


@pytest.fixture
def shared(copied):
    """AVE's train shares a clip with LLP's test; VALOR's train a clip with Ref-AVS's val, and only a video with it."""
    root = copied("ave", "llp", "valor", "ref_avs", "music_avqa", "own")
    for kind in ("AVVP_test_pd", "AVVP_eval_audio", "AVVP_eval_visual"):
        file = root / f"llp/data/{kind}.csv"
        releases.text(file, file.read_text().replace("KSRjje7GH44_60_70", f"{ID}_60_70"))
    releases.copy(root / "llp/data/LLP_dataset/video/KSRjje7GH44.mp4", root / f"llp/data/LLP_dataset/video/{ID}.mp4")
    renamed = {
        "x-2Abohj8VY_30.000_40.000": "--KCIeTv6PM_15.000_25.000",
        "0_3-a_bcdef_0.000_7.000": "MDyjY3uiWp0_0.000_7.000",
    }
    file = root / "valor/desc_train.json"
    text = file.read_text()
    for old, new in renamed.items():
        text = text.replace(old, new)
        (root / f"valor/video_data/{old}.mp4").rename(root / f"valor/video_data/{new}.mp4")
    releases.text(file, text)
    return root


def config_of(root, **data):
    config = tiny.get_config()
    config.data.root, config.data.batch_size, config.data.lengths = str(root), 1, (2048,)
    config.data.weights = dict.fromkeys(TASK_NAMES, 1.0)
    config.data.update(data)
    return config


def test_training_says_them_or_leaves_them_out(shared, caplog):
    config = config_of(shared)
    tokenizer = run_folder.tokenizer_of(resolve(config))
    assert config.data.exclude_leaks is False
    every = run_data.train_order(resolve(config), tokenizer).examples
    (line,) = (r.getMessage() for r in caplog.records if "elsewhere" in r.getMessage())
    assert "2 clips (2 examples) of train are in val or test elsewhere: ave in avvp 1, valor in ref_avs 1 (2 " in line
    assert "--config.data.exclude_leaks=true leaves them out" in line and "\n" not in line
    assert [e.id for e in every] == [e.id for e in read_examples(shared, "train", epoch=None)]

    caplog.clear()
    config.data.exclude_leaks = True
    kept = run_data.train_order(resolve(config), tokenizer).examples
    (line,) = (r.getMessage() for r in caplog.records if "elsewhere" in r.getMessage())
    assert "they are left out (data.exclude_leaks)" in line
    assert [e.id for e in every if e not in kept] == [f"ave-{ID}-0", "valor---KCIeTv6PM_15.000_25.000"]


def test_it_is_the_whole_root_that_counts_not_what_is_trained_on(shared):
    config = config_of(shared, datasets="ave", exclude_leaks=True)
    order = run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))
    assert ID not in {e.meta["video"] for e in order.examples} and len(order.examples) == 4


def test_a_root_without_leaks_says_nothing(copied, caplog):
    root = copied("ave", "valor", "music_avqa")  # AVE and MUSIC-AVQA share clips with their own test, as released
    config = config_of(root, exclude_leaks=True)
    with caplog.at_level(logging.WARNING):
        order = run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))
    assert list(order.examples) == read_examples(root, "train") and not caplog.records
    assert leak_problems(root) == []


def test_validate_reports_them_over_all_datasets(shared):
    counts, problems = validate(shared, workers=1)
    found = [(p.dataset, p.split, p.problem) for p in problems if "val or test of" in p.problem]
    assert found == [
        (
            "ave",
            "train",
            "warning: 1 clips are in val or test of avvp too (1 by video); data.exclude_leaks=true leaves "
            "them out of training",
        ),
        (
            "valor",
            "train",
            "warning: 1 clips are in val or test of ref_avs too (2 by video); data.exclude_leaks=true "
            "leaves them out of training",
        ),
        ("ave", "train", "warning: its clip is in val or test of avvp too"),
        ("valor", "train", "warning: its clip is in val or test of ref_avs too"),
    ]
    assert {p.id for p in problems if "its clip is in val or test of" in p.problem} == {
        f"ave-{ID}-0",
        "valor---KCIeTv6PM_15.000_25.000",
    }
    assert leak_problems(shared, ["ave", "valor"]) == []  # neither is in the other


def test_a_prepared_root_has_the_same_leaks(shared, tmp_path, caplog):
    out = tmp_path / "prepared"
    with pytest.raises(SystemExit, match="0"):
        prepare(
            [
                "--root",
                str(shared),
                "--out",
                str(out),
                "--datasets",
                "ave,avvp",
                "--variants",
                "train",
                "--image-size",
                "16",
                "--workers",
                "1",
            ]
        )
    assert [p.problem for p in leak_problems(out)] == [p.problem for p in leak_problems(shared, ["ave", "avvp"])] != []
    config = config_of(out, exclude_leaks=True)
    order = run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))
    assert ID not in {e.meta["video"] for e in order.examples} and len(order.examples) == 4


def test_own_data_take_part_by_name(shared, tmp_path):
    examples = [
        example(f"{ID}_60_70", id="in LLP"),
        example(f"{ID}_0_10", id="elsewhere in it"),
        example(None, id="by its file", video=f"media/{ID}.mp4"),
        example("mine", id="free"),
    ]
    write_jsonl(shared / "own/train.jsonl", examples)
    held = held_out(shared)
    found = {e.id: [(leak.other, leak.same) for leak in leaks_of(e, held, "own")] for e in examples}
    assert found == {
        "in LLP": [("avvp", True)],
        "elsewhere in it": [("avvp", False)],
        "by its file": [("avvp", True)],
        "free": [],
    }

    for split, names in (("train", ("a", "b")), ("test", ("b", "c"))):  # lists: train with its own test
        write_jsonl(
            tmp_path / f"{split}.jsonl",
            [example(f"show {name}", id=f"{split} {name}", target="x", task="avcap", windows="none") for name in names],
        )
    kept, line = without(read_examples(tmp_path, "train"), tmp_path, "train", True)
    assert [e.id for e in kept] == ["train a"] and "1 clips (1 examples)" in line
    for split in ("train", "test"):  # two files of one name are two clips
        write_jsonl(tmp_path / f"{split}.jsonl", [example(id="x", video=f"{split}/recording_1.mp4")])
    assert without(read_examples(tmp_path, "train"), tmp_path, "train", True)[1] == ""


def test_lists_made_from_releases_remember_them(shared, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", read(shared, "ave", "train"))
    write_jsonl(tmp_path / "test.jsonl", [*read(shared, "avvp", "test"), *read(shared, "ave", "test")])
    kept, line = without(read_examples(tmp_path, "train"), tmp_path, "train", True)
    assert len(kept) == 4 and "ave in avvp 1;" in line  # and none of AVE's own


def test_annotations_that_cannot_be_read_are_said(shared):
    file = shared / "llp/data/AVVP_test_pd.csv"
    file.unlink()
    file.write_bytes(b"\xff\xfe")
    kept, line = without(read_examples(shared, "train"), shared, "train", True)
    assert "1 annotation files could not be read for this, the first: " in line and "AVVP_test_pd.csv" in line


# (file, columns, delimiter, how it is saved again, what of a row is damaged)
AGAIN = [
    (
        "ave/trainSet.txt",
        ("Category", "VideoID", "Quality", "StartTime", "EndTime"),
        "&",
        "semicolons",
        ("good;7;10", "good;7;11"),
    ),
    ("llp/data/AVVP_train.csv", ("filename", "event_labels"), "\t", "an index column", ("Speech,Dog", "nan")),
    (
        "avsbench_semantic/metadata.csv",
        ("uid", "a_obj", "split", "label"),
        ",",
        "every field quoted",
        ('"jlhuZfcw61w', '"","nan","0","0","dog","train","v1m"\n"jlhuZfcw61w'),
    ),
    (
        "ref_avs/metadata.csv",
        ("vid", "uid", "split", "fid", "exp"),
        ",",
        "another order",
        ("The object making the longest sound duration.", "nan"),
    ),
]


def test_all_choices_at_once_are_the_same_data_raw_and_prepared(shared, copied, tmp_path_factory, tokenizer, caplog):
    """Tables that other programs saved again, each with a damaged row, clips that are missing, cut off or held out by
    another dataset, all pictures of a clip: the same Examples, counts and arrays from the files and from shards."""
    root, out = copied("avsbench_semantic"), tmp_path_factory.mktemp("prepared")
    for name, columns, delimiter, change, (old, new) in AGAIN:
        text = SAME[change](rows_of(root / name, columns, delimiter), delimiter)
        assert text.count(old) >= 1, name
        releases.text(root / name, text.replace(old, new, 1))
    cut = root / read(root, "ms3", "train", malformed="skip")[0].audio
    (root / read(root, "valor", "train")[-1].video).unlink()
    content = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(content[: len(content) // 2])
    names = "ave,avvp,s4,ms3,avss,ref_avs,valor"
    with pytest.raises(SystemExit, match="0"):
        prepare(["--root", str(root), "--out", str(out), "--datasets", names, "--image-size", "16", "--workers", "1"])

    found, left = {}, {}
    for place in (root, out):
        config = resolve(config_of(place, datasets=names, on_error="skip", exclude_leaks=True, frames="all"))
        found[place] = list(run_data.train_examples(config, tmp_path_factory.mktemp("run") / "skipped.0.jsonl"))
        rows = []
        run_data.read_examples(place, "train", datasets=names.split(","), missing="skip", malformed="skip", left=rows)
        left[place] = [(one.dataset, one.error.field, one.error.problem) for one in rows]
    raw, ours = found[root], found[out]
    assert raw == ours and left[root] == left[out] and len(left[root]) >= 5
    per_clip = Counter((e.task, e.id.rpartition("-")[0]) for e in raw if e.task in ("avss", "ref-avs"))
    assert set(per_clip.values()) == {10}  # all pictures
    assert caplog.text.count("they are left out (data.exclude_leaks)") == 2
    assert {e.task for e in raw} >= {"ave", "s4", "ms3", "avss", "ref-avs"}  # LLP's train has weak labels
    assert [(c.dataset, c.split, c.annotated, c.malformed) for c in status(root, names.split(","))[0]] == [
        (c.dataset, c.split, c.annotated, c.malformed) for c in status(out, names.split(","))[0]
    ]
    decoding, loaded, refused = DataConfig(image_size=16, visual_queries=3, audio_queries=2, lengths=(1024,)), 0, 0
    for one in raw[::2]:
        outcomes = []
        for place in (root, out):
            try:
                outcomes.append(load(one, place, tokenizer, decoding))
            except InputError as error:
                outcomes.append(error.problem)
        assert type(outcomes[0]) is type(outcomes[1])
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]
            refused += 1
            continue
        assert all(np.array_equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
        loaded += 1
    assert loaded > 10 and 0 < refused < loaded, (loaded, refused)
