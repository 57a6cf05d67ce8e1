"""The training mixture: order, shares, resuming, processes, workers, bad files; and evaluation batches."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from configs import tiny
from crab_jax.config import resolve
from crab_jax.io.errors import InputError, find_input_error, report
from crab_jax.runs import run_data, run_folder
from data_pipelines import mixture
from data_pipelines.batching import bucket_of
from data_pipelines.examples import TASK_NAMES, Example, write_jsonl
from data_pipelines.mixture import eval_batches

IMAGE = Example(id="", task="s4", instruction="See <image>", target="a dog", image="1.png", windows="none")


def pictures(count, task="s4", start=0, **fields):
    names = [f"{task}-{start + i}" for i in range(count)]
    return [dataclasses.replace(IMAGE, id=name, task=task, image=f"{i % 5}.png", **fields)
            for i, name in enumerate(names)]  # fmt: skip


@pytest.fixture
def mixed():
    """7 short s4, 5 short avss and 6 long avqa examples: two buckets."""
    return pictures(7) + pictures(5, "avss") + pictures(6, "avqa", target="dog " * 110)


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for field in dataclasses.fields(batch):
            np.testing.assert_array_equal(getattr(batch, field.name), getattr(other, field.name))


def train_dataset(examples, root, tokenizer, config, batch_size, seed=0, weights=None, **reading):
    order = mixture.train_order(examples, tokenizer, config, batch_size, seed, weights, reading.get("skipped"))
    return mixture.train_dataset(order, root, tokenizer, config, **reading)


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def orders(examples, tokenizer, config, count, **options):
    """Positions in each of the first batches."""
    batches = mixture.train_order(examples, tokenizer, config, 2, **options).batches
    return [batches[number].tolist() for number in range(count)]


def test_each_example_of_a_bucket_comes_once_per_epoch_in_a_new_order(root, tokenizer, config):
    examples = pictures(9)
    seen = sum(indices(take(train_dataset(examples, root, tokenizer, config, 3), 9)), [])
    epochs = [seen[i : i + 9] for i in (0, 9, 18)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_has_one_bucket_and_examples_are_drawn_equally_often(mixed, root, tokenizer, config):
    batches = take(train_dataset(mixed, root, tokenizer, config, 2, seed=1), 45)
    lengths = collections.Counter(bucket_of(batch).length for batch in batches)
    assert lengths == {128: 30, 192: 15}  # 12 and 6 of 18 examples
    for batch in batches:
        assert {mixed[i].task == "avqa" for i in batch.index} == {bucket_of(batch).length == 192}
    assert set(collections.Counter(sum(indices(batches), [])).values()) == {5}


def test_weights_are_shares_of_the_tasks(mixed, tokenizer, config):
    weights = {"s4": 1.0, "avss": 3.0, "avqa": 4.0}
    drawn = sum(orders(mixed, tokenizer, config, 80, weights=weights), [])
    shares = collections.Counter(mixed[i].task for i in drawn)
    assert shares == pytest.approx({"s4": 20, "avss": 60, "avqa": 80}, abs=2)
    with pytest.raises(InputError, match="weights.*'avqa'"):
        orders(mixed, tokenizer, config, 1, weights={"s4": 1.0, "avss": 1.0})


def test_weights_in_natural_proportion_are_no_weights(mixed, tokenizer, config):
    natural = {"s4": 0.7, "avss": 0.5, "avqa": 0.6}
    assert orders(mixed, tokenizer, config, 12, weights=natural) == orders(mixed, tokenizer, config, 12)


def test_the_seed_decides_the_order(mixed, tokenizer, config):
    first, again, other = (orders(mixed, tokenizer, config, 9, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_a_restored_iterator_continues_exactly(mixed, root, tokenizer, config):
    dataset = train_dataset(mixed, root, tokenizer, config, 2)
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(12)]
    restored = iter(train_dataset(mixed, root, tokenizer, config, 2))
    restored.set_state(state)
    assert_same([next(restored) for _ in range(12)], expected)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]], [[0, 1], [0, 1], [2, 3]]])
def test_processes_share_the_batch_of_one_process(mixed, root, tokenizer, config, shares):
    """Contiguous rows, interleaved ones, and rows that two processes load (a mesh axis over hosts)."""
    whole = take(train_dataset(mixed, root, tokenizer, config, 4), 10)
    for rows in shares:
        share = take(train_dataset(mixed, root, tokenizer, config, 4, rows=rows), 10)
        for batch, own in zip(whole, share, strict=True):
            for field in dataclasses.fields(batch):
                np.testing.assert_array_equal(getattr(own, field.name), getattr(batch, field.name)[rows])


def test_the_order_continues_from_any_step_and_says_what_a_batch_holds(mixed, root, tokenizer, config):
    """So a run resumes with another number of workers or processes: no reader keeps a position."""
    order = mixture.train_order(mixed, tokenizer, config, 2)
    whole = indices(take(mixture.train_dataset(order, root, tokenizer, config), 12))
    assert whole == [order.batches[step].tolist() for step in range(12)]
    assert indices(take(mixture.train_dataset(order, root, tokenizer, config, start=5), 7)) == whole[5:]


def test_every_mixture_can_be_entered_at_any_batch_of_any_epoch(mixed, root, tokenizer, config):
    """Within an epoch of 9 batches, at its end, and later; with weights, choices of one picture, a curriculum."""
    clip = [dataclasses.replace(one, meta={"one_of": "clip"}) for one in pictures(3, "ref-avs")]
    weights = {"s4": 1.0, "avss": 3.0, "avqa": 2.0, "ref-avs": 1.0}
    for options in ({}, {"weights": weights}, {"curriculum": {"avss": 7, "avqa": 12}, "weights": weights}):
        order = mixture.train_order(mixed + clip, tokenizer, config, 2, **options)
        whole = orders(mixed + clip, tokenizer, config, 40, **options)
        for start in (4, 9, 13, 31):
            batches = mixture.train_dataset(order, root, tokenizer, config, start=start)
            assert indices(take(batches, 2)) == whole[start : start + 2]


def test_a_curriculum_lets_tasks_join_at_their_step(mixed, tokenizer, config):
    curriculum = {"avss": 6, "avqa": 10}
    tasks = [{mixed[i].task for i in batch} for batch in orders(mixed, tokenizer, config, 40, curriculum=curriculum)]
    assert set.union(*tasks[:6]) == {"s4"}
    assert set.union(*tasks[6:10]) == {"s4", "avss"}
    assert set.union(*tasks[10:]) == {"s4", "avss", "avqa"}
    # Off by default; and once all have joined the shares are those without one.
    assert orders(mixed, tokenizer, config, 9, curriculum=dict.fromkeys(("s4", "avss", "avqa"), 0)) == orders(
        mixed, tokenizer, config, 9
    )
    late = sum(orders(mixed, tokenizer, config, 46, curriculum=curriculum)[10:], [])
    assert collections.Counter(mixed[i].task for i in late) == {"s4": 28, "avss": 20, "avqa": 24}
    with pytest.raises(InputError, match="curriculum.*first 3 steps"):
        orders(mixed, tokenizer, config, 1, curriculum={"s4": 3, "avss": 4, "avqa": 5})


def test_a_cap_limits_the_share_of_a_task_and_every_example_still_comes(tmp_path):
    """12 and 4 examples; with at most 4 of a task in an epoch of 8, three epochs go once through the twelve."""
    records = pictures(12) + pictures(4, "avcap")
    write_jsonl(tmp_path / "train.jsonl", records)
    run = tiny.get_config()
    run.data.root, run.data.batch_size, run.data.weights = str(tmp_path), 2, dict.fromkeys(TASK_NAMES, 1.0)
    run.data.caps.s4 = 4
    order = run_data.train_order(resolve(run), run_folder.tokenizer_of(resolve(run)))
    drawn = [records[i].task for step in range(12) for i in order.batches[step].tolist()]
    assert collections.Counter(drawn) == {"s4": 12, "avcap": 12}
    taken = {records[i].id for step in range(12) for i in order.batches[step].tolist()}
    assert taken == {record.id for record in records}


@pytest.fixture
def damaged(root, tmp_path):
    (tmp_path / "bad.png").write_text("not a picture")
    examples = pictures(6)
    for number in (2, 3):
        examples[number] = dataclasses.replace(examples[number], image=str(tmp_path / "bad.png"))
    return examples


def test_a_bad_file_stops_training_by_default(damaged, root, tokenizer, config):
    with pytest.raises(InputError, match="bad.png .image.*damaged"):
        take(train_dataset(damaged, root, tokenizer, config, 2), 3)


def test_a_bad_file_can_be_replaced_by_the_next_good_one(damaged, root, tokenizer, config, caplog):
    config = dataclasses.replace(config, on_error="skip")
    drawn = sum(indices(take(train_dataset(damaged, root, tokenizer, config, 2), 3)), [])
    assert sorted(drawn) == [0, 1, 4, 4, 4, 5]
    skipped = [record.getMessage() for record in caplog.records]
    assert len(skipped) == 2 and "skipped example s4-2" in "".join(skipped) and "bad.png" in skipped[0]
    only_bad = [dataclasses.replace(e, image="missing.png") for e in pictures(2)]
    with pytest.raises(InputError, match="no example of its bucket can be loaded"):
        take(train_dataset(only_bad, root, tokenizer, config, 2), 1)


def test_an_example_that_fits_no_bucket_is_left_out_when_skipping(root, tokenizer, config, caplog):
    examples = pictures(3) + pictures(1, "avqa", target="dog " * 400)
    with pytest.raises(InputError, match="example avqa-0 .*longest bucket"):
        train_dataset(examples, root, tokenizer, config, 1)
    config = dataclasses.replace(config, on_error="skip")
    assert sorted(sum(indices(take(train_dataset(examples, root, tokenizer, config, 1), 3)), [])) == [0, 1, 2]
    assert "left out example avqa-0" in caplog.text


def test_skipped_examples_are_listed_in_a_file_that_loaders_share(damaged, root, tokenizer, config, tmp_path):
    examples = damaged + pictures(1, "avqa", target="dog " * 400)
    config, file = dataclasses.replace(config, on_error="skip"), tmp_path / "skipped.jsonl"
    for rows in ([0], [1]):  # two processes
        take(train_dataset(examples, root, tokenizer, config, 2, rows=rows, skipped=file), 6)
    listed = {(line["index"], line["id"], line["task"]) for line in map(json.loads, file.read_text().splitlines())}
    assert listed == {(2, "s4-2", "s4"), (3, "s4-3", "s4"), (6, "avqa-0", "avqa")}
    assert "bad.png" in file.read_text() and "longest bucket" in file.read_text()


def test_eval_gives_every_example_once_with_marked_filler(mixed, root, tokenizer, config):
    batches = list(eval_batches(mixed, root, tokenizer, config, 4))
    assert [bucket for bucket, _ in batches] == sorted(bucket for bucket, _ in batches)
    for bucket, batch in batches:
        assert bucket_of(batch) == bucket and len(batch.index) == 4 and not batch.loss_mask.any()
    drawn = sum(indices(batch for _, batch in batches), [])
    assert sorted(i for i in drawn if i >= 0) == list(range(len(mixed)))
    filler = batches[-1][1]
    assert filler.index.tolist()[-2:] == [-1, -1]
    np.testing.assert_array_equal(filler.tokens[-1], filler.tokens[0])


def test_eval_with_bad_files(damaged, root, tokenizer, config):
    with pytest.raises(InputError, match="bad.png"):
        list(eval_batches(damaged, root, tokenizer, config, 4))
    config = dataclasses.replace(config, on_error="skip")
    drawn = sum(indices(batch for _, batch in eval_batches(damaged, root, tokenizer, config, 4)), [])
    assert sorted(drawn) == [-1, -1, -1, -1, 0, 1, 4, 5]


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_resume(mixed, root, tokenizer, config):
    dataset = train_dataset(mixed, root, tokenizer, config, 2, workers=2)
    iterator = iter(dataset)
    first = indices(take(iterator, 3))
    state = iterator.get_state()
    rest = indices(take(iterator, 3))
    assert first + rest == indices(take(train_dataset(mixed, root, tokenizer, config, 2), 6))
    restored = iter(dataset)
    restored.set_state(state)
    assert indices(take(restored, 3)) == rest


@pytest.mark.slow
def test_an_error_in_a_worker_process_is_reported_as_an_input_error(damaged, root, tokenizer, config):
    with pytest.raises(Exception) as raised:
        take(train_dataset(damaged, root, tokenizer, config, 2, workers=1), 3)
    assert "bad.png [image]" in str(find_input_error(raised.value))
    assert report(raised.value) == 2


def test_input_errors_are_found_behind_other_errors():
    try:
        raise RuntimeError from InputError("a", "b", "c", "d")
    except RuntimeError as error:
        assert find_input_error(error).where == "a"


def test_an_epoch_takes_one_of_the_examples_that_share_a_mark_and_another_one_later(tokenizer, config):
    """Three pictures of a clip beside two other examples: an epoch of three, in which the clip comes once."""
    examples = pictures(2) + pictures(3, start=2, meta={"one_of": "clip"})
    drawn = sum(orders(examples, tokenizer, config, 60), [])
    epochs = [drawn[i : i + 3] for i in range(0, 120, 3)]
    assert all(len([index for index in epoch if index >= 2]) == 1 for epoch in epochs)
    assert all({0, 1} < set(epoch) for epoch in epochs)
    clip = [index for index in drawn if index >= 2]
    assert set(clip) == {2, 3, 4} and set(collections.Counter(clip[:3]).values()) != {3}
    assert clip != [index for index in sum(orders(examples, tokenizer, config, 60, seed=1), []) if index >= 2]


def test_an_example_that_must_not_be_trained_on_is_refused_or_left_out(tokenizer, config, tmp_path):
    def check(example):
        if example.id == "s4-1":
            raise InputError("example s4-1", "meta", "is wrong", "mend it")

    options = {"batch_size": 1, "check": check}
    with pytest.raises(InputError, match="is wrong"):
        mixture.train_order(pictures(3), tokenizer, config, **options)
    config, skipped = dataclasses.replace(config, on_error="skip"), tmp_path / "skipped.jsonl"
    order = mixture.train_order(pictures(3), tokenizer, config, skipped=skipped, **options)
    assert [list(group) for group in order.groups.values()] == [[0, 2]]
    (line,) = map(json.loads, skipped.read_text().splitlines())
    assert (line["index"], line["id"], line["task"]) == (1, "s4-1", "s4") and "is wrong" in line["error"]
    with pytest.raises(InputError, match="there is none"):
        mixture.train_order(pictures(3)[1:2], tokenizer, config, **options)


def test_weights_must_be_above_zero_for_tasks_that_have_examples(mixed, tokenizer, config):
    weights = {"s4": 1.0, "avss": 1.0, "avqa": 1.0, "ave": 0.0}
    assert orders(mixed, tokenizer, config, 1, weights=weights)
    for value in (0.0, -1.0):
        with pytest.raises(InputError, match=f"is {value} for 'avss', which has 5 examples"):
            orders(mixed, tokenizer, config, 1, weights={**weights, "avss": value})


def test_small_shares_are_kept_to_a_hundredth_of_the_smallest(tokenizer, config):
    """Shares of 1 to 1.5: 200 and 300 of 500, where whole numbers would give 200 and 200 or 400."""
    examples = pictures(4) + pictures(4, "avss")
    drawn = sum(orders(examples, tokenizer, config, 250, weights={"s4": 1.0, "avss": 1.5}), [])
    counts = collections.Counter(examples[i].task for i in drawn)
    assert counts == pytest.approx({"s4": 200, "avss": 300}, abs=2)


def test_a_task_may_join_at_any_batch_and_the_mixture_has_no_end(mixed, tokenizer, config):
    batches = mixture.train_order(mixed, tokenizer, config, 2, curriculum={"avss": 3}).batches
    assert len(batches) > 10**9
    assert {mixed[i].task for step in range(3) for i in batches[step].tolist()} <= {"s4", "avqa"}


def test_eval_batches_may_hold_the_answers_and_the_last_one_is_filled_up(mixed, root, tokenizer, config):
    asked = [batch for _, batch in eval_batches(mixed, root, tokenizer, config, 5)]
    taught = [batch for _, batch in eval_batches(mixed, root, tokenizer, config, 5, prompt_only=False)]
    assert not any(batch.loss_mask.any() for batch in asked) and all(batch.loss_mask.any() for batch in taught)
    for batches in (asked, taught):
        assert all(len(batch.index) == 5 for batch in batches)
        drawn = sum(indices(batches), [])
        assert sorted(index for index in drawn if index >= 0) == list(range(len(mixed)))
        for batch in batches:
            for row in np.flatnonzero(batch.index < 0):
                np.testing.assert_array_equal(batch.tokens[row], batch.tokens[0])
                np.testing.assert_array_equal(batch.frames[row], batch.frames[0])


def answered(examples, root, tokenizer, config, rows=slice(None)):
    groups = mixture.group_by_bucket(examples, tokenizer, config)
    return mixture.answered_batches(examples, groups, root, tokenizer, config, 4, rows)


def test_answered_batches_hold_every_example_once_and_processes_share_them(mixed, root, tokenizer, config):
    """12 examples of one bucket and 6 of the other: 3 and 2 batches of 4, the last with two empty rows."""
    batches = answered(mixed, root, tokenizer, config)
    assert [bucket_of(batch).length for batch in batches] == [128] * 3 + [192] * 2
    assert sum(indices(batches), []) == [*range(18), -1, -1]
    for batch in batches:
        np.testing.assert_array_equal(batch.loss_mask.any(axis=1), batch.index >= 0)
    assert not batches[-1].text_mask[2:].any() and not batches[-1].frame_mask[2:].any()
    for rows in (slice(0, 2), [1, 3]):
        for batch, own in zip(batches, answered(mixed, root, tokenizer, config, rows), strict=True):
            for field in dataclasses.fields(batch):
                np.testing.assert_array_equal(getattr(own, field.name), getattr(batch, field.name)[rows])


def test_answered_batches_have_an_empty_row_for_a_bad_file(damaged, root, tokenizer, config):
    with pytest.raises(InputError, match="bad.png"):
        answered(damaged, root, tokenizer, config)
    config = dataclasses.replace(config, on_error="skip")
    assert indices(answered(damaged, root, tokenizer, config)) == [[0, 1, -1, -1], [4, 5, -1, -1]]
