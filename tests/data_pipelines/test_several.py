"""Several data roots in one training: each Example with the media, the frames and the checks of its own root."""

import dataclasses
import itertools

import cloudpickle
import numpy as np
import orders
import pytest
from media_files import write_picture, write_video

from crab_jax.evaluation.held_out import held_out
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from data_pipelines import index
from data_pipelines.batching import bucket_of
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.index import Indexed
from data_pipelines.prepare import main as prepare
from data_pipelines.several import Several

PICTURE = Example("", "avcap", "See <image>", target="a dog", image="0.png", windows="none")
CLIP = Example("clip", "avcap", "See <video>", target="a dog", video="clip.mp4", windows="none")


def write_root(root, count, gray, clips=0):
    """Pictures of one gray, and clips; ids, names of files and marks are those of every other root."""
    root.mkdir()
    write_picture(root / "0.png", np.full((32, 48, 3), gray, np.uint8))
    meta = [{"one_of": "same"} if k < 2 else {} for k in range(count)]
    listed = [dataclasses.replace(PICTURE, id=str(k), meta=m) for k, m in enumerate(meta)]
    if clips:
        write_video(root / "clip.mp4", frames=20, size=(48, 32), seconds=2.0)
        listed += [dataclasses.replace(CLIP, id=f"clip {k}") for k in range(clips)]
    write_jsonl(root / "train.jsonl", listed)
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    return write_root(folder / "dark", 5, 40), write_root(folder / "light", 4, 200)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Roots of clips, prepared with 2 and with 4 frames, and one with pictures of another size."""
    folder = tmp_path_factory.mktemp("prepared")
    root = write_root(folder / "raw", 2, 90, clips=2)
    for name, frames, size in (("two", 2, 64), ("four", 4, 64), ("small", 2, 32)):
        with pytest.raises(SystemExit, match="0"):
            prepare(["--root", str(root), "--out", str(folder / name), "--image-size", str(size),
                     "--video-frames", str(frames), "--workers", "0"])  # fmt: skip
    return folder


def config_of(*roots, **changes):
    return orders.config_of("", {"root": "", "roots": ",".join(map(str, roots)), **changes})


def run_on(config):
    examples = run_data.train_examples(config)
    tokenizer = run_folder.tokenizer_of(config)
    order = run_data.train_order(config, tokenizer, examples=examples)
    return examples, order, run_data.train_dataset(config, tokenizer, order)


def test_every_example_is_read_from_its_own_root(roots):
    config = config_of(*roots)
    assert config.data.image_size == 64
    examples, order, batches = run_on(config)
    assert isinstance(examples, Several) and len(examples) == 9
    assert [e.id for e in examples] == [*"01234", *"0123"] and examples[-1] == examples[8]
    with pytest.raises(IndexError):
        examples[9]
    drawn = [
        pair for batch in itertools.islice(iter(batches), 28) for pair in zip(batch.index, batch.frames, strict=True)
    ]
    for number, frames in drawn:
        assert abs(int(frames[0].mean()) - (40 if number < 5 else 200)) < 3
    epochs = [{int(number) for number, _ in drawn[at : at + 7]} for at in range(0, 56, 7)]
    for epoch in epochs:  # one of "same" of each root, and all others
        assert {2, 3, 4, 7, 8} < epoch and len(epoch & {0, 1}) == len(epoch & {5, 6}) == 1


def test_one_root_among_roots_is_a_root(roots):
    one, several = (orders.record(config) for config in (orders.config_of(roots[0], {}), config_of(roots[0])))
    assert one == several


def test_the_order_and_identity_are_the_same_with_an_index_and_after_sending(roots, tmp_path):
    plain = orders.record(config_of(*roots))
    for root in roots:
        write_root(tmp_path / root.name, 5 if root.name == "dark" else 4, 40)
        index.write_all(tmp_path / root.name)
    config = config_of(*(tmp_path / root.name for root in roots))
    examples, order, _ = run_on(config)
    assert all(isinstance(part.examples, Indexed) for part in examples.roots)
    assert orders.record(config) == plain
    sent = cloudpickle.loads(cloudpickle.dumps(order.examples))
    assert list(sent) == list(examples) and [part.root for part in sent.roots] == [part.root for part in examples.roots]


def test_the_identity_covers_all_roots(roots, tmp_path):
    def identity(*places):
        config = config_of(*places)
        return run_data.data_identity(config, run_data.train_examples(config))["examples"]

    other = write_root(tmp_path / "other", 3, 90)
    hashes = [identity(*places) for places in (roots, roots[::-1], (roots[0], other), roots[:1], (*roots, other))]
    assert len(set(hashes)) == 5


def test_roots_of_other_frames_end_in_other_buckets(prepared):
    config = config_of(prepared / "two", prepared / "four", video_frames=10, lengths=(512,))
    _, order, batches = run_on(config)
    assert sorted(bucket.frames for bucket in order.groups) == [1, 2, 4]
    seen = set()
    for batch in itertools.islice(iter(batches), 12):
        frames = bucket_of(batch).frames
        seen.add(frames)
        assert batch.frames.shape[1] == frames and batch.frame_mask.all()
        assert frames == 1 or all((number < 4) == (frames == 2) for number in batch.index)
    assert seen == {1, 2, 4}


def test_a_root_that_was_prepared_with_another_size_is_refused_by_name(prepared):
    """Before any batch is loaded, and also where bad examples are skipped: it is no fault of an example."""
    config = config_of(prepared / "two", prepared / "small", lengths=(512,), on_error="skip")
    with pytest.raises(InputError, match="small .image_size.: was prepared with 32, but 64 is asked for"):
        run_on(config)


def test_a_limit_counts_over_all_roots(roots):
    assert [len(part.examples) for part in run_data.train_examples(config_of(*roots, limit=7)).roots] == [5, 2]
    examples, order, _ = run_on(config_of(*roots, limit=3))
    assert len(examples) == 3 and order.batches[0].max() < 3


def test_a_wrong_label_names_the_list_of_its_root(roots, tmp_path):
    other = write_root(tmp_path / "other", 1, 90)
    write_jsonl(other / "train.jsonl", [dataclasses.replace(PICTURE, id="bad", target="")])
    with pytest.raises(InputError, match="other/train.jsonl:1 .target.: is empty"):
        run_on(config_of(*roots, other))


def test_a_clip_that_another_root_tests_on_is_left_out(roots, tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    clips = [dataclasses.replace(PICTURE, id=name, meta={"video": name}) for name in ("held", "free")]
    for root, listed in ((train, clips), (test, clips[1:])):
        root.mkdir()
        write_jsonl(root / "train.jsonl", listed)
    write_jsonl(test / "test.jsonl", clips[:1])
    for kind in ("plain", "indexed"):
        found = run_data.train_examples(config_of(train, test, exclude_leaks=True))
        assert [e.id for e in found] == ["free", "free"], kind
        index.write_all(train)


def test_held_out_examples_come_from_the_roots_that_have_the_split(roots, tmp_path, caplog):
    other = write_root(tmp_path / "other", 2, 90)
    write_jsonl(other / "val.jsonl", [dataclasses.replace(PICTURE, id="val")])
    config = dataclasses.replace(config_of(*roots, other), eval_every=5, eval_split="val", eval_answers=False)
    chosen = held_out(config, run_folder.tokenizer_of(config))
    assert [e.id for e in chosen.examples] == ["val"] and chosen.examples.roots[2].root == str(other)
    assert caplog.text.count("not among the held-out examples") == 2


def test_roots_are_checked(roots):
    with pytest.raises(InputError, match="data.roots.*each once"):
        config_of(roots[0], roots[0])
    with pytest.raises(InputError, match="data.root.*is not set"):
        run_data.train_examples(orders.config_of("", {}))
    with pytest.raises(InputError, match="--data.*trained on .*dark and .*light"):
        run_data.data_root("", config_of(*roots))
    assert run_data.data_root("", config_of(roots[1])) == roots[1]
