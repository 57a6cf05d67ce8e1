"""Scoring is a pure function of answers: same results in any order, nothing dropped, honest baselines."""

import dataclasses
import json

import numpy as np
import pytest

from crab_jax.evaluation import scoring
from crab_jax.evaluation.scoring import Answer, baseline_results, check_label, markdown, score
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines.examples import TASK_NAMES, Example


def ave(name, event, start, end):
    meta = {"event": event, "start": start, "end": end}
    return Example(id=name, task="ave", instruction="?", target=TASKS["ave"].target(**meta), meta=meta)


def avqa(name, answer):
    return Example(
        id=name,
        task="avqa",
        instruction="?",
        target=TASKS["avqa"].target(answer),
        meta={"answer": answer, "type": ["Audio", "Counting"]},
    )


EXAMPLES = [
    ave("a", "Dog", 0, 10),
    ave("b", "Dog", 2, 5),
    ave("c", "Cat", 0, 4),
    avqa("d", "yes"),
    avqa("e", "no"),
    avqa("f", "yes"),
]
PERFECT = [Answer(e.id, e.target) for e in EXAMPLES]


def test_tasks_come_in_the_order_of_the_data_side():
    assert tuple(TASKS) == TASK_NAMES
    assert all(task.name == name for name, task in TASKS.items())


def test_results_have_the_documented_shape():
    results = score(PERFECT, EXAMPLES, resamples=20)
    assert list(results) == ["tasks"] and set(results["tasks"]) == {"ave", "avqa"}
    for name, row in results["tasks"].items():
        metrics = set(row) - {"n", "n_unparsed", "n_no_mask", "intervals"}
        assert TASKS[name].headline in metrics and set(row["intervals"]) == metrics
        assert (row["n"], row["n_unparsed"], row["n_no_mask"]) == (3, 0, 0)
        assert all(isinstance(row[m], float) and row["intervals"][m] == [row[m], row[m]] == [1.0, 1.0] for m in metrics)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_order_of_predictions_and_examples_does_not_matter():
    answers = [dataclasses.replace(PERFECT[0], text="?"), *PERFECT[1:]]
    assert score(answers, EXAMPLES, resamples=30) == score(answers[::-1], EXAMPLES[::-1], resamples=30)


def test_missing_and_unreadable_answers_stay_in_the_denominator():
    results = score([PERFECT[0], Answer("b", "no idea")], EXAMPLES, resamples=5)
    assert results["tasks"]["ave"]["n_unparsed"] == 2
    assert results["tasks"]["ave"]["accuracy"] == pytest.approx((1.0 + 0.7 + 0.6) / 3)
    assert results["tasks"]["avqa"]["accuracy"] == 0.0
    assert results["tasks"]["avqa"]["n"] == 3


def test_answers_must_fit_the_examples():
    with pytest.raises(InputError, match="unknown examples.*'z'"):
        score([Answer("z", "")], EXAMPLES)
    with pytest.raises(InputError, match="two answers"):
        score([PERFECT[0], PERFECT[0]], EXAMPLES)


@pytest.mark.parametrize(
    ("task", "meta", "field"),
    [
        ("ave", {"event": "Dog", "start": 0}, "meta.end"),
        ("avqa", {}, "meta.answer"),
        ("ave", {"event": "Dog", "start": "x", "end": None}, "meta.start"),
        ("avqa", {"answer": "yes", "type": "Audio"}, "meta.type"),
        ("avvp", {"audio": []}, "meta.visual"),
        ("avcap", {"captions": "a dog"}, "meta.captions"),
        ("avcap", {"captions": []}, "meta.captions"),
        ("ave", {"event": "Dog", "start": 3, "end": 11}, "meta.end"),
        ("ave", {"event": "Dog", "start": 3.0, "end": 8}, "meta.start"),
        ("avqa", {"answer": 2}, "meta.answer"),
        ("ref-avs", {"expression": "it", "object": "", "split": "seen"}, "meta.split"),
        ("arig", {"object": "dog", "box": [5, 5, 225, 9]}, "meta.box"),
        ("avvp", {"audio": [["Dog", 0, 12]]}, "meta.audio"),
    ],
)
def test_a_bad_label_is_named(task, meta, field):
    with pytest.raises(InputError) as error:
        check_label(Example(id="x", task=task, instruction="?", meta=meta))
    assert error.value.field == field and "'x'" in error.value.where
    assert f"tasks/{task.replace('-', '_')}.py" in error.value.fix


def test_bootstrap_interval_matches_the_normal_approximation():
    rng = np.random.default_rng(0)
    examples = [avqa(f"{i:03d}", "yes") for i in range(400)]
    right = rng.random(400) < 0.7
    texts = [TASKS["avqa"].target("yes" if r else "no") for r in right]
    answers = [Answer(e.id, text) for e, text in zip(examples, texts, strict=True)]
    row = score(answers, examples, resamples=500)["tasks"]["avqa"]
    mean, half = right.mean(), 1.96 * right.std() / 20
    assert row["accuracy"] == pytest.approx(mean)
    assert row["intervals"]["accuracy"] == pytest.approx([mean - half, mean + half], abs=0.012)


