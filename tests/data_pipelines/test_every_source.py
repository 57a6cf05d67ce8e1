"""From every original release to a trained, evaluated model: status, validate, prepare, train one epoch, evaluate."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from configs import tiny
from crab_jax.config import resolve
from crab_jax.runs import run_folder
from data_pipelines.batching import load
from data_pipelines.datasets import DATASETS, read, read_examples
from data_pipelines.examples import read_jsonl

ALL = ",".join(DATASETS)
SIZES = (
    "--config.sizes.llama.layers=1",
    "--config.sizes.clip.layers=2",
    "--config.sizes.clip.taps=(1,2,2)",
    "--config.sizes.beats.layers=1",
    "--config.sizes.visual.layers=1",
    "--config.sizes.audio.layers=1",
)
WEAK = {"avvp", "ms3_object"}  # whose training labels give no answer to learn
TEXTS = {
    "BjCEufrlXm4": "A dog is seen. <visual>Dog,(0 10)</visual> and <audio>Speech,(0 4),(6 9)</audio>",
    "KWdhwfzfppg": "<visual>Cello,(1 3)</visual> and <audio>Cello,(1 3)</audio> "
    "<audio>Violin_fiddle,(0 9)</audio> <audio>Accordion,(2 5)</audio>",
    "AP0061o0Nvk": "<visual>Car,(0 10)</visual> and <audio>Car,(0 10)</audio>",
}


def command(*words: object) -> str:
    """Standard output of a verb that must succeed."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(root, workdir, steps: int, *options: str) -> list[float]:
    """The losses of a small model, one a step."""
    command(
        "crab_jax.train",
        "--config=configs/tiny.py",
        "--config.init_from=",
        f"--config.data.root={root}",
        "--config.data.batch_size=2",
        "--config.data.lengths=(256,)",
        f"--config.steps={steps}",
        "--config.data.weights.arig=1.0",
        "--config.data.weights.avss=1.0",
        "--config.log_every=1",
        f"--workdir={workdir}",
        *SIZES,
        *options,
    )
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.exhaustive
def test_every_source_goes_from_its_release_to_scores(releases_root, tmp_path):
    command("data_pipelines", "status", "--root", releases_root, "--json", tmp_path / "status.json")
    report = json.loads((tmp_path / "status.json").read_text())
    assert {count["dataset"] for count in report["counts"]} == set(DATASETS) and report["problems"] == []
    assert all(count["have"] == count["annotated"] > 0 for count in report["counts"])

    command("data_pipelines", "validate", "--root", releases_root, "--json", tmp_path / "validate.json")
    found = json.loads((tmp_path / "validate.json").read_text())["problems"]
    assert all(problem["problem"].startswith("warning") for problem in found)  # shared clips, a stray colour

    config = tiny.get_config()
    config.data.lengths = (256,)
    config = resolve(config)
    decoding, prepared = config.data, tmp_path / "prepared"
    command(
        "data_pipelines",
        "prepare",
        "--root",
        releases_root,
        "--out",
        prepared,
        "--datasets",
        ALL,
        "--splits",
        "train,val,test,test_s,test_u,test_n",
        "--image-size",
        decoding.image_size,
    )
    tokenizer = run_folder.tokenizer_of(config)
    for name in DATASETS:
        for split in DATASETS[name].sizes:
            raw = read(releases_root, name, split)
            assert read(prepared, name, split) == raw
            for example in raw:
                reading = dataclasses.replace(decoding, prompt_only=not example.target)
                row, same = (load(example, root, tokenizer, reading) for root in (releases_root, prepared))
                for field, values in row.items():
                    np.testing.assert_array_equal(values, same[field], f"{example.id} {field}")

    command("data_pipelines", "sample", "--root", prepared, "--n", 1, "--out", tmp_path / "sample")
    page = (tmp_path / "sample/index.html").read_text()
    assert page.count("<svg") == len([name for name in DATASETS if "train" in DATASETS[name].sizes])
    assert 'class="bad"' not in page

    examples = read_examples(releases_root, "train", ALL.split(","))
    assert {example.meta["dataset"] for example in examples} == {
        name for name in DATASETS if "train" in DATASETS[name].sizes
    } - WEAK
    steps = len(examples) // 2
    losses = train(prepared, tmp_path / "run", steps, f"--config.data.datasets={ALL}")
    assert len(losses) == steps and np.isfinite(losses).all()

    command(
        "crab_jax.evaluate",
        "--checkpoint",
        tmp_path / "run",
        "--data",
        releases_root,
        "--datasets",
        ALL,
        "--split",
        "test",
        "--out",
        tmp_path / "test",
        "--batch-size",
        8,
        "--max-new-tokens",
        2,
    )
    answered = [json.loads(line)["id"] for line in (tmp_path / "test/predictions.jsonl").read_text().splitlines()]
    assert sorted(answered) == sorted(
        e.id
        for e in read_examples(releases_root, "test", [name for name in DATASETS if "test" in DATASETS[name].sizes])
    )
    tasks = json.loads((tmp_path / "test/results.json").read_text())["tasks"]
    assert set(tasks) == {"avqa", "ave", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap"}


@pytest.mark.exhaustive
def test_llp_trains_on_the_released_texts_of_av_uie(copied, tmp_path):
    """Its own labels are weak; the other sources are trained on above."""
    root = copied("llp")
    with zipfile.ZipFile(tmp_path / "avvp_converted_label.zip", "w") as archive:
        for video, text in TEXTS.items():
            archive.writestr(f"converted_label/{video}.txt", text)
    command(
        "data_pipelines.av_uie",
        "read",
        "--root",
        root,
        "--datasets",
        "avvp",
        "--labels",
        tmp_path / "avvp_converted_label.zip",
        "--out",
        root / "read.jsonl",
    )
    command("data_pipelines.av_uie", "verify", "--examples", root / "read.jsonl", "--out", root / "checked")
    good = read_jsonl(root / "checked/good.jsonl")
    assert len(good) == len(TEXTS)
    (root / "checked/good.jsonl").rename(root / "train.jsonl")
    assert np.isfinite(train(root, tmp_path / "run", 2)).all()
