"""Evaluation during training: it changes nothing, is resumed, counts every held-out sample once, and refuses early."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from crab_jax import inference, losses, optim, train
from crab_jax.checkpoints.stored import load_params
from crab_jax.config import RunConfig, resolve
from crab_jax.evaluation import held_out
from crab_jax.evaluation.results import METRICS
from crab_jax.io.errors import InputError
from crab_jax.io.structured import read_lines
from crab_jax.parallel import sharding
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.reports import run_page
from crab_jax.runs import run_folder, run_params
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import sample_metric
from crab_jax.training.metrics_log import Logger
from crab_jax.training.train_step import TrainState, loss_rows
from data_pipelines import mixture
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import read_jsonl, write_jsonl
from tests.test_distributed import Processes

FEW = ("arig", "s4")  # which fill one bucket each
KINDS = ("arig", "s4", "avss")  # of answers: boxes, and masks of both kinds in one bucket


def config_of(root: Path, tasks: tuple[str, ...] = tuple(TASKS), **changes) -> RunConfig:
    """The tiny warm start on some tasks; `changes` of keys, with __ for a dot."""
    config = tiny.get_config()
    config.data.root, config.data.batch_size = str(root), 4
    config.steps, config.log_every, config.checkpoint_every, config.mesh.data = 3, 1, 2, 1
    config.eval_split = "test"  # of which the scenes have more than of val
    config.data.weights.update({task: float(task in tasks) for task in TASKS})
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    return resolve(config)


def records(workdir: Path) -> tuple[list[dict], list[dict]]:
    """(records of training without speeds, records of evaluations) of a run."""
    lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    trained = [
        {
            k: v
            for k, v in line.items()
            if not (k.endswith(("_per_s", "wait_share")) or k.startswith(("goodput", "first_step", "programs")))
        }
        for line in lines
        if "loss" in line
    ]
    return trained, [line for line in lines if "loss" not in line]


def quick_step(config, model, mesh, state, tx, micro_batches):
    """A step that costs nothing to compile: whatever is changed of its state or its data shows in its loss."""

    def step(state, frozen, batch):
        seen = (batch.tokens.sum() % 97) / 97
        trainable = jax.tree.map(lambda x: x * (1 - 0.1 * seen), state.trainable)
        loss = seen + optax.global_norm(trainable)
        none = jnp.zeros(len(TASKS))
        metrics = {"loss": loss, "terms": {"text": losses.Term(loss, 1.0)}, "by_task": losses.Term(none, none)}
        metrics |= {"grad_norm": loss, "tokens": 1, "slots": 1, "skipped": 0, "bad_rows": 0, "bad_index": 0}
        return TrainState(state.step + 1, trainable, state.opt), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_training_is_the_same_with_evaluations_which_a_stopped_run_makes_up_for(
    scenes_root, tmp_path, monkeypatch, real
):
    evaluations = {"eval_every": 2, "eval_samples": 2}
    if not real:
        monkeypatch.setattr(train, "compile_step", quick_step)

    def run(name: str, **changes) -> tuple[list[dict], list[dict]]:
        train.train(config_of(scenes_root, ("s4",), **changes), tmp_path / name)
        return records(tmp_path / name)

    plain, none = run("plain")
    assert not none and [one["step"] for one in plain] == [1, 2, 3]
    trained, evaluated = run("evaluated", **evaluations)
    assert trained == plain, "not a bit of training is changed"
    assert jax.tree.all(
        jax.tree.map(np.array_equal, load_params(tmp_path / "plain"), load_params(tmp_path / "evaluated"))
    )
    assert [one["step"] for one in evaluated] == [0, 2, 3], "the start, every second step, the end"
    for one in evaluated:
        assert all(key == "step" or key.startswith("eval/") for key in one) and one["eval/samples"] == 2
        assert {"eval/loss", "eval/loss/text/s4", "eval/loss/dice/s4"} < one.keys()
    assert evaluated[0]["eval/loss"] != evaluated[-1]["eval/loss"]
    compiled = json.loads((tmp_path / "evaluated" / "compilations.json").read_text())
    assert compiled == {"train_step": 1, "evaluation": 1}

    # As if killed after step 3 was trained and before the checkpoint of step 2 was evaluated.
    shutil.copytree(tmp_path / "evaluated", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "3")
    log = tmp_path / "killed" / "metrics.jsonl"
    lines = log.read_text().splitlines(True)
    lines.remove(next(line for line in lines if '"step": 2' in line and "eval/loss" in line))
    log.write_text("".join(lines))
    assert run("killed", **evaluations) == (trained, evaluated)
    assert len(log.read_text().splitlines()) == len(lines) + 1

    # A run may be evaluated from some step on; SIGTERM during an evaluation ends it after that with a checkpoint.
    shutil.copytree(tmp_path / "plain", tmp_path / "later")
    shutil.rmtree(tmp_path / "later" / "checkpoints" / "3")
    original = held_out.Evaluation.run

    def terminated(self, at, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, at, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(held_out.Evaluation, "run", terminated)
        assert run("later", **evaluations)[1] == evaluated[1:2]
    assert (tmp_path / "later" / "checkpoints" / "3").is_dir()
    assert run("later", **evaluations) == (plain, evaluated[1:])


@pytest.fixture(scope="module")
def whole(scenes_root):
    """(config, model, parameters, evaluation of the warm start with answers, what it waited for, its record)."""
    config = config_of(scenes_root, KINDS, eval_every=1, eval_samples=3, eval_answers=True)
    model, mesh = config.model.build(), sharding.make_mesh(1, devices=jax.devices()[:1])
    params = run_params.initial_params(config, model, run_params.wanted_params(config, model, mesh))
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    tokenizer = run_folder.tokenizer_of(config)
    evaluation = held_out.Evaluation(config, model, mesh, tokenizer, held_out.held_out(config, tokenizer), trainable, 1)
    waited = []

    class Noting(Watchdog):
        def waiting(self, what):
            waited.append(what)
            return super().waiting(what)

    record = evaluation.run(7, trainable, frozen, Noting(0))
    compiled = evaluation.compilations
    assert evaluation.run(8, trainable, frozen, Watchdog(0)) == record and evaluation.compilations == compiled
    return config, model, params, evaluation, waited, record


@pytest.mark.slow
def test_every_sample_counts_once_in_exactly_the_terms_of_training(whole):
    """Batches with filler rows against the samples one by one."""
    config, model, params, evaluation, waited, record = whole
    sums: dict[str, np.ndarray] = {}
    tokenizer = run_folder.tokenizer_of(config)
    ones = mixture.eval_batches(evaluation.examples, config.mixture.root, tokenizer, config.data, 1, prompt_only=False)
    rows_of = jax.jit(lambda params, batch: loss_rows(model.apply({"params": params}, batch), batch))
    for _, batch in ones:
        task = evaluation.examples[batch.index[0]].task
        for term, rows in rows_of(params, batch).items():
            pair = np.array([float(rows.sum.sum()), float(rows.number.sum())])
            for key in (f"eval/loss/{term}", f"eval/loss/{term}/{task}"):
                sums[key] = sums.get(key, 0) + pair
    wanted = {key: total / number for key, (total, number) in sums.items() if number}
    measured = {key: value for key, value in record.items() if key.startswith("eval/loss/")}
    assert measured.keys() == wanted.keys()
    assert {f"eval/loss/text/{example.task}" for example in evaluation.examples} < wanted.keys()
    for key, value in wanted.items():
        assert measured[key] == pytest.approx(value, rel=1e-5), key
    terms = {name: losses.Term(*map(np.float32, sums[f"eval/loss/{name}"])) for name in held_out.TERMS}
    assert record["eval/loss"] == pytest.approx(float(losses.total(terms, config.loss)), rel=1e-5)
    assert record["eval/samples"] == len(evaluation.examples)
    assert any((batch.index < 0).any() for batch in evaluation.batches), "there is filler"
    assert (
        waited[0]
        == f"batch 1 of {len(evaluation.batches)} of the evaluation at step 7 (the first evaluation is compiled)"
    )


@pytest.mark.slow
def test_answers_are_those_that_predict_gives(whole):
    """Read from batches that hold the true answers as well, which must not be seen."""
    config, model, params, evaluation, _, record = whole
    tokenizer, mesh = evaluation.tokenizer, sharding.make_mesh(1, devices=jax.devices()[:1])
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    texts, masks = {}, {}
    for batch in evaluation.batches:
        found = jax.device_get(evaluation.answers_of(trainable, frozen, batch))
        length = found["tokens"].shape[1]
        for row in np.flatnonzero(batch.index >= 0):
            example = evaluation.examples[batch.index[row]]
            texts[example.id] = tokenizer.decode(found["tokens"][row])
            masks[example.id] = found["has_mask"][row] if "has_mask" in found else False
    predicted = inference.predict_examples(
        model, params, config, tokenizer, evaluation.examples, config.mixture.root, 4, length, mesh=mesh
    )
    for one in predicted:
        assert texts[one.example.id] == one.text and masks[one.example.id] == (one.mask is not None)
    headlines = {f"eval/{sample_metric(TASKS[name])}/{name}" for name in KINDS}
    assert {key for key in record if not key.startswith("eval/loss")} == headlines | {"eval/samples"}


@pytest.mark.slow
def test_true_answers_have_the_best_score(whole):
    """The metrics are those of the tasks, on the true masks."""
    _, _, _, evaluation, _, _ = whole
    answers = []
    for batch in evaluation.batches:
        tokens = np.full((len(batch.index), 400), evaluation.tokenizer.pad_id)
        for row in np.flatnonzero(batch.index >= 0):
            ids = evaluation.tokenizer.ids(evaluation.examples[batch.index[row]].target + "</s>")
            tokens[row, : len(ids)] = ids
        answers.append({"tokens": tokens, "index": batch.index})
        if batch.seg_kind.shape[1]:
            truth = batch.seg_target[:, 0]
            drew = {"binary": truth.astype(np.float32), "semantic": truth, "truth": truth}
            answers[-1] |= drew | {"has_mask": np.ones(len(truth), bool)}
    record = held_out.answer_record(answers, evaluation.examples, evaluation.tokenizer)
    for name in {example.task for example in evaluation.examples} - {"avcap"}:  # which compares captions with others
        assert record[f"eval/{sample_metric(TASKS[name])}/{name}"] == pytest.approx(1, abs=1e-3), name


def test_the_samples_are_spread_over_the_split_whatever_the_seed(scenes_root):
    config = config_of(scenes_root, eval_every=3, eval_samples=2)
    tokenizer = run_folder.tokenizer_of(config)
    chosen = held_out.held_out(config, tokenizer)
    listed = [example for example in read_jsonl(scenes_root / "test.jsonl") if example.task == "ref-avs"]
    ours = [example.id for example in chosen.examples if example.task == "ref-avs"]
    assert ours == [listed[0].id, listed[len(listed) // 2].id] and len(listed) > 2
    for changes in ({"seed": 9}, {"data__batch_size": 2}):
        other = config_of(scenes_root, eval_every=3, eval_samples=2, **changes)
        assert held_out.held_out(other, tokenizer) == chosen
    few = held_out.held_out(config_of(scenes_root, FEW, eval_every=3), tokenizer)
    assert {example.task for example in few.examples} == set(FEW)
    line = chosen.described()
    assert line.startswith("evaluation every 3 steps on examples of test: 2 of avqa, 2 of ave") and line.endswith(
        "; none of ms3"
    )
    assert held_out.held_out(config_of(scenes_root), tokenizer) is None, "never is the default"


def test_when_a_run_is_evaluated():
    every = {n: held_out.HeldOut((), {}, n, 5, "val", ()) for n in (2, 3, 7)}
    steps = {n: [step for step in range(6) if one.due(step)] for n, one in every.items()}
    assert steps == {2: [0, 2, 4, 5], 3: [0, 3, 5], 7: [0, 5]}


def refused(root: Path, **changes) -> str:
    """The one line that refuses a run on a root."""

    def start() -> None:
        config = config_of(root, **{"eval_every": 1, "eval_split": "val", **changes})
        held_out.held_out(config, run_folder.tokenizer_of(config))

    with pytest.raises(InputError) as stop:
        start()
    assert "\n" not in str(stop.value)
    return str(stop.value)


def test_what_cannot_be_evaluated_on_is_refused_before_anything_is_loaded(scenes_root, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    lines = (scenes_root / "val.jsonl").read_text().splitlines(True)
    shutil.copy(scenes_root / "train.jsonl", root)
    assert "[eval_split]: is 'val', which cannot be read: " in refused(root) and "val.jsonl" in refused(root)
    assert "--config.eval_every=0" in refused(root)
    (root / "val.jsonl").write_text("".join(line for line in lines if json.loads(line)["task"] == "avqa"))
    assert "'val', which has no example with an answer of any task" in refused(root, tasks=FEW)
    examples = [dataclasses.replace(example, target="") for example in read_jsonl(scenes_root / "val.jsonl")]
    write_jsonl(root / "val.jsonl", examples)
    assert "no example with an answer" in refused(root)
    (root / "val.jsonl").write_text("{}\n")
    assert "val.jsonl:1" in refused(root)
    for split in ("train", "val+train"):
        assert "is trained on (data.split is 'train')" in refused(scenes_root, eval_split=split)
    config_of(scenes_root, eval_split="train")  # which means nothing without evaluations

    def loaded(*_):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(train, "start_or_resume", loaded)
    (root / "val.jsonl").unlink()
    with pytest.raises(InputError, match="eval_split"):
        train.train(config_of(root, eval_every=1, eval_split="val"), tmp_path / "run")


@pytest.fixture
def damaged(scenes_root, tmp_path) -> Path:
    """A root whose first held-out clip is none."""
    root = tmp_path / "damaged"
    shutil.copytree(scenes_root, root)
    first = next(example for example in read_jsonl(root / "test.jsonl") if example.video)
    (root / first.video).write_bytes(b"no film")
    return root


def answered(config: RunConfig, batch_size: int, rows=slice(None)) -> list:
    tokenizer = run_folder.tokenizer_of(config)
    chosen = held_out.held_out(config, tokenizer)
    return mixture.answered_batches(
        chosen.examples, chosen.groups, config.mixture.root, tokenizer, config.data, batch_size, rows
    )


def test_a_damaged_sample_is_left_out_in_its_place_or_ends_the_run(scenes_root, damaged):
    sound = answered(config_of(scenes_root, eval_every=1), 4)
    config = config_of(damaged, eval_every=1, data__on_error="skip")
    left = answered(config, 4)
    assert len(left) == len(sound)
    places = [(one.index, other.index) for one, other in zip(sound, left, strict=True)]
    missing = sum(int(((one >= 0) & (other < 0)).sum()) for one, other in places)
    assert missing > 0 and all(((other == one) | (other < 0)).all() for one, other in places)
    with pytest.raises(InputError, match="video"):
        answered(config_of(damaged, eval_every=1), 4)


def test_processes_share_every_batch(scenes_root):
    config = config_of(scenes_root, eval_every=1, eval_samples=3)
    both = answered(config, 4)
    parts = [answered(config, 4, rows) for rows in (np.array([0, 1]), np.array([2, 3]))]
    for one, left, right in zip(both, *parts, strict=True):
        for name in (field.name for field in dataclasses.fields(one)):
            whole, halves = getattr(one, name), [getattr(part, name) for part in (left, right)]
            assert np.array_equal(whole, np.concatenate(halves)), name
            assert whole.dtype == halves[0].dtype == halves[1].dtype, name
    kinds = {name: value.dtype for name, value in vars(empty_batch(Bucket(8, 1, 1, 98, 1), 1, 8)).items()}
    assert kinds == {name: value.dtype for name, value in vars(both[0]).items()}, "filler compiles to the same program"


@pytest.mark.exhaustive
def test_two_processes_on_a_split_mesh_evaluate_together(scenes_root, tmp_path):
    """To rounding what one device measures."""
    options = ["--config.steps=3", "--config.eval_every=1", "--config.eval_split=test", "--config.eval_answers=true"]
    options += [f"--config.data.weights.{task}=0.0" for task in TASKS if task not in FEW]
    ended = Processes(2, scenes_root, tmp_path / "both", *options, "--config.mesh.fsdp=2", devices=2).end()
    ended += Processes(1, scenes_root, tmp_path / "alone", *options, devices=1).end()
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    both, alone = (records(tmp_path / name)[1] for name in ("both", "alone"))
    assert [one["step"] for one in both] == [0, 1, 2, 3]
    for one, other in zip(both, alone, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key.startswith("eval/loss"):
                assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert "evaluation at step" in ended[0][1] and "evaluation at step" not in ended[1][1]


def test_a_run_that_goes_on_may_change_its_evaluations(scenes_root, tmp_path):
    config = config_of(scenes_root)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "manifest.json").write_text("{}")
    young = config.to_dict()
    for key in ("eval_every", "eval_split", "eval_samples", "eval_answers"):
        young.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(young))  # of a run from before there were evaluations
    others = {"eval_every": 3, "eval_split": "val", "eval_samples": 9, "eval_answers": True}
    run_folder.claim_workdir(tmp_path, config_of(scenes_root, **others))
    before = {"eval_every": 0, "eval_split": "val", "eval_samples": 4, "eval_answers": False}
    assert run_folder.load_config(tmp_path) == dataclasses.replace(config, **before)


def test_the_time_of_an_evaluation_is_no_part_of_the_speed_of_training(tmp_path, capsys):
    logger = Logger(tmp_path, 10, 0, lambda step: 0.1, 1)
    before = logger.mark, logger.began
    logger.add_evaluation(0, {"eval/loss": 2.0, "eval/samples": 3.0}, 50.0)
    logger.close()
    assert (logger.mark, logger.began) == (before[0] + 50, before[1] + 50)
    assert "evaluation at step 0/10  loss 2.0000  3 examples  50.0 s" in capsys.readouterr().out
    assert logger.evaluated(0) and not logger.evaluated(1)
    assert list(read_lines(tmp_path / "metrics.jsonl", METRICS, constants=True)) == [
        {"step": 0, "eval/loss": 2.0, "eval/samples": 3.0}
    ]


def test_the_page_of_a_run_shows_its_evaluations_apart(tmp_path):
    trained = [{"step": step, "loss": 3.0 / step, "loss/text": 1.0, "loss/ave": 1.0} for step in (1, 2)]
    evaluated = [
        {
            "step": step,
            "eval/loss": 4.0 - step,
            "eval/loss/text": 1.5,
            "eval/loss/text/ave": 1.5 - step / 4,
            "eval/accuracy/ave": step / 4,
            "eval/samples": 4.0,
        }
        for step in (0, 1, 2)
    ]
    pages = []
    for number, log in enumerate((trained, [*evaluated, *trained])):
        run_page.write(tmp_path / f"{number}.html", run_page.ReportData("run", metrics=log))
        pages.append((tmp_path / f"{number}.html").read_text())
    without, with_them = pages
    assert "Held-out examples" not in without and "Held-out examples" in with_them
    assert without.count("<figure>") == 2 and with_them.count("<figure>") == 4
    rows = [re.findall("<td>(.*?)</td>", line) for line in with_them.split("<tr>")]
    assert ["ave", "loss/text", "1.500", "1.000", "2", "1.000"] in rows
    assert ["ave", "accuracy", "0.000", "0.500", "2", "0.500"] in rows
    assert ["all", "loss", "4.000", "2.000", "2", "2.000"] in rows
