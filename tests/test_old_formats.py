"""Files that version 0.2.0 wrote (tests/fixtures/v0_2) are read as that version read them."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import crab_jax as cj
from crab_jax import defaults
from crab_jax.config import resolve
from tests.fixtures import make

MADE = Path(__file__).parent / "fixtures" / "v0_2"
EXPECTED = json.loads((MADE / "expected.json").read_text())
ROUNDING = 2e-5  # of float32: two machines, or two compilations on one, may order sums differently


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A folder with `prepared`, `run` and `packed`, as 0.2.0 left them."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(MADE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def command(*words: object) -> str:
    """What `python -m` with these words prints."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_batches_of_an_old_prepared_root_are_those_that_were_recorded(old):
    batches = json.loads(json.dumps(make.batches_of(old / "run", old / "prepared")))
    assert len(batches) == len(EXPECTED["batches"]) == 2
    for batch, recorded in zip(batches, EXPECTED["batches"], strict=True):
        assert batch.keys() == recorded.keys()
        for name, (shape, *values) in recorded.items():
            close = pytest.approx(values, rel=ROUNDING) if name == "fbank" else values
            assert batch[name][0] == shape and batch[name][1:] == close, name


@pytest.mark.slow
def test_an_old_evaluation_goes_on_with_the_same_answers(old):
    """One answer of three is there already: it is kept, as its mark shows, and the others are as they were."""
    folder = old / "run" / "test"
    answers, results = lines_of(folder / "predictions.jsonl"), json.loads((folder / "results.json").read_text())
    (there,) = (answer for answer in answers if answer["task"] == "ave")
    there["text"] += " (kept)"
    (folder / "predictions.jsonl").write_text(json.dumps(there) + "\n")
    (folder / "results.json").unlink()
    said = command(
        "crab_jax.evaluate", "--checkpoint", old / "run", "--data", old / "prepared", *make.EVALUATE, "--out", folder
    )
    assert "moved to" not in said and not (folder / "previous").exists()
    again = {answer["id"]: answer for answer in lines_of(folder / "predictions.jsonl")}
    assert again == {answer["id"]: answer for answer in answers}
    assert json.loads((folder / "results.json").read_text())["tasks"] == results["tasks"]


@pytest.mark.slow
def test_an_old_run_is_resumed_with_the_losses_of_the_uninterrupted_one(old):
    before = lines_of(old / "run" / "metrics.jsonl")
    assert [line["step"] for line in before] == [1, 2]
    words = make.train_options(str(old / "prepared"), str(old / "run"))
    said = command("crab_jax.train", "--config=configs/tiny.py", *words)
    assert f"resumed from step {make.SAVED} of" in said
    after = lines_of(old / "run" / "metrics.jsonl")
    assert after[:2] == before
    for key, recorded in EXPECTED["losses"].items():
        assert [line[key] for line in after] == pytest.approx(recorded, rel=ROUNDING), key


@pytest.mark.slow
def test_an_old_packed_model_answers_as_it_did(old):
    answer, recorded = make.answer_of(old / "packed"), EXPECTED["answer"]
    assert answer["text"] == recorded["text"] and answer["tokens"] == recorded["tokens"]
    assert answer["hidden"] == pytest.approx(recorded["hidden"], rel=ROUNDING)


def test_keys_of_an_old_config_are_still_keys(old):
    """None is renamed or left out without saying so: those of the old file come back with their values."""
    known, stored = resolve(defaults.tiny()).flat(), cj.load(old / "run").config.flat()
    written = json.loads((old / "run" / "config.json").read_text())

    def flat(tree: dict, prefix: str = "") -> dict:
        found = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    for key, value in flat(written).items():
        if value is not None:
            assert key in known, key
            assert json.loads(json.dumps(stored[key])) == value, key
