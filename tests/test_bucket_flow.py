"""A whole project in a bucket: prepare, train, SIGKILL, resume, evaluate, predict, inspect, report."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crab_jax import compare, evaluate, inspect, predict, report, train
from crab_jax.checkpoints import run_steps
from crab_jax.checkpoints.orbax import COMMIT
from crab_jax.tasks import TASKS
from data_pipelines import index, prepare, shards
from data_pipelines.examples import read_jsonl, write_jsonl
from tests.test_train import SMALL

REPOSITORY = Path(__file__).parent.parent
FEW = ("--samples=1", "--routing-samples=1", "--max-new-tokens=2")  # of a report
SIZES = ("--config.data.video_frames=1", "--config.data.lengths=(272,)", "--config.data.batch_size=2")
STEPS = ("--config.steps=6", "--config.log_every=1", "--config.checkpoint_every=2")


@pytest.fixture(scope="module")
def raw(bucket, scenes_root, tmp_path_factory):
    """A few Examples with the films, sounds and masks that they need, in the bucket."""
    root, needed = tmp_path_factory.mktemp("few"), set()
    for split, tasks in (("train", ("ave",)), ("test", ("ave", "s4"))):
        every = read_jsonl(scenes_root / f"{split}.jsonl")
        kept = [example for task in tasks for example in [e for e in every if e.task == task][:4]]
        write_jsonl(root / f"{split}.jsonl", kept)
        for example in kept:
            needed |= {example.video, example.audio, example.image, example.seg_image, example.mask}
    for name in filter(None, needed):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(scenes_root / name, root / name)
    return bucket.upload(root, "raw")


@pytest.fixture(scope="module")
def data(bucket):
    return bucket.at("prepared")


@pytest.fixture(scope="module")
def run(bucket):
    return bucket.at("run")


def ends_well(verb, *words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        verb.main([str(word) for word in words])
    assert stop.value.code == 0


def started(words: list[str], count: int) -> list[subprocess.Popen]:
    """Start a command as `count` processes of one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    environ = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "float32", **together}  # the precision of the tests
    return [
        subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**environ, **({"JAX_PROCESS_ID": str(number)} if together else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def steps(run) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on(bucket, raw, data, run, monkeypatch, capsys):
    """On gs:// two processes are killed and one goes on, which is an elastic restart; on s3:// one is and does."""
    count = 2 if bucket.kind == "gs" else 1
    prepare.run(["--root", str(raw), "--out", str(data), "--workers", "0", "--image-size", "64", "--video-frames", "1"])
    assert shards.opened(data) and index.opened(data, "prepared", "train", "train")
    words = [sys.executable, "-m", "crab_jax.train", "--config=configs/tiny.py", "--config.init_from="]
    words += [f"--config.data.root={data}", f"--workdir={run}", *SMALL, *SIZES, *STEPS]
    words += [f"--config.data.weights.{task}=0.0" for task in TASKS if task != "ave"]
    killed = started(words, count)
    try:
        until = time.monotonic() + 400
        while not (run / "checkpoints" / "2" / COMMIT).is_file():
            for process in killed:
                assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        for process in killed:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert {1, 2} <= set(steps(run)), "every window is in the bucket when it is over"
    (run / "checkpoints" / "5" / "train" / "d" / "half").write_bytes(b"a save that was killed")
    monkeypatch.setattr("sys.argv", words[2:])
    train.main()
    assert "resumed from step" in capsys.readouterr().out
    assert steps(run) == list(range(1, 7)) and run_steps.steps_of(run / "checkpoints") == {4, 6}
    assert not (run / "checkpoints" / "5").exists()

    out, film = bucket.at("eval"), next(raw.rglob("*.mp4"))
    asked = (f"--checkpoint={run}", f"--out={out}", "--limit=1", "--tasks=ave", "--max-new-tokens=2")
    ends_well(evaluate, *asked)
    assert json.loads((out / "results.json").read_bytes())["tasks"]["ave"]
    ends_well(evaluate, *asked)
    assert "are answered already" in capsys.readouterr().out
    ends_well(compare, out, out, f"--data={raw}")
    asked = (f"--checkpoint={run}", "--task=ave", f"--video={film}", "--max-new-tokens=2")
    ends_well(predict, *asked, f"--out={bucket.at('answers')}")
    assert len((bucket.at("answers") / "predictions.jsonl").read_bytes().splitlines()) == 1
    assert not [path for path in REPOSITORY.iterdir() if path.name in ("gs:", "s3:")]


@pytest.mark.exhaustive  # compiles for masks and for pictures of the router, after the run above
def test_a_run_in_a_bucket_has_masks_router_and_report(bucket, raw, run):
    if not run.exists():
        pytest.skip("it is made by the test above")
    example = next(example for example in read_jsonl(raw / "test.jsonl") if example.task == "s4")
    media = {"image": example.seg_image, "audio": example.audio, "mask": example.mask}
    samples = [{"task": "s4", **{f"{kind}_path": str(raw / path) for kind, path in media.items()}}]
    bucket.at("samples.json").write_text(json.dumps(samples))
    said = (f"--checkpoint={run}", "--max-new-tokens=8", "--force-masks")
    ends_well(predict, *said, f"--samples={bucket.at('samples.json')}", f"--out={bucket.at('sampled')}")
    assert [path.name for path in bucket.at("sampled").rglob("*.png")]
    ends_well(inspect, "router", f"--checkpoint={run}", f"--out={bucket.at('inspected')}", "--samples=1")
    assert list(bucket.at("inspected").iterdir())
    page = bucket.at("report.html")
    ends_well(
        report,
        f"--run={run}",
        f"--results={bucket.at('eval') / 'results.json'}",
        f"--data={raw}",
        f"--out={page}",
        *FEW,
    )
    assert b"<html" in page.read_bytes()
    assert not [path for path in REPOSITORY.iterdir() if path.name in ("gs:", "s3:")]
