"""What a run is trained on is noted with its checkpoints, and it goes on with nothing else unless that is asked for."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from configs import tiny
from crab_jax.checkpoints.run_steps import RunCheckpoints
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data
from data_pipelines import prepare
from data_pipelines.examples import Example, learned, read_jsonl, write_jsonl
from tests.test_train import command


def run_on(root: Path, **data) -> tuple:
    """(config, what it is trained on)."""
    config = tiny.get_config()
    config.data.root = str(root)
    config.data.update(data)
    run = resolve(config)
    return run, run_data.data_identity(run, run_data.train_examples(run))


@pytest.fixture
def workdir(tmp_path, scenes_root):
    """A run that was started on the scenes, as far as its manifest tells."""
    checkpoints = RunCheckpoints(tmp_path / "run" / "checkpoints")
    checkpoints.note({"format": 1, "data": run_on(scenes_root)[1]})
    return tmp_path / "run"


def go_on(workdir: Path, root: Path, **data) -> None:
    config, identity = run_on(root, **data)
    run_data.check_data(RunCheckpoints(workdir / "checkpoints"), identity, config)


def manifest(workdir: Path) -> dict:
    return json.loads((workdir / "checkpoints" / "manifest.json").read_text())


@pytest.fixture
def fewer(scenes_root, tmp_path) -> Path:
    """A root with the first half of the scenes' Examples."""
    examples = read_jsonl(scenes_root / "train.jsonl")
    write_jsonl(tmp_path / "fewer" / "train.jsonl", examples[: len(examples) // 2])
    return tmp_path / "fewer"


def test_other_examples_are_refused_and_can_be_asked_for(workdir, scenes_root, fewer, capsys):
    (workdir / "skipped.0.jsonl").write_text('{"index": 3}\n')
    with pytest.raises(InputError, match=r"fewer \[data.root\]: holds other Examples .*allow_other=true"):
        go_on(workdir, fewer)
    go_on(workdir, fewer, allow_other=True)
    assert "holds other Examples" in capsys.readouterr().err
    assert manifest(workdir)["data"] == run_on(fewer)[1], "from now on these are the run's"
    assert not run_data.skipped_examples(workdir), "positions in the other list"
    go_on(workdir, fewer)
    with pytest.raises(InputError, match="other Examples"):
        go_on(workdir, scenes_root)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e[::-1],
        lambda e: e[1:],
        lambda e: [*e[:-1], dataclasses.replace(e[-1], target="no")],
        lambda e: [dataclasses.replace(e[0], second=1), *e[1:]],
        lambda e: [dataclasses.replace(e[0], audio="x.wav"), *e[1:]],
        lambda e: [dataclasses.replace(e[0], meta={**e[0].meta, "one_of": "clip"}), *e[1:]],
    ],
)
def test_whatever_changes_a_batch_is_another_list(scenes_root, change):
    examples = read_jsonl(scenes_root / "train.jsonl")
    assert learned(change(examples)) != learned(examples)


