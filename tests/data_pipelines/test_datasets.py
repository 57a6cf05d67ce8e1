"""The Examples of a data root: JSONL or raw, which datasets, one picture of a clip per epoch, partial copies."""

import collections
import dataclasses
import shutil

import pytest

from configs import tiny
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from data_pipelines.datasets import DATASETS, choose, one_frame_each, read, read_examples
from data_pipelines.examples import TASK_NAMES, Example, choice, digest, read_jsonl, write_jsonl
from data_pipelines.mixture import train_order

JOINT = ["ave", "avvp", "avqa", "arig", "s4", "ms3", "avss", "ref_avs", "valor"]


def of(examples):
    return collections.Counter(example.meta["dataset"] for example in examples)


def test_a_raw_root_gives_the_datasets_of_the_joint_stage(releases_root):
    test = read_examples(releases_root, "test")
    assert list(of(test)) == JOINT
    assert of(test) == collections.Counter({name: len(read(releases_root, name, "test")) for name in JOINT})
    assert {example.task for example in test} == set(TASK_NAMES)
    assert len({example.id for example in test}) == len(test)


def test_datasets_can_be_named(releases_root):
    examples = read_examples(releases_root, "train", ["audiocaps", "lvis"])
    assert set(of(examples)) == {"audiocaps", "lvis"}
    assert choose(releases_root, ["ave", "video_llava"], "test") == ["ave"]  # the other has no such split
    with pytest.raises(InputError, match="avee.*unknown dataset"):
        read_examples(releases_root, "train", ["avee"])
    with pytest.raises(InputError, match="no dataset has a split 'test'"):
        read_examples(releases_root, "test", ["video_llava"])


def test_a_root_with_a_file_of_the_split_is_read_as_before(releases_root, tmp_path):
    written = [Example(id=f"{i}", task="ave", instruction="<video>", video="no.mp4", meta={"a": 1}) for i in range(3)]
    write_jsonl(tmp_path / "test.jsonl", written)
    shutil.copytree(releases_root / "ave", tmp_path / "ave")
    assert read_examples(tmp_path, "test") == read_jsonl(tmp_path / "test.jsonl") == written
    assert set(of(read_examples(tmp_path, "train"))) == {"ave"}
    write_jsonl(tmp_path / "test.jsonl", [*written, written[0]])
    with pytest.raises(InputError, match=r"test.jsonl:4 \[id\]: duplicate id '0'"):
        read_examples(tmp_path, "test")
    write_jsonl(tmp_path / "test.jsonl", [dataclasses.replace(written[0], video="/etc/passwd")])
    with pytest.raises(InputError, match=r"test.jsonl:1 \[video\]: the path '/etc/passwd' leaves the data root"):
        read_examples(tmp_path, "test")


def test_a_root_with_nothing_says_so(tmp_path):
    with pytest.raises(InputError, match="train.jsonl.*holds no dataset"):
        read_examples(tmp_path, "train")
    for options, message in (
        ({"frames": "two"}, "one or all"),
        ({"variant": "x"}, "train, test, quick"),
        ({"missing": "x"}, "raise or skip"),
    ):
        (tmp_path / "ave").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            read_examples(tmp_path, "train", **options)


def test_weak_labels_are_left_out_of_training_aloud(releases_root, caplog):
    train = read_examples(releases_root, "train")
    assert "avvp" not in of(train) and "{'avvp': 3}" in caplog.text
    assert all(example.target for example in train)
    assert of(read_examples(releases_root, "test"))["avvp"] == 4


def test_partial_copies_are_read_only_on_request(copied, caplog):
    root = copied("ave", "valor")
    (root / "ave/AVE/RUhOCu3LNXM.mp4").unlink()
    (root / "valor/desc_train.json").unlink()
    with pytest.raises(InputError, match=r"trainSet.txt:1 \[video\]: ave/AVE/RUhOCu3LNXM.mp4 is missing"):
        read_examples(root, "train")
    examples = read_examples(root, "train", missing="skip")
    assert of(examples) == {"ave": 4}
    assert "ave train: 1 of 5 examples are left out" in caplog.text and "valor train is left out" in caplog.text
    with pytest.raises(InputError, match="desc_train.json.*no such annotation file"):
        read_examples(root, "train", ["valor"], missing="skip")  # it was asked for