def test_an_interval_is_the_middle_95_percent():
    assert scoring.interval(range(1001)) == [25, 975]


def test_the_bootstrap_draws_as_many_answers_as_there_are_a_thousand_times_from_seed_0():
    right = np.array([1, 0, 0, 1, 1, 0, 1])
    examples = [avqa(f"{i}", "yes") for i in range(7)]
    answers = [Answer(e.id, TASKS["avqa"].target("yes" if r else "no")) for e, r in zip(examples, right, strict=True)]
    rng = np.random.default_rng(0)
    drawn = [right[rng.integers(0, 7, 7)].mean() for _ in range(1000)]
    row = score(answers, examples)["tasks"]["avqa"]
    assert row["intervals"]["accuracy"] == pytest.approx(np.percentile(drawn, (2.5, 97.5)))
    judged = [scoring.judge(e, a, None) for e, a in zip(examples, answers, strict=True)]
    assert scoring.intervals(judged) == row["intervals"] == scoring.summarise(judged)["tasks"]["avqa"]["intervals"]
    other = scoring.intervals(judged, seed=1)
    assert other != row["intervals"] and other == score(answers, examples, seed=1)["tasks"]["avqa"]["intervals"]
    several = [ave(f"{i}", "Dog", i, 10 - i // 2) for i in range(6)]
    for kind in ("empty", "constant"):
        default, seeded, fewer = (
            baseline_results(several, kind, **options)["tasks"]["ave"]["intervals"]
            for options in ({}, {"seed": 0, "resamples": 1000}, {"seed": 1, "resamples": 7})
        )
        assert default == seeded != fewer


def test_labels_are_checked_before_any_mask_is_read():
    bad = [*EXAMPLES[:2], dataclasses.replace(EXAMPLES[2], meta={"event": "Cat"})]

    def read(example):
        raise AssertionError("a mask was read")

    with pytest.raises(InputError, match="start"):
        score([], bad, read)
    for kind in ("empty", "constant"):
        with pytest.raises(InputError, match="start"):
            baseline_results(bad, kind, read)


def test_a_task_without_examples_has_no_results_and_a_metric_that_is_undefined_no_value():
    assert score([], [])["tasks"] == {} == baseline_results([], "constant")["tasks"]
    row = score([], EXAMPLES[:1], resamples=2)["tasks"]["ave"]
    assert (
        set(row) - set(scoring.COUNTS) == set(row["intervals"]) == {"accuracy", "accuracy_inclusive", "event_accuracy"}
    )


def test_an_interval_is_missing_where_no_resample_defines_its_metric():
    row = {"accuracy": 0.5, "n": 2, "n_unparsed": 1, "n_no_mask": 0, "intervals": {}}
    table = markdown({"tasks": {"ave": row}})
    assert "| ave | accuracy | 0.5000 | nan .. nan | - | - |" in table


def test_the_tables_of_a_result():
    results = score(PERFECT[:1], EXAMPLES[:1], resamples=2)
    one = "1.0000 | 1.0000 .. 1.0000"
    head = (
        "| task | n | metric | value | 95 % interval | unreadable | no mask |\n|---|---|---|---|---|---|---|\n"
        f"| ave | 1 | accuracy | {one} | 0 | 0 |\n"
    )
    every = "| task | metric | all | 95 % interval | answered | 95 % interval |\n|---|---|---|---|---|---|\n"
    for metric in ("accuracy", "accuracy_inclusive", "event_accuracy"):
        every += f"| ave | {metric} | {one} | {one} |\n"
    assert scoring.headlines(results) == head and markdown(results) == f"{head}\n{every}"


def test_bootstrap_is_seeded():
    answers = [Answer(e.id, TASKS["avqa"].target("yes")) for e in EXAMPLES[3:]]
    one, two = (score(answers, EXAMPLES[3:], resamples=50, seed=s) for s in (1, 1))
    assert one == two


def test_constant_baseline_is_the_best_single_answer():
    results = baseline_results(EXAMPLES, "constant", resamples=5)["tasks"]
    assert results["avqa"]["accuracy"] == pytest.approx(2 / 3)
    best = max(
        score([Answer(e.id, TASKS["ave"].target(event, s, t)) for e in EXAMPLES[:3]], EXAMPLES[:3], resamples=1)[
            "tasks"
        ]["ave"]["accuracy"]
        for event in ("Dog", "Cat")
        for s, t in ((0, 10), (2, 5), (0, 4), (1, 7))
    )
    assert results["ave"]["accuracy"] == pytest.approx(best)
    assert results["ave"]["n_unparsed"] == 0


def test_empty_baseline_reads_nothing():
    results = baseline_results(EXAMPLES, "empty", resamples=5)["tasks"]
    assert results["ave"]["n_unparsed"] == 3 and results["ave"]["accuracy"] == pytest.approx((0 + 0.7 + 0.6) / 3)
    assert results["avqa"]["accuracy"] == 0.0
    with pytest.raises(InputError, match="unknown baseline"):
        baseline_results(EXAMPLES, "best")


def binary_example(name):
    meta = {"objects": ["dog"], "video": name}
    return Example(id=name, task="s4", instruction="?", mask=f"{name}.png", mask_kind="binary", meta=meta)


def disc(size=16):
    y, x = np.mgrid[:size, :size] - size / 2
    return (x**2 + y**2 < 20).astype(np.int32)


def test_masks_are_scored_and_a_missing_one_counts():
    examples = [binary_example("m1"), binary_example("m2")]
    both = [Answer("m1", "", disc().astype(np.float32)), Answer("m2", "", disc().astype(np.float32))]
    full = score(both, examples, lambda e: disc(), resamples=5)["tasks"]["s4"]
    half = score(both[:1], examples, lambda e: disc(), resamples=5)["tasks"]["s4"]
    headline = TASKS["s4"].headline
    assert full["n_no_mask"] == 0 and half["n_no_mask"] == 1 and half["n"] == 2
    assert full[headline] == pytest.approx(1.0, abs=1e-4) and half[headline] < full[headline]
    with pytest.raises(InputError, match="scored against a mask"):
        score(both, examples)
    constant = baseline_results(examples, "constant", lambda e: disc(), resamples=5)["tasks"]["s4"]
    assert constant[headline] == pytest.approx(1.0, abs=1e-4)  # the masks are all alike, so one answer fits all


def test_table_shows_every_metric_with_its_interval():
    results = score(PERFECT, EXAMPLES, resamples=5)
    table = markdown(results)
    assert "| ave | 3 | accuracy | 1.0000 | 1.0000 .. 1.0000 | 0 | 0 |" in table
    assert "| ave | accuracy | 1.0000 | 1.0000 .. 1.0000 | 1.0000 | 1.0000 .. 1.0000 |" in table
    assert all(
        f"| {name} | {metric} |" in table
        for name, row in results["tasks"].items()
        for metric in row["intervals"]
        if not metric.endswith(scoring.PARSED)
    )
    assert table.startswith(scoring.headlines(results))


def test_every_metric_is_bootstrapped_when_a_group_is_rare():
    rare = dataclasses.replace(EXAMPLES[3], meta={"answer": "yes", "type": ["Visual", "Location"]})
    row = score(PERFECT[3:], [rare, *EXAMPLES[4:]], resamples=60)["tasks"]["avqa"]
    assert row["intervals"]["visual_location"] == [1.0, 1.0]
    assert scoring.RESAMPLES == 1000


def test_every_metric_is_given_over_the_readable_answers_too():
    answers = [
        Answer("a", EXAMPLES[0].target),
        Answer("b", "no idea"),
        Answer("d", "?"),
        Answer("e", EXAMPLES[4].target),
        Answer("f", EXAMPLES[4].target),
    ]
    rows = score(answers, EXAMPLES, resamples=40)["tasks"]
    assert (rows["ave"]["n_unparsed"], rows["ave"]["accuracy_parsed"]) == (2, 1.0)
    assert rows["avqa"]["accuracy"] == pytest.approx(1 / 3) and rows["avqa"]["accuracy_parsed"] == 0.5
    assert rows["avqa"]["audio_counting_parsed"] == 0.5 and rows["avqa"]["intervals"]["accuracy_parsed"] == [0.0, 1.0]
    for name, row in rows.items():
        metrics = set(row) - set(scoring.COUNTS)
        assert metrics == {m + suffix for m in row if m in TASKS[name].metrics for suffix in ("", scoring.PARSED)}
    assert "accuracy_parsed" not in score([], EXAMPLES, resamples=2)["tasks"]["ave"]


def test_for_a_task_with_masks_the_answered_ones_are_those_with_a_mask():
    examples = [binary_example("m1"), binary_example("m2")]
    answers = [Answer("m1", "cannot be read", disc().astype(np.float32)), Answer("m2", examples[1].target)]
    row = score(answers, examples, lambda e: disc(), resamples=5)["tasks"]["s4"]
    assert (row["miou"], row["miou_parsed"], row["f_score_video_parsed"]) == pytest.approx((0.5, 1.0, 1.0))
    assert row["mask_rate"] == 0.5 and "mask_rate_parsed" not in row
    assert (row["n"], row["n_unparsed"], row["n_no_mask"]) == (2, 2, 1)


def test_every_metric_of_a_task_is_described_and_every_published_number_is_one_of_ours():
    for task in TASKS.values():
        assert task.headline in task.metrics
        for row in task.published:
            assert row.source and set(row.scores) <= set(task.metrics)
            assert all(0 < value < 1 for value in row.scores.values())
