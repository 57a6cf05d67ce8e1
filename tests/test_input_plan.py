"""What a host must decode for a step, against what a core delivers."""

import json

import pytest

from crab_jax.io.errors import InputError
from crab_jax.reports import input_plan
from crab_jax.reports.input_plan import Need, need_of
from data_pipelines import prepare


def test_samples_and_workers_of_a_host():
    need = need_of(512, 256, 64, 1, 0.5)
    assert need == Need(512, 64, 0.5) and need.host_rate == 16
    assert [need.workers(rate) for rate in (16.0, 15.9, 1000.0, 1.0)] == [1, 2, 1, 16]
    assert need_of(512, 256, 64, 8, 0.5).host_rate == 32, "two hosts of four chips load the same rows"
    assert need_of(512, 256, 64, 4, 0.5).host_rate == 16
    assert need_of(8, 1, 1, 1, 2.0).host_rate == 4


def test_the_plan_of_a_raw_and_of_a_prepared_root(scenes_root, tmp_path, capsys):
    words = ["--config=configs/tiny.py", "--root", str(scenes_root), "--split", "test", "--samples", "1"]
    (tmp_path / "out.json").write_text(json.dumps({"topology": "v5e:4x4", "roofline_s": {"step": 0.01}}))
    input_plan.run([*words, "--compiled", str(tmp_path / "out.json"), "--json", str(tmp_path / "plan.json")])
    said, report = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "v5e:4x4: a batch of 16 in at least 0.01 s on 4 hosts, so each delivers up to 400.0 samples/s" in said
    assert report["hosts"] == 4 and report["host_samples_per_s"] == 400
    for name in ("raw", "prepared"):
        rate = report[name]["core_samples_per_s"]
        assert report[name]["workers_per_host"] == -(-400 // rate) and f"{rate:.1f}" in said
    assert report["prepared"]["core_samples_per_s"] > 2 * report["raw"]["core_samples_per_s"]

    out = tmp_path / "prepared"
    prepare.run(
        ["--root", str(scenes_root), "--out", str(out), "--splits", "test", "--workers", "0", "--image-size", "64"]
    )
    words[2] = str(out)
    input_plan.run([*words, "--hosts", "2", "--step-seconds", "1", "--config.data.batch_size=64"])
    said = capsys.readouterr().out
    assert "2 hosts: a batch of 64 in 1 s on 2 hosts, so each delivers 32.0 samples/s" in said
    assert "\nprepared " in said and "\nraw " not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "or --compiled is needed"),
        (["--step-seconds", "1", "--topology", "v9:2x2"], r"\[--topology\]: 'v9:2x2' is unknown"),
        (["--step-seconds", "1", "--split", "none"], "none.jsonl: no such file"),
        (["--step-seconds", "1", "--config.model=tinny"], "model"),
    ],
)
def test_what_is_missing_is_named(words, message, scenes_root):
    with pytest.raises(InputError, match=message):
        input_plan.run(["--config=configs/tiny.py", "--root", str(scenes_root), *words])