def test_the_digest_is_of_all_that_is_asked(releases_root):
    digests = [digest(read_examples(releases_root, "test", ["avss"], variant)) for variant in ("train", "test", "test")]
    assert digests[0] != digests[1] == digests[2] != digest([])


@pytest.mark.parametrize("name", ["avss", "ref_avs"])
def test_one_picture_of_a_clip_per_epoch(releases_root, name):
    every = read_examples(releases_root, "train", [name], frames="all")
    assert len(every) == {"avss": 10, "ref_avs": 20}[name] and not any("one_of" in e.meta for e in every)
    epochs = [read_examples(releases_root, "train", [name], epoch=epoch) for epoch in range(12)]
    assert all(len(epoch) == len(every) // 10 for epoch in epochs)
    assert epochs[3] == read_examples(releases_root, "train", [name], epoch=3)  # in whatever process
    assert len({epoch[0].second for epoch in epochs}) > 3
    assert epochs != [read_examples(releases_root, "train", [name], seed=1, epoch=epoch) for epoch in range(12)]
    assert all(example in every for epoch in epochs for example in epoch)
    assert read_examples(releases_root, "test", [name]) == read_examples(releases_root, "test", [name], frames="all")


def test_the_choice_is_even_and_independent_of_the_other_clips():
    counts = collections.Counter(choice(f"clip {clip}", 10, 0, epoch) for clip in range(60) for epoch in range(50))
    assert sum((counts[k] - 300) ** 2 / 300 for k in range(10)) < 27.9  # chi squared at one in a thousand
    clip = [Example(str(k), "avss", "", second=k, meta={"one_of": "a"}) for k in range(10)]
    other = [dataclasses.replace(e, id=f"b{e.id}", meta={"one_of": "b"}) for e in clip]
    alone, beside = one_frame_each(clip, 5, 2), one_frame_each(other + clip, 5, 2)
    assert beside[1] == alone[0]


def test_the_mixture_takes_one_picture_of_each_clip_in_every_epoch(tokenizer, config):
    picture = Example("", "s4", "See <image>", target="a dog", windows="none")
    clips = [
        dataclasses.replace(picture, id=f"{clip}-{k}", image=f"{k}.png", meta={"one_of": f"clip {clip}"})
        for clip in range(3)
        for k in range(5)
    ]
    single = [dataclasses.replace(picture, id=f"single {k}", image=f"{k}.png") for k in range(3)]
    examples = clips + single
    order = train_order(examples, tokenizer, config, 3, seed=4)
    seen = [examples[i] for number in range(16) for i in order.batches[number]]
    for epoch in range(8):
        taken = seen[6 * epoch : 6 * epoch + 6]
        wanted = one_frame_each(examples, 4, epoch)
        assert sorted(e.id for e in taken) == sorted(e.id for e in wanted)
    assert len({e.id for e in seen}) > 3 + 9  # other pictures in other epochs


def test_a_run_reads_a_raw_root_in_natural_proportions(releases_root):
    config = tiny.get_config()
    config.data.root, config.data.batch_size, config.data.lengths = str(releases_root), 1, (2048,)
    config.data.weights = dict.fromkeys(TASK_NAMES, 1.0)
    order = run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))
    drawn = collections.Counter(order.examples[int(order.batches[step][0])].meta["dataset"] for step in range(400))
    per_epoch = of(read_examples(releases_root, "train"))  # one picture of a clip of AVSS and Ref-AVS
    for name, count in per_epoch.items():
        assert abs(drawn[name] / 400 - count / per_epoch.total()) < 0.04, name
    config.data.datasets, config.data.frames = "avss", "all"
    order = run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))
    assert sorted(order.examples[int(order.batches[step][0])].second for step in range(10)) == list(range(10))


def test_sizes_name_the_splits_of_the_paper():
    assert {name for name, dataset in DATASETS.items() if dataset.stage == "joint"} == set(JOINT)
    assert DATASETS["avqa"].sizes == {"train": 31927, "val": 4568, "test": 9129}
    parts = DATASETS["ref_avs"].sizes
    assert parts["test"] == parts["test_s"] + parts["test_u"] + parts["test_n"] == 10 * (2288 + 1656 + 1028)
