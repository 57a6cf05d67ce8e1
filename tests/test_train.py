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
import optax
import pytest
import safetensors.numpy

from configs import tiny
from crab_jax import optim, train
from crab_jax.checkpoints.stored import load_params
from crab_jax.config import resolve
from crab_jax.evaluation import held_out
from crab_jax.io.errors import InputError
from crab_jax.parallel import sharding
from crab_jax.parallel.watchdog import Watchdog
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.training import goodput, skip_guard, train_step
from crab_jax.training.step_programs import StepPrograms
from data_pipelines import mixture
from data_pipelines.batching import Bucket, empty_batch
from data_pipelines.examples import TASK_NAMES, Example, read_jsonl

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


@pytest.mark.slow
def test_no_recompilation_after_the_first_pass_over_the_buckets_and_the_loss_falls(scenes_root):
    jitted, state, frozen, batches = small_run(scenes_root)
    shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch) for batch in batches]
    kinds = {str(each): each for each in shapes}
    step = StepPrograms(jitted, state, frozen, kinds.values())
    first = {}
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        first.setdefault(batch.tokens.shape, float(metrics["loss"]))
    compiled = step.used()
    assert compiled == len(kinds)
    for _ in range(3):
        for batch in batches:
            state, metrics = step(state, frozen, batch)
            last = float(metrics["loss"])
    assert step.used() == compiled
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


class ScriptedStep:
    """A step without a model: its loss is its number, which a number of the parameters counts too.

    Step `skips` is one whose loss was not finite, and SIGTERM comes during step `stops`.
    """

    skips = stops = 0

    def __call__(self, state, frozen, batch):
        assert frozen["clip"]["w"].tolist() == [1.0] and batch.index.shape == (2,)
        step = int(state.step) + 1
        if step == self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
        metrics = {"loss": np.float32(step), "grad_norm": np.float32(1), "skipped": int(step == self.skips)}
        metrics |= {"bad_rows": 2, "bad_index": 0, "tokens": 10, "slots": 20, "terms": {"text": (step, 1)}}
        metrics |= {"by_task": np.zeros((2, len(TASK_NAMES)))}
        return train_step.TrainState(jnp.int32(step), jax.tree.map(lambda leaf: leaf + 1, state.trainable), ()), metrics

    def _cache_size(self):
        return 3


@pytest.fixture
def scripted(scenes_root, tmp_path, monkeypatch, capsys):
    """A function that runs `train` with a ScriptedStep and two parameters: (folder of the run, what it said)."""
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=placed)
    drawn = {"visual_qformer": {"w": jnp.zeros(1)}, "clip": {"w": jnp.ones(1)}}
    monkeypatch.setattr(run_params, "wanted_params", lambda *_: jax.tree.map(lambda _: wanted, drawn))
    monkeypatch.setattr(run_params, "initial_params", lambda *_: jax.device_put(drawn, placed))
    monkeypatch.setattr(optim, "optimizer", lambda *_: optax.identity())
    monkeypatch.setattr(train, "compile_step", lambda *_: ScriptedStep())

    def run(**changes):
        config = tiny.get_config()
        config.update_from_flattened_dict(
            {"data.root": str(scenes_root), "data.batch_size": 2, "mesh.data": 1, "log_every": 2, "checkpoint_every": 2}
            | {"trainable": ("visual_qformer/.*",), "frozen": ("clip/.*",)} | changes
        )  # fmt: skip
        train.train(resolve(config), tmp_path / "run")
        return tmp_path / "run", capsys.readouterr().out

    return run


def saved_steps(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()}


