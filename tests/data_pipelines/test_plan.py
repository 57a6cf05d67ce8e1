"""The plan of a run's input: what a host must deliver, what a core delivers, and the workers that this takes."""

import re

import pytest

from data_pipelines.__main__ import main
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.plan import Need, Speed, report, workers
from data_pipelines.prepare import main as prepare


def test_a_host_needs_its_share_of_the_batch_in_the_time_of_a_step():
    need = Need(batch_size=256, step_seconds=2.0, hosts=8)
    assert need.per_host == 16
    speed = Speed("R", {"ave": 0.1, "s4": 0.3}, {"ave": 300, "s4": 100})  # 0.15 s on average
    assert speed.per_core == pytest.approx(1 / 0.15) and workers(need, speed) == 3
    first, second, *tasks = report(need, [speed], cores=2)
    assert "16.0 samples/s on each host" in first
    assert "raw R: 6.7 samples/s of a core, 3 workers a host (data.workers=3), more than the 2 cores" in second
    assert tasks == ["  ave: 100.0 ms of CPU a sample, 75.0% of the samples",
                     "  s4: 300.0 ms of CPU a sample, 25.0% of the samples"]  # fmt: skip
    assert "more than" not in report(need, [speed], cores=3)[1]


def test_the_verb_measures_a_raw_root_and_the_same_data_prepared(root, tmp_path, capsys, one_line_error):
    clip = Example("clip", "ave", "See <video> and hear <audio>", target="a dog", video="clip.mp4")
    picture = Example("picture", "avcap", "See <image>", target="a dog", image="0.png", windows="none")
    for name in ("clip.mp4", "0.png"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes((root / name).read_bytes())
    write_jsonl(tmp_path / "raw" / "train.jsonl", [clip, picture])
    with pytest.raises(SystemExit, match="0"):
        prepare(["--root", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--image-size", "32",
                 "--video-frames", "4", "--workers", "0"])  # fmt: skip
    capsys.readouterr()
    argv = ["plan", "--root", str(tmp_path / "raw"), "--prepared", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        main([*argv, "--batch-size", "64", "--step-seconds", "0.001", "--n", "2"])
    said = capsys.readouterr().out
    assert "64000.0 samples/s on each host" in said
    speeds = [float(speed) for speed in re.findall(r"([0-9.]+) samples/s of a core", said)]
    assert len(speeds) == 2 and speeds[1] > speeds[0] and said.count("  ave: ") == said.count("  avcap: ") == 2
    one_line_error(main, argv, "--step-seconds")
    one_line_error(main, [*argv, "--step-seconds", "0"], "--step-seconds.*a number from")
