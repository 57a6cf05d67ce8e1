"""Training: improves, resumes bit for bit after SIGKILL, compiles once per bucket, refuses bad input at once."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import tiny
from crab_jax import optim, train
from crab_jax.checkpoints.stored import load_params
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.parallel import sharding
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.training import goodput, skip_guard, train_step
from data_pipelines import mixture
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import Example, read_jsonl

SMALL = (
    "--config.sizes.llama.layers=1",
    "--config.sizes.clip.layers=2",
    "--config.sizes.clip.taps=(1,2,2)",
    "--config.sizes.beats.layers=1",
    "--config.sizes.visual.layers=1",
    "--config.sizes.audio.layers=1",
)
LEFT_OUT = ("ave", "avvp", "avqa", "ms3", "avss", "ref-avs", "avcap")  # arig and s4 fill one bucket each
TWO_BUCKETS = tuple(f"--config.data.weights.{task}=0.0" for task in LEFT_OUT)


def command(root: Path, workdir: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "crab_jax.train",
        "--config=configs/tiny.py",
        "--config.init_from=",
        f"--config.data.root={root}",
        "--config.data.batch_size=4",
        f"--workdir={workdir}",
        *SMALL,
        *extra,
    ]


def losses_of(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.slow
def test_sigterm_then_sigkill_and_restarts_give_the_losses_of_an_uninterrupted_run_bit_for_bit(scenes_root, tmp_path):
    options = ("--config.steps=12", "--config.log_every=1", "--config.checkpoint_every=3", *TWO_BUCKETS)
    subprocess.run(command(scenes_root, tmp_path / "whole", *options), check=True, capture_output=True)
    killed = tmp_path / "killed"
    with subprocess.Popen(command(scenes_root, killed, *options), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        process.send_signal(signal.SIGTERM)
        told = process.stdout.read()
    stopped = max(losses_of(killed))
    assert process.returncode == 0 and f"stopped on request after step {stopped} of 12" in told
    target = killed / "checkpoints" / str(3 * (stopped // 3 + 1))
    with subprocess.Popen(
        command(scenes_root, killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not target.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    before = losses_of(killed)
    assert max(before) < 12, "the run ended before it was killed"
    done = subprocess.run(command(scenes_root, killed, *options), check=True, capture_output=True, text=True)
    assert "resumed from step" in done.stdout
    whole, resumed = losses_of(tmp_path / "whole"), losses_of(killed)
    assert list(resumed) == list(range(1, 13))
    assert resumed == whole
    again, first = (load_params(tmp_path / name) for name in ("whole", "killed"))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, first))
    windows = goodput.read_windows(killed / goodput.LEDGER)
    starts = {window.session: window.first for window in reversed(windows)}
    seconds = goodput.accounts(windows)
    assert list(starts.values())[::-1][:2] == [0, stopped] and len(starts) == 3
    assert sum(seconds.values()) == pytest.approx(windows[-1].until - windows[0].session)
    assert (seconds["repeated"] > 0) == (max(before) > starts[windows[-1].session])
    assert all(seconds[cause] > 0 for cause in ("productive", "start", "compile", "input", "checkpoint", "restart"))
    assert "in 3 process starts" in done.stdout and "goodput" in killed.joinpath("metrics.jsonl").read_text()
    recompiled = json.loads((tmp_path / "whole" / "compilations.json").read_text())["train_step"]
    config = tiny.get_config()
    config.data.root = str(scenes_root)
    config.data.weights.update(dict.fromkeys(LEFT_OUT, 0.0))
    config = resolve(config)
    buckets = mixture.group_by_bucket(run_data.train_examples(config), run_folder.tokenizer_of(config), config.data)
    assert recompiled == len(buckets) == 2, "one compilation per bucket"


def small_run(root: Path) -> tuple:
    """(step function, fresh state, frozen, batches of two buckets) of a small model on one device."""
    config = tiny.get_config()
    config.init_from, config.data.root, config.data.batch_size, config.steps = "", str(root), 4, 30
    for path, value in (
        ("llama.layers", 1),
        ("clip.layers", 2),
        ("clip.taps", (1, 2, 2)),
        ("beats.layers", 1),
        ("visual.layers", 1),
        ("audio.layers", 1),
    ):
        module, field = path.split(".")
        config.sizes[module][field] = value
    config.data.weights.update(dict.fromkeys(("arig", "ms3", "avss", "ref-avs"), 0.0))
    config = resolve(config)
    model, mesh = config.model.build(), sharding.make_mesh(data=1, devices=jax.devices()[:1])
    params = run_params.initial_params(config, model, run_params.wanted_params(config, model, mesh))
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    tx = optim.optimizer(config.optim, config.steps)
    state = train_step.TrainState(jnp.int32(0), trainable, tx.init(trainable))
    state = jax.device_put(state, sharding.state_shardings(state, trainable, mesh))
    tokenizer = run_folder.tokenizer_of(config)
    data = iter(run_data.train_dataset(config, tokenizer, run_data.train_order(config, tokenizer)))
    return (
        train_step.compile_step(config, model, mesh, state, tx, max(1, config.optim.accumulate)),
        state,
        frozen,
        [next(data) for _ in range(8)],
    )


def test_no_recompilation_after_the_first_pass_over_the_buckets_and_the_loss_falls(scenes_root):
    step, state, frozen, batches = small_run(scenes_root)
    first = {}
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        first.setdefault(batch.tokens.shape, float(metrics["loss"]))
    compiled = step._cache_size()
    for _ in range(3):
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            last = float(metrics["loss"])
    assert step._cache_size() == compiled
    assert last < first[batches[-1].tokens.shape] - 0.3

    before = jax.device_get(state)
    state, metrics = step(state, frozen, batches[0].replace(fbank=np.full_like(batches[0].fbank, np.nan)))
    after = jax.device_get(state)
    assert int(metrics["skipped"]) == 1 and not np.isfinite(metrics["grad_norm"])
    assert int(after.step) == int(before.step) + 1, "a skipped step is a step"
    assert jax.tree.all(jax.tree.map(np.array_equal, after.trainable, before.trainable))
    for new, old in zip(jax.tree.leaves(after.opt), jax.tree.leaves(before.opt), strict=True):
        assert np.array_equal(new, old + (new.dtype == np.int32)), "moments stay, the schedule goes on"
    state, metrics = step(state, frozen, batches[0])
    assert int(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"])


def test_skipped_steps_in_a_row_end_the_run_with_the_batch_saved(tmp_path):
    batch = empty_batch(Bucket(length=5, frames=1, windows=1, fbank_frames=98, masks=0), 2, 8)
    batch = batch.replace(index=np.int32([1, 0]), tokens=batch.tokens + 7)
    examples = [Example(id=name, task="ave", instruction="") for name in ("first", "second")]
    guard = skip_guard.SkipGuard(2, tmp_path, Watchdog(0), examples)

    def run(skipped: list[int]) -> None:
        for step, value in enumerate(skipped, 1):
            guard.add(
                step, {"skipped": value, "loss": np.nan, "grad_norm": np.inf, "bad_rows": 1, "bad_index": 1}, batch
            )
        guard.settle()

    run([1, 0, 1, 0])  # never two in a row
    with pytest.raises(InputError, match="step3.process0.*2 steps up to 3") as stop:
        run([0, 1, 1])
    assert (safetensors.numpy.load_file(stop.value.where)["tokens"] == 7).all()
    rows = read_jsonl(Path(stop.value.where).with_suffix(".jsonl"))
    assert [example.id for example in rows] == ["second", "first"]


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
def test_only_a_run_of_one_step_learns_nothing_which_is_known_at_its_start(schedule, share):
    config = optim.OptimConfig(schedule=schedule, warmup_share=share)
    for steps in (1, 2, 3, 1000):
        rates = optim.learning_rate(config, steps)
        assert train_step.learns_nothing(rates, 0, steps) == (steps == 1)
        assert not train_step.learns_nothing(rates, steps, steps), "nothing is left to do"


def test_the_input_that_is_waited_for_is_named(scenes_root):
    config = tiny.get_config()
    config.data.root, config.data.batch_size = str(scenes_root), 4
    config = resolve(config)
    order = run_data.train_order(config, run_folder.tokenizer_of(config))
    asked = order.batches[6][[1, 3]]
    line = train.input_wait(order, 7, 4, np.array([1, 3]), workers=2)
    assert line == f"input of step 7: worker 0 of 2, on examples {', '.join(order.examples[i].id for i in asked)}"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--config.optim.lrr=1",), "lrr"),
        (("--config.optim={'lr': 1}",), "optim"),
        (("--config.steps=2.5",), "steps"),
        (("--config.model=huge",), "model"),
        (("--config.optim.schedule=cosnie",), "schedule"),
        (("--config.data.root=/nowhere",), "/nowhere"),
        (("--config.init_from=/nowhere",), "/nowhere"),
        (("--config.data.batch_size=5", "--config.optim.accumulate=2"), "batch_size"),
        (("--config.trainable=('vl_projector/.*',)",), "parameter"),
        (("--workdir=/proc/nothing",), "--workdir"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(scenes_root, tmp_path, capsys, monkeypatch, flags, named):
    from crab_jax.io.errors import run_verb

    monkeypatch.setattr(sys, "argv", command(scenes_root, tmp_path / "run", *flags)[2:])
    with pytest.raises(SystemExit) as stop:
        run_verb(train.main)
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(captured) == 1 and named in captured[0], captured


def test_another_config_in_the_same_workdir_is_refused(scenes_root, tmp_path, monkeypatch):
    from crab_jax.config import parse_flags

    words = command(scenes_root, tmp_path, "--config.steps=7")[2:]
    monkeypatch.setattr(sys, "argv", words)  # ml_collections looks for overrides there
    config, workdir = parse_flags(words, "")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "manifest.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    run_folder.claim_workdir(workdir, config)
    young = json.loads((tmp_path / "config.json").read_text())
    young.pop("max_skipped"), young["mesh"].pop("fsdp")
    (tmp_path / "config.json").write_text(json.dumps(young))
    run_folder.claim_workdir(workdir, config)  # a key that is younger than the run
    former = young | {"tokenizer": "data_pipelines/tiny_tokenizer.json"}
    former["sizes"]["llama"]["rope_theta"] = None  # the model's own
    (tmp_path / "config.json").write_text(json.dumps(former))
    run_folder.claim_workdir(workdir, config)  # as it was written before configs were resolved
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1))
    run_folder.claim_workdir(workdir, config)  # another mesh
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))
    with pytest.raises(InputError, match="optim.lr.*0.0003.*0.5"):
        run_folder.claim_workdir(workdir, config)