def test_a_run_says_what_it_does_and_leaves_its_steps(scripted, monkeypatch):
    """Five steps, logged and saved every two of them and at the end; the same command again has nothing to do."""
    waits = []

    class Recorded(Watchdog):
        def waiting(self, what):
            waits.append(what() if callable(what) else what)
            return super().waiting(what)

    monkeypatch.setattr(train, "Watchdog", Recorded)
    folder, said = scripted(steps=5, keep=9)
    assert "visual_qformer" in said and "trainable share 50.00%" in said and "frames empty" in said
    assert not any(word in said for word in ("resumed", "stopped", "skipped", "warning", "evaluation"))
    assert "step 1 was done" in said and "step 5/5  loss 5.0000" in said
    assert losses_of(folder) == {2: 1.5, 4: 3.5, 5: 5.0} and saved_steps(folder) == {2, 4, 5}
    assert json.loads((folder / "compilations.json").read_text()) == {"train_step": 3}
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {"first_step_s", "programs_compiled", "goodput"} < first.keys()
    for number in range(1, 6):
        assert {f"step {number} to be dispatched (the first of its bucket is compiled)", f"device step {number}"} < {
            *waits
        }
        assert any(wait.startswith(f"input of step {number}: the decoding threads, on examples ") for wait in waits)
    assert {"the checkpoint of step 2", "the checkpoint of step 5", "the last checkpoint"} < {*waits}
    noted, broken_off = '{"index": 4}\n{"index": 7}\n', '{"ind'  # by a kill
    for name in ("skipped.0.jsonl", "left_out.jsonl"):
        (folder / name).write_text(noted + broken_off)
    _, said = scripted(steps=5, keep=9)
    assert f"resumed from step 5 of {folder}" in said and "loss" not in said
    assert f"2 examples were skipped, see {folder}/skipped.*.jsonl" in said
    assert all((folder / name).read_text() == noted for name in ("skipped.0.jsonl", "left_out.jsonl"))
    with pytest.raises(InputError, match="optim.lr"):
        scripted(steps=5, keep=9, **{"optim.lr": 0.5})
    assert losses_of(folder) == {2: 1.5, 4: 3.5, 5: 5.0}


def test_a_run_that_is_asked_to_stop_saves_the_step_it_is_at_and_goes_on_from_there(scripted, monkeypatch):
    monkeypatch.setattr(ScriptedStep, "stops", 3)
    folder, said = scripted(steps=5)
    assert "stopped on request after step 3 of 5, which is saved: start the same command again to resume" in said
    assert saved_steps(folder) == {2, 3} and losses_of(folder) == {2: 1.5}
    _, said = scripted(steps=5)
    assert "resumed from step 3" in said and "stopped" not in said
    assert saved_steps(folder) == {4, 5} and losses_of(folder) == {2: 1.5, 4: 4.0, 5: 5.0}
    assert load_params(folder)["visual_qformer"]["w"].tolist() == [5.0]


def test_a_run_of_one_step_is_warned_of(scripted):
    assert "warning: --config: steps: is 1, and step 1 of it has a learning rate of 0" in scripted(steps=1)[1]


def test_a_run_is_evaluated_at_its_start_when_it_is_due_and_at_its_end(scripted, monkeypatch):
    """After all steps so far were checked. What was evaluated before a run was stopped is not evaluated again."""
    ran, due = [], held_out.HeldOut([], {}, every=2, steps=5, split="val", tasks=[])

    class Evaluation:
        compilations, chosen = 2, due

        def __init__(self, *_):
            pass

        def run(self, step, trainable, frozen, watchdog):
            assert trainable["visual_qformer"]["w"].tolist() == [step] and frozen["clip"]["w"].tolist() == [1.0]
            ran.append(step)
            return {"eval/loss": 0.5, "eval/samples": 1}

    monkeypatch.setattr(held_out, "held_out", lambda *_: due)
    monkeypatch.setattr(held_out, "Evaluation", Evaluation)
    monkeypatch.setattr(ScriptedStep, "skips", 2)
    folder, said = scripted(steps=5, checkpoint_every=9)
    assert ran == [0, 2, 4, 5] and "evaluation every 2 steps on examples of val" in said
    assert said.index("step 2 skipped") < said.index("evaluation at step 2/5  loss 0.5000")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == ran
    assert json.loads((folder / "compilations.json").read_text()) == {"train_step": 3, "evaluation": 2}
    scripted(steps=5, checkpoint_every=9)
    assert ran == [0, 2, 4, 5]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    scripted(steps=5, checkpoint_every=9)
    assert ran == [0, 2, 4, 5, 5]