def test_what_changes_no_batch_is_the_same_list(workdir, scenes_root, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(scenes_root, moved)
    go_on(workdir, moved)
    examples = [dataclasses.replace(e, id=f"x{e.id}", meta={"note": 1}) for e in read_jsonl(moved / "train.jsonl")]
    write_jsonl(moved / "train.jsonl", examples)
    go_on(workdir, moved)
    write_jsonl(moved / "test.jsonl", examples[:1])  # of another split
    go_on(workdir, moved)


def test_weights_and_limits_choose_what_a_run_is_trained_on(scenes_root, fewer):
    config, _ = run_on(scenes_root)
    mixture = dataclasses.replace(config.mixture, weights={**config.mixture.weights, "ave": 0.0})
    config = dataclasses.replace(config, mixture=mixture)
    assert run_data.data_identity(config, run_data.train_examples(config)) != run_on(scenes_root)[1]
    half = len(read_jsonl(fewer / "train.jsonl"))
    assert run_on(scenes_root, limit=half)[1] == run_on(fewer)[1]


def test_a_run_goes_from_a_raw_root_to_its_prepared_one_and_not_to_another(workdir, scenes_root, tmp_path):
    options = ("--image-size", "64", "--workers", "0", "--splits", "train")
    prepared = tmp_path / "prepared"
    prepare.run(["--root", str(scenes_root), "--out", str(prepared), *options])
    go_on(workdir, prepared)
    noted = manifest(workdir)["data"]
    assert noted["prepared"] and noted["examples"] == run_on(scenes_root)[1]["examples"]
    shutil.move(prepared, tmp_path / "elsewhere")
    go_on(workdir, tmp_path / "elsewhere")
    prepare.run(["--root", str(scenes_root), "--out", str(tmp_path / "elsewhere"), *options[:-1], "train,test"])
    go_on(workdir, tmp_path / "elsewhere")  # more splits change nothing
    go_on(workdir, scenes_root)
    assert manifest(workdir)["data"] == noted
    shutil.copytree(scenes_root, tmp_path / "changed")
    for clip in (tmp_path / "changed" / "train").rglob("clip.mp4"):
        shutil.copy(next((scenes_root / "test").rglob("clip.mp4")), clip)
    prepare.run(["--root", str(tmp_path / "changed"), "--out", str(tmp_path / "again"), *options])
    with pytest.raises(InputError, match="prepared again.*allow_other=true"):
        go_on(workdir, tmp_path / "again")


def test_a_run_of_an_older_version_is_told_once_and_noted(workdir, scenes_root, fewer, capsys):
    RunCheckpoints(workdir / "checkpoints").note({"format": 1, "frozen_hash": "x"})
    go_on(workdir, scenes_root)
    assert "does not record the data of this run" in capsys.readouterr().err
    assert manifest(workdir) == {"format": 1, "frozen_hash": "x", "data": run_on(scenes_root)[1]}
    go_on(workdir, scenes_root)
    assert not capsys.readouterr().err
    with pytest.raises(InputError, match="other Examples"):
        go_on(workdir, fewer)


def test_a_damaged_manifest_is_one_line(workdir, scenes_root):
    (workdir / "checkpoints" / "manifest.json").write_text("")
    with pytest.raises(InputError, match="manifest.json.*cannot be read"):
        go_on(workdir, scenes_root)


def test_the_hash_of_many_examples_is_a_small_part_of_reading_them(tmp_path):
    import time

    examples = [
        Example(
            id=str(i),
            task="ave",
            instruction="<video> <audio> What is it? " * 4,
            target=f"event {i}",
            video=f"ave/{i}.mp4",
        )
        for i in range(5000)
    ]
    write_jsonl(tmp_path / "train.jsonl", examples)
    began = time.process_time()
    found = read_jsonl(tmp_path / "train.jsonl")
    read = time.process_time() - began
    began = time.process_time()
    learned(found)
    assert time.process_time() - began < 0.5 * read


@pytest.mark.exhaustive
def test_a_run_by_the_command_line_is_locked_and_refuses_other_data(scenes_root, fewer, tmp_path):
    """Cases w9 and w13: two at once, then a resume on a part of the data, then asked for by name."""
    one_task = [
        f"--config.data.weights.{task}=0.0" for task in ("ave", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap")
    ]
    words = [*one_task, "--config.optim.clip_norm=0", "--config.checkpoint_every=1", "--config.log_every=1"]
    both = [
        subprocess.Popen(
            command(scenes_root, tmp_path / "run", *words, "--config.steps=2"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    refused = said[codes.index(2)].splitlines()
    assert len(refused) == 1 and f"is in use by process {both[codes.index(0)].pid} on" in refused[0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2] and not list((tmp_path / "run").glob(".lock*"))
    assert manifest(tmp_path / "run")["data"]["count"] > 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    again = [
        command(fewer, tmp_path / "run", *words, "--config.steps=2", *more)
        for more in ((), ("--config.data.allow_other=true",))
    ]
    done = subprocess.run(again[0], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "other Examples" in done.stderr
    (fewer / "train").symlink_to(scenes_root / "train")
    done = subprocess.run(again[1], capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from step 1" in done.stdout, done.stderr
