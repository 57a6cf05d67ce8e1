"""Comparing two evaluations: differences are paired, intervals are honest, and bad folders are named."""

import json

import numpy as np
import pytest

from crab_jax import compare as verb
from crab_jax.evaluation import judging, predictions
from crab_jax.evaluation.scoring import Answer, judge
from crab_jax.inference import read_answer
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines.examples import Example, write_jsonl

COUNT = 120
EXAMPLES = [
    Example(id=f"q{i:03d}", task="avqa", instruction="?", meta={"answer": "yes", "type": ["Audio", "Counting"]})
    for i in range(COUNT)
]
RIGHT, WRONG = TASKS["avqa"].target("yes"), TASKS["avqa"].target("no")


def judged(right):
    return [judge(e, Answer(e.id, RIGHT if r else WRONG), None) for e, r in zip(EXAMPLES, right, strict=True)]


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    a = rng.random(COUNT) < 0.5
    b = a.copy()
    b[np.flatnonzero(~a)[:12]] = True  # B is right wherever A is, and twelve times more
    row = verb.paired(judged(a), judged(b), resamples=300)["accuracy"]
    assert row["difference"] == pytest.approx(0.1) and row["b"] - row["a"] == pytest.approx(0.1)
    half = 1.96 * (b.astype(float) - a).std() / np.sqrt(COUNT)
    assert row["interval"] == pytest.approx([0.1 - half, 0.1 + half], abs=0.02)
    unpaired = 1.96 * np.sqrt((a.var() + b.var()) / COUNT)
    assert row["interval"][1] - row["interval"][0] < unpaired and verb.differs(row)
    same = verb.paired(judged(a), judged(a), resamples=20)["accuracy"]
    assert same["interval"] == [0, 0] and not verb.differs(same)


@pytest.fixture
def folders(tmp_path):
    """Two evaluations: B answers the first 100 examples, wrongly where A is right, thirty times."""
    write_jsonl(tmp_path / "test.jsonl", EXAMPLES)
    for name, texts in (("a", [RIGHT] * COUNT), ("b", [WRONG] * 30 + [RIGHT] * 70)):
        out = tmp_path / name
        out.mkdir()
        list(
            predictions.append(
                out / predictions.FILE, (read_answer(e, text, None) for e, text in zip(EXAMPLES, texts, strict=False))
            )
        )
        (out / judging.DESCRIPTION).write_text(json.dumps({"data": str(tmp_path), "split": "test"}))
    return tmp_path


def code(*arguments):
    with pytest.raises(SystemExit) as end:
        verb.main([str(a) for a in arguments])
    return end.value.code


def test_the_verb_compares_what_both_have_and_gates(folders, monkeypatch, capsys):
    monkeypatch.setattr(verb.paired, "__defaults__", (50, 0))
    a, b, out = folders / "a", folders / "b", folders / "difference.json"
    assert code(a, b, "--out", out) == 0 and code(a, b, "--gate") == 3 and code(b, a, "--gate") == 0
    shown = capsys.readouterr().out
    assert "20 samples are in" in shown and "worse in B: avqa" in shown
    assert "| avqa | 100 | accuracy | 1.0000 | 0.7000 | -0.3000 |" in shown
    found = json.loads(out.read_text())["tasks"]["avqa"]
    assert found["n"] == 100 and found["metrics"]["accuracy"]["difference"] == pytest.approx(-0.3)


def test_bad_folders_are_named(folders, capsys):
    assert code(folders / "a", folders) == 2 and "evaluation.json" in capsys.readouterr().err
    assert code(folders / "a", folders / "b", "--tasks", "ave") == 2
    assert "no sample in common" in capsys.readouterr().err
    (folders / "b" / judging.DESCRIPTION).write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        verb.judged_samples(folders / "b", "", ())


def test_a_label_that_cannot_be_scored_is_named(folders, capsys):
    broken = Example(id="q000", task="avqa", instruction="?", meta={"type": ["Audio", "Counting"]})
    write_jsonl(folders / "test.jsonl", [broken, *EXAMPLES[1:]])
    assert code(folders / "a", folders / "b") == 2
    assert "example 'q000' [meta.answer]" in capsys.readouterr().err
