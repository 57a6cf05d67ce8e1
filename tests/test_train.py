"""Training: improves, resumes bit for bit after SIGKILL, compiles once per bucket, refuses bad input at once."""

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

from configs import tiny
from crab_jax import optim, runs, sharding, train
from crab_jax.config import data_config, model_config
from crab_jax.models.crab import Crab
from data_pipelines import mixture

SMALL = ("--config.sizes.llama.layers=1", "--config.sizes.clip.layers=2", "--config.sizes.clip.taps=(1,2,2)",
         "--config.sizes.beats.layers=1", "--config.sizes.visual.layers=1", "--config.sizes.audio.layers=1")
TEXT_ONLY = ("avqa", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap")  # all but ave


def command(root: Path, workdir: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "crab_jax.train", "--config=configs/tiny.py", "--config.init_from=",
            f"--config.data.root={root}", "--config.data.batch_size=4", f"--workdir={workdir}", *SMALL, *extra]


def losses_of(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.mark.slow
def test_sigkill_and_restart_give_the_losses_of_an_uninterrupted_run_bit_for_bit(scenes_root, tmp_path):
    options = ("--config.steps=12", "--config.log_every=1", "--config.checkpoint_every=3")
    subprocess.run(command(scenes_root, tmp_path / "whole", *options), check=True, capture_output=True)
    killed = tmp_path / "killed"
    with subprocess.Popen(command(scenes_root, killed, *options), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (killed / "checkpoints" / "3").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    before = losses_of(killed)
    assert max(before) < 12, "the run ended before it was killed"
    done = subprocess.run(command(scenes_root, killed, *options), check=True, capture_output=True, text=True)
    assert "resumed from step" in done.stdout
    whole, resumed = losses_of(tmp_path / "whole"), losses_of(killed)
    assert list(resumed) == list(range(1, 13))
    assert resumed == whole
    again, first = (runs.load_params(tmp_path / name) for name in ("whole", "killed"))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, first))
    recompiled = json.loads((tmp_path / "whole" / "compilations.json").read_text())["train_step"]
    config = tiny.get_config()
    buckets = mixture.group_by_bucket(runs.read_examples(scenes_root, "train"), runs.tokenizer_of(config),
                                      data_config(config))
    assert 1 < recompiled <= len(buckets), "one compilation per bucket"


def small_run(root: Path, accumulate: int = 1) -> tuple:
    """(step function, fresh state, frozen, batches of two buckets) of a small model on one device."""
    config = tiny.get_config()
    config.init_from, config.data.root, config.data.batch_size, config.steps = "", str(root), 4, 30
    config.optim.accumulate = accumulate
    for path, value in (("llama.layers", 1), ("clip.layers", 2), ("clip.taps", (1, 2, 2)), ("beats.layers", 1),
                        ("visual.layers", 1), ("audio.layers", 1)):
        module, field = path.split(".")
        config.sizes[module][field] = value
    for task in TEXT_ONLY[2:-1]:
        config.data.weights[task] = float(task == "s4")
    model, mesh = Crab(model_config(config)), sharding.make_mesh(data=1, devices=jax.devices()[:1])
    trainable, frozen = runs.split_params(config, runs.initial_params(config, model), mesh)
    tx = optim.optimizer(optim.OptimConfig(**config.optim), config.steps)
    state = train.TrainState(jnp.int32(0), trainable, tx.init(trainable))
    state = jax.device_put(state, sharding.state_shardings(state, trainable, mesh))
    data = iter(runs.train_dataset(config, runs.tokenizer_of(config)))
    return train.compile_step(config, model, mesh, state), state, frozen, [next(data) for _ in range(8)]


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


def test_micro_batches_with_unequal_token_counts_give_the_same_update(scenes_root):
    once, state_a, frozen, batches = small_run(scenes_root)
    split, state_b, _, _ = small_run(scenes_root, accumulate=2)
    counts = batches[0].loss_mask.sum(1)
    assert counts[:2].sum() != counts[2:].sum(), "the halves must differ for this to test anything"
    state_a, a = once(state_a, frozen, batches[0])
    state_b, b = split(state_b, frozen, batches[0])
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("flags, named", [
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
])
def test_bad_flags_are_one_line_and_exit_2(scenes_root, tmp_path, capsys, monkeypatch, flags, named):
    from crab_jax.errors import run_verb

    monkeypatch.setattr(sys, "argv", command(scenes_root, tmp_path / "run", *flags)[2:])
    with pytest.raises(SystemExit) as stop:
        run_verb(train.main)
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(captured) == 1 and named in captured[0], captured


def test_another_config_in_the_same_workdir_is_refused(scenes_root, tmp_path, monkeypatch):
    from crab_jax.config import parse_flags
    from crab_jax.errors import InputError

    words = command(scenes_root, tmp_path, "--config.steps=7")[2:]
    monkeypatch.setattr(sys, "argv", words)  # ml_collections looks for overrides there
    config, workdir = parse_flags(words, "")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "manifest.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    runs.claim_workdir(workdir, config)
    config.optim.lr = 0.5
    with pytest.raises(InputError, match="optim.lr.*0.0003.*0.5"):
        runs.claim_workdir(workdir, config)
