"""The index of Examples: the same Examples and orders as the annotations, never of other ones, and small."""

import dataclasses
import itertools
import json
import shutil

import cloudpickle
import numpy as np
import orders
import pytest
import releases

from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from crab_jax.tasks import TASKS
from data_pipelines import datasets, index, mixture
from data_pipelines.__main__ import main
from data_pipelines.batching import place
from data_pipelines.examples import WINDOWS, Example, learned, write_jsonl
from data_pipelines.index import Indexed, Wanted
from data_pipelines.prepare import main as prepare
from data_pipelines.tokens import Tokenizer

GOLDEN = json.loads(orders.FILE.read_text())
EVERY = orders.EVERY.split(",")
PICTURE = Example("", "s4", "See <image>", target="a dog", image="0.png", windows="none")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The roots of orders.py, without an index and with one."""
    folder = tmp_path_factory.mktemp("roots")
    releases.write(folder / "plain" / "releases", folder / "scenes")
    write_jsonl(folder / "plain" / "list" / "train.jsonl", orders.listed())
    for name in ("releases", "list"):
        shutil.copytree(folder / "plain" / name, folder / "indexed" / name)
        index.write_all(folder / "indexed" / name)
    return folder


@pytest.fixture
def indexed(tmp_path):
    """A function that writes a list with its index, and returns the Examples of that index."""

    def examples(listed, frames="one", on_error="raise"):
        write_jsonl(tmp_path / "train.jsonl", listed)
        index.write_all(tmp_path)
        return index.read(tmp_path, Wanted("train", (), "train", frames, on_error))

    return examples


def read_plainly(root, wanted, left=None):
    return datasets.read_examples(
        root,
        wanted.split,
        wanted.names,
        wanted.variant,
        wanted.frames,
        wanted.on_error,
        epoch=None,
        malformed=wanted.on_error,
        left=left,
    )


def numbered(count, **changes):
    return [dataclasses.replace(PICTURE, id=str(k), image=f"{k}.png", **changes) for k in range(count)]


# The same as the annotations.


@pytest.mark.parametrize("case", orders.CASES)
def test_the_order_is_that_of_the_time_before_the_index_with_and_without_one(roots, case):
    root, changes = orders.CASES[case]
    for kind in ("plain", "indexed"):
        config = orders.config_of(roots / kind / root, changes)
        is_indexed = isinstance(run_data.train_examples(config), Indexed)
        assert is_indexed == (kind == "indexed" and case != "two splits")
        assert orders.record(config) == GOLDEN[case]


@pytest.mark.parametrize("frames", ["one", "all"])
def test_an_index_holds_every_field_of_every_example(roots, frames):
    wanted = Wanted("train", EVERY, "train", frames, "raise")
    found, plain = (call(roots / "indexed" / "releases", wanted) for call in (index.read, read_plainly))
    assert isinstance(found, Indexed) and list(found) == plain
    assert found.learned() == learned(plain)
    assert list(found[3:40:5]) == plain[3:40:5] and found[-1] == plain[-1]
    some = np.arange(len(plain)) % 3 == 0
    assert found.take(some).learned() == learned(plain[::3])
    with pytest.raises(IndexError):
        found[len(plain)]


def test_texts_of_any_kind_come_back(indexed):
    odd = [
        dataclasses.replace(
            PICTURE, id="ünï\u2028", target="Zwölf \U0001f600 \0 \x01", meta={"a": [1, 2.5, None, {"b": ""}]}
        ),
        dataclasses.replace(PICTURE, id="long", target="x" * 300_000),
        dataclasses.replace(PICTURE, id="second", second=10**40, seg_image="", video=""),
        dataclasses.replace(PICTURE, id="frames", image=None, instruction="<video>", frames=("a.png", "ä\n.png")),
    ]
    found = indexed(odd)
    assert list(found) == odd and found.learned() == learned(odd)


def test_rows_that_cannot_be_read_are_left_out_and_listed_as_before(copied, caplog):
    root = copied("ave", "llp", "valor")
    (root / index.read(root, Wanted("train", (), "train", "one", "skip"))[0].video).unlink()
    releases.text(root / "ave" / "trainSet.txt", (root / "ave" / "trainSet.txt").read_text() + "only&two\n")
    results = []
    for _ in range(2):
        caplog.clear()
        for on_error in ("skip", "raise"):
            left = []
            wanted = Wanted("train", (), "train", "one", on_error)
            try:
                found = index.read(root, wanted, left)
                results.append((isinstance(found, Indexed), list(found), left_of(left), caplog.messages))
            except InputError as error:
                results.append((type(error), str(error)))
        index.write_all(root)
    skipped, raised, skipped_too, raised_too = results
    assert skipped_too[0] and not skipped[0] and skipped_too[1:] == skipped[1:] and skipped[2]
    assert raised == raised_too


def test_errors_and_notes_that_name_bytes_that_are_no_text_come_back(copied, caplog):
    root = copied("ave", "valor")
    with open(root / "ave" / "trainSet.txt", "rb") as file:
        content = file.read()
    (root / "ave" / "trainSet.txt").unlink()
    (root / "ave" / "trainSet.txt").write_bytes(content + b"Dog&caf\xe9 \xff&good&0&10\n")
    wanted = Wanted("train", (), "train", "one", "skip")
    plain, said = index.read(root, wanted, before := []), caplog.messages.copy()
    index.write_all(root)
    caplog.clear()
    assert list(index.read(root, wanted, after := [])) == plain and caplog.messages == said
    assert left_of(before) == left_of(after) and "is not UTF-8 text" in str(after[-1].error)


def left_of(left):
    return [(name, split, type(error), str(error)) for name, split, error in left]


def test_annotations_that_cannot_be_read_as_a_whole_stay_an_error(copied, caplog):
    root = copied("ave", "valor")
    (root / "valor" / "desc_train.json").unlink()
    skip, raising = (Wanted("train", (), "train", "one", on_error) for on_error in ("skip", "raise"))
    plain = index.read(root, skip)
    with pytest.raises(InputError) as before:
        index.read(root, raising)
    index.write_all(root)
    found = index.read(root, skip)
    assert isinstance(found, Indexed) and list(found) == plain
    with pytest.raises(InputError) as after:
        index.read(root, raising)
    assert str(before.value) == str(after.value)
    assert caplog.text.count("valor train is left out: ") == 2


def test_examples_with_wrong_labels_are_refused_and_odd_ones_counted_as_before(tmp_path, caplog):
    def run_on(root, on_error):
        config = orders.config_of(root, {"on_error": on_error})
        order = run_data.train_order(config, run_folder.tokenizer_of(config), root / f"skipped.{on_error}.jsonl")
        return order, list(map(list, order.groups.values()))

    listed = numbered(4) + [
        dataclasses.replace(PICTURE, id="no target", target=""),
        dataclasses.replace(PICTURE, id="two sources", instruction="<image> and <video>"),
        dataclasses.replace(PICTURE, id="too long", task="avqa", target="dog " * 5000),
    ]
    for name in ("plain", "indexed"):
        write_jsonl(tmp_path / name / "train.jsonl", listed)
    index.write_all(tmp_path / "indexed")
    groups, lines, refused = [], [], []
    for name in ("plain", "indexed"):
        caplog.clear()
        order, group = run_on(tmp_path / name, "skip")
        groups.append(group)
        lines.append([line.replace(f"/{name}/", "/") for line in caplog.messages])
        refused.append((tmp_path / name / "skipped.skip.jsonl").read_text().replace(f"/{name}/", "/"))
        with pytest.raises(InputError, match="train.jsonl:5 .target.: is empty"):
            run_on(tmp_path / name, "raise")
    assert isinstance(order.examples, Indexed)
    assert groups[0] == groups[1] == [[0, 1, 2, 3]]
    assert lines[0] == lines[1] and "examples look odd, the first: " in lines[0][-1]
    assert refused[0] == refused[1] and refused[0].count("\n") == 3


def combinations():
    """Examples of every kind of media, windows and placeholders, also those that do not agree."""
    media = [{}, {"video": "a.mp4"}, {"image": "a.png"}, {"frames": ("a", "b")}, {"frames": tuple("abcdef")}]
    media += [{"video": "a.mp4", "image": "b.png"}, {"frames": ("a",), "image": "b.png"}]
    texts = ["<video> x", "<image> <audio>", "<video> and <image>", "<audio><video>", "<image>", "none"]
    for k, (shown, text, windows) in enumerate(itertools.product(media, texts, WINDOWS)):
        target = ("short", "<image> in a target <audio> <video>", "dog " * 150)[k % 3]
        mask = ("none", "binary", "semantic")[k % 5 % 3]
        yield Example(
            str(k), "s4", text, target, windows=windows, audio="a.wav" if k % 2 else None, mask_kind=mask, **shown
        )


@pytest.mark.parametrize("prompt_only", [False, True])
def test_buckets_and_fills_are_those_of_the_examples(indexed, tokenizer, config, prompt_only, monkeypatch):
    monkeypatch.setattr(index.TrainingLabels, "check", lambda labels, example: None)
    config = dataclasses.replace(config, prompt_only=prompt_only)
    examples = list(combinations())
    found = indexed(examples)
    buckets, of, fills = found.placed(tokenizer, config)
    placed = 0
    for k, example in enumerate(examples):
        try:
            wanted = place(example, tokenizer, config)
        except InputError as error:
            assert of[k] == -1 and str(found.fault(k, tokenizer, config)) == str(error)
        else:
            assert (buckets[of[k]], tuple(fills[k])) == wanted
            placed += 1
    assert len(buckets) == len(set(buckets)) and 30 < placed < len(examples) - 30


@pytest.mark.parametrize("legacy", [None, True, False])
def test_tokens_are_counted_as_they_are_encoded(tokenizer, tmp_path, legacy):
    tokenizer.save(tmp_path)
    other = Tokenizer.load(tmp_path)
    other._legacy = legacy
    texts = ["", " a", "<audio> b <audio>", "<video>", "dog 12 é \U0001f600", "</s>", "x\ny"]
    for prompts in (True, False):
        for text, counts in zip(texts, other.counts(texts, prompts), strict=True):
            ids = other.encode(text)[0] if prompts else other.encode("", text)[0][len(other.encode("")[0]) :]
            names = ("<video>", "<image>", "<audio>")
            assert counts.tolist() == [len(ids), *(int(np.sum(ids == other.id(name))) for name in names)]
    assert other.counts(["a", "\ud800", "b"], True)[:, 0].tolist()[1] == -1


def test_an_epoch_of_marked_examples_counts_their_tasks(indexed):
    meta = [{}, {"one_of": "a"}, {"one_of": "b"}, {"one_of": "a"}, {}, {"one_of": "b"}]
    listed = [dataclasses.replace(PICTURE, id=str(k), meta=m) for k, m in enumerate(meta)]
    listed[3] = dataclasses.replace(listed[3], task="ref-avs")  # a mark over two tasks
    found = indexed(listed)
    for seed in range(6):
        plain = datasets.one_frame_each(listed, seed, epoch=0)
        assert found.counts(seed) == {t: n for t in TASKS if (n := sum(e.task == t for e in plain))}


# Never of other Examples.


def assert_read_anew(root, caplog, why):
    """The index of a root is not used, for a reason that one line gives; made anew it is."""
    caplog.clear()
    wanted = Wanted("train", (), "train", "one", "skip")
    found = index.read(root, wanted)
    assert not isinstance(found, Indexed) and why in caplog.text and "data_pipelines index --root" in caplog.text
    index.write_all(root)
    again = index.read(root, wanted)
    assert isinstance(again, Indexed) and list(again) == found
    return found


def test_an_index_is_not_used_once_its_sources_have_changed(copied, caplog):
    root = copied("ave")
    index.write_all(root)
    file = root / "ave" / "trainSet.txt"
    lines = file.read_text().splitlines(keepends=True)
    releases.text(file, "".join(lines[1:]))
    assert len(assert_read_anew(root, caplog, f"is older than {file}")) == len(lines) - 1
    clip = root / index.read(root, Wanted("train", (), "train", "one", "skip"))[0].video
    clip.rename(clip.with_suffix(".gone"))  # a partial copy
    fewer = assert_read_anew(root, caplog, f"is older than {clip.parent}")
    clip.with_suffix(".gone").rename(clip)  # and completed
    assert len(assert_read_anew(root, caplog, "is older than")) > len(fewer)


def test_an_index_of_other_code_or_tasks_or_of_damaged_bytes_is_not_used(tmp_path, caplog, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", numbered(3))
    index.write_all(tmp_path)
    monkeypatch.setattr(index, "_code", lambda: "of another version")
    assert_read_anew(tmp_path, caplog, "was made by another version")
    monkeypatch.setitem(TASKS, "mine", TASKS["s4"])
    assert_read_anew(tmp_path, caplog, "with other tasks")
    file, info = tmp_path / "example_index" / "prepared-train.arrow", tmp_path / "example_index" / "prepared-train.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_read_anew(tmp_path, caplog, "is damaged")
    file.write_bytes(file.read_bytes()[:-9])
    assert_read_anew(tmp_path, caplog, "is damaged")
    for text in ("{", "[]", json.dumps(json.loads(info.read_text()) | {"sources": 3}), "{}"):
        info.write_text(text)
        assert_read_anew(tmp_path, caplog, "cannot be read")
    file.unlink()
    assert_read_anew(tmp_path, caplog, "cannot be read")
    info.unlink()  # what a killed command leaves
    assert not isinstance(index.read(tmp_path, Wanted("train", (), "train", "one", "raise")), Indexed)


def counted(examples, tokenizer):
    """The number of tokens of each target, of the one table of an index."""
    return examples.tables[0].lengths(tokenizer)["target_ids"].tolist()


def test_token_counts_are_never_those_of_another_tokenizer(indexed, tokenizer, config, tmp_path):
    listed = numbered(5, target="the dog barks twice, the dog barks")
    found = indexed(listed)
    other = Tokenizer.load("tiny_tokenizer")
    counts = [counted(found, one) for one in (tokenizer, other, tokenizer)]
    assert counts[0] == counts[2] != counts[1]
    file = next((tmp_path / "example_index").glob(f"*.{tokenizer.digest()[:12]}.lengths"))
    kept, before = file.read_bytes(), file.stat().st_mtime_ns
    assert counted(found, tokenizer) == counts[0] and file.stat().st_mtime_ns == before
    next((tmp_path / "example_index").glob(f"*.{other.digest()[:12]}.lengths")).rename(file)
    assert counted(found, tokenizer) == counts[0] and file.read_bytes() == kept
    longer = indexed([dataclasses.replace(e, target=e.target * 2) for e in listed])  # the file is of the former list
    assert counted(longer, tokenizer)[0] > counts[0][0]


def test_a_wanted_dataset_without_an_index_is_read_with_the_others(copied, caplog):
    root = copied("ave", "valor")
    index.write_all(root, ["ave"])
    found = index.read(root, Wanted("train", (), "train", "one", "raise"))
    assert not isinstance(found, Indexed) and "holds no index of valor: all annotations are read" in caplog.text
    assert isinstance(index.read(root, Wanted("train", ("ave",), "train", "one", "raise")), Indexed)


def test_a_run_keeps_its_index_when_it_is_made_anew_and_a_later_worker_refuses_the_other(indexed):
    before, listed = indexed(numbered(3)), numbered(4)
    sent = cloudpickle.dumps(before)
    assert len(indexed(listed)) == 4
    assert list(before) == numbered(3)  # still mapped
    index._table.cache_clear()  # as in another process
    with pytest.raises(InputError, match="was made anew while this run used it"):
        cloudpickle.loads(sent)


# Small.


def pickled(dataset):
    return len(cloudpickle.dumps(dataset))


def test_what_a_worker_receives_does_not_grow_with_the_examples(indexed, tokenizer, config, tmp_path):
    """With an index; without one the positions are shared, and the Examples are sent."""
    sizes = []
    for count in (1000, 10_000):
        marked = [{"one_of": f"{k // 3}"} if k % 2 else {} for k in range(count)]
        listed = [dataclasses.replace(e, meta=m) for e, m in zip(numbered(count), marked, strict=True)]
        order = mixture.train_order(indexed(listed), tokenizer, config, 4, weights={"s4": 1.0}, curriculum={"s4": 0})
        sizes.append(pickled(mixture.train_dataset(order, tmp_path, tokenizer, config)))
        assert pickled(order.examples) < 1500
        without = mixture.train_order(listed, tokenizer, config, 4)
        assert pickled(without.batches) - pickled(listed) < 20_000
    assert max(sizes) < 100_000 and abs(sizes[1] - sizes[0]) < 1000


@pytest.mark.slow
def test_workers_map_the_index_and_give_the_same_batches(indexed, root, tokenizer, config, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "shared"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "shared").mkdir()
    listed = [dataclasses.replace(e, image=f"{k % 5}.png") for k, e in enumerate(numbered(9))]
    config = dataclasses.replace(config, on_error="skip")
    listed[4] = dataclasses.replace(listed[4], image="missing.png")
    order = mixture.train_order(indexed(listed), tokenizer, config, 2)
    plain = mixture.train_order(listed, tokenizer, config, 2)
    batches = [
        [
            batch.index.tolist()
            for batch in itertools.islice(iter(mixture.train_dataset(one, root, tokenizer, config, workers=w)), 6)
        ]
        for one, w in ((order, 2), (plain, 0))
    ]
    assert batches[0] == batches[1] and 4 not in sum(batches[0], [])
    assert list((tmp_path / "shared").glob("*.order"))
    del order, plain
    assert not list((tmp_path / "shared").glob("*.order"))


# The verb, and prepare.


def test_the_verb_writes_what_is_there_and_leaves_what_is_right(copied, capsys, one_line_error):
    root = copied("ave", "lvis")
    argv = ["index", "--root", str(root), "--splits", "train,val", "--tokenizer", "tiny_tokenizer"]

    def run():
        with pytest.raises(SystemExit, match="0"):
            main(argv)

    run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines] == [
        "ave-train-train.arrow", "ave-val-train.arrow", "lvis-train-train.arrow", "lvis-val-train.arrow",
    ]  # fmt: skip
    folder = root / "example_index"
    assert len(list(folder.glob("*.lengths"))) == 4
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    run()
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    capsys.readouterr()
    one_line_error(main, ["index", "--root", str(root), "--splits", "exam"], "holds none of exam")
    one_line_error(main, ["index", "--root", str(root), "--variants", "train,x"], "unknown variant 'x'")
    one_line_error(main, ["index", "--root", str(root / "nowhere")], "is no folder")


def test_lvis_is_read_once(copied, monkeypatch):
    root = copied("lvis")
    wanted = Wanted("train", ("lvis",), "train", "one", "raise")
    plain = index.read(root, wanted)
    index.write_all(root)

    def read(*args):
        raise AssertionError("the annotations were read")

    monkeypatch.setitem(datasets.DATASETS, "lvis", dataclasses.replace(datasets.DATASETS["lvis"], read=read))
    assert list(index.read(root, wanted)) == plain


def test_a_prepared_root_has_its_index_and_it_moves_with_it(copied, tmp_path, monkeypatch):
    root, out = copied("ave", "valor"), tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        prepare(["--root", str(root), "--out", str(out), "--image-size", "16", "--video-frames", "2", "--workers", "0",
                 "--variants", "train,quick", "--splits", "train"])  # fmt: skip
    shutil.copytree(out, tmp_path / "moved", copy_function=shutil.copyfile)  # with other times
    for variant in ("train", "quick"):
        wanted = Wanted("train", (), variant, "one", "raise")
        found = index.read(tmp_path / "moved", wanted)
        assert isinstance(found, Indexed) and list(found) == read_plainly(root, wanted)
    assert found.datasets() == {"ave", "valor"}


def test_a_root_that_cannot_be_written_counts_tokens_at_every_start(indexed, tokenizer, monkeypatch, caplog):
    found = indexed(numbered(3))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index, "whole", refuse)
    assert counted(found, tokenizer) == 3 * [len(tokenizer.ids("a dog</s>"))]
    assert "cannot be written (Permission denied)" in caplog.text
